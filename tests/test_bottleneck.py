"""bottleneck: the tests of block_tests.py and the launch function of its own."""

from __future__ import annotations

import launch_tests
from block_tests import BlockTests

from fastres.ops.bottleneck import bottleneck_ref


@launch_tests.parametrize("mask_add")
def test_values(kernels, function, dtype):
    launch_tests.check_values(kernels, function, dtype)


@launch_tests.parametrize("mask_add")
def test_exact(kernels, function, dtype):
    launch_tests.check_exact(kernels, function, dtype)


@launch_tests.parametrize("mask_add")
def test_repeats(kernels, function, dtype):
    launch_tests.check_repeats(kernels, function, dtype)


class TestBottleneck(BlockTests):
    op = "bottleneck"
    reference = staticmethod(bottleneck_ref)
