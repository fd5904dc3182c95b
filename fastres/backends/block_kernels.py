"""Residual blocks of an evaluation in one kernel each: which shapes are served, and the checked launch functions.

Mixed into the backends whose module has the kernels of ``csrc/cuda/bottleneck_eval.cuh``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from fastres.backends import fragments, native
from fastres.backends.conv_checks import activation, overlap


@dataclass(frozen=True)
class BottleneckShape:
    """x ``[N, C, H, W]``, ``mid`` channels inside, out ``[N, K, H, W]``; ``projected``: a 1x1 convolution shortcut."""

    op: ClassVar[str] = "bottleneck"

    N: int
    H: int
    W: int
    C: int
    mid: int
    K: int
    projected: bool

    def __str__(self) -> str:
        shortcut = "a projection" if self.projected else "an identity"
        return f"bottleneck {self.N}x{self.C}x{self.H}x{self.W} -> {self.mid} -> {self.K} with {shortcut}"

    @property
    def weights(self) -> int:
        """Elements of the packed weights."""
        beside = -(-self.C // self.mid) * self.mid * self.K * self.projected
        return self.C * self.mid + 9 * self.mid**2 + self.mid * self.K + beside


@dataclass(frozen=True)
class BottleneckConfig:
    """One compiled variant. ``shared``: bytes of a block; ``blocks``: of them on one multiprocessor."""

    mid: int
    projected: bool
    shared: int
    blocks: int


#: Output pixels of a tile, a side; csrc/cuda/bottleneck_eval.cuh: kTile, kSharedBytes, kBlocksEach.
TILE = 14
BOTTLENECKS = (
    BottleneckConfig(64, False, 61440, 2),
    BottleneckConfig(64, True, 61440, 2),
    BottleneckConfig(128, False, 94208, 1),
    BottleneckConfig(128, True, 94208, 1),
)
_DTYPES = (torch.bfloat16, torch.float16)
_LIMIT = 2**31


def bottleneck_config(shape: BottleneckShape) -> BottleneckConfig | None:
    return next((c for c in BOTTLENECKS if (c.mid, c.projected) == (shape.mid, shape.projected)), None)


def why_not_bottleneck(shape: BottleneckShape, dtype: torch.dtype, chip) -> list[str]:
    """Reasons why no kernel serves ``shape``; ``chip`` is a ``fastres.backends.one_pass.Chip``."""
    reasons = []
    if dtype not in _DTYPES:
        reasons.append(f"bfloat16 and float16 are served, not {str(dtype).removeprefix('torch.')}")
    config = bottleneck_config(shape)
    if config is None:
        served = " and ".join(str(mid) for mid in dict.fromkeys(c.mid for c in BOTTLENECKS))
        reasons.append(f"{served} channels inside are served, not {shape.mid}")
    elif config.shared > chip.shared_per_block:
        reasons.append(f"{config.shared} bytes of shared memory are needed, {chip.name} has {chip.shared_per_block}")
    if shape.C % 64 or shape.K % 64 or not shape.C or not shape.K:
        reasons.append(f"multiples of 64 channels are served, not {shape.C} to {shape.K}")
    if shape.projected and shape.mid == 64 and shape.C != 64:
        reasons.append(f"with 64 channels inside a projection is served from 64 channels, not from {shape.C}")
    if max(shape.N, shape.H, shape.W) >= 2**20 or shape.H * shape.W * max(shape.C, shape.K) >= _LIMIT:
        reasons.append("an image must have fewer than 2**31 elements, and no side 2**20 or more")
    if shape.N * -(-shape.H // TILE) * -(-shape.W // TILE) >= 2**30:
        reasons.append("there must be fewer than 2**30 tiles")
    return reasons


class Launcher:
    """`why_not_bottleneck` and the launch functions."""

    #: What packs the weights for `bottleneck_eval`.
    pack_bottleneck = staticmethod(fragments.bottleneck)

    def why_not_bottleneck(self, device: torch.device, dtype: torch.dtype, shape: BottleneckShape) -> list[str]:
        """Reasons why the block cannot be one kernel here; empty if it can."""
        reasons = [reason for reason in (self.missing, self._device_reason(device)) if reason]
        return reasons or why_not_bottleneck(shape, dtype, self.chip(device))

    def bottleneck_eval(self, x, weights, bias, mid: int, projected: bool, out) -> None:
        """``out`` ``[N, K, H, W]`` of x ``[N, C, H, W]``, both channels_last; see ``csrc/cuda/launch_cuda.h``.

        ``weights``: of `pack_bottleneck`. ``bias``: float32 ``[2 * mid + K]``. Everything at multiples of 16
        bytes. Raises TypeError or ValueError naming the argument before anything is written.
        """
        fn = "bottleneck_eval"
        a: native.Arguments = self._args(fn, "x", x)
        for name, t in (("x", x), ("out", out)):
            if not isinstance(t, torch.Tensor) or t.dim() != 4:
                raise ValueError(f"{fn}: {name} must have four dimensions, got {getattr(t, 'shape', type(t).__name__)}")
        N, C, H, W = x.shape
        shape = BottleneckShape(N, H, W, C, mid, out.shape[1], native._flag(fn, "projected", projected) == 1)
        reasons = self.why_not_bottleneck(x.device, x.dtype, shape)
        if reasons:
            raise ValueError(f"{fn}: {shape} is not served: {'; '.join(reasons)}")
        if not projected and shape.K != C:
            raise ValueError(f"{fn}: out must have the {C} channels of x without a projection, got {shape.K}")
        activation(fn, "x", x, x, x.shape, self.name)
        activation(fn, "out", out, x, (N, shape.K, H, W), self.name)
        check_packed(fn, x, (("weights", weights, x.dtype, shape.weights),
                             ("bias", bias, torch.float32, 2 * mid + shape.K)))  # fmt: skip
        check_apart(fn, out, x, weights, bias)
        pointers = [t.data_ptr() or 0 for t in (x, weights, bias, out)]
        if out.numel():
            self.invoke(fn, a.device, a.code, pointers[0], N, H, W, C, mid, shape.K, int(projected), *pointers[1:])


def check_packed(fn: str, x: torch.Tensor, arrays) -> None:
    """Raises unless each ``(name, tensor, dtype, elements)`` is a flat aligned array beside ``x``."""
    for name, t, dtype, n in arrays:
        if not isinstance(t, torch.Tensor):
            raise TypeError(f"{fn}: {name} must be a tensor, got {type(t).__name__}")
        if t.dtype is not dtype or t.device != x.device or t.shape != (n,) or not t.is_contiguous():
            got = f"{t.dtype} {list(t.shape)} on {t.device}"
            raise ValueError(f"{fn}: {name} must be contiguous {dtype} [{n}] on {x.device}, got {got}")
        if t.data_ptr() % 16:
            raise ValueError(f"{fn}: {name} must be aligned to 16 bytes, got {t.data_ptr():#x}")


def check_apart(fn: str, out: torch.Tensor, x: torch.Tensor, weights: torch.Tensor, bias: torch.Tensor) -> None:
    """Raises where ``out`` shares memory with an input."""
    if any(overlap(t, out) for t in (x, weights, bias)):
        raise ValueError(f"{fn}: out must not overlap x, weights or bias in memory")
