"""torchvision: residual blocks, and the stems of ResNet and of the detection and segmentation backbones."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torchvision.models import resnet
from torchvision.models._utils import IntermediateLayerGetter

from fastres.fusion.registry import Adapter
from fastres.nn.fused import FusedBlock, FusedStem

_STEM = ("conv1", "bn1", "relu", "maxpool")


class FusedBasicBlock(FusedBlock, resnet.BasicBlock):
    _fastres_op = "basic_block"
    _fastres_original = resnet.BasicBlock
    _fastres_names = (("conv1", "bn1"), ("conv2", "bn2"))


class FusedBottleneck(FusedBlock, resnet.Bottleneck):
    _fastres_op = "bottleneck"
    _fastres_original = resnet.Bottleneck
    _fastres_names = (("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3"))


class FusedResNet(FusedStem, resnet.ResNet):
    _fastres_original = resnet.ResNet

    def _forward_impl(self, x):
        out = self._fastres_stem(x)
        if out is None:
            return super()._forward_impl(x)
        out = self.layer4(self.layer3(self.layer2(self.layer1(out))))
        return self.fc(torch.flatten(self.avgpool(out), 1))


class FusedIntermediateLayerGetter(FusedStem, IntermediateLayerGetter):
    """The backbone wrapper of detectors and segmenters, where it holds a ResNet from its first layer on."""

    _fastres_original = IntermediateLayerGetter

    @classmethod
    def _fastres_structure(cls, module):
        if tuple(module._modules)[:4] != _STEM:
            return [f"does not begin with {', '.join(_STEM)}"]
        wanted = [name for name in _STEM if name in module.return_layers]
        if wanted:
            return [f"returns {' and '.join(wanted)}, which a fused stem never holds"]
        return super()._fastres_structure(module)

    def forward(self, x):
        out = self._fastres_stem(x)
        if out is None:
            return super().forward(x)
        features = OrderedDict()
        for name, module in list(self._modules.items())[4:]:
            out = module(out)
            if name in self.return_layers:
                features[self.return_layers[name]] = out
        return features


ADAPTERS = [Adapter(c._fastres_original, c) for c in (
    FusedBasicBlock, FusedBottleneck, FusedResNet, FusedIntermediateLayerGetter
)]  # fmt: skip
