"""conv_bn_act on the 3x3 convolutions of a ResNet-50: training step and evaluation."""

from __future__ import annotations

import pytest
from per_op import BATCH, engines_and_dtypes, measure, stage_sides, timing

from fastres.nn import ConvBNAct2d


@engines_and_dtypes
@pytest.mark.parametrize("channels", [outputs // 4 for outputs in stage_sides()])
@pytest.mark.parametrize("train", [True, False], ids=["training", "evaluation"])
def bench_3x3(benchmark, engine, dtype, channels, train):
    side = stage_sides()[4 * channels]
    module = ConvBNAct2d(channels, channels, 3)
    measure(benchmark, engine, dtype, module, [(BATCH, channels, side, side)], timing.plain_conv_bn_act, train=train)
