"""Proof on a real GPU, in stages that each end before a time limit: ``make gpu-check``.

    python benchmarks/gpu_check.py [--stages build,kernels-cuda,...] [--limit 540] [--dry-run]

Every stage is a process of its own, appends its rows to ``<gpu>-<torch>.jsonl`` as it goes, and is ended at its
limit without taking the others along; at the end all rows are merged into ``<gpu>-<torch>.json``. The files lie in
``$OUT`` where that is set, else in ``benchmarks/results``. Stages can run in several sittings: rows of a stage that
runs again replace its old ones. Exit code 1 if a stage failed.

Without a GPU (or with ``--dry-run``) it says what each stage would do and rehearses the stage's code on the CPU with
tiny sizes, so that the script itself is known to work before it meets a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STAGES_SCRIPT = Path(__file__).with_name("gpu_stages.py")


@dataclass(frozen=True)
class Stage:
    """One process. ``command`` holds ``{python}``; ``environment`` is added to the caller's."""

    name: str
    does: str
    command: tuple[str, ...]
    environment: tuple[tuple[str, str], ...] = ()
    limit: int = 540
    #: Program the stage cannot do without; missing, the stage is skipped with that reason.
    program: str = ""


def _stage(name: str, does: str, **options) -> Stage:
    return Stage(name, does, ("{python}", str(STAGES_SCRIPT), name), **options)


