"""The stages of ``gpu_check.py``, one process each: ``python benchmarks/gpu_stages.py STAGE``.

``FASTRES_GPU_CHECK_ROWS`` names the JSON lines file that rows are appended to. With
``FASTRES_GPU_CHECK_REHEARSAL=1`` the same code runs on the CPU with tiny sizes: the emulator stands in for the CUDA
kernels where it is built, Triton's interpreter for Triton, the reference backend otherwise.
"""

from __future__ import annotations

import copy
import functools
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))  # kernel_cases and launch_tests are shared with the tests

REHEARSAL = os.environ.get("FASTRES_GPU_CHECK_REHEARSAL") == "1"
STAGE = sys.argv[1] if len(sys.argv) > 1 else ""
if REHEARSAL and "triton" in STAGE:
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it while it is imported

import gpu_blocks  # noqa: E402
import gpu_conv  # noqa: E402
import gpu_conv_layers  # noqa: E402
import gpu_cudnn  # noqa: E402
import gpu_one_pass  # noqa: E402
import gpu_rotated  # noqa: E402
import gpu_shift  # noqa: E402
import kernel_cases  # noqa: E402
import launch_tests  # noqa: E402
import timing  # noqa: E402
import torch  # noqa: E402

import fastres  # noqa: E402
from fastres import bench, dispatch, testing  # noqa: E402
from fastres.backends.native import FUNCTIONS  # noqa: E402

DEVICE = torch.device("cpu" if REHEARSAL else "cuda")
BACKENDS = ("cuda", "triton")
LOW = torch.bfloat16


def emit(**row) -> None:
    """Append a row to the results as soon as it is known, and print it."""
    row = {"stage": os.environ.get("FASTRES_GPU_CHECK_STAGE", STAGE), **row}
    path = os.environ.get("FASTRES_GPU_CHECK_ROWS")
    if path:
        with open(path, "a") as file:
            file.write(json.dumps(row) + "\n")
    print("  ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()), flush=True)


def stand_in(backend: str) -> str:
    """The backend itself on a GPU; in a rehearsal what runs the same kernels on the CPU, else the reference."""
    if not REHEARSAL:
        return backend
    name = {"cuda": "emulator"}.get(backend, backend)
    return "reference" if kernel_cases.absent(name) else name


# ---- kernels: the launch-level cases of the tests, with their storages moved to the GPU


class DeviceLaunch:
    """Launch functions that take CPU tensors, run on the GPU and bring every storage back.

    Whole storages travel: views, aliases, misalignment and guard zones stay what they were.
    """

    def __init__(self, launch, device: torch.device):
        self._launch, self._device = launch, device

    def __getattr__(self, name: str):
        target = getattr(self._launch, name)
        if name not in FUNCTIONS:
            return target

        def call(**arguments):
            storages: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

            def move(value):
                if not isinstance(value, torch.Tensor):
                    return value
                storage = value.untyped_storage()
                here = torch.empty(0, dtype=torch.uint8).set_(storage)
                there = storages.setdefault(storage.data_ptr(), (here, here.to(self._device)))[1]
                moved = torch.empty(0, dtype=value.dtype, device=self._device)
                return moved.set_(there.untyped_storage(), value.storage_offset(), value.shape, value.stride())

            target(**{key: move(value) for key, value in arguments.items()})
            for here, there in storages.values():
                here.copy_(there)

        return call


@dataclass(frozen=True)
class OnDevice(kernel_cases.Kernels):
    """A backend on this process's device, for the checks of ``launch_tests``."""

    @property
    def launch(self):
        kernels = dispatch.load(self.backend)
        return kernels if REHEARSAL else DeviceLaunch(kernels, DEVICE)

    def refuses(self, dtype: torch.dtype) -> list[str]:
        request = dispatch.Request("batch_norm_act", DEVICE, dtype, 64)
        return dispatch.load(self.backend).why_not(request)

    @property
    def slow(self) -> bool:
        return REHEARSAL


def kernels(backend: str) -> bool:
    served = OnDevice(stand_in(backend))
    functions = ("add_relu_fwd", "bn_apply") if REHEARSAL else FUNCTIONS
    checks = {"values": launch_tests.check_values, "exact": launch_tests.check_exact}
    if not REHEARSAL:
        checks["repeats"] = launch_tests.check_repeats
    good = True
    for dtype in kernel_cases.DTYPES:
        refused = served.refuses(dtype)
        if refused:
            emit(kind="kernel", backend=str(served), dtype=str(dtype), status="refused", why="; ".join(refused))
            continue
        for function in functions:
            failures = {name: why for name, check in checks.items() if (why := failure(check, served, function, dtype))}
            status = "failed" if failures else "passed"
            emit(kind="kernel", backend=str(served), dtype=str(dtype), function=function, status=status, **failures)
            good &= not failures
    return good


def failure(check: Callable, served, function: str, dtype: torch.dtype) -> str:
    """One line on why a check failed, or an empty string. A CUDA error ends the process: the context is lost."""
    try:
        check(served, function, dtype)
    except torch.AcceleratorError:
        raise
    except (AssertionError, RuntimeError, ValueError, TypeError) as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())}"[:600]
    return ""


