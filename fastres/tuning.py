"""Verified choice of convolutions: a kernel must prove itself right before it serves.

`choose` is what the ops ask. A configuration that ``fastres.tune`` (``tuning_run.py``) found to win on this very
request serves, else the shipped default, else PyTorch's own call. Whatever is not PyTorch's must first have given the
right outputs on this GPU under these versions (``tuning_check.py``). Verdicts and winners stay on disk
(``tuning_cache.py``). A configuration that is wrong or fails switches itself off, with one warning; ``fastres doctor``
lists what is in force and what is not.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType

import torch

from fastres import dispatch, tuning_cache, tuning_check, tuning_trial
from fastres.problem import ConvRequest, OperandRequest

#: Backend -> the module of its convolutions, and the function there that lists configurations of a request.
MODULES = {
    "triton": ("fastres.backends.triton_conv", "conv_candidates"),
    "cudnn": ("fastres.backends.cudnn", "candidates"),
    "cuda": ("fastres.backends.cuda_conv", "conv_candidates"),
    "emulator": ("fastres.backends.cuda_conv", "conv_candidates"),
}


@dataclass(frozen=True)
class Choice:
    """Who serves a request: ``backend`` is "library" (PyTorch's call and separate passes) or one of `MODULES`;
    ``config`` a row of that backend's configurations, None for the library. Known on disk by its words."""

    backend: str
    config: object | None = None

    def __str__(self) -> str:
        return self.backend if self.config is None else f"{self.backend} {self.config}"


LIBRARY = Choice("library", None)
#: How a plan that forms no operand is called on disk; any other by its operands.
PASSES = "passes"

#: Backends that run a GPU's kernels on CPU tensors, when they are forced.
_ON_CPU = ("triton", "emulator")

_lock = threading.RLock()
#: Forced backend (with the precision, for float32) -> request -> choice.
_tables: dict[object, dict[ConvRequest, Choice]] = {}
_recording: list[ConvRequest | OperandRequest] | None = None
#: (device, request in words, choice in words) -> why it failed; such things are not kept on disk.
#: Counts what may change a choice, for those who remember choices under keys of their own.
generation = 0
_failed: dict[tuple[int, str, str], str] = {}
_warned: set[tuple[str, str]] = set()


# ---- the choice


def choose(request: ConvRequest) -> Choice:
    """Who serves ``request``: remembered after the first time, which may run a verification of milliseconds.

    Under CUDA graph capture nothing can be verified: PyTorch's call serves what has no verdict yet, and the next call
    asks again. Under a forced backend without convolutions of its own it is PyTorch's call, always.
    """
    if _recording is not None:
        _recording.append(request)
        return LIBRARY
    forced = dispatch.forced()
    if request.device < 0 and forced not in _ON_CPU:
        return LIBRARY
    mode = _mode(request, forced)
    table = _tables.get(mode)
    found = None if table is None else table.get(request)
    return found or _decide(request, forced, mode)


def settled(request: ConvRequest) -> bool:
    """Whether the last answer to ``request`` stands as long as `generation` does and no other backend is forced."""
    if _recording is not None or request.dtype == "float32":
        return False
    return request in _tables.get(_mode(request, dispatch.forced()), {})


def operands(request: OperandRequest) -> tuple[tuple[str, ...], bool]:
    """(operands that are formed while loading, whether that stands as long as `generation` does).

    What ``fastres.tune`` found faster as a whole, as long as kernels of ours serve every convolution of it that forms
    an operand; nothing untuned, on a CPU, or under a backend without convolutions of its own.
    """
    if _recording is not None:
        _recording.append(request)
        return (), False
    if request.device < 0 or dispatch.forced() not in ("", "triton"):
        return (), True
    chosen = store(request.device).get(words(request)).get("chosen", PASSES)
    taken = next((plan for plan in request.plans if plan_name(plan) == chosen), ())
    stands = request.dtype != "float32"  # whose precision is PyTorch's switch
    for convolution in request.convolutions(taken):
        if set(convolution.hooks) & set(taken):
            if choose(convolution).config is None:
                taken = ()
            stands = stands and settled(convolution)
    return taken, stands


def plan_name(taken: tuple[str, ...]) -> str:
    """A plan as it is called on disk."""
    return ", ".join(taken) or PASSES


@contextlib.contextmanager
def recording() -> Iterator[list[ConvRequest | OperandRequest]]:
    """Collects the requests made inside; PyTorch's call serves them."""
    global _recording, generation
    before, _recording = _recording, []
    generation += 1
    try:
        yield _recording
    finally:
        _recording = before


def _mode(request: ConvRequest, forced: str):
    return (forced, tuning_check.fp32_mode()) if request.dtype == "float32" else forced


def _decide(request: ConvRequest, forced: str, mode) -> Choice:
    with _lock:  # backward runs in threads of its own
        table = _tables.setdefault(mode, {})
        if request in table:
            return table[request]
        if request.device < 0:
            # Nothing to verify: interpreter and emulator are tests of the kernel's source, not of a compiler.
            own = _offered(forced, request) if interpreting() else []
            choice = own[0] if own else LIBRARY
        elif (forced and forced not in MODULES) or 0 in request.problem.elements:
            choice = LIBRARY
        elif torch.cuda.is_current_stream_capturing():
            warnings.warn(
                "fastres: convolutions without a verdict are served by PyTorch while a CUDA graph is being captured "
                "(run one warm-up step first)",
                RuntimeWarning,
                stacklevel=3,
            )
            return LIBRARY
        else:
            choice = next(c for c in _preferred(request, forced) if not verify(request, c))
        table[request] = choice
        return choice


def _preferred(request: ConvRequest, forced: str) -> Iterator[Choice]:
    """Choices from the best to PyTorch's call; one backend is asked for its configurations, and only where needed."""
    tuned = _named(request, words(request), forced)
    if tuned is not None:
        yield tuned
        if tuned == LIBRARY:
            return
    shipped = _shipped(request)
    if shipped is not None and forced in ("", shipped.backend):
        yield shipped
    if forced:
        yield from _offered(forced, request)
    yield LIBRARY


def _named(request: ConvRequest, text: str, forced: str) -> Choice | None:
    """The winner of the tuning, if there was one, it still exists and the forced backend allows it."""
    chosen = store(request.device).get(text).get("chosen", "")
    backend = chosen.partition(" ")[0]
    if forced and backend != forced:
        return None
    if backend == LIBRARY.backend:
        return LIBRARY
    return next((choice for choice in _offered(backend, request) if str(choice) == chosen), None)


def interpreting() -> bool:
    """Whether CPU tensors may go to kernels of a GPU: Triton's interpreter or the emulator is forced, and there."""
    forced = dispatch.forced()
    if forced == "triton":
        return dispatch.load("triton").interpreting()
    return forced == "emulator" and not dispatch.load("emulator").missing


def module(choice: Choice) -> ModuleType:
    """The module that offers ``conv_fprop``, ``conv_dgrad``, ``conv_wgrad`` and ``conv_parts`` for a choice."""
    return _module(choice.backend)


@functools.cache
def _module(backend: str) -> ModuleType:
    return importlib.import_module(MODULES[backend][0])


def _why_not(backend: str, request: ConvRequest) -> str:
    """Why ``backend`` has no configuration for ``request`` at all, or ""."""
    if backend == "triton":
        device, dtype = tuning_trial.device_of(request), getattr(torch, request.dtype)
        return "; ".join(dispatch.load("triton").why_not(dispatch.Request("bottleneck", device, dtype)))
    try:
        _module(backend)
    except ImportError as error:
        return f"{MODULES[backend][0]} cannot be imported: {error}"
    wanted = "CPU" if backend == "emulator" else "CUDA"
    return "" if (wanted == "CPU") == (request.device < 0) else f"{wanted} tensors only"


def _offered(backend: str, request: ConvRequest) -> list[Choice]:
    if backend not in MODULES or _why_not(backend, request):
        return []
    return [Choice(backend, config) for config in getattr(_module(backend), MODULES[backend][1])(request)]


def candidates(request: ConvRequest) -> list[Choice]:
    """Every choice for ``request``: PyTorch's call, then each backend's configurations, the likeliest winners first."""
    return [LIBRARY, *(choice for backend in MODULES for choice in _offered(backend, request))]


def _shipped(request: ConvRequest) -> Choice | None:
    """The default of an untuned request; None: PyTorch's call."""
    if _why_not("triton", request):
        return None
    itemsize = 4 if request.dtype == "float32" else 2
    capability = torch.cuda.get_device_capability(request.device)
    rule = _module("triton").configs().shipped
    config = rule(request.kind, request.problem, request.hooks, itemsize, capability)
    return None if config is None else Choice("triton", config)


# ---- verdicts


@functools.cache
def store(device: int) -> tuning_cache.Store:
    """Verdicts and winners of GPU ``device``."""
    return tuning_cache.Store(tuning_cache.key(device))


def forget() -> None:
    """Drop what this process remembers; files stay."""
    global generation
    with _lock:
        generation += 1
        _tables.clear()
        _failed.clear()
        _warned.clear()
        store.cache_clear()


def words(request: ConvRequest | OperandRequest) -> str:
    """A request as it is called on disk."""
    return f"{request}, {tuning_check.fp32_mode()}" if request.dtype == "float32" else str(request)


def verify(request: ConvRequest, choice: Choice, *, again: bool = False) -> str:
    """What is wrong with ``choice`` for ``request``, or "". Runs it unless a verdict is known (or ``again``).

    The first time that a configuration turns out wrong it says so in a RuntimeWarning. An error that left the CUDA
    context unusable is raised (torch.AcceleratorError); every other error of a kernel is a reason.
    """
    if choice == LIBRARY:
        return ""
    if not again and (known := _verdict(request, choice)) is not None:
        return known
    return record_verdict(request, choice, *examined(request, choice))


def _verdict(request: ConvRequest, choice: Choice) -> str | None:
    failed = _failed.get((request.device, words(request), str(choice)))
    verdict = store(request.device).get(words(request))["verdicts"].get(str(choice))
    return failed or (None if verdict is None else verdict["wrong"])


def examined(request: ConvRequest, choice: Choice, check: Callable | None = None) -> tuple[str, bool]:
    """(reason or "", whether it is for good)."""
    try:
        if check is None:
            return tuning_check.failure(request, module(choice), choice.config), True
        check()
    except torch.AcceleratorError:
        raise
    except torch.OutOfMemoryError:
        return "could not be verified: out of GPU memory", False
    except tuning_trial.Miss as miss:
        return str(miss), True
    except Exception as error:
        if request.device >= 0 and torch.cuda.is_available():
            torch.cuda.synchronize(request.device)  # raises where the error took the context with it
        return f"failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}", False
    return "", True


def record_verdict(request: ConvRequest, choice: Choice, wrong: str, for_good: bool) -> str:
    """Remember, on disk if it is ``for_good``, what is wrong with ``choice`` ("": nothing), and warn once.

    Returns ``wrong``.
    """
    text, name = words(request), str(choice)
    with _lock:
        if for_good:
            _failed.pop((request.device, text, name), None)
            verdict = {"wrong": wrong, "when": tuning_cache.now()}
            store(request.device).put(text, {"verdicts": {name: verdict}})
        else:
            _failed[request.device, text, name] = wrong
        first = (request.kind, name) not in _warned
        if wrong and first:
            _warned.add((request.kind, name))
            warnings.warn(f"fastres: {name} is switched off for {request}: {wrong}", RuntimeWarning, stacklevel=4)
    return wrong


def measure(request: ConvRequest, choice: Choice) -> float:
    """Median microseconds of ``choice`` at full size with cold caches; PyTorch's call with the passes of the hooks."""
    return measured(trial_of(request), choice)


def trial_of(request: ConvRequest) -> tuning_trial.Trial:
    """Data of full size, to measure several choices on."""
    with tuning_trial.quiet(request):
        return tuning_trial.Trial(request)


def measured(trial: tuning_trial.Trial, choice: Choice) -> float:
    """`measure` on the data of ``trial``."""
    return tuning_trial.microseconds(trial, None if choice == LIBRARY else module(choice), choice.config)


def keep_plan(request: OperandRequest, taken: tuple[str, ...], us: float, passes_us: float) -> None:
    """``taken`` are formed while loading from now on, in this process and later ones."""
    with _lock:
        _keep(request, plan_name(taken), us, passes_us)


def _keep(request, chosen: str, us: float, library_us: float) -> None:
    global generation
    generation += 1
    winner = {"chosen": chosen, "us": us, "library_us": library_us, "when": tuning_cache.now()}
    store(request.device).put(words(request), {"verdicts": {}, **winner})


def keep_winner(request: ConvRequest, choice: Choice, us: float, library_us: float) -> None:
    """``choice`` serves from now on, in this process and later ones."""
    with _lock:
        _keep(request, str(choice), us, library_us)
        for backend in MODULES:
            _tables.get(_mode(request, backend), {}).pop(request, None)
        _tables.setdefault(_mode(request, ""), {})[request] = choice


# ---- what doctor says


def status() -> dict:
    """Where the cache is, what its files hold, and for each GPU what is in force and what was switched off."""
    folder = tuning_cache.directory()
    files = {}
    for path in sorted(folder.glob("*.json")) if folder is not None else ():
        try:
            files[path.name] = len(tuning_cache.read(path))
        except (tuning_cache.Foreign, OSError) as error:
            files[path.name] = str(error)
    devices = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    return {"directory": None if folder is None else str(folder), "files": files, "gpus": list(map(_of_gpu, devices))}


def _of_gpu(device: int) -> dict:
    known = store(device)
    in_force, rejected = [], []
    for request, entry in sorted(known.entries.items()):
        wrong = {choice: v["wrong"] for choice, v in entry["verdicts"].items() if v["wrong"]}
        rejected += [{"request": request, "choice": choice, "why": why} for choice, why in wrong.items()]
        if "chosen" in entry and entry["chosen"] not in wrong:
            in_force.append({"request": request, **{k: entry[k] for k in ("chosen", "us", "library_us")}})
    for (where, request, choice), why in _failed.items():
        if where == device:
            rejected.append({"request": request, "choice": choice, "why": why})
    path = str(known.path) if known.on_disk else None
    gpu = known.key["gpu"]
    return {"gpu": gpu, "file": path, "entries": len(known.entries), "in_force": in_force, "rejected": rejected}
