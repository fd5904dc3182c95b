"""Which kernel serves a request.

A backend that the user names (``with fastres.backend("triton"):``) serves or raises with its reasons.
The automatic choice goes through the backends of the device in the order the roofline model predicts and
takes the first that can serve; PyTorch's own operators (``reference``) close every list.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType

import torch

from fastres import verify

#: Order of the automatic choice per device type. All BN kernels are memory bound, so the order is that of
#: achievable bandwidth: hand-written vector access first, generated code second, unfused PyTorch last.
ORDER = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}

#: Backend name -> module (and attribute, where one module serves two backends).
BACKENDS = {
    "reference": "fastres.backends.reference",
    "cpu": "fastres.backends.cpu",
    "cuda": "fastres.backends.cuda:cuda",
    "triton": "fastres.backends.triton",
    "emulator": "fastres.backends.cuda:emulator",
}

#: Launch functions of each op; the blocks use the BN family plus their own.
_BN = ("bn_stats", "bn_finalize", "bn_fold", "bn_apply", "bn_bwd_reduce", "bn_bwd_finalize", "bn_bwd_apply")
LAUNCHES = {
    "add_relu": ("add_relu_fwd", "add_relu_bwd"),
    "batch_norm_act": _BN,
    "conv_bn_act": (*_BN, "bias_act"),
    "basic_block": (*_BN, "mask_add"),
    "bottleneck": (*_BN, "mask_add"),
    "stem": (*_BN, "stem_fwd", "stem_bwd_reduce", "stem_bwd_apply"),
}

#: Launch functions that replace several of the BN family's in one launch, where a backend has them and the tensor fits.
ONE_PASS = ("bn_one_pass_fwd", "bn_one_pass_bwd")

_forced = ""


@dataclass(frozen=True)
class Request:
    """What a kernel is asked to serve: op, where the tensors live, their dtype and channel count."""

    op: str
    device: torch.device
    dtype: torch.dtype
    C: int | None = None
    requires_grad: bool = False

    def __str__(self) -> str:
        return f"{self.op}(device={self.device}, dtype={str(self.dtype).removeprefix('torch.')}, channels={self.C})"


@functools.cache
def load(name: str) -> ModuleType:
    """The launch functions of a backend. Raises ValueError for an unknown name."""
    if name not in BACKENDS:
        raise ValueError(f"backend: got {name!r}, expected one of {', '.join(map(repr, BACKENDS))}")
    module, _, attribute = BACKENDS[name].partition(":")
    loaded = importlib.import_module(module)
    return getattr(loaded, attribute) if attribute else loaded


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Force one backend for every fastres op in the block: it serves or raises ``ValueError`` with its reasons.

    ``name``: ``"reference"``, ``"cpu"``, ``"cuda"``, ``"triton"`` or ``"emulator"`` (CUDA kernels run on the host).
    The backward of an op runs on the backend of its forward. Process-wide, meant for tests and measurements.
    """
    global _forced
    load(name)
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def forced() -> str:
    """Name of the forced backend, or an empty string."""
    return _forced


def choose(request: Request, name: str = "") -> ModuleType:
    """The launch functions that serve ``request``; ``name`` forces a backend."""
    if name:
        chosen = load(name)
        reasons = chosen.why_not(request)
        if reasons:
            raise ValueError(f"backend {name!r} cannot serve {request}: {'; '.join(reasons)}")
        return chosen
    try:
        return _automatic(request)
    except verify.NotVerifiedYet as reason:
        # Not remembered: the choice is made again outside of the capture.
        warnings.warn(f"fastres: {request} is served by PyTorch: {reason}", RuntimeWarning, stacklevel=4)
        return load("reference")


@functools.lru_cache(maxsize=4096)
def _automatic(request: Request) -> ModuleType:
    for candidate, reasons in explain(request):
        if reasons:
            continue
        chosen = load(candidate)
        wrong = verify.failure(request, candidate, chosen, LAUNCHES[request.op])
        if not wrong:
            return chosen
        warnings.warn(f"fastres: {candidate} is switched off for {request}: {wrong}", RuntimeWarning, stacklevel=4)
    raise AssertionError("the reference backend serves everything")


def one_pass_tiles(k, op: str, x: torch.Tensor, M: int, C: int, tensors: int, name: str) -> int:
    """Row tiles of one launch over ``[M, C]`` that keeps so many tensors like ``x`` on chip; 0: launch separately.

    ``k`` are the launch functions that serve ``op`` on ``x``, ``name`` the forced backend or empty. The automatic
    choice takes them where ``FASTRES_ONE_PASS=1`` asks for it (no GPU has timed them yet, so they could be slower), and
    only after they have proven themselves on this device, dtype and channel count.
    """
    why_not = getattr(k, "why_not_one_pass", None)
    if why_not is None or (not name and os.environ.get("FASTRES_ONE_PASS") != "1"):
        return 0
    if why_not(x.device, x.dtype, M, C, tensors):
        return 0
    if not name:
        request = Request(op, x.device, x.dtype, C)
        try:
            if not _one_pass_is_right(request, k.name):
                return 0
        except verify.NotVerifiedYet as reason:
            warnings.warn(f"fastres: {request} in several launches: {reason}", RuntimeWarning, stacklevel=5)
            return 0
    return k.one_pass_tiles(x, M, C, tensors)


@functools.lru_cache(maxsize=4096)
def _one_pass_is_right(request: Request, name: str) -> bool:
    wrong = verify.failure(request, name, load(name), ONE_PASS)
    if wrong:
        what = "batch normalisation in one launch"
        warnings.warn(f"fastres: {what} is switched off for {request} on {name}: {wrong}", RuntimeWarning, stacklevel=6)
    return not wrong


def has_kernel(op: str, device: str, dtype: torch.dtype) -> bool:
    """Whether the automatic choice finds a kernel of ours. Where it does not, PyTorch's own modules are the better
    way: the reference backend is made to be read. ``device`` is a device type."""
    return _has_kernel(op, device, dtype)


# What torch.compiler.assume_constant_result sets; calling that would import torch._dynamo, and triton with it.
has_kernel._dynamo_marked_constant = True


@functools.cache
def _has_kernel(op: str, device: str, dtype: torch.dtype) -> bool:
    candidates = explain(Request(op, torch.device(device), dtype))
    return any(name != "reference" and not reasons for name, reasons in candidates)


def explain(request: Request) -> list[tuple[str, list[str]]]:
    """Candidates of the automatic choice in order, each with its reasons to refuse (empty: it can serve)."""
    order = ORDER.get(request.device.type, ("reference",))
    return [(name, load(name).why_not(request)) for name in order]
