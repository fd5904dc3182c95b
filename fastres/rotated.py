"""Runs of identity bottlenecks in evaluation as rotated units, one kernel each: conv2, conv3 and the shortcut of one
block together with conv1 of the next.

A run of n blocks is conv1 of the first, then n units; the last has no next block. It moves 10 units of mid elements a
pixel for each block where separate convolutions move 16. Whether it serves is decided as in `whole_block`: right on
this very device, and faster on inputs of this very size than the run block by block, each by what serves it best.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from fastres import whole_block
from fastres.backends import fragments
from fastres.backends.rotated_kernels import RotatedShape


@dataclasses.dataclass(frozen=True)
class RunShape:
    """``blocks`` identity bottlenecks in a row, ``unit`` being the shape of all but the last."""

    op: ClassVar[str] = "run"

    blocks: int
    unit: RotatedShape

    def __str__(self) -> str:
        return f"run of {self.blocks} bottlenecks, each as a {self.unit}"


def run_shape(shapes: Sequence) -> RunShape | None:
    """The run of blocks of these ``BottleneckShape``, or None where it is no run: at least two identity blocks of one
    shape. Otherwise the blocks run one by one, each with its own verdict."""
    first = shapes[0] if shapes else None
    if first is None or len(shapes) < 2 or first.projected or any(shape != first for shape in shapes):
        return None
    return RunShape(len(shapes), RotatedShape(first.N, first.H, first.W, first.mid, first.K, True))


def kernels_for(x: Tensor, shape: RunShape, separate: Callable[[], Tensor], ours: Callable[..., Tensor]):
    """The backend whose kernels serve the run on ``x``, or None. ``ours(kernels)`` and ``separate()`` compute it."""
    return whole_block.kernels_for(x, shape, separate, ours, proof=check_run)


def pack(units: Sequence, after=None) -> tuple[Tensor, Tensor]:
    """(weights, bias) of ``rotated_stage`` from the folded units conv1, conv2, conv3 of a block and, unless it is the
    last, of the next block's conv1."""
    following = [] if after is None else [after]
    bias = torch.cat([u.bias.float() for u in (*units[1:3], *following)]).contiguous()
    return fragments.rotated(units[1].weight, units[2].weight, *(u.weight for u in following)), bias


def run(kernels, h: Tensor, x: Tensor, packed: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """The run's output from h, the first block's conv1 with its ReLU, and x, the first block's input; channels_last."""
    spare = None
    for i, (weights, bias) in enumerate(packed):
        out = torch.empty_like(x)
        following = None
        if i + 1 < len(packed):
            following = torch.empty_like(h) if spare is None else spare
        kernels.rotated_stage(h, x, weights, bias, out, following)
        spare, h, x = h if i else None, following, out  # the h that was given is the caller's
    return x


# ---- the check, as in `whole_block`


def expected(h, residual, w2, w3, w1, bias) -> tuple[Tensor, Tensor | None]:
    """(out, next or None) in float64, rounded where separate convolutions would round."""
    dtype, mid, K = h.dtype, w2.shape[0], w3.shape[0]
    b2, b3, b1 = bias.double().split((mid, K, bias.numel() - mid - K))
    y = torch.relu(torch.nn.functional.conv2d(h.double(), w2.double(), b2, 1, 1)).to(dtype)
    out = torch.relu(torch.nn.functional.conv2d(y.double(), w3.double(), b3) + residual.double())
    if w1 is None:
        return out, None
    return out, torch.relu(torch.nn.functional.conv2d(out.to(dtype).double(), w1.double(), b1))


def data(shape: RotatedShape, device, dtype: torch.dtype, whole: bool):
    """(h, residual, w2, w3, w1 or None, bias) for ``shape``: small integers, or normal values."""
    random = torch.Generator(device).manual_seed(0)

    def make(size, terms, kind=dtype, kept=1.0):
        if whole:
            t = torch.randint(-2, 3, size, device=device, generator=random)
            # sparse, so that no sum leaves the range of float16
            t = t * (torch.rand(size, device=device, generator=random) < kept)
        else:
            t = torch.randn(size, device=device, generator=random) * math.sqrt(2 / terms)
        t = t.to(kind)
        return t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t

    N, H, W, mid, K = shape.N, shape.H, shape.W, shape.mid, shape.K
    h, residual = make((N, mid, H, W), 2), make((N, K, H, W), 2)
    w2, w3 = make((mid, mid, 3, 3), 9 * mid, kept=16 / mid), make((K, mid, 1, 1), mid, kept=16 / mid)
    w1 = make((mid, K, 1, 1), K, kept=16 / K) if shape.next else None
    return h, residual, w2, w3, w1, make((shape.biases,), 2, torch.float32)


def check(kernels, device, dtype: torch.dtype, shape: RotatedShape) -> str:
    """What is wrong with the kernel for ``shape``, or "". At most two images, of the given size."""
    small = dataclasses.replace(shape, N=min(shape.N, 2))
    with torch.no_grad():
        for whole in (True, False):
            h, residual, w2, w3, w1, bias = data(small, device, dtype, whole)
            weights = fragments.rotated(w2, w3, w1)
            runs = []
            for _ in range(2):
                made = [torch.full_like(residual, math.nan)] + [torch.full_like(h, math.nan)] * (w1 is not None)
                kernels.rotated_stage(h, residual, weights, bias, *made)
                runs.append(made)
            truths = expected(h, residual, w2, w3, w1, bias)
            for name, out, again, truth, terms, roundings in zip(
                ("out", "next"), *runs, truths, (9 * small.mid, 9 * small.mid + small.K), (4, 6), strict=False
            ):
                wrong = whole_block.fault(out, again, truth, whole, terms, roundings)
                if wrong:
                    return f"{name}: {wrong}"
    return ""


def check_run(kernels, device, dtype: torch.dtype, shape: RunShape) -> str:
    """What is wrong with the kernels of a run, or ""."""
    for last in (False, True):
        wrong = check(kernels, device, dtype, dataclasses.replace(shape.unit, next=not last))
        if wrong:
            return wrong
    return ""
