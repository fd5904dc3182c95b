"""What every bench_<op>.py shares: ResNet-50 layers, the engines, and the check before a number counts.

``FASTRES_BENCH_BATCH`` (default 2 on a CPU, 32 on a GPU) sets the batch; the device is a GPU where there is one.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable

import pytest
import timing
import torch
from torch import nn

from fastres import doctor
from fastres.bench import rows

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BATCH = int(os.environ.get("FASTRES_BENCH_BATCH", 32 if DEVICE.type == "cuda" else 2))
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ENGINES = ("eager", "fastres")
ROUNDS = 5


def engines_and_dtypes(test):
    """Each engine in each dtype, the engines of one dtype beside each other."""
    test = pytest.mark.parametrize("engine", ENGINES)(test)
    return pytest.mark.parametrize("dtype", DTYPES)(test)


def measure(benchmark, engine: str, dtype: str, module: nn.Module, shapes, plain: Callable, train: bool) -> None:
    """Time one call (with ``train``: forward and backward) of ``module``; ``plain`` is eager over the same children.

    The result is checked against float64 first; the row carries its provenance in ``extra_info``.
    """
    kind = DTYPES[dtype]
    low = kind != torch.float32
    module = copy.deepcopy(module).to(DEVICE, memory_format=torch.channels_last).train(train)
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(shape, generator=generator) for shape in shapes]
    inputs = [x.to(DEVICE, kind, memory_format=torch.channels_last) for x in inputs]
    forward = (lambda *x: plain(module, *x)) if engine == "eager" else module

    def call():
        with torch.autocast(DEVICE.type, kind if low else torch.bfloat16, enabled=low):
            return forward(*inputs)

    def run():
        if train:
            for x in inputs:
                x.grad = None
            out = call()
            out.backward(seed)
        else:
            with torch.inference_mode():
                call()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    error = _check(module, inputs, plain, call, kind, low)
    if train:
        inputs = [x.requires_grad_() for x in inputs]
        seed = torch.ones_like(call())
    where = "training" if train else "evaluation"
    benchmark.group = f"{type(module).__name__} {where} {dtype} {' + '.join(map(str, shapes))}"
    benchmark.extra_info.update(
        engine=engine, dtype=dtype, layout="channels_last", shapes=[list(s) for s in shapes], device=DEVICE.type,
        error_vs_float64=error, threads=torch.get_num_threads(), torch=torch.__version__, cpu=doctor.cpu()["name"],
        gpus=doctor.gpus(),
    )  # fmt: skip
    benchmark.pedantic(run, rounds=ROUNDS, warmup_rounds=2)


def _check(module, inputs, plain, call, kind, low) -> float:
    with torch.no_grad():
        wide = copy.deepcopy(module).double()
        truth = plain(wide, *(x.double() for x in inputs))
        with torch.autocast(DEVICE.type, kind if low else torch.bfloat16, enabled=low):
            eager = plain(copy.deepcopy(module), *inputs)
        ours = call()
    error, theirs = rows.relative_l2(ours, truth), rows.relative_l2(eager, truth)
    assert rows.within_budget(error, theirs, kind), f"error {error:.3g} against eager's {theirs:.3g}: no time for that"
    return error


def stage_sides() -> dict[int, int]:
    """Channels of a ResNet-50's block outputs -> side of the activations at 224 px."""
    return {256: 56, 512: 28, 1024: 14, 2048: 7}


__all__ = ["BATCH", "engines_and_dtypes", "measure", "stage_sides", "timing"]
