"""Convolutions on the CPU's matrix unit (``csrc/cpu/conv_matrix.cpp``): Intel AMX with bfloat16.

Activations of bfloat16 meet weights rounded to bfloat16. float32 and float16 are taken as a sum of two bfloat16,
``x = hi + lo``, and products as ``hi hi + hi lo + lo hi``: about 2^-16 of each is lost, sums are float32. G. Henry,
P. T. P. Tang and A. Heinecke, "Leveraging the bfloat16 Artificial Intelligence Datatype For Higher-Precision
Computations", ARITH 2019.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor

from fastres.problem import Geometry

from . import cpu, cpu_conv
from .trusted import DTYPE_CODE

_FLOP = 2 * 16 * 16 * 32  # of a product of two tiles


def unit() -> str:
    """Of the instruction set in use: "instructions" if they run here, "model" or "trapped" if software executes them
    (slow, for tests), else ""."""
    return "" if cpu.isa_or_none() is None else ("", "model", "trapped", "instructions")[cpu._require().matrix_unit()]


def why_not(x: Tensor, w: Tensor, geometry: Geometry) -> list[str]:
    """Reasons why these kernels cannot serve the convolution of x and w, [] if they can."""
    reasons = cpu_conv.why_not(x, w, geometry)
    if not unit():
        reasons.append("this processor has no matrix unit (AMX with bfloat16)")
    return reasons


def wins(x: Tensor, w: Tensor, geometry: Geometry) -> bool:
    """Whether the kernels are faster than PyTorch's convolution, which they are where the unit is.

    Not measured in the process: what loads the machine meanwhile would decide, and PyTorch 2.14's bfloat16 convolutions
    on the same unit are wrong for some small images (docs/perf-log-amx.md)."""
    return unit() == "instructions" and not why_not(x, w, geometry) and min(w.shape[:2]) >= 32


def peak(threads: int) -> float:
    """FLOP/s of the unit on ``threads`` threads, products of bfloat16 from registers, the best of some milliseconds."""
    count, best = 1000, 0.0
    for _ in range(8):
        start = time.perf_counter()
        cpu._require().matrix_products(count, threads)
        took = time.perf_counter() - start
        best = max(best, _FLOP * count * threads / took)
        count = max(1000, min(500_000, int(count * 5e-3 / took)))
    return best


def groups_serve(w_shape, groups: int) -> bool:
    """Whether `fprop` serves a weight ``[K, C / groups, R, S]``: one group, or several of as many channels in as out
    that fill 32 together."""
    return cpu._require().matrix_groups(w_shape[1] * groups, w_shape[0], groups)


def pack(w: Tensor, dtype: torch.dtype, groups: int = 1) -> Tensor:
    """The float32 weight ``[K, C / groups, R, S]`` as `fprop` reads it for activations of ``dtype``: dense, of float32
    in name only."""
    if w.dtype != torch.float32 or w.dim() != 4 or not cpu_conv.even_taps(w):
        raise ValueError(f"pack: w: got {w.dtype} {tuple(w.shape)}, expected dense float32 [K, C, R, S]")
    if dtype not in DTYPE_CODE or dtype == torch.float64:
        raise TypeError(f"pack: dtype: got {dtype}, expected float32, bfloat16 or float16")
    if not groups_serve(w.shape, groups):
        expected = "as many channels in as out, and groups that fill 32 of them"
        raise ValueError(f"pack: groups: got {groups} for {tuple(w.shape)}, expected {expected}")
    K, C, R, S = w.shape
    fields = (1, R, S, C * groups, K, 1, 1, R, S, 1, 1, 0, 0, 1, 1, groups)
    packed = cpu_conv.floats(cpu._require().matrix_packed_floats(DTYPE_CODE[dtype], fields))
    cpu._require().matrix_pack(
        DTYPE_CODE[dtype], *cpu_conv.weight_address(w), fields, packed.data_ptr(), torch.get_num_threads()
    )
    return packed


def stem_why_not(w_shape, geometry: Geometry) -> list[str]:
    """Reasons why the kernel of stems cannot serve a convolution, [] if it can."""
    K, C, R, S = w_shape
    if C > 4 or S > 8 or R > cpu_conv.STEM_ROWS or tuple(geometry[2]) != (1, 1) or geometry[3] != 1:
        most = f"at most 4 channels, {cpu_conv.STEM_ROWS} rows and 8 columns, no dilation, one group"
        return [f"a stem of {(K, C, R, S)} with dilation {geometry[2]} and {geometry[3]} groups: expected {most}"]
    return []


def pack_stem(w: Tensor, dtype: torch.dtype) -> Tensor:
    """The float32 weight ``[K, C, R, S]`` of a stem as an inference program reads it for images of ``dtype``: dense, of
    float32 in name only."""
    reasons = stem_why_not(w.shape, ((1, 1), (0, 0), (1, 1), 1))
    if reasons or w.dtype != torch.float32:
        raise ValueError(f"pack_stem: w: got {w.dtype} {tuple(w.shape)}, expected float32; {'; '.join(reasons)}")
    K, C, R, S = w.shape
    fields = (1, R, S, C, K, 1, 1, R, S, 1, 1, 0, 0, 1, 1, 1)
    packed = cpu_conv.floats(cpu._require().matrix_stem_packed_floats(DTYPE_CODE[dtype], fields))
    cpu._require().matrix_stem_pack(DTYPE_CODE[dtype], *cpu_conv.weight_address(w), fields, packed.data_ptr())
    return packed


def fprop(x: Tensor, packed: Tensor, w_shape, geometry: Geometry, bias: Tensor | None = None,
          residual: Tensor | None = None, relu: bool = False, y: Tensor | None = None) -> Tensor:  # fmt: skip
    """``act(conv(x, w) + bias + residual)``, ``[N, K, P, Q]`` in channels_last.

    x ``[N, C, H, W]`` and residual: dense channels_last, float32, bfloat16 or float16; packed: `pack` of w ``[K, C, R,
    S]`` for the dtype of x under the instruction set in use; bias ``[K]`` float32; y, if given, is filled and returned.
    Raises TypeError / ValueError naming the argument.
    """
    w = cpu.stand_in(w_shape, x.dtype)
    p = cpu_conv.problem("fprop", x.shape, w, geometry, x.dtype, packed=geometry[3] > 1)
    if not groups_serve(w_shape, p.groups):
        raise ValueError(f"fprop: w_shape: got {tuple(w_shape)} with {p.groups} groups, which pack() does not serve")
    fields, code = cpu_conv.sizes(p), DTYPE_CODE[x.dtype]
    expected = cpu._require().matrix_packed_floats(code, fields)
    y = cpu_conv.target(x, packed, expected, f"for {x.dtype}", (p.N, p.K, p.P, p.Q), bias, residual, y)
    cpu._require().matrix_fprop(
        code, x.data_ptr(), packed.data_ptr(), fields, 0 if bias is None else bias.data_ptr(),
        0 if residual is None else residual.data_ptr(), relu, y.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return y


def block_why_not(shapes: list, projected: bool) -> list[str]:
    """Reasons why `block` cannot serve convolutions of these ``(weight shape, geometry)``, the projection last."""
    main = shapes[:-1] if projected else shapes
    reasons = []
    if not 2 <= len(main) <= 3:
        reasons.append(f"{len(main)} convolutions, expected two or three")
    if any(geometry[3] != 1 for _, geometry in shapes):
        reasons.append("groups")
    reasons += [f"{w[1]} channels between two convolutions, expected multiples of 32" for w, _ in main[1:] if w[1] % 32]
    if projected and (tuple(shapes[-1][0][2:]) != (1, 1) or tuple(shapes[-1][1][1]) != (0, 0)):
        reasons.append("a projection that is not 1x1 without borders")
    return reasons


def block(x: Tensor, convs: list, projected: bool) -> Tensor:
    """A residual block of two or three convolutions in one pass, ``[N, K, P, Q]`` in channels_last, of the dtype of x:
    ``relu(conv(.. relu(conv(x) + bias)) + bias + shortcut)``, the shortcut x or the last of ``convs``, if projected.

    x ``[N, C, H, W]``: dense channels_last, float32, bfloat16 or float16; convs: ``(packed, weight shape, geometry,
    bias)`` of each convolution, packed as for `fprop`, bias ``[K]`` float32. Raises ValueError where `block_why_not`
    has a reason, or where a convolution does not take what the one before it makes.
    """
    reasons = block_why_not([(w, g) for _, w, g, _ in convs], projected)
    if reasons:
        raise ValueError(f"block: convs: {'; '.join(reasons)}")
    main, shape, fields = convs[:-1] if projected else convs, tuple(x.shape), []
    for packed, w_shape, geometry, bias in main:
        fields.append(_fields(x, shape, packed, w_shape, geometry, bias))
        shape = shape[0], fields[-1][4], *fields[-1][5:7]
    if projected:
        fields.append(_fields(x, tuple(x.shape), *convs[-1]))
    cpu_conv.check("block", "convs", x.dtype, x=(x, tuple(x.shape)))
    y = cpu.empty(shape, x.dtype)
    operands = [(f, packed.data_ptr(), bias.data_ptr()) for f, (packed, _, _, bias) in zip(fields, convs, strict=True)]
    cpu._require().matrix_block(
        DTYPE_CODE[x.dtype], x.data_ptr(), operands, projected, y.data_ptr(), torch.get_num_threads()
    )
    return y


def _fields(x: Tensor, shape, packed: Tensor, w_shape, geometry: Geometry, bias: Tensor) -> tuple[int, ...]:
    """Of one convolution of a block, checked."""
    p = cpu_conv.problem("block", shape, cpu.stand_in(w_shape, x.dtype), geometry, x.dtype)
    fields = cpu_conv.sizes(p)
    if packed.numel() != cpu._require().matrix_packed_floats(DTYPE_CODE[x.dtype], fields):
        raise ValueError(f"block: packed: got {packed.numel()} elements, expected what pack() makes for {x.dtype}")
    cpu_conv.check_bias(bias, p.K)
    return fields
