"""The block engine on our own convolutions, under Triton's interpreter: every rider of a training step, end to end,
operands formed by passes or by the kernels that load them.

Run by test_triton_conv.py with TRITON_INTERPRET=1. float16 with 64-channel blocks takes the tensor-descriptor kernels;
nothing is measured or verified first, the likeliest configuration serves.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

import fastres
from fastres import tuning, tuning_operands
from fastres.nn import BasicBlock, Bottleneck

#: Requests that a step of the two blocks below must have made, served by kernels of ours.
RIDERS = {
    "fprop + stats",
    "dgrad + act, reduce, y",
    "dgrad + add, mask",
    "dgrad + add",
    "dgrad",
    "wgrad",
}
#: With every operand formed while loading: behind the last BN's mask, behind a ReLU, in front of the shortcut.
LOADED = {
    "fprop + prologue, stats",
    "dgrad + act, bits, pre, reduce",
    "dgrad + act, pre, reduce",
    "dgrad + add, mask, pre",
    "dgrad + add, pre",
    "wgrad + bits, pre, prologue",
    "wgrad + pre, prologue",
    "wgrad + pre",
    "wgrad + prologue",
}


def _blocks():
    torch.manual_seed(0)

    def projection(K: int, stride: int):
        return nn.Sequential(nn.Conv2d(64, K, 1, stride, bias=False), nn.BatchNorm2d(K))

    for block, shape in (
        (Bottleneck(256, 64), (2, 256, 7, 6)),
        (Bottleneck(64, 64, 1, projection(256, 1)), (2, 64, 6, 7)),
        (BasicBlock(64, 64), (2, 64, 5, 6)),
        (BasicBlock(64, 64, 2, projection(64, 2)), (2, 64, 6, 7)),
    ):
        for parameter in block.parameters():
            if parameter.dim() == 1:  # BN: its ReLU makes something of a zero, but padding is zero behind it
                nn.init.uniform_(parameter, 0.5, 1.5)
        yield block.train().to(memory_format=torch.channels_last), torch.randn(shape)


def _step(block, x, backend: str, dtype: torch.dtype, memory: str) -> dict[str, torch.Tensor]:
    learner = copy.deepcopy(block).to(dtype)
    if dtype == torch.float16:
        for module in learner.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.float()
    learner._fastres_memory = memory
    x = x.to(dtype, memory_format=torch.channels_last).requires_grad_()
    with fastres.backend(backend):
        out = learner(x)
        out.backward((torch.arange(out.numel()) % 7 / 7).view(out.shape).to(out.dtype))
    found = {"out": out.detach(), "grad of x": x.grad}
    found |= {f"grad of {name}": p.grad for name, p in learner.named_parameters()}
    return found | {name: b for name, b in learner.named_buffers() if b.is_floating_point()}


def _distance(value: torch.Tensor, truth: torch.Tensor) -> float:
    return ((value.double() - truth).norm() / truth.norm()).item()


#: What blocks offered, by their memory.
_offered: dict[str, set] = {}


@pytest.mark.parametrize("memory", ["default", "low"])
@pytest.mark.parametrize("loaded", [False, True], ids=["passes", "loaded"])
def test_engine_equals_the_reference(loaded, memory, monkeypatch):
    asked = {}
    choose = tuning.choose

    def spy(request):
        choice = choose(request)
        asked[str(request).partition(" of ")[0]] = choice.backend
        return choice

    monkeypatch.setattr(tuning, "choose", spy)
    if loaded:

        def everything(request) -> tuple[tuple[str, ...], bool]:
            _offered.setdefault(memory, set()).add(request)
            return request.operands, True

        monkeypatch.setattr(tuning, "operands", everything)
    tuning.forget()
    for block, x in _blocks():
        truth = _step(block, x, "reference", torch.float64, memory)
        plain = _step(block, x, "reference", torch.float16, memory)
        ours = _step(block, x, "triton", torch.float16, memory)
        for name, value in ours.items():
            near, far = _distance(value, truth[name]), _distance(plain[name], truth[name])
            assert near <= 1.5 * far + 1e-4, f"{name}: {near:.3g} from float64, the reference {far:.3g}"
    served = {what for what, backend in asked.items() if backend == "triton"}
    if loaded:
        assert served >= LOADED and not [what for what in served if what.endswith(", y")]
        return
    # The recomputed activation is at hand already where the last convolution was computed again.
    assert served >= RIDERS | ({"dgrad + act, reduce"} if memory == "low" else set())
    assert not [what for what in served if "pre" in what or "prologue" in what]


def test_a_measurement_runs_the_convolutions_of_its_plan(monkeypatch):
    """Of every kind of offer that the blocks above made: what is timed is what will serve."""
    asked = []
    choose = tuning.choose

    def spy(request):
        asked.append(request)
        return choose(request)

    monkeypatch.setattr(tuning, "choose", spy)
    kinds = {(r.kind, r.operands, r.hooks): r for offers in _offered.values() for r in offers}
    # With memory="low" the input of the last convolution may be there already.
    rows = [*kinds.values(), *(replace(r, operands=("pre",)) for r in kinds.values() if r.operands[1:] == ("pre",))]
    assert len(rows) > 5
    with fastres.backend("triton"):
        for request in rows:
            step = tuning_operands.Step(request)
            for taken in request.plans:
                asked.clear()
                tuning.forget()
                step.run(taken)
                expected = set(request.convolutions(taken))
                assert expected <= set(asked), f"{request}, {taken}: {expected - set(asked)} did not run"
                assert not [r for r in set(asked) - expected if {"pre", "prologue"} & set(r.hooks)]