def launch_once() -> bool:
    """Every CUDA launch function in all its variants, small: what compute-sanitizer watches."""
    served = OnDevice(stand_in("cuda"))
    functions = ("add_relu_fwd",) if REHEARSAL else FUNCTIONS
    good = True
    for function in functions:
        for dtype in (torch.float32, torch.bfloat16):
            for C, M in ((7, 67), (64, 300)):
                for case in kernel_cases.cases(function, dtype, C, M, "normal", 3):
                    for place in (torch.clone, testing.misaligned):
                        why = failure(lambda s, f, d, c=case, p=place: once(s, c, p), served, function, dtype)
                        good &= not why
                        if why:
                            emit(kind="sanitized", function=function, dtype=str(dtype), status="failed", why=why)
        emit(kind="sanitized", function=function, status="ran")
    kernels = dispatch.load(served.backend)
    good &= gpu_blocks.right(emit, kernels, DEVICE, gpu_blocks.REHEARSED if REHEARSAL else gpu_blocks.SMALL)
    good &= gpu_rotated.right(emit, kernels, DEVICE, gpu_rotated.SMALL[:1] if REHEARSAL else gpu_rotated.SMALL)
    problems = (*gpu_conv.EDGES, gpu_conv_layers.MANY_TILES)
    good &= gpu_conv_layers.right(emit, DEVICE, gpu_conv.EDGES[:1] if REHEARSAL else problems)
    good &= gpu_shift.run(emit, DEVICE, served.backend)
    return good & gpu_one_pass.right(emit, kernels, DEVICE, ((7, 67), (64, 300)))


def once(served: OnDevice, case, place) -> None:
    launch = served.launch
    kernel_cases.judge(case, launch, kernel_cases.run(case, launch, place))


# ---- ops: modules forward and backward


def ops() -> bool:
    good = True
    dtypes = (torch.float32,) if REHEARSAL else (torch.float32, torch.bfloat16, torch.float16)
    for name, module, shapes, plain in timing.modules(1 if REHEARSAL else 8, 4 if REHEARSAL else 56):
        for dtype in dtypes:
            inputs = [torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i, shape in enumerate(shapes)]
            inputs = [x.to(DEVICE, dtype, memory_format=torch.channels_last) for x in inputs]
            module = module.to(DEVICE)
            truth = step(module, inputs, torch.float64, plain)
            eager = step(module, inputs, dtype, plain)
            for backend in dict.fromkeys(stand_in(b) for b in BACKENDS):
                with fastres.backend(backend):
                    ours = step(module, inputs, dtype, lambda m, *x: m(*x))
                # Gradients of parameters and statistics sum up all rows of the output; both may cancel.
                terms = truth["out"].numel() // truth["out"].shape[1]
                verdicts = {
                    what: testing.within_budget(
                        value,
                        eager[what],
                        truth[what],
                        terms=1 if value.dim() == 4 else terms,
                        norms=("rms",),
                        what=what,
                    )
                    for what, value in ours.items()
                }
                name_of_worst = max(verdicts, key=lambda what: verdicts[what].error / verdicts[what].limit)
                worst = verdicts[name_of_worst]
                failed = "; ".join(verdict.message for verdict in verdicts.values() if not verdict)
                emit(kind="op", op=name, backend=backend, dtype=str(dtype), status="failed" if failed else "passed",
                     nearest_to_its_limit=name_of_worst, error=worst.error, limit=worst.limit, why=failed)  # fmt: skip
                good &= not failed
    return good


