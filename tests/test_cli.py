"""The fastres command: what it prints, what it writes, and one line for what it cannot do."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from fastres import bench, cli, dispatch, doctor

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
TINY = ["--batch", "2", "--size", "32", "--seconds", "0.01", "--no-compile"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["bench", "resnet49"], "got 'resnet49', expected one of resnet18"),
        (["report", "vgg"], "got 'vgg', expected one of resnet18"),
        (["bench", "resnet18", "--dtype", "fp8"], "--dtype: got 'fp8', expected one of fp32, bf16, fp16"),
        (["bench", "resnet18", "--batch", "0"], "--batch: got 0, expected at least 1"),
        (["bench", "resnet18", "--batch", "1", "--train"], "--batch: got 1, expected at least 2"),
        (["bench", "resnet18", "--batch", "many"], "--batch"),
        (["bench", "resnet18", "--size", "8"], "--size: got 8, expected at least 32"),
        (["bench", "resnet18", "--seconds", "-1"], "--seconds: got -1.0, expected a positive number"),
        (["bench", "resnet18", "--threads", "-2"], "--threads: got -2, expected at least 0"),
        (["bench", "resnet18", "--device", "tpu"], "--device: got 'tpu', expected 'cpu' or 'cuda'"),
        (["bench", "resnet18", "--device", "cuda:77"], "torch sees"),
        (["bench", "resnet18", "--images", "/no/such/place"], "expected an existing directory"),
        (["bench", "resnet18", "--memory", "none", "--train"], "--memory: got 'none', expected 'default' or 'low'"),
        (["bench", "resnet18", "--memory", "low"], "expected --train beside it"),
        (["bench", "resnet18", "--compile-mode", "fast"], "--compile-mode: got 'fast'"),
        (["bench"], "model"),
        (["bench", "resnet18", "--nonsense"], "--nonsense"),
        (["benhc"], "benhc"),
        (["tune", "resnet49"], "got 'resnet49', expected one of resnet18"),
        (["tune", "resnet18", "--dtype", "fp8"], "--dtype: got 'fp8', expected one of fp32, bf16, fp16"),
        (["tune", "resnet18", "--batch", "1"], "--batch: got 1, expected at least 2"),
        (["infer", "resnet49", "--images", str(EXAMPLES)], "expected a saved session or one of resnet18"),
        (["infer", "resnet18"], "images"),
        (["infer", "resnet18", "--images", "/no/such/place"], "expected an existing directory"),
        (["infer", "resnet18", "--images", str(EXAMPLES), "--dtype", "fp8"], "--dtype: got 'fp8'"),
        (["infer", "resnet18", "--images", str(EXAMPLES), "--precision", "low"], "--precision: got 'low'"),
        (["infer", "resnet18", "--images", str(EXAMPLES), "--dtype", "bf16", "--precision", "high"], "expected fp32"),
        (["infer", "resnet18", "--images", str(EXAMPLES), "--batch", "0"], "--batch: got 0, expected at least 1"),
        (["infer", "resnet18", "--images", str(EXAMPLES), "--device", "tpu"], "--device: got 'tpu'"),
        (["infer", "resnet18", "--images", str(EXAMPLES), "--checkpoint", "none"], "expected an existing file"),
        (["infer", "resnet18", "--images", str(EXAMPLES), "--checkpoint", __file__], "of tensors alone"),
        (["infer", __file__, "--images", str(EXAMPLES)], "is damaged, cut off or no saved session"),
        (["tune", "resnet18", "--infer", "--size", "8"], "--size: got 8, expected at least 32"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_and_exit_code_2(command, arguments, expected):
    code, out, err = command(*arguments)
    assert code == 2
    assert out == ""
    assert err.startswith("fastres: error: ") and expected in err
    assert len(err.strip().splitlines()) == 1


def test_a_directory_without_images_is_one_line(command, tmp_path):
    code, out, err = command("bench", "resnet18", "--images", str(tmp_path), *TINY)
    assert code == 2 and "no image" in err and len(err.strip().splitlines()) == 1


def test_bench_prints_a_table_and_writes_rows_and_chart(command, tmp_path):
    chart, rows = tmp_path / "deep" / "chart.png", tmp_path / "rows.json"
    code, out, err = command(
        "bench", "resnet18", "--images", str(EXAMPLES), *TINY, "--json", str(rows), "--png", str(chart)
    )
    assert code == 0, err
    assert "resnet18, inference: batch 2, 32 px, fp32" in out
    headings = ("engine", "img/s", "vs eager", "vs peers", "error")
    for text in (*headings, "chelsea.jpg", "fold=True", "optimize", "--no-compile"):
        assert text in out
    assert max(map(len, out.split("vs peers:")[0].splitlines())) <= 80, "the table fits a terminal"
    found = json.loads(rows.read_text())
    assert [r["backend"] for r in found] == ["eager", "fastres, fold", "fastres"]
    assert "--images" in found[0]["command"]
    from PIL import Image

    with Image.open(chart) as picture:
        assert picture.format == "PNG" and picture.width > 1000


def test_bench_training_prints_gradients_and_memory(command):
    code, out, err = command("bench", "resnet18", "--train", "--memory", "low", *TINY)
    assert code == 0, err
    for text in ("one training step", "gradients", "loss off by", "saved, MiB", "against float64"):
        assert text in out
    assert max(map(len, out.split("vs peers:")[0].splitlines())) <= 80, "the tables fit a terminal"


@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
def test_the_widest_tables_fit_a_terminal(train):
    errors = {"logits": 1.25e-07, "gradients": 1.3, "loss_difference": 1.5e-03}
    names = ("eager", "torch.compile", "fastres, fold", "fastres")
    rows = [
        dict(backend=name, median_ms=99999.0, quantiles_ms=dict(p25=99999.0, p75=99999.0), images_per_s=12345.6,
             ratio_to_eager=None, ratio_to_best_peer=None, error_vs_float64=errors, saved_for_backward_bytes=2**40)
        for name in names
    ]  # fmt: skip
    case = bench.Case("wide_resnet101_2", train=train)
    terminal = Console(width=80, file=io.StringIO())
    for table in cli._results(bench.Result(case, rows, {}, "", "")):
        terminal.print(table)
    printed = terminal.file.getvalue()
    assert "\u2026" not in printed, "a cell was cut off"
    assert all(name in printed for name in names)


def test_report_lists_every_place(command):
    code, out, err = command("report", "resnet18")
    assert code == 0, err
    assert out.count("basic_block") == 8 and "stem" in out


def test_doctor_page(command):
    code, out, err = command("doctor")
    assert code == 0, err
    for text in (
        "Machine",
        "Compiled extensions",
        "Backends",
        "Chosen for typical requests",
        "batch_norm_act",
        "torch",
        "Convolutions on the CPU",
        "In one kernel, on a GPU",
        "FASTRES_ONE_PASS=1",
    ):
        assert text in out
    for name in dispatch.BACKENDS:
        assert name in out
    code, short, _ = command("doctor", "--short")
    assert code == 0 and "Backends" in short and "Chosen" not in short


def test_doctor_json_is_complete_and_says_why(command):
    code, out, err = command("doctor", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["machine"]["cpu"]["name"] and found["versions"]["torch"]
    assert found["extensions"].keys() == doctor.EXTENSIONS.keys()
    assert found["backends"].keys() == dispatch.BACKENDS.keys()
    for entry in found["backends"].values():
        assert entry["available"] or all(entry["why_not"]), "a backend that is missing says why"
    assert {row["op"] for row in found["choices"]} == dispatch.LAUNCHES.keys()
    for row in found["choices"]:
        before = list(row["passed_over"])
        assert before == list(dispatch.ORDER[row["device"]])[: len(before)]
        assert all(row["passed_over"].values()), "what was passed over has reasons"


def test_doctor_agrees_with_dispatch():
    import torch

    for row in doctor.choices():
        request = dispatch.Request(
            row["op"], torch.device(row["device"]), getattr(torch, row["dtype"]), row["channels"]
        )
        assert dispatch.choose(request) is dispatch.load(row["backend"])


def test_doctor_says_whose_cpu_convolutions_serve(command, monkeypatch):
    """What is printed is what dispatches, whatever the machine; and never PyTorch's where ours serve."""
    from fastres.backends import cpu_conv

    for ours in (True, False):
        monkeypatch.setattr(cpu_conv, "wins", lambda kind, *a, ours=ours: ours and kind != "wgrad")
        monkeypatch.setattr(cpu_conv, "why_not", lambda *a, ours=ours: [] if ours else ["3 groups"])
        monkeypatch.setattr(cpu_conv, "narrow_ratio", lambda dtype: 2.0)
        rows = doctor.cpu_convolutions()
        assert [row["ours"] for row in rows] == [["fprop", "dgrad"] if ours else []] * 3
        code, out, _ = command("doctor", "--short")
        assert code == 0 and ("fprop, dgrad by fastres; wgrad by PyTorch" in out) == ours
        assert ("fprop, dgrad, wgrad by PyTorch (3 groups)" in out) == (not ours)


