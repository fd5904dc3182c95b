"""batch_norm_act: ``out = act(bn(x) [+ residual | + bn_r(residual)])`` in one pass over memory.

Forward    bn(x) = (x - mean) * scale + bias, scale = weight / sqrt(var + eps), in fp32 (fp64 for float64);
           the sum is rounded to the dtype of x once, then the ReLU is taken.
Backward   g = grad where the rounded sum let it pass. dbias = sum g, dweight = invstd * sum g (x - mean),
           dx = scale * (g - sum g / M - invstd^2 (x - mean) sum g (x - mean) / M) with batch statistics,
           dx = scale * g with given ones; the residual receives g, or the same map through its own BN.
Saved      x, the residual if it has a BN, per-channel vectors, and the ReLU's mask as bits where a residual
           enters; without one the mask is recomputed from x.
Layout     NHWC native; other layouts are copied to NHWC and the result back. Parameters may be fp32 with
           bf16/fp16 activations.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastres import dispatch
from fastres.backends.reference import acc_dtype
from fastres.library import register
from fastres.memory import new
from fastres.ops import bn as steps
from fastres.ops.bn import as_given, cast, given, matrix, new_mask, nhwc, nothing, saved
from fastres.ops.params import BN, check_activation, check_bn


def batch_norm_act_ref(
    x: Tensor,
    bn: BN,
    *,
    residual: Tensor | None = None,
    residual_bn: BN | None = None,
    relu: bool = True,
    upcast: bool = False,
) -> Tensor:
    """The same in plain PyTorch, running statistics included; ``upcast`` computes in float64 (the oracle)."""
    y = _bn_ref(x, bn, upcast)
    if residual is not None:
        r = residual.double() if upcast else residual
        y = y + (r if residual_bn is None else _bn_ref(residual, residual_bn, upcast))
    return torch.relu(y) if relu else y


def _bn_ref(x, bn: BN, upcast):
    cast = (lambda t: None if t is None else t.double()) if upcast else (lambda t: t)
    momentum = bn.momentum
    if bn.training and bn.num_batches_tracked is not None:
        bn.num_batches_tracked.add_(1)
        if momentum is None:
            momentum = 1.0 / float(bn.num_batches_tracked)
    return torch.nn.functional.batch_norm(
        cast(x),
        cast(bn.running_mean),
        cast(bn.running_var),
        cast(bn.weight),
        cast(bn.bias),
        bn.training,
        momentum or 0.0,
        bn.eps,
    )


def _fwd(x, weight, bias, mean, var, batch_stats, eps, residual, own, rweight, rbias, rmean, rvar, rbatch, reps,
         relu, save, backend):  # fmt: skip
    M, C = matrix(x)
    k = steps.launcher("batch_norm_act", x, C, backend)
    x = nhwc(x)
    residual = None if residual is None else given(residual, "residual", x)
    rstat = steps.statistics(k, residual, rweight, rbias, rmean, rvar, rbatch, reps) if own else None
    out = new(x, x.shape)
    mask = new_mask(x, M, C) if save and relu and residual is not None else None
    bn = (weight, bias, mean, var, batch_stats, eps)
    stat = steps.normalise(k, "batch_norm_act", x, *bn, residual, rstat, relu, out, mask, backend)
    return out, nothing(x, torch.uint8) if mask is None else mask, stat, nothing(stat) if rstat is None else rstat


def _fwd_fake(x, weight, bias, mean, var, batch_stats, eps, residual, own, rweight, rbias, rmean, rvar, rbatch, reps,
              relu, save, backend):  # fmt: skip
    M, C = matrix(x)
    acc = acc_dtype(x.dtype)
    stat = torch.empty((5, C), dtype=acc, device=x.device)
    mask = new_mask(x, M, C) if save and relu and residual is not None else nothing(x, torch.uint8)
    return new(x, x.shape), mask, stat, torch.empty_like(stat) if own else nothing(x, acc)


def _bwd(grad, x, stat, residual, rstat, mask, relu, batch_stats, rbatch, needs, backend):
    """needs: x, residual, weight, bias, residual's weight, residual's bias."""
    M, C = matrix(x)
    k = steps.launcher("batch_norm_act", x, C, backend)
    grad, x, stat = given(grad, "grad", x), nhwc(x), saved(stat, "stat", x, acc_dtype(x.dtype))
    residual = None if residual is None else given(residual, "residual", x)
    mask = None if mask is None else saved(mask, "mask", x, torch.uint8)
    own = rstat is not None
    if own:
        rstat = saved(rstat, "rstat", x, stat.dtype)
    dx = new(x, x.shape)
    dres = new(x, x.shape) if needs[1] else None
    if not own:
        vectors = steps.backward_in_one(k, "batch_norm_act", grad, x, stat, mask, relu, batch_stats, needs[2], needs[3],
                                        dx, dres, None, backend)  # fmt: skip
        if vectors is not None:
            return tuple(nothing(x) if t is None else t for t in (dx, dres, *vectors, None, None))
    T = k.tiles(M, C)
    part = torch.empty((3 if own else 2, T, C), dtype=stat.dtype, device=x.device)
    k.bn_bwd_reduce(grad, x, M, C, stat, residual, rstat, mask, relu, T, part, None)
    dweight, dbias, coef = steps.backward_coefficients(k, part, 1, T, M, C, stat, batch_stats, needs[2], needs[3])
    drweight = drbias = rcoef = None
    if own:
        drweight, drbias, rcoef = steps.backward_coefficients(k, part, 2, T, M, C, rstat, rbatch, needs[4], needs[5])
    if dres is None:
        residual = rstat = rcoef = None  # they serve the residual's gradient alone
    k.bn_bwd_apply(grad, x, M, C, stat, coef, residual, rstat, rcoef, mask, relu, dx, dres)
    return tuple(nothing(x) if t is None else t for t in (dx, dres, dweight, dbias, drweight, drbias))


def _bwd_fake(grad, x, stat, residual, rstat, mask, relu, batch_stats, rbatch, needs, backend):
    vector = stat.new_empty
    C, own = x.shape[1], rstat is not None
    vectors = [vector(C) if n else nothing(x) for n in needs[2:4]]
    vectors += [vector(C) if n and own else nothing(x) for n in needs[4:6]]
    return (new(x, x.shape), new(x, x.shape) if needs[1] else nothing(x), *vectors)


fwd_op = register(
    "batch_norm_act_fwd(Tensor x, Tensor? weight, Tensor? bias, Tensor? mean, Tensor? var, bool batch_stats, float eps,"
    " Tensor? residual, bool own, Tensor? rweight, Tensor? rbias, Tensor? rmean, Tensor? rvar, bool rbatch_stats,"
    " float reps, bool relu, bool save, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _fwd,
    _fwd_fake,
)
bwd_op = register(
    "batch_norm_act_bwd(Tensor grad, Tensor x, Tensor stat, Tensor? residual, Tensor? rstat, Tensor? mask, bool relu,"
    " bool batch_stats, bool rbatch_stats, bool[] needs, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _bwd,
    _bwd_fake,
)


class _BatchNormAct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, residual, rweight, rbias, bn: BN, rbn: BN | None, relu, backend):
        own = rbn or BN()
        out, mask, stat, rstat = fwd_op(
            x, weight, bias, bn.running_mean, bn.running_var, bn.training, bn.eps, residual, rbn is not None, rweight,
            rbias, own.running_mean, own.running_var, own.training, own.eps, relu, True, backend,
        )  # fmt: skip
        has_mask = relu and residual is not None
        kept = residual if rbn is not None else None
        ctx.save_for_backward(x, stat, kept, rstat if rbn is not None else None, mask if has_mask else None)
        ctx.args = (relu, bn.training, own.training, backend)
        ctx.types = [None if t is None else t.dtype for t in (weight, bias, rweight, rbias)]
        ctx.mark_non_differentiable(stat, rstat)
        ctx.set_materialize_grads(False)  # no zeros in the place of the statistics' gradients
        return out, stat, rstat

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, _stat, _rstat):
        if grad is None:
            return (None,) * 10
        x, stat, residual, rstat, mask = ctx.saved_tensors
        relu, batch_stats, rbatch, backend = ctx.args
        need = ctx.needs_input_grad
        needs = [need[0], need[3], need[1], need[2], need[4], need[5]]
        dx, dres, *vectors = bwd_op(grad, x, stat, residual, rstat, mask, relu, batch_stats, rbatch, needs, backend)
        dw, db, drw, drb = (cast(v, t) if n else None for v, t, n in zip(vectors, ctx.types, needs[2:], strict=True))
        return dx if need[0] else None, dw, db, dres if need[3] else None, drw, drb, None, None, None, None


def batch_norm_act(
    x: Tensor,
    bn: BN,
    *,
    residual: Tensor | None = None,
    residual_bn: BN | None = None,
    relu: bool = True,
) -> Tensor:
    """Batch normalisation, residual addition and ReLU in one pass (two in training: statistics first).

    Args:
        x: ``[N, C, H, W]``, float32, bfloat16, float16 or float64; NHWC (channels_last) is the fast layout.
        bn: parameters, statistics and mode, see :class:`fastres.BN`; fp32 parameters with any activation dtype.
        residual: of the shape, dtype and device of ``x``, added before the ReLU.
        residual_bn: a second BN, applied to the residual in the same pass (projection shortcut).
        relu: whether the ReLU is taken.

    Returns: ``[N, C, H, W]`` in the dtype and layout of ``x``. With ``training=True`` the running statistics given
    in ``bn`` (and ``residual_bn``) are updated in place, as ``nn.BatchNorm2d`` does, once per step also under
    activation checkpointing.

    Raises: TypeError / ValueError naming the argument, before anything is written.

    Equivalent to ``relu(F.batch_norm(x, ...) + residual)``. Ioffe & Szegedy, "Batch Normalization", 2015.
    """
    check_activation(x, "x")
    if residual is not None:
        check_activation(residual, "residual", like=x)
    elif residual_bn is not None:
        raise ValueError("residual_bn: got a BN without a residual, expected both or the residual alone")
    M, C = matrix(x)
    check_bn(bn, "bn", C, M, x.device)
    if residual_bn is not None:
        check_bn(residual_bn, "residual_bn", C, M, x.device)
    own = residual_bn or BN()
    backend = dispatch.forced()
    tensors = (x, bn.weight, bn.bias, residual, own.weight, own.bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        out, stat, rstat = _BatchNormAct.apply(*tensors, bn, residual_bn, relu, backend)
    else:
        out, _, stat, rstat = fwd_op(
            x, bn.weight, bn.bias, bn.running_mean, bn.running_var, bn.training, bn.eps, residual,
            residual_bn is not None, own.weight, own.bias, own.running_mean, own.running_var, own.training, own.eps,
            relu, False, backend,
        )  # fmt: skip
    bns = [b for b in (bn, residual_bn) if b is not None]
    steps.update_running(bns, [stat, rstat], [M, M]) if len(bns) == 2 else steps.update_running(bns, [stat], [M])
    return as_given(out, x)
