"""Operands formed while loading: offered by the block engine, taken up only where a whole plan won its measurement.

There is no GPU here: what plays the kernels is the reference, what plays the clock a table.
"""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
import torch
from tuning_cases import OPERANDS, PROBLEM, Config, Timer, kernels, missing_product, model

import fastres
from fastres import riding, tuning, tuning_operands, tuning_run, tuning_trial
from fastres.problem import ConvRequest, OperandRequest
from fastres.tuning import Choice

FORWARD = OperandRequest("forward", PROBLEM, "bfloat16", ("prologue",), ("stats",))


def clock(monkeypatch, **us):
    """Microseconds by name of the plan."""
    monkeypatch.setattr(tuning_operands, "microseconds", lambda step, taken, runs=15: us["_".join(taken) or "passes"])


def quiet(text, share):
    pass


def test_plans_and_their_convolutions():
    assert OPERANDS.plans == [(), ("prologue",), ("prologue", "pre")]
    found = {taken: [(c.kind, c.hooks) for c in OPERANDS.convolutions(taken)] for taken in OPERANDS.plans}
    assert found == {
        (): [("dgrad", ("act", "reduce", "y")), ("wgrad", ())],
        ("prologue",): [("dgrad", ("act", "reduce")), ("wgrad", ("prologue",))],
        ("prologue", "pre"): [
            ("dgrad", ("act", "bits", "pre", "reduce")),
            ("wgrad", ("bits", "pre", "prologue")),
        ],
    }
    first = replace(OPERANDS, operands=("pre",), hooks=("add", "mask"))
    assert [(c.kind, c.hooks) for c in first.convolutions(("pre",))] == [
        ("dgrad", ("add", "mask", "pre")),
        ("wgrad", ("pre",)),
    ]
    assert FORWARD.convolutions(("prologue",)) == [ConvRequest("fprop", PROBLEM, "bfloat16", ("prologue", "stats"))]


def test_untuned_nothing_is_taken(gpu):
    gpu(kernels())
    assert tuning.operands(OPERANDS) == ((), True) and tuning.operands(FORWARD) == ((), True)


def test_the_fastest_whole_plan_serves_and_stays(gpu, monkeypatch):
    gpu(kernels())
    monkeypatch.setattr(tuning_trial, "microseconds", Timer(library=100.0, right=50.0))
    clock(monkeypatch, passes=90.0, prologue=80.0, prologue_pre=70.0)
    rows = tuning_run.tune_requests([OPERANDS], quiet)
    assert rows[0].request == OPERANDS and str(rows[0].choice) == "prologue, pre"
    assert (rows[0].us, rows[0].library_us) == (70.0, 90.0)
    assert {row.request for row in rows[1:]} == {
        c for taken in OPERANDS.plans[1:] for c in tuning_operands.needed(OPERANDS, taken)
    }
    tuning.forget()
    assert tuning.operands(OPERANDS) == (("prologue", "pre"), True), "in force in the next process"
    with fastres.backend("cpu"):
        assert tuning.operands(OPERANDS) == ((), True)


def test_what_is_not_faster_as_a_whole_is_left_to_passes(gpu, monkeypatch):
    """Although each of its convolutions beat PyTorch's call and a pass of its own."""
    gpu(kernels())
    monkeypatch.setattr(tuning_trial, "microseconds", Timer(library=100.0, right=50.0))
    clock(monkeypatch, passes=70.0, prologue=69.5, prologue_pre=90.0)
    row = tuning_run.tune_requests([OPERANDS], quiet)[0]
    assert str(row.choice) == "passes" and row.us == row.library_us == 70.0
    assert tuning.operands(OPERANDS) == ((), True)


def test_a_plan_without_a_right_kernel_is_not_even_timed(gpu, monkeypatch):
    fake = gpu(kernels({"wrong": missing_product}))
    fake.offered = (Config("wrong"),)
    monkeypatch.setattr(tuning_trial, "microseconds", Timer(library=100.0, wrong=1.0))
    clock(monkeypatch, passes=90.0)
    with pytest.warns(RuntimeWarning, match="wrong is switched off"):
        rows = tuning_run.tune_requests([FORWARD], quiet)
    assert str(rows[0].choice) == "passes" and rows[0].timings == {"passes": 90.0}


