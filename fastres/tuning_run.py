"""``fastres.tune``: which convolutions a model has, and who is fastest among those that are right."""

from __future__ import annotations

import contextlib
import copy
import functools
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch

from fastres import tuning, tuning_check, tuning_compile, tuning_operands, tuning_trial
from fastres.problem import ConvRequest, OperandRequest
from fastres.tuning import LIBRARY, Choice

#: A kernel of ours has to beat PyTorch's call by this share: what is less is noise.
MARGIN = 0.02


@dataclass(frozen=True)
class Row:
    """What tuning found for one request. ``us``: of the choice; ``library_us``: of PyTorch's call with the passes that
    do the hooks' work; ``rejected``: reason by configuration; ``timings``: microseconds of everything that is right.

    Of an `OperandRequest`: ``choice`` is the plan in force, ``library_us`` the time with a pass for every operand."""

    request: ConvRequest | OperandRequest
    choice: Choice
    us: float
    library_us: float
    rejected: dict[str, str] = field(default_factory=dict)
    timings: dict[str, float] = field(default_factory=dict)

    @property
    def ratio(self) -> float:
        """Times as fast as PyTorch."""
        return self.library_us / self.us


def tune(
    model: torch.nn.Module,
    example,
    *,
    train: bool = True,
    dtype: torch.dtype | None = None,
    progress: Callable[[str, float], None] | None = None,
) -> list[Row]:
    """Find the fastest right kernel for every convolution of a fused model, and keep the winners on disk.

    A copy of the model runs once to see which convolutions there are; then each is measured: PyTorch's own call and
    every configuration of ours that gives the right outputs. The winners serve from now on, in this process and later
    ones. Tune under the settings of your training (``torch.backends.cudnn.benchmark``, precision, batch size).

    Args:
        model: a model that :func:`fastres.fuse` went over, on a CUDA device. It is left as it is, buffers included.
        example: its input, a tensor or a tuple of positional arguments, of the size it will be used with.
        train: also run backward, in training mode; else evaluation mode without grad.
        dtype: bfloat16 or float16: run under autocast to it; float32: without; None: as it is where tune is called.
        progress: hears what is going on and how far it is, 0 to 1; by default a bar on a terminal.

    Returns: one `Row` a request, in the order of the model.

    Raises: TypeError / ValueError naming the argument.
    """
    arguments = _check_arguments(model, example, dtype)
    requests = record(model, arguments, train, dtype)
    if not requests:
        raise ValueError(
            "model: no convolution of it is served by fastres on this device; fuse(model) first, and "
            "print(fastres.report(model)) to see why not"
        )
    with contextlib.nullcontext(progress) if progress is not None else _bar() as told:
        return tune_requests(requests, told)


def _check_arguments(model, example, dtype) -> tuple:
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, expected a torch.nn.Module")
    if isinstance(model, torch.nn.parallel.DistributedDataParallel):
        raise TypeError("model: got DistributedDataParallel, expected the module inside it (model.module)")
    if dtype not in (None, torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"dtype: got {dtype}, expected torch.float32, torch.bfloat16, torch.float16 or None")
    arguments = tuple(example) if isinstance(example, (tuple, list)) else (example,)
    tensors = [a for a in arguments if isinstance(a, torch.Tensor)]
    if not tensors:
        raise TypeError(f"example: got {type(example).__name__}, expected a tensor or a tuple with a tensor in it")
    if not _tunable(tensors[0].device):
        raise ValueError(
            f"example: got a tensor on {tensors[0].device}, expected one on a CUDA device: on a CPU convolutions are "
            "PyTorch's, there is nothing to choose from"
        )
    return arguments


def _tunable(device: torch.device) -> bool:
    return device.type == "cuda"


def record(model: torch.nn.Module, arguments: Sequence, train: bool, dtype: torch.dtype | None) -> list:
    """The distinct requests of a forward (and backward, for ``train``) of a copy of ``model``, in order."""
    try:
        twin = copy.deepcopy(getattr(model, "_orig_mod", model))  # torch.compile's wrapper adds nothing here
    except Exception as error:
        raise TypeError(
            f"model: expected one that copy.deepcopy copies, got {type(error).__name__}: {error}"
        ) from error
    if twin.training != train:
        twin.train(train)
    for parameter in twin.parameters():
        parameter.grad = None
    device = next(a.device for a in arguments if isinstance(a, torch.Tensor))
    arguments = [a.detach().clone().requires_grad_(a.requires_grad) if isinstance(a, torch.Tensor) else a
                 for a in arguments]  # fmt: skip
    cast = contextlib.nullcontext()
    if dtype is not None:
        low = dtype != torch.float32
        cast = torch.autocast(device.type, dtype if low else torch.bfloat16, enabled=low)
    devices = [device] if device.type == "cuda" else []
    with tuning.recording() as requests, torch.random.fork_rng(devices=devices), torch.set_grad_enabled(train):
        with cast:
            output = twin(*arguments)
        if train:
            outputs = [t for t in torch.utils._pytree.tree_leaves(output) if getattr(t, "requires_grad", False)]
            if not outputs:
                raise ValueError("model: none of its outputs requires grad, expected one for train=True")
            torch.autograd.backward(outputs, [torch.ones_like(t) for t in outputs])
    return list(dict.fromkeys(requests))


