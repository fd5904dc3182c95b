"""Compiles what a tuning is about to try, in processes of their own: ``python -m fastres.tuning_compile``.

Most of a tuning is waiting for Triton's compiler, one kernel after the other. Here the launchers themselves run on
tensors without memory, Triton told to compile and not to launch, so that what lands in its cache on disk is what the
tuning will ask for. No process touches the GPU. A compilation that fails here fails again, and is judged, there.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import warnings
from collections.abc import Sequence

import torch

from fastres import tuning, tuning_check
from fastres.backends import triton_conv
from fastres.problem import ConvRequest, arguments

#: Processes at most; beyond, their start costs more than they save.
MOST_JOBS = 16


def ahead(requests: Sequence[ConvRequest], jobs: int | None = None) -> int:
    """Compile every Triton candidate of ``requests``; returns how many processes did, 0 where that was not worth it.

    jobs: None: one for each processor but one. Warns if a process did not come to its end.
    """
    work = [(r, choice.config) for r in requests for choice in tuning.candidates(r) if choice.backend == "triton"]
    jobs = min((os.cpu_count() or 1) - 1, MOST_JOBS) if jobs is None else jobs
    jobs = min(jobs, len(work) // 2)
    if jobs < 2 or not torch.cuda.is_available():
        return 0
    capability = torch.cuda.get_device_capability(requests[0].device)
    precision = triton_conv.precision(torch.float32)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", __name__]
    processes = []
    try:
        for i in range(jobs):
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
            processes.append(process)
            with process.stdin as pipe:
                pickle.dump((capability, precision, work[i::jobs]), pipe)
        for process in processes:
            complaint = process.stderr.read().decode(errors="replace").strip()
            if process.wait():
                last = complaint.splitlines()[-1] if complaint else f"exit code {process.returncode}"
                warnings.warn(f"fastres: kernels are compiled one by one: {last}", RuntimeWarning, stacklevel=3)
    except OSError as error:  # a process that died before it read its work, or no memory for another one
        warnings.warn(f"fastres: kernels are compiled one by one: {error}", RuntimeWarning, stacklevel=3)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()
            process.stderr.close()
    return jobs


class _Compiling:
    """What Triton asks of a driver before it compiles for a GPU."""

    def __init__(self, capability: tuple[int, int]):
        from triton.backends.compiler import GPUTarget

        self._target = GPUTarget("cuda", 10 * capability[0] + capability[1], 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self):
        return self._target


def compile_only(capability: tuple[int, int]) -> None:
    """From now on Triton launches of this process are compilations for ``capability``."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    driver.set_active(_Compiling(capability))
    run = JITFunction.run
    JITFunction.run = lambda self, *args, grid, warmup, **options: run(self, *args, grid=grid, warmup=True, **options)


def _without_memory(type: str, shape: tuple[int, ...]) -> torch.Tensor:
    format = torch.channels_last if len(shape) == 4 else torch.contiguous_format
    return torch.empty(shape, dtype=getattr(torch, type), device="meta", memory_format=format)


def variants(request: ConvRequest, config):
    """(problem, dtype of dw, whether part is asked for) of every launch that verifying and timing ``config`` makes."""
    sizes = (tuning_check.small(request.problem, config), tuning_check.many(request.problem, config), request.problem)
    for problem in dict.fromkeys(sizes):
        yield problem, request.dtype, True
        if request.kind == "wgrad":
            yield problem, "float32", True
    if "stats" in request.hooks:
        yield sizes[0], request.dtype, False


def compile_one(request: ConvRequest, config, precision: str) -> None:
    """Run the launcher of ``config`` on tensors without memory, under `compile_only`."""
    module = triton_conv.kernels(config)
    launch = getattr(module, f"conv_{request.kind}")
    for problem, dw, part in variants(request, config):
        parts = module.parts(request.kind, problem, config) if {"stats", "reduce"} & set(request.hooks) else 0
        given, named = arguments(request.kind, problem, request.hooks, parts, request.dtype, _without_memory)
        if request.kind == "wgrad" and dw != request.dtype:
            given[-1] = _without_memory(dw, given[-1].shape)
        if not part:
            named["part"] = None
        launch(*given, config=config, precision=precision if request.dtype == "float32" else "ieee", **named)


def main() -> None:
    capability, precision, work = pickle.load(sys.stdin.buffer)
    compile_only(capability)
    for request, config in work:
        try:
            compile_one(request, config, precision)
        except Exception as error:
            print(f"{config} for {request}: {type(error).__name__}: {str(error)[:200]}", file=sys.stderr)


if __name__ == "__main__":
    main()
