"""Small networks made of torchvision's blocks, and pictures for them."""

import pytest
import torch
from torch import nn

torchvision = pytest.importorskip("torchvision", reason="fuses torchvision's models, which is not installed")
resnet = torchvision.models.resnet


def _small(kind="bottleneck"):
    """A ResNet an eighth as wide: all four stages with stride and projection, and one identity block."""
    unit, expansion = (resnet.Bottleneck, 4) if kind == "bottleneck" else (resnet.BasicBlock, 1)
    with torch.device("meta"):
        model = resnet.ResNet(unit, [1, 1, 1, 1], num_classes=5)
    model.conv1, model.bn1 = nn.Conv2d(3, 8, 7, 2, 3, bias=False), nn.BatchNorm2d(8)
    inputs = 8
    for i in range(4):
        stride, planes = (1 if i == 0 else 2), 8 << i
        down = nn.Sequential(nn.Conv2d(inputs, planes * expansion, 1, stride), nn.BatchNorm2d(planes * expansion))
        inputs = planes * expansion
        stage = [unit(down[0].in_channels, planes, stride, down)]
        stage += [unit(inputs, planes)] if i == 0 else []
        setattr(model, f"layer{i + 1}", nn.Sequential(*stage))
    model.fc = nn.Linear(inputs, 5)
    return model.double()


def _block(**options):
    down = nn.Sequential(nn.Conv2d(16, 32, 1, 2, bias=False), nn.BatchNorm2d(32))
    return resnet.Bottleneck(16, 8, stride=2, downsample=down, **options).double()


def _image(batch=2, channels=3, size=32):
    return torch.randn(batch, channels, size, size, dtype=torch.float64)


@pytest.fixture
def small():
    return _small


@pytest.fixture
def block():
    return _block


@pytest.fixture
def image():
    return _image
