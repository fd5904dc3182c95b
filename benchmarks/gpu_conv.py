"""Stages of ``gpu_check.py`` about convolutions, compilers and graphs; started through ``gpu_stages.py``.

Each takes ``emit`` (a row of results) and says whether all was well. In a rehearsal they run on the CPU with tiny
sizes, Triton through its interpreter.
"""

from __future__ import annotations

import copy
import math
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

import fastres
from fastres import tuning
from fastres.bench import contestants, engines
from fastres.problem import HOOKS, ConvProblem, ConvRequest

HERE = Path(__file__).resolve().parent

#: Shapes that sit on edges: odd sizes, tiles that do not divide, strides, dilation, groups, few channels.
EDGES = (
    ConvProblem(3, 9, 7, 64, 128, 3, 3, padding=(1, 1)),
    ConvProblem(5, 7, 7, 128, 64, 1, 1),
    ConvProblem(2, 13, 15, 72, 40, 3, 3, stride=(2, 2), padding=(1, 1)),
    ConvProblem(2, 12, 14, 64, 192, 1, 1, stride=(2, 2)),
    ConvProblem(2, 11, 10, 64, 64, 3, 3, padding=(2, 2), dilation=(2, 2)),
    ConvProblem(2, 10, 9, 64, 128, 3, 3, padding=(1, 1), groups=2),
    ConvProblem(2, 31, 29, 3, 64, 7, 7, stride=(2, 2), padding=(3, 3)),
)


def hook_sets(kind: str) -> tuple[tuple[str, ...], ...]:
    """Combinations that an op asks for."""
    from fastres.backends import triton_conv

    return triton_conv.configs().ASKED[kind]


def _pairs(requests: list[ConvRequest]) -> list[tuple]:
    """(request, choice) of every candidate."""
    found = []
    for request in requests:
        choices = tuning.candidates(request)[1:]
        if request.dtype != "bfloat16":  # the same code for another element: one configuration of each kernel
            # (cuDNN's graphs have none)
            choices = {getattr(choice.config, "kernel", choice): choice for choice in reversed(choices)}.values()
        found += [(request, choice) for choice in choices]
    return found


#: Why this process can verify nothing any more: an error that took its CUDA context along.
_lost = ""


def _verify(pair: tuple) -> tuple[str, str, str] | None:
    """(request, choice, what is wrong); None for what a process was given after it had lost its CUDA context."""
    global _lost
    request, choice = pair
    if _lost:
        return None
    try:
        # CPU tensors: nothing is remembered of what an interpreter found.
        wrong = tuning.verify(*pair) if request.device >= 0 else tuning.examined(*pair)[0]
    except torch.AcceleratorError as error:
        wrong = _lost = f"CUDA error: {error}"
    return str(request), str(choice), wrong


def _in_processes(pairs: list[tuple]) -> list[tuple[str, str, str]]:
    """`_verify` spread over processes, one candidate at a time: nearly all of it is compiling, and some requests have
    ten times the candidates of others. Compiled kernels and verdicts stay on disk for the stages to come."""
    jobs = max(1, min(14, (os.cpu_count() or 2) - 1, len(pairs)))
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        verdicts = pool.map(_verify, pairs, chunksize=1)
    found = [verdict for verdict in verdicts if verdict is not None]
    left = [pair for pair, verdict in zip(pairs, verdicts, strict=True) if verdict is None]
    # Each round with losses has at least one verdict.
    return found + (_in_processes(left) if left else [])


def conv_kernels(emit: Callable, rehearsal: bool) -> bool:
    """Every convolution kernel, configuration and combination of hooks on the edges, against float64."""
    device = -1 if rehearsal else torch.cuda.current_device()
    dtypes = ("float16",) if rehearsal else ("bfloat16", "float16", "float32")
    problems = EDGES[:1] if rehearsal else EDGES
    requests = [
        ConvRequest(kind, problem, dtype, hooks, device)
        for problem in problems for kind in HOOKS for dtype in dtypes for hooks in hook_sets(kind)
    ]  # fmt: skip
    if rehearsal:
        with fastres.backend("triton"):
            verdicts = [_verify(pair) for pair in _pairs(requests[:2])]
    else:
        verdicts = _in_processes(_pairs(requests))
    wrong = [verdict for verdict in verdicts if verdict[2]]
    for request, choice, why in wrong:
        emit(kind="convolution", request=request, choice=choice, status="failed", why=why)
    emit(kind="convolutions", verified=len(verdicts) - len(wrong), failed=len(wrong), requests=len(requests))
    return not wrong and (bool(verdicts) or rehearsal)


