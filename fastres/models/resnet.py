"""ResNet, ResNeXt and Wide ResNet for ImageNet-like images, with torchvision's state_dict and initialisation.

He et al., "Deep Residual Learning for Image Recognition" (CVPR 2016); Xie et al., "Aggregated Residual
Transformations for Deep Neural Networks" (CVPR 2017); Zagoruyko & Komodakis, "Wide Residual Networks" (BMVC 2016).
Weights trained with torchvision load as they are: ``model.load_state_dict(torchvision_model.state_dict())``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fastres.nn.blocks import BasicBlock, Bottleneck, conv1x1
from fastres.nn.fused import FusedStem


class ResNet(FusedStem, nn.Module):
    """Images ``[N, 3, H, W]`` to logits ``[N, num_classes]``.

    Args:
        block: ``fastres.nn.BasicBlock`` or ``fastres.nn.Bottleneck`` (or a subclass).
        layers: blocks in each of the four stages.
        zero_init_residual: start every block as the identity (the last norm's weight is 0).
        groups, width_per_group: of the 3x3 convolutions, ResNeXt and Wide ResNet.
        replace_stride_with_dilation: for stages 2 to 4, dilate instead of striding (segmentation).
        norm_layer: called with a channel count; default ``nn.BatchNorm2d``.
        memory: ``"low"`` recomputes each block's last convolution in backward.
    """

    def __init__(self, block: type[BasicBlock | Bottleneck], layers: Sequence[int], num_classes: int = 1000,
                 zero_init_residual: bool = False, groups: int = 1, width_per_group: int = 64,
                 replace_stride_with_dilation: Sequence[bool] | None = None,
                 norm_layer: Callable[..., nn.Module] | None = None, *, memory: str = "default"):  # fmt: skip
        super().__init__()
        dilate = (False, False, False) if replace_stride_with_dilation is None else replace_stride_with_dilation
        if len(dilate) != 3:
            raise ValueError(f"replace_stride_with_dilation: got {dilate!r}, expected None or three booleans")
        if len(layers) != 4:
            raise ValueError(f"layers: got {layers!r}, expected four numbers of blocks")
        norm = nn.BatchNorm2d if norm_layer is None else norm_layer
        self.inplanes, self.dilation = 64, 1
        self.groups, self.base_width = groups, width_per_group
        self.conv1 = nn.Conv2d(3, self.inplanes, 7, 2, 3, bias=False)
        self.bn1 = norm(self.inplanes)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        for i, blocks in enumerate(layers):
            stage = self._stage(block, 64 << i, blocks, 1 if i == 0 else 2, i > 0 and dilate[i - 1], norm, memory)
            setattr(self, f"layer{i + 1}", stage)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(512 * block.expansion, num_classes)
        self._initialise(zero_init_residual)

    def _stage(self, block, planes: int, blocks: int, stride: int, dilate: bool, norm, memory: str) -> nn.Sequential:
        first_dilation = self.dilation
        if dilate:
            self.dilation *= stride
            stride = 1
        outputs = planes * block.expansion
        downsample = None
        if stride != 1 or self.inplanes != outputs:
            downsample = nn.Sequential(conv1x1(self.inplanes, outputs, stride), norm(outputs))
        stage = []
        for i in range(blocks):
            shape = (stride, downsample) if i == 0 else (1, None)
            dilation = first_dilation if i == 0 else self.dilation
            stage.append(
                block(self.inplanes, planes, *shape, self.groups, self.base_width, dilation, norm, memory=memory)
            )
            self.inplanes = outputs
        return nn.Sequential(*stage)

    def _initialise(self, zero_init_residual: bool) -> None:
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(m, nn.BatchNorm2d | nn.GroupNorm) and m.weight is not None:
                nn.init.ones_(m.weight)
                nn.init.zeros_(m.bias)
        if zero_init_residual:
            for m in self.modules():
                last = m.bn3 if isinstance(m, Bottleneck) else m.bn2 if isinstance(m, BasicBlock) else None
                if last is not None and last.weight is not None:
                    nn.init.zeros_(last.weight)

    def forward(self, x: Tensor) -> Tensor:
        out = self._fastres_stem(x)
        if out is None:
            out = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        out = self.layer4(self.layer3(self.layer2(self.layer1(out))))
        return self.fc(torch.flatten(self.avgpool(out), 1))


def _builder(name: str, block, layers: tuple[int, int, int, int], **preset) -> Callable[..., ResNet]:
    def build(**options) -> ResNet:
        return ResNet(block, layers, **{**preset, **options})

    kind = f"{block.__name__} x {layers}" + "".join(f", {k}={v}" for k, v in preset.items())
    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"{name}: :class:`ResNet` of {kind}. Keyword arguments are those of ``ResNet``; random weights."
    return build


resnet18 = _builder("resnet18", BasicBlock, (2, 2, 2, 2))
resnet34 = _builder("resnet34", BasicBlock, (3, 4, 6, 3))
resnet50 = _builder("resnet50", Bottleneck, (3, 4, 6, 3))
resnet101 = _builder("resnet101", Bottleneck, (3, 4, 23, 3))
resnet152 = _builder("resnet152", Bottleneck, (3, 8, 36, 3))
resnext50_32x4d = _builder("resnext50_32x4d", Bottleneck, (3, 4, 6, 3), groups=32, width_per_group=4)
resnext101_32x8d = _builder("resnext101_32x8d", Bottleneck, (3, 4, 23, 3), groups=32, width_per_group=8)
wide_resnet50_2 = _builder("wide_resnet50_2", Bottleneck, (3, 4, 6, 3), width_per_group=128)
wide_resnet101_2 = _builder("wide_resnet101_2", Bottleneck, (3, 4, 23, 3), width_per_group=128)
