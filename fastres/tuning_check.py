"""The verdict on a convolution kernel, in three hearings:

integers  Small integers, on which sums of any order are exact: a single missing product is off by one or more.
normal    Against float64: at most twice as far off as PyTorch's own call in this dtype under the precision switches in
          force, plus one rounding of the output and a random walk of the accumulator's. The same bits when run again.
library   More images, so that partial results are merged as they are at full size, beside PyTorch's call.

``part`` is held against the very output it describes. The batch is cut down to what costs milliseconds.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from fastres.backends import triton_conv
from fastres.backends.reference import acc_dtype
from fastres.problem import ConvProblem, ConvRequest
from fastres.tuning_trial import Miss, Trial, matrix, quiet

#: Elements of a tensor above which PyTorch's call in the same dtype stands in for float64.
_WIDE = 2**25
#: Partial results are merged in groups from this many tiles on (fastres.triton_kernels.conv_merge).
_MANY_TILES = 129


def fp32_mode() -> str:
    """How PyTorch's convolutions multiply float32: "tf32" or "ieee"."""
    return triton_conv.precision(torch.float32)


def small(problem: ConvProblem, config) -> ConvProblem:
    """The problem with two tiles' worth of images and one more, or fewer if it has no more.

    A configuration that does not say how large its tiles are is a plan for this very batch: the problem as it is.
    """
    if not hasattr(config, "BM"):
        return problem
    patch, pixels = getattr(config, "patch", ()), problem.P * problem.Q
    flat = (problem.R, problem.S) == problem.stride == (1, 1) and tuple(patch[1:]) == (1, 1)
    images = patch[0] if patch and not flat else -(-config.BM // pixels)
    return replace(problem, N=min(problem.N, max(2, 2 * images + 1)))


def many(problem: ConvProblem, config) -> ConvProblem:
    """The problem with images for `_MANY_TILES` tiles, or fewer if it has no more."""
    if not hasattr(config, "BM"):
        return problem
    images = -(-_MANY_TILES * config.BM // (problem.P * problem.Q))
    return replace(problem, N=min(problem.N, max(small(problem, config).N, images)))


def failure(request: ConvRequest, module, config) -> str:
    """What is wrong with a configuration for ``request``, or "". Whatever the kernel raises passes through.

    ``module`` offers the functions of ``backends/reference_conv.py``, with ``config``, and ``conv_parts``.
    """
    try:
        with quiet(request):
            _integers(request, module, config)
            _normal(request, module, config)
            beside_library(Trial(request, many(request.problem, config)), module, config)
    except Miss as miss:
        return str(miss)
    return ""


def _integers(request: ConvRequest, module, config) -> None:
    trial = Trial(request, small(request.problem, config), "integers")
    truth = trial.library() if max(trial.problem.elements) > _WIDE else trial.truth()
    truth.pop("part", None)
    # The weight's gradient may be asked for in either type.
    for dtype in (trial.dtype, trial.acc) if request.kind == "wgrad" else (trial.dtype,):
        found = trial.run(module, config, dtype)
        for name, want in truth.items():
            eps = torch.finfo(found[name].dtype).eps + (torch.finfo(want.dtype).eps if want.dtype != trial.acc else 0.0)
            for ours, right in trial.images(found[name], want):
                _near_integers(f"{name} (integers)", ours.double(), right.double(), ours.dtype, eps)
        check_part(trial, found)


def _near_integers(name: str, ours, want, dtype: torch.dtype, eps: float) -> None:
    # What the dtype cannot hold is infinite in every honest result.
    held = torch.where(want.to(dtype).isinf() & (ours == want.sign() * math.inf), ours, want)
    _near(name, ours, held, 0.25 + eps * want.abs())


def _normal(request: ConvRequest, module, config) -> None:
    trial = Trial(request, small(request.problem, config))
    found, again = trial.run(module, config), trial.run(module, config)
    for name, ours in found.items():
        if not torch.equal(ours, again[name]):
            raise Miss(f"output {name} differs from run to run")
    if "stats" in request.hooks and hasattr(config, "BM"):
        # A recomputation leaves the statistics out and must meet the same output.
        if not torch.equal(trial.run(module, config, part=False)["out"], found["out"]):
            raise Miss("output out differs where part is not asked for")
    check_part(trial, found)
    if max(trial.problem.elements) > _WIDE:
        return  # beside PyTorch's call, see below
    truth, peer = trial.truth(), trial.library()
    for name in truth:
        _within_budget(name, found[name], truth[name], peer[name], trial.terms)


def _within_budget(name: str, ours, truth, peer, terms: int) -> None:
    """The budget of ``fastres.testing``: twice PyTorch's error plus a floor, in both norms."""
    scale = max(truth.abs().max().item(), torch.finfo(ours.dtype).tiny)
    floor = torch.finfo(ours.dtype).eps + 2 * math.sqrt(terms) * torch.finfo(acc_dtype(ours.dtype)).eps
    error, theirs = ours.double() - truth, peer.double() - truth
    _near(name, ours.double(), truth, 2 * theirs.abs().max().item() + floor * scale)
    rms, theirs = (e.square().mean().sqrt().item() for e in (error, theirs))
    if not rms <= 2 * theirs + floor * scale:
        raise Miss(f"output {name} is off by {rms:.3g} on average, PyTorch's by {theirs:.3g}")


def beside_library(trial: Trial, module, config) -> None:
    """Raise Miss where a kernel's outputs are more than a few roundings from those of PyTorch's call."""
    found = trial.run(module, config)
    tf32 = trial.dtype == torch.float32 and fp32_mode() == "tf32"
    eps = 2**-10 if tf32 else torch.finfo(trial.dtype).eps
    walk = 4 * math.sqrt(trial.terms) * torch.finfo(trial.acc).eps
    for name, peer in trial.library().items():
        if name == "part":
            continue
        scale = max(p.abs().max().item() for (p,) in trial.images(peer))
        for ours, theirs in trial.images(found[name], peer):
            _near(f"{name} ({trial.problem.N} images)", ours.double(), theirs.double(), (4 * eps + walk) * scale)
    check_part(trial, found)


def check_part(trial: Trial, found: dict) -> None:
    """Raise Miss where ``part`` does not describe the output it came with."""
    if "part" not in found:
        return
    t = found["out"] if trial.request.kind == "fprop" else found["dx"]
    M, _ = matrix(t)
    part = found["part"].double()
    # A tile's sum walks over its rows; the tiles are merged in float64.
    limit = (2 + 4 * math.sqrt(max(1.0, M / part.shape[1]))) * torch.finfo(trial.acc).eps
    if trial.request.kind == "fprop":
        _check_stats(trial, part, t, M, limit)
    else:
        _check_sums(trial, part, t, limit)


def _check_stats(trial: Trial, part, t, M: int, limit: float) -> None:
    n, means, squares = part
    if not bool((n.sum(0) == M).all()):
        low, high = n.sum(0).min().item(), n.sum(0).max().item()
        raise Miss(f"output part counts {low:g} to {high:g} rows a channel, expected {M}")
    mean = (n * means).sum(0) / M
    want = sum(v.double().sum((0, 2, 3)) for (v,) in trial.images(t)) / M
    size = max(v.abs().max().item() for (v,) in trial.images(t))
    _near("part, mean", mean, want, limit * size)
    centre = want[:, None, None]
    spread = sum((v.double() - centre).square().sum((0, 2, 3)) for (v,) in trial.images(t))
    _near("part, M2", (squares + n * (means - mean).square()).sum(0), spread, 4 * limit * spread.max().item())


def _check_sums(trial: Trial, part, t, limit: float) -> None:
    mean = trial.hooks["stat"][0].double()[:, None, None]
    sums = torch.zeros((2, 2, t.shape[1]), dtype=torch.float64, device=t.device)
    for g, act in trial.images(t, trial.hooks["act"]):
        g = g.double()
        for plane, terms in enumerate((g, g * (act.double() - mean))):
            sums[plane, 0] += terms.sum((0, 2, 3))
            sums[plane, 1] += terms.square().sum((0, 2, 3))
    for plane, (want, squares) in enumerate(sums):
        size = torch.maximum(want.abs(), squares.sqrt()).max().item()
        _near(f"part, sum {plane}", part[plane].sum(0), want, 4 * limit * size)


def _near(name: str, ours, want, limit) -> None:
    """Raise Miss where ``ours`` (float64) is further than ``limit`` from ``want``, or is NaN."""
    error = torch.where(ours == want, 0.0, (ours - want).abs())
    bad = ~(error <= limit)
    if bad.any():
        worst, scale = error.nan_to_num(math.inf, math.inf).max().item(), want.abs().max().item()
        raise Miss(
            f"output {name} is off by up to {worst:.3g} of {scale:.3g} in {bad.double().mean().item():.2%} of it"
        )