def _sanitized(tool: str, does: str) -> Stage:
    command = (
        "compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--target-processes", "all",
        # Probing calls of torch and the CUDA libraries fail on purpose; ours are checked where they are made.
        *(("--report-api-errors", "no") if tool == "memcheck" else ()),
        "{python}", str(STAGES_SCRIPT), "launch-once",
    )  # fmt: skip
    # Without torch's caching allocator every tensor is an allocation of its own with guarded ends.
    return Stage(tool, does, command, (("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),), program="compute-sanitizer")


STAGES = (
    Stage(
        "build",
        "compile the CUDA and CPU kernels for this machine's own chips and install the package in place",
        ("{python}", "-m", "pip", "install", "--no-build-isolation", "--no-deps", "-e", str(ROOT)),
        (("FASTRES_CUDA", "1"), ("FASTRES_CUDA_ARCHS", "native")),
    ),
    _stage("kernels-cuda", "every CUDA C++ launch function, every variant of its arguments, against float64"),
    _stage("kernels-triton", "the same for the Triton kernels"),
    _stage("ops", "every module forward and backward on each GPU backend, against plain PyTorch and float64"),
    _sanitized("memcheck", "every CUDA launch function once: out-of-bounds and misaligned accesses"),
    _sanitized("racecheck", "the same: races in shared memory"),
    _sanitized("synccheck", "the same: divergent barriers"),
    _stage("conv-kernels", "every convolution kernel, configuration and combination of hooks on odd shapes"),
    _stage("conv-layers", "ResNet-50's forward convolutions: the CUDA C++ kernel's time beside cuDNN's and Triton's"),
    _stage("cudnn", "cuDNN's graphs through nvidia-cudnn-frontend, where installed: right, repeatable, how fast"),
    _stage("framework", "torch.compile without graph breaks, no host synchronisation, CUDA graph capture"),
    _stage("tune-256", "verified tuning of resnet50's training convolutions, batch 256; the winners serve below"),
    _stage("tune-64", "the same for batch 64"),
    _stage("bandwidth", "GB/s of every launch function on ResNet-50 layers, and its share of a plain copy"),
    _stage("one-pass", "batch normalisation in one cooperative launch: right, and its time beside separate launches"),
    _stage(
        "blocks", "evaluation blocks, stems and rotated units: right, and their time beside cuDNN's and torch.compile's"
    ),
    _stage("shift", "whether a warpgroup product may begin at any row of a shared tile, as the emulator models it"),
    _stage("op-times", "each op, forward and backward: eager, torch.compile, both GPU backends"),
    _stage("train-64", "a resnet50 training step, batch 64, bf16: eager, torch.compile, fastres, CUDA graphs; memory"),
    _stage("train-256", "the same with batch 256"),
    _stage("train-256-low", "the same with memory=low, beside eager"),
    _stage("train-64-reduce-overhead", "batch 64 beside torch.compile with CUDA graphs (mode='reduce-overhead')"),
    _stage("train-256-reduce-overhead", "batch 256, likewise"),
    _stage("train-64-max-autotune", "batch 64 beside torch.compile(mode='max-autotune'), which uses CUDA graphs too"),
    _stage("train-256-max-autotune", "batch 256, likewise"),
    _stage("profile", "time by kernel of the batch 256 step, and ncu's report of our slowest kernel"),
    _stage("infer", "resnet50 inference, bf16, batch 1 and 64: eager, torch.compile, fastres, CUDA graphs"),
    _stage("infer-max-autotune", "batch 64 beside torch.compile(mode='max-autotune')"),
)


def gpu() -> str:
    """Name of the first GPU that torch can use, or an empty string."""
    import torch

    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else ""


def results_file(device: str) -> Path:
    """The JSON lines file; its name says on which GPU and torch the rows were measured."""
    import torch

    folder = Path(os.environ.get("OUT") or ROOT / "benchmarks" / "results")
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{device.removeprefix('NVIDIA ')}-torch{torch.__version__.partition('+')[0]}"
    return folder / (re.sub(r"[^A-Za-z0-9._-]+", "_", name) + ".jsonl")


def read_rows(path: Path) -> list[dict]:
    """Rows of a JSON lines file; a last line that a killed stage left half-written is dropped."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            print(f"dropped an incomplete row of {path.name}: {line[:80]}")
    return rows


def start_over(path: Path, stage: str) -> None:
    """Forget the rows of a stage that is about to run again."""
    kept = [row for row in read_rows(path) if row["stage"] != stage]
    path.write_text("".join(json.dumps(row) + "\n" for row in kept))


def merge(path: Path) -> Path:
    """All rows as one JSON list beside the JSON lines file."""
    merged = path.with_suffix(".json")
    merged.write_text(json.dumps(read_rows(path), indent=1) + "\n")
    return merged


def run_stage(stage: Stage, path: Path, limit: int, extra: dict[str, str] | None = None) -> dict:
    """Run a stage to its end or its limit; its verdict as a row (also appended to the file)."""
    start_over(path, stage.name)
    command = [part.replace("{python}", sys.executable) for part in stage.command]
    row = {"stage": stage.name, "kind": "verdict", "command": shlex.join(command), "limit_s": limit}
    if stage.program and not (extra or shutil.which(stage.program)):
        row |= {"status": "skipped", "why": f"{stage.program} is not on PATH", "seconds": 0.0}
    else:
        if extra and stage.program:  # a rehearsal runs the program under test without its tool
            command = command[command.index(sys.executable) :]
        environment = {
            **os.environ,
            **dict(stage.environment),
            "FASTRES_GPU_CHECK_ROWS": str(path),
            "FASTRES_GPU_CHECK_STAGE": stage.name,
            **(extra or {}),
        }
        start = time.monotonic()
        # A session of its own, so that the limit ends the compilers it started as well.
        process = subprocess.Popen(command, env=environment, cwd=ROOT, start_new_session=True)
        try:
            code = process.wait(timeout=limit)
            row |= {"status": "passed" if code == 0 else "failed", "exit_code": code}
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            row |= {"status": "out of time", "why": f"ended after {limit} s; the rows up to then are kept"}
        row["seconds"] = round(time.monotonic() - start, 1)
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")
    return row


def plan(stages: list[Stage], limit: int) -> None:
    for stage in stages:
        shown = shlex.join(part.replace("{python}", "python") for part in stage.command)
        variables = "".join(f"{key}={value} " for key, value in stage.environment)
        print(f"{stage.name}: {stage.does}\n    {variables}{shown}\n    limit {min(limit, stage.limit)} s", flush=True)


def rehearse(stages: list[Stage], limit: int) -> list[dict]:
    """Each stage's code on the CPU with tiny sizes; ``build`` only as far as its tools (another process may build)."""
    verdicts = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rehearsal.jsonl"
        for stage in stages:
            print(f"--- rehearsing {stage.name} on the CPU", flush=True)
            if stage.name == "build":
                missing = _missing_build_tools()
                status = {"status": "failed", "why": missing} if missing else {"status": "passed"}
                verdicts.append({"stage": "build", **status, "seconds": 0.0})
                continue
            verdicts.append(run_stage(stage, path, limit, {"FASTRES_GPU_CHECK_REHEARSAL": "1"}))
    return verdicts


def _missing_build_tools() -> str:
    from importlib.util import find_spec

    missing = [name for name in ("pip", "setuptools", "wheel", "pybind11") if find_spec(name) is None]
    missing += [name for name in ("cmake", "ninja") if find_spec(name) is None and shutil.which(name) is None]
    return f"a build without isolation needs {', '.join(missing)}" if missing else ""


def main() -> int:
    parser = argparse.ArgumentParser(description="correctness and speed of fastres on this machine's GPU, in stages")
    parser.add_argument("--stages", default="", help="comma-separated; default: all, in order")
    parser.add_argument("--limit", type=int, default=540, help="seconds a stage may take at most")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, and rehearse it on the CPU")
    arguments = parser.parse_args()
    names = [name for name in arguments.stages.split(",") if name]
    unknown = sorted(set(names) - {stage.name for stage in STAGES})
    if unknown:
        parser.error(f"--stages: got {', '.join(unknown)}, expected some of {', '.join(s.name for s in STAGES)}")
    stages = [stage for stage in STAGES if not names or stage.name in names]

    device = gpu()
    if arguments.dry_run or not device:
        print("dry run: " + ("asked for" if arguments.dry_run else "torch sees no CUDA device on this machine"))
        print(f"results would go to {results_file(device or 'GPU').with_suffix('.json')}")
        plan(stages, arguments.limit)
        verdicts = rehearse(stages, arguments.limit)
    else:
        path = results_file(device)
        print(f"{device}: results go to {path.with_suffix('.json')}", flush=True)
        verdicts = []
        for stage in stages:
            print(f"--- {stage.name}: {stage.does}", flush=True)
            verdicts.append(run_stage(stage, path, min(arguments.limit, stage.limit)))
            merge(path)
            if stage.name == "build" and verdicts[-1]["status"] != "passed":
                print("the build failed: nothing of what follows would mean anything")
                break
    for verdict in verdicts:
        print(f"{verdict['stage']:26s} {verdict['status']:12s} {verdict['seconds']:7.1f} s  {verdict.get('why', '')}")
    return int(any(verdict["status"] in ("failed", "out of time") for verdict in verdicts))


if __name__ == "__main__":
    sys.exit(main())
