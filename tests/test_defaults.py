"""The process's default device and dtype are for tensors that its user makes: ours say where and what they are."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn

import fastres
from fastres.backends import cpu, cpu_conv
from fastres.inference.cpu_program import Outputs

CL = torch.channels_last


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


DEFAULTS = {
    "device": lambda: torch.device("meta"),
    "wider": lambda: default_dtype(torch.float64),
    "narrower": lambda: default_dtype(torch.bfloat16),
}


def net() -> nn.Module:
    torchvision = pytest.importorskip("torchvision")
    return torchvision.models.ResNet(torchvision.models.resnet.Bottleneck, [1, 1, 1, 1], num_classes=10)


@pytest.fixture(params=DEFAULTS)
def defaults(request):
    return DEFAULTS[request.param]


@pytest.fixture(autouse=True)
def served_wherever_it_can_be(monkeypatch):
    monkeypatch.setattr(cpu_conv, "wins", lambda kind, x, w, g: not cpu_conv.why_not(x, w, g))


@pytest.mark.skipif(cpu._module is None, reason=f"fastres._cpu is not built: {cpu._missing}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("precision", ["exact", "highest"])
def test_sessions(defaults, dtype, precision):
    model, x = net().eval(), torch.randn(2, 3, 64, 64).to(dtype)
    usual = fastres.optimize(model, (x,), dtype=dtype, precision=precision)
    expected = usual(x)
    larger = x.repeat(1, 1, 2, 2)
    with defaults():
        assert torch.equal(usual(x), expected)
        assert usual(larger).isfinite().all(), "a size that was not prepared before"
        usual.report(measure=False)
        made = fastres.optimize(model, (x,), dtype=dtype, precision=precision)
        found = made(x)
    assert (found.device.type, found.dtype) == ("cpu", dtype)
    if precision == "exact":  # else the clock chooses among kernels
        assert torch.equal(found, expected)
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05 * float(expected.abs().max()))


def test_training_step(defaults):
    torch.manual_seed(0)
    fused, x = fastres.fuse(net()), torch.randn(2, 3, 64, 64).contiguous(memory_format=CL)

    def step() -> list[torch.Tensor]:
        fused.zero_grad(set_to_none=True)
        y = fused(x)
        y.square().sum().backward()
        return [y.detach(), *(p.grad for p in fused.parameters())]

    expected = step()
    with defaults():
        found = step()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_results_are_nobody_elses():
    """Small results are made some at a time, those of inference mode apart."""
    for shape in ((2, 10), (1, 8, 3, 4), (1, 64, 64, 64)):
        outputs = Outputs(shape, torch.float32)
        made = [outputs.take() for _ in range(3 * Outputs.AT_A_TIME)]
        with torch.inference_mode():
            made += [outputs.take() for _ in range(3)]
        assert [t.is_inference() for t in made] == [False] * 3 * Outputs.AT_A_TIME + [True] * 3
        assert len({t.data_ptr() for t in made}) == len(made)
        layout = CL if len(shape) == 4 else torch.contiguous_format
        assert all(t.shape == shape and t.is_contiguous(memory_format=layout) for t in made)
