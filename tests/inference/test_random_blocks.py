"""Random nodes, as no network has them, on every executor that serves them, against float64.

The CPU executor's kernels take turns here, without a clock, on every instruction set, also where another
executor is faster: each one that is offered must have been run. FASTRES_FULL=1: a thousand nodes instead of forty.
"""

from __future__ import annotations

import os
import random
from collections import Counter

import pytest
import torch
from torch.nn import functional as F

from fastres import testing
from fastres.backends import cpu, cpu_conv, cpu_strassen, cpu_winograd
from fastres.inference import cpu_weights, executors
from fastres.inference.cpu_executor import CpuSegment
from fastres.inference.cpu_weights import DIRECT, PAIRS, STRASSEN, Choice
from fastres.inference.plan import Block, Conv, ConvAct, GlobalAvgPool, Linear, Segment, Stem

CPU = torch.device("cpu")
COUNT = 1000 if os.environ.get("FASTRES_FULL") == "1" else 40
DTYPES = (torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64)


def random_conv(
    rng: random.Random, inputs: int, outputs: int, kernel, stride=1, dilation=1, groups=1, pad=None
) -> Conv:
    g = testing.generator(rng.randrange(2**31))
    kernel = (kernel,) * 2 if isinstance(kernel, int) else kernel
    scale = (2 / (inputs // groups * kernel[0] * kernel[1])) ** 0.5
    weight = scale * torch.randn(outputs, inputs // groups, *kernel, generator=g)
    pads = tuple(dilation * (k // 2) for k in kernel) if pad is None else pad
    weight = weight.contiguous(memory_format=torch.channels_last)
    return Conv(weight, 0.5 * torch.randn(outputs, generator=g), (stride,) * 2, pads, (dilation,) * 2, groups)


def random_node(rng: random.Random):
    """``(node, its input shape)``."""
    N, H, W = rng.choice([1, 1, 2, 3]), rng.randint(1, 23), rng.randint(1, 23)
    C = rng.choice([1, 3, 7, 8, 16, 17, 24, 32, 48, 64, 65])
    kinds = ["stem", "stem", "conv", "conv", "basic", "basic", "bottleneck", "bottleneck", "wide", "resnext", "head"]
    kind = rng.choice(kinds)
    stride, dilation = rng.choice([1, 1, 2]), rng.choice([1, 1, 1, 2])
    if kind == "stem":
        H, W, C = H + 16, W + 16, rng.choice([1, 3, 3, 3, 4])
        conv = random_conv(rng, C, rng.choice([8, 20, 64]), rng.choice([3, 5, 7]), rng.choice([1, 2, 2, 2]))
        window, pool_stride = rng.choice([(3, 2), (2, 2), (3, 1)])
        return Stem("stem", conv, window, pool_stride, rng.choice([0, window // 2])), (N, C, H, W)
    if kind == "conv":
        kernel = rng.choice([1, 1, 3, 3, 5, (1, 3), (3, 1)])
        groups = rng.choice([1, 1, C])
        conv = random_conv(rng, C, C * rng.choice([1, 2]), kernel, stride, dilation, groups)
        return ConvAct("conv", conv, rng.random() < 0.5), (N, C, H, W)
    if kind == "head":
        if rng.random() < 0.5:
            return GlobalAvgPool("pool", rng.random() < 0.5), (N, C, H, W)
        g = testing.generator(rng.randrange(2**31))
        K = rng.randint(1, 70)
        weight, bias = torch.randn(K, C, generator=g) / C**0.5, torch.randn(K, generator=g)
        return Linear("fc", weight, bias, rng.random() < 0.5), (N, C)
    project = stride > 1 or rng.random() < 0.4
    if kind == "basic":
        K = rng.choice([8, 20, 64]) if project else C
        main = (random_conv(rng, C, K, 3, stride), random_conv(rng, K, K, 3))
    else:
        groups, width, K = _widths(rng, kind)
        K = K if project else C
        conv2 = random_conv(rng, width, width, 3, stride, dilation, groups)
        main = (random_conv(rng, C, width, 1), conv2, random_conv(rng, width, K, 1))
    shortcut = random_conv(rng, C, K, 1, stride) if project else None
    return Block(kind, main, shortcut), (N, C, H, W)


def _widths(rng: random.Random, kind: str) -> tuple[int, int, int]:
    """Groups, channels inside and outputs of a bottleneck."""
    if kind == "wide":
        return 1, rng.choice([128, 160, 256]), rng.choice([64, 130])
    if kind == "resnext":
        each = rng.choice([4, 8, 16, 32])
        groups = rng.choice([1, 2, 3]) * max(1, 32 // each)
        return groups, groups * each, rng.choice([32, 64, 100])
    groups = rng.choice([1, 1, 2, 4])
    return groups, groups * rng.choice([1, 4, 9, 16]), rng.choice([8, 20, 64, 100])


def plainly(node, x: torch.Tensor) -> torch.Tensor:
    """The node on PyTorch's functions, in the dtype of ``x``."""

    def conv(c: Conv, t):
        w, b = c.weight.to(t.dtype), c.bias.to(t.dtype)
        return F.conv2d(t, w, b, c.stride, c.padding, c.dilation, c.groups)

    if isinstance(node, Stem):
        return F.max_pool2d(conv(node.conv, x).relu(), node.pool_kernel, node.pool_stride, node.pool_padding)
    if isinstance(node, ConvAct):
        return conv(node.conv, x).relu() if node.relu else conv(node.conv, x)
    if isinstance(node, GlobalAvgPool):
        y = x.mean((2, 3))
        return y if node.flatten else y[:, :, None, None]
    if isinstance(node, Linear):
        y = F.linear(x, node.weight.to(x.dtype), node.bias.to(x.dtype))
        return y.relu() if node.relu else y
    y = x
    for c in node.main[:-1]:
        y = conv(c, y).relu()
    return (conv(node.main[-1], y) + (x if node.shortcut is None else conv(node.shortcut, x))).relu()


class Contest:
    """In the place of ``CpuSegment._measured``: the kernel that was taken least, and a record of offers and takings."""

    def __init__(self):
        self.offered, self.taken, self.rng = Counter(), Counter(), random.Random(0)

    def __call__(self, segment: CpuSegment, shape, kinds: dict) -> dict:
        self.offered.update(kind for of_conv in kinds.values() for kind in of_conv)
        picked = {}
        for p, of_conv in kinds.items():
            picked[p] = Choice(min(of_conv, key=lambda kind: (self.taken[kind], self.rng.random())))
            self.taken[picked[p].out] += 1
        for packed, node in zip(segment.weights, segment.segment.nodes, strict=True):
            for kind in cpu_weights.whole(node, segment.dtype, segment.precision):
                self.offered["whole block"] += 1
                if self.rng.random() < 0.5:
                    self.taken["whole block"] += 1
                    picked |= {p: Choice(kind, whole=True) for p in packed}
        return picked


@pytest.fixture
def contest(monkeypatch):
    found = Contest()
    monkeypatch.setattr(CpuSegment, "_measured", lambda segment, shape, kinds: found(segment, shape, kinds))
    monkeypatch.setattr(cpu_conv, "wins", lambda kind, x, w, g: not cpu_conv.why_not(x, w, g))
    monkeypatch.setattr(cpu_weights, "UNITS", {"instructions", "model"})
    monkeypatch.setattr(cpu_weights, "PAIRED", {"full", "slow", "model"})
    monkeypatch.setattr(cpu_strassen, "LEAST", {1: 16, 2: 32})
    return found


@pytest.fixture(params=["torch", *(cpu.available_isas() if cpu._module is not None else [])])
def executor(request):
    """Name of an executor, the CPU's once for each instruction set."""
    if request.param == "torch":
        yield "torch"
        return
    before = cpu.isa()
    cpu.set_isa(request.param)
    yield "cpu"
    cpu.set_isa(before)


def description(node, dtype: torch.dtype) -> list[str]:
    """What a node is an example of."""
    widths = {f"{c.weight.shape[1]} channels a group" for c in node.convs() if c.groups > 1 and c.weight.shape[1] > 1}
    strided = ["3x3 of stride 2"] if any(c.stride == (2, 2) and c.weight.shape[2] == 3 for c in node.convs()) else []
    wide = ["128 channels and more"] if any(min(c.weight.shape[:2]) >= 128 for c in node.convs()) else []
    return [node.op, str(dtype)[6:], *widths, *strided, *wide]


#: What the CPU executor must have served, and what it must have left to torch.
SERVED = {
    "stem", "conv", "basic_block", "bottleneck", "global_avg_pool", "linear", "float32", "bfloat16", "float16",
    "4 channels a group", "8 channels a group", "16 channels a group", "32 channels a group", "3x3 of stride 2",
    "128 channels and more",
}  # fmt: skip
LEFT = {"float64", "stem", "9 channels a group"}


def test_random_nodes_against_float64(executor, contest):
    served, left, misses = Counter(), Counter(), []
    for seed in range(COUNT):
        rng = random.Random(seed)
        node, shape = random_node(rng)
        dtype, precision = rng.choice(DTYPES), rng.choice(["exact", "highest"])
        layout = rng.choice(testing.LAYOUTS) if len(shape) == 4 else None
        x = testing.fill(shape, dtype, seed=seed)
        x = testing.lay_out(x, layout) if layout else x
        if executors.load(executor).why_not(node, CPU, dtype, precision):
            left.update(description(node, dtype))
            continue
        served.update(description(node, dtype))
        prepared = executors.load(executor).prepare(Segment((node,)), CPU, dtype, precision)
        kept = x.clone()
        with torch.no_grad():
            y = prepared.run(x)
            again, (seconds,) = prepared.timed(x)
            expected, peer = plainly(node, x.double()), plainly(node, x)
        assert torch.equal(x, kept), f"{seed}: the input was written to"
        assert tuple(y.shape) == node.out_shape(shape) and y.dtype == dtype and seconds >= 0
        assert torch.equal(y, again), f"{seed}: two runs differ"
        assert len(prepared.kernels(shape)) == 1
        assert prepared.memory(shape) >= sum(c.weight.numel() for c in node.convs())
        terms = max(
            [c.weight[0].numel() for c in node.convs()], default=shape[1] * max(1, torch.Size(shape[2:]).numel())
        )
        verdict = testing.within_budget(y, peer, expected, terms=terms, what=f"{seed}: {node.op} {shape} {dtype}")
        if not verdict:
            misses.append(verdict.message)
    print(f"served {dict(served)}, left {dict(left)}, kernels {dict(contest.taken)}")
    assert not misses, "\n".join(misses)
    if executor == "torch":
        assert served.total() and not left
        return
    kernels = {DIRECT, *([PAIRS] if cpu_conv.pairs_unit() else []), *sum(cpu_winograd.OUTS.values(), ())}
    assert contest.taken.keys() == contest.offered.keys() >= kernels, "a kernel was never run"
    if COUNT == 1000:
        assert contest.taken.keys() >= STRASSEN.keys(), "a kernel was never run"
        assert served.keys() >= SERVED and left.keys() >= LEFT, "the nodes do not cover what they are to cover"


def test_nodes_refuse_what_cannot_be_computed():
    conv = random_conv(random.Random(0), 4, 8, 3)
    for make, text in (
        (lambda: Conv(conv.weight.half(), conv.bias.half()), "conv.weight: got torch.float16"),
        (lambda: Conv(conv.weight, conv.bias[:3]), "as many biases as outputs"),
        (lambda: Conv(conv.weight, conv.bias, stride=(0, 1)), "conv.stride: got"),
        (lambda: Conv(conv.weight, conv.bias, groups=3), "conv.groups: got 3"),
        (lambda: Stem("s", conv, pool_kernel=3, pool_padding=2), "s.pool_padding: got 2"),
        (lambda: Block("b", (conv,), None), "b.main: got 1 convolutions"),
        (lambda: Block("b", (conv, conv), None), "b.main: got 8 channels before 4"),
        (lambda: Segment(()), "nodes: got"),
        (lambda: Block("b", (conv, random_conv(random.Random(0), 8, 8, 3)), None).out_shape((1, 4, 5, 5)), "shortcut"),
        (lambda: ConvAct("c", conv, True).out_shape((1, 3, 5, 5)), r"c: got an input of shape \(1, 3, 5, 5\)"),
    ):
        with pytest.raises(ValueError, match=text):
            make()
