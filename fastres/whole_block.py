"""Evaluation blocks as one kernel: whether there is one for a block, whether it is right, and whether it is faster.

A forced backend serves what its kernels can. The automatic choice takes a kernel only after it gave the right values on
this very device and was faster, on inputs of this very size, than the separate convolutions; both are found out at the
first call, in milliseconds, and remembered. Whatever is turned down is served by separate convolutions.
"""

from __future__ import annotations

import math
import statistics
import threading
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from fastres import dispatch
from fastres.backends import fragments
from fastres.backends.block_kernels import BottleneckShape
from fastres.backends.reference import acc_dtype

#: (device index, dtype, shape) -> why the separate convolutions serve, or "" where the kernel does.
_verdicts: dict[tuple, str] = {}
_lock = threading.RLock()  # timing a run of blocks may need verdicts on its blocks
_RUNS = 7


def shape_of(x: Tensor, convs, shortcut) -> BottleneckShape | None:
    """The block as a kernel would see it, or None where its geometry is not 1x1, 3x3, 1x1 of stride 1."""
    if len(convs) != 3:
        return None
    pointwise = ((1, 1), (0, 0))
    for conv, kernel in zip((*convs, shortcut), ((1, 1), (3, 3), (1, 1), (1, 1)), strict=True):
        if conv is None:
            continue
        stride, padding = pointwise if kernel == (1, 1) else ((1, 1), (1, 1))
        fits = tuple(conv.weight.shape[2:]) == kernel and conv.stride == stride and conv.padding == padding
        if not fits or conv.groups != 1 or (kernel == (3, 3) and conv.dilation != (1, 1)):
            return None
    N, C, H, W = x.shape
    mid, K = convs[0].weight.shape[0], convs[2].weight.shape[0]
    shapes = [(mid, C), (mid, mid), (K, mid)] + [(K, C)] * (shortcut is not None)
    found = [tuple(c.weight.shape[:2]) for c in (*convs, shortcut) if c is not None]
    if shapes != found or (shortcut is None and K != C):
        return None
    return BottleneckShape(N, H, W, C, mid, K, shortcut is not None)


def pack(units) -> tuple[Tensor, Tensor]:
    """(weights, bias) of ``bottleneck_eval`` from folded units: three, and the projection's if there is one."""
    weights = [unit.weight for unit in units]
    bias = [unit.bias.float() for unit in units]
    last = bias[2] if len(bias) == 3 else bias[2] + bias[3]
    return fragments.bottleneck(*weights), torch.cat((bias[0], bias[1], last)).contiguous()


def kernels_for(x: Tensor, shape, separate: Callable[[], Tensor], ours: Callable[..., Tensor], *,
                ask: str = "why_not_bottleneck", proof: Callable[..., str] | None = None):  # fmt: skip
    """The backend whose kernel serves the unit ``shape`` on ``x``, or None. ``ours(kernels)`` and ``separate()``
    compute it; the backend's ``ask`` says what hinders it, ``proof`` (default `check`) what is wrong with its values.
    """
    name = dispatch.forced() or ("cuda" if x.device.type == "cuda" else "")
    kernels = dispatch.load(name) if name else None
    why_not = getattr(kernels, ask, None)
    if why_not is None or not x.numel() or why_not(x.device, x.dtype, shape):
        return None
    if dispatch.forced():
        return kernels
    key = (x.device.index, x.dtype, shape)
    verdict = _verdicts.get(key)
    if verdict is None:
        if torch.cuda.is_current_stream_capturing():
            return None  # no verdict can be had now; a later call may have one
        with _lock:
            verdict = _verdicts[key] = _verdict(kernels, x, shape, separate, ours, proof or check)
    return None if verdict else kernels


def forget() -> None:
    """Drop every verdict."""
    _verdicts.clear()


def verdicts() -> dict[str, str]:
    """What was decided in this process: block in words -> why separate convolutions serve it, or ""."""
    return {f"{shape}, {str(dtype).removeprefix('torch.')}": why for (_, dtype, shape), why in _verdicts.items()}


def _verdict(kernels, x: Tensor, shape, separate, ours, proof) -> str:
    try:
        wrong = proof(kernels, x.device, x.dtype, shape)
    except (RuntimeError, ValueError) as error:
        wrong = f"failed: {type(error).__name__}: {error}"
    if wrong:
        what = f"the one-kernel {shape} in {str(x.dtype).removeprefix('torch.')}"
        warnings.warn(f"fastres: {what} is switched off on {x.device}: {wrong}", RuntimeWarning, stacklevel=6)
        return wrong
    mine, theirs = microseconds(lambda: ours(kernels)), microseconds(separate)
    return "" if mine < theirs else f"separate convolutions take {theirs:.0f} us, one kernel {mine:.0f} us"


