"""What the per-op measurements share: ResNet-50 layers, plain twins of the modules, device timing."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator

import torch
from torch import nn

import fastres
from fastres import verify
from fastres.bench.timing import device_times
from fastres.nn import AddReLU, BasicBlock, BatchNormAct2d, Bottleneck, ConvBNAct2d, Stem


def resnet50_matrices(batch: int) -> tuple[tuple[int, int], ...]:
    """(channels, rows) of ResNet-50's activations at 224 px: stem, then narrow and wide BN of each stage."""
    sides = {64: 112, 256: 56, 512: 28, 1024: 14, 2048: 7}
    return tuple((channels, batch * side * side) for channels, side in sides.items())


def _shortcut(module, x):
    return x if module.downsample is None else module.downsample(x)


def plain_add_relu(module, x, residual):
    return torch.relu(x + residual)


def plain_batch_norm_act(module, x, residual):
    return torch.relu(nn.BatchNorm2d.forward(module, x) + residual)


def plain_conv_bn_act(module, x):
    return torch.relu(module.bn(module.conv(x)))


def plain_basic_block(m, x):
    return torch.relu(m.bn2(m.conv2(torch.relu(m.bn1(m.conv1(x))))) + _shortcut(m, x))


def plain_bottleneck(m, x):
    out = torch.relu(m.bn1(m.conv1(x)))
    return torch.relu(m.bn3(m.conv3(torch.relu(m.bn2(m.conv2(out))))) + _shortcut(m, x))


def plain_stem(m, x):
    return m.maxpool(torch.relu(m.bn1(m.conv1(x))))


def _projection(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))


def modules(batch: int, size: int) -> Iterator[tuple[str, nn.Module, list[tuple[int, ...]], Callable]]:
    """(op, fastres module, input shapes, the same in plain PyTorch over the module's own children).

    ``size``: side of the activations in stage 1 (56 at 224 px); the image is four times as large.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        wide, narrow = (batch, 256, size, size), (batch, 64, size, size)
        yield "add_relu", AddReLU(), [wide, wide], plain_add_relu
        yield "batch_norm_act", BatchNormAct2d(256), [wide, wide], plain_batch_norm_act
        yield "conv_bn_act", ConvBNAct2d(64, 64, 3), [narrow], plain_conv_bn_act
        yield "basic_block", BasicBlock(64, 64), [narrow], plain_basic_block
        yield "basic_block, strided", BasicBlock(64, 128, 2, _projection(64, 128, 2)), [narrow], plain_basic_block
        yield "bottleneck", Bottleneck(256, 64), [wide], plain_bottleneck
        yield "bottleneck, strided", Bottleneck(256, 128, 2, _projection(256, 512, 2)), [wide], plain_bottleneck
        yield "stem", Stem(), [(batch, 3, 4 * size, 4 * size)], plain_stem


def forced(backend: str, module: nn.Module) -> Callable:
    """The module's forward on one backend; its backward follows the forward."""

    def call(*inputs):
        with fastres.backend(backend):
            return module(*inputs)

    return call


def training_call(call: Callable, inputs: list[torch.Tensor], device: torch.device, dtype: torch.dtype) -> Callable:
    """Forward under autocast and backward, with gradients that are replaced, not accumulated."""
    low = dtype in (torch.bfloat16, torch.float16)

    def run():
        for x in inputs:
            x.grad = None
        with torch.autocast(device.type, dtype if low else torch.bfloat16, enabled=low):
            out = call(*inputs)
        out.backward(torch.ones_like(out))

    return run


def copy_bandwidth(device: torch.device, nbytes: int) -> float:
    """GB/s of a copy of ``nbytes``, bytes read and written both counted."""
    source = torch.empty(nbytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = statistics.median(device_times(lambda: target.copy_(source), device, 10))
    return 2 * nbytes / seconds / 1e9


def bytes_of(arguments: dict, outputs: dict) -> int:
    """Bytes a launch must move at least: every distinct tensor once."""
    tensors = {t.data_ptr(): t for t in (*arguments.values(), *outputs.values()) if isinstance(t, torch.Tensor)}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def stem_case(function: str, dtype: torch.dtype, device: torch.device, N: int, launch) -> tuple[str, dict, dict]:
    """(label, arguments, outputs) of a pooling launch at the size of a ResNet's stem."""
    H, C, P = (112, 64, 56) if N > 8 else (12, 64, 6)
    M = N * P * P
    _, arguments, outputs = verify._cases(function, device, dtype, C, M, launch.tiles(M, C))[0]
    arguments = dict(arguments, N=N, H=H, W=H, P=P, Q=P, x=torch.randn(N, H, H, C, device=device).to(dtype))
    if "dx" in outputs:
        outputs = dict(dx=torch.empty_like(arguments["x"]))
    if "out" in outputs:
        pooled = torch.empty(N, P, P, C, device=device, dtype=dtype)
        outputs = dict(out=pooled, idx=torch.empty_like(pooled, dtype=torch.uint8))
    if "idx" in arguments:
        arguments["grad"] = torch.randn(N, P, P, C, device=device).to(dtype)
        # Taps are what the forward would have written: 0..8 or 255.
        arguments["idx"] = torch.randint(0, 9, (N, P, P, C), device=device, dtype=torch.uint8)
    return "", arguments, outputs
