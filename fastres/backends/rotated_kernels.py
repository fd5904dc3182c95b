"""The rotated unit of a stage of bottlenecks in one kernel: which shapes are served, in which tiles, and the launch.

Mixed into the backends whose module has the kernels of ``csrc/cuda/rotated_stage.cuh``.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from fastres.backends import block_kernels, native
from fastres.backends.conv_checks import activation, overlap


@dataclass(frozen=True)
class RotatedShape:
    """h ``[N, mid, H, W]``, residual and out ``[N, K, H, W]``; ``next``: the next block's first convolution too."""

    N: int
    H: int
    W: int
    mid: int
    K: int
    next: bool

    def __str__(self) -> str:
        last = f" -> {self.mid}" if self.next else ""
        return f"rotated unit {self.N}x{self.mid}x{self.H}x{self.W} -> {self.K}{last}"

    @property
    def weights(self) -> int:
        """Elements of the packed weights."""
        return 9 * self.mid**2 + (1 + self.next) * self.mid * self.K

    @property
    def biases(self) -> int:
        return (1 + self.next) * self.mid + self.K

    @property
    def tile(self) -> tuple[int, int]:
        """Output pixels of a tile: rows, columns."""
        return tile(self.H, self.W, self.mid)

    @property
    def tiles(self) -> int:
        th, tw = self.tile
        return self.N * -(-self.H // th) * -(-self.W // tw)


@dataclass(frozen=True)
class RotatedConfig:
    """One compiled variant. ``pixels`` of a tile and ``halo`` pixels in shared memory, at most; ``shared``: bytes of a
    block; ``blocks``: of them on one multiprocessor."""

    mid: int
    next: bool
    pixels: int
    halo: int
    shared: int
    blocks: int


#: csrc/cuda/rotated_stage.cuh: kTilePixels, kTileHalo, kRotatedShared.
ROTATED = tuple(
    RotatedConfig(mid, next, pixels, halo, shared, 1)
    for mid, pixels, halo, shared in ((64, 256, 340, 73536), (128, 128, 204, 80064))
    for next in (False, True)
)
_WIDTHS = range(8, 257, 8)


def rotated_config(shape: RotatedShape) -> RotatedConfig | None:
    return next((c for c in ROTATED if (c.mid, c.next) == (shape.mid, shape.next)), None)


@functools.lru_cache(maxsize=1024)
def tile(H: int, W: int, mid: int) -> tuple[int, int]:
    """(rows, columns) of which an image has the fewest, and of those the ones that read the least halo."""
    config = next(c for c in ROTATED if c.mid == mid)
    best = None
    for columns in _WIDTHS:
        rows = min(config.pixels // columns, config.halo // (columns + 2) - 2, 256)
        if rows < 1:
            break
        down = max(1, -(-H // rows))
        rows = max(1, -(-H // down))  # as many tiles, of equal height
        cost = (down * -(-W // columns), (rows + 2) * (columns + 2))
        if best is None or cost < best[0]:
            best = cost, (rows, columns)
    return best[1]


def why_not_rotated(shape: RotatedShape, dtype: torch.dtype, chip) -> list[str]:
    """Reasons why no kernel serves ``shape``; ``chip`` is a ``fastres.backends.one_pass.Chip``."""
    reasons = []
    if dtype not in block_kernels._DTYPES:
        reasons.append(f"bfloat16 and float16 are served, not {str(dtype).removeprefix('torch.')}")
    config = rotated_config(shape)
    if config is None:
        served = " and ".join(str(mid) for mid in dict.fromkeys(c.mid for c in ROTATED))
        reasons.append(f"{served} channels inside are served, not {shape.mid}")
    elif config.shared > chip.shared_per_block:
        reasons.append(f"{config.shared} bytes of shared memory are needed, {chip.name} has {chip.shared_per_block}")
    if shape.K % 64 or not shape.K:
        reasons.append(f"multiples of 64 channels are served, not {shape.K}")
    if max(shape.N, shape.H, shape.W) >= 2**20 or shape.H * shape.W * max(shape.mid, shape.K) >= block_kernels._LIMIT:
        reasons.append("an image must have fewer than 2**31 elements, and no side 2**20 or more")
    elif config is not None and shape.tiles >= 2**30:
        reasons.append("there must be fewer than 2**30 tiles")
    return reasons


class Launcher:
    """`why_not_rotated` and the launch function."""

    def why_not_rotated(self, device: torch.device, dtype: torch.dtype, shape: RotatedShape) -> list[str]:
        """Reasons why the rotated unit cannot be one kernel here; empty if it can."""
        reasons = [reason for reason in (self.missing, self._device_reason(device)) if reason]
        return reasons or why_not_rotated(shape, dtype, self.chip(device))

    def why_not_run(self, device: torch.device, dtype: torch.dtype, run) -> list[str]:
        """Reasons why a ``fastres.rotated.RunShape`` cannot be a kernel for each block here; empty if it can."""
        return self.why_not_rotated(device, dtype, run.unit)

    def rotated_stage(self, h, residual, weights, bias, out, next=None) -> None:
        """``out`` ``[N, K, H, W]`` and, unless it is None, ``next`` ``[N, mid, H, W]`` of h ``[N, mid, H, W]`` and
        residual ``[N, K, H, W]``, all channels_last; see ``csrc/cuda/launch_cuda.h``.

        ``weights``: of ``fragments.rotated``. ``bias``: float32 ``[mid + K]``, with ``next`` ``[2 * mid + K]``.
        Everything at multiples of 16 bytes. Raises TypeError or ValueError naming the argument before anything is
        written.
        """
        fn = "rotated_stage"
        a: native.Arguments = self._args(fn, "h", h)
        for name, t in (("h", h), ("out", out)):
            if not isinstance(t, torch.Tensor) or t.dim() != 4:
                raise ValueError(f"{fn}: {name} must have four dimensions, got {getattr(t, 'shape', type(t).__name__)}")
        N, mid, H, W = h.shape
        shape = RotatedShape(N, H, W, mid, out.shape[1], next is not None)
        reasons = self.why_not_rotated(h.device, h.dtype, shape)
        if reasons:
            raise ValueError(f"{fn}: {shape} is not served: {'; '.join(reasons)}")
        activation(fn, "h", h, h, h.shape, self.name)
        activation(fn, "residual", residual, h, (N, shape.K, H, W), self.name)
        activation(fn, "out", out, h, (N, shape.K, H, W), self.name)
        if next is not None:
            activation(fn, "next", next, h, h.shape, self.name)
        block_kernels.check_packed(fn, h, (("weights", weights, h.dtype, shape.weights),
                                           ("bias", bias, torch.float32, shape.biases)))  # fmt: skip
        written = [("out", out)] + [("next", next)] * (next is not None)
        read = (h, residual, weights, bias)
        for i, (name, t) in enumerate(written):
            if any(overlap(t, other) for other in (*read, *(w for _, w in written[:i]))):
                raise ValueError(f"{fn}: {name} must not overlap another argument in memory")
        if out.numel():
            pointers = [0 if t is None else t.data_ptr() for t in (weights, bias, out, next)]
            sizes = (N, H, W, mid, shape.K, *shape.tile)
            self.invoke(fn, a.device, a.code, h.data_ptr(), residual.data_ptr(), *sizes, *pointers)
