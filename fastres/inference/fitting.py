"""Convolutions of small images: taps that meet nothing but padding have weights that nobody needs to read."""

from __future__ import annotations

from typing import NamedTuple

import torch

from fastres.inference.plan import Conv, Shape
from fastres.ops.params import out_size


class Span(NamedTuple):
    """In one dimension: taps [first, first + taps) in place of all, with a stride and a padding for them."""

    first: int
    taps: int
    stride: int
    padding: int


class Fit(NamedTuple):
    """``joined``: the taps cover the whole image, so that it is one pixel of as many more channels."""

    rows: Span
    columns: Span
    joined: bool

    def shape(self, shape: Shape) -> Shape:
        """Of the input as the fitted convolution takes it: the same memory, in channels_last."""
        N, C, H, W = shape
        return (N, H * W * C, 1, 1) if self.joined else shape

    def conv(self, conv: Conv) -> Conv:
        """The convolution that computes the same of images of the size that this was made for."""
        (top, R, *rows), (left, S, *columns) = self.rows, self.columns
        weight = conv.weight[:, :, top : top + R, left : left + S]
        if self.joined:
            weight = weight.permute(0, 2, 3, 1).reshape(len(weight), -1, 1, 1)  # pixels become channels
        stride, padding = zip(rows, columns, strict=True)
        return Conv(weight, conv.bias, stride, padding, conv.dilation, conv.groups)


def fit(weight: torch.Size | Shape, geometry, image: tuple[int, int]) -> Fit | None:
    """For a convolution ``[K, C, R, S]`` of one group and images of H x W; None where all of it is needed.

    ``geometry``: (stride, padding, dilation, groups), see `Conv.geometry`. Sums keep their order: zeros fall out.
    """
    stride, padding, dilation, groups = geometry
    if groups != 1:
        return None
    rows, columns = map(_span, image, weight[2:], stride, padding, dilation)
    taps = rows.taps, columns.taps
    # Dilation has no meaning where there is one tap.
    dense = all(n == 1 or d == 1 for n, d in zip(taps, dilation, strict=True))
    joined = taps == tuple(image) != (1, 1) and dense and rows.padding == columns.padding == 0
    whole = Span(0, weight[2], stride[0], padding[0]), Span(0, weight[3], stride[1], padding[1])
    return Fit(rows, columns, joined) if joined or (rows, columns) != whole else None


def _span(size: int, taps: int, stride: int, padding: int, dilation: int) -> Span:
    out = out_size(size, taps, stride, padding, dilation)
    starts = range(-padding, out * stride - padding, stride)
    live = [t for t in range(taps) if any(0 <= s + t * dilation < size for s in starts)]
    if not live:
        return Span(0, taps, stride, padding)
    first, n = live[0], live[-1] - live[0] + 1
    before = padding - first * dilation
    if before < 0 or out_size(size, n, stride, before, dilation) != out:  # more on one side than on the other
        return Span(0, taps, stride, padding)
    reach = (n - 1) * dilation + 1
    return Span(first, n, 1 if size == reach and before == 0 else stride, before)
