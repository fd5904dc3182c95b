"""Evaluation blocks and stems as one kernel: whether there is one, whether it is right, and whether it is faster.

A forced backend serves what its kernels can. The automatic choice takes a kernel only after it gave the right values on
this very device and was faster, on inputs of this very size, than the separate convolutions; both are found out at the
first call, in milliseconds, and remembered. Whatever is turned down is served by separate convolutions.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import threading
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from fastres import block_trials, dispatch
from fastres.backends import fragments
from fastres.backends.block_kernels import BottleneckShape
from fastres.backends.eval_kernels import BasicBlockShape, StemShape
from fastres.backends.reference import acc_dtype
from fastres.block_geometry import Shape, Unserved

#: (device index, dtype, shape) -> why the separate convolutions serve, or "" where a kernel does, and which.
_verdicts: dict[tuple, tuple[str, object]] = {}
_lock = threading.RLock()  # timing a run of blocks may need verdicts on its blocks
_RUNS = 7


def packing(kernels, shape: Shape) -> Callable[..., Tensor]:
    """What packs the weights as ``kernels`` read them."""
    if isinstance(shape, BottleneckShape):
        return kernels.pack_bottleneck
    return fragments.basic_block if isinstance(shape, BasicBlockShape) else fragments.stem


def pack(units, packing: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
    """(weights, bias) as the kernel reads them, from folded units: of a stem one, of a basic block two, of a bottleneck
    three, and the projection's if there is one. ``packing``: of :func:`packing`."""
    weights = [unit.weight for unit in units]
    bias = [unit.bias.float() for unit in units]
    if len(bias) == 4:
        bias[2:] = [bias[2] + bias[3]]
    return packing(*weights), torch.cat(bias).contiguous()


def compute(kernels, shape: Shape, x: Tensor, packed: tuple[Tensor, Tensor]) -> Tensor:
    """What ``kernels`` make of ``x``, channels_last. ``packed``: of :func:`pack`."""

    def output(channels: int, height: int, width: int) -> Tensor:
        size = (shape.N, channels, height, width)
        return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)

    if isinstance(shape, StemShape):  # reads the image as it lies
        out = output(shape.K, shape.P, shape.Q)
        kernels.stem_eval(x, *packed, out)
        return out
    x = x.contiguous(memory_format=torch.channels_last)
    if x.data_ptr() % 16:
        x = x.clone(memory_format=torch.channels_last)
    if isinstance(shape, BasicBlockShape):
        out = output(shape.C, shape.H, shape.W)
        kernels.basic_block_eval(x, *packed, out)
    else:
        out = output(shape.K, shape.H, shape.W)
        kernels.bottleneck_eval(x, *packed, shape.mid, shape.projected, out)
    return out


def kernels_for(x: Tensor, shape, separate: Callable[[], Tensor], ours: Callable[..., Tensor],
                proof: Callable[..., str] | None = None):  # fmt: skip
    """The backend whose kernel serves the unit ``shape`` on ``x``, or None. ``ours(kernels)`` and ``separate()``
    compute it; the backend's ``why_not_<shape.op>`` says what hinders it, ``proof`` (default `check`) what is wrong
    with its values."""
    name = dispatch.forced() or ("cuda" if x.device.type == "cuda" else "")
    if not name or not x.numel():
        return None
    kernels, asked = dispatch.load(name), f"why_not_{shape.op}"
    key = (x.device.index, x.dtype, shape)
    if not hasattr(kernels, asked):
        if x.device.type == "cuda":
            _verdicts[key] = f"the backend {name} has no kernel for whole blocks", None
        return None
    if isinstance(shape, Unserved):
        if key not in _verdicts:
            _verdicts[key] = "; ".join(shape.reasons), None
        return None
    hindrances = {k: getattr(k, asked)(x.device, x.dtype, shape) for k in versions(kernels, shape)}
    candidates = [k for k, reasons in hindrances.items() if not reasons]
    if not candidates:
        _verdicts[key] = _why_none(hindrances), None
        return None
    if dispatch.forced():
        return candidates[0]
    verdict = _verdicts.get(key)
    if verdict is None:
        if torch.cuda.is_current_stream_capturing():
            return None  # no verdict can be had now; a later call may have one
        with _lock:
            verdict = _verdicts[key] = _verdict(candidates, x, shape, separate, ours, proof or check)
    return verdict[1]


def _why_none(hindrances: dict) -> str:
    """The reasons of every version, each once."""
    found = []
    for kernels, reasons in hindrances.items():
        version = getattr(kernels, "version", "")
        found += [f"{version}: {reason}" if version else reason for reason in reasons]
    return "; ".join(dict.fromkeys(found))


def why_separate(x: Tensor, shape) -> str | None:
    """Why `kernels_for` just gave none for ``shape`` on ``x``; None off the GPU, where whole blocks have no kernel to
    miss."""
    verdict = _verdicts.get((x.device.index, x.dtype, shape))
    if verdict is not None:
        return verdict[0]
    if x.device.type == "cuda" and x.numel():
        return "its first call came while a CUDA graph was captured, when no kernel can be verified"
    return None


def versions(kernels, shape) -> list:
    """The backend and its versions for one architecture alone, which differ in bottlenecks only. A forced backend takes
    the first that serves."""
    special = getattr(kernels, "hopper", None) if isinstance(shape, BottleneckShape) else None
    return [kernels] if special is None else [kernels, special]


def forget() -> None:
    """Drop every verdict."""
    _verdicts.clear()


def verdicts() -> dict[str, str]:
    """What was decided in this process: block in words -> why separate convolutions serve it, or ""."""
    return {f"{shape}, {str(dtype).removeprefix('torch.')}": why for (_, dtype, shape), (why, _) in _verdicts.items()}


def _verdict(candidates, x: Tensor, shape, separate, ours, proof) -> tuple[str, object]:
    """(why separate convolutions serve or "", the fastest candidate that is right or None)."""
    faults, times = [], {}
    for kernels in candidates:
        try:
            wrong = proof(kernels, x.device, x.dtype, shape)
        except (RuntimeError, ValueError) as error:
            wrong = f"failed: {type(error).__name__}: {error}"
        if wrong:
            version = getattr(kernels, "version", "")
            what = f"the one-kernel {shape} in {str(x.dtype).removeprefix('torch.')}{f', {version},' * bool(version)}"
            warnings.warn(f"fastres: {what} is switched off on {x.device}: {wrong}", RuntimeWarning, stacklevel=6)
            faults.append(wrong)
        else:
            times[kernels] = microseconds(lambda k=kernels: ours(k))
    if not times:
        return "; ".join(faults), None
    best = min(times, key=times.get)
    theirs = microseconds(separate)
    if times[best] < theirs:
        return "", best
    return f"separate convolutions take {theirs:.0f} us, one kernel {times[best]:.0f} us", None


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


def check(kernels, device, dtype: torch.dtype, shape: Shape) -> str:
    """What is wrong with the kernel for ``shape``, or "". At most two images, of the given size."""
    small = dataclasses.replace(shape, N=min(shape.N, 2))
    with torch.no_grad():
        for whole in (True, False):
            launch, truth, terms = block_trials.trial(small, device, dtype, whole)
            out, again = (
                torch.full(truth.shape, math.nan, dtype=dtype, device=device).to(memory_format=torch.channels_last)
                for _ in range(2)
            )
            for buffer in (out, again):
                launch(kernels, buffer)
            wrong = fault(out, again, truth, whole, terms)
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
