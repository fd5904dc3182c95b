"""The Triton convolutions without a GPU, alone and in the block engine: on Triton's CPU interpreter, in a process of
their own."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed: its kernels cannot be interpreted"
)
@pytest.mark.parametrize("cases", ["triton_conv_cases.py", "triton_engine_cases.py"])
def test_convolutions_on_the_interpreter(cases):
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(HERE / cases)]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("TRITON_", "PYTEST_"))}
    done = subprocess.run(
        command,
        cwd=HERE,
        # One thread: the tensors are tiny, and threads of this process and that one would fight over the cores.
        env=environment | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}"
    assert " passed" in done.stdout and "skipped" not in done.stdout, done.stdout
