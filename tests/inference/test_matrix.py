"""Sessions on the matrix unit: a model of its instructions executes them, on whatever machine this is."""

import pytest
import torch
import torchvision
from torchvision.models.resnet import BasicBlock, Bottleneck

import fastres
from fastres.backends import cpu, cpu_matrix
from fastres.inference import cpu_executor, cpu_weights
from fastres.inference.checking import budget
from fastres.inference.cpu_weights import Choice

pytestmark = pytest.mark.skipif(cpu._module is None, reason=f"fastres._cpu is not built: {cpu._missing}")


@pytest.fixture(params=["layers", "whole blocks"])
def unit(request, monkeypatch):
    """The matrix unit's kernels wherever they can serve: its model would win no contest."""
    before = cpu.isa()
    modelled = [isa for isa in cpu.available_isas() if _unit_of(isa) == "model"]
    assert modelled, "the scalar code at least has a model"
    cpu.set_isa(modelled[0])

    def chosen(self, shape, kinds):
        found = {p: Choice(min(of_conv)) for p, of_conv in kinds.items()}
        for of_node, node in zip(self.weights, self.segment.nodes, strict=True):
            for kind in cpu_weights.whole(node, self.dtype, self.precision) if request.param != "layers" else ():
                found |= {p: Choice(kind, whole=True) for p in of_node}
        return found

    monkeypatch.setattr(cpu_weights, "UNITS", {"model"})
    monkeypatch.setattr(cpu_matrix, "wins", lambda *_: True)
    monkeypatch.setattr(cpu_executor.CpuSegment, "_measured", chosen)
    yield request.param
    cpu.set_isa(before)


def _unit_of(isa):
    cpu.set_isa(isa)
    return cpu_matrix.unit()


@pytest.fixture(params=[(Bottleneck, {}), (BasicBlock, {}), (Bottleneck, {"groups": 4, "width_per_group": 16})])
def model(request):
    block, options = request.param
    torch.manual_seed(0)
    model = torchvision.models.ResNet(block, [2, 1, 1, 1], num_classes=10, **options).eval()
    for m in model.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.1), m.running_var.uniform_(0.5, 1.5)
    return model


@pytest.mark.parametrize(
    ("dtype", "precision", "kernel"),
    [(torch.float32, "high", "3 x bf16"), (torch.float16, None, "3 x bf16"), (torch.bfloat16, None, "matrix bf16")],
    ids=str,
)
def test_networks(unit, model, dtype, precision, kernel):
    pixels = [
        torch.randn(*size, generator=torch.Generator().manual_seed(0)) for size in ((2, 3, 49, 41), (3, 3, 30, 17))
    ]
    with torch.no_grad():
        truths = [model.double()(x.double()) for x in pixels]
        model.float()
        session = fastres.optimize(model, (pixels[0],), dtype=dtype, precision=precision)
        got = [session(x).double() for x in pixels]
    limit = budget(dtype, precision) if dtype == torch.float32 else 30 * torch.finfo(dtype).eps
    for y, truth in zip(got, truths, strict=True):
        assert (y - truth).norm() / truth.norm() <= limit
    report = str(session.report(measure=False))
    assert kernel in report
    grouped = any(m.groups > 1 for m in model.modules() if isinstance(m, torch.nn.Conv2d))
    assert ("depth first" in report) == (unit == "whole blocks" and not grouped), report
    assert not session.notes, "the precision that was asked for is served"


def test_without_a_matrix_unit_high_is_not_served(monkeypatch):
    monkeypatch.setattr(cpu_matrix, "unit", lambda: "")
    assert cpu_weights.matrix(torch.float32, "high") == ()
    assert cpu_executor.precision(torch.device("cpu"), torch.float32, "high") == "highest"


@pytest.mark.parametrize("precision", ["highest", "exact"])
def test_float32_sums_stay_float32(monkeypatch, precision):
    monkeypatch.setattr(cpu_matrix, "unit", lambda: "instructions")
    assert cpu_weights.matrix(torch.float32, precision) == ()
    assert cpu_weights.matrix(torch.float16, precision) == (() if precision == "exact" else (-3,))
    assert cpu_weights.matrix(torch.bfloat16, precision) == (-1,)  # its products lose nothing
