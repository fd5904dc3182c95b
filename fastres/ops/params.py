"""What a fused op needs to know about the modules it stands for, and the checks on it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class BN(NamedTuple):
    """A batch normalisation over the channels of ``[N, C, H, W]``.

    weight, bias: ``[C]`` or None (then 1 and 0). running_mean, running_var: ``[C]`` or None.
    training: normalise with the statistics of the batch and update the running ones where given; otherwise the
    running statistics are used, as in ``nn.BatchNorm2d.eval()`` and frozen BN.
    momentum: weight of the new value, or None for a cumulative average, which needs ``num_batches_tracked``
    (a zero-dimensional integer tensor, incremented once per training call where given).
    """

    weight: Tensor | None = None
    bias: Tensor | None = None
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    training: bool = False
    momentum: float | None = 0.1
    eps: float = 1e-5
    num_batches_tracked: Tensor | None = None


class ConvBN(NamedTuple):
    """A 2-D convolution followed by a batch normalisation.

    weight: ``[K, C/groups, R, S]``, bias: ``[K]`` or None; stride, padding, dilation: pairs (height, width).
    """

    weight: Tensor
    bias: Tensor | None = None
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    bn: BN = BN()


DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_activation(x, what: str, like: Tensor | None = None) -> None:
    """``x`` is a dense floating ``[N, C, H, W]`` tensor; with ``like``: of its shape, dtype and device."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{what}: got {type(x).__name__}, expected a torch.Tensor")
    if x.layout != torch.strided:
        raise ValueError(f"{what}: got layout {x.layout}, expected a strided tensor")
    if x.dtype not in DTYPES:
        raise TypeError(f"{what}: got dtype {x.dtype}, expected float32, bfloat16, float16 or float64")
    if like is not None:
        check_like(x, what, like)
        return
    if x.dim() != 4:
        raise ValueError(f"{what}: got shape {tuple(x.shape)}, expected 4 dimensions [N, C, H, W]")
    if x.shape[1] == 0:
        raise ValueError(f"{what}: got shape {tuple(x.shape)}, expected at least one channel")


def check_like(x: Tensor, what: str, like: Tensor, of: str = "x") -> None:
    if x.shape != like.shape:
        raise ValueError(f"{what}: got shape {tuple(x.shape)}, expected that of {of}, {tuple(like.shape)}")
    if x.dtype != like.dtype:
        raise TypeError(f"{what}: got dtype {x.dtype}, expected that of {of}, {like.dtype}")
    if x.device != like.device:
        raise ValueError(f"{what}: got device {x.device}, expected that of {of}, {like.device}")


def _fits(v, C: int, device: torch.device) -> bool:
    """Whether `_check_vector` has nothing to say about ``v``; a block asks it thirty times a call."""
    return v is None or (isinstance(v, Tensor) and v.shape == (C,) and v.dtype in DTYPES and v.device == device)


def _check_vector(v, what: str, C: int, device: torch.device) -> None:
    if v is None:
        return
    if not isinstance(v, Tensor):
        raise TypeError(f"{what}: got {type(v).__name__}, expected a torch.Tensor or None")
    if v.dtype not in DTYPES:
        raise TypeError(f"{what}: got dtype {v.dtype}, expected a floating point dtype")
    if v.shape != (C,):
        raise ValueError(f"{what}: got shape {tuple(v.shape)}, expected ({C},)")
    if v.device != device:
        raise ValueError(f"{what}: got device {v.device}, expected {device}")


def check_bn(bn: BN, what: str, C: int, M: int, device: torch.device) -> None:
    """All of a BN's vectors fit ``C`` channels on ``device``; batch statistics have at least two values each."""
    if not isinstance(bn, BN):
        raise TypeError(f"{what}: got {type(bn).__name__}, expected fastres.BN")
    for at, vector in enumerate(bn[:4]):
        if not _fits(vector, C, device):
            _check_vector(vector, f"{what}.{BN._fields[at]}", C, device)
    if not bn.eps >= 0:
        raise ValueError(f"{what}.eps: got {bn.eps}, expected a number >= 0")
    if (bn.running_mean is None) != (bn.running_var is None):
        raise ValueError(f"{what}.running_mean and {what}.running_var: expected both or neither")
    for name, buffer in (("running_mean", bn.running_mean), ("running_var", bn.running_var)):
        if buffer is not None and buffer.requires_grad:
            raise ValueError(f"{what}.{name}: got a tensor that requires grad, expected a buffer without")
    momentum, tracked = bn.momentum, bn.num_batches_tracked
    if momentum is not None and not isinstance(momentum, (int, float)):
        raise TypeError(f"{what}.momentum: got {momentum!r}, expected a number or None")
    if tracked is not None:
        if not isinstance(tracked, Tensor):
            got = type(tracked).__name__
            raise TypeError(f"{what}.num_batches_tracked: got {got}, expected a torch.Tensor or None")
        if tracked.is_floating_point() or tracked.dim() != 0:
            got = f"{tracked.dtype} of shape {tuple(tracked.shape)}"
            raise ValueError(f"{what}.num_batches_tracked: got {got}, expected an integer tensor without dimensions")
        if tracked.device != device:
            raise ValueError(f"{what}.num_batches_tracked: got device {tracked.device}, expected {device}")
    if not bn.training:
        if bn.running_mean is None:
            raise ValueError(f"{what}: got training=False without running statistics, expected one of the two")
        return
    if M == 1:
        raise ValueError(f"{what}: got one value per channel in training, expected more (N*H*W > 1)")
    if bn.running_mean is not None and bn.momentum is None and bn.num_batches_tracked is None:
        raise ValueError(f"{what}.momentum: got None without num_batches_tracked, expected a number or the counter")


