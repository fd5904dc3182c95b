"""Folded weights of evaluation-mode blocks, kept as long as the tensors they were made of stay the same.

The cache lives beside the modules, not in them: state_dict, pickle and deepcopy never see it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastres import block_geometry, dispatch, rotated, whole_block
from fastres import convolution as conv_lib
from fastres.backends.block_kernels import BottleneckShape
from fastres.ops.bn import as_given, nhwc
from fastres.ops.conv_bn_act import conv_bias_act, fold_conv_bn
from fastres.ops.params import ConvBN, compute_dtype


class Folded:
    """One convolution with its BN folded in: weight, bias, and the weight as oneDNN stores it once that was asked.

    In a block that runs as one kernel the first unit also keeps what that kernel reads.
    """

    def __init__(self, weight: Tensor, bias: Tensor):
        self.weight, self.bias, self.packed = weight, bias, None
        self.streams: dict = {}  # of a block's first unit: the whole block packed, by what packed it
        #: of a block's first unit: the next block's first unit or None, and what the rotated unit reads
        self.rotated: tuple[Folded | None, tuple[Tensor, Tensor]] | None = None


_CACHE: weakref.WeakKeyDictionary[nn.Module, tuple] = weakref.WeakKeyDictionary()


def can_fold(convs: Sequence[ConvBN]) -> bool:
    """Evaluation without grad, outside compilation, on tensors whose changes can be noticed."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return not any(c.bn.training for c in convs) and not any(t.is_inference() for t in _sources(convs))


def drop(owner: nn.Module) -> None:
    """Forget what was folded for ``owner``."""
    _CACHE.pop(owner, None)


def is_folded(owner: nn.Module) -> bool:
    return owner in _CACHE


def folded(owner: nn.Module, convs: Sequence[ConvBN], dtype: torch.dtype) -> list[Folded]:
    """Each convolution with its BN folded in float64, weights in ``dtype``.

    Made anew when a source tensor is another object, was written to (its version counter) or moved (its address),
    or when an eps or ``dtype`` changed. A write through ``.data`` at the same address goes unnoticed.
    """
    sources = _sources(convs)
    constants = (dtype, *(c.bn.eps for c in convs))
    entry = _CACHE.get(owner)
    if entry is not None and entry[0] == constants and len(entry[1]) == len(sources):
        if all(
            ref() is t and v == t._version and p == t.data_ptr()
            for (ref, v, p), t in zip(entry[1], sources, strict=True)
        ):
            return entry[2]
    with torch.inference_mode(False), torch.no_grad():
        values = [Folded(w.to(dtype), b) for w, b in map(fold_conv_bn, convs)]
    _CACHE[owner] = constants, [(weakref.ref(t), t._version, t.data_ptr()) for t in sources], values
    return values


def _sources(convs: Sequence[ConvBN]) -> list[Tensor]:
    sources = []
    for c in convs:
        b = c.bn
        sources += [t for t in (c.weight, c.bias, b.weight, b.bias, b.running_mean, b.running_var) if t is not None]
    return sources


def _convolve(x: Tensor, conv: ConvBN, unit: Folded, residual: Tensor | None, relu: bool) -> Tensor:
    fits = x.dim() == 4 and x.shape[1] == unit.weight.shape[1] * conv.groups
    if dispatch.forced() or not fits or not conv_lib.has_pointwise(x):
        return conv_bias_act(
            x, unit.weight, unit.bias, stride=conv.stride, padding=conv.padding, dilation=conv.dilation,
            groups=conv.groups, residual=residual, relu=relu,
        )  # fmt: skip
    geometry = (conv.stride, conv.padding, conv.dilation, conv.groups)
    given, x = x, nhwc(x)
    if unit.packed is None:
        unit.packed = conv_lib.pack(unit.weight, x, geometry)
    residual = None if residual is None else nhwc(residual)
    return as_given(conv_lib.pointwise(x, unit.packed, unit.bias, geometry, residual, relu), given)


