"""What ``whole_block`` proves a one-kernel evaluation block on: its data, its launch and its values in float64.

A trial is ``(launch(kernels, out), truth, terms)``: ``truth`` float64 with rounding where separate convolutions round,
``terms`` products in the longest sum.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor
from torch.nn import functional as F

from fastres.backends import fragments
from fastres.backends.block_kernels import BottleneckShape
from fastres.backends.eval_kernels import BasicBlockShape, StemShape


class Maker:
    """Tensors of one seed: small integers if ``whole``, else normal values that keep their size through a sum."""

    def __init__(self, device, dtype: torch.dtype, whole: bool):
        self.random = torch.Generator(device).manual_seed(0)
        self.device, self.dtype, self.whole = device, dtype, whole

    def __call__(self, size, terms: int, dtype: torch.dtype | None = None) -> Tensor:
        if self.whole:
            t = torch.randint(-2, 3, size, device=self.device, generator=self.random)
        else:
            t = torch.randn(size, device=self.device, generator=self.random) * math.sqrt(2 / terms)
        t = t.to(dtype or self.dtype)
        return t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t

    def thin(self, w: Tensor, kept: float) -> Tensor:
        """``w`` with that share of its elements, if ``whole``: so that no sum leaves the range of float16."""
        if self.whole:
            w.mul_((torch.rand(w.shape, device=self.device, generator=self.random) < kept).to(w.dtype))
        return w


def _conv(h: Tensor, w: Tensor, b: Tensor | None = None, stride: int = 1, padding: int = 0) -> Tensor:
    return F.conv2d(h.double(), w.double(), None if b is None else b.double(), stride, padding)


# ---- bottleneck


def bottleneck_data(shape: BottleneckShape, device, dtype: torch.dtype, whole: bool):
    """(x, w1, w2, w3, projection or None, bias) for ``shape``: small integers, or normal values."""
    make, (C, mid, K) = Maker(device, dtype, whole), (shape.C, shape.mid, shape.K)
    x = make((shape.N, C, shape.H, shape.W), 2)
    w1, w2, w3 = make((mid, C, 1, 1), C), make((mid, mid, 3, 3), 9 * mid), make((K, mid, 1, 1), mid)
    w2, w3 = make.thin(w2, 16 / mid), make.thin(w3, 16 / mid)
    return x, w1, w2, w3, make((K, C, 1, 1), C) if shape.projected else None, make((2 * mid + K,), 2, torch.float32)


def bottleneck_expected(x, w1, w2, w3, projection, bias) -> Tensor:
    """The block in float64, rounded where separate convolutions would round; ``bias`` float ``[b1, b2, b3]``."""
    dtype, mid = x.dtype, w1.shape[0]
    b1, b2, b3 = bias.split((mid, mid, w3.shape[0]))
    y = torch.relu(_conv(x, w1, b1)).to(dtype)
    y = torch.relu(_conv(y, w2, b2, 1, 1)).to(dtype)
    return torch.relu(_conv(y, w3, b3) + (x.double() if projection is None else _conv(x, projection)))


def _bottleneck(shape: BottleneckShape, device, dtype, whole):
    x, w1, w2, w3, projection, bias = bottleneck_data(shape, device, dtype, whole)
    truth = bottleneck_expected(x, w1, w2, w3, projection, bias)
    packed = functools.cache(lambda packing: packing(w1, w2, w3, projection))  # once, so that no timing has it inside

    def launch(kernels, out: Tensor) -> None:
        kernels.bottleneck_eval(x, packed(kernels.pack_bottleneck), bias, shape.mid, shape.projected, out)

    return launch, truth, 9 * shape.mid


# ---- basic block


def basic_block_data(shape: BasicBlockShape, device, dtype: torch.dtype, whole: bool):
    """(x, w1, w2, bias)."""
    make, C = Maker(device, dtype, whole), shape.C
    x = make((shape.N, C, shape.H, shape.W), 2)
    w1, w2 = make((C, C, 3, 3), 9 * C), make((C, C, 3, 3), 9 * C)
    return x, make.thin(w1, 8 / C), make.thin(w2, 8 / C), make((2 * C,), 2, torch.float32)


def basic_block_expected(x, w1, w2, bias) -> Tensor:
    """The block in float64, likewise; ``bias`` float ``[b1, b2]``."""
    b1, b2 = bias.chunk(2)
    y = torch.relu(_conv(x, w1, b1, 1, 1)).to(x.dtype)
    return torch.relu(_conv(y, w2, b2, 1, 1) + x.double())


def _basic_block(shape: BasicBlockShape, device, dtype, whole):
    x, w1, w2, bias = basic_block_data(shape, device, dtype, whole)
    weights = fragments.basic_block(w1, w2)
    truth = basic_block_expected(x, w1, w2, bias)
    return lambda k, out: k.basic_block_eval(x, weights, bias, out), truth, 9 * shape.C


# ---- stem


def stem_data(shape: StemShape, device, dtype: torch.dtype, whole: bool):
    """(x, w, bias)."""
    make = Maker(device, dtype, whole)
    x, w = make((shape.N, 3, shape.H, shape.W), 2), make((shape.K, 3, 7, 7), 147)
    return x, w, make((shape.K,), 2, torch.float32)


def stem_expected(x, w, bias) -> Tensor:
    """The stem in float64, likewise."""
    return F.max_pool2d(torch.relu(_conv(x, w, bias, 2, 3)), 3, 2, 1)


def _stem(shape: StemShape, device, dtype, whole):
    x, w, bias = stem_data(shape, device, dtype, whole)
    weights = fragments.stem(w)
    return lambda k, out: k.stem_eval(x, weights, bias, out), stem_expected(x, w, bias), 147


@functools.singledispatch
def trial(shape, device, dtype: torch.dtype, whole: bool):
    """The trial of ``shape``: on small integers, where any order of a sum is exact, if ``whole``, else normal."""
    raise TypeError(f"shape: got {type(shape).__name__}, expected that of a bottleneck, a basic block or a stem")


trial.register(BottleneckShape, _bottleneck)
trial.register(BasicBlockShape, _basic_block)
trial.register(StemShape, _stem)
