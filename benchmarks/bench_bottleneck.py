"""bottleneck: identity and projection blocks of a ResNet-50, training step and evaluation."""

from __future__ import annotations

import pytest
from per_op import BATCH, engines_and_dtypes, measure, stage_sides, timing
from torch import nn

from fastres.nn import Bottleneck


@engines_and_dtypes
@pytest.mark.parametrize("channels", stage_sides())
@pytest.mark.parametrize("train", [True, False], ids=["training", "evaluation"])
def bench_identity(benchmark, engine, dtype, channels, train):
    side = stage_sides()[channels]
    module = Bottleneck(channels, channels // 4)
    measure(benchmark, engine, dtype, module, [(BATCH, channels, side, side)], timing.plain_bottleneck, train=train)


@engines_and_dtypes
def bench_projection(benchmark, engine, dtype):
    shortcut = nn.Sequential(nn.Conv2d(256, 512, 1, 2, bias=False), nn.BatchNorm2d(512))
    module = Bottleneck(256, 128, 2, shortcut)
    measure(benchmark, engine, dtype, module, [(BATCH, 256, 56, 56)], timing.plain_bottleneck, train=True)