def step(module, inputs, dtype, forward) -> dict[str, torch.Tensor]:
    """Output, gradients and buffers after one training step of a copy of ``module``."""
    wide = dtype == torch.float64
    learner = copy.deepcopy(module).train().to(torch.float64 if wide else torch.float32)
    learner = learner.to(memory_format=torch.channels_last)
    xs = [x.detach().to(dtype).requires_grad_() for x in inputs]
    low = dtype in (torch.bfloat16, torch.float16)
    with torch.autocast(DEVICE.type, dtype if low else torch.bfloat16, enabled=low):
        out = forward(learner, *xs)
    seed = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(DEVICE, inputs[0].dtype)
    out.backward(seed.to(out.dtype))
    found = {"out": out.detach(), **{f"grad of input {i}": x.grad for i, x in enumerate(xs)}}
    found |= {f"grad of {name}": p.grad for name, p in learner.named_parameters()}
    found |= {name: b for name, b in learner.named_buffers() if b.is_floating_point()}
    return found


# ---- speed


def bandwidth() -> bool:
    copied = timing.copy_bandwidth(DEVICE, 2**16 if REHEARSAL else 2**30)
    emit(kind="bandwidth", function="copy", gb_per_s=copied)
    shapes = ((64, 98),) if REHEARSAL else timing.resnet50_matrices(64)
    for dtype in (torch.float32,) if REHEARSAL else (torch.bfloat16, torch.float32):
        for function, case, nbytes, shape in launches(dtype, shapes):
            for backend in dict.fromkeys(stand_in(b) for b in BACKENDS):
                label, arguments, outputs = case(dispatch.load(backend))
                call = functools.partial(getattr(dispatch.load(backend), function), **arguments, **outputs)
                times = timing.device_times(call, DEVICE, 3 if REHEARSAL else 30)
                seconds = sorted(times)[len(times) // 2]
                rate = nbytes(arguments, outputs) / seconds / 1e9
                emit(kind="bandwidth", function=function, variant=label, backend=backend, dtype=str(dtype), shape=shape,
                     median_us=seconds * 1e6, gb_per_s=rate, share_of_copy=rate / copied)  # fmt: skip
    return True


def launches(dtype: torch.dtype, shapes) -> Iterator[tuple]:
    """(function, builder of (label, arguments, outputs) for a backend, bytes moved, [M, C])."""
    from fastres import verify

    skipped = ("bn_finalize", "bn_bwd_finalize", "bn_fold")  # per channel only: no bandwidth to speak of
    for C, M in shapes:
        for function in FUNCTIONS:
            if function in skipped or (function.startswith("stem") and C != 64):
                continue

            def build(launch, which, function=function, C=C, M=M):
                if function.startswith("stem"):
                    return timing.stem_case(function, dtype, DEVICE, 2 if REHEARSAL else 64, launch)
                return verify._cases(function, DEVICE, dtype, C, M, launch.tiles(M, C))[which]

            variants = {"bn_apply": 3, "bn_bwd_reduce": 2, "bn_bwd_apply": 3}.get(function, 1)
            for which in range(variants):
                yield function, lambda launch, b=build, w=which: b(launch, w), timing.bytes_of, [M, C]


def op_times() -> bool:
    batch, size, runs = (1, 4, 2) if REHEARSAL else (64, 56, 20)
    for name, module, shapes, plain in timing.modules(batch, size):
        module = module.to(DEVICE, memory_format=torch.channels_last).train()
        engines = {"eager": lambda *x, m=module, p=plain: p(m, *x)}
        if not REHEARSAL:
            engines["torch.compile"] = torch.compile(engines["eager"])
        for backend in dict.fromkeys(stand_in(b) for b in BACKENDS):
            engines[backend] = timing.forced(backend, module)
        inputs = [torch.randn(shape, device=DEVICE).to(LOW, memory_format=torch.channels_last) for shape in shapes]
        inputs = [x.requires_grad_() for x in inputs]
        medians = {}
        for engine, call in engines.items():
            times = timing.device_times(timing.training_call(call, inputs, DEVICE, LOW), DEVICE, runs)
            medians[engine] = sorted(times)[len(times) // 2] * 1e3
        shape = [list(s) for s in shapes]
        for engine, median in medians.items():
            emit(kind="op time", op=name, engine=engine, dtype="bf16", shape=shape, median_ms=median,
                 ratio_to_eager=medians["eager"] / median)  # fmt: skip
    return True


def model(*cases: dict) -> bool:
    for options in cases:
        case = bench.Case("resnet50", dtype="bf16", device="cuda", seconds=15, **options)
        if REHEARSAL:
            case = bench.Case(**{**vars(case), "model": "resnet18", "device": "cpu", "dtype": "fp32", "batch": 2,
                                 "size": 32, "seconds": 0.1, "compile": False, "graph": False})  # fmt: skip
        result = bench.run(case)
        for row in result.rows:
            emit(**row)
        for engine, why in result.absent.items():
            emit(kind="model", backend=engine, status="absent", why=why)
    return True


STAGES: dict[str, Callable[[], bool]] = {
    "kernels-cuda": lambda: kernels("cuda"),
    "kernels-triton": lambda: kernels("triton"),
    "ops": ops,
    "launch-once": launch_once,
    "bandwidth": bandwidth,
    "op-times": op_times,
    "shift": lambda: gpu_shift.run(emit, DEVICE, stand_in("cuda")),
    "blocks": lambda: all([unit.run(emit, DEVICE, stand_in("cuda"), REHEARSAL) for unit in (gpu_blocks, gpu_rotated)]),
    "one-pass": lambda: gpu_one_pass.run(emit, DEVICE, stand_in("cuda"), REHEARSAL),
    "conv-kernels": lambda: gpu_conv.conv_kernels(emit, REHEARSAL),
    "conv-layers": lambda: gpu_conv_layers.run(emit, REHEARSAL),
    "tune-256": lambda: gpu_conv.tune(emit, REHEARSAL, 256),
    "tune-64": lambda: gpu_conv.tune(emit, REHEARSAL, 64),
    "cudnn": lambda: gpu_cudnn.run(emit),
    "framework": lambda: gpu_conv.framework(emit, REHEARSAL),
    "profile": lambda: gpu_conv.profile(emit, REHEARSAL),
    "one-step": lambda: gpu_conv.one_step(emit, REHEARSAL),
    "train-64": lambda: model({"train": True, "batch": 64, "graph": True}),
    "train-256": lambda: model({"train": True, "batch": 256, "graph": True}),
    "train-256-low": lambda: model({"train": True, "batch": 256, "memory": "low", "compile": False}),
    **{
        f"train-{batch}-{mode}": lambda batch=batch, mode=mode: model(
            {"train": True, "batch": batch, "compile_mode": mode}
        )
        for batch in (64, 256)
        for mode in ("reduce-overhead", "max-autotune")
    },
    "infer": lambda: model(
        {"batch": 1, "compile_mode": "reduce-overhead", "graph": True}, {"batch": 64, "graph": True}
    ),
    "infer-max-autotune": lambda: model({"batch": 64, "compile_mode": "max-autotune"}),
}


def main() -> int:
    if len(sys.argv) != 2 or STAGE not in STAGES:
        print(f"usage: gpu_stages.py STAGE, one of {', '.join(STAGES)}; got {sys.argv[1:]}", file=sys.stderr)
        return 2
    if not REHEARSAL and not torch.cuda.is_available():
        print("gpu_stages.py needs a CUDA device; gpu_check.py rehearses without one", file=sys.stderr)
        return 2
    return 0 if STAGES[STAGE]() else 1


if __name__ == "__main__":
    sys.exit(main())
