"""Runs of identity bottlenecks as rotated units (`gpu_blocks`): right, and their time beside what else could serve.

Each row is two blocks in a row with folded batch normalisations: conv1 and two rotated units, two whole-block kernels,
the separate convolutions, cuDNN's fused calls and torch.compile.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import timing
import torch
from torch.nn import functional as F

from fastres import block_trials, dispatch, rotated
from fastres.backends import fragments
from fastres.backends.block_kernels import BottleneckShape
from fastres.backends.rotated_kernels import RotatedShape

BATCHES = (1, 8, 64, 256)
BLOCKS = 2
#: What compute-sanitizer watches: tiles cut on either side and in turn, the last block of a stage, a wide one.
SMALL = (
    RotatedShape(2, 9, 35, 64, 128, True),
    RotatedShape(1, 15, 29, 64, 64, False),
    RotatedShape(1, 5, 43, 128, 512, True),
)


def layers(batch: int) -> tuple[RotatedShape, ...]:
    """ResNet-50's identity blocks of the first two stages, and an odd size as detection has them."""
    return (
        RotatedShape(batch, 56, 56, 64, 256, True),
        RotatedShape(batch, 28, 28, 128, 512, True),
        RotatedShape(max(1, batch // 16), 200, 334, 64, 256, True),
    )


def right(emit, kernels, device, shapes) -> bool:
    """Every shape, with and without a block after it, in both dtypes against float64 and on integers, exactly."""
    if not hasattr(kernels, "rotated_stage"):
        emit(kind="rotated", status="refused", why=f"{kernels.name} has no such kernels")
        return True
    good = True
    for shape in dict.fromkeys(dataclasses.replace(s, next=n) for s in shapes for n in (True, False)):
        for dtype in (torch.bfloat16, torch.float16):
            reasons = kernels.why_not_rotated(device, dtype, shape)
            wrong = "" if reasons else rotated.check(kernels, device, dtype, shape)
            status = "refused" if reasons else "failed" if wrong else "passed"
            emit(kind="rotated", shape=str(shape), dtype=str(dtype), status=status, why="; ".join(reasons) or wrong)
            good &= not wrong
    return good


def contestants(kernels, shape: RotatedShape, device, dtype) -> dict[str, Callable[[], torch.Tensor]]:
    """Ways to compute `BLOCKS` equal blocks in a row on the same data; those of PyTorch only where there is a GPU."""
    block = BottleneckShape(shape.N, shape.H, shape.W, shape.K, shape.mid, shape.K, False)
    x, w1, w2, w3, _, bias = block_trials.bottleneck_data(block, device, dtype, whole=False)
    b1, b2, b3 = bias.split((shape.mid, shape.mid, shape.K))
    whole = kernels.pack_bottleneck(w1, w2, w3)
    packed = [(fragments.rotated(w2, w3, w1), torch.cat((b2, b3, b1)))] * (BLOCKS - 1)
    packed.append((fragments.rotated(w2, w3), torch.cat((b2, b3))))
    b1, b2, b3 = (b.to(dtype) for b in (b1, b2, b3))
    one = ((1, 1), (0, 0), (1, 1), 1)  # stride, padding, dilation, groups

    def first():
        return torch.cudnn_convolution_relu(x, w1, b1, *one) if device.type == "cuda" else F.relu(F.conv2d(x, w1, b1))

    def units():
        return rotated.run(kernels, first(), x, packed)

    def one_each():
        y = x
        for _ in range(BLOCKS):
            out = torch.empty_like(x)
            kernels.bottleneck_eval(y, whole, bias, shape.mid, False, out)
            y = out
        return y

    def plain():
        y = x
        for _ in range(BLOCKS):
            h = F.relu(F.conv2d(F.relu(F.conv2d(y, w1, b1)), w2, b2, padding=1))
            y = F.relu(F.conv2d(h, w3, b3) + y)
        return y

    def fused():
        y = x
        for _ in range(BLOCKS):
            h = torch.cudnn_convolution_relu(y, w1, b1, *one)
            h = torch.cudnn_convolution_relu(h, w2, b2, (1, 1), (1, 1), (1, 1), 1)
            y = torch.cudnn_convolution_add_relu(h, w3, y, 1.0, b3, *one)
        return y

    found: dict[str, Callable[[], torch.Tensor]] = {"rotated": units, "one kernel a block": one_each, "plain": plain}
    if device.type == "cuda":
        found |= {"cudnn": fused, "torch.compile": torch.compile(plain, dynamic=False)}
    return found


def run(emit, device, backend: str, rehearsal: bool) -> bool:
    kernels = dispatch.load(backend)
    good = right(emit, kernels, device, SMALL[:1] if rehearsal else (*SMALL, *layers(2)))
    if not hasattr(kernels, "rotated_stage"):
        return good
    for batch in (1,) if rehearsal else BATCHES:
        for shape in SMALL[:1] if rehearsal else layers(batch):
            reasons = kernels.why_not_rotated(device, torch.bfloat16, shape)
            if reasons:
                emit(kind="rotated", shape=str(shape), status="refused", why="; ".join(reasons))
                continue
            medians = {}
            for name, call in contestants(kernels, shape, device, torch.bfloat16).items():
                times = timing.device_times(call, device, 2 if rehearsal else 30)
                medians[name] = sorted(times)[len(times) // 2] * 1e6
            mine = medians.pop("rotated")
            multiplied = BLOCKS * (9 * shape.mid**2 + 2 * shape.mid * shape.K)
            emit(kind="rotated", shape=str(shape), blocks=BLOCKS, dtype="bfloat16", median_us=mine, others_us=medians,
                 tflops=2 * shape.N * shape.H * shape.W * multiplied / mine * 1e-6,
                 speedup=min(medians.values()) / mine)  # fmt: skip
    return good
