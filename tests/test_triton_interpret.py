"""The Triton kernels without a GPU: triton_cases.py on Triton's CPU interpreter, in a process of its own.

Triton decides when it is imported whether it compiles or interprets, so TRITON_INTERPRET=1 cannot be set here.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastres import dispatch
from fastres.backends import triton

HERE = Path(__file__).resolve().parent

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed: its kernels cannot be interpreted"
)


def _environment(**changes: str) -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if not k.startswith(("TRITON_", "PYTEST_"))} | changes


@needs_triton
def test_kernels_on_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(HERE / "triton_cases.py")]
    # NumPy warns where lanes beyond C divide 0 by 0; their results are never stored.
    command += ["-W", "ignore:invalid value encountered:RuntimeWarning"]
    done = subprocess.run(
        command,
        cwd=HERE,
        # One thread: the tensors are tiny, and threads of this process and that one would fight over the cores.
        env=_environment(TRITON_INTERPRET="1", OMP_NUM_THREADS="1"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}"
    assert " passed" in done.stdout and "skipped" not in done.stdout, done.stdout


def test_importing_fastres_does_not_import_triton():
    code = "import sys, fastres, fastres.backends.triton; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=HERE, env=_environment()).returncode == 0


def test_cpu_tensors_need_the_interpreter():
    if triton.interpreting():
        pytest.skip("TRITON_INTERPRET is set for this process")
    reasons = triton.why_not(dispatch.Request("add_relu", torch.device("cpu"), torch.float32, 8))
    assert reasons == ["CPU tensors are served under TRITON_INTERPRET=1 only"]
    with pytest.raises(ValueError, match="bn_fold: running_mean must be on a cuda device, got cpu"):
        triton.bn_fold(torch.zeros(8), torch.ones(8), None, None, 1e-5, 8, torch.empty(5, 8))


def test_a_missing_triton_is_a_reason(monkeypatch):
    monkeypatch.setattr(triton, "_device_reason", lambda device: "")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    triton._missing.cache_clear()
    try:
        reasons = triton.why_not(dispatch.Request("add_relu", torch.device("cuda"), torch.float32, 8))
        assert reasons == ["triton is not installed (pip install triton)"]
    finally:
        triton._missing.cache_clear()