def microseconds(run: Callable[[], object]) -> float:
    """Median time of ``run`` on the current CUDA stream."""
    run()
    times = []
    for _ in range(_RUNS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return statistics.median(times)


# ---- the check: integers, on which sums of any order are exact, then normal values against float64


def expected(x, w1, w2, w3, projection, bias) -> Tensor:
    """The block in float64, rounded where separate convolutions would round; ``bias`` float ``[b1, b2, b3]``."""
    dtype, mid = x.dtype, w1.shape[0]
    b1, b2, b3 = bias.double().split((mid, mid, w3.shape[0]))

    def conv(h, w, b=None, padding=0):
        return torch.nn.functional.conv2d(h.double(), w.double(), b, 1, padding)

    y = torch.relu(conv(x, w1, b1)).to(dtype)
    y = torch.relu(conv(y, w2, b2, 1)).to(dtype)
    shortcut = x.double() if projection is None else conv(x, projection)
    return torch.relu(conv(y, w3, b3) + shortcut)


def data(shape: BottleneckShape, device, dtype: torch.dtype, whole: bool):
    """(x, w1, w2, w3, projection or None, bias) for ``shape``: small integers, or normal values."""
    random = torch.Generator(device).manual_seed(0)

    def make(size, terms, kind=dtype):
        if whole:
            t = torch.randint(-2, 3, size, device=device, generator=random)
        else:
            t = torch.randn(size, device=device, generator=random) * math.sqrt(2 / terms)
        t = t.to(kind)
        return t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t

    C, mid, K = shape.C, shape.mid, shape.K
    x = make((shape.N, C, shape.H, shape.W), 2)
    w1, w2, w3 = make((mid, C, 1, 1), C), make((mid, mid, 3, 3), 9 * mid), make((K, mid, 1, 1), mid)
    if whole:
        for w in (w2, w3):  # sparse, so that no sum leaves the range of float16
            w.mul_((torch.rand(w.shape, device=device, generator=random) < 16 / mid).to(dtype))
    return x, w1, w2, w3, make((K, C, 1, 1), C) if shape.projected else None, make((2 * mid + K,), 2, torch.float32)


def check(kernels, device, dtype: torch.dtype, shape: BottleneckShape) -> str:
    """What is wrong with the kernel for ``shape``, or "". At most two images, of the given size."""
    small = BottleneckShape(min(shape.N, 2), shape.H, shape.W, shape.C, shape.mid, shape.K, shape.projected)
    with torch.no_grad():
        for whole in (True, False):
            x, w1, w2, w3, projection, bias = data(small, device, dtype, whole)
            weights = fragments.bottleneck(w1, w2, w3, projection)
            out, again = (
                torch.full((small.N, small.K, small.H, small.W), math.nan, dtype=dtype, device=device).to(
                    memory_format=torch.channels_last
                )
                for _ in range(2)
            )
            for buffer in (out, again):
                kernels.bottleneck_eval(x, weights, bias, small.mid, small.projected, buffer)
            truth = expected(x, w1, w2, w3, projection, bias)
            wrong = fault(out, again, truth, whole, 9 * small.mid)
            if wrong:
                return wrong
    return ""


def fault(out: Tensor, again: Tensor, truth: Tensor, whole: bool, terms: int, roundings: int = 4) -> str:
    """What is wrong with ``out`` and ``again``, two runs on the same data, held against float64, or "". On integers
    (``whole``) every bit counts; else so many roundings and a sum of so many terms are allowed for."""
    if not torch.equal(out, again):
        return "the output differs from run to run"
    if whole:
        wrong = out != truth.to(out.dtype)
        return f"differs on integers in {wrong.double().mean().item():.2%} of the output" if wrong.any() else ""
    # A rounding inside may fall the other way.
    eps, fine = torch.finfo(out.dtype).eps, torch.finfo(acc_dtype(out.dtype)).eps
    limit = (roundings * eps + 2 * math.sqrt(terms) * fine) * truth.abs().max()
    error = (out.double() - truth).abs()
    if bool((error <= limit).all()):
        return ""
    return f"is off by up to {error.max().item():.3g} of {truth.abs().max().item():.3g}"
