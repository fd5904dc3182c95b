"""fastres: fused kernels that make residual networks faster in PyTorch without changing what they compute."""

from fastres.dispatch import backend
from fastres.fusion import freeze_bn, fuse, report, restore, unfreeze_bn
from fastres.graphs import graph_step
from fastres.inference import InferenceSession, load, optimize
from fastres.ops.add_relu import add_relu
from fastres.ops.basic_block import basic_block
from fastres.ops.batch_norm_act import batch_norm_act
from fastres.ops.bottleneck import bottleneck
from fastres.ops.conv_bn_act import conv_bias_act, conv_bn_act, fold_conv_bn
from fastres.ops.params import BN, ConvBN
from fastres.ops.stem import stem
from fastres.tuning_run import tune

__version__ = "0.1.0"

__all__ = [
    "BN",
    "ConvBN",
    "InferenceSession",
    "add_relu",
    "backend",
    "basic_block",
    "batch_norm_act",
    "bottleneck",
    "conv_bias_act",
    "conv_bn_act",
    "fold_conv_bn",
    "freeze_bn",
    "fuse",
    "graph_step",
    "load",
    "optimize",
    "report",
    "restore",
    "stem",
    "tune",
    "unfreeze_bn",
]
