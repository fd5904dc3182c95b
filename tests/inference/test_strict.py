"""Executors that are wrong, broken or choosy: a session says so, or falls back, and never serves a wrong result."""

from __future__ import annotations

import pytest
import torch
from session_cases import distance, pixels, tiny, truth
from torch import nn

import fastres
from fastres.inference import VerificationError, cpu_executor, executors, torch_executor
from fastres.inference.executors import Kernel
from fastres.inference.plan import Block


class Segment:
    """The torch executor's segment, its output passed through ``spoil``; it holds sessions to their side."""

    def __init__(self, owner, segment, device, dtype, precision):
        self.owner, self.segment, self.dtype = owner, segment, dtype
        self.inner = torch_executor.prepare(segment, device, dtype, precision)

    def run(self, x):
        assert x.dtype == self.dtype and not torch.is_grad_enabled()
        assert self.segment.shapes(tuple(x.shape))
        self.owner.runs += 1
        return self.owner.spoil(self.inner.run(x))

    def timed(self, x):
        return self.run(x), [1e-3] * len(self.segment.nodes)

    def kernels(self, shape):
        return [Kernel("mine", "avx9", "6x16", "as told") for _ in self.segment.nodes]

    def memory(self, shape):
        return 2**20


class Executor:
    name = "mine"

    def __init__(self, spoil=lambda y: y, serves=lambda node: True):
        self.spoil, self.serves, self.runs = spoil, serves, 0

    def why_not(self, node, device, dtype, precision):
        return [] if self.serves(node) else [f"{node.op} is beneath it"]

    def precision(self, device, dtype, asked):
        return asked

    def peak(self, device, dtype, threads, precision):
        return 1e12

    def prepare(self, segment, device, dtype, precision):
        return Segment(self, segment, device, dtype, precision)


@pytest.fixture
def install(monkeypatch):
    def put(executor):
        monkeypatch.setitem(executors.EXECUTORS, "mine", executor)
        monkeypatch.setitem(executors.ORDER, "cpu", ("mine", "torch"))
        return executor

    return put


def raising(y):
    raise RuntimeError("illegal instruction")


def one_element(y):
    y = y.clone()
    y.view(-1)[-1] += 1e-3 * y.abs().max()
    return y


WRONG = {
    "one element": one_element,
    "everywhere a little": lambda y: y * (1 + 2e-5),
    "not a number": lambda y: torch.where(torch.arange(y.numel()).view(y.shape) == 3, torch.nan, y),
    "shape": lambda y: y[:, :-1],
    "raises": raising,
    "one image of the batch": lambda y: torch.cat([y[:-1], y[:1]]),
}


@pytest.mark.parametrize("how", WRONG)
def test_a_wrong_executor_raises_or_is_replaced(install, how):
    install(Executor(WRONG[how]))
    model, x = tiny(), pixels(3)
    with pytest.raises(VerificationError, match="failed on the example" if how == "raises" else "does not compute"):
        fastres.optimize(model, x)
    session = fastres.optimize(model, x, strict=False)
    assert distance(session(x), truth(model, x)) <= 1e-5
    assert session.target.executors == ("torch",) and session.verdict.ok
    text = str(session.report(measure=False))
    assert "fell back to the torch executor" in text and (
        "mine, torch failed: " in text or "mine, torch missed: " in text
    )
    with pytest.raises(VerificationError):
        fastres.optimize(model, x, executor="mine")


def test_a_single_wrong_pixel_of_a_large_map_is_seen(install):
    """It moves the relative error of the whole by 2e-6, well inside the budget."""

    def pixel(y):
        y = y.clone()
        y[0, 0, 3, 3] += 2e-6 * y.norm()
        return y

    install(Executor(pixel))
    model = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU()).eval()
    with pytest.raises(VerificationError, match="relative error [12].*; worst element"):
        fastres.optimize(model, pixels())


def test_a_miss_names_the_suspects(install):
    def serves(node):
        return isinstance(node, Block) and node.name == "layer3.0"

    install(Executor(lambda y: y * 1.01, serves))
    with pytest.raises(VerificationError, match=r"furthest off on their own: layer3.0 \(basic_block, mine\): 1.0e-02"):
        fastres.optimize(tiny(), pixels())


