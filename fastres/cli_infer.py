"""What ``fastres infer`` does and prints: photographs through a session, top five classes, latency and throughput."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from rich import box
from rich.markup import escape
from rich.table import Table
from torch import nn

import fastres
from fastres.bench import BenchError, contestants, harness, inputs
from fastres.inference import executors

TOP = 5
#: Every batch is timed at least so often in all, after one that warms up.
LEAST_RUNS = 10


@dataclass(frozen=True)
class Request:
    """The command's arguments, see ``fastres infer --help``."""

    model: str
    images: str
    checkpoint: str = ""
    dtype: str = "fp32"
    precision: str = "highest"
    batch: int = 1
    size: int = 224
    threads: int = 0
    device: str = "cpu"
    save: str = ""
    profile: str = ""

    def check(self) -> None:
        """Raises BenchError, one line, for what cannot be done."""
        if self.dtype not in harness.DTYPES:
            raise BenchError(f"--dtype: got {self.dtype!r}, expected one of {', '.join(harness.DTYPES)}")
        if self.precision not in executors.PRECISIONS:
            raise BenchError(f"--precision: got {self.precision!r}, expected one of {', '.join(executors.PRECISIONS)}")
        if self.precision == "high" and self.dtype != "fp32":
            raise BenchError(f"--precision: got 'high' with --dtype {self.dtype}, expected fp32, which it is about")
        for what, value, least in (("batch", self.batch, 1), ("size", self.size, 32), ("threads", self.threads, 0)):
            if value < least:
                raise BenchError(f"--{what}: got {value}, expected at least {least}")
        if self.device not in ("cpu", "cuda"):
            raise BenchError(f"--device: got {self.device!r}, expected 'cpu' or 'cuda'")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise BenchError("--device: got 'cuda', but torch sees no CUDA device")
        if self.checkpoint and Path(self.model).is_file():
            raise BenchError("--checkpoint: got one beside a saved session, which has its own weights")


def infer(request: Request) -> Iterator:
    """Tables and lines to print."""
    request.check()
    paths = inputs.photographs(request.images)
    if request.threads:
        torch.set_num_threads(request.threads)
    started = time.perf_counter()
    pixels = torch.stack([inputs.load_photograph(path, request.size) for path in paths])
    decoding = time.perf_counter() - started
    pixels = pixels.to(request.device, memory_format=torch.channels_last)
    batches = list(pixels.split(request.batch))
    started = time.perf_counter()
    session, origin = _session(request, batches[0])
    building = time.perf_counter() - started
    try:
        logits = torch.cat([session(b.to(session.dtype)).float() for b in batches])
    except (TypeError, ValueError) as error:
        raise BenchError(f"MODEL: does not take these images: {error}") from error
    if logits.dim() != 2:
        raise BenchError(f"MODEL: got an output of shape {tuple(logits.shape)}, expected logits [N, classes]")
    yield _classes(paths, logits, _categories(logits.shape[1]))
    yield from _speed(session, batches)
    yield f"reading {len(paths)} images took {decoding:.2f} s, building and checking the session {building:.2f} s"
    yield f"{origin}; {session!r}"
    if session.verdict is not None:
        yield f"checked: {session.verdict.message}"
    yield from (f"note: {note}" for note in session.notes)
    if request.save:
        yield f"session: {session.save(request.save)}"
    if request.profile:
        session.profile(request.profile, shape=tuple(batches[0].shape))
        yield f"chart: {request.profile}"


