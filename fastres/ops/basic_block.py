"""basic_block: the residual block 3x3 -> 3x3 of ResNet-18/34 as one differentiable call, on the block engine.

    out = relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut),  shortcut = x or bn_p(conv_p(x))

Formulas, saved tensors and passes are those of ``engine``; kernels are shared with ``bottleneck``.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastres.ops.bottleneck import block, bottleneck_ref
from fastres.ops.params import ConvBN


def basic_block_ref(
    x: Tensor, convs: Sequence[ConvBN], shortcut: ConvBN | None = None, *, upcast: bool = False
) -> Tensor:
    """The same in plain PyTorch, running statistics included; ``upcast`` computes in float64 (the oracle)."""
    return bottleneck_ref(x, convs, shortcut, upcast=upcast)


def basic_block(
    x: Tensor,
    convs: Sequence[ConvBN],
    shortcut: ConvBN | None = None,
    *,
    memory: str = "default",
) -> Tensor:
    """A whole residual basic block, forward and backward.

    Args, returns and errors as :func:`fastres.bottleneck`, with two :class:`fastres.ConvBN`. ``memory="low"``
    computes conv2 and the projection again in backward.
    """
    return block(x, convs, shortcut, memory, "basic_block", 2)
