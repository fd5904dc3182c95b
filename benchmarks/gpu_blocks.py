"""Evaluation blocks and stems in one kernel (``gpu_stages.py``): right, and their time beside what PyTorch offers.

Each row is one residual block, or the stem, with folded batch normalisations: our kernel, the separate convolutions
that ``fastres.nn`` would take instead, cuDNN's fused calls (convolution, bias, ReLU, sum) and torch.compile.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import timing
import torch
from torch.nn import functional as F

from fastres import block_geometry, block_trials, dispatch, whole_block
from fastres.backends.block_kernels import BottleneckShape
from fastres.backends.eval_kernels import BasicBlockShape, StemShape

BATCHES = (1, 8, 64, 256)
#: What a rehearsal takes: one of each kind.
REHEARSED = (BottleneckShape(1, 5, 15, 64, 64, 64, False), BasicBlockShape(1, 5, 15, 64), StemShape(1, 9, 30))
#: What compute-sanitizer watches: tiles cut on either side, a projection, wide blocks, a stem.
SMALL = (
    BasicBlockShape(2, 15, 29, 64),
    StemShape(2, 29, 58),
    BasicBlockShape(1, 14, 15, 128),
    BottleneckShape(2, 15, 29, 64, 64, 64, False),
    BottleneckShape(1, 16, 13, 64, 64, 256, True),
    BottleneckShape(1, 14, 15, 512, 128, 512, False),
)


def layers(batch: int) -> tuple[block_geometry.Shape, ...]:
    """The stem, blocks of stride 1 in the first two stages of ResNet-18 and 50, odd sizes as detection has them."""
    return (
        StemShape(batch, 224, 224),
        BasicBlockShape(batch, 56, 56, 64),
        BasicBlockShape(batch, 28, 28, 128),
        BottleneckShape(batch, 56, 56, 64, 64, 256, True),
        BottleneckShape(batch, 56, 56, 256, 64, 256, False),
        BottleneckShape(batch, 28, 28, 512, 128, 512, False),
        BottleneckShape(max(1, batch // 16), 200, 334, 256, 64, 256, False),
        StemShape(max(1, batch // 16), 800, 1333),
    )


def why_not(kernels, device, dtype, shape: block_geometry.Shape) -> list[str]:
    ask = getattr(kernels, f"why_not_{shape.op}", None)
    return [f"{kernels.name} has no such kernel"] if ask is None else ask(device, dtype, shape)


def label(kernels) -> str:
    """Of a version of the kernel."""
    return getattr(kernels, "version", "portable")


def right(emit, kernels, device, shapes) -> bool:
    """Every shape in both dtypes against float64 and on integers, exactly; each version of the kernel."""
    good = True
    for shape in shapes:
        for version in whole_block.versions(kernels, shape):
            for dtype in (torch.bfloat16, torch.float16):
                reasons = why_not(version, device, dtype, shape)
                wrong = "" if reasons else whole_block.check(version, device, dtype, shape)
                status = "refused" if reasons else "failed" if wrong else "passed"
                emit(kind="block", shape=str(shape), version=label(version), dtype=str(dtype), status=status,
                     why="; ".join(reasons) or wrong)  # fmt: skip
                good &= not wrong
    return good


_ONE, _THREE = ((1, 1), (0, 0), (1, 1), 1), ((1, 1), (1, 1), (1, 1), 1)  # stride, padding, dilation, groups


def _bottleneck(shape: BottleneckShape, device, dtype):
    x, w1, w2, w3, projection, bias = block_trials.bottleneck_data(shape, device, dtype, whole=False)
    b1, b2, b3 = (b.to(dtype) for b in bias.split((shape.mid, shape.mid, shape.K)))

    def plain():
        y = F.relu(F.conv2d(x, w1, b1))
        y = F.relu(F.conv2d(y, w2, b2, padding=1))
        return F.relu(F.conv2d(y, w3, b3) + (x if projection is None else F.conv2d(x, projection)))

    def fused():
        y = torch.cudnn_convolution_relu(x, w1, b1, *_ONE)
        y = torch.cudnn_convolution_relu(y, w2, b2, *_THREE)
        r = x if projection is None else F.conv2d(x, projection)
        return torch.cudnn_convolution_add_relu(y, w3, r, 1.0, b3, *_ONE)

    return plain, fused


def _basic_block(shape: BasicBlockShape, device, dtype):
    x, w1, w2, bias = block_trials.basic_block_data(shape, device, dtype, whole=False)
    b1, b2 = bias.to(dtype).chunk(2)

    def plain():
        return F.relu(F.conv2d(F.relu(F.conv2d(x, w1, b1, padding=1)), w2, b2, padding=1) + x)

    def fused():
        return torch.cudnn_convolution_add_relu(
            torch.cudnn_convolution_relu(x, w1, b1, *_THREE), w2, x, 1.0, b2, *_THREE
        )

    return plain, fused


def _stem(shape: StemShape, device, dtype):
    x, w, bias = block_trials.stem_data(shape, device, dtype, whole=False)
    bias = bias.to(dtype)

    def plain():
        return F.max_pool2d(F.relu(F.conv2d(x, w, bias, 2, 3)), 3, 2, 1)

    def fused():
        return F.max_pool2d(torch.cudnn_convolution_relu(x, w, bias, (2, 2), (3, 3), (1, 1), 1), 3, 2, 1)

    return plain, fused


_THEIRS = {BottleneckShape: _bottleneck, BasicBlockShape: _basic_block, StemShape: _stem}


def flops(shape: block_geometry.Shape) -> int:
    """Of the convolutions themselves."""
    if isinstance(shape, StemShape):
        return 2 * shape.N * -(-shape.H // 2) * -(-shape.W // 2) * 147 * shape.K
    return 2 * shape.N * shape.H * shape.W * shape.weights


def contestants(kernels, shape: block_geometry.Shape, device, dtype) -> dict[str, Callable[[], torch.Tensor]]:
    """Ways to compute one block on the same data; those of PyTorch only where there is a GPU."""
    with torch.no_grad():
        launch, truth, _ = block_trials.trial(shape, device, dtype, False)
    out = torch.empty(truth.shape, dtype=dtype, device=device).to(memory_format=torch.channels_last)
    del truth
    plain, fused = _THEIRS[type(shape)](shape, device, dtype)

    def ours():
        launch(kernels, out)
        return out

    found: dict[str, Callable[[], torch.Tensor]] = {"one kernel": ours, "plain": plain}
    if device.type == "cuda":
        found |= {"cudnn": fused, "torch.compile": torch.compile(plain, dynamic=False)}
    return found


def run(emit, device, backend: str, rehearsal: bool) -> bool:
    kernels = dispatch.load(backend)
    good = right(emit, kernels, device, REHEARSED if rehearsal else (*SMALL, *layers(2)))
    for batch in (1,) if rehearsal else BATCHES:
        for shape in REHEARSED if rehearsal else layers(batch):
            for version in whole_block.versions(kernels, shape):
                _time(functools.partial(emit, kind="block", version=label(version)), version, shape, device, rehearsal)
    return good


def _time(emit, kernels, shape: block_geometry.Shape, device, rehearsal: bool) -> None:
    reasons = why_not(kernels, device, torch.bfloat16, shape)
    if reasons:
        emit(shape=str(shape), status="refused", why="; ".join(reasons))
        return
    medians = {}
    for name, call in contestants(kernels, shape, device, torch.bfloat16).items():
        times = timing.device_times(call, device, 2 if rehearsal else 30)
        medians[name] = sorted(times)[len(times) // 2] * 1e6
    mine = medians.pop("one kernel")
    emit(shape=str(shape), dtype="bfloat16", median_us=mine, others_us=medians,
         tflops=flops(shape) / mine * 1e-6, speedup=min(medians.values()) / mine)  # fmt: skip
