"""batch_norm_act with a residual, the tail of every ResNet-50 block: training step and evaluation."""

from __future__ import annotations

import pytest
from per_op import BATCH, engines_and_dtypes, measure, stage_sides, timing

from fastres.nn import BatchNormAct2d


@engines_and_dtypes
@pytest.mark.parametrize("channels", stage_sides())
@pytest.mark.parametrize("train", [True, False], ids=["training", "evaluation"])
def bench_block_tail(benchmark, engine, dtype, channels, train):
    side = stage_sides()[channels]
    shape = (BATCH, channels, side, side)
    measure(
        benchmark, engine, dtype, BatchNormAct2d(channels), [shape, shape], timing.plain_batch_norm_act, train=train
    )