def test_a_winner_whose_kernel_turns_out_wrong_serves_no_more(gpu, monkeypatch):
    gpu(kernels())
    monkeypatch.setattr(tuning_trial, "microseconds", Timer(library=100.0, right=50.0))
    clock(monkeypatch, passes=90.0, prologue=50.0)
    tuning_run.tune_requests([FORWARD], quiet)
    assert tuning.operands(FORWARD)[0] == ("prologue",)
    (request,) = FORWARD.convolutions(("prologue",))
    with pytest.warns(RuntimeWarning, match="right is switched off"):
        tuning.record_verdict(request, Choice("triton", Config()), "off by one", True)
    tuning.forget()
    assert tuning.operands(FORWARD) == ((), True)


def test_a_training_step_offers_its_operands(gpu, monkeypatch):
    gpu(kernels())
    monkeypatch.setattr(tuning, "interpreting", lambda: True)
    requests = tuning_run.record(model(), (torch.randn(2, 64, 6, 6),), True, None)
    offered = {(r.kind, r.operands, r.hooks) for r in requests if isinstance(r, OperandRequest)}
    # Two basic blocks: each convolution but the first of a block loads what a ReLU made.
    assert offered == {
        ("forward", ("prologue",), ("stats",)),
        ("backward", ("prologue", "pre"), ("act", "bits", "reduce")),
    }


@pytest.mark.parametrize("request_", [OPERANDS, FORWARD, replace(OPERANDS, operands=("pre",), hooks=("add", "mask"))])
def test_measuring_runs_every_plan(request_):
    """On the CPU, where PyTorch's calls and the passes serve whatever is taken."""
    step = tuning_operands.Step(replace(request_, device=-1, dtype="float32"))
    for taken in request_.plans:
        assert tuning_operands.microseconds(step, taken, runs=1) > 0


def test_operands_are_written_once_and_only_on_demand():
    calls = []

    class Passes:
        @staticmethod
        def bn_apply(*args):
            calls.append("bn_apply")

        @staticmethod
        def bn_bwd_apply(*args):
            calls.append("bn_bwd_apply")

    t, stat = torch.randn(1, 4, 3, 3), torch.randn(5, 4)
    h = riding.Activation(raw=t, stat=stat)
    dy = riding.Gradient(dy=t, raw=t, stat=stat, coef=stat[:3], bits=None, relu=False)
    assert dy.loadable and not calls
    assert h.written(Passes) is h.written(Passes) and dy.written(Passes) is dy.written(Passes)
    assert calls == ["bn_apply", "bn_bwd_apply"] and not dy.loadable
    assert not riding.Gradient(dy=t, raw=t, relu=True).loadable, "a mask that is recomputed cannot be loaded"
    assert riding.Gradient(dy=t, raw=t, relu=True, bits=t).loadable


def test_the_command_tells_plans_from_convolutions(gpu, monkeypatch):
    from rich.console import Console

    from fastres import cli_tune

    gpu(kernels())
    monkeypatch.setattr(tuning_trial, "microseconds", Timer(library=100.0, right=50.0))
    clock(monkeypatch, passes=90.0, prologue=60.0)
    rows = tuning_run.tune_requests([replace(PLAIN, dtype="bfloat16"), FORWARD], quiet)
    terminal = Console(width=140, file=io.StringIO())
    for part in cli_tune.results(rows, "resnet50"):
        terminal.print(part, soft_wrap=isinstance(part, str))
    printed = terminal.file.getvalue()
    assert "1 distinct convolutions, each once: 100 us with PyTorch's calls, 50.0 us as chosen" in printed
    assert "operands formed while loading: in 1 of 1 places, 30.0 us less than passes" in printed


PLAIN = ConvRequest("fprop", PROBLEM, "float32", ("stats",))
