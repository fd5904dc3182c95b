"""The evaluation bottleneck for sm_90 alone, beside the portable one of `block_kernels`: another packing of the
weights, other limits, the same interface. ``csrc/cuda/bottleneck_hopper.cuh``; needs tensor copies and warpgroup
products.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastres.backends import block_kernels, planes
from fastres.backends.block_kernels import BottleneckShape

#: csrc/cuda/hopper_pipeline.cuh: kPattern; bottleneck_hopper.cu: kSharedLimit, which leaves room for the barriers.
_PATTERN, _RESERVED = 512, 256


@dataclass(frozen=True)
class HopperConfig:
    """One compiled variant: a tile of ``tile`` output pixels and its ``halo`` (rows, columns), ``tiles`` of them at a
    time in a block; ``shared``: bytes of a block beside its weights; ``resident``: whether the weights stay there."""

    mid: int
    projected: bool
    tile: tuple[int, int]
    tiles: int
    shared: int
    resident: bool

    @property
    def halo(self) -> tuple[int, int]:
        return self.tile[0] + 2, self.tile[1] + 2

    def bytes(self, shape: BottleneckShape) -> int:
        """Dynamic shared memory of a block."""
        return _PATTERN + self.shared + 2 * shape.weights * self.resident


#: csrc/cuda/hopper_pipeline.cuh: Narrow, Wide.
HOPPERS = (
    HopperConfig(64, False, (8, 16), 2, 83456, True),
    HopperConfig(64, True, (8, 16), 2, 83456, True),
    HopperConfig(128, False, (14, 14), 1, 221696, False),
)


def config_of(shape: BottleneckShape) -> HopperConfig | None:
    return next((c for c in HOPPERS if (c.mid, c.projected) == (shape.mid, shape.projected)), None)


def why_not(shape: BottleneckShape, dtype: torch.dtype, chip) -> list[str]:
    """Reasons why the version for sm_90 does not serve ``shape``, beside those of the portable one."""
    reasons = []
    config = config_of(shape)
    if config is None:
        served = ", ".join(f"{c.mid}{' with a projection' * c.projected}" for c in HOPPERS)
        got = f"{shape.mid}{' with a projection' * shape.projected}"
        reasons.append(f"{served} channels inside are served, not {got}")
    elif config.bytes(shape) > chip.shared_per_block - _RESERVED:
        limit = chip.shared_per_block - _RESERVED
        reasons.append(f"tile and weights take {config.bytes(shape)} bytes of shared memory, {limit} are left")
    if config is not None and shape.N * -(-shape.H // config.tile[0]) * -(-shape.W // config.tile[1]) >= 2**30:
        reasons.append("there must be fewer than 2**30 tiles")
    return reasons


class Hopper(block_kernels.Launcher):
    """A backend of `block_kernels` whose ``bottleneck_eval`` takes weights of ``planes.bottleneck``."""

    pack_bottleneck = staticmethod(planes.bottleneck)
    version = "sm_90a"

    def __init__(self, kernels):
        self._kernels = kernels

    def __getattr__(self, name: str):
        return getattr(self._kernels, name)

    def why_not_bottleneck(self, device: torch.device, dtype: torch.dtype, shape: BottleneckShape) -> list[str]:
        """Reasons why the block cannot be one kernel here; empty if it can."""
        reasons = super().why_not_bottleneck(device, dtype, shape)
        if reasons:
            return reasons
        other = self.not_hopper(device)
        return [other] if other else why_not(shape, dtype, self.chip(device))

    def invoke(self, fn: str, device: torch.device, *args) -> None:
        self._kernels.invoke({"bottleneck_eval": "bottleneck_hopper"}[fn], device, *args)
