"""Segments on PyTorch's own operators, on any device: folded weights in channels_last, oneDNN's packed weights and
post-ops where it has them, else cuDNN's or the native convolution with bias, residual and ReLU after it.

The executor of last resort: it serves every node in every dtype.
"""

from __future__ import annotations

import contextlib
import threading
import time

import torch
from torch import Tensor
from torch.nn import functional as F

from fastres import convolution as conv_lib
from fastres.inference.executors import Kernel
from fastres.inference.plan import Block, Conv, ConvAct, GlobalAvgPool, Linear, Node, Segment, Shape, Stem
from fastres.ops.bn import nhwc

name = "torch"


def why_not(node: Node, device: torch.device, dtype: torch.dtype, precision: str) -> list[str]:
    return []


def precision(device: torch.device, dtype: torch.dtype, asked: str) -> str:
    """TF32 under "high" on a GPU; PyTorch's float32 sums are direct, which is "exact", everywhere else."""
    if dtype is torch.float32 and asked == "high" and device.type == "cuda":
        return "high"
    return "exact"


def peak(device: torch.device, dtype: torch.dtype, threads: int, precision: str) -> None:
    """The report takes the rate of ``torch.mm``."""


def prepare(segment: Segment, device: torch.device, dtype: torch.dtype, precision: str) -> TorchSegment:
    return TorchSegment(segment, device, dtype, precision)


# PyTorch's switches are one for the whole process: they change under a lock and for the length of a call.
_SWITCHES = threading.Lock()
_REDUCED = ("tf32", "bf16")


def _switches(device: torch.device) -> list:
    owner = torch.backends.mkldnn if device.type == "cpu" else torch.backends.cudnn
    matmul = torch.backends.mkldnn.matmul if device.type == "cpu" else torch.backends.cuda.matmul
    return [owner.conv, matmul]


@contextlib.contextmanager
def _full_float32(device: torch.device):
    """Float32 products in float32, whatever the process has allowed; free of cost where it allows nothing less."""
    found = _switches(device)
    if not any(s.fp32_precision in _REDUCED for s in found):
        yield
        return
    with _SWITCHES:
        before = [s.fp32_precision for s in found]
        try:
            for switch in found:
                switch.fp32_precision = "ieee"
            yield
        finally:
            for switch, value in zip(found, before, strict=True):
                switch.fp32_precision = value


class _Folded:
    """One convolution's weight in the compute dtype, and packed for oneDNN once an input has come by."""

    def __init__(self, conv: Conv, device: torch.device, dtype: torch.dtype):
        self.geometry = conv.geometry
        self.weight = conv.weight.to(device, dtype).contiguous(memory_format=torch.channels_last)
        self.bias = conv.bias.to(device, dtype)
        self.packed: Tensor | None = None

    def __call__(self, x: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
        if conv_lib.has_pointwise(x):
            if self.packed is None:  # two threads may both pack: either result serves
                with torch.inference_mode(False), torch.no_grad():
                    self.packed = conv_lib.pack(self.weight, x, self.geometry)
            return conv_lib.pointwise(x, self.packed, self.bias, self.geometry, residual, relu)
        y = conv_lib.fprop(x, self.weight, self.bias, self.geometry)
        y = y if residual is None else y.add_(residual)
        return y.relu_() if relu else y

    def library(self) -> str:
        """Whose kernel serves, for a report."""
        probe = torch.empty(1, dtype=self.weight.dtype, device=self.weight.device)
        return "oneDNN conv+post-ops" if conv_lib.has_pointwise(probe) else f"aten conv ({probe.device.type})"

    def memory(self) -> int:
        held = (self.weight, self.bias, self.packed)
        return sum(t.numel() * t.element_size() for t in held if t is not None)


def _step(node: Node, device: torch.device, dtype: torch.dtype):
    """``(function of the input, the folded convolutions it holds)``."""
    convs = [_Folded(conv, device, dtype) for conv in node.convs()]
    if isinstance(node, Stem):
        window = (node.pool_kernel, node.pool_stride, node.pool_padding)
        return (lambda x: F.max_pool2d(convs[0](x, None, True), *window)), convs
    if isinstance(node, ConvAct):
        return (lambda x: convs[0](x, None, node.relu)), convs
    if isinstance(node, Block):
        depth = len(node.main)

        def block(x: Tensor) -> Tensor:
            residual = x if node.shortcut is None else convs[depth](x, None, False)
            for conv in convs[: depth - 1]:
                x = conv(x, None, True)
            return convs[depth - 1](x, residual, True)

        return block, convs
    if isinstance(node, GlobalAvgPool):
        return (lambda x: x.mean((2, 3), keepdim=not node.flatten)), convs
    weight, bias = node.weight.to(device, dtype), node.bias.to(device, dtype)

    def linear(x: Tensor) -> Tensor:
        y = F.linear(x, weight, bias)
        return y.relu_() if node.relu else y

    return linear, convs


class TorchSegment:
    """A segment of plain calls. Where the processor has no arithmetic for the dtype it computes in float32."""

    def __init__(self, segment: Segment, device: torch.device, dtype: torch.dtype, precision: str):
        self.segment, self.device, self.dtype = segment, device, dtype
        widens = conv_lib.widens(torch.empty(0, dtype=dtype, device=device))
        self.compute = torch.float32 if widens else dtype
        self.full = self.compute is torch.float32 and precision != "high" or device.type == "cpu"
        self.steps, self.convs = [], []
        for node in segment.nodes:
            step, convs = _step(node, device, self.compute)
            self.steps.append(step)
            self.convs.append(convs)

    def _guard(self):
        return _full_float32(self.device) if self.full else contextlib.nullcontext()

    def _enter(self, x: Tensor) -> Tensor:
        x = x.to(self.compute)
        return nhwc(x) if x.dim() == 4 else x

    def run(self, x: Tensor) -> Tensor:
        with self._guard():
            x = self._enter(x)
            for step in self.steps:
                x = step(x)
            return x.to(self.dtype)

    def timed(self, x: Tensor) -> tuple[Tensor, list[float]]:
        seconds = []
        with self._guard():
            begin = self._clock()
            x = self._enter(x)
            for step in self.steps:
                x = step(x)
                end = self._clock()
                seconds.append(end - begin)
                begin = end
            return x.to(self.dtype), seconds

    def _clock(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def kernels(self, shape: Shape) -> list[Kernel]:
        note = "" if self.compute is self.dtype else f"computed in {str(self.compute)[6:]}"
        found = []
        for node, convs in zip(self.segment.nodes, self.convs, strict=True):
            libraries = [conv.library() for conv in convs]
            kernel = ", ".join(f"{libraries.count(name)} x {name}" for name in dict.fromkeys(libraries))
            if not libraries:
                kernel = {"global_avg_pool": "aten mean"}.get(node.op, "aten linear")
            kernel += ", aten max_pool2d" if isinstance(node, Stem) else ""
            found.append(Kernel(kernel, note=note))
        return found

    def memory(self, shape: Shape) -> int:
        linear = sum(
            (node.weight.numel() + node.bias.numel()) * self.compute.itemsize
            for node in self.segment.nodes
            if isinstance(node, Linear)
        )
        sizes = [torch.Size(s).numel() * self.compute.itemsize for s in self.segment.shapes(shape)]
        # Input and output of a node and what lies between them; PyTorch's allocator owns it.
        return linear + sum(c.memory() for convs in self.convs for c in convs) + 3 * max(sizes)
