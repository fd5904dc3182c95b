"""One OpenMP runtime in the process: torch's. Two would oversubscribe the cores and may deadlock after a fork."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import kernel_cases
import pytest

MAPS = Path("/proc/self/maps")

SCRIPT = """
import re, torch, fastres
x = torch.randn(4, 64, 28, 28, requires_grad=True)
bn = fastres.BN(torch.ones(64), torch.zeros(64), torch.zeros(64), torch.ones(64), True)
with fastres.backend("cpu"):
    fastres.batch_norm_act(x.to(memory_format=torch.channels_last), bn).sum().backward()
mapped = {line.split()[-1] for line in open("/proc/self/maps")}
print("\\n".join(sorted(f for f in mapped if re.search(r"/lib(gomp|omp|iomp5)\\b[^/]*$", f))))
"""


@pytest.mark.skipif(not MAPS.is_file(), reason="/proc/self/maps is Linux's")
def test_one_openmp_runtime():
    reason = kernel_cases.absent("cpu")
    if reason:
        pytest.skip(f"backend 'cpu': {reason}")
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    runtimes = done.stdout.split()
    assert len(runtimes) == 1, f"OpenMP runtimes mapped after a cpu op: {runtimes}"


def test_the_extension_links_none():
    """The compiled core names no OpenMP library of its own (see csrc/cpu/parallel.h)."""
    reason = kernel_cases.absent("cpu")
    if reason:
        pytest.skip(f"backend 'cpu': {reason}")
    from fastres import _cpu

    binary = Path(_cpu.__file__).read_bytes()
    assert not [name for name in (b"libgomp", b"libomp.", b"libiomp") if name in binary]
