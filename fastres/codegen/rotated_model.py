"""What the rotated unit of a stage moves and computes, beside a whole block in one kernel and separate convolutions."""

from __future__ import annotations

from fastres.backends.block_kernels import BottleneckShape
from fastres.backends.rotated_kernels import RotatedShape, rotated_config
from fastres.codegen import block_model, calibration
from fastres.codegen.block_model import L2, MMA_SYNC, Times

_ITEM = 2  # bytes of an element
#: (what, channels inside, H): identity blocks of ResNet-50's first two stages.
LAYERS = (("stage 1", 64, 56), ("stage 2", 128, 28))


def _seen(side: int, tile: int) -> int:
    """Pixels of one side that the tiles along it read, each with its halo and cut at the image."""
    return sum(min(at + tile + 1, side) - max(at - 1, 0) for at in range(0, side, tile))


def memory_bytes(s: RotatedShape) -> int:
    """What DRAM must move at least: h, the residual, out and next; the weights and biases once."""
    activations = s.N * s.H * s.W * (s.mid + 2 * s.K + s.mid * s.next)
    return _ITEM * (activations + s.weights) + 4 * s.biases


def loaded_bytes(s: RotatedShape) -> int:
    """What reaches the multiprocessors through L2: h with the tiles' halo, the weights for every tile, the residual."""
    rows, columns = s.tile
    halo = s.N * _seen(s.H, rows) * _seen(s.W, columns) * s.mid
    return _ITEM * (halo + s.tiles * s.weights + s.N * s.H * s.W * s.K)


def flops(s: RotatedShape) -> int:
    """What the tensor cores are given: rows of products that no pixel of the tile has included."""
    rows = rotated_config(s).pixels // 8  # a warp's
    given = -(-s.tile[0] * s.tile[1] // rows) * rows
    return 2 * s.tiles * given * s.weights


def times(s: RotatedShape, name: str) -> Times:
    """Of one unit; separate: of the convolutions that it replaces, a block's without gaps."""
    chip = calibration.CHIPS[name]
    l2 = loaded_bytes(s) + _ITEM * s.N * s.H * s.W * (s.K + s.mid * s.next)
    moved = max(memory_bytes(s) / chip.bandwidth, l2 / L2[name])
    computed = flops(s) / (chip.rate * MMA_SYNC.get(name, 1.0))
    separate = block_model.separate(_block(s), chip)
    return Times(max(moved, computed) * 1e6, (moved + computed) * 1e6, separate * 1e6)


def _block(s: RotatedShape) -> BottleneckShape:
    return BottleneckShape(s.N, s.H, s.W, s.K, s.mid, s.K, False)


def text(markdown) -> str:
    """The section of the page. ``markdown`` renders a header and rows."""
    head = f"""## Evaluation stages as rotated units

`rotated_stage` computes conv2, conv3 and the shortcut of one block and conv1 of the next: 1 unit of Cm elements a pixel
and the shortcut's 4 in, 4 and 1 out, 10 in all where separate convolutions move 16 and the whole block in one kernel 8.
Only the narrow tensor has a halo, and no product is computed twice. L2 gives h with its halo, the weights for every
tile and the shortcut. us for one identity block at batch {block_model.BATCH}, bf16, under the assumptions of
the bottlenecks in one kernel: between everything side by side and products after the rest. Nothing here was measured;
which of the three serves is measured at first use.
"""
    rows = []
    for what, mid, side in LAYERS:
        s = RotatedShape(block_model.BATCH, side, side, mid, 4 * mid, True)
        for name in L2:
            t, whole = times(s, name), block_model.times(_block(s), name)
            units = _ITEM * s.N * s.H * s.W * s.mid
            gain = f"{t.separate / t.serial:.2f}-{t.separate / t.overlapped:.2f}x"
            rows.append([what, calibration.CHIPS[name].name, f"{memory_bytes(s) / units:.2f}",
                         f"{loaded_bytes(s) / units:.1f}", f"{t.overlapped:.0f}-{t.serial:.0f}",
                         f"{whole.overlapped:.0f}-{whole.serial:.0f}", f"{t.separate:.0f}", gain])  # fmt: skip
    columns = ["block", "chip", "units, DRAM", "units, L2", "us, rotated", "us, whole block", "us, separate",
               "rotated shorter than separate by"]  # fmt: skip
    return "\n".join([head, markdown(columns, rows)])