def tune_requests(
    requests: Sequence[ConvRequest | OperandRequest],
    progress: Callable[[str, float], None],
    *,
    again: bool = True,
    ahead: bool = True,
    found: Callable[[Row], None] = lambda row: None,
) -> list[Row]:
    """Verify, measure and choose for each request; the winners are in force and on disk as they are found.

    ``again``: verify also what has a verdict on disk already; ``ahead``: compile all candidates beforehand, in
    processes of their own; ``found`` hears of each row. Returns a row for each request, then for each convolution
    that some plan for operands wanted to know about besides.
    """
    rows: dict[ConvRequest | OperandRequest, Row] = {}
    plans = [r for r in requests if isinstance(r, OperandRequest)]
    total = len(requests)
    if ahead:
        progress("compiling all candidates", 0.0)
        tuning_compile.ahead(convolutions(requests))

    def convolution(request: ConvRequest, done: int) -> Row:
        if request not in rows:
            said = functools.partial(_say, progress, str(request), done, total)
            rows[request] = _tuned(request, rows.get(replace(request, hooks=())), said, again)
            found(rows[request])
        return rows[request]

    # A convolution without hooks first: it is what serves where nothing rides along. Then who serves without operands
    # to form: that is what plans with such are held against.
    for done, request in enumerate(sorted((r for r in requests if r not in plans), key=lambda r: bool(r.hooks))):
        convolution(request, done)
    for done, request in enumerate(plans, total - len(plans)):
        rows[request] = _tuned_operands(request, functools.partial(convolution, done=done))
        found(rows[request])
    progress("done", 1.0)
    return [rows[request] for request in dict.fromkeys([*requests, *rows])]


def convolutions(requests: Sequence[ConvRequest | OperandRequest]) -> list[ConvRequest]:
    """The distinct convolutions that a tuning of ``requests`` may look at."""
    plain = [r for r in requests if isinstance(r, ConvRequest)]
    for request in (r for r in requests if isinstance(r, OperandRequest)):
        plain += [c for taken in request.plans for c in tuning_operands.needed(request, taken)]
    return list(dict.fromkeys(plain))


def _tuned_operands(request: OperandRequest, convolution: Callable[[ConvRequest], Row]) -> Row:
    possible = [()]
    for taken in request.plans[1:]:
        # The second operand adds to the first: where that has no kernel, nothing beyond has.
        if any(convolution(c).choice == LIBRARY for c in tuning_operands.needed(request, taken)):
            break
        possible.append(taken)
    try:
        step = tuning_operands.Step(request)
        times = {taken: tuning_operands.microseconds(step, taken) for taken in possible}
        # A second round: the first met a machine in another state.
        times = {taken: min(us, tuning_operands.microseconds(step, taken)) for taken, us in times.items()}
    except torch.OutOfMemoryError:
        return Row(request, Choice(tuning.PASSES), math.nan, math.nan, 
                   {tuning.PASSES: "could not be measured: out of GPU memory"})  # fmt: skip
    best = min(times, key=times.get)
    if times[best] > (1 - MARGIN) * times[()]:
        best = ()
    tuning.keep_plan(request, best, times[best], times[()])
    timings = {tuning.plan_name(taken): us for taken, us in times.items()}
    return Row(request, Choice(tuning.plan_name(best)), times[best], times[()], {}, timings)


def _say(progress, what: str, done: int, total: int, choice: str, share: float) -> None:
    progress(f"{what}: {choice}", (done + share) / total)


def _tuned(request: ConvRequest, plain: Row | None, said: Callable[[str, float], None], again: bool = True) -> Row:
    choices = tuning.candidates(request)
    said(str(LIBRARY), 0.0)
    try:
        trial = tuning.trial_of(request)
        timings = {LIBRARY: tuning.measured(trial, LIBRARY)}
    except torch.OutOfMemoryError:
        return Row(request, LIBRARY, math.nan, math.nan, {str(LIBRARY): "could not be measured: out of GPU memory"})
    rejected = {}
    for i, choice in enumerate(choices[1:], 1):
        said(str(choice), i / len(choices))
        wrong = tuning.verify(request, choice, again=again)
        if not wrong:
            check = functools.partial(_at_full_size, trial, choice, timings)
            wrong, for_good = tuning.examined(request, choice, check)
            if wrong:
                tuning.record_verdict(request, choice, wrong, for_good)
        if wrong:
            rejected[str(choice)] = wrong
    # A second round for those in question: the first met a machine in another state.
    for choice in dict.fromkeys([*sorted(timings, key=timings.get)[:2], LIBRARY]):
        timings[choice] = min(timings[choice], tuning.measured(trial, choice))
    baseline = timings[LIBRARY]
    if request.kind == "dgrad" and plain is not None and plain.choice != LIBRARY:
        # Where nothing rides along, our dgrad without hooks serves, and the passes stay.
        baseline -= max(0.0, plain.library_us - plain.us)
    best = min(timings, key=timings.get)
    if best != LIBRARY and timings[best] > (1 - MARGIN) * baseline:
        best = LIBRARY
    row = Row(request, best, baseline if best == LIBRARY else timings[best], timings[LIBRARY], rejected,
              {str(choice): us for choice, us in timings.items()})  # fmt: skip
    tuning.keep_winner(request, row.choice, row.us, row.library_us)
    return row


def _at_full_size(trial: tuning_trial.Trial, choice: Choice, timings: dict[Choice, float]) -> None:
    with tuning_trial.quiet(trial.request):
        tuning_check.beside_library(trial, tuning.module(choice), choice.config)
    timings[choice] = tuning.measured(trial, choice)


@contextlib.contextmanager
def _bar() -> Iterator[Callable[[str, float], None]]:
    """A progress bar where someone looks at it."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
    except ImportError:
        yield lambda text, share: None
        return
    terminal = Console(file=sys.stderr)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=terminal, transient=True, disable=not terminal.is_terminal) as bar:
        task = bar.add_task("starting", total=1.0)
        yield lambda text, share: bar.update(task, description=text, completed=share)