def out_size(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def _check_pair(pair, what: str, name: str, least: int) -> None:
    if type(pair) is tuple and len(pair) == 2:
        height, width = pair
        if type(height) is int and type(width) is int and height >= least and width >= least:
            return
    what = f"{what}.{name}"
    if not (isinstance(pair, tuple) and len(pair) == 2 and all(isinstance(v, int) for v in pair)):
        raise TypeError(f"{what}: got {pair!r}, expected a tuple of two integers")
    if min(pair) < least:
        raise ValueError(f"{what}: got {pair}, expected integers >= {least}")


def check_conv(
    conv: ConvBN, what: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, with_bn: bool = True
) -> tuple[int, int, int, int]:
    """The convolution accepts an input of ``shape`` and its BN what comes out. Returns the output shape."""
    if not isinstance(conv, ConvBN):
        raise TypeError(f"{what}: got {type(conv).__name__}, expected fastres.ConvBN")
    w = conv.weight
    if not isinstance(w, Tensor):
        raise TypeError(f"{what}.weight: got {type(w).__name__}, expected a torch.Tensor")
    if w.dim() != 4 or w.numel() == 0:
        raise ValueError(f"{what}.weight: got shape {tuple(w.shape)}, expected [K, C/groups, R, S], none of them zero")
    _check_pair(conv.stride, what, "stride", 1)
    _check_pair(conv.padding, what, "padding", 0)
    _check_pair(conv.dilation, what, "dilation", 1)
    N, C, H, W = shape
    K, per_group, R, S = w.shape
    if not isinstance(conv.groups, int) or conv.groups < 1 or K % conv.groups:
        raise ValueError(f"{what}.groups: got {conv.groups}, expected a divisor of the {K} output channels")
    if per_group * conv.groups != C:
        raise ValueError(f"{what}.weight: got {per_group * conv.groups} input channels, expected {C}")
    if w.dtype != dtype:
        raise TypeError(f"{what}.weight: got dtype {w.dtype}, expected {dtype} (use autocast to mix them)")
    if w.device != device:
        raise ValueError(f"{what}.weight: got device {w.device}, expected {device}")
    if not _fits(conv.bias, K, device):
        _check_vector(conv.bias, f"{what}.bias", K, device)
    P = out_size(H, R, conv.stride[0], conv.padding[0], conv.dilation[0])
    Q = out_size(W, S, conv.stride[1], conv.padding[1], conv.dilation[1])
    if P < 1 or Q < 1:
        raise ValueError(f"{what}: got an input of {H}x{W}, expected one no smaller than the dilated {R}x{S} kernel")
    if with_bn:
        check_bn(conv.bn, f"{what}.bn", K, N * P * Q, device)
    return (N, K, P, Q)


def _autocast(device: torch.device) -> bool:
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype convolutions run in: autocast's where it is on (as for ``F.conv2d``), else that of ``x``."""
    kind, dtype = x.device.type, x.dtype
    if dtype is not torch.float64 and kind != "meta" and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return dtype


def weight_dtype(conv, x: Tensor, dtype: torch.dtype) -> torch.dtype:
    """What ``conv.weight`` must be for a convolution in ``dtype``: under autocast any float, it is cast on the way."""
    weight = conv.weight if isinstance(conv, ConvBN) else None
    free = isinstance(weight, Tensor) and weight.is_floating_point() and _autocast(x.device)
    return weight.dtype if free else dtype


def cast_conv(conv: ConvBN, dtype: torch.dtype) -> ConvBN:
    """Under autocast weight and bias in ``dtype``, differentiably: what it does to a convolution's arguments."""
    if not isinstance(conv, ConvBN) or not isinstance(conv.weight, Tensor) or not _autocast(conv.weight.device):
        return conv
    bias = conv.bias.to(dtype) if isinstance(conv.bias, Tensor) else conv.bias
    return conv._replace(weight=conv.weight.to(dtype), bias=bias)
