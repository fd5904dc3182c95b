"""Convolutions, split into fprop, dgrad and wgrad: PyTorch's (cuDNN, oneDNN) unless a kernel of ours is faster.

On the CPU ``backends/cpu_conv.py`` knows where ours are. On a CPU without bf16/fp16 arithmetic oneDNN has no
primitive for those dtypes and PyTorch falls back to a loop ten times slower than its fp32 (measured on AVX2: 135 ms
against 12.8 ms for a 3x3 of 64 channels at [8, 56, 56]); what our kernels do not serve there (groups) is widened
to fp32 for PyTorch, which is also the more accurate of the two.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from fastres import dispatch
from fastres.backends import cpu_conv
from fastres.problem import Geometry

_CL = torch.channels_last


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


def takes_ours(kind: str, x: Tensor, w: Tensor, g: Geometry, *dense: Tensor) -> bool:
    """Whether the CPU backend's kernel takes this one; ``dense``: what it reads."""
    if x.device.type != "cpu" or dispatch.forced() not in ("", "cpu") or w.dtype != x.dtype:
        return False
    dense_all = all(t.is_contiguous(memory_format=_CL) for t in dense)
    return cpu_conv.wins(kind, x, w, g) and dense_all and cpu_conv.even_taps(w)


def _f(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.float()


def fprop(x: Tensor, w: Tensor, bias: Tensor | None, g: Geometry) -> Tensor:
    """``[N, K, P, Q]`` in channels_last and the dtype of ``x``."""
    stride, padding, dilation, groups = g
    if takes_ours("fprop", x, w, g, x):
        return cpu_conv.fprop(x, w, g, None if bias is None else bias.float())
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
    if takes_ours("dgrad", x, w, g, dy):
        return cpu_conv.dgrad(dy, x.shape, w, g)
    if widens(x):
        # The values of x do not enter; an fp32 view of the right shape avoids widening them.
        shape = torch.empty(1, device=x.device).expand(x.shape)
        like = torch.empty_like(shape, memory_format=torch.channels_last)
        return dgrad(dy.float(), like, w.float(), g).to(x.dtype)
    dx = _backward(dy, x, w, g, [True, False, False])[0]
    return dx.contiguous(memory_format=torch.channels_last)


def _in_strides_of(w: Tensor, dw: Tensor) -> Tensor:
    """``dw`` as autograd's layout contract, and the fakes, promise it."""
    return dw if dw.stride() == w.stride() else torch.empty_like(w, dtype=dw.dtype).copy_(dw)


def both(dy: Tensor, x: Tensor, w: Tensor, g: Geometry, with_bias: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """`dgrad` and `wgrad` in one call of PyTorch's, which costs the host as much as either of them."""
    ours = takes_ours("dgrad", x, w, g, dy) or (not with_bias and takes_ours("wgrad", x, w, g, dy, x))
    if ours or widens(x):
        return dgrad(dy, x, w, g), *wgrad(dy, x, w, g, with_bias)
    dx, dw, db = _backward(dy, x, w, g, [True, True, with_bias])
    return dx.contiguous(memory_format=torch.channels_last), _in_strides_of(w, dw), db if with_bias else None


def wgrad(dy: Tensor, x: Tensor, w: Tensor, g: Geometry, with_bias: bool) -> tuple[Tensor, Tensor | None]:
    """Gradients of the weight, in its strides, and, if asked for, of the bias. Both in the dtype of ``w``, or in the
    float32 they were summed in."""
    if not with_bias and takes_ours("wgrad", x, w, g, dy, x):
        dw, db = cpu_conv.wgrad(dy, x, w, g), None
    elif widens(x):
        dw, db = wgrad(dy.float(), x.float(), w.float(), g, with_bias)
    else:
        _, dw, db = _backward(dy, x, w, g, [False, True, with_bias])
    return _in_strides_of(w, dw), db if with_bias else None


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
