"""Whether a session computes what the model computes: once against the unfused model, in float64.

The error of an output is its relative L2 distance from float64. It may be

* ``BUDGET[precision]`` for float32 (the same number of roundings for float64), or
* twice PyTorch's own error in the session's dtype plus a floor, where that is more (deep networks that are badly
  conditioned) and always for bf16, fp16 and ``precision="exact"``.

The floor: one rounding of the output, and one rounding of the accumulator for each folded layer, which add up like a
random walk. No single element may be off by more than eight times the limit, in units of the output's root mean
square plus its own size: eight standard deviations, which honest rounding does not reach.
"""

from __future__ import annotations

import contextlib
import copy
import math
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fastres import dispatch
from fastres.backends.reference import acc_dtype
from fastres.inference import executors, torch_executor
from fastres.inference.plan import Plan, Segment
from fastres.nn.fused import Fused, unfuse
from fastres.testing import FACTOR

BUDGET = {"highest": 1e-5, "high": 2e-5}
#: Images of the example that are held against float64: its first and last and some between.
CHECKED_IMAGES = 4
_WORST = 8.0


class VerificationError(RuntimeError):
    """A session's output is too far from the unfused model's, or an executor failed. Nothing is served then."""


@dataclass(frozen=True)
class Verdict:
    """``error``: relative L2 distance from the reference, ``worst``: the largest of an element (see the module);
    ``peer``: PyTorch's error in the same dtype, None where it was not needed."""

    ok: bool
    error: float
    limit: float
    worst: float
    worst_limit: float
    peer: float | None
    reference: str
    message: str

    def to_dict(self) -> dict:
        return asdict(self)


class Reference:
    """The unfused model on some images of the example, in float64 and in the session's dtype.

    ``model`` is a copy that nobody else uses, in evaluation mode. Where it does not run in float64 (constants of
    another dtype in its code) float32 is the reference, and says so.
    """

    def __init__(self, model: nn.Module, x: Tensor, dtype: torch.dtype):
        self.dtype, self.given = dtype, x
        for module in list(model.modules()):
            if isinstance(module, Fused) and module._fastres_original is not None:
                unfuse(module)
        self.rows = _spread(x.shape[0]) if x.dim() else []
        self.x = x[self.rows] if len(self.rows) < x.shape[0] else x
        self.name = "float64"
        self._wide, self._peer = model, None
        with _plain(x.device):
            try:
                self.truth = copy.deepcopy(model).double()(self.x.double())
            except (RuntimeError, TypeError) as error:
                try:
                    self.truth = copy.deepcopy(model).float()(self.x.float())
                except (RuntimeError, TypeError):
                    raise ValueError(f"model: does not run on the example: {error}") from error
                self.name = "float32 (the model does not run in float64)"

    def fallback(self) -> nn.Module:
        """The unfused model in the session's dtype."""
        return self._wide.to(self.dtype)

    def peer(self):
        """Its output in the session's dtype, computed once."""
        if self._peer is None:
            with _plain(self.x.device):
                try:
                    self._peer = self.fallback()(self.x.to(self.dtype))
                except (RuntimeError, TypeError) as error:
                    raise ValueError(f"model: does not run in {self.dtype}: {error}") from error
        return self._peer

    def of(self, y):
        """The rows of a session's output on the whole example that the reference has."""
        if len(self.rows) == self.given.shape[0]:
            return y
        batch = self.given.shape[0]
        return pytree.tree_map(lambda t: t[self.rows] if isinstance(t, Tensor) and t.shape[:1] == (batch,) else t, y)


def _spread(batch: int) -> list[int]:
    most = min(batch, CHECKED_IMAGES)
    return [round(i * (batch - 1) / max(most - 1, 1)) for i in range(most)]


@contextlib.contextmanager
def _plain(device: torch.device):
    """Nothing of ours computes, nothing is recorded, nothing is cast."""
    with torch.no_grad(), dispatch.backend("reference"), torch.autocast(device.type, enabled=False):
        yield


def floor(plan: Plan, dtype: torch.dtype) -> float:
    """What rounding alone may do, see the module's text."""
    layers = sum(len(node.convs()) or 1 for node in plan.nodes())
    return torch.finfo(dtype).eps + math.sqrt(layers) * torch.finfo(acc_dtype(dtype)).eps


