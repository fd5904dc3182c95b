"""stem: ``out = maxpool(relu(bn(conv(x))))``, the entrance of a ResNet.

Forward    the convolution is the library's; BN, ReLU and pooling are one pass that never writes the normalised
           image. Each output keeps one byte: the winning tap of its window, or 255 where no gradient passes.
Backward   the BN reductions run over the pooled pixels (a quarter of the image), then one pass writes the gradient
           of the convolution's output: every pixel collects the windows it won.
Saved      x, the convolution's output, per-channel vectors, one byte an output (PyTorch: three images, 8 bytes).
Ties       the first maximum in row-major order wins and a NaN wins over all, as in ``F.max_pool2d``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastres import dispatch, riding
from fastres.backends.reference import acc_dtype
from fastres.library import register
from fastres.memory import new
from fastres.ops import bn as steps
from fastres.ops import engine
from fastres.ops.bn import as_given, cast, given, matrix, nhwc, nothing, saved
from fastres.ops.conv_bn_act import conv_bn_act_ref
from fastres.ops.params import BN, ConvBN, cast_conv, check_activation, check_conv, compute_dtype, out_size


def stem_ref(
    x: Tensor,
    conv: ConvBN,
    *,
    pool_kernel: int = 3,
    pool_stride: int = 2,
    pool_padding: int = 1,
    upcast: bool = False,
) -> Tensor:
    """The same in plain PyTorch, running statistics included; ``upcast`` computes in float64 (the oracle)."""
    y = conv_bn_act_ref(x, conv, upcast=upcast)
    return torch.nn.functional.max_pool2d(y, pool_kernel, pool_stride, pool_padding)


def _pooled(shape, pool):
    size, stride, padding = pool
    N, C, H, W = shape
    return (N, C, out_size(H, size, stride, padding, 1), out_size(W, size, stride, padding, 1))


def _image(a: Tensor, shape, pool):
    N, C, H, W = a.shape
    return (N, H, W, C), (shape[2], shape[3], *pool)


def _fwd(x, weight, bias, bn_weight, bn_bias, mean, var, batch_stats, eps, geometry, pool, save, backend):
    k = steps.launcher("stem", x, weight.shape[0], backend)
    a, part = riding.fprop(k, riding.Activation(nhwc(x)), weight, bias, engine._geometry(geometry, 0), batch_stats)
    stat = steps.statistics(k, a, bn_weight, bn_bias, mean, var, batch_stats, eps, part)
    shape = _pooled(a.shape, pool)
    size, window = _image(a, shape, pool)
    out = new(a, shape)
    idx = new(a, shape, torch.uint8) if save else None
    k.stem_fwd(a, *size, stat, *window, out, idx)
    if not save:
        return out, stat, nothing(x), nothing(x, torch.uint8)
    return out, stat, a, idx


def _fwd_fake(x, weight, bias, bn_weight, bn_bias, mean, var, batch_stats, eps, geometry, pool, save, backend):
    image = engine._out_shape(x.shape, weight, engine._geometry(geometry, 0))
    shape = _pooled(image, pool)
    stat = x.new_empty((5, weight.shape[0]), dtype=acc_dtype(x.dtype))
    if not save:
        return new(x, shape), stat, nothing(x), nothing(x, torch.uint8)
    return new(x, shape), stat, new(x, image), new(x, shape, torch.uint8)


def _bwd(grad, x, weight, a, idx, stat, geometry, pool, batch_stats, needs, backend):
    """needs: x, conv weight, conv bias, BN weight, BN bias."""
    k = steps.launcher("stem", x, weight.shape[0], backend)
    shape, g = _pooled(a.shape, pool), engine._geometry(geometry, 0)
    a, stat, idx = saved(a, "a", x), saved(stat, "stat", x, acc_dtype(x.dtype)), saved(idx, "idx", x, torch.uint8)
    grad = given(grad, "grad", a, shape)
    size, window = _image(a, shape, pool)
    M, C = matrix(a)
    T = k.tiles(*matrix(grad))
    part = torch.empty((2, T, C), dtype=stat.dtype, device=x.device)
    k.stem_bwd_reduce(grad, idx, a, *size, stat, *window, T, part)
    dgamma, dbeta, coef = steps.backward_coefficients(k, part, 1, T, M, C, stat, batch_stats, needs[3], needs[4])
    dx = dw = db = None
    if any(needs[:3]):
        da = new(a, a.shape)
        k.stem_bwd_apply(grad, idx, a, *size, stat, coef, *window, da)
        dy = riding.Gradient(da)
        if needs[1] or needs[2]:
            dw, db = riding.wgrad(k, dy, riding.Activation(nhwc(x)), weight, g, needs[2])
            dw = cast(dw, weight.dtype)
        if needs[0]:
            dx = riding.dgrad(k, dy, x, weight, g)
    wanted = (dx, dw if needs[1] else None, db, dgamma, dbeta)
    return tuple(nothing(x) if t is None else t for t in wanted)


def _bwd_fake(grad, x, weight, a, idx, stat, geometry, pool, batch_stats, needs, backend):
    C = weight.shape[0]
    full = (new(x, x.shape), torch.empty_like(weight), x.new_empty(C), stat.new_empty(C), stat.new_empty(C))
    return tuple(t if need else nothing(x) for t, need in zip(full, needs, strict=True))


fwd_op = register(
    "stem_fwd(Tensor x, Tensor weight, Tensor? bias, Tensor? bn_weight, Tensor? bn_bias, Tensor? mean, Tensor? var,"
    " bool batch_stats, float eps, int[] geometry, int[] pool, bool save, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _fwd,
    _fwd_fake,
)
bwd_op = register(
    "stem_bwd(Tensor grad, Tensor x, Tensor weight, Tensor a, Tensor idx, Tensor stat, int[] geometry, int[] pool,"
    " bool batch_stats, bool[] needs, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _bwd,
    _bwd_fake,
)


class _Stem(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, bn_weight, bn_bias, bn: BN, geometry, pool, backend):
        out, stat, a, idx = fwd_op(
            x, weight, bias, bn_weight, bn_bias, bn.running_mean, bn.running_var, bn.training, bn.eps, geometry, pool,
            True, backend,
        )  # fmt: skip
        ctx.save_for_backward(x, weight, a, idx, stat)
        ctx.plan = (geometry, pool, bn.training, backend)
        ctx.types = [None if t is None else t.dtype for t in (x, weight, bias, bn_weight, bn_bias)]
        ctx.mark_non_differentiable(stat)
        ctx.set_materialize_grads(False)  # no zeros in the place of the statistics' gradient
        return out, stat

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, _stat):
        if grad is None:
            return (None,) * 9
        x, weight, a, idx, stat = ctx.saved_tensors
        geometry, pool, batch_stats, backend = ctx.plan
        needs = list(ctx.needs_input_grad[:5])
        grads = bwd_op(grad, x, weight, a, idx, stat, geometry, pool, batch_stats, needs, backend)
        wanted = (cast(g, t) if need else None for g, t, need in zip(grads, ctx.types, needs, strict=True))
        return (*wanted, None, None, None, None)


def stem(
    x: Tensor,
    conv: ConvBN,
    *,
    pool_kernel: int = 3,
    pool_stride: int = 2,
    pool_padding: int = 1,
) -> Tensor:
    """Convolution, batch normalisation, ReLU and max pooling.

    Args:
        x: ``[N, C, H, W]``; under autocast the convolution runs in its dtype.
        conv: see :class:`fastres.ConvBN`; a ResNet's is 7x7 with stride 2.
        pool_kernel, pool_stride, pool_padding: square window, floor mode, dilation 1; kernel <= 15.

    Returns: ``[N, K, P, Q]`` in the layout of ``x``; running statistics are updated in training mode.

    Raises: TypeError / ValueError naming the argument, before anything is written.
    """
    check_activation(x, "x")
    dtype = compute_dtype(x)
    conv = cast_conv(conv, dtype)
    image = check_conv(conv, "conv", tuple(x.shape), dtype, x.device)
    for what, value, least in (("pool_kernel", pool_kernel, 1), ("pool_stride", pool_stride, 1)):
        if not isinstance(value, int) or value < least:
            raise ValueError(f"{what}: got {value!r}, expected an integer >= {least}")
    if pool_kernel > 15:
        raise ValueError(f"pool_kernel: got {pool_kernel}, expected at most 15 (a tap is one byte)")
    if not isinstance(pool_padding, int) or not 0 <= pool_padding <= pool_kernel // 2:
        raise ValueError(f"pool_padding: got {pool_padding!r}, expected 0 to half of pool_kernel")
    pool = [pool_kernel, pool_stride, pool_padding]
    if min(_pooled(image, pool)[2:]) < 1:
        raise ValueError(f"pool_kernel: got {pool_kernel}, expected one that fits the image of {image[2]}x{image[3]}")
    bn, geometry, backend = conv.bn, engine.flatten(conv), dispatch.forced()
    x_in, x = x, x.to(dtype)
    tensors = (x, conv.weight, conv.bias, bn.weight, bn.bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        out, stat = _Stem.apply(*tensors, bn, geometry, pool, backend)
    else:
        out, stat, _, _ = fwd_op(
            *tensors, bn.running_mean, bn.running_var, bn.training, bn.eps, geometry, pool, False, backend
        )
    steps.update_running([bn], [stat], [image[0] * image[2] * image[3]])
    return as_given(out, x_in)
