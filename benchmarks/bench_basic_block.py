"""basic_block: the identity blocks of a ResNet-18/34, training step and evaluation."""

from __future__ import annotations

import pytest
from per_op import BATCH, engines_and_dtypes, measure, stage_sides, timing

from fastres.nn import BasicBlock


@engines_and_dtypes
@pytest.mark.parametrize("channels", [outputs // 4 for outputs in stage_sides()])
@pytest.mark.parametrize("train", [True, False], ids=["training", "evaluation"])
def bench_identity(benchmark, engine, dtype, channels, train):
    side = stage_sides()[4 * channels]
    module = BasicBlock(channels, channels)
    measure(benchmark, engine, dtype, module, [(BATCH, channels, side, side)], timing.plain_basic_block, train=train)
