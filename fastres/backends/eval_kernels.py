"""Basic blocks and stems of an evaluation in one kernel each: which shapes are served, the checked launch functions.

Mixed into the backends whose module has ``csrc/cuda/basic_block_eval.cuh`` and ``stem_eval.cuh``; the bottleneck's are
in ``block_kernels.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from fastres.backends import native
from fastres.backends.block_kernels import check_apart, check_packed
from fastres.backends.conv_checks import activation

_DTYPES = (torch.bfloat16, torch.float16)
_LIMIT = 2**31


@dataclass(frozen=True)
class BasicBlockShape:
    """x and out ``[N, C, H, W]``: two 3x3 convolutions of stride 1 and the identity."""

    op: ClassVar[str] = "basic_block"

    N: int
    H: int
    W: int
    C: int

    def __str__(self) -> str:
        return f"basic block {self.N}x{self.C}x{self.H}x{self.W} with an identity"

    @property
    def weights(self) -> int:
        """Elements of the packed weights."""
        return 18 * self.C**2


@dataclass(frozen=True)
class StemShape:
    """x ``[N, 3, H, W]``, 7x7 convolution of stride 2, out ``[N, 64, P, Q]`` after 3x3 max pooling of stride 2."""

    op: ClassVar[str] = "stem"
    K: ClassVar[int] = 64

    N: int
    H: int
    W: int

    def __str__(self) -> str:
        return f"stem {self.N}x3x{self.H}x{self.W} -> {self.K}x{self.P}x{self.Q}"

    @property
    def P(self) -> int:
        return -(-self.H // 4)

    @property
    def Q(self) -> int:
        return -(-self.W // 4)

    @property
    def weights(self) -> int:
        """Elements of the packed weights: a filter's rows of 21 filled up to 24, and 8 more."""
        return (7 * 24 + 8) * self.K


@dataclass(frozen=True)
class Config:
    """One compiled variant for so many channels. ``shared``: dynamic bytes of a block, ``static`` beside; ``blocks``:
    how many of them a multiprocessor holds."""

    channels: int
    shared: int
    static: int
    blocks: int


#: Output pixels of a tile, a side; csrc/cuda/bottleneck_eval.cuh: kTile; basic_block_eval.cuh: kBasicSharedBytes.
TILE = 14
BASIC_BLOCKS = (Config(64, 71232, 0, 2), Config(128, 112704, 0, 1))
#: Pooled pixels of a tile, a side; csrc/cuda/stem_eval.cuh: kPooled, kStemSharedBytes, the patch, kStemBlocks.
POOLED = 7
STEM = Config(64, 54928, 7560, 2)


def _common(shape, dtype: torch.dtype, config: Config | None, chip, tiles: int) -> list[str]:
    reasons = []
    if dtype not in _DTYPES:
        reasons.append(f"bfloat16 and float16 are served, not {str(dtype).removeprefix('torch.')}")
    if config is not None and config.shared + config.static > chip.shared_per_block:
        bytes_ = config.shared + config.static
        reasons.append(f"{bytes_} bytes of shared memory are needed, {chip.name} has {chip.shared_per_block}")
    if max(shape.N, shape.H, shape.W) >= 2**20:
        reasons.append("no side may be 2**20 or more")
    if tiles >= 2**30:
        reasons.append("there must be fewer than 2**30 tiles")
    return reasons


