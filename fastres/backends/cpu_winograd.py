"""3x3 convolutions of stride 1 and 2 by Winograd's minimal filtering (``csrc/cpu/conv_winograd.cpp``).

F(2x2, 3x3) takes 2.25, F(3x3, 3x3) 3.24, F(4x4, 3x3) 4, F(5x5, 3x3) 4.6 and F(7x7, 3x3) 5.4 times fewer products, with
stride 2 F(2x2) 1.44 and F(4x4) 1.78 times; in float32 for every dtype of activations. Dilation is served with stride 1.

How many times as far from float64 as direct ones sums are: `csrc/cpu/winograd_points.h`. A. Lavin and S. Gray, "Fast
Algorithms for Convolutional Neural Networks", CVPR 2016.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastres.problem import Geometry, problem_of

from . import cpu, cpu_conv
from .trusted import DTYPE_CODE

#: Output pixels of a tile, a side, by stride.
OUTS = {1: (2, 3, 4, 5, 7), 2: (2, 4)}

#: Tiles whose error, some twenty times that of direct sums, is still a hundredth of what 16-bit activations lose.
ROUGH = (7,)


def outs(stride: int, dtype: torch.dtype) -> tuple[int, ...]:
    """The tiles that serve activations of a dtype."""
    return tuple(out for out in OUTS[stride] if dtype != torch.float32 or out not in ROUGH)


def why_not(x: Tensor, w: Tensor, geometry: Geometry) -> list[str]:
    """Reasons why these kernels cannot serve the convolution of x and w, [] if they can."""
    reasons = cpu_conv.why_not(x, w, geometry)
    if tuple(w.shape[2:]) != (3, 3):
        reasons.append(f"{w.shape[2]} x {w.shape[3]} taps, Winograd's are 3 x 3")
    if geometry[0] != (1, 1) and (geometry[0] != (2, 2) or geometry[2] != (1, 1)):
        expected = "1, or 2 with dilation 1"
        reasons.append(f"stride {geometry[0]} and dilation {geometry[2]}, Winograd's strides are {expected}")
    return reasons


def wins(x: Tensor, w: Tensor, geometry: Geometry) -> bool:
    """Whether the kernels are faster than oneDNN's convolution: in float32, on 32 channels and more, they were
    in every layer of stride 1 measured, 1.4 to 3.2 times with AVX2 and 1.5 to 3 with AVX-512 (docs/perf-log.md)."""
    usual = (
        x.dtype == torch.float32
        and min(w.shape[:2]) >= 32
        and geometry[0] == (1, 1)
        and cpu.isa_or_none() in ("avx2", "avx512")
    )
    return usual and not why_not(x, w, geometry)


def _sizes(N: int, H: int, W: int, C: int, K: int, padding: tuple[int, int], stride: int,
           dilation: tuple[int, int] = (1, 1)) -> tuple[int, ...]:  # fmt: skip
    geometry = (stride, stride), padding, dilation, 1
    return cpu_conv.sizes(problem_of((N, C, H, W), (K, C, 3, 3), geometry))


def pack(w: Tensor, out: int, stride: int = 1) -> Tensor:
    """The float32 weight ``[K, C, 3, 3]`` transformed for :func:`fprop` with tiles of ``out`` x ``out`` pixels and this
    stride, for the instruction set in use: dense float32."""
    if w.dtype != torch.float32 or w.dim() != 4 or tuple(w.shape[2:]) != (3, 3):
        raise ValueError(f"pack: w: got {w.dtype} {tuple(w.shape)}, expected float32 [K, C, 3, 3]")
    if stride not in OUTS:
        raise ValueError(f"pack: stride: got {stride}, expected 1 or 2")
    if out not in OUTS[stride]:
        raise ValueError(f"pack: out: got {out}, expected one of {OUTS[stride]} with stride {stride}")
    sizes = _sizes(1, 3, 3, w.shape[1], w.shape[0], (0, 0), stride)
    packed = cpu_conv.floats(cpu._require().winograd_packed_floats(sizes, out))
    cpu._require().winograd_pack(*cpu_conv.weight_address(w), sizes, out, packed.data_ptr(), torch.get_num_threads())
    return packed


def fprop(x: Tensor, packed: Tensor, K: int, padding: tuple[int, int], out: int, bias: Tensor | None = None,
          residual: Tensor | None = None, relu: bool = False, y: Tensor | None = None,
          stride: int = 1, dilation: tuple[int, int] = (1, 1)) -> Tensor:  # fmt: skip
    """``act(conv(x, w) + bias + residual)``, ``[N, K, P, Q]`` in channels_last.

    x ``[N, C, H, W]`` and residual: dense channels_last, float32, bfloat16 or float16; packed: `pack` of w, ``out``
    and ``stride`` under the instruction set in use; bias ``[K]`` float32; y, if given, is filled and returned;
    dilation: other than 1 with stride 1. Raises TypeError / ValueError naming the argument.
    """
    N, C, H, W = x.shape
    if stride != 1 and dilation != (1, 1):
        raise ValueError(f"fprop: dilation: got {dilation}, expected (1, 1) with stride {stride}")
    sizes = _sizes(N, H, W, C, K, padding, stride, dilation)
    shape = (N, K, *sizes[5:7])
    if min(shape[2:]) < 1:
        raise ValueError(f"fprop: x: got {H} x {W}, smaller than the kernel's reach")
    expected = cpu._require().winograd_packed_floats(sizes, out)
    y = cpu_conv.target(x, packed, expected, f"under {cpu.isa()}", shape, bias, residual, y)
    cpu._require().winograd_fprop(
        DTYPE_CODE[x.dtype], x.data_ptr(), packed.data_ptr(), sizes, out, 0 if bias is None else bias.data_ptr(),
        0 if residual is None else residual.data_ptr(), relu, y.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return y
