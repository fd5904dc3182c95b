"""What an evaluation bottleneck in one kernel moves and computes, and between which times it should lie."""

from __future__ import annotations

import dataclasses

from fastres.backends.block_kernels import TILE, BottleneckShape
from fastres.codegen import calibration
from fastres.codegen.calibration import Chip

_HALO, _ITEM = TILE + 2, 2  # csrc/cuda/bottleneck_eval.cuh; bytes of an element
#: Rows of pixels that a tile's products of conv2 and conv3 take: seven warps, two rows each of 16 pixels.
_ROWS = 7 * 2 * 16
#: Bytes a second from L2 to the multiprocessors, and the part of the chip's rate that mma.sync reaches: on sm_90 only
#: warpgroup products reach all of it. Assumed, not measured.
L2 = {"h100": 5.5e12, "a100-80": 4.0e12, "l4": 1.4e12}
MMA_SYNC = {"h100": 0.62}
#: (what, C, channels inside, K, H, projection): ResNet-50's blocks of stride 1 in the first two stages, batch 64.
LAYERS = (
    ("first of stage 1", 64, 64, 256, 56, True),
    ("first of a wide stage 1", 64, 128, 256, 56, True),
    ("stage 1", 256, 64, 256, 56, False),
    ("stage 2", 512, 128, 512, 28, False),
)
BATCH = 64


def _seen(side: int, halo: int = 1) -> int:
    """Pixels of one side that the tiles along it read, each with its halo and cut at the image."""
    tiles = -(-side // TILE)
    return sum(min(t * TILE + TILE + halo, side) - max(t * TILE - halo, 0) for t in range(tiles))


def tiles(s: BottleneckShape) -> int:
    return s.N * -(-s.H // TILE) * -(-s.W // TILE)


def memory_bytes(s: BottleneckShape) -> int:
    """What DRAM must move at least: x in, the output out, the weights and biases once."""
    activations = s.N * s.H * s.W * (s.C + s.K)
    return _ITEM * (activations + s.weights) + 4 * (2 * s.mid + s.K)


def loaded_bytes(s: BottleneckShape) -> int:
    """What reaches the multiprocessors through L2: x with every tile's halo, the weights for every tile, and x again
    for the shortcut (the projection's from L1, which is counted as if it were not there)."""
    pixels = s.N * s.H * s.W
    again = pixels * s.C * (s.K // 32 if s.projected else 1)
    return _ITEM * (s.N * _seen(s.H) * _seen(s.W) * s.C + tiles(s) * s.weights + again)


def flops(s: BottleneckShape) -> int:
    """What the tensor cores are given: the halo's part of conv1 and rows that are dropped included."""
    last = s.mid * s.K + s.C * s.K * s.projected
    return 2 * tiles(s) * (_HALO**2 * s.C * s.mid + _ROWS * (9 * s.mid**2 + last))


@dataclasses.dataclass(frozen=True)
class Times:
    """Microseconds: memory, L2 and products side by side; products after the longer of the others; the separate
    convolutions with fused epilogues."""

    overlapped: float
    serial: float
    separate: float


def times(s: BottleneckShape, name: str) -> Times:
    chip = calibration.CHIPS[name]
    l2 = loaded_bytes(s) + _ITEM * s.N * s.H * s.W * s.K
    return bounds(name, memory_bytes(s), l2, flops(s), separate(s, chip))


def bounds(name: str, memory: int, l2: int, work: int, apart: float) -> Times:
    """Of a kernel that moves so many bytes through DRAM and L2 and has so much work; ``apart``: seconds without it."""
    chip = calibration.CHIPS[name]
    moved = max(memory / chip.bandwidth, l2 / L2[name])
    computed = work / (chip.rate * MMA_SYNC.get(name, 1.0))
    return Times(max(moved, computed) * 1e6, (moved + computed) * 1e6, apart * 1e6)


def separate(s: BottleneckShape, chip: Chip) -> float:
    """Seconds of one kernel for each convolution, as the model of this page has it; no gaps between launches."""
    convs = [(s.C, s.mid, 1, 0), (s.mid, s.mid, 9, 0), (s.mid, s.K, 1, s.K)] + [(s.C, s.K, 1, 0)] * s.projected
    return convolutions(s.N * s.H * s.W, convs, chip)


def convolutions(pixels: int, convs, chip: Chip) -> float:
    """Seconds of convolutions of stride 1, each (inputs, outputs, taps, channels of the residual)."""
    total = 0.0
    for inputs, outputs, taps, residual in convs:
        load = _ITEM * (pixels * (inputs + outputs + residual) + inputs * outputs * taps) / chip.bandwidth
        rate = chip.rate * min(1.0, min(inputs, outputs) / calibration.FULL_WIDTH)
        compute = 2 * pixels * inputs * outputs * taps / rate
        total += max(load, compute) + calibration.EXPOSED * min(load, compute)
    return total


def text(markdown) -> str:
    """The section of the page. ``markdown`` renders a header and rows."""
    from fastres.backends.hopper_kernels import config_of
    from fastres.codegen import hopper_model

    parts = [
        f"""## Evaluation bottlenecks in one kernel

`bottleneck_eval` moves 8 units of Cm elements a pixel through DRAM, x in and the output out, where separate
convolutions with fused epilogues move 16. L2 gives more than that: x with a halo of one pixel round tiles of
{TILE} x {TILE}, the weights for every tile, x again for the shortcut. us at batch {BATCH}, bf16: between memory, L2 and
products side by side and products after the longer of the two; beside it the separate convolutions without launch gaps.
L2 at {", ".join(f"{v / 1e12:g} TB/s ({k})" for k, v in L2.items())} and mma.sync at {MMA_SYNC["h100"]:.0%} of an H100's
rate are assumed. Nothing here was measured; `gpu-check` stage `blocks` measures it, and the kernel serves only where it
was faster at first use.
"""
    ]
    rows = []
    for what, C, mid, K, side, projected in LAYERS:
        s = BottleneckShape(BATCH, side, side, C, mid, K, projected)
        for name in L2:
            t = times(s, name)
            gain = f"{t.separate / t.serial:.2f}-{t.separate / t.overlapped:.2f}x"
            units = _ITEM * s.N * s.H * s.W * s.mid
            cells = [
                what,
                calibration.CHIPS[name].name,
                f"{memory_bytes(s) / units:.2f}",
                f"{loaded_bytes(s) / units:.1f}",
            ]
            rows.append([*cells, f"{t.overlapped:.0f}-{t.serial:.0f}", f"{t.separate:.0f}", gain])
            if name == hopper_model.CHIP and config_of(s):
                rows.append(hopper_model.row(what, s, t.separate))
    head = ["block", "chip", "units, DRAM", "units, L2", "us, one kernel", "us, separate", "shorter by"]
    return "\n".join([*parts, markdown(head, rows), hopper_model.TEXT])
