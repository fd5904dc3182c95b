"""Verification of convolutions: right kernels pass whatever rides along, planted errors of every sort are caught."""

from __future__ import annotations

import itertools
import types
from dataclasses import replace

import pytest
import torch
from tuning_cases import DGRAD, PROBLEM, STATS, Config, kernels, missing_product

from fastres import tuning_check
from fastres.problem import HOOKS, ConvProblem, ConvRequest


def combinations():
    for kind, hooks in HOOKS.items():
        for n in range(len(hooks) + 1):
            for chosen in itertools.combinations(sorted(hooks), n):
                given = set(chosen)
                if kind == "dgrad" and (given & {"reduce", "y"} and "act" not in given or given & {"mask"} - {"add"}):
                    if "act" not in given or "add" not in given:
                        continue
                if kind == "fprop" and "stats" in given and given & {"residual", "relu"}:
                    continue  # not legal, see reference_conv
                yield kind, chosen


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    ("kind", "hooks"), list(combinations()), ids=lambda v: v if isinstance(v, str) else "-".join(v)
)
def test_right_kernels_pass(kind, hooks, dtype):
    request = ConvRequest(kind, PROBLEM, dtype, hooks, device=-1)
    assert tuning_check.failure(request, kernels(), Config()) == ""


@pytest.mark.parametrize(
    "problem",
    [
        ConvProblem(1, 7, 5, 3, 8, 7, 7, (2, 2), (3, 3)),
        ConvProblem(3, 6, 7, 8, 8, 1, 1, (2, 2)),
        ConvProblem(2, 9, 9, 8, 16, 3, 3, (1, 1), (2, 2), (2, 2), 4),
        ConvProblem(40, 3, 3, 4, 4, 1, 1),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", HOOKS)
def test_right_kernels_of_any_geometry_pass(kind, problem):
    assert tuning_check.failure(ConvRequest(kind, problem, "float32", device=-1), kernels(), Config()) == ""


def beside(out, _):
    """Writes one element past the end."""
    t = out["main"]
    flat = torch.as_strided(t, (1,), (1,), t.storage_offset() + t.numel())
    flat.fill_(1.0)


def unwritten(out, _):
    out["main"].permute(0, 2, 3, 1)[-1, -1, -1, -1] = float("nan")


def count(out, _):
    out["part"][0, 0, 0] -= 1


def mean(out, _):
    out["part"][1] += 1e-3


def squares(out, _):
    out["part"][2] *= 1.001


def reads_beside(out, inputs):
    a = inputs[0]
    out["main"][0, 0, 0, 0] += torch.as_strided(a, (1,), (1,), a.storage_offset() + a.numel())[0]


def sometimes(out, _):
    sometimes.turn = getattr(sometimes, "turn", 0) + 1
    out["main"][0, 0, 0, 0] *= 1 + sometimes.turn * 2**-22


ERRORS = {
    "5% off": (lambda out, _: out["main"].mul_(1.05), "output out"),
    "a channel off": (lambda out, _: out["main"].copy_(out["main"].roll(1, 1)), "output out"),
    "unwritten": (unwritten, "output out"),
    "missing product": (missing_product, "output out"),
    "writes beside": (beside, "writes beside out"),
    "reads beside": (reads_beside, "output out"),
    "count": (count, "part counts 89 to 90 rows"),
    "mean": (mean, "output part, mean"),
    "squares": (squares, "output part, M2"),
    "sometimes": (sometimes, "output out differs from run to run"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_planted_errors_are_caught(name):
    damage, expected = ERRORS[name]
    request = replace(STATS, device=-1)
    assert expected in tuning_check.failure(request, kernels({name: damage}), Config(name))


def test_a_recomputation_must_meet_the_same_output():
    def damage(out, _):
        if out.get("part") is None:
            out["main"][0, 0, 0, 0] *= 1 + 2**-20

    wrong = tuning_check.failure(replace(STATS, device=-1), kernels({"again": damage}), Config("again"))
    assert wrong == "output out differs where part is not asked for"


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda out, _: out["y"].neg_(), "output y"),
        (lambda out, _: out["part"][0].mul_(1.001), "output part, sum 0"),
        (lambda out, _: out["part"][1].mul_(1.001), "output part, sum 1"),
        (lambda out, _: out["main"].add_(out["add"] * (out["main"] != 0)), "output dx"),
    ],
    ids=["y", "sum", "sum of products", "added twice"],
)
def test_planted_errors_of_a_dgrad_are_caught(damage, expected):
    assert expected in tuning_check.failure(DGRAD, kernels({"bad": damage}), Config("bad"))


def test_an_accumulator_in_half_precision_is_caught():
    def damage(out, inputs):
        x, w = inputs
        total = torch.zeros_like(out["main"])
        for c in range(x.shape[1]):  # a sum that is rounded at every step
            total += x[:, c : c + 1] * w[:, c, 0, 0][:, None, None]
        out["main"].copy_(total)

    deep = ConvRequest("fprop", ConvProblem(2, 6, 6, 512, 8, 1, 1), "float16", (), device=-1)
    assert "output out" in tuning_check.failure(deep, kernels({"half": damage}), Config("half"))


def test_the_batch_of_a_verification_is_cut_down_but_never_grown():
    big = replace(PROBLEM, N=256, H=14, W=14)
    assert tuning_check.small(big, Config(BM=128, patch=(32, 2, 2))).N == 65
    assert tuning_check.small(big, Config(BM=128, patch=(128, 1, 1))).N == 256, "3x3: images are images"
    pointwise = replace(big, R=1, S=1, padding=(0, 0))
    assert tuning_check.small(pointwise, Config(BM=128, patch=(128, 1, 1))).N == 3, "1x1: pixels are flattened"
    assert tuning_check.small(replace(big, N=1), Config(BM=128)).N == 1
    assert tuning_check.many(big, Config(BM=128)).N == -(-129 * 128 // 196)
    assert tuning_check.small(big, object()) is big, "a plan for a batch is verified on that batch"


def test_a_plan_for_large_tensors_is_held_against_pytorch(monkeypatch):
    monkeypatch.setattr(tuning_check, "_WIDE", 1)
    plan = types.SimpleNamespace(name="right")
    assert tuning_check.failure(replace(STATS, device=-1), kernels(), plan) == ""
    bad = types.SimpleNamespace(name="bad")
    assert "output out" in tuning_check.failure(replace(STATS, device=-1), kernels({"bad": missing_product}), bad)
