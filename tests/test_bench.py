"""The measuring harness: fair turns, honest ratios, full provenance."""

from __future__ import annotations

import copy
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from fastres import bench, figures
from fastres.bench import contestants, engines, harness, inputs, plain, rows, timing

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
TINY = dict(model="resnet18", batch=2, size=32, seconds=0.01, compile=False)


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def sleeper(clock: Clock, log: list[str], name: str, seconds: float):
    def call():
        log.append(name)
        clock.now += seconds

    return call


# ---- timing


def test_variants_take_turns_and_run_equally_often():
    clock, log = Clock(), []
    calls = {name: sleeper(clock, log, name, s) for name, s in (("slow", 2.0), ("fast", 1.0))}
    times = timing.take_turns(calls, 30.0, clock=clock)
    assert log == ["slow", "fast"] * 10
    assert times == {"slow": [2.0] * 10, "fast": [1.0] * 10}


def test_the_first_of_a_short_turn_is_not_counted():
    clock, log = Clock(), []
    cold = {"left": 0}

    def call():
        clock.now += 0.05 if cold["left"] == 0 else 0.01
        cold["left"] = (cold["left"] + 1) % 3
        log.append("call")

    times = timing.take_turns({"short": call}, 0.5, clock=clock)
    assert set(round(t, 6) for t in times["short"]) == {0.01}
    assert len(log) == 3 * len(times["short"]) // 2


def test_every_variant_runs_at_least_three_times():
    clock = Clock()
    times = timing.take_turns({"slow": sleeper(clock, [], "slow", 100.0)}, 1.0, clock=clock)
    assert times["slow"] == [100.0] * timing.MIN_RUNS


def test_the_device_is_waited_for_inside_the_measured_time():
    clock = Clock()

    def synchronize():
        clock.now += 0.5

    times = timing.take_turns({"a": sleeper(clock, [], "a", 1.0)}, 1.0, synchronize=synchronize, clock=clock)
    assert times["a"] == [1.5] * 3


def test_quantiles_interpolate():
    assert timing.quantile([4.0, 1.0, 2.0, 3.0], 0.5) == 2.5
    assert timing.quantile([7.0], 0.9) == 7.0
    assert timing.quantile([0.0, 10.0], 0.25) == 2.5
    with pytest.raises(ValueError, match="at least one timing"):
        timing.quantile([], 0.5)
    assert timing.summary([0.001, 0.003, 0.002])["median_ms"] == pytest.approx(2.0)


# ---- rows


def row(backend: str, ms: float, ok: bool = True) -> dict:
    return {"backend": backend, "median_ms": ms, "within_budget": ok}


def test_no_speedup_outside_the_error_budget():
    found = [row("eager", 10.0), row("torch.compile", 5.0, ok=False), row("fastres", 8.0)]
    rows.compare(found)
    eager, compiled, ours = found
    assert compiled["ratio_to_eager"] is None and compiled["ratio_to_best_peer"] is None
    assert ours["best_peer"] == "eager", "a wrong answer is no peer"
    assert ours["ratio_to_eager"] == ours["ratio_to_best_peer"] == 1.25
    assert eager["ratio_to_eager"] == 1.0


def test_no_contestant_of_ours_is_a_peer():
    names = ("eager", "fastres, fold", "fastres", "fastres, CUDA graph")
    found = [row(name, 10.0 - i) for i, name in enumerate(names)]
    rows.compare(found)
    assert [r["best_peer"] for r in found] == ["eager"] * 4
    assert found[3]["ratio_to_best_peer"] == 10 / 7


def test_the_best_peer_is_the_fastest_honest_one():
    found = [row("eager", 10.0), row("torch.compile", 5.0), row("fastres", 4.0)]
    rows.compare(found)
    assert found[2]["ratio_to_best_peer"] == 1.25 and found[2]["ratio_to_eager"] == 2.5


def test_the_budget_is_twice_eagers_error_plus_one_rounding():
    eps = torch.finfo(torch.bfloat16).eps
    assert rows.within_budget(2e-2 + 0.9 * eps, 1e-2, torch.bfloat16)
    assert not rows.within_budget(2e-2 + 1.1 * eps, 1e-2, torch.bfloat16)
    assert not rows.within_budget(math.inf, 1e-2, torch.bfloat16)


def test_a_nan_is_an_infinite_error():
    truth = torch.ones(3, dtype=torch.float64)
    assert rows.relative_l2(torch.tensor([1.0, 1.0, math.nan]), truth) == math.inf
    assert rows.relative_l2(torch.tensor([1.0, 1.0, 1.0]), truth) == 0.0
    with pytest.raises(ValueError, match="got 2 elements, expected 3"):
        rows.relative_l2(torch.ones(2), truth)


