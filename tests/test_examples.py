"""The examples run, and learning does not notice fuse."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    pytest.importorskip("torchvision", reason="the examples use torchvision's blocks")

    def run(name: str, *arguments: str) -> dict:
        monkeypatch.setattr(sys, "argv", [f"examples/{name}", *arguments])
        return runpy.run_path(str(EXAMPLES / name), run_name="__main__")

    return run


def test_digits_learn_alike_with_and_without_fuse(monkeypatch):
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    pytest.importorskip("torchvision", reason="the example uses torchvision's blocks")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import train_digits

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        plain, accuracy, _ = train_digits.train(False, epochs=2)
        fused, fused_accuracy, _ = train_digits.train(True, epochs=2)
    finally:
        torch.set_num_threads(before)
    plain, fused = torch.tensor(plain), torch.tensor(fused)
    assert plain[-5:].mean() < 0.3 * plain[0], "the network does not learn"
    # One forward pass differs by fp32 rounding; each step at this rate multiplies a difference by a small factor.
    assert abs(plain[0] - fused[0]) <= 1e-5 * plain[0]
    assert (plain - fused)[:10].abs().max() <= 1e-2 * plain[0]
    assert abs(plain.mean() - fused.mean()) <= 0.02 * plain.mean()
    # 360 test images: five of them at most, twice the standard deviation of the accuracy at 97%, see binomial.
    assert abs(accuracy - fused_accuracy) <= 2 * (0.97 * 0.03 / 360) ** 0.5


def test_digits_draws_both_curves(example, tmp_path, capsys):
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    before = torch.get_num_threads()
    try:
        example("train_digits.py", "--epochs", "1", "--out", str(tmp_path / "curves.png"))
    finally:
        torch.set_num_threads(before)
    printed = capsys.readouterr().out
    assert printed.count("test accuracy") == 2
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_lines_to_copy_run(example, capsys):
    example("fuse_resnet.py")
    assert "bottleneck" in capsys.readouterr().out


def test_the_photographs_are_small():
    found = sorted(EXAMPLES.glob("*.jpg"))
    assert [path.name for path in found] == ["chelsea.jpg", "coffee.jpg"]
    assert all(path.stat().st_size <= 100_000 for path in found)
    text = (EXAMPLES / "README.md").read_text()
    assert all(path.name in text for path in found), "examples/README.md must state each picture's source and licence"
