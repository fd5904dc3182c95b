"""optimize and load: from a model, or a file, to a checked session."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import torch
from torch import Tensor, nn

from fastres.backends.reference import acc_dtype
from fastres.fusion.swap import check_model
from fastres.inference import checking, choices, description, executors
from fastres.inference.checking import Reference, Verdict, VerificationError
from fastres.inference.plan import Foreign, Plan
from fastres.inference.serving import Runner, Target
from fastres.inference.session import InferenceSession, Sample
from fastres.nn.fitness import qualified
from fastres.ops.params import DTYPES


def optimize(
    model: nn.Module,
    example: tuple[Tensor] | Tensor,
    dtype: torch.dtype | None = None,
    precision: str | None = None,
    strict: bool = True,
    *,
    executor: str | None = None,
) -> InferenceSession:
    """A snapshot of ``model`` that computes ``model.eval()(x)`` faster.

    Residual blocks, convolutions with their norms, stems, pooling and classifiers become nodes with the BN folded in
    float64; everything else stays a torch module between them. ``model`` is not touched. The session is compared once
    with the unfused model in float64 on (up to four images of) the example.

    Args:
        model: anything with, inside, what :func:`fastres.fuse` knows, fused already or not, or ``nn.Sequential`` of
            convolutions, norms and ReLUs. Its training flag does not matter.
        example: one tensor or a tuple of it, ``[N, C, H, W]``, on the model's device. Later inputs may differ in size.
        dtype: of activations and arithmetic, default the example's: float32, bfloat16, float16 or float64.
        precision: of float32 arithmetic. "highest" (default): float32 throughout, within 1e-5 of float64. "exact":
            the same with direct sums, as close as PyTorch. "high": reduced products where the hardware has them,
            within 2e-5; where no kernel does so the session says so and computes "highest" or better.
        strict: raise where the check fails. False: fall back to PyTorch's operators and say so in ``report()``.
        executor: name of the only one that may serve, see ``fastres.inference.executors``.

    Raises: TypeError / ValueError naming the argument; ValueError if nothing in the model is known;
    :class:`fastres.inference.VerificationError` with the suspected nodes where the session is wrong.
    """
    x, dtype, precision = _checked(model, example, dtype, precision, strict)
    try:
        twin = copy.deepcopy(model).eval()
    except Exception as error:
        raise ValueError(f"model: cannot be copied (copy.deepcopy), and a session is a copy: {error}") from error
    for what, t in (*twin.named_parameters(), *twin.named_buffers()):
        if t.device != x.device:
            raise ValueError(f"model: {what} is on {t.device}, expected the example's device, {x.device}")
    target = Target(x.device, dtype, precision, executors.order(x.device, executor))
    plan = description.describe(copy.deepcopy(twin), acc_dtype(dtype))
    notes = []
    if model.training:
        notes.append("the model is in training mode: the session computes its evaluation mode")
    if not any(True for _ in plan.nodes()):
        reasons = "; ".join(f"{f.name or type(f.module).__name__}: {', '.join(f.reasons)}" for f in plan.foreign())
        if strict:
            raise ValueError(f"model: got nothing that a plan knows ({reasons}); strict=False runs it as it is")
        notes.append(f"nothing in the model is known, it runs as it is: {reasons}")
    reference = Reference(twin, x, dtype)
    build = _Attempts(reference, x, strict, notes)
    plan, runner, target, verdict = build.run(plan, target)
    whole = isinstance(reference.truth, Tensor) and reference.truth.shape[:1] == reference.x.shape[:1]
    sample = Sample(reference.x[:1].to(dtype), reference.truth[:1].double()) if whole and x.shape[0] else None
    return InferenceSession(
        plan, runner, target, accepts=tuple(dict.fromkeys((dtype, x.dtype))), example=tuple(x.shape), verdict=verdict,
        sample=sample, notes=tuple(notes), title=qualified(_original(model)),
    )  # fmt: skip


def _original(model: nn.Module) -> type:
    return getattr(type(model), "_fastres_original", None) or type(model)


def _checked(model, example, dtype, precision, strict) -> tuple[Tensor, torch.dtype, str]:
    check_model(model)
    if isinstance(example, tuple | list):
        if len(example) != 1:
            raise ValueError(f"example: got {len(example)} inputs, expected one tensor")
        (example,) = example
    if not isinstance(example, Tensor):
        raise TypeError(f"example: got {type(example).__name__}, expected a torch.Tensor or a tuple of one")
    if example.layout is not torch.strided or example.dtype not in DTYPES:
        got = f"{example.dtype}, {example.layout}"
        raise TypeError(f"example: got {got}, expected a strided float32, bfloat16, float16 or float64 tensor")
    if example.dim() == 0 or example.numel() == 0:
        raise ValueError(f"example: got shape {tuple(example.shape)}, expected at least one image to check with")
    dtype = example.dtype if dtype is None else dtype
    if dtype not in DTYPES:
        raise TypeError(f"dtype: got {dtype!r}, expected torch.float32, bfloat16, float16 or float64")
    if precision is not None and precision not in executors.PRECISIONS:
        raise ValueError(f"precision: got {precision!r}, expected one of {', '.join(map(repr, executors.PRECISIONS))}")
    if precision == "high" and dtype is not torch.float32:
        raise ValueError(f"precision: got 'high' with dtype {dtype}, expected float32, the dtype it is about")
    if not isinstance(strict, bool):
        raise TypeError(f"strict: got {type(strict).__name__}, expected a bool")
    return example.detach(), dtype, precision or "highest"


class _Attempts:
    """Executors tried until one passes the check; with ``strict`` there is one attempt."""

    def __init__(self, reference: Reference, x: Tensor, strict: bool, notes: list[str]):
        self.reference, self.x, self.strict, self.notes = reference, x, strict, notes

    def run(self, plan: Plan, target: Target) -> tuple[Plan, Runner, Target, Verdict | None]:
        built = self._attempt(plan, target)
        if built is None and target.executors != ("torch",):
            target = Target(target.device, target.dtype, target.precision, ("torch",))
            self.notes.append("fell back to the torch executor")
            built = self._attempt(plan, target)
        if built is not None:
            return plan, built[0], target, built[1]
        self.reference.peer()  # a model that does not run in this dtype is nothing to fall back to
        self.notes.append("fell back to the unfused model: nothing of this session is faster than it")
        plan = Plan((Foreign("", self.reference.fallback(), ("the session missed its error budget",)),))
        return plan, Runner(plan, target), target, None

    def _attempt(self, plan: Plan, target: Target) -> tuple[Runner, Verdict] | None:
        try:
            runner = Runner(plan, target)
            with torch.no_grad(), torch.autocast(target.device.type, enabled=False):
                y = self.reference.of(runner(self.x.to(target.dtype)))
        except executors.Unserved:
            raise  # an executor that was named must serve
        except Exception as error:
            if self.strict:
                raise VerificationError(f"optimize: the session failed on the example: {_one_line(error)}") from error
            self.notes.append(f"{', '.join(target.executors)} failed: {_one_line(error)}")
            return None
        verdict = checking.verify(y, self.reference, plan, target.dtype, target.precision)
        if verdict.ok:
            return runner, verdict
        with torch.no_grad():
            where = checking.suspects(plan, self.reference.x, target)
        found = verdict.message + (f"; furthest off on their own: {', '.join(where)}" if where else "")
        if self.strict:
            raise VerificationError(f"optimize: the session does not compute what the model computes: {found}")
        self.notes.append(f"{', '.join(target.executors)} missed: {found}")
        return None


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def load(
    path: str | os.PathLike,
    *,
    device: torch.device | str = "cpu",
    strict: bool = True,
    executor: str | None = None,
) -> InferenceSession:
    """The session that ``InferenceSession.save`` wrote, on ``device``, packed for the executors of this machine.

    Where instruction set and number of threads are those of the saved session, the same kernels serve as there. It is
    checked against the image and the float64 output that the file carries. A miss raises
    :class:`fastres.inference.VerificationError`, or, with ``strict=False``, falls back to PyTorch's operators.

    Raises: :class:`fastres.inference.SessionFileError` for a file that is damaged, truncated, foreign or of a later
    version; OSError where it cannot be read at all.
    """
    from fastres.inference import storage

    try:
        place = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device: got {device!r}, expected a device of torch") from error
    names = executors.order(place, executor)
    stored = storage.read(Path(path))
    target = Target(place, stored.dtype, stored.precision, names)
    notes = [*stored.notes, f"loaded from {Path(path).name}"]
    sample = Sample(stored.sample.x.to(place), stored.sample.truth.to(place))
    runner, verdict = None, None
    for names in dict.fromkeys((target.executors, ("torch",))):
        target = Target(place, stored.dtype, stored.precision, names)
        runner = Runner(stored.plan, target)
        try:
            chosen = choices.take_over(runner, target, stored.choices)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            what = f"{type(error).__name__}: {error}"
            raise storage.SessionFileError(f"{path}: describes choices of kernels that are none: {what}") from error
        with torch.no_grad():
            errors = checking.distance(runner(sample.x), sample.truth)
        was = stored.verdict
        verdict = checking.judge(errors[0], was.limit, errors[1], was.worst_limit, was.peer, was.reference)
        if verdict.ok:
            notes += dict.fromkeys(chosen)
            break
        if strict or names == ("torch",):
            raise VerificationError(
                f"load: the session does not compute what it computed when saved: {verdict.message}"
            )
        notes.append(f"{', '.join(names)} missed: {verdict.message}; fell back to the torch executor")
    return InferenceSession(
        stored.plan, runner, target, accepts=stored.accepts, example=stored.example, verdict=verdict, sample=sample,
        notes=tuple(notes), title=stored.title,
    )  # fmt: skip
