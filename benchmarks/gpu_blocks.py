"""Evaluation bottlenecks in one kernel (``gpu_stages.py``): right, and their time beside what PyTorch offers.

Each row is one residual block with folded batch normalisations: our kernel, the separate convolutions that
``fastres.nn`` would take instead, cuDNN's fused calls (convolution, bias, ReLU, sum) and torch.compile.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import timing
import torch
from torch.nn import functional as F

from fastres import dispatch, whole_block
from fastres.backends.block_kernels import BottleneckShape

BATCHES = (1, 8, 64, 256)
#: What compute-sanitizer watches: tiles cut on either side, a projection, a wide block.
SMALL = (
    BottleneckShape(2, 15, 29, 64, 64, 64, False),
    BottleneckShape(1, 16, 13, 64, 64, 256, True),
    BottleneckShape(1, 14, 15, 512, 128, 512, False),
)


def layers(batch: int) -> tuple[BottleneckShape, ...]:
    """ResNet-50's blocks of stride 1 in the first two stages, and odd sizes as detection has them."""
    return (
        BottleneckShape(batch, 56, 56, 64, 64, 256, True),
        BottleneckShape(batch, 56, 56, 256, 64, 256, False),
        BottleneckShape(batch, 28, 28, 512, 128, 512, False),
        BottleneckShape(max(1, batch // 16), 200, 334, 256, 64, 256, False),
    )


def right(emit, kernels, device, shapes) -> bool:
    """Every shape in both dtypes against float64 and on integers, exactly; each version of the kernel."""
    return all([_right(functools.partial(emit, version=label(k)), k, device, shapes)
                for k in whole_block.versions(kernels)])  # fmt: skip


def label(kernels) -> str:
    """Of a version of the kernel."""
    return getattr(kernels, "version", "portable")


def _right(emit, kernels, device, shapes) -> bool:
    if not hasattr(kernels, "bottleneck_eval"):
        emit(kind="block", status="refused", why=f"{kernels.name} has no such kernels")
        return True
    good = True
    for shape in shapes:
        for dtype in (torch.bfloat16, torch.float16):
            reasons = kernels.why_not_bottleneck(device, dtype, shape)
            wrong = "" if reasons else whole_block.check(kernels, device, dtype, shape)
            status = "refused" if reasons else "failed" if wrong else "passed"
            emit(kind="block", shape=str(shape), dtype=str(dtype), status=status, why="; ".join(reasons) or wrong)
            good &= not wrong
    return good


def contestants(kernels, shape: BottleneckShape, device, dtype) -> dict[str, Callable[[], torch.Tensor]]:
    """Ways to compute one block on the same data; those of PyTorch only where there is a GPU."""
    x, w1, w2, w3, projection, bias = whole_block.data(shape, device, dtype, whole=False)
    weights = whole_block.packing(kernels)(w1, w2, w3, projection)
    out = torch.empty((shape.N, shape.K, shape.H, shape.W), dtype=dtype, device=device)
    out = out.to(memory_format=torch.channels_last)
    b1, b2, b3 = (b.to(dtype) for b in bias.split((shape.mid, shape.mid, shape.K)))

    def ours():
        kernels.bottleneck_eval(x, weights, bias, shape.mid, shape.projected, out)
        return out

    def plain():
        y = F.relu(F.conv2d(x, w1, b1))
        y = F.relu(F.conv2d(y, w2, b2, padding=1))
        return F.relu(F.conv2d(y, w3, b3) + (x if projection is None else F.conv2d(x, projection)))

    def fused():
        one = ((1, 1), (0, 0), (1, 1), 1)  # stride, padding, dilation, groups
        y = torch.cudnn_convolution_relu(x, w1, b1, *one)
        y = torch.cudnn_convolution_relu(y, w2, b2, (1, 1), (1, 1), (1, 1), 1)
        r = x if projection is None else F.conv2d(x, projection)
        return torch.cudnn_convolution_add_relu(y, w3, r, 1.0, b3, *one)

    found: dict[str, Callable[[], torch.Tensor]] = {"one kernel": ours, "plain": plain}
    if device.type == "cuda":
        found |= {"cudnn": fused, "torch.compile": torch.compile(plain, dynamic=False)}
    return found


def run(emit, device, backend: str, rehearsal: bool) -> bool:
    kernels = dispatch.load(backend)
    good = right(emit, kernels, device, SMALL[:1] if rehearsal else (*SMALL, *layers(2)))
    if hasattr(kernels, "bottleneck_eval"):
        for version in whole_block.versions(kernels):
            _time(functools.partial(emit, version=label(version)), version, device, rehearsal)
    return good


def _time(emit, kernels, device, rehearsal: bool) -> None:
    for batch in (1,) if rehearsal else BATCHES:
        for shape in SMALL[:1] if rehearsal else layers(batch):
            reasons = kernels.why_not_bottleneck(device, torch.bfloat16, shape)
            if reasons:
                emit(kind="block", shape=str(shape), status="refused", why="; ".join(reasons))
                continue
            medians = {}
            for name, call in contestants(kernels, shape, device, torch.bfloat16).items():
                times = timing.device_times(call, device, 2 if rehearsal else 30)
                medians[name] = sorted(times)[len(times) // 2] * 1e6
            mine = medians.pop("one kernel")
            flops = 2 * shape.N * shape.H * shape.W * shape.weights
            emit(kind="block", shape=str(shape), dtype="bfloat16", median_us=mine, others_us=medians,
                 tflops=flops / mine * 1e-6, speedup=min(medians.values()) / mine)  # fmt: skip
