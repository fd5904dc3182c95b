"""Models and inputs of the inference tests."""

from __future__ import annotations

import json

import torch
from safetensors.torch import load_file, save_file
from torch import nn

import fastres
from fastres.inference import storage
from fastres.inference.cpu_weights import Choice
from fastres.models.resnet import ResNet
from fastres.nn import BasicBlock, Bottleneck


def perturbed(model: nn.Module, seed: int = 5) -> nn.Module:
    """``model`` in evaluation mode with statistics away from 0 and 1, or half of the folding goes untested."""
    generator = torch.Generator().manual_seed(seed)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d) and m.running_var is not None:
            m.running_mean.normal_(0, 0.1, generator=generator)
            m.running_var.uniform_(0.5, 1.5, generator=generator)
            with torch.no_grad():
                m.weight.uniform_(0.5, 1.5, generator=generator)
                m.bias.normal_(0, 0.1, generator=generator)
    return model.eval()


def seeded(build, *args, **kwargs) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return perturbed(build(*args, **kwargs))


def tiny(kind: str = "basic", **options) -> nn.Module:
    """A ResNet with one block a stage."""
    return seeded(
        ResNet, {"basic": BasicBlock, "bottleneck": Bottleneck}[kind], (1, 1, 1, 1), num_classes=10, **options
    )


def _narrow(kind: str, planes: tuple[int, ...], groups: int, width: int) -> nn.Sequential:
    inputs = planes[0]
    layers = [nn.Conv2d(3, inputs, 7, 2, 3, bias=False), nn.BatchNorm2d(inputs), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    block = {"basic": BasicBlock, "bottleneck": Bottleneck}[kind]
    for stage, count in enumerate(planes):
        outputs, stride = count * block.expansion, 2 if stage else 1
        down = None
        if stride != 1 or inputs != outputs:
            down = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        layers += [block(inputs, count, stride, down, groups, width), block(outputs, count, 1, None, groups, width)]
        inputs = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 10))


def narrow(
    kind: str = "basic", planes: tuple[int, ...] = (32, 48, 64), groups: int = 1, width: int = 64
) -> nn.Sequential:
    """A ResNet of few channels, two blocks a stage: for many sizes, threads and instruction sets."""
    return seeded(_narrow, kind, planes, groups, width)


def alternating(segment, shape, kinds: dict) -> dict:
    """In the place of ``CpuSegment._measured``, a choice that no clock would make: every kernel in turn."""
    return {p: Choice(of_conv[i % len(of_conv)], i * 1e-9) for i, (p, of_conv) in enumerate(kinds.items())}


def pixels(batch: int = 2, height: int = 33, width: int = 41, channels: int = 3, seed: int = 1) -> torch.Tensor:
    return torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(seed))


def truth(model: nn.Module, x: torch.Tensor):
    """The model in float64, on PyTorch's own operators."""
    import copy

    with torch.no_grad(), fastres.backend("reference"):
        return copy.deepcopy(model).eval().double()(x.double())


def distance(y: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative L2 distance."""
    assert y.shape == expected.shape
    return float((y.double() - expected).norm() / expected.norm())


def text_of(path) -> str:
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return json.loads(file.read(length))["__metadata__"]["fastres"]


def rewrite(path, target, change=lambda head, tensors: None, rehash=False):
    """The file with its description and tensors changed; ``rehash`` makes it consistent again."""
    head, tensors = json.loads(text_of(path)), load_file(path)
    change(head, tensors)
    if rehash:
        head["sha256"] = storage._hash(head, tensors)
    save_file(tensors, target, metadata={"fastres": json.dumps(head)})