def budget(dtype: torch.dtype, precision: str) -> float:
    """The error that needs no comparison with PyTorch's own."""
    if dtype is torch.float64:  # the reference's own rounding counts: as many ULPs as float32 gets
        return BUDGET["highest"] / torch.finfo(torch.float32).eps * torch.finfo(dtype).eps
    return BUDGET.get(precision, 0.0) if dtype is torch.float32 else 0.0


def verify(ours, reference: Reference, plan: Plan, dtype: torch.dtype, precision: str) -> Verdict:
    """Whether a session's output on the reference's images is within the limits of the module's text."""
    truth, name = reference.truth, reference.name
    problem = _mismatch(ours, truth)
    if problem:
        return Verdict(False, math.inf, 0.0, math.inf, 0.0, None, name, problem)
    error, worst = distance(ours, truth)
    limit = budget(dtype, precision)
    peer, worst_limit = None, _WORST * limit
    if not (error <= limit and worst <= worst_limit):
        peer, peer_worst = distance(reference.peer(), truth)
        limit = max(limit, FACTOR * peer + floor(plan, dtype))
        worst_limit = max(_WORST * limit, FACTOR * peer_worst)
    return judge(error, limit, worst, worst_limit, peer, name)


def judge(error, limit, worst, worst_limit, peer, reference) -> Verdict:
    """The verdict on two errors and their limits. NaN is no error that is small enough."""
    ok = error <= limit and worst <= worst_limit
    text = f"relative error {error:.2e} against {reference}, limit {limit:.2e}"
    if not worst <= worst_limit:
        text += f"; worst element {worst:.2e}, limit {worst_limit:.2e}"
    return Verdict(ok, error, limit, worst, worst_limit, peer, reference, text)


def _mismatch(ours, truth) -> str | None:
    """What is different about two outputs besides the values of their floating point tensors."""
    (got, form), (want, expected) = pytree.tree_flatten(ours), pytree.tree_flatten(truth)
    if form != expected:
        return f"the output has the structure {form}, the model's {expected}"
    for a, b in zip(got, want, strict=True):
        if not isinstance(b, Tensor):
            if a != b:
                return f"the output holds {a!r}, the model's {b!r}"
        elif a.shape != b.shape:
            return f"the output has shape {tuple(a.shape)}, the model's {tuple(b.shape)}"
        elif not b.is_floating_point() and not torch.equal(a, b):
            return f"an output of {b.dtype} differs from the model's"
        elif b.is_floating_point() and not b.isfinite().all():
            return "the unfused model's own output is not finite on the example, so nothing can be compared"
    return None


def distance(ours, truth) -> tuple[float, float]:
    """Relative L2 distance and worst element of the floating point tensors of two outputs, the largest of each."""
    error = worst = 0.0
    for a, b in zip(pytree.tree_leaves(ours), pytree.tree_leaves(truth), strict=True):
        if not isinstance(b, Tensor) or not b.is_floating_point() or b.numel() == 0:
            continue
        want = b.double()
        off, rms = (a.double() - want).abs(), want.square().mean().sqrt().clamp_min(torch.finfo(torch.float32).tiny)
        found = (off.square().mean().sqrt() / rms).item(), (off / (rms + want.abs())).max().item()
        # A NaN compares as false: it must not get lost in a max().
        error, worst = (
            math.inf if math.isnan(new) else max(old, new) for old, new in zip((error, worst), found, strict=True)
        )
    return error, worst


def suspects(plan: Plan, x: Tensor, target, most: int = 3) -> list[str]:
    """The nodes that are furthest from float64 on the same input, worst first: where to look after a miss."""
    found, wide = [], x.double()
    for part in plan.parts:
        if not isinstance(part, Segment):
            break  # what a foreign module hands on in float64 is not known here
        for node in part.nodes:
            single, given = Segment((node,)), wide.to(target.dtype)
            exact = torch_executor.prepare(single, target.device, torch.float64, "exact")
            want, wide = exact.run(given.double()), exact.run(wide)
            try:
                (a,) = executors.assign(single, target.device, target.dtype, target.precision, target.executors)
                error, _ = distance(a.prepared.run(given), want)
                found.append((error, f"{node.name} ({node.op}, {a.executor}): {error:.1e}"))
            except Exception as failure:  # an executor that fails is the worst suspect
                found.append((math.inf, f"{node.name} ({node.op}): {type(failure).__name__}"))
    return [text for _, text in sorted(found, key=lambda f: -f[0])[:most]]