# ---- inputs


def test_photographs_fill_the_batch_in_order():
    x, source = inputs.batch_of(5, 64, EXAMPLES, seed=0)
    assert x.shape == (5, 3, 64, 64) and x.dtype == torch.float32
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(x[0], x[2]) and torch.equal(x[1], x[3]) and not torch.equal(x[0], x[1])
    assert "chelsea.jpg, coffee.jpg" in source
    assert x.abs().max() < 3 and 0.1 < x.std() < 2, "normalised pixels"


def test_a_photograph_keeps_its_proportions(tmp_path):
    from PIL import Image

    wide = Image.new("RGB", (90, 30), (255, 0, 0))
    wide.paste((0, 0, 255), (0, 0, 30, 30))
    wide.paste((0, 0, 255), (60, 0, 90, 30))
    wide.save(tmp_path / "wide.png")
    pixels = inputs.load_photograph(tmp_path / "wide.png", 30)
    red = (pixels[0] * inputs.STD[0] + inputs.MEAN[0]).mean()
    assert red > 0.99, "the centre third is red, the sides are cropped away"


def test_random_pixels_are_reproducible():
    assert torch.equal(inputs.batch_of(2, 8, None, 3)[0], inputs.batch_of(2, 8, None, 3)[0])
    assert not torch.equal(inputs.batch_of(2, 8, None, 3)[0], inputs.batch_of(2, 8, None, 4)[0])


def test_unusable_photographs_are_one_clear_line(tmp_path):
    with pytest.raises(bench.BenchError, match="expected an existing directory"):
        inputs.photographs(tmp_path / "nowhere")
    with pytest.raises(bench.BenchError, match="no image"):
        inputs.photographs(tmp_path)
    (tmp_path / "broken.jpg").write_bytes(b"not a picture")
    with pytest.raises(bench.BenchError, match="broken.jpg is not a readable image"):
        inputs.batch_of(1, 8, tmp_path, 0)


# ---- the plain baseline


@pytest.mark.parametrize("name", ["resnet34", "resnet50", "resnext101_32x8d", "wide_resnet101_2"])
def test_plain_resnets_have_torchvisions_state_dict(name):
    models = pytest.importorskip("torchvision.models", reason="nothing to compare the plain ResNets with")
    with torch.device("meta"):
        ours, theirs = plain.build(name).state_dict(), getattr(models, name)(weights=None).state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
    assert list(ours) == list(theirs)


@pytest.mark.parametrize("name", ["resnet18", "resnext50_32x4d"])
def test_plain_resnets_compute_what_torchvisions_compute(name):
    pytest.importorskip("torchvision", reason="nothing to compare the plain ResNets with")
    theirs = contestants.baseline(name)[0].double().eval()
    ours = plain.build(name).double().eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-12, atol=1e-12)


