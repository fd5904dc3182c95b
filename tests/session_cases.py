"""Models and inputs of the inference tests."""

from __future__ import annotations

import torch
from torch import nn

import fastres
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
