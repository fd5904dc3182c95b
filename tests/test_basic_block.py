"""basic_block: the tests of block_tests.py; its launch functions are those of batch_norm_act and bottleneck."""

from __future__ import annotations

from block_tests import BlockTests

from fastres.ops.basic_block import basic_block_ref


class TestBasicBlock(BlockTests):
    op = "basic_block"
    reference = staticmethod(basic_block_ref)