def test_without_torchvision_the_baseline_is_plain_and_its_twin_is_fused(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    model, origin = contestants.baseline("resnet18")
    assert isinstance(model, plain.PlainResNet) and "plain torch.nn" in origin
    assert not any(type(m).__module__.startswith("fastres.nn") for m in model.modules())
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    session = contestants.session(model, x, torch.float32)
    assert not list(session.plan.foreign()) and isinstance(model, plain.PlainResNet)
    twin = contestants.fused(train=False)(model.double().eval())
    assert type(twin).__module__ == "fastres.models.resnet"
    with torch.inference_mode():
        torch.testing.assert_close(twin(x.double()), model(x.double()), rtol=1e-9, atol=1e-9)


# ---- whole runs


def test_an_inference_run_is_right_and_tells_everything():
    heard = []
    result = bench.run(bench.Case(**TINY, images=str(EXAMPLES)), lambda text, fraction: heard.append(fraction))
    assert [r["backend"] for r in result.rows] == ["eager", "fastres, fold", "fastres"]
    assert [r.get("call") for r in result.rows] == [
        None, "fastres.fuse(model, fold=True)", "fastres.optimize(model, (x,), dtype=torch.float32)"
    ]  # fmt: skip
    assert result.absent == {"torch.compile": "switched off by --no-compile"}
    assert heard == sorted(heard) and heard[-1] == 1.0
    for r in result.rows:
        assert r["within_budget"] and 0 < r["error_vs_float64"]["logits"] < 1e-5
        assert r["runs"] >= timing.MIN_RUNS and r["median_ms"] > 0
        assert r["quantiles_ms"]["p25"] <= r["median_ms"] <= r["quantiles_ms"]["p75"]
        assert r["images_per_s"] == pytest.approx(2000 / r["median_ms"])
        assert r["shape"] == [2, 3, 32, 32] and r["layout"] == "channels_last" and r["dtype"] == "fp32"
        assert r["machine"]["cpu"]["name"] and r["machine"]["threads"] == torch.get_num_threads()
        assert {"fastres", "torch", "python", "cuda"} <= r["versions"].keys()
        assert r["command"].startswith("fastres") and r["date"] and r["baseline"] == "eager"
    json.dumps(result.rows)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_training_run_compares_gradients_and_memory(dtype):
    # At 32 pixels and batch 2 the last BNs see two values a channel: their sign is all that is left, and any rounding
    # turns gradients around.
    result = bench.run(bench.Case(**{**TINY, "batch": 4, "size": 64, "train": True, "dtype": dtype}))
    eager, ours = result.rows
    for r in (eager, ours):
        assert r["within_budget"], r["error_vs_float64"]
        assert r["error_vs_float64"].keys() == {"logits", "gradients", "loss_difference"}
    assert ours["saved_for_backward_bytes"] < eager["saved_for_backward_bytes"]


def test_memory_low_saves_less():
    kept = {}
    for memory in ("default", "low"):
        result = bench.run(bench.Case(**{**TINY, "train": True, "memory": memory}))
        kept[memory] = result.rows[-1]["saved_for_backward_bytes"]
    assert kept["low"] < kept["default"]


def test_a_wrong_fastres_gets_no_speedup(monkeypatch, tmp_path):
    def zeroed(model):
        nn.init.zeros_(model.fc.weight)
        return model

    monkeypatch.setattr(contestants, "fused", lambda train, memory="default": zeroed)
    monkeypatch.setattr(contestants, "session", lambda model, x, dtype: zeroed(copy.deepcopy(model).eval()))
    result = bench.run(bench.Case(**TINY))
    for ours in result.rows[1:]:
        assert not ours["within_budget"] and ours["ratio_to_eager"] is None and ours["ratio_to_best_peer"] is None
    from fastres import cli

    with cli.console.capture() as captured:
        for table in cli._results(result):
            cli.console.print(table)
    assert captured.get().count("withheld") == 4
    assert any("no speed-up is claimed" in line for line in cli._footnotes(result))
    figures.bench_chart(result.rows, tmp_path / "chart.png")


def test_an_engine_that_cannot_run_is_a_reason_not_a_crash(monkeypatch):
    def compile(*args, **kwargs):
        raise RuntimeError("this machine has no headers\nand a long story")

    monkeypatch.setattr(torch, "compile", compile)
    result = bench.run(bench.Case(**{**TINY, "compile": True}))
    assert result.absent == {"torch.compile": "RuntimeError: this machine has no headers"}


def test_no_compiler_is_a_reason(monkeypatch):
    monkeypatch.setattr(harness.shutil, "which", lambda name: None)
    result = bench.run(bench.Case(**{**TINY, "compile": True}))
    assert "no C++ compiler" in result.absent["torch.compile"]


@pytest.mark.parametrize("maker", ["fused", "session"])
def test_a_fastres_that_crashes_is_not_hidden(monkeypatch, maker):
    def broken(*arguments):
        raise ZeroDivisionError("a bug of ours")

    monkeypatch.setattr(contestants, maker, broken if maker == "session" else lambda *arguments: broken)
    with pytest.raises(ZeroDivisionError):
        bench.run(bench.Case(**TINY))


def test_on_a_gpu_fastres_is_the_fused_model():
    case = bench.Case(**{**TINY, "device": "cuda"})
    named = list(harness._contestants(case, plain.build("resnet18"), None, None, torch.float32))
    assert named == ["eager", "fastres"] and case.call("fastres") == "fastres.fuse(model, fold=True)"
    assert bench.Case(**{**TINY, "train": True, "memory": "low"}).call("fastres") == "fastres.fuse(model, memory='low')"


def test_threads_are_put_back():
    before = torch.get_num_threads()
    result = bench.run(bench.Case(**{**TINY, "threads": 1}))
    assert result.rows[0]["machine"]["threads"] == 1
    assert torch.get_num_threads() == before


def test_the_caption_names_machine_versions_and_command():
    result = bench.run(bench.Case(**TINY))
    text = rows.caption(result.rows[0])
    for part in (torch.__version__, "fastres", f"{torch.get_num_threads()} thread", result.rows[0]["date"][:10]):
        assert part in text


def test_a_truth_that_saves_memory_is_the_same_truth():
    model = plain.build("resnet18").to(torch.float64, memory_format=torch.channels_last)
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([1, 2])
    truth = engines.truth(model, x, labels)
    engines._checkpoint_blocks(model)
    again = engines.training("float64", model, x, labels, torch.float64).first()
    for what, value in truth.items():
        torch.testing.assert_close(again[what], value, rtol=1e-9, atol=1e-12)
