"""Result rows: a number never travels without the machine, versions, baseline and command behind it."""

from __future__ import annotations

import datetime
import json
import math
import shlex
import sys
from pathlib import Path

import torch

from fastres import doctor

BASELINE = "eager"
#: The model that ``fuse(fold=True)`` makes, where "fastres" is a session.
FOLDED = "fastres, fold"

#: Ours may be this many times as far from float64 as eager in the same dtype, plus one rounding at the
#: scale of the output (the floor: eager may be exact by luck).
BUDGET_FACTOR = 2.0


def relative_l2(value: torch.Tensor, truth: torch.Tensor) -> float:
    """``||value - truth|| / ||truth||`` in float64; a NaN or infinity anywhere gives infinity."""
    value, truth = value.detach().double().flatten(), truth.detach().double().flatten()
    if value.shape != truth.shape:
        raise ValueError(f"value: got {value.numel()} elements, expected {truth.numel()}")
    error = (torch.linalg.vector_norm(value - truth) / torch.linalg.vector_norm(truth)).item()
    return error if math.isfinite(error) else math.inf


def within_budget(error: float, eager_error: float, dtype: torch.dtype) -> bool:
    """Whether an error against float64 is one that a user of PyTorch's own ``dtype`` accepts already."""
    return error <= BUDGET_FACTOR * eager_error + torch.finfo(dtype).eps


def provenance(command: str | None = None) -> dict:
    """Machine, versions, date and command of a row."""
    machine = {"cpu": doctor.cpu(), "gpus": doctor.gpus(), "threads": torch.get_num_threads()}
    built = doctor.extensions()
    return {
        "machine": machine,
        "versions": doctor.versions(),
        "extensions": {name: entry for name, entry in built.items() if entry["built"]},
        "settings": doctor.settings(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": command or shlex.join(["fastres", *sys.argv[1:]]),
    }


def is_ours(backend: str) -> bool:
    """Whether a contestant is one of fastres, and no peer."""
    return backend.startswith("fastres")


def compare(rows: list[dict]) -> None:
    """Fill ``ratio_to_eager`` and ``ratio_to_best_peer`` (above 1: faster) of each row, in place.

    A row outside the error budget gets no ratio, and no row is compared with such a peer: a wrong answer has no speed.
    """
    peers = [r for r in rows if not is_ours(r["backend"]) and r["within_budget"]]
    eager = next(r for r in rows if r["backend"] == BASELINE)
    best = min(peers, key=lambda r: r["median_ms"])
    for row in rows:
        honest = row["within_budget"]
        row["baseline"] = BASELINE
        row["best_peer"] = best["backend"]
        row["ratio_to_eager"] = eager["median_ms"] / row["median_ms"] if honest else None
        row["ratio_to_best_peer"] = best["median_ms"] / row["median_ms"] if honest else None


def write_json(path: Path | str, rows: list[dict]) -> Path:
    """Write the rows as one JSON list; the directory is made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows, indent=1, allow_nan=True) + "\n")
    return path


def caption(row: dict) -> str:
    """Machine, versions and date of a row on two lines, for a figure."""
    machine, versions = row["machine"], row["versions"]
    on_gpu = row["device"].startswith("cuda") and machine["gpus"]
    chip = machine["gpus"][0]["name"] if on_gpu else machine["cpu"]["name"]
    best = [flag for flag in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if flag in machine["cpu"]["isa"]][:1]
    detail = (
        f"CUDA {versions['cuda']}" if on_gpu else f"{machine['threads']} threads, {' '.join(best) or 'no SIMD flags'}"
    )
    return (
        f"{chip}, {detail}, torch {versions['torch']}, fastres {versions['fastres']}, Python {versions['python']}\n"
        f"{row['date'][:10]}: {row['command']}"
    )
