"""segmentation-models-pytorch: the convolution, norm and ReLU that its decoders are made of.

Its ResNet encoders are made of torchvision's blocks, which torchvision's adapter serves. Their stem returns the
activation before the pooling as a feature, so it is not a fused stem.
"""

from __future__ import annotations

from segmentation_models_pytorch.base.modules import Conv2dReLU

from fastres.fusion.registry import Adapter
from fastres.nn.fused import FusedConvBNAct


class FusedConv2dReLU(FusedConvBNAct, Conv2dReLU):
    _fastres_original = Conv2dReLU
    _fastres_names = ("0", "1", "2")


ADAPTERS = [Adapter(Conv2dReLU, FusedConv2dReLU)]
