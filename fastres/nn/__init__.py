"""Modules that run on the fused ops and keep the names, arguments and state_dict of the modules they stand for."""

from fastres.nn.blocks import BasicBlock, Bottleneck
from fastres.nn.frozen import FrozenBatchNorm2d
from fastres.nn.layers import AddReLU, BatchNormAct2d, ConvBNAct2d, Stem
from fastres.nn.reading import read_bn, read_conv_bn
from fastres.nn.stage import FusedStage

__all__ = [
    "AddReLU",
    "BasicBlock",
    "BatchNormAct2d",
    "Bottleneck",
    "ConvBNAct2d",
    "FrozenBatchNorm2d",
    "FusedStage",
    "Stem",
    "read_bn",
    "read_conv_bn",
]
