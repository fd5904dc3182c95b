"""Modules read at call time into the parameter tuples of the ops: geometry, mode, eps and momentum as they are now.

Client libraries change ``conv.stride``, ``bn.training`` or ``bn.momentum`` after construction, so nothing read here
is ever kept.
"""

from __future__ import annotations

from torch import nn

from fastres.nn.frozen import FrozenBatchNorm2d
from fastres.ops.params import BN, ConvBN

# Frozen norms of other libraries: buffers weight, bias, running_mean, running_var and an eps. Named, not imported.
BUFFER_NORMS = frozenset({("torchvision.ops.misc", "FrozenBatchNorm2d")})


# nn.Module.__getattr__ costs more than the dictionaries it looks into, and a block has thirty tensors to look up.


def read_batch_norm(bn: nn.BatchNorm2d) -> BN:
    """``bn`` as ``nn.BatchNorm2d.forward`` would read it; subclasses are taken for their statistics only."""
    parameters, buffers = bn._parameters, bn._buffers
    training, momentum, tracked = bn.training, bn.momentum, None
    mean, var = buffers.get("running_mean"), buffers.get("running_var")
    if training:
        if bn.track_running_stats:
            tracked = buffers.get("num_batches_tracked")
            if momentum is None and tracked is None:
                momentum = 0.0  # nn.BatchNorm2d's own reading of this pair
        else:
            mean = var = None
    else:
        training = mean is None and var is None
    return BN(parameters.get("weight"), parameters.get("bias"), mean, var, training, momentum, bn.eps, tracked)


def _read_frozen(bn) -> BN:
    affine, buffers = bn._parameters or bn._buffers, bn._buffers
    mean, var = buffers["running_mean"], buffers["running_var"]
    return BN(affine.get("weight"), affine.get("bias"), mean, var, False, 0.0, bn.eps, None)


def is_buffer_norm(kind: type) -> bool:
    """Whether ``kind`` is another library's frozen norm, which keeps its affine parameters as buffers."""
    return (kind.__module__, kind.__qualname__) in BUFFER_NORMS


def can_read(kind: type) -> bool:
    """Whether ``kind`` (an exact class: a subclass may do more) is a normalisation that ``read_bn`` understands."""
    return kind is nn.BatchNorm2d or kind is FrozenBatchNorm2d or is_buffer_norm(kind)


def read_bn(bn: nn.Module) -> BN:
    """The :class:`fastres.BN` that computes what ``bn`` computes now.

    bn: exactly ``nn.BatchNorm2d``, ``fastres.nn.FrozenBatchNorm2d`` or ``torchvision.ops.FrozenBatchNorm2d``.
    Raises TypeError for anything else.
    """
    kind = type(bn)
    if kind is nn.BatchNorm2d:
        return read_batch_norm(bn)
    if kind is FrozenBatchNorm2d or is_buffer_norm(kind):
        return _read_frozen(bn)
    raise TypeError(f"bn: got {kind.__module__}.{kind.__qualname__}, expected torch.nn.BatchNorm2d or a frozen one")


def read_conv_bn(conv: nn.Conv2d, bn: nn.Module) -> ConvBN:
    """The :class:`fastres.ConvBN` that computes ``bn(conv(x))`` as the two modules stand now."""
    weight, bias = conv._parameters["weight"], conv._parameters["bias"]
    return ConvBN(weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups, read_bn(bn))