def test_doctor_lists_verdicts_on_whole_blocks(command, monkeypatch):
    from fastres import block_geometry, whole_block

    shape = block_geometry.TYPICAL[1]
    monkeypatch.setattr(whole_block, "verdicts", lambda: {f"{shape}, bfloat16": "separate convolutions take 9 us"})
    monkeypatch.setenv("FASTRES_ONE_PASS", "1")
    code, out, _ = command("doctor")
    flat = " ".join(out.split())
    assert code == 0 and "basic block 8x64x56x56 with an identity, bfloat16: separate convolutions take 9 us" in flat
    assert "asked for (FASTRES_ONE_PASS=1)" in flat
    assert "stride 2x2 with a projection: separate convolutions on any GPU (conv2 has stride 2x2, expected 1x1;" in flat
    found = doctor.examine()
    assert found["one_pass"]["asked"] and found["whole_blocks"]["verdicts"]
    for row in found["whole_blocks"]["unserved"]:
        assert any("stride 2x2, expected 1x1" in why for why in row["why_not"]), row


def test_doctor_says_why_when_extensions_are_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "fastres._cpu", None)
    entry = doctor.extensions()["_cpu"]
    assert not entry["built"] and entry["why"]


def run_python(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, **environment}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, timeout=300)


def test_one_openmp_runtime_in_the_process():
    done = run_python("-m", "fastres", "doctor", "--json")
    assert done.returncode == 0, done.stderr
    runtimes = json.loads(done.stdout)["openmp"]
    assert runtimes is None or len(runtimes) <= 1, f"two thread pools would fight for the cores: {runtimes}"


def test_importing_fastres_loads_no_terminal_or_plot_library():
    done = run_python(
        "-c", "import fastres, sys; print([m for m in ('typer', 'rich', 'matplotlib') if m in sys.modules])"
    )
    assert done.stdout.strip() == "[]", done.stderr


def test_version(command):
    code, out, _ = command("version")
    import fastres

    assert code == 0 and f"fastres {fastres.__version__}" in out