def tune(emit: Callable, rehearsal: bool, batch: int) -> bool:
    """``fastres.tune`` on resnet50's training step: what serves each convolution, and what PyTorch's call costs."""
    from fastres import tuning_run

    if rehearsal:
        emit(kind="tuned", status="needs a GPU: tests/test_tuning.py rehearses it with fake timers")
        return True
    torch.backends.cudnn.benchmark = True
    model, _ = contestants.baseline("resnet50")
    model = contestants.fused(True)(model.cuda().to(memory_format=torch.channels_last).train())
    x = torch.randn(batch, 3, 224, 224, device="cuda").to(memory_format=torch.channels_last)
    requests = tuning_run.record(model, (x,), True, torch.bfloat16)
    del model, x
    torch.cuda.empty_cache()
    # Where nothing rides along PyTorch's call serves untuned, and it was seen to win (H100, batch 256).
    requests = [request for request in requests if request.hooks or request.problem.C <= 4]
    start = time.monotonic()
    verdicts = _in_processes(_pairs(tuning_run.convolutions(requests)))
    wrong = [verdict for verdict in verdicts if verdict[2]]
    emit(kind="compiled and verified", candidates=len(verdicts), wrong=len(wrong), seconds=time.monotonic() - start)
    tuning.forget()  # the verdicts are on disk

    def found(row):
        emit(kind="tuned", request=str(row.request), chosen=str(row.choice), us=row.us, library_us=row.library_us,
             ratio=row.ratio, timings=row.timings, rejected=row.rejected)  # fmt: skip

    start = time.monotonic()
    rows = tuning_run.tune_requests(requests, lambda text, share: None, again=False, ahead=False, found=found)
    finite = [row for row in rows if not math.isnan(row.us)]
    plain = [row for row in finite if not set(row.request.hooks) & {"prologue", "pre", "bits"}]
    plans = [row for row in finite if not isinstance(row.request, ConvRequest)]
    for kind, part in (("tuned in all", plain), ("operands in all", plans)):
        emit(kind=kind, requests=len(part), library_us=sum(r.library_us for r in part), us=sum(r.us for r in part),
             seconds=time.monotonic() - start)  # fmt: skip
    return bool(finite)


def framework(emit: Callable, rehearsal: bool) -> bool:
    """torch.compile without graph breaks, no synchronisation of the host, CUDA graph capture, equal results."""
    device, size, batch = ("cpu", 32, 2) if rehearsal else ("cuda", 64, 8)
    model, _ = contestants.baseline("resnet50" if not rehearsal else "resnet18")
    model = contestants.fused(True)(model.to(device).to(memory_format=torch.channels_last).train())
    x = torch.randn(batch, 3, size, size, device=device).to(memory_format=torch.channels_last)
    labels = torch.randint(0, 1000, (batch,), device=device)
    good = True
    explained = torch._dynamo.explain(model)(x)
    emit(kind="graph breaks", count=explained.graph_break_count, graphs=explained.graph_count)
    good &= explained.graph_break_count == 0
    torch._dynamo.reset()
    if rehearsal:
        return good
    engine = engines.training("fastres", model, x, labels, torch.bfloat16)
    for _ in range(3):
        engine.run()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        engine.run()
        emit(kind="synchronisations", status="none in a training step")
    except RuntimeError as error:
        emit(kind="synchronisations", status="failed", why=str(error)[:300])
        good = False
    finally:
        torch.cuda.set_sync_debug_mode("default")
    good &= _graphs_agree(emit, model, x, labels)
    return good


def _graphs_agree(emit, model, x, labels) -> bool:
    """The parameters after replays of a captured step are those after as many plain steps, to the bit."""
    results = {}
    for name in ("plain", "captured", "graph_step"):
        twin = copy.deepcopy(model)
        engine = engines.training("fastres", twin, x, labels, torch.bfloat16, how=lambda m: m)
        learner = [c.cell_contents for c in engine.run.__closure__ if isinstance(c.cell_contents, torch.optim.SGD)][0]
        steps = 3 + 4
        if name == "captured":
            captured = engines.captured(engine)  # three warm-up steps
            for _ in range(4):
                captured.run()
        elif name == "graph_step":
            step = fastres.graph_step(lambda images, run=engine.run: run(), learner)
            for _ in range(steps):
                step(x)
        else:
            for _ in range(steps):
                engine.run()
        torch.cuda.synchronize()
        results[name] = [p.detach().clone() for group in learner.param_groups for p in group["params"]]
    good = True
    for name in ("captured", "graph_step"):
        equal = all(torch.equal(a, b) for a, b in zip(results["plain"], results[name], strict=True))
        emit(kind="CUDA graph", how=name, status="bit-equal to plain steps" if equal else "failed: parameters differ")
        good &= equal
    return good


