"""stem: 7x7 convolution, BN, ReLU and max pooling of a 224 px image, training step and evaluation."""

from __future__ import annotations

import pytest
from per_op import BATCH, engines_and_dtypes, measure, timing

from fastres.nn import Stem


@engines_and_dtypes
@pytest.mark.parametrize("train", [True, False], ids=["training", "evaluation"])
def bench_stem(benchmark, engine, dtype, train):
    measure(benchmark, engine, dtype, Stem(), [(BATCH, 3, 224, 224)], timing.plain_stem, train=train)