def why_not_basic_block(shape: BasicBlockShape, dtype: torch.dtype, chip) -> list[str]:
    """Reasons why no kernel serves ``shape``; ``chip`` is a ``fastres.backends.one_pass.Chip``."""
    config = next((c for c in BASIC_BLOCKS if c.channels == shape.C), None)
    reasons = _common(shape, dtype, config, chip, shape.N * -(-shape.H // TILE) * -(-shape.W // TILE))
    if config is None:
        reasons.append(f"{' and '.join(str(c.channels) for c in BASIC_BLOCKS)} channels are served, not {shape.C}")
    if shape.H * shape.W * shape.C >= _LIMIT:
        reasons.append("an image must have fewer than 2**31 elements")
    return reasons


def why_not_stem(shape: StemShape, dtype: torch.dtype, chip) -> list[str]:
    """Reasons why no kernel serves ``shape``; ``chip`` is a ``fastres.backends.one_pass.Chip``."""
    return _common(shape, dtype, STEM, chip, shape.N * -(-shape.P // POOLED) * -(-shape.Q // POOLED))


class Launcher:
    """`why_not_*` and the launch functions."""

    def why_not_basic_block(self, device: torch.device, dtype: torch.dtype, shape: BasicBlockShape) -> list[str]:
        """Reasons why the block cannot be one kernel here; empty if it can."""
        reasons = [reason for reason in (self.missing, self._device_reason(device)) if reason]
        return reasons or why_not_basic_block(shape, dtype, self.chip(device))

    def why_not_stem(self, device: torch.device, dtype: torch.dtype, shape: StemShape) -> list[str]:
        """Reasons why the stem cannot be one kernel here; empty if it can."""
        reasons = [reason for reason in (self.missing, self._device_reason(device)) if reason]
        return reasons or why_not_stem(shape, dtype, self.chip(device))

    def _four(self, fn: str, why_not, kind, x, weights, bias, out) -> tuple[native.Arguments, object]:
        """Checks that both launches share: ``(arguments, shape)``; ``kind`` makes a shape of x's sizes."""
        a: native.Arguments = self._args(fn, "x", x)
        for name, t in (("x", x), ("out", out)):
            if not isinstance(t, torch.Tensor) or t.dim() != 4:
                raise ValueError(f"{fn}: {name} must have four dimensions, got {getattr(t, 'shape', type(t).__name__)}")
        shape = kind(x.shape)
        reasons = why_not(x.device, x.dtype, shape)
        if reasons:
            raise ValueError(f"{fn}: {shape} is not served: {'; '.join(reasons)}")
        return a, shape

    def basic_block_eval(self, x, weights, bias, out) -> None:
        """``out`` ``[N, C, H, W]`` of x, both channels_last; see ``csrc/cuda/launch_cuda.h``.

        ``weights``: of ``fragments.basic_block``. ``bias``: float32 ``[2 * C]``. Everything at multiples of 16 bytes.
        Raises TypeError or ValueError naming the argument before anything is written.
        """
        fn = "basic_block_eval"
        a, shape = self._four(fn, self.why_not_basic_block,
                              lambda s: BasicBlockShape(s[0], s[2], s[3], s[1]), x, weights, bias, out)  # fmt: skip
        activation(fn, "x", x, x, x.shape, self.name)
        activation(fn, "out", out, x, x.shape, self.name)
        check_packed(fn, x, (("weights", weights, x.dtype, shape.weights), ("bias", bias, torch.float32, 2 * shape.C)))
        check_apart(fn, out, x, weights, bias)
        if out.numel():
            pointers = [t.data_ptr() for t in (weights, bias, out)]
            self.invoke(fn, a.device, a.code, x.data_ptr(), shape.N, shape.H, shape.W, shape.C, *pointers)

    def stem_eval(self, x, weights, bias, out) -> None:
        """``out`` ``[N, 64, P, Q]``, channels_last, of x ``[N, 3, H, W]`` with any strides.

        ``weights``: of ``fragments.stem``. ``bias``: float32 ``[64]``. Everything but x at multiples of 16 bytes.
        Raises TypeError or ValueError naming the argument before anything is written.
        """
        fn = "stem_eval"
        a, shape = self._four(fn, self.why_not_stem, lambda s: StemShape(s[0], s[2], s[3]), x, weights, bias, out)
        if x.shape[1] != 3:
            raise ValueError(f"{fn}: x must have 3 channels, got {x.shape[1]}")
        if max(x.stride()[1:]) >= _LIMIT:
            raise ValueError(f"{fn}: x must have strides below 2**31 inside an image, got {x.stride()}")
        activation(fn, "out", out, x, (shape.N, shape.K, shape.P, shape.Q), self.name)
        check_packed(fn, x, (("weights", weights, x.dtype, shape.weights), ("bias", bias, torch.float32, shape.K)))
        check_apart(fn, out, x, weights, bias)
        if out.numel():
            pointers = [t.data_ptr() for t in (weights, bias, out)]
            self.invoke(fn, a.device, a.code, x.data_ptr(), shape.N, shape.H, shape.W, *x.stride(), *pointers)
