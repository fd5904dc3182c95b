"""The public ops on interpreted Triton kernels: the per-op files with ``--backends triton``, in a process of its own.

Triton decides when it is imported whether it compiles or interprets. The launch functions one by one are
test_triton_interpret.py's; here they work together, forward and backward, against PyTorch.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
FILES = ("add_relu", "batch_norm_act", "conv_bn_act", "basic_block", "bottleneck", "stem")


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_ops_on_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--backends", "triton"]
    command += ["-k", "triton and (against_pytorch or empty_batch or low_memory)"]
    # NumPy warns where lanes beyond C divide 0 by 0; their results are never stored.
    command += ["-W", "ignore:invalid value encountered:RuntimeWarning", *(f"test_{op}.py" for op in FILES)]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("TRITON_", "PYTEST_"))}
    done = subprocess.run(
        command,
        cwd=HERE,
        env=environment | {"TRITON_INTERPRET": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}"
    assert " passed" in done.stdout and "skipped" not in done.stdout, done.stdout
