"""add_relu on the block outputs of a ResNet-50, forward and backward."""

from __future__ import annotations

import pytest
from per_op import BATCH, engines_and_dtypes, measure, stage_sides, timing

from fastres.nn import AddReLU


@engines_and_dtypes
@pytest.mark.parametrize("channels", stage_sides())
def bench_training(benchmark, engine, dtype, channels):
    side = stage_sides()[channels]
    shape = (BATCH, channels, side, side)
    measure(benchmark, engine, dtype, AddReLU(), [shape, shape], timing.plain_add_relu, train=True)