def profile(emit: Callable, rehearsal: bool, batch: int = 256) -> bool:
    """Time by kernel of a training step, and NVIDIA's profiler on the slowest kernel of ours."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiled

    torch.backends.cudnn.benchmark = True
    device, size = ("cpu", 32) if rehearsal else ("cuda", 224)
    batch = 2 if rehearsal else batch
    model, _ = contestants.baseline("resnet18" if rehearsal else "resnet50")
    x = torch.randn(batch, 3, size, size, device=device).to(memory_format=torch.channels_last)
    labels = torch.randint(0, 1000, (batch,), device=device)
    engine = engines.training("fastres", model.to(device), x, labels, torch.bfloat16, how=contestants.fused(True))
    wait = (lambda: None) if rehearsal else torch.cuda.synchronize
    for _ in range(1 if rehearsal else 4):
        engine.run()
    wait()
    activity, spent = (
        (ProfilerActivity.CPU, "self_cpu_time_total")
        if rehearsal
        else (ProfilerActivity.CUDA, "self_device_time_total")
    )
    with profiled(activities=[activity]) as recorded:
        for _ in range(2):
            engine.run()
        wait()
    times = [(getattr(e, spent) / 2e3, e.count // 2, e.key) for e in recorded.key_averages() if getattr(e, spent)]
    times.sort(reverse=True)
    emit(kind="profile", batch=batch, kernels_ms=sum(t for t, *_ in times), launches=sum(n for _, n, _ in times))
    for ms, launches, name in times[:60]:
        emit(kind="kernel time", kernel=name[:160], ms=ms, launches=launches)
    _ncu(emit, times)
    return bool(times)


def kernel_name(key: str) -> str:
    """The bare name of a kernel of ours in a profiler's table, "" for anybody else's."""
    ours = key.startswith("_") or "fastres" in key or "cuda::" in key
    return key.split("<")[0].split("(")[0].split("::")[-1].split()[-1] if ours else ""


def _ncu(emit: Callable, times: list[tuple[float, int, str]]) -> None:
    """NVIDIA's profiler on the slowest kernel of ours, in its second step."""
    mine = [(kernel_name(key), launches) for _, launches, key in times if kernel_name(key)]
    if not mine or not shutil.which("ncu"):
        emit(kind="ncu", status="skipped", why="ncu is not on PATH" if mine else "no kernel of ours ran")
        return
    name, launches = mine[0]
    for skip in (launches, 0):  # a kernel that batch 64 launches less often: its first launch
        command = ["ncu", "--kernel-name", f"regex:{name}", "--launch-count", "1", "--launch-skip", str(skip),
                   "--set", "detailed", "--clock-control", "none"]  # fmt: skip
        command += [sys.executable, str(HERE / "gpu_stages.py"), "one-step"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=200)
        lines = [line.strip() for line in done.stdout.splitlines() if line.startswith("    ") and line.strip()]
        if lines:
            break
    emit(kind="ncu", kernel=name, exit_code=done.returncode, report=lines[:120],
         why="" if lines else (done.stderr or done.stdout)[-500:])  # fmt: skip


def one_step(emit: Callable, rehearsal: bool) -> bool:
    """Two training steps and nothing else: what the profiler runs."""
    model, _ = contestants.baseline("resnet18" if rehearsal else "resnet50")
    batch, size = (2, 32) if rehearsal else (64, 224)
    device = torch.device("cpu" if rehearsal else "cuda")
    x = torch.randn(batch, 3, size, size, device=device).to(memory_format=torch.channels_last)
    labels = torch.randint(0, 1000, (batch,), device=device)
    engine = engines.training("fastres", model.to(device), x, labels, torch.bfloat16, how=contestants.fused(True))
    for _ in range(2):
        engine.run()
    return True
