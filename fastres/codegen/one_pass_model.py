"""When batch normalisation in one cooperative launch should pay: bytes and launches beside the separate kernels'."""

from __future__ import annotations

import dataclasses

from fastres.backends import one_pass
from fastres.codegen import calibration
from fastres.codegen.calibration import Chip

#: The GPUs of the model that a tensor can be fitted to: multiprocessors, shared memory (CUDA programming guide).
CHIPS = {
    "h100": one_pass.Chip("H100 80GB", 132, 227 * 1024, 228 * 1024),
    "a100-80": one_pass.Chip("A100 80GB", 108, 163 * 1024, 164 * 1024),
    "l4": one_pass.Chip("L4", 58, 99 * 1024, 100 * 1024),
}
#: Microseconds of a barrier over the grid, two a launch. Assumed, not measured.
BARRIER_US = 2.0
#: Reads and writes of the tensor: (separate, one launch, of them a second reading that L2 may serve, tensors kept).
UNITS = {"forward": (3, 2, 1, 1), "forward, residual": (4, 3, 1, 1), "backward": (5, 3, 2, 2)}
#: (C, H): the batch normalisations of ResNet-50's stages at 224 x 224.
LAYERS = ((64, 56), (256, 56), (128, 28), (512, 28), (256, 14), (1024, 14), (512, 7), (2048, 7))
BATCHES = (1, 8, 32, 64)


@dataclasses.dataclass(frozen=True)
class Times:
    """Microseconds, gaps between launches included. ``warm``: the second reading costs nothing, ``cold``: it comes
    from memory."""

    one: float
    warm: float
    cold: float


def times(case: str, nbytes: int, chip: Chip) -> Times:
    """Of one BN over a tensor of so many bytes."""
    separate, one, again, _ = UNITS[case]
    unit = nbytes / (chip.bandwidth * calibration.BANDWIDTH["fused"]) * 1e6
    launches = 3 * calibration.GAP_US + calibration.HELPER_US
    together = calibration.GAP_US + calibration.HELPER_US + 2 * BARRIER_US
    return Times(one * unit + together, (separate - again) * unit + launches, separate * unit + launches)


def table(case: str, name: str) -> tuple[list[str], list[list[str]]]:
    chip, rows = calibration.CHIPS[name], []
    for C, H in LAYERS:
        row = [f"{C} at {H} x {H}"]
        for batch in BATCHES:
            M = batch * H * H
            if not one_pass.tiles(M, C, 2, UNITS[case][3], CHIPS[name]):
                row.append("too large")
                continue
            t = times(case, 2 * M * C, chip)
            row.append(f"{t.one:.1f}: {t.warm / t.one:.2f}-{t.cold / t.one:.2f}x")
        rows.append(row)
    return ["layer", *(f"batch {batch}" for batch in BATCHES)], rows


def text(markdown) -> str:
    """The section of the page. ``markdown`` renders a header and rows."""
    parts = [
        f"""## Batch normalisation in one launch

`bn_one_pass_fwd` and `bn_one_pass_bwd` keep the tensor in shared memory: 2 units of traffic instead of 3 forward (3 of
4 with a residual), 3 instead of 5 backward, and one launch instead of three. Per layer, bf16: us in one launch, gaps
and two barriers over the grid ({BARRIER_US:g} us each, assumed) included, and by how much that is shorter than separate
launches: from where L2 serves their second reading (as it does for most of what fits) to where memory does. It pays
where launches cost: small tensors. Under CUDA graphs, which shorten the gaps, less than this. Nothing here was
measured; `gpu-check` stage `one-pass` measures it.
"""
    ]
    for name, chip in CHIPS.items():
        for case in ("forward", "backward"):
            parts.append(f"{case.capitalize()}, {chip.name}:\n\n{markdown(*table(case, name))}")
    return "\n".join(parts)
