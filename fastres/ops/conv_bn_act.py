"""conv_bn_act: ``out = act(bn(conv(x)) [+ residual | + bn_r(residual)])``.

The convolution is the library's (cuDNN, oneDNN), the rest one pass over its output: the block engine with a single
convolution. For inference ``fold_conv_bn`` moves the BN into weight and bias in float64 once, and ``conv_bias_act``
runs the folded convolution with bias, residual and ReLU in the library's own epilogue where it has one, else in
one pass. Saved for backward: x, the convolution's output, per-channel vectors, ReLU bits if a residual enters.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastres import convolution as conv_lib
from fastres import dispatch, riding
from fastres.backends.reference import acc_dtype
from fastres.library import register
from fastres.memory import new
from fastres.ops import bn as steps
from fastres.ops import engine
from fastres.ops.batch_norm_act import batch_norm_act_ref
from fastres.ops.bn import as_given, given, given_vector, matrix, nhwc
from fastres.ops.params import (
    BN,
    ConvBN,
    cast_conv,
    check_activation,
    check_bn,
    check_conv,
    compute_dtype,
)


def conv_bn_act_ref(
    x: Tensor,
    conv: ConvBN,
    *,
    residual: Tensor | None = None,
    residual_bn: BN | None = None,
    relu: bool = True,
    upcast: bool = False,
) -> Tensor:
    """The same in plain PyTorch; ``upcast`` computes in float64 (the oracle)."""
    a = conv_ref(x, conv, upcast)
    return batch_norm_act_ref(a, conv.bn, residual=residual, residual_bn=residual_bn, relu=relu, upcast=upcast)


def conv_ref(x: Tensor, conv: ConvBN, upcast: bool = False) -> Tensor:
    x, w, b = (t.double() if upcast and t is not None else t for t in (x, conv.weight, conv.bias))
    return torch.nn.functional.conv2d(x, w, b, conv.stride, conv.padding, conv.dilation, conv.groups)


def conv_bn_act(
    x: Tensor,
    conv: ConvBN,
    *,
    residual: Tensor | None = None,
    residual_bn: BN | None = None,
    relu: bool = True,
) -> Tensor:
    """Convolution, batch normalisation, residual addition and ReLU.

    Args:
        x: ``[N, C, H, W]``; under autocast it and the weight are cast as ``F.conv2d`` would.
        conv: weight ``[K, C/groups, R, S]``, geometry and BN, see :class:`fastres.ConvBN`.
        residual: ``[N, K, P, Q]`` in the convolution's dtype, added before the ReLU.
        residual_bn: a BN of the residual's own (projection shortcut).
        relu: whether the ReLU is taken.

    Returns: ``[N, K, P, Q]`` in the layout of ``x``. Running statistics are updated where ``training`` is set.

    Raises: TypeError / ValueError naming the argument, before anything is written.

    Equivalent to ``relu(bn(F.conv2d(x, ...)) + residual)``.
    """
    check_activation(x, "x")
    dtype = compute_dtype(x)
    conv = cast_conv(conv, dtype)
    shape = check_conv(conv, "conv", x.shape, dtype, x.device)
    kind = engine.NONE
    units: list = [conv]
    if residual is not None:
        check_activation(residual, "residual", like=residual)
        _check_residual(residual, shape, dtype, x.device)
        kind = engine.TENSOR
    elif residual_bn is not None:
        raise ValueError("residual_bn: got a BN without a residual, expected both or the residual alone")
    if residual_bn is not None:
        check_bn(residual_bn, "residual_bn", shape[1], shape[0] * shape[2] * shape[3], x.device)
        kind = engine.TENSOR_BN
        units.append(residual_bn)
    return as_given(engine.run(x.to(dtype), residual, units, kind, relu, False, "conv_bn_act"), x)


def _check_residual(residual, shape, dtype, device):
    if residual.shape != torch.Size(shape):
        raise ValueError(f"residual: got shape {tuple(residual.shape)}, expected that of the output, {shape}")
    if residual.dtype != dtype:
        raise TypeError(f"residual: got dtype {residual.dtype}, expected that of the output, {dtype}")
    if residual.device != device:
        raise ValueError(f"residual: got device {residual.device}, expected that of x, {device}")


# ---- inference with folded BN


def fold_conv_bn(conv: ConvBN) -> tuple[Tensor, Tensor]:
    """Fold an evaluation BN into its convolution, in float64.

    Returns: (weight in the dtype and memory format of ``conv.weight``, bias ``[K]`` in fp32, or fp64 for float64).
    ``w' = w * s``, ``b' = (b - mean) * s + bias`` with ``s = bn.weight / sqrt(running_var + eps)``.

    Raises: TypeError if ``conv`` is no ConvBN, ValueError if its BN has no running statistics.
    """
    if not isinstance(conv, ConvBN):
        raise TypeError(f"conv: got {type(conv).__name__}, expected fastres.ConvBN")
    w, bn = conv.weight.detach(), conv.bn
    if bn.running_mean is None or bn.running_var is None:
        raise ValueError("conv.bn: got no running statistics, expected those of an evaluation BN")

    def wide(t):
        return None if t is None else t.detach().double()

    s = (wide(bn.running_var) + bn.eps).rsqrt()
    if bn.weight is not None:
        s = s * wide(bn.weight)
    shift = -wide(bn.running_mean) if conv.bias is None else wide(conv.bias) - wide(bn.running_mean)
    bias = shift * s
    if bn.bias is not None:
        bias = bias + wide(bn.bias)
    folded = (w.double() * s[:, None, None, None]).to(w.dtype)
    return folded.contiguous(memory_format=torch.channels_last), bias.to(acc_dtype(w.dtype))


def _folded(x, weight, bias, geometry, residual, relu, backend):
    k = steps.launcher("conv_bn_act", x, weight.shape[0], backend)
    g = engine._geometry(geometry, 0)
    x = nhwc(x)
    if residual is not None:
        residual = given(residual, "residual", x, engine._out_shape(x.shape, weight, g))
    if not backend and conv_lib.has_pointwise(x):
        return conv_lib.pointwise(x, weight, bias, g, residual, relu)
    bias = given_vector(bias, "bias", weight.shape[0], x)
    y = riding.fprop_act(x, weight, bias, g, residual, relu)
    if y is not None:
        return y
    y = conv_lib.fprop(x, weight, None, g)
    k.bias_act(y, *matrix(y), bias, residual, relu, y)
    return y


def _folded_fake(x, weight, bias, geometry, residual, relu, backend):
    return new(x, engine._out_shape(x.shape, weight, engine._geometry(geometry, 0)))


_folded_op = register(
    "conv_bias_act(Tensor x, Tensor weight, Tensor? bias, int[] geometry, Tensor? residual, bool relu, str backend)"
    " -> Tensor",
    _folded,
    _folded_fake,
)


def conv_bias_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    residual: Tensor | None = None,
    relu: bool = True,
) -> Tensor:
    """Inference: ``act(conv(x) + bias + residual)``, typically with what :func:`fold_conv_bn` returned.

    Args: x ``[N, C, H, W]``, weight ``[K, C/groups, R, S]`` of its dtype, bias ``[K]``, residual ``[N, K, P, Q]``.

    Returns: ``[N, K, P, Q]`` in the layout of ``x``. Not differentiable.

    Raises: TypeError / ValueError naming the argument; ValueError if an argument requires grad while grad is on.
    """
    check_activation(x, "x")
    conv = ConvBN(weight, bias, stride, padding, dilation, groups)
    shape = check_conv(conv, "conv", x.shape, x.dtype, x.device, with_bn=False)
    if residual is not None:
        check_activation(residual, "residual", like=residual)
        _check_residual(residual, shape, x.dtype, x.device)
    if torch.is_grad_enabled():
        for what, t in (("x", x), ("weight", weight), ("bias", bias), ("residual", residual)):
            if t is not None and t.requires_grad:
                raise ValueError(f"{what}: got a tensor that requires grad, expected inference (torch.no_grad())")
    return as_given(_folded_op(x, weight, bias, engine.flatten(conv), residual, relu, dispatch.forced()), x)
