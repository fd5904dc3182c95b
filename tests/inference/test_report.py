"""report, profile and fastres infer: what they print is what is there."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from session_cases import pixels, seeded, tiny
from torch import nn

import fastres
from fastres import convolution, models

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture(scope="module")
def session():
    return fastres.optimize(tiny("bottleneck"), pixels())


def test_rows_count_the_work(session):
    report = session.report(measure=False)
    assert [r.op for r in report.rows] == ["stem", *["bottleneck"] * 4, "global_avg_pool", "linear"]
    assert all(r.measured_ms is None and r.share is None and r.estimated_ms is None for r in report.rows)
    resnet50 = fastres.optimize(seeded(models.resnet50), pixels(1, 64, 64)).report((1, 3, 224, 224), measure=False)
    work = sum(r.gflop for r in resnet50.rows)
    assert work == pytest.approx(2 * 4.089, rel=0.002), "4.09 G multiplications with additions, as published"
    assert [r.shape for r in resnet50.rows[-3:]] == [(1, 2048, 7, 7), (1, 2048), (1, 1000)]


def test_report_measures_once_for_each_shape(session, monkeypatch):
    first = session.report()
    assert all(r.measured_ms > 0 and r.estimated_ms > 0 for r in first.rows) and first.total_ms > 0
    assert session.report().rows == first.rows, "measured again"
    other = session.report((1, 3, 64, 40))
    assert other.shape == (1, 3, 64, 40) and other.rows != first.rows
    text = str(first)
    for word in ("layer4.0", "bottleneck", "GFLOP", "of peak", "whole call", "images/s", "checked: relative error"):
        assert word in text
    assert json.loads(json.dumps(first.to_dict()))["rows"][0]["name"] == "conv1"
    assert re.search(r"layer1.0 .*\d%", text), "no share of peak"


def test_profile_draws_a_chart(session, tmp_path):
    report = session.profile(tmp_path / "deep" / "chart.png", seconds=0.05)
    assert all(r.measured_ms > 0 for r in report.rows)
    from PIL import Image

    with Image.open(tmp_path / "deep" / "chart.png") as picture:
        assert picture.format == "PNG" and picture.width > 1000
        assert len(picture.convert("RGB").getcolors(2**24)) > 50, "an empty picture"


def test_foreign_modules_have_rows_of_their_own_time(monkeypatch):
    """On a clock that only the two modules move: the owner's time does not include what is served inside it."""
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])

    class Owner(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3))

        def forward(self, x):
            now[0] += 0.25
            return self.body(x)

    def fprop(*arguments):
        now[0] += 1.0
        return pointwise(*arguments)

    pointwise = convolution.pointwise
    monkeypatch.setattr(convolution, "has_pointwise", lambda x: True)
    monkeypatch.setattr(convolution, "pointwise", fprop)
    monkeypatch.setattr("fastres.machine.copy_rate", lambda device, threads: 1e9)
    monkeypatch.setattr("fastres.machine.matmul_rate", lambda device, dtype, threads: 1e9)
    session = fastres.optimize(Owner().eval(), pixels())
    report = session.profile(seconds=1.0)
    rows = {r.name: r.measured_ms for r in report.rows}
    assert rows == {"": 250.0, "body.0": 1000.0} and report.total_ms == 1250.0


@pytest.mark.parametrize("shape", [(1, 3, 32), (0, 3, 32, 32), (1, 3, 32.0, 32), (1, 4, 32, 32)])
def test_bad_shapes(session, shape):
    with pytest.raises(ValueError, match="shape"):
        session.report(shape)


def test_infer_prints_classes_latency_and_throughput(command, tmp_path):
    file, chart = tmp_path / "session.safetensors", tmp_path / "chart.png"
    options = ["--images", str(EXAMPLES), "--size", "64", "--batch", "2"]
    code, out, err = command("infer", "resnet18", *options, "--save", str(file), "--profile", str(chart))
    assert code == 0, err
    for text in ("chelsea.jpg", "coffee.jpg", "top 5", "batch 2: latency", "images/s", "RANDOM weights", "checked:"):
        assert text in out
    assert chart.is_file()
    code, again, err = command("infer", str(file), *options)
    assert code == 0, err
    table = out.split("batch 2:")[0]
    assert again.split("batch 2:")[0] == table, "the saved session sees other classes"


@pytest.mark.parametrize("wrapped", [False, True])
def test_infer_reads_checkpoints(command, tmp_path, wrapped):
    model = seeded(models.resnet18, num_classes=3)
    with torch.no_grad():
        model.fc.bias.copy_(torch.tensor([0.0, 50.0, 0.0]))
    state = model.state_dict()
    if wrapped:
        state = {"epoch": 3, "state_dict": {f"module.{k}": v for k, v in state.items()}}
    torch.save(state, tmp_path / "weights.pth")
    options = ["--images", str(EXAMPLES), "--size", "64", "--checkpoint", str(tmp_path / "weights.pth")]
    code, out, err = command("infer", "resnet18", *options, "--dtype", "bf16")
    assert code == 0, err
    assert "top 3" in out and out.count("class 1 100.0%") == 2 and "RANDOM" not in out
    code, _, err = command("infer", "resnet34", *options)
    assert code == 2 and "weights.pth does not fit: Missing key" in err
