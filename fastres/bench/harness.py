"""From a request to result rows: build the contestants, check them against float64, let them take turns."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import nn

from fastres.bench import contestants, engines, rows, timing
from fastres.bench.inputs import BenchError, batch_of, photographs

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
#: Images of an inference batch that are held against float64; they do not influence each other.
CHECKED_IMAGES = 8
WARMUP = 2


@dataclass(frozen=True)
class Case:
    """What ``fastres bench`` measures. ``batch`` images of ``size`` x ``size`` pixels; ``seconds`` of timing."""

    model: str
    train: bool = False
    dtype: str = "fp32"
    batch: int = 8
    size: int = 224
    device: str = "cpu"
    threads: int = 0
    seconds: float = 30.0
    images: str | None = None
    memory: str = "default"
    compile: bool = True
    compile_mode: str = "default"
    graph: bool = False
    seed: int = 0

    def checked(self) -> Case:
        """Itself with defaults filled in; raises BenchError (one line) for what cannot be measured."""
        if self.model not in contestants.names():
            raise BenchError(f"MODEL: got {self.model!r}, expected one of {', '.join(contestants.names())}")
        if self.dtype not in DTYPES:
            raise BenchError(f"--dtype: got {self.dtype!r}, expected one of {', '.join(DTYPES)}")
        if self.memory not in ("default", "low"):
            raise BenchError(f"--memory: got {self.memory!r}, expected 'default' or 'low'")
        if self.memory == "low" and not self.train:
            raise BenchError("--memory low: nothing is saved for backward in inference, expected --train beside it")
        least = {"batch": 2 if self.train else 1, "size": 32, "threads": 0}
        for what, low in least.items():
            if getattr(self, what) < low:
                raise BenchError(f"--{what}: got {getattr(self, what)}, expected at least {low}")
        if not self.seconds > 0:
            raise BenchError(f"--seconds: got {self.seconds}, expected a positive number")
        try:
            device = torch.device(self.device)
        except RuntimeError as error:
            raise BenchError(f"--device: got {self.device!r}, expected 'cpu' or 'cuda'") from error
        if device.type not in ("cpu", "cuda"):
            raise BenchError(f"--device: got {self.device!r}, expected 'cpu' or 'cuda'")
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise BenchError(f"--device: got {self.device!r}, but torch sees {torch.cuda.device_count()} CUDA devices")
        if self.images is not None:
            photographs(self.images)
        if self.graph and device.type != "cuda":
            raise BenchError("--graph: a CUDA graph needs --device cuda")
        modes = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
        if self.compile_mode not in modes:
            raise BenchError(f"--compile-mode: got {self.compile_mode!r}, expected one of {', '.join(modes)}")
        return replace(self, threads=self.threads or torch.get_num_threads())

    def has_session(self) -> bool:
        """Whether "fastres" is an inference session; elsewhere it is the fused model."""
        return not self.train and torch.device(self.device).type == "cpu"

    def call(self, name: str) -> str:
        """What makes the contestant ``name`` of fastres."""
        if name == "fastres" and self.has_session():
            return f"fastres.optimize(model, (x,), dtype={DTYPES[self.dtype]})"
        if not self.train:
            return "fastres.fuse(model, fold=True)"
        return "fastres.fuse(model)" if self.memory == "default" else f"fastres.fuse(model, memory={self.memory!r})"


@dataclass
class Result:
    """Rows (JSON-ready, one per contestant that ran) and what did not run, with its reason."""

    case: Case
    rows: list[dict]
    absent: dict[str, str]
    input: str
    baseline: str


def run(case: Case, progress: Callable[[str, float], None] = lambda text, fraction: None) -> Result:
    """Measure ``case``. ``progress`` hears what is going on and how far it is, 0 to 1."""
    case = case.checked()
    before = torch.get_num_threads(), torch.backends.cudnn.benchmark
    torch.set_num_threads(case.threads)
    torch.backends.cudnn.benchmark = True  # the baseline a user can have with one line; it serves every contestant
    try:
        return _run(case, progress)
    finally:
        torch.set_num_threads(before[0])
        torch.backends.cudnn.benchmark = before[1]


def _run(case: Case, progress) -> Result:
    device, dtype = torch.device(case.device), DTYPES[case.dtype]
    x, source = batch_of(case.batch, case.size, case.images, case.seed)
    x = x.to(device, memory_format=torch.channels_last)
    progress("building the models", 0.0)
    model, baseline = contestants.baseline(case.model, case.seed)
    model = model.to(device)
    labels = None
    if case.train:
        generator = torch.Generator().manual_seed(case.seed + 2)
        labels = torch.randint(0, 1000, (case.batch,), generator=generator).to(device)

    progress("float64 truth", 0.02)
    truth = engines.truth(model, x if case.train else x[:CHECKED_IMAGES], labels)
    built, absent, errors = {}, {}, {}
    contest = _contestants(case, model, x, labels, dtype)
    for place, (name, build) in enumerate(contest.items()):
        progress(f"{name}: first run and check", 0.1 + 0.4 * place / len(contest))
        try:
            engine = build()
            errors[name] = _errors(engine.first(), truth, dtype)
            for _ in range(WARMUP):
                engine.run()
            if name.endswith(", CUDA graph"):
                engine = engines.captured(engine)
        except Exception as error:  # a contestant that cannot run is a row with its reason, not a crash
            if name == rows.BASELINE:
                raise BenchError(f"the eager baseline cannot run this case: {_first_line(error)}") from error
            if name in ("fastres", rows.FOLDED):
                raise
            absent[name] = _first_line(error)
            continue
        built[name] = engine
    if case.compile and (why := _no_compiler()):
        absent["torch.compile"] = why
    elif not case.compile:
        absent["torch.compile"] = "switched off by --no-compile"
    gc.collect()

    times = timing.take_turns(
        {name: engine.run for name, engine in built.items()},
        case.seconds,
        synchronize=torch.cuda.synchronize if device.type == "cuda" else lambda: None,
        on_round=lambda fraction: progress("taking turns", 0.5 + 0.5 * fraction),
    )
    peaks = {name: _memory(engine, device) for name, engine in built.items()}
    found = _rows(case, times, errors, peaks, source, baseline)
    return Result(case, found, absent, source, baseline)


def _contestants(case: Case, model: nn.Module, x, labels, dtype) -> dict[str, Callable]:
    """Name -> builder, in the order of the table."""

    def engine(name, how=None, forward=None):
        if case.train:
            return engines.training(name, model, x, labels, dtype, how, forward)
        return engines.inference(name, model, x, dtype, how)

    def compiled():
        torch._dynamo.reset()
        mode = None if case.compile_mode == "default" else case.compile_mode
        if case.train:
            return engine("torch.compile", forward=lambda m: torch.compile(m, mode=mode))
        with engines.frozen_weights():
            built = engine("torch.compile", how=lambda m: torch.compile(m, mode=mode))
            built.run()
        return built

    found = {"eager": lambda: engine("eager")}
    if case.compile and not _no_compiler():
        found["torch.compile"] = compiled
    how = contestants.fused(case.train, case.memory)
    if case.has_session():
        found[rows.FOLDED] = lambda: engine(rows.FOLDED, how=how)
        found["fastres"] = lambda: engines.serving("fastres", contestants.session(model, x, dtype), x, dtype)
    else:
        found["fastres"] = lambda: engine("fastres", how=how)
    if case.graph:
        found["eager, CUDA graph"] = lambda: engine("eager")
        found["fastres, CUDA graph"] = lambda: engine("fastres", how=how)
    return found


def _no_compiler() -> str:
    """Why torch.compile cannot work here, or an empty string."""
    if not any(map(shutil.which, ("g++", "clang++", "c++", "gcc", "clang", "cc"))):
        return "no C++ compiler found on PATH, and Inductor needs one"
    return ""


def _errors(first: dict, truth: dict, dtype: torch.dtype) -> dict[str, float]:
    """Relative L2 distances from float64; the loss as an absolute difference."""
    logits = first["logits"][: len(truth["logits"])]
    found = {"logits": rows.relative_l2(logits, truth["logits"])}
    if "loss" in truth:
        found["gradients"] = rows.relative_l2(first["gradients"], truth["gradients"])
        found["loss_difference"] = (first["loss"].double() - truth["loss"]).abs().item()
    return found


def _memory(engine: engines.Engine, device: torch.device) -> dict:
    found = {}
    if "saved_bytes" in engine.details and engine.name != "torch.compile":
        found["saved_for_backward_bytes"] = engine.details["saved_bytes"]()
    if device.type == "cuda" and "graph" not in engine.details:  # a graph's buffers are its own, for good
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats(device)
        base = torch.cuda.memory_allocated(device)
        engine.run()
        torch.cuda.synchronize()
        found["peak_bytes_of_a_run"] = torch.cuda.max_memory_allocated(device) - base
    return found


def _rows(case: Case, times, errors, memory, source: str, baseline: str) -> list[dict]:
    shared = rows.provenance()
    dtype = DTYPES[case.dtype]
    found = []
    for name, samples in times.items():
        ok = all(
            rows.within_budget(errors[name][what], errors[rows.BASELINE][what], dtype)
            for what in ("logits", "gradients")
            if what in errors[name]
        )
        row = {
            "kind": "model",
            "model": case.model,
            "mode": "training" if case.train else "inference",
            "shape": [case.batch, 3, case.size, case.size],
            "dtype": case.dtype,
            "layout": "channels_last",
            "device": case.device,
            "memory": case.memory if rows.is_ours(name) else "default",
            **({"call": case.call(name)} if rows.is_ours(name) else {}),
            **({"compile_mode": case.compile_mode} if name == "torch.compile" else {}),
            "backend": name,
            **timing.summary(samples),
            "error_vs_float64": errors[name],
            "within_budget": ok,
            **memory[name],
            "input": source,
            "unfused_model": baseline,
            **shared,
        }
        row["images_per_s"] = case.batch * 1e3 / row["median_ms"]
        found.append(row)
    rows.compare(found)
    return found


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:160]
