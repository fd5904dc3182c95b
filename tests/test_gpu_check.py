"""make gpu-check without a GPU: it says what it would do, its code runs, and its limits hold."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def gpu_check(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu_check

    return gpu_check


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, str(BENCHMARKS / "gpu_check.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)


def test_without_a_gpu_it_says_what_it_would_do_and_rehearses(tmp_path, gpu_check):
    done = run("--stages", "build,kernels-cuda,memcheck", OUT=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "dry run: torch sees no CUDA device" in done.stdout
    assert f"results would go to {tmp_path}" in done.stdout
    for text in ("FASTRES_CUDA=1 FASTRES_CUDA_ARCHS=native", "pip install --no-build-isolation --no-deps -e",
                 "compute-sanitizer --tool memcheck", "limit 540 s"):  # fmt: skip
        assert text in done.stdout
    for stage in ("build", "kernels-cuda", "memcheck"):
        assert f"{stage:26s} passed" in done.stdout
    assert not list(tmp_path.iterdir()), "a rehearsal leaves no result behind"


#: The code behind the stages. Two are rehearsed above; the others of training are train-64 with other numbers.
REHEARSED = ("kernels-cuda", "launch-once")
STAGES = (
    "kernels-triton", "ops", "conv-kernels", "conv-layers", "cudnn", "framework", "tune-256", "bandwidth", "op-times",
    "train-64", "infer", "profile", "one-step", "one-pass", "shift", "blocks",
)  # fmt: skip
TWICE = (
    "train-256", "train-256-low", "train-64-reduce-overhead", "train-256-reduce-overhead", "train-64-max-autotune",
    "train-256-max-autotune", "infer-max-autotune", "tune-64",
)  # fmt: skip


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_runs_on_the_cpu(stage, tmp_path):
    rows_file = tmp_path / "rows.jsonl"
    environment = {**os.environ, "FASTRES_GPU_CHECK_REHEARSAL": "1", "FASTRES_GPU_CHECK_ROWS": str(rows_file)}
    command = [sys.executable, str(BENCHMARKS / "gpu_stages.py"), stage]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    found = [json.loads(line) for line in rows_file.read_text().splitlines()] if rows_file.exists() else []
    assert (found or stage == "one-step") and all(row["stage"] == stage for row in found)
    assert not [row for row in found if row.get("status") == "failed"]


def test_every_stage_ends_within_nine_minutes(gpu_check):
    assert all(stage.limit <= 540 for stage in gpu_check.STAGES)
    assert len({stage.name for stage in gpu_check.STAGES}) == len(gpu_check.STAGES)
    covered = {stage.command[-1] for stage in gpu_check.STAGES[1:]}
    assert covered == {*REHEARSED, *STAGES, *TWICE} - {"one-step"}, "each stage's code is rehearsed above"


def script(gpu_check, name: str, text: str):
    return gpu_check.Stage(name, "a stage of this test", ("{python}", "-c", text))


def test_a_stage_that_hangs_is_ended_with_its_children_and_keeps_its_rows(gpu_check, tmp_path):
    path = tmp_path / "rows.jsonl"
    hang = (
        "import os, subprocess, sys, time\n"
        "open(os.environ['FASTRES_GPU_CHECK_ROWS'], 'a').write('{\"stage\": \"hangs\", \"found\": 1}\\n')\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(child.pid))\n"
        "time.sleep(60)\n"
    )
    start = time.monotonic()
    verdict = gpu_check.run_stage(script(gpu_check, "hangs", hang), path, 10)
    assert time.monotonic() - start < 40
    assert verdict["status"] == "out of time"
    assert [row.get("found") for row in gpu_check.read_rows(path)] == [1, None]
    pid = int((tmp_path / "pid").read_text())
    for _ in range(50):
        state = Path(f"/proc/{pid}/stat")
        if not state.exists() or state.read_text().split()[2] == "Z":
            return
        time.sleep(0.1)
    pytest.fail("the child of an ended stage still runs")


def test_verdicts_and_reruns(gpu_check, tmp_path):
    path = tmp_path / "rows.jsonl"
    good = gpu_check.run_stage(script(gpu_check, "one", "pass"), path, 60)
    bad = gpu_check.run_stage(script(gpu_check, "two", "raise SystemExit(3)"), path, 60)
    assert good["status"] == "passed" and bad["status"] == "failed" and bad["exit_code"] == 3
    gpu_check.run_stage(script(gpu_check, "two", "pass"), path, 60)
    found = gpu_check.read_rows(path)
    assert [(row["stage"], row["status"]) for row in found] == [("one", "passed"), ("two", "passed")]
    assert json.loads(gpu_check.merge(path).read_text()) == found


def test_a_missing_tool_skips_its_stage_with_the_reason(gpu_check, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check.shutil, "which", lambda name: None)
    stage = next(s for s in gpu_check.STAGES if s.name == "racecheck")
    verdict = gpu_check.run_stage(stage, tmp_path / "rows.jsonl", 5)
    assert verdict["status"] == "skipped" and "compute-sanitizer is not on PATH" in verdict["why"]


def test_a_half_written_last_row_is_dropped(gpu_check, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"stage": "a"}\n{"stage": "b", "val')
    assert gpu_check.read_rows(path) == [{"stage": "a"}]


def test_the_results_file_names_gpu_and_torch(gpu_check, tmp_path, monkeypatch):
    monkeypatch.setenv("OUT", str(tmp_path))
    import torch

    name = gpu_check.results_file("NVIDIA H100 80GB HBM3").name
    assert name == f"H100_80GB_HBM3-torch{torch.__version__.partition('+')[0]}.jsonl"


def test_an_unknown_stage_is_refused():
    done = run("--stages", "build,nonsense")
    assert done.returncode == 2 and "got nonsense, expected some of build" in done.stderr
