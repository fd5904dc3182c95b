"""bottleneck: the residual block 1x1 -> 3x3 -> 1x1 as one differentiable call, on the block engine.

    out = relu(bn3(conv3(relu(bn2(conv2(relu(bn1(conv1(x)))))))) + shortcut),  shortcut = x or bn_p(conv_p(x))

Any stride, padding, dilation and groups, placed as the convolutions say (torchvision's v1.5 included). Formulas,
saved tensors and passes are those of ``engine``; He et al., "Deep Residual Learning", CVPR 2016.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastres.ops import engine
from fastres.ops.batch_norm_act import batch_norm_act_ref
from fastres.ops.bn import as_given
from fastres.ops.conv_bn_act import conv_bn_act_ref, conv_ref
from fastres.ops.params import ConvBN, check_activation, check_conv, compute_dtype, weight_dtype

MEMORY = ("default", "low")


def bottleneck_ref(
    x: Tensor, convs: Sequence[ConvBN], shortcut: ConvBN | None = None, *, upcast: bool = False
) -> Tensor:
    """The same in plain PyTorch, running statistics included; ``upcast`` computes in float64 (the oracle)."""
    h = x.double() if upcast else x
    for conv in convs[:-1]:
        h = conv_bn_act_ref(h, conv, upcast=upcast)
    a = conv_ref(h, convs[-1], upcast)
    if shortcut is None:
        return batch_norm_act_ref(a, convs[-1].bn, residual=x, upcast=upcast)
    r = conv_ref(x, shortcut, upcast)
    return batch_norm_act_ref(a, convs[-1].bn, residual=r, residual_bn=shortcut.bn, upcast=upcast)


def block(x: Tensor, convs, shortcut, memory: str, op: str, length: int) -> Tensor:
    """Checks and the engine call that ``bottleneck`` and ``basic_block`` share."""
    check_activation(x, "x")
    if memory not in MEMORY:
        raise ValueError(f"memory: got {memory!r}, expected 'default' or 'low'")
    if not isinstance(convs, Sequence) or len(convs) != length:
        got = len(convs) if isinstance(convs, Sequence) else type(convs).__name__
        raise ValueError(f"convs: got {got}, expected {length} fastres.ConvBN")
    dtype = compute_dtype(x)
    units = list(convs)
    shape = tuple(x.shape)
    for i, conv in enumerate(units):
        shape = check_conv(conv, f"convs[{i}]", shape, weight_dtype(conv, x, dtype), x.device)
    if shortcut is not None:
        units.append(shortcut)
        projected = check_conv(shortcut, "shortcut", tuple(x.shape), weight_dtype(shortcut, x, dtype), x.device)
        if projected != shape:
            raise ValueError(f"shortcut: got output shape {projected}, expected that of the block, {shape}")
    elif shape != tuple(x.shape):
        raise ValueError(f"shortcut: got None with x {tuple(x.shape)} and output {shape}, expected a projection")
    kind = engine.IDENTITY if shortcut is None else engine.PROJECTION
    return as_given(engine.run(x.to(dtype), None, units, kind, True, memory == "low", op), x)


def bottleneck(
    x: Tensor,
    convs: Sequence[ConvBN],
    shortcut: ConvBN | None = None,
    *,
    memory: str = "default",
) -> Tensor:
    """A whole residual bottleneck, forward and backward.

    Args:
        x: ``[N, C, H, W]``, float32, bfloat16, float16 or float64; channels_last is the fast layout. Under autocast
            the convolutions run in its dtype, as with ``F.conv2d``.
        convs: three :class:`fastres.ConvBN` in order.
        shortcut: the projection, or None for the identity (then input and output have one shape).
        memory: ``"default"`` saves 10.25 units of Cm elements a pixel for backward (eager PyTorch: 12), ``"low"``
            6.25, by computing conv3 and the projection again.

    Returns: ``[N, K, P, Q]`` in the layout of ``x``. Running statistics of BNs in training mode are updated once.

    Raises: TypeError / ValueError naming the argument, before anything is written.
    """
    return block(x, convs, shortcut, memory, "bottleneck", 3)
