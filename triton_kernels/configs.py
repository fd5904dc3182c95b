"""Tile shapes of every Triton kernel, and the rule that picks one: by kernel, element size and C alone.

Nothing is autotuned at run time: the same shapes give the same launches and the same order of summation, run
after run and on every GPU.

Every row is modelled, not measured: no GPU was at hand. The model is one sentence: memory-bound code needs
about 18 KB of loads in flight on each multiprocessor (H100: 3.35 TB/s x an assumed 0.7 us / 132), in 16-byte
accesses, with registers for at least 16 warps. docs/kernels/triton.md lists what the compiler made of each row.
"""

from __future__ import annotations

import dataclasses
import functools

# Programs of a reduction that should be in flight: about four 4-warp blocks on each of 108 (A100) to 148
# (B200) multiprocessors, and one number for all so that the partial sums do not depend on the GPU.
REDUCTION_PROGRAMS = 512
# A reduction tile below this many rows costs more in its merge than it gains in parallelism.
REDUCTION_MIN_ROWS = 64


@dataclasses.dataclass(frozen=True)
class Tile:
    """One row: ``BM`` rows by ``BC`` channels a step, for elements of ``itemsize`` bytes, with the reason.

    For a narrow or odd C the tile is adapted, see `pick`. ``BM * BC`` is at least 8 elements a thread, so that no
    element is loaded by two threads: that is what makes ``out is x`` and ``dx is grad`` safe.
    """

    kernel: str
    itemsize: int
    BM: int
    BC: int
    num_warps: int
    num_stages: int
    reason: str

    def __post_init__(self):
        for name in ("BM", "BC"):
            value = getattr(self, name)
            if value < 1 or value & (value - 1):
                raise ValueError(f"{self.kernel}: {name} must be a power of two, got {value}")
        if self.BC < 8:
            raise ValueError(f"{self.kernel}: BC must hold whole mask bytes (8 channels), got {self.BC}")
        if self.BM > 1 and self.elements < 8:
            raise ValueError(f"{self.kernel}: {self.BM} x {self.BC} is under 8 elements for each of the threads")

    @property
    def elements(self) -> int:
        """Elements of the tile held by one thread."""
        return self.BM * self.BC // (32 * self.num_warps)

    def grid(self, M: int, C: int) -> tuple[int]:
        """Programs that cover [M, C], channel blocks fastest (`tile.place`)."""
        return (blocks(M, self.BM) * blocks(C, self.BC),)

    def launch(self) -> dict[str, int]:
        return {"BM": self.BM, "BC": self.BC, "num_warps": self.num_warps, "num_stages": self.num_stages}


_EDGE_16 = "64 channels = one 128-byte line a row; 16 elements a thread = two 16-byte loads a tensor in flight"
_EDGE_32 = "64 channels = two 128-byte lines a row; 16 elements a thread = four 16-byte loads a tensor in flight"
_SUMS = "16 elements a thread: {} sums of 16 registers each leave 128 a thread, 16 warps a multiprocessor"

