"""ResNets in plain torch.nn, the baseline where torchvision is missing: no line of fastres runs in them.

Same modules, names and order as torchvision's, hence the same state_dict and the same arithmetic.
"""

from __future__ import annotations

import torch
from torch import nn


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)


class _Block(nn.Module):
    def __init__(self, convs: list[nn.Conv2d], downsample: nn.Module | None):
        super().__init__()
        for i, conv in enumerate(convs, 1):
            self.add_module(f"conv{i}", conv)
            self.add_module(f"bn{i}", nn.BatchNorm2d(conv.out_channels))
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample
        self.depth = len(convs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = x
        for i in range(1, self.depth + 1):
            out = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(out))
            if i < self.depth:
                out = self.relu(out)
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class PlainResNet(nn.Module):
    configuration = ""

    def __init__(self, layers, bottleneck: bool, groups: int, width: int):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        inputs, expansion = 64, 4 if bottleneck else 1
        for stage, blocks in enumerate(layers):
            planes = 64 << stage
            made = []
            for i in range(blocks):
                stride = 2 if stage and not i else 1
                outputs = planes * expansion
                down = None
                if stride != 1 or inputs != outputs:
                    down = nn.Sequential(_conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))
                inner = planes * width // 64 * groups
                if bottleneck:
                    convs = [
                        _conv(inputs, inner, 1), _conv(inner, inner, 3, stride, groups), _conv(inner, outputs, 1)
                    ]  # fmt: skip
                else:
                    convs = [_conv(inputs, planes, 3, stride), _conv(planes, planes, 3)]
                made.append(_Block(convs, down))
                inputs = outputs
            self.add_module(f"layer{stage + 1}", nn.Sequential(*made))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(inputs, 1000)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


#: name -> blocks per stage, bottleneck blocks, groups, width of a group at 64 planes.
CONFIGURATIONS = {
    "resnet18": ((2, 2, 2, 2), False, 1, 64),
    "resnet34": ((3, 4, 6, 3), False, 1, 64),
    "resnet50": ((3, 4, 6, 3), True, 1, 64),
    "resnet101": ((3, 4, 23, 3), True, 1, 64),
    "resnet152": ((3, 8, 36, 3), True, 1, 64),
    "resnext50_32x4d": ((3, 4, 6, 3), True, 32, 4),
    "resnext101_32x8d": ((3, 4, 23, 3), True, 32, 8),
    "wide_resnet50_2": ((3, 4, 6, 3), True, 1, 128),
    "wide_resnet101_2": ((3, 4, 23, 3), True, 1, 128),
}


def build(name: str) -> nn.Module:
    """A ResNet of that name with PyTorch's default initialisation."""
    model = PlainResNet(*CONFIGURATIONS[name])
    model.configuration = name
    return model
