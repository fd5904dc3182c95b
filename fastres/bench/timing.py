"""Turn-taking timing: every variant meets the same drift of the machine. And a device's own time, caches cold."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import torch

QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)
MIN_RUNS = 3
# Below this a call profits from what the previous call of the same variant left in the caches, so the
# first call of a turn is not counted; a longer call sweeps the caches by itself.
SHORT_S = 0.1
#: Larger than the L2 of any GPU in sight: what it writes pushes everything else out.
FLUSH_BYTES = 2**28
#: One flush takes at least this long: no memory in sight is written at more than 5 TB/s.
SWEEP_S = FLUSH_BYTES / 5e12
MOST_SWEEPS = 100


def quantile(values: Sequence[float], q: float) -> float:
    """Linear interpolation between order statistics, ``0 <= q <= 1``."""
    if not values:
        raise ValueError("values: got an empty sequence, expected at least one timing")
    ordered = sorted(values)
    place = q * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def take_turns(
    variants: Mapping[str, Callable[[], object]],
    seconds: float,
    *,
    synchronize: Callable[[], None] = lambda: None,
    on_round: Callable[[float], None] = lambda fraction: None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Wall time in seconds of each call, variants alternating until ``seconds`` have passed.

    Every variant runs at least ``MIN_RUNS`` times and all run equally often. ``synchronize`` waits for
    the device and is part of the measured time; ``on_round`` hears which fraction of the time is used.
    """
    times: dict[str, list[float]] = {name: [] for name in variants}
    start = clock()
    while True:
        for name, call in variants.items():
            synchronize()
            begin = clock()
            call()
            synchronize()
            first = clock() - begin
            if first >= SHORT_S:
                times[name].append(first)
                continue
            for _ in range(2):
                begin = clock()
                call()
                synchronize()
                times[name].append(clock() - begin)
        used = clock() - start
        on_round(min(1.0, used / seconds) if seconds > 0 else 1.0)
        if used >= seconds and min(len(t) for t in times.values()) >= MIN_RUNS:
            return times


def summary(times: Sequence[float]) -> dict:
    """Median, quantiles and count of one variant, in milliseconds."""
    return {
        "median_ms": quantile(times, 0.5) * 1e3,
        "quantiles_ms": {f"p{round(q * 100)}": quantile(times, q) * 1e3 for q in QUANTILES},
        "runs": len(times),
    }


def device_times(call: Callable[[], object], device: torch.device, runs: int, warmup: int = 3) -> list[float]:
    """Seconds of each run, the caches of a GPU flushed before it; on a GPU by events, host time not included.

    The flush is repeated until it takes the GPU longer than the host takes to queue the launches of a run behind it.
    """
    for _ in range(warmup):
        call()
    if device.type != "cuda":
        times = []
        for _ in range(runs):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        return times
    trash = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    sweeps = min(MOST_SWEEPS, 1 + int((time.perf_counter() - start) / SWEEP_S))
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(runs)]
    for before, after in marks:
        for _ in range(sweeps):
            trash.zero_()
        before.record()
        call()
        after.record()
    torch.cuda.synchronize(device)
    return [before.elapsed_time(after) / 1e3 for before, after in marks]
