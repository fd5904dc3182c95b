"""Convolutions of the CPU backend (``csrc/cpu/conv_*.cpp``), and where they are faster than oneDNN's.

The kernels widen 16-bit activations to float32 while they lay them out and sum in float32. Without a matrix unit that
is as fast as float32, while oneDNN uses the bf16 dot product, which several processors run at half the rate of a
float32 FMA, or has no 16-bit primitive at all. Whether it pays is measured once per process (`narrow_ratio`).
In float32 oneDNN is near the peak, so single layers are picked from a table of measurements.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import torch
from torch import Tensor

from fastres.problem import ConvProblem, Geometry, problem_of

from . import cpu
from .trusted import DTYPE_CODE

_CL = torch.channels_last
#: Taps a kernel has room for (csrc/cpu/conv_direct.h).
MAX_TAPS = 121
#: Rows of taps that the stem's kernel has room for (csrc/cpu/conv_stem.cpp).
STEM_ROWS = 15
#: A measured ratio must exceed this before a kernel of ours replaces PyTorch's call.
MARGIN = 1.1
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def groups_serve(w_shape, groups: int, pairs: bool = False) -> bool:
    """Whether :func:`fprop` with packed weights serves a weight ``[K, C / groups, R, S]``, by pairs or by floats."""
    return cpu._require().conv_groups(w_shape[1] * groups, w_shape[0], groups, pairs)


def why_not(x: Tensor, w: Tensor, geometry: Geometry, grouped: bool = False) -> list[str]:
    """Reasons why the kernels cannot serve the convolution of x and w, [] if they can. ``grouped``: groups will do,
    which only :func:`fprop` with packed weights knows."""
    reasons = []
    if cpu._module is None:
        return [cpu._missing]
    if x.device.type != "cpu":
        reasons.append(f"tensors are on {x.device}, the cpu backend serves CPU tensors")
    if x.dtype not in _DTYPES or w.dtype != x.dtype:
        reasons.append(f"dtypes {x.dtype} and {w.dtype} are not float32, bfloat16 or float16 for both")
    if geometry[3] != 1 and not (grouped and groups_serve(w.shape, geometry[3])):
        reasons.append(f"{geometry[3]} groups of {w.shape[1]} channels are not served")
    if w.shape[2] * w.shape[3] > MAX_TAPS:
        reasons.append(f"{w.shape[2]} x {w.shape[3]} taps, the kernels have room for {MAX_TAPS}")
    if 0 in x.shape or 0 in w.shape:
        reasons.append("an empty operand")
    return reasons


def wins(kind: str, x: Tensor, w: Tensor, geometry: Geometry) -> bool:
    """Whether ``kind`` ("fprop", "dgrad", "wgrad") of ours is the faster one; x: the input, or a tensor like it."""
    return _wins(kind, x.dtype, x.device.type, tuple(x.shape), tuple(w.shape), geometry, cpu.isa_or_none())


@functools.lru_cache(maxsize=4096)
def _wins(kind, dtype, device, x_shape, w_shape, geometry, isa) -> bool:
    x, w = (torch.empty(1, dtype=dtype, device=device).expand(s) for s in (x_shape, w_shape))
    if isa in (None, "scalar") or why_not(x, w, geometry):
        return False
    p = problem_of(x_shape, w_shape, geometry)
    if kind == "wgrad" and p.C < 16:
        return False  # a panel is 32 channels wide: 0.2x of oneDNN for the 3 of a stem
    if dtype != torch.float32:
        return narrow_ratio(dtype) > MARGIN
    return _TABLES[isa](kind, p) if isa in _TABLES else False


def _avx512_fp32(kind: str, p: ConvProblem) -> bool:
    """Measured against oneDNN on 2 cores with AVX-512 (docs/perf-log.md), batch 8: single layers of ResNet-50 take
    0.8x to 1.2x of its time in fprop and dgrad, and a whole step is faster on outputs that lie in the pool."""
    return min(p.C, p.K) >= 16


def _avx2_fp32(kind: str, p: ConvProblem) -> bool:
    """Measured on 2 cores of a Zen 2, batch 8, the layers of ResNet-50: only weight gradients win there."""
    pixels = p.N * p.P * p.Q
    if kind != "wgrad":
        return False
    return min(p.K, p.C) >= 32 if p.R * p.S >= 9 else min(p.K, p.C) >= 256 and pixels <= 2048


_TABLES = {"avx512": _avx512_fp32, "avx2": _avx2_fp32}


def narrow_ratio(dtype: torch.dtype) -> float:
    """`ratio` of `fprop` for a 16-bit dtype."""
    return ratio(dtype, fprop)


@functools.cache
def ratio(dtype: torch.dtype, ours: Callable[[Tensor, Tensor, Geometry], Tensor]) -> float:
    """How many times faster than PyTorch's ``ours`` runs a 3x3 convolution here: the least of five runs each in turns,
    about 20 ms, once per process. Infinite where PyTorch has no primitive for the dtype."""
    narrow = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype)
    if narrow and not getattr(torch.ops.mkldnn, f"_is_mkldnn_{narrow}_supported")():
        return float("inf")
    x = torch.ones(4, 64, 28, 28, dtype=dtype, device="cpu").to(memory_format=_CL)
    w = torch.ones(64, 64, 3, 3, dtype=dtype, device="cpu").to(memory_format=_CL)
    g = ((1, 1), (1, 1), (1, 1), 1)
    best = [float("inf"), float("inf")]
    for _ in range(6):  # the first run of each is its warm-up, and never the least
        for i, run in enumerate((_plain, ours)):
            start = time.perf_counter()
            run(x, w, g)
            best[i] = min(best[i], time.perf_counter() - start)
    return best[0] / best[1]


def _plain(x: Tensor, w: Tensor, g: Geometry) -> Tensor:
    return torch.ops.aten.convolution(x, w, None, *g[:3], False, (0, 0), g[3])


def sizes(p: ConvProblem) -> tuple[int, ...]:
    return p.N, p.H, p.W, p.C, p.K, p.P, p.Q, p.R, p.S, *p.stride, *p.padding, *p.dilation, p.groups


def pairs_unit() -> str:
    """What the instruction set in use has for products of pairs of bfloat16 (``fprop(..., pairs=True)``): "", "model"
    (software, slow, for tests), "slow" (an instruction that takes as long as the products of floats, or longer) or
    "full" (twice as fast as those)."""
    return "" if cpu.isa_or_none() is None else ("", "model", "slow", "full")[cpu._require().pairs_unit()]


def even_taps(w: Tensor) -> bool:
    """Whether the taps of w lie at equal distances, as the kernels need; so they do in every usual layout."""
    return w.shape[2] == 1 or w.stride(2) == w.shape[3] * w.stride(3)


def weight_address(w: Tensor) -> tuple[int, int, int, int]:
    """Address and strides in K, C and taps."""
    if not even_taps(w):
        raise ValueError(f"w: got strides {w.stride()}, expected taps at equal distances")
    return w.data_ptr(), w.stride(0), w.stride(1), w.stride(3) if w.shape[3] > 1 else w.stride(2)


def check(function: str, p: ConvProblem | str, dtype: torch.dtype, **tensors: tuple[Tensor | None, tuple]) -> None:
    for what, (t, shape) in tensors.items():
        if t is None:
            continue
        if t.device.type != "cpu" or t.dtype != dtype:
            raise TypeError(f"{function}: {what}: got {t.dtype} on {t.device}, expected {dtype} on the CPU")
        if tuple(t.shape) != shape:
            raise ValueError(f"{function}: {what}: got shape {tuple(t.shape)}, expected {shape} for {p}")
        if not t.is_contiguous(memory_format=_CL):
            raise ValueError(f"{function}: {what}: got strides {t.stride()}, expected dense channels_last")


def check_bias(bias: Tensor | None, K: int) -> None:
    if bias is not None and (bias.dtype != torch.float32 or tuple(bias.shape) != (K,) or not bias.is_contiguous()):
        raise ValueError(f"fprop: bias: got {bias.dtype} {tuple(bias.shape)}, expected dense float32 ({K},)")


def target(x: Tensor, packed: Tensor, expected: int, made: str, shape: tuple, bias: Tensor | None,
           residual: Tensor | None, y: Tensor | None) -> Tensor:  # fmt: skip
    """y ``shape``, made where it is None, for operands that are what `fprop` of some algorithm needs; packed: of
    ``expected`` elements, ``made`` as its pack() makes them. Raises TypeError / ValueError naming the argument."""
    if packed.dtype != torch.float32 or packed.numel() != expected:
        got = f"{packed.dtype} of {packed.numel()} elements"
        raise ValueError(f"fprop: packed: got {got}, expected {expected} as pack() makes them {made}")
    y = cpu.empty(shape, x.dtype) if y is None else y
    check("fprop", str(shape), x.dtype, x=(x, tuple(x.shape)), residual=(residual, shape), y=(y, shape))
    check_bias(bias, shape[1])
    return y


def problem(function: str, x_shape, w: Tensor, g: Geometry, dtype: torch.dtype, packed: bool = False,
            pairs: bool = False) -> ConvProblem:  # fmt: skip
    if dtype not in _DTYPES or w.dtype != dtype:
        raise TypeError(f"{function}: w: got {w.dtype} for {dtype}, expected float32, bfloat16 or float16 for both")
    p = problem_of(x_shape, w.shape, g)
    served = g[3] == 1 or packed and w.shape[0] % g[3] == 0 and groups_serve(w.shape, g[3], pairs)
    if not served or w.shape[1] * g[3] != p.C:
        expected = f"[K, {p.C}, R, S] of one group" + (", or groups that come out even with 32 channels" * packed)
        raise ValueError(f"{function}: w: got shape {tuple(w.shape)} with {g[3]} groups, expected {expected}")
    if p.R * p.S > MAX_TAPS:
        raise ValueError(f"{function}: w: got {p.R} x {p.S} taps, expected at most {MAX_TAPS}")
    if min(p.P, p.Q) < 1:
        raise ValueError(f"{function}: x: got {p.H} x {p.W}, smaller than the kernel's reach")
    return p


def fprop(x: Tensor, w: Tensor, g: Geometry, bias: Tensor | None = None, residual: Tensor | None = None,
          relu: bool = False, y: Tensor | None = None, packed: Tensor | None = None,
          pairs: bool = False) -> Tensor:  # fmt: skip
    """``act(conv(x, w) + bias + residual)``, ``[N, K, P, Q]`` in channels_last.

    x ``[N, C, H, W]`` and residual: dense channels_last; w ``[K, C, R, S]`` in the dtype of x; bias ``[K]`` float32.
    y, if given, is filled and returned. packed: what :func:`pack` made of w under the
    instruction set in use, for ``pairs`` or not. Raises TypeError / ValueError naming the argument.
    """
    if pairs and (packed is None or x.dtype != torch.bfloat16):
        raise ValueError(f"fprop: pairs: got x of {x.dtype}, expected bfloat16 and packed weights")
    p = problem("fprop", x.shape, w, g, x.dtype, packed is not None, pairs)
    shape = (p.N, p.K, p.P, p.Q)
    y = cpu.empty(shape, x.dtype) if y is None else y
    check("fprop", p, x.dtype, x=(x, tuple(x.shape)), residual=(residual, shape), y=(y, shape))
    check_bias(bias, p.K)
    fields = sizes(p)
    if packed is not None and packed.numel() != cpu._require().conv_packed_floats(fields, pairs):
        raise ValueError(f"fprop: packed: got {packed.numel()} elements, expected those of pack() under {cpu.isa()}")
    cpu._require().conv_fprop(
        DTYPE_CODE[x.dtype], x.data_ptr(), *weight_address(w), 0 if packed is None else packed.data_ptr(), pairs,
        fields, 0 if bias is None else bias.data_ptr(), 0 if residual is None else residual.data_ptr(), relu,
        y.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return y


def floats(n: int) -> Tensor:
    """Uninitialised float32 ``[n]``, in huge pages if large: a pass over small ones waits for page tables."""
    return cpu.empty((1, 1, 1, n), torch.float32).view(-1)


def pack(w: Tensor, groups: int = 1, pairs: bool = False) -> Tensor:
    """The weight ``[K, C / groups, R, S]`` as :func:`fprop` reads it, for the instruction set in use: dense float32, or
    by ``pairs`` of bfloat16, of a float32 weight (of float32 in name only)."""
    K, C, R, S = w.shape[0], w.shape[1] * groups, *w.shape[2:]
    problem("pack", (1, C, R, S), w, ((1, 1), (0, 0), (1, 1), groups), w.dtype, packed=True, pairs=pairs)
    if pairs and w.dtype != torch.float32:
        raise TypeError(f"pack: w: got {w.dtype}, expected float32 for pairs")
    fields = (1, R, S, C, K, 1, 1, R, S, 1, 1, 0, 0, 1, 1, groups)
    packed = floats(cpu._require().conv_packed_floats(fields, pairs))
    cpu._require().conv_pack(
        DTYPE_CODE[w.dtype], *weight_address(w), fields, pairs, packed.data_ptr(), torch.get_num_threads()
    )
    return packed


def pack_stem(w: Tensor, pairs: bool = False) -> Tensor:
    """The float32 weight ``[K, 3, R, S]`` of a stem of horizontal stride 2 as an inference program reads it, for the
    instruction set in use, for images of bfloat16 by ``pairs`` or for any by floats: dense float32."""
    K, C, R, S = w.shape
    if w.dtype != torch.float32 or C != 3 or R > STEM_ROWS:
        raise ValueError(f"pack_stem: w: got {w.dtype} {tuple(w.shape)}, expected float32 [K, 3, <= {STEM_ROWS}, S]")
    fields = (1, R, S, C, K, 1, 1, R, S, 1, 2, 0, 0, 1, 1, 1)
    packed = floats(cpu._require().stem_packed_floats(fields, pairs))
    cpu._require().stem_pack(*weight_address(w), fields, pairs, packed.data_ptr())
    return packed


def dgrad(dy: Tensor, x_shape, w: Tensor, g: Geometry) -> Tensor:
    """Gradient of the input ``[N, C, H, W]``, channels_last. dy ``[N, K, P, Q]``: dense channels_last."""
    p = problem("dgrad", x_shape, w, g, dy.dtype)
    check("dgrad", p, dy.dtype, dy=(dy, (p.N, p.K, p.P, p.Q)))
    dx = cpu.empty(tuple(x_shape), dy.dtype)
    cpu._require().conv_dgrad(
        DTYPE_CODE[dy.dtype], dy.data_ptr(), *weight_address(w), sizes(p), dx.data_ptr(), torch.get_num_threads()
    )
    return dx


def wgrad(dy: Tensor, x: Tensor, w: Tensor, g: Geometry) -> Tensor:
    """Gradient of the weight, float32 whatever the dtype of dy and x, channels_last. Of ``w`` only shape and dtype
    matter. dy ``[N, K, P, Q]``, x ``[N, C, H, W]``: dense channels_last."""
    p = problem("wgrad", x.shape, w, g, x.dtype)
    check("wgrad", p, x.dtype, x=(x, tuple(x.shape)), dy=(dy, (p.N, p.K, p.P, p.Q)))
    dw = torch.empty(w.shape, dtype=torch.float32, device="cpu", memory_format=_CL)
    cpu._require().conv_wgrad(
        DTYPE_CODE[x.dtype], dy.data_ptr(), x.data_ptr(), sizes(p), dw.data_ptr(), torch.get_num_threads()
    )
    return dw
