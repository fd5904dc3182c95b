"""What this machine is and what it reaches: the processor by name, and rates measured with PyTorch's own operators."""

from __future__ import annotations

import functools
import os
import platform
import re
import time
from collections.abc import Callable
from pathlib import Path

import torch

#: Flags of /proc/cpuinfo worth knowing for these kernels, x86 first, then Arm.
_ISA = (
    "avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512_bf16", "avx512_fp16", "amx_tile",
    "amx_bf16", "amx_int8", "asimd", "asimdhp", "bf16", "sve", "sve2",
)  # fmt: skip


def cpu() -> dict:
    """Name, instruction sets and cores of the processor; an entry the system does not tell is empty."""
    name, flags = platform.processor() or platform.machine(), set()
    info = Path("/proc/cpuinfo")
    if info.exists():
        text = info.read_text()
        if match := re.search(r"^model name\s*:\s*(.+)$", text, re.M):
            name = match.group(1).strip()
        if match := re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.M):
            flags = set(match.group(1).split())
    return {
        "name": name,
        "architecture": platform.machine(),
        "isa": [flag for flag in _ISA if flag in flags],
        "cores": os.cpu_count() or 0,
        "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 0,
    }


def chip(device: torch.device) -> str:
    """Name of the processor or GPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu()["name"]


#: Side of the matrices and bytes of the buffers that rates are measured with, by device.
_SIDE = {"cpu": 1024, "cuda": 4096}
_BUFFER = {"cpu": 2**26, "cuda": 2**28}
_ROUNDS = 15


def _best(device: torch.device, call: Callable[[], object]) -> float:
    def wait():
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    seconds = []
    for _ in range(_ROUNDS):
        wait()
        begin = time.perf_counter()
        call()
        wait()
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


@functools.lru_cache(32)
def matmul_rate(device: torch.device, dtype: torch.dtype, threads: int) -> float:
    """FLOP/s of ``torch.mm`` on large square matrices, the best of a few: a peak that code has been seen to reach.

    ``threads`` is the number in force, ``torch.get_num_threads()``; it keys the memory of earlier measurements.
    """
    n = _SIDE.get(device.type, 1024)
    a, b = (torch.rand(n, n, device=device).to(dtype) for _ in range(2))
    out = torch.zeros(n, n, dtype=dtype, device=device)
    return 2 * n**3 / _best(device, lambda: torch.mm(a, b, out=out))


@functools.lru_cache(8)
def copy_rate(device: torch.device, threads: int) -> float:
    """Bytes/s read and written by copying a buffer of 64 MiB (256 MiB on a GPU), the best of a few."""
    size = _BUFFER.get(device.type, 2**26)
    source, target = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * size / _best(device, lambda: target.copy_(source))