def folded_block(owner: nn.Module, x: Tensor, convs: Sequence[ConvBN], shortcut: ConvBN | None) -> Tensor:
    """A residual block of folded convolutions, for which ``can_fold`` holds."""
    dtype = compute_dtype(x)
    x = x.to(dtype)
    weights = folded(owner, [*convs, shortcut] if shortcut is not None else convs, dtype)

    def separate() -> Tensor:
        h, last = x, len(convs) - 1
        residual = x if shortcut is None else _convolve(x, shortcut, weights[-1], None, False)
        for i in range(last):
            h = _convolve(h, convs[i], weights[i], None, True)
        return _convolve(h, convs[last], weights[last], residual, True)

    return _in_one_or_separate(owner, x, block_geometry.shape_of(x, convs, shortcut), weights, separate)


def _in_one_or_separate(owner: nn.Module, x: Tensor, shape, units: list[Folded], separate: Callable[[], Tensor]):
    """The block, or stem, by the kernel that serves it, or by separate convolutions, and then ``owner`` keeps why."""
    kernels = whole_block.kernels_for(x, shape, separate, lambda k: _in_one(k, x, shape, units))
    why = whole_block.why_separate(x, shape) if kernels is None else None
    if owner._fastres_separate != why:
        owner._fastres_separate = why
    return separate() if kernels is None else _in_one(kernels, x, shape, units)


def _in_one(kernels, x: Tensor, shape, units: list[Folded]) -> Tensor:
    """The block, or stem, by the kernel that serves it."""
    packing = whole_block.packing(kernels, shape)
    if packing not in units[0].streams:
        units[0].streams[packing] = whole_block.pack(units, packing)
    return as_given(whole_block.compute(kernels, shape, x, units[0].streams[packing]), x)


class Member(NamedTuple):
    """A block of a run: the module, its three convolutions, its shape as a kernel sees it."""

    block: nn.Module
    convs: tuple[ConvBN, ...]
    shape: BottleneckShape


def folded_run(run: Sequence[Member], x: Tensor) -> Tensor | None:
    """Identity bottlenecks in a row as rotated units, or None where the blocks one by one serve ``x`` better."""
    shape = rotated.run_shape([member.shape for member in run])
    if shape is None:
        return None
    units = [folded(member.block, member.convs, x.dtype) for member in run]

    def separate() -> Tensor:
        y = x
        for member in run:
            y = member.block(y)
        return y

    def ours(kernels) -> Tensor:
        h = nhwc(_convolve(x, run[0].convs[0], units[0][0], None, True))
        residual = nhwc(x)
        if residual.data_ptr() % 16:
            residual = residual.clone(memory_format=torch.channels_last)
        following = [unit[0] for unit in units[1:]] + [None]
        packed = [_rotated(unit, after) for unit, after in zip(units, following, strict=True)]
        return as_given(rotated.run(kernels, h, residual, packed), x)

    kernels = rotated.kernels_for(x, shape, separate, ours)
    return None if kernels is None else ours(kernels)


def _rotated(units: list[Folded], after: Folded | None) -> tuple[Tensor, Tensor]:
    """What the rotated unit of a block reads, packed once for the pair of blocks."""
    kept = units[0].rotated
    if kept is None or kept[0] is not after:
        kept = units[0].rotated = after, rotated.pack(units, after)
    return kept[1]


def folded_stem(owner: nn.Module, x: Tensor, conv: ConvBN, kernel: int, stride: int, padding: int) -> Tensor:
    dtype = compute_dtype(x)
    x, units = x.to(dtype), folded(owner, [conv], dtype)

    def separate() -> Tensor:
        return F.max_pool2d(_convolve(x, conv, units[0], None, True), kernel, stride, padding)

    shape = block_geometry.stem_shape(x, conv, kernel, stride, padding)
    return _in_one_or_separate(owner, x, shape, units, separate)


def folded_conv(owner: nn.Module, x: Tensor, conv: ConvBN, residual: Tensor | None, relu: bool) -> Tensor:
    dtype = compute_dtype(x)
    return _convolve(x.to(dtype), conv, folded(owner, [conv], dtype)[0], residual, relu)