def _session(request: Request, x: torch.Tensor) -> tuple[fastres.InferenceSession, str]:
    if Path(request.model).is_file():
        try:
            session = fastres.load(request.model, device=x.device)
        except (ValueError, RuntimeError) as error:
            raise BenchError(f"MODEL: {error}") from error
        return session, f"loaded from {request.model} (its own dtype and precision)"
    if request.model not in contestants.names():
        known = ", ".join(contestants.names())
        raise BenchError(f"MODEL: got {request.model!r}, expected a saved session or one of {known}")
    model, origin = contestants.baseline(request.model)
    if request.checkpoint:
        load_checkpoint(model, Path(request.checkpoint))
        origin += f", weights of {request.checkpoint}"
    else:
        origin += ", RANDOM weights (no --checkpoint): the classes mean nothing"
    dtype = harness.DTYPES[request.dtype]
    try:
        session = fastres.optimize(model.eval().to(x.device), (x,), dtype=dtype, precision=request.precision)
    except fastres.inference.VerificationError as error:
        raise BenchError(str(error)) from error
    return session, origin


def load_checkpoint(model: nn.Module, path: Path) -> None:
    """Load a state_dict into ``model``; its classifier takes the checkpoint's number of classes.

    Also takes a training checkpoint that holds one under "state_dict" or "model", and names with a "module." in front.
    Only tensors are read, no code is run. Raises BenchError, one line, for anything that does not fit.
    """
    if not path.is_file():
        raise BenchError(f"--checkpoint: got {str(path)!r}, expected an existing file")
    try:
        if path.suffix == ".safetensors":
            import safetensors.torch

            state = safetensors.torch.load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged file makes of the two readers, torch's with advice to run its code
        raise BenchError(
            f"--checkpoint: {path.name} is no readable file of tensors alone ({type(error).__name__})"
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(t, torch.Tensor) for t in state.values()) or not state:
        raise BenchError(f"--checkpoint: {path.name} holds no state_dict")
    state = {name.removeprefix("module."): t for name, t in state.items()}
    weight = state.get("fc.weight")
    if weight is not None and weight.dim() == 2 and weight.shape[1] == model.fc.in_features:
        model.fc = nn.Linear(model.fc.in_features, weight.shape[0])
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        lines = str(error).splitlines()
        raise BenchError(f"--checkpoint: {path.name} does not fit: {' '.join(lines[1:2]) or lines[0]}"[:400]) from error


def _categories(count: int) -> list[str]:
    """torchvision's names of the ImageNet classes where they are meant and at hand, else numbers."""
    numbers = [f"class {i}" for i in range(count)]
    try:
        from torchvision.models import ResNet50_Weights
    except (ImportError, RuntimeError):  # RuntimeError: torchvision built for another torch
        return numbers
    names = ResNet50_Weights.DEFAULT.meta["categories"]
    return names if len(names) == count else numbers


def _classes(paths: list[Path], logits: torch.Tensor, names: list[str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("image", overflow="fold")
    most = min(TOP, logits.shape[1])
    table.add_column(f"top {most}", overflow="fold")
    chances, classes = logits.softmax(1).topk(most)
    for path, row, found in zip(paths, chances.tolist(), classes.tolist(), strict=True):
        table.add_row(
            escape(path.name), escape(", ".join(f"{names[i]} {p:.1%}" for p, i in zip(row, found, strict=True)))
        )
    return table


def _speed(session: fastres.InferenceSession, batches: list[torch.Tensor]) -> Iterator[str]:
    """Latency of a batch and images a second, the model alone; every size of batch has warmed up already."""
    ready = [b.to(session.dtype) for b in batches]
    seconds: dict[int, list[float]] = {}
    runs = max(LEAST_RUNS, len(ready))
    for i in range(runs):
        x = ready[i % len(ready)]
        begin = time.perf_counter()
        with torch.inference_mode():
            session(x)
        if x.is_cuda:
            torch.cuda.synchronize(x.device)
        seconds.setdefault(x.shape[0], []).append(time.perf_counter() - begin)
    for images, times in sorted(seconds.items(), reverse=True):
        median = statistics.median(times)
        spread = f"{min(times) * 1e3:.2f} to {max(times) * 1e3:.2f}, {len(times)} runs"
        threads = f"threads: {torch.get_num_threads()}" if session.device.type == "cpu" else str(session.device)
        yield f"batch {images}: latency {median * 1e3:.2f} ms ({spread}), {images / median:.1f} images/s, {threads}"
