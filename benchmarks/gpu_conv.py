"""Stages of ``gpu_check.py`` about convolutions, compilers and graphs; started through ``gpu_stages.py``.

Each takes ``emit`` (a row of results) and says whether all was well. In a rehearsal they run on the CPU with tiny
sizes, Triton through its interpreter.
"""

from __future__ import annotations

import copy
import itertools
import math
import multiprocessing
import os
import shutil
import subprocess
import sys
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


def hook_sets(kind: str) -> list[tuple[str, ...]]:
    """Combinations that an op asks for, sorted as `ConvRequest` wants them."""
    found = {
        "fprop": ((), ("stats",), ("bias", "relu"), ("bias", "relu", "residual"), ("prologue", "stats")),
        "dgrad": ((), ("act", "reduce"), ("act", "reduce", "y"), ("add",), ("add", "mask"), ("pre",)),
        "wgrad": ((), ("prologue",), ("pre", "prologue")),
    }[kind]
    assert all(set(hooks) <= set(HOOKS[kind]) and tuple(sorted(hooks)) == hooks for hooks in found)
    return list(found)


def _verify(requests: list[ConvRequest]) -> list[tuple[str, str, str]]:
    """(request, choice, what is wrong) of every candidate; a process that loses its CUDA context stops there."""
    found = []
    for request in requests:
        choices = tuning.candidates(request)[1:]
        if request.dtype != "bfloat16":  # the same code for another element: one configuration of each kernel
            choices = list({choice.config.kernel: choice for choice in reversed(choices)}.values())
        for choice in choices:
            try:
                # CPU tensors: nothing is remembered of what an interpreter found.
                judge = tuning.verify if request.device >= 0 else lambda *pair: tuning.examined(*pair)[0]
                found.append((str(request), str(choice), judge(request, choice)))
            except torch.AcceleratorError as error:
                return [*found, (str(request), str(choice), f"CUDA error: {error}")]
    return found


def _in_processes(requests: list[ConvRequest]) -> list[tuple[str, str, str]]:
    """`_verify` spread over processes: nearly all of it is compiling. Compiled kernels stay on disk for the stages to
    come."""
    jobs = max(1, min(14, (os.cpu_count() or 2) - 1, len(requests)))
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        shares = pool.map(_verify, [[request] for request in requests], chunksize=1)
    return list(itertools.chain.from_iterable(shares))


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
            verdicts = _verify(requests[:2])
    else:
        verdicts = _in_processes(requests)
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
    _in_processes(requests)  # compiles; verdicts are on disk
    tuning.forget()
    rows = tuning_run.tune_requests(requests, lambda text, share: None, again=False)
    for row in rows:
        emit(kind="tuned", request=str(row.request), chosen=str(row.choice), us=row.us, library_us=row.library_us,
             ratio=row.ratio, timings=row.timings, rejected=row.rejected)  # fmt: skip
    finite = [row for row in rows if not math.isnan(row.us)]
    emit(kind="tuned in all", requests=len(rows), library_us=sum(r.library_us for r in finite),
         us=sum(r.us for r in finite))  # fmt: skip
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
    for name in ("plain", "captured"):
        twin = copy.deepcopy(model)
        engine = engines.training("fastres", twin, x, labels, torch.bfloat16, how=lambda m: m)
        learner = [c.cell_contents for c in engine.run.__closure__ if isinstance(c.cell_contents, torch.optim.SGD)][0]
        steps = 3 + 4
        if name == "captured":
            captured = engines.captured(engine)  # three warm-up steps
            for _ in range(4):
                captured.run()
        else:
            for _ in range(steps):
                engine.run()
        torch.cuda.synchronize()
        results[name] = [p.detach().clone() for group in learner.param_groups for p in group["params"]]
    equal = all(torch.equal(a, b) for a, b in zip(*results.values(), strict=True))
    emit(kind="CUDA graph", status="bit-equal to plain steps" if equal else "failed: parameters differ")
    return equal


def profile(emit: Callable, rehearsal: bool, batch: int = 256) -> bool:
    """Time by kernel of a training step, and NVIDIA's profiler on the slowest kernel of ours."""
    if rehearsal:
        emit(kind="profile", status="needs a GPU")
        return True
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiled

    torch.backends.cudnn.benchmark = True
    model, _ = contestants.baseline("resnet50")
    x = torch.randn(batch, 3, 224, 224, device="cuda").to(memory_format=torch.channels_last)
    labels = torch.randint(0, 1000, (batch,), device="cuda")
    engine = engines.training("fastres", model.cuda(), x, labels, torch.bfloat16, how=contestants.fused(True))
    for _ in range(4):
        engine.run()
    torch.cuda.synchronize()
    with profiled(activities=[ProfilerActivity.CUDA]) as recorded:
        for _ in range(2):
            engine.run()
        torch.cuda.synchronize()
    events = [e for e in recorded.key_averages() if e.self_device_time_total]
    events.sort(key=lambda e: -e.self_device_time_total)
    emit(kind="profile", batch=batch, kernels_ms=sum(e.self_device_time_total for e in events) / 2e3,
         launches=sum(e.count for e in events) // 2)  # fmt: skip
    for e in events[:60]:
        emit(kind="kernel time", kernel=e.key[:160], ms=e.self_device_time_total / 2e3, launches=e.count // 2)
    mine = [e.key for e in events if e.key.startswith("_") or "cuda::" in e.key]
    if mine and shutil.which("ncu"):
        name = mine[0].split("<")[0].split("(")[0].split("::")[-1].split()[-1]
        command = ["ncu", "--kernel-name", f"regex:{name}", "--launch-count", "1", "--launch-skip", "40",
                   "--set", "detailed", "--clock-control", "none"]  # fmt: skip
        command += [sys.executable, str(HERE / "gpu_stages.py"), "one-step"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=200)
        lines = [line.strip() for line in done.stdout.splitlines() if line.startswith("    ") and line.strip()]
        emit(kind="ncu", kernel=name, exit_code=done.returncode, report=lines[:120])
    else:
        emit(kind="ncu", status="skipped", why="ncu is not on PATH" if mine else "no kernel of ours ran")
    return True


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