# num_stages is 1 throughout: there is no tl.dot to feed, and software pipelining would move plain loads
# through shared memory for nothing.
TABLE: tuple[Tile, ...] = (
    # Flat kernels: BM * BC consecutive elements.
    Tile("add_relu_fwd", 2, 32, 64, 4, 1, "16 elements a thread = two 16-byte loads from each input in flight"),
    Tile("add_relu_fwd", 4, 32, 64, 4, 1, "16 elements a thread = four 16-byte loads from each input in flight"),
    Tile("add_relu_bwd", 2, 32, 64, 4, 1, "16 elements a thread = two 16-byte loads and two mask bytes"),
    Tile("add_relu_bwd", 4, 32, 64, 4, 1, "16 elements a thread = four 16-byte loads and two mask bytes"),
    # One pass over rows.
    Tile("bn_apply", 2, 64, 64, 8, 1, _EDGE_16 + "; 64 rows share one read of the statistics"),
    Tile("bn_apply", 4, 32, 64, 4, 1, _EDGE_32),
    Tile("bn_bwd_apply", 2, 64, 64, 8, 1, _EDGE_16 + "; 64 rows share one read of the coefficients"),
    Tile("bn_bwd_apply", 4, 32, 64, 4, 1, _EDGE_32),
    Tile("bias_act", 2, 32, 64, 4, 1, _EDGE_16),
    Tile("bias_act", 4, 32, 64, 4, 1, _EDGE_32),
    Tile("mask_add", 2, 32, 64, 4, 1, _EDGE_16),
    Tile("mask_add", 4, 32, 64, 4, 1, _EDGE_32),
    # Reductions over the rows of a tile, BM rows a step.
    Tile("bn_stats", 2, 32, 64, 4, 1, _SUMS.format("two")),
    Tile("bn_stats", 4, 32, 64, 4, 1, _SUMS.format("two")),
    Tile("bn_bwd_reduce", 2, 32, 64, 4, 1, _SUMS.format("up to three")),
    Tile("bn_bwd_reduce", 4, 16, 64, 4, 1, "8 elements a thread: 16 would take 168 registers with a residual's BN"),
    # Merges: BM partial results of BC channels a step, in float64.
    Tile("bn_finalize", 4, 128, 8, 4, 1, "8 channels = one 32-byte sector; 128 tiles a step: 4 steps for 512 tiles"),
    Tile("bn_bwd_finalize", 4, 128, 8, 4, 1, "8 channels = one 32-byte sector; 128 tiles a step: 4 steps for 512"),
    Tile("bn_fold", 4, 1, 128, 4, 1, "one channel a thread: float64 roots and divisions want threads, not steps"),
    # Pooling: BM pooled pixels (forward, reduce) or input pixels (apply).
    Tile("stem_fwd", 2, 16, 64, 4, 1, "8 elements a thread = one 16-byte load a tap, a window row of them in flight"),
    Tile("stem_fwd", 4, 32, 64, 8, 1, "8 elements a thread = two 16-byte loads a tap; with 4 warps sm_100 spilled"),
    Tile("stem_bwd_reduce", 2, 16, 64, 4, 1, "8 gathered loads a thread in flight; their 64-bit addresses take 16"),
    Tile("stem_bwd_reduce", 4, 16, 64, 4, 1, "8 gathered loads a thread in flight; their 64-bit addresses take 16"),
    Tile("stem_bwd_apply", 2, 16, 64, 4, 1, "8 elements a thread: 16-byte gradients, 8-byte taps, four windows"),
    Tile("stem_bwd_apply", 4, 16, 64, 4, 1, "8 elements a thread: two 16-byte gradients, 8-byte taps, four windows"),
)

_ROWS = {(row.kernel, row.itemsize): row for row in TABLE}


@functools.cache
def _adapted(kernel: str, itemsize: int, C: int, aligned: bool) -> Tile:
    row = _ROWS[kernel, itemsize]
    BM, BC = row.BM, row.BC
    while BC > 8 and BC // 2 >= C:
        BM, BC = 2 * BM, BC // 2
    if not aligned and row.elements >= 16:
        BM //= 2
    return dataclasses.replace(row, BM=BM, BC=BC)


def pick(kernel: str, itemsize: int, C: int) -> Tile:
    """The tile of ``kernel`` for C channels.

    A narrow C halves BC and doubles BM: the same elements a thread. A C that is no multiple of 8 halves BM where
    8 elements a thread remain: element-wise access takes a 64-bit address for each element.
    """
    return _adapted(kernel, itemsize, C, C % 8 == 0)


def pick_flat(kernel: str, itemsize: int, n: int) -> Tile:
    """The tile of a flat kernel over n elements, ``BM * BC`` of them a program; halved as in `pick`."""
    return _adapted(kernel, itemsize, _ROWS[kernel, itemsize].BC, n % 8 == 0)


def blocks(C: int, BC: int) -> int:
    return -(-C // BC)


@functools.cache
def tiles(M: int, C: int) -> int:
    """Row tiles of a reduction over [M, C]: enough programs to fill a GPU, none under `REDUCTION_MIN_ROWS` rows."""
    columns = blocks(C, pick("bn_stats", 4, C).BC)
    return max(1, min(-(-REDUCTION_PROGRAMS // columns), -(-M // REDUCTION_MIN_ROWS)))
