"""What the bottleneck's version for sm_90 alone moves and computes (``csrc/cuda/bottleneck_hopper.cuh``), as
`block_model` has it for the portable one."""

from __future__ import annotations

from fastres.backends.block_kernels import BottleneckShape
from fastres.backends.hopper_kernels import HopperConfig, config_of
from fastres.codegen import block_model, calibration

CHIP, MULTIPROCESSORS = "h100", 132
_ITEM, _PRODUCT = 2, 64  # bytes of an element; rows of a warpgroup product
TEXT = """
sm_90a: tensor copies and warpgroup products, at all of the chip's rate. With 64 channels inside all weights stay in
shared memory, read once a multiprocessor, and each of two warpgroups has a tile of 8 x 16 pixels to itself; with 128
they come for every tile of 14 x 14. Rows of products that no pixel of the image needs are counted.
"""


def _seen(side: int, tile: int) -> int:
    """Pixels of one side that the tiles along it read, each with its halo and cut at the image."""
    return sum(min(t + tile + 1, side) - max(t - 1, 0) for t in range(0, side, tile))


def _config(s: BottleneckShape) -> HopperConfig:
    config = config_of(s)
    if config is None:
        raise ValueError(f"shape: no kernel for sm_90 serves {s}")
    return config


def tiles(s: BottleneckShape) -> int:
    height, width = _config(s).tile
    return s.N * -(-s.H // height) * -(-s.W // width)


def loaded_bytes(s: BottleneckShape, blocks: int = MULTIPROCESSORS) -> int:
    """What reaches the multiprocessors through L2: x with every tile's halo, x again for the shortcut (the projection's
    once, to registers), the weights for every block of threads where they stay, else for every tile."""
    config, pixels = _config(s), s.N * s.H * s.W
    weights = (min(blocks, tiles(s)) if config.resident else tiles(s)) * s.weights
    return _ITEM * (s.N * _seen(s.H, config.tile[0]) * _seen(s.W, config.tile[1]) * s.C + weights + pixels * s.C)


def flops(s: BottleneckShape) -> int:
    """What the tensor cores are given."""
    config = _config(s)
    halo = -(-config.halo[0] * config.halo[1] // _PRODUCT) * _PRODUCT
    out = 4 * _PRODUCT // config.tiles  # of each tile: both warpgroups have two products' rows
    last = s.mid * s.K + s.C * s.K * s.projected
    return 2 * tiles(s) * (halo * s.C * s.mid + out * (9 * s.mid**2 + last))


def times(s: BottleneckShape) -> tuple[float, float]:
    """Microseconds on an H100: memory, L2 and products side by side; products after the longer of the others."""
    chip = calibration.CHIPS[CHIP]
    l2 = loaded_bytes(s) + _ITEM * s.N * s.H * s.W * s.K
    moved = max(block_model.memory_bytes(s) / chip.bandwidth, l2 / block_model.L2[CHIP])
    computed = flops(s) / chip.rate
    return max(moved, computed) * 1e6, (moved + computed) * 1e6


def row(what: str, s: BottleneckShape, separate: float) -> list[str]:
    """The block's row of `block_model.text`; ``separate``: microseconds of the separate convolutions."""
    overlapped, serial = times(s)
    units = _ITEM * s.N * s.H * s.W * s.mid
    name = f"{calibration.CHIPS[CHIP].name}, sm_90a"
    return [what, name, f"{block_model.memory_bytes(s) / units:.2f}", f"{loaded_bytes(s) / units:.1f}",
            f"{overlapped:.0f}-{serial:.0f}", f"{separate:.0f}",
            f"{separate / serial:.2f}-{separate / overlapped:.2f}x"]  # fmt: skip
