"""The same as ``block_model`` for basic blocks and stems: what one kernel moves and computes, and how long it takes."""

from __future__ import annotations

from fastres.backends.eval_kernels import POOLED, TILE, BasicBlockShape, StemShape
from fastres.codegen import block_model, calibration
from fastres.codegen.block_model import _ITEM, BATCH, Times, _seen
from fastres.codegen.calibration import Chip

#: Pixels that a tile's products take, conv1 on the halo and conv2 by seven warps; of the stem's convolution eight.
_ROWS = (TILE + 2) ** 2 + 7 * 2 * 16
_STEM_ROWS = 8 * 2 * 16
#: A side of the image that a tile of pooled pixels reads: csrc/cuda/stem_eval.cuh, kPatch.
_PATCH = 2 * (2 * POOLED + 1) + 5
LAYERS = (
    ("ResNet-18/34, stage 1", BasicBlockShape(BATCH, 56, 56, 64)),
    ("ResNet-18/34, stage 2", BasicBlockShape(BATCH, 28, 28, 128)),
    ("stem", StemShape(BATCH, 224, 224)),
)


def tiles(s: BasicBlockShape | StemShape) -> int:
    side, (h, w) = (TILE, (s.H, s.W)) if isinstance(s, BasicBlockShape) else (POOLED, (s.P, s.Q))
    return s.N * -(-h // side) * -(-w // side)


def output_bytes(s: BasicBlockShape | StemShape) -> int:
    return _ITEM * s.N * (s.H * s.W * s.C if isinstance(s, BasicBlockShape) else s.P * s.Q * s.K)


def memory_bytes(s: BasicBlockShape | StemShape) -> int:
    """What DRAM must move at least: x in, the output out, the weights and biases once."""
    C, bias = (s.C, 2 * s.C) if isinstance(s, BasicBlockShape) else (3, s.K)
    return _ITEM * (s.N * s.H * s.W * C + s.weights) + 4 * bias + output_bytes(s)


def loaded_bytes(s: BasicBlockShape | StemShape, blocks: int = 0) -> int:
    """What reaches the multiprocessors through L2: x with every tile's halo, and of a basic block the weights for every
    tile and x again for the shortcut; of a stem the weights for each of so many ``blocks`` of threads."""
    if isinstance(s, BasicBlockShape):
        seen = s.N * _seen(s.H, 2) * _seen(s.W, 2) * s.C
        return _ITEM * (seen + tiles(s) * s.weights + s.N * s.H * s.W * s.C)
    return _ITEM * (3 * s.N * _patches(s.H, s.P) * _patches(s.W, s.Q) + blocks * s.weights)


def _patches(side: int, pooled: int) -> int:
    starts = [4 * first - 5 for first in range(0, pooled, POOLED)]
    return sum(min(start + _PATCH, side) - max(start, 0) for start in starts)


def flops(s: BasicBlockShape | StemShape) -> int:
    """What the tensor cores are given: halo, padding along k and rows that are dropped included."""
    if isinstance(s, BasicBlockShape):
        return 2 * tiles(s) * _ROWS * 9 * s.C**2
    return 2 * tiles(s) * _STEM_ROWS * s.weights


def separate(s: BasicBlockShape | StemShape, chip: Chip) -> float:
    """Seconds of one kernel for each convolution and the pooling, as the model of this page has them."""
    if isinstance(s, BasicBlockShape):
        return block_model.convolutions(s.N * s.H * s.W, [(s.C, s.C, 9, 0), (s.C, s.C, 9, s.C)], chip)
    pixels = s.N * -(-s.H // 2) * -(-s.W // 2)
    between = _ITEM * pixels * s.K
    load = (_ITEM * s.N * s.H * s.W * 3 + between) / chip.bandwidth
    compute = 2 * pixels * 147 * s.K / (chip.rate * calibration.STEM_RATE)
    pool = (between + output_bytes(s)) / (chip.bandwidth * calibration.BANDWIDTH["pool"])
    return max(load, compute) + calibration.EXPOSED * min(load, compute) + pool


def times(s: BasicBlockShape | StemShape, name: str) -> Times:
    l2 = loaded_bytes(s) + output_bytes(s)
    return block_model.bounds(name, memory_bytes(s), l2, flops(s), separate(s, calibration.CHIPS[name]))


def text(markdown) -> str:
    """The section of the page. ``markdown`` renders a header and rows."""
    rows = []
    for what, s in LAYERS:
        unit = _ITEM * s.N * s.H * s.W * s.C if isinstance(s, BasicBlockShape) else output_bytes(s)
        for name in block_model.L2:
            t = times(s, name)
            gain = f"{t.separate / t.serial:.2f}-{t.separate / t.overlapped:.2f}x"
            units = [f"{v / unit:.2f}" for v in (memory_bytes(s), loaded_bytes(s))]
            cells = [what, calibration.CHIPS[name].name, *units, f"{flops(s) / 1e9:.1f}"]
            rows.append([*cells, f"{t.overlapped:.0f}-{t.serial:.0f}", f"{t.separate:.0f}", gain])
    head = ["block", "chip", "units, DRAM", "units, L2", "GFLOP", "us, one kernel", "us, separate", "shorter by"]
    return f"""## Evaluation basic blocks and stems in one kernel

`basic_block_eval` moves 2 units of C elements a pixel through DRAM where two convolutions with fused epilogues move 5;
`stem_eval` reads the image and writes what the pooling leaves, one unit, where a convolution and a pooling write and
read four units more each. Assumptions and columns as above. Of the stem's separate calls the convolution's rate and the
pooling's bandwidth are those of PyTorch on an H100, the constants of this page. Both multiply more than the separate
calls (halo, 14 of 16 rows of a product used, padding along k): where products bound the time, as of the basic block on
an H100, there may be nothing to gain, and the automatic choice then leaves it to the convolutions.

{markdown(head, rows)}"""
