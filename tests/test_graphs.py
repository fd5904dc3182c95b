"""graph_step: one call is one step, whatever the capture does; what a graph would keep wrongly is captured anew.

There is no GPU here: CPU tensors pass for CUDA ones, and what plays the graph repeats, on replay, the operators that
ran under capture, on the very same memory.
"""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastres
from fastres import graphs


class _Recorder(TorchDispatchMode):
    def __init__(self, calls):
        super().__init__()
        self.calls = calls

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out


class FakeGraph:
    """Operators run under capture, as a list; replay computes them again into the memory that they wrote then."""

    def __init__(self):
        self.calls = []

    @torch.no_grad()
    def replay(self):
        for func, args, kwargs, out in self.calls:
            again = func(*args, **kwargs)
            if isinstance(out, torch.Tensor) and out.data_ptr() != again.data_ptr():
                out.copy_(again)


@pytest.fixture
def cuda(monkeypatch):
    """A CUDA in which capturing computes nothing that stays: parameters are put back after it."""

    @contextlib.contextmanager
    def capture(graph):
        before = [(p, p.detach().clone()) for p in capture.state]
        with _Recorder(graph.calls):
            yield
        with torch.no_grad():
            for p, value in before:
                p.copy_(value)

    capture.state = []
    stream = type("Stream", (), {"wait_stream": lambda self, other: None})
    monkeypatch.setattr(torch.cuda, "Stream", stream)
    monkeypatch.setattr(torch.cuda, "current_stream", stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda s: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(graphs, "_on_gpu", lambda t: True)
    return capture


def learner(momentum=0.0):
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=momentum, foreach=False)
    ran = []

    def step(x, target):
        ran.append(x.shape)
        optimizer.zero_grad()
        loss = (model(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return model, optimizer, step, ran


def batches(n, rows=4):
    g = torch.Generator().manual_seed(1)
    return [(torch.randn(rows, 3, generator=g), torch.randn(rows, 2, generator=g)) for _ in range(n)]


def train(run, optimizer, data, rates=None):
    losses = []
    for i, (x, target) in enumerate(data):
        if rates is not None:
            optimizer.param_groups[0]["lr"] = rates[i]
        losses.append(run(x, target).clone())
    return losses


@pytest.mark.parametrize("rates", [None, [0.1] * 5 + [0.02] * 5], ids=["constant", "schedule"])
def test_every_call_is_one_step(cuda, rates):
    """Weights and losses are those of plain steps: warm-up, capture and replays, also after the rate changed."""
    model, optimizer, step, ran = learner()
    want = train(step, optimizer, batches(10), rates), [p.detach().clone() for p in model.parameters()]
    model, optimizer, step, ran = learner()
    cuda.state = list(model.parameters())
    run = fastres.graph_step(step, optimizer)
    found = train(run, optimizer, batches(10), rates)
    captures = 1 if rates is None else 2
    assert run.captures == captures and len(ran) == graphs.WARMUP + captures
    torch.testing.assert_close(found, want[0])
    torch.testing.assert_close([p.detach() for p in model.parameters()], want[1])


def test_without_the_optimizer_a_changed_rate_goes_unseen(cuda):
    """What the argument is there for."""
    model, optimizer, step, _ = learner()
    cuda.state = list(model.parameters())
    run = fastres.graph_step(step)
    train(run, optimizer, batches(10), [0.1] * 5 + [0.02] * 5)
    assert run.captures == 1


def test_another_shape_runs_as_it_is(cuda):
    model, optimizer, step, ran = learner()
    data = [*batches(5), *batches(1, rows=2), *batches(3)]
    want = train(step, optimizer, data)
    model, optimizer, step, ran = learner()
    cuda.state = list(model.parameters())
    run = fastres.graph_step(step, optimizer)
    torch.testing.assert_close(train(run, optimizer, data), want)
    assert run.captures == 1 and ran.count(torch.Size([2, 3])) == 1


def test_a_rate_that_always_changes_is_said_once(cuda):
    model, optimizer, step, _ = learner()
    cuda.state = list(model.parameters())
    run = fastres.graph_step(step, optimizer)
    with pytest.warns(RuntimeWarning, match="make what changes every few steps a tensor") as got:
        train(run, optimizer, batches(10), [0.1 / (i + 1) for i in range(10)])
    assert len(got) == 1 and run.captures == 10 - graphs.WARMUP


def test_a_rate_in_a_tensor_is_no_reason_to_capture():
    group = {"params": [], "lr": torch.tensor(0.1), "momentum": 0.9}
    optimizer = type("O", (), {"param_groups": [group]})()
    before = graphs._hyperparameters(optimizer)
    group["lr"].mul_(0.5)
    assert graphs._hyperparameters(optimizer) == before
    group["momentum"] = 0.8
    assert graphs._hyperparameters(optimizer) != before


def test_a_capture_that_fails_is_the_callers_to_hear(cuda, monkeypatch):
    model, optimizer, step, _ = learner()
    run = fastres.graph_step(step, optimizer)
    train(run, optimizer, batches(graphs.WARMUP))

    def refused(graph):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "graph", refused)
    with pytest.raises(RuntimeError, match="not permitted"):
        run(*batches(1)[0])
    assert run.captures == 0


def test_on_a_cpu_it_is_the_step_itself():
    model, optimizer, step, ran = learner()
    run = fastres.graph_step(step, optimizer)
    train(run, optimizer, batches(6))
    assert len(ran) == 6 and run.captures == 0


def test_bad_arguments():
    with pytest.raises(TypeError, match="step: got int, expected a callable"):
        fastres.graph_step(3)
    with pytest.raises(TypeError, match="optimizer: got float, expected a torch.optim.Optimizer"):
        fastres.graph_step(print, 0.1)
    with pytest.raises(TypeError, match=r"inputs\[1\]: got float, expected a tensor"):
        fastres.graph_step(print)(torch.zeros(1), 0.5)
