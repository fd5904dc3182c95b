"""1x1 convolutions by Strassen's matrix product (``csrc/cpu/conv_strassen.cpp``): 7 products of halves in place of 8,
or 49 of quarters in place of 64, in float32 for every dtype of activations.

Sums are about 1.7 times as far from float64 as direct ones a level.

V. Strassen, "Gaussian Elimination is not Optimal", 1969; J. Huang et al., "Strassen's Algorithm Reloaded", SC 2016.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastres.problem import Geometry

from . import cpu, cpu_conv
from .trusted import DTYPE_CODE

#: By level, channels of each side from which on fewer products may save more than the sums before and after them take.
LEAST = {1: 128, 2: 256}


def why_not(x: Tensor, w: Tensor, geometry: Geometry) -> list[str]:
    """Reasons why the kernel cannot serve the convolution of x and w, [] if it can."""
    reasons = cpu_conv.why_not(x, w, geometry)
    if tuple(w.shape[2:]) != (1, 1) or geometry[1] != (0, 0):
        reasons.append(f"{w.shape[2]} x {w.shape[3]} taps, padding {geometry[1]}: Strassen's are 1 x 1 without")
    return reasons


def _sizes(N: int, H: int, W: int, C: int, K: int, stride: tuple[int, int]) -> tuple[int, ...]:
    P, Q = ((n - 1) // s + 1 for n, s in zip((H, W), stride, strict=True))
    return N, H, W, C, K, P, Q, 1, 1, *stride, 0, 0, 1, 1, 1


def pack(w: Tensor, levels: int = 1) -> Tensor:
    """The sums of parts of the float32 weight ``[K, C, 1, 1]`` for :func:`fprop` of so many levels, 1 or 2, for the
    instruction set in use: dense float32."""
    if w.dtype != torch.float32 or w.dim() != 4 or tuple(w.shape[2:]) != (1, 1):
        raise ValueError(f"pack: w: got {w.dtype} {tuple(w.shape)}, expected float32 [K, C, 1, 1]")
    if levels not in LEAST:
        raise ValueError(f"pack: levels: got {levels}, expected 1 or 2")
    sizes = _sizes(1, 1, 1, w.shape[1], w.shape[0], (1, 1))
    packed = cpu_conv.floats(cpu._require().strassen_packed_floats(sizes, levels))
    address, w_k, w_c, _ = cpu_conv.weight_address(w)
    cpu._require().strassen_pack(address, w_k, w_c, sizes, levels, packed.data_ptr(), torch.get_num_threads())
    return packed


def fprop(x: Tensor, packed: Tensor, K: int, bias: Tensor | None = None, residual: Tensor | None = None,
          relu: bool = False, y: Tensor | None = None, stride: tuple[int, int] = (1, 1),
          levels: int = 1) -> Tensor:  # fmt: skip
    """``act(conv(x, w) + bias + residual)``, ``[N, K, P, Q]`` in channels_last.

    x ``[N, C, H, W]`` and residual: dense channels_last, float32, bfloat16 or float16; packed: `pack` of w for
    ``levels`` under the instruction set in use; bias ``[K]`` float32; y, if given, is filled and returned. A NaN or an
    infinity may reach other pixels of its image. Raises TypeError / ValueError naming the argument.
    """
    N, C, H, W = x.shape
    sizes = _sizes(N, H, W, C, K, stride)
    shape = (N, K, *sizes[5:7])
    expected = cpu._require().strassen_packed_floats(sizes, levels)
    y = cpu_conv.target(x, packed, expected, f"under {cpu.isa()}", shape, bias, residual, y)
    cpu._require().strassen_fprop(
        DTYPE_CODE[x.dtype], x.data_ptr(), packed.data_ptr(), sizes, levels, 0 if bias is None else bias.data_ptr(),
        0 if residual is None else residual.data_ptr(), relu, y.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return y