def test_an_error_within_the_budget_passes_and_is_reported(install):
    install(Executor(lambda y: y * (1 + 4e-6)))
    session = fastres.optimize(tiny(), pixels())
    assert 3e-6 < session.verdict.error < 1e-5 and session.verdict.peer is None
    with pytest.raises(VerificationError):  # "exact" is held to PyTorch's own error
        fastres.optimize(tiny(), pixels(), precision="exact")


def test_bf16_is_held_to_pytorchs_own_error(install):
    executor = install(Executor())
    session = fastres.optimize(tiny(), pixels(), torch.bfloat16)
    assert session.verdict.limit > 2 * session.verdict.peer > 0
    executor.spoil = lambda y: y * 1.06
    with pytest.raises(VerificationError, match="relative error"):
        fastres.optimize(tiny(), pixels(), torch.bfloat16)


def test_segments_are_cut_by_who_serves_them(install):
    executor = install(Executor(serves=lambda node: node.op in ("basic_block", "linear")))
    model, x = tiny(), pixels()
    session = fastres.optimize(model, x)
    (part,) = session.runner.parts
    assert [(a.executor, len(a.segment.nodes)) for a in part.assignments] == [
        ("torch", 1), ("mine", 4), ("torch", 1), ("mine", 1),
    ]  # fmt: skip
    assert executor.runs == 2 and distance(session(x), truth(model, x)) <= 1e-5
    report = session.report()
    rows = {row.name: row for row in report.rows}
    assert (rows["layer1.0"].kernel, rows["layer1.0"].isa, rows["layer1.0"].tile) == ("mine", "avx9", "6x16")
    assert rows["layer1.0"].measured_ms == pytest.approx(1.0)
    assert rows["layer1.0"].share == pytest.approx(rows["layer1.0"].gflop * 1e9 / 1e-3 / 1e12)
    assert report.peak_source == "the mine executor's own loop"
    assert "conv1: not served by mine: stem is beneath it" in rows["conv1"].note
    with pytest.raises(ValueError, match="conv1: not served by mine: stem is beneath it"):
        fastres.optimize(model, x, executor="mine")


def test_an_executor_is_asked_inside_foreign_modules_too(install):
    executor = install(Executor())

    class Doubled(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = tiny()

        def forward(self, x):
            return 2 * self.body(x)

    model, x = Doubled().eval(), pixels()
    session = fastres.optimize(model, x)
    assert executor.runs and distance(session(x), truth(model, x)) <= 1e-5
    executor.spoil = one_element
    with pytest.raises(VerificationError):
        fastres.optimize(model, x)
    assert distance(fastres.optimize(model, x, strict=False)(x), truth(model, x)) <= 1e-5


def test_where_torch_itself_misses_the_model_runs_as_it_is(monkeypatch):
    for segment in (torch_executor.TorchSegment, cpu_executor.CpuSegment):
        monkeypatch.setattr(segment, "run", lambda self, x: x.new_zeros(x.shape[0], 10))
    model, x = tiny(), pixels()
    session = fastres.optimize(model, x, strict=False)
    with torch.no_grad():
        assert distance(session(x), truth(model, x)) <= 1e-5
    assert any("fell back to the unfused model" in note for note in session.notes) and session.verdict is None
    assert "the unfused model itself runs" in str(session.report(measure=False))
    with pytest.raises(ValueError, match="torch modules"):
        session.save("nowhere.safetensors")


def test_a_loaded_session_is_checked_too(install, tmp_path):
    model, x = tiny(), pixels()
    file = fastres.optimize(model, x, executor="torch").save(tmp_path / "s.safetensors")
    install(Executor(one_element))
    with pytest.raises(VerificationError, match="load: the session does not compute"):
        fastres.load(file)
    session = fastres.load(file, strict=False)
    assert distance(session(x), truth(model, x)) <= 1e-5
    assert any("fell back to the torch executor" in note for note in session.notes)


def test_a_model_whose_own_output_is_not_finite_is_no_reference():
    model = tiny()
    with torch.no_grad():
        model.fc.weight.fill_(torch.inf)
    with pytest.raises(VerificationError, match="unfused model's own output is not finite"):
        fastres.optimize(model, pixels())
