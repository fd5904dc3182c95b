"""Convolutions, split into fprop, dgrad and wgrad: PyTorch's (cuDNN, oneDNN) unless a kernel of ours is faster.

On a CPU without bf16/fp16 arithmetic oneDNN has no primitive for those dtypes and PyTorch falls back to a
loop ten times slower than its fp32 (measured on AVX2: 135 ms against 12.8 ms for a 3x3 of 64 channels at
[8, 56, 56]); there the operands are widened to fp32, which is also the more accurate of the two.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

#: Geometry of one convolution: stride, padding, dilation (height, width each), groups.
Geometry = tuple[tuple[int, int], tuple[int, int], tuple[int, int], int]


@functools.cache
def _native(device_type: str, dtype: torch.dtype) -> bool:
    if device_type != "cpu":
        return True
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return True


def widens(x: Tensor) -> bool:
    """Whether convolutions on ``x`` run in fp32 although ``x`` is narrower."""
    return not _native(x.device.type, x.dtype)


def _f(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.float()


def fprop(x: Tensor, w: Tensor, bias: Tensor | None, g: Geometry) -> Tensor:
    """``[N, K, P, Q]`` in channels_last and the dtype of ``x``."""
    stride, padding, dilation, groups = g
    bias = None if bias is None else bias.to(x.dtype)
    if widens(x):
        return fprop(x.float(), w.float(), _f(bias), g).to(x.dtype)
    y = torch.ops.aten.convolution(x, w, bias, stride, padding, dilation, False, (0, 0), groups)
    return y.contiguous(memory_format=torch.channels_last)


def _backward(dy, x, w, g, which):
    stride, padding, dilation, groups = g
    sizes = [w.shape[0]] if which[2] else None
    return torch.ops.aten.convolution_backward(dy, x, w, sizes, stride, padding, dilation, False, (0, 0), groups, which)


def dgrad(dy: Tensor, x: Tensor, w: Tensor, g: Geometry) -> Tensor:
    """Gradient of the input, channels_last; of ``x`` only shape and dtype matter."""
    if widens(x):
        # The values of x do not enter; an fp32 view of the right shape avoids widening them.
        shape = torch.empty(1, device=x.device).expand(x.shape)
        like = torch.empty_like(shape, memory_format=torch.channels_last)
        return dgrad(dy.float(), like, w.float(), g).to(x.dtype)
    dx = _backward(dy, x, w, g, [True, False, False])[0]
    return dx.contiguous(memory_format=torch.channels_last)


def wgrad(k, dy: Tensor, x: Tensor, w: Tensor, g: Geometry, with_bias: bool) -> tuple[Tensor, Tensor | None]:
    """Gradients of the weight, in its strides, and, if asked for, of the bias. ``k`` is the backend that serves the
    rest of the op: where it has a faster weight gradient of its own, that one runs."""
    if widens(x):
        dw, db = wgrad(k, dy.float(), x.float(), w.float(), g, with_bias)
        return dw.to(w.dtype), None if db is None else db.to(w.dtype)
    stride, padding, dilation, groups = g
    if k.name == "cpu" and not with_bias and k.wins_wgrad(dy, x, w, groups):
        db, dw = None, torch.empty_like(w, memory_format=torch.channels_last)
        k.conv_wgrad(dy, x, stride, padding, dilation, dw)
    else:
        _, dw, db = _backward(dy, x, w, g, [False, True, with_bias])
    if dw.stride() != w.stride():  # autograd's layout contract, and what the fake promises
        dw = torch.empty_like(w).copy_(dw)
    return dw, db if with_bias else None


def has_pointwise(x: Tensor) -> bool:
    """Whether the library has a call that takes bias, residual and ReLU into the convolution's epilogue for ``x``."""
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.bfloat16, torch.float16) or widens(x):
        return False
    return torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled and x.numel() > 0


def pack(w: Tensor, x: Tensor, g: Geometry) -> Tensor:
    """``w`` in the blocked layout oneDNN wants for inputs like ``x``; ``pointwise`` accepts it, for other sizes too."""
    stride, padding, dilation, groups = g
    return torch.ops.mkldnn._reorder_convolution_weight(w, padding, stride, dilation, groups, x.shape)


def _only_nhwc(t: Tensor) -> bool:
    """Whether nobody could take ``t`` for NCHW."""
    return t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous()


def pointwise(x: Tensor, w: Tensor, bias: Tensor | None, g: Geometry, residual: Tensor | None, relu: bool) -> Tensor:
    """Convolution with bias, residual and ReLU as oneDNN post-ops, where ``has_pointwise(x)``; channels_last."""
    stride, padding, dilation, groups = g
    bias = None if bias is None else bias.to(x.dtype)
    act = "relu" if relu else None
    fused = groups == 1 and residual is not None and _only_nhwc(x) and _only_nhwc(residual)
    if residual is not None and x.dtype != torch.float32 and not fused:
        # Where oneDNN does not take the sum, PyTorch falls back to an add_relu that knows float32 only.
        y = pointwise(x, w, bias, g, None, False).add_(residual)
        return y.relu_() if relu else y
    if residual is None:
        y = torch.ops.mkldnn._convolution_pointwise(
            x, w, bias, padding, stride, dilation, groups, act or "none", [None], ""
        )
    else:
        y = torch.ops.mkldnn._convolution_pointwise.binary(
            x, residual, w, bias, padding, stride, dilation, groups, "add", 1.0, act, [None], ""
        )
    return y.contiguous(memory_format=torch.channels_last)
