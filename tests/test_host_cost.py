"""What a fused training step asks of the host, counted: operators, library convolutions, allocations.

The GPU waits for the host at small batches. Times depend on the machine, counts do not; each that falls here is one
that a step launched from Python no longer pays for.
"""

from __future__ import annotations

import collections

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastres
from fastres.nn import BasicBlock, Bottleneck
from fastres.ops import engine

ALLOCATIONS = ("aten.empty.memory_format", "aten.empty_like.default", "aten.new_empty.default")


class Counter(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.found = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.found[str(func)] += 1
        return func(*args, **(kwargs or {}))


def _projection(K: int):
    return nn.Sequential(nn.Conv2d(64, K, 1, bias=False), nn.BatchNorm2d(K))


BLOCKS = {
    "bottleneck": (lambda: Bottleneck(256, 64), 256),
    "projected bottleneck": (lambda: Bottleneck(64, 64, 1, _projection(256)), 64),
    "basic": (lambda: BasicBlock(64, 64), 64),
}


def counted(name: str, monkeypatch) -> collections.Counter:
    """Operators of one step, kernels of ours left out: they are launches, and not operators of PyTorch's."""
    build, C = BLOCKS[name]
    block = build().train().to(memory_format=torch.channels_last)
    x = torch.randn(2, C, 4, 4).to(memory_format=torch.channels_last).requires_grad_()
    # As where nobody watches; the counter itself is a mode that would be given operators instead.
    monkeypatch.setattr(engine, "fwd_op", engine._fwd)
    monkeypatch.setattr(engine, "bwd_op", engine._bwd)
    with fastres.backend("cpu"):
        out = block(x)
        grad = torch.ones_like(out)
        with Counter() as forward:
            out = block(x)
        with Counter() as backward:
            out.backward(grad)
    return forward.found + backward.found


@pytest.fixture
def no_kernels(monkeypatch):
    """PyTorch's convolutions, as on a GPU where it serves."""
    pytest.importorskip("fastres._cpu", reason="the CPU kernels are not built")
    from fastres.backends import cpu_conv

    monkeypatch.setattr(cpu_conv, "wins", lambda *args: False)


@pytest.mark.parametrize(
    "name, convolutions, backward, allocations",
    [("bottleneck", 3, 5, 25), ("projected bottleneck", 4, 6, 31), ("basic", 2, 3, 17)],
)
def test_a_step_of_a_block(name, convolutions, backward, allocations, no_kernels, monkeypatch):
    """The first convolution of a block, and its projection, need one call for both gradients. Nothing is allocated for
    gradients that nobody asked for."""
    found = counted(name, monkeypatch)
    assert found["aten.convolution.default"] == convolutions
    assert found["aten.convolution_backward.default"] == backward
    assert sum(found[a] for a in ALLOCATIONS) == allocations, dict(found)
