"""The block engine: a chain of convolutions, each with its BN, closed by residual, ReLU and one autograd.Function.

    h_0 = x;  a_i = conv_i(h_i);  h_{i+1} = relu(bn_i(a_i));  out = act(bn_n(a_n) + shortcut)

Everything between two convolutions is one pass over memory forward. Backward, per convolution: the ReLU's mask, the BN
reductions and the recomputed activation h share one pass, the affine map of the BN gradient is the second, written over
the incoming gradient. The residual's gradient joins in one pass. Whatever of this rides along with a convolution, or is
formed by one while it loads its operands, does so in `fastres.riding`, which falls back on these passes.

Saved: x, the convolution outputs a_i, per-channel vectors and the last ReLU's bits, but no h_i: 10.25 of the 12
units of an eager bottleneck. ``memory="low"`` also drops a_n and the projection's output and computes those
convolutions again (6.25 units).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastres import dispatch, riding
from fastres.backends.reference import acc_dtype
from fastres.library import register
from fastres.memory import new
from fastres.ops import bn as steps
from fastres.ops.bn import cast, cast_all, given, matrix, new_mask, nhwc, nothing, saved
from fastres.ops.params import BN, ConvBN, out_size

#: What is added before the last ReLU: nothing, x itself, conv_bn(x), a given tensor, or bn of a given tensor.
NONE, IDENTITY, PROJECTION, TENSOR, TENSOR_BN = range(5)


def _geometry(flat: list[int], i: int):
    sh, sw, ph, pw, dh, dw, groups = flat[7 * i : 7 * i + 7]
    return (sh, sw), (ph, pw), (dh, dw), groups


def flatten(conv: ConvBN) -> list[int]:
    return [*conv.stride, *conv.padding, *conv.dilation, conv.groups]


def _out_shape(shape, weight, g):
    (sh, sw), (ph, pw), (dh, dw), _ = g
    N, _, H, W = shape
    K, _, R, S = weight.shape
    return (N, K, out_size(H, R, sh, ph, dh), out_size(W, S, sw, pw, dw))


class _Chain:
    """Unpacked arguments of one engine call."""

    def __init__(self, k, weights, geometry, kind):
        self.k, self.w, self.kind = k, weights, kind
        self.projected = kind == PROJECTION
        self.n = len(weights) - self.projected
        self.g = [_geometry(geometry, i) for i in range(len(weights))]

    def tiles(self, M, C):
        return self.k.tiles(M, C)


def _fwd(x, residual, weights, biases, bn_weight, bn_bias, mean, var, batch_stats, eps, geometry, kind, relu, low,
         save, op, backend):  # fmt: skip
    k = steps.launcher(op, x, weights[0].shape[0], backend)
    weights = cast_all(weights, [x.dtype] * len(weights))
    c = _Chain(k, weights, geometry, kind)
    x = nhwc(x)
    stats, kept = [], []

    def bn(i):
        return bn_weight[i], bn_bias[i], mean[i], var[i], batch_stats[i], eps[i]

    h, last = riding.Activation(x), c.n - 1
    for i in range(c.n):
        a, part = riding.fprop(k, h, weights[i], biases[i], c.g[i], batch_stats[i])
        if i == last:
            break
        if part is None and steps.one_pass_tiles(k, op, a, batch_stats[i], 1, backend):
            h = riding.Activation(new(a, a.shape) if save else a)
            stats.append(steps.normalise(k, op, a, *bn(i), None, None, True, h.tensor, None, backend))
        else:
            stats.append(steps.statistics(k, a, *bn(i), part))
            h = riding.Activation(raw=a, stat=stats[i], room=None if save else a)
        kept.append(a)
    M, C = matrix(a)
    rstat = shortcut = None
    if kind == IDENTITY:
        shortcut = x
    elif kind == PROJECTION:
        entry = riding.Activation(x)
        shortcut, rpart = riding.fprop(k, entry, weights[c.n], biases[c.n], c.g[c.n], batch_stats[c.n])
        rstat = steps.statistics(k, shortcut, *bn(c.n), rpart)
    elif kind in (TENSOR, TENSOR_BN):
        shortcut = given(residual, "residual", a)
        rstat = steps.statistics(k, shortcut, *bn(c.n)) if kind == TENSOR_BN else None
    out = new(a, a.shape) if save else a
    mask = new_mask(a, M, C) if save and relu and shortcut is not None else None
    stats.append(steps.normalise(k, op, a, *bn(last), shortcut, rstat, relu, out, mask, backend, part))
    if rstat is not None:
        stats.append(rstat)
    if not save:
        return [out, *stats]
    saved = kept if low else [*kept, a, *([shortcut] if c.projected else [])]
    return [out, *stats, *saved, *([] if mask is None else [mask])]


def _fwd_fake(x, residual, weights, biases, bn_weight, bn_bias, mean, var, batch_stats, eps, geometry, kind, relu, low,
              save, op, backend):  # fmt: skip
    c = _Chain(None, weights, geometry, kind)
    stat = [x.new_empty((5, w.shape[0]), dtype=acc_dtype(x.dtype)) for w in weights]
    shape, shapes = x.shape, []
    for i in range(c.n):
        shape = _out_shape(shape, weights[i], c.g[i])
        shapes.append(shape)
    if kind == TENSOR_BN:
        stat.append(torch.empty_like(stat[-1]))
    out = new(x, shape)
    if not save:
        return [out, *stat]
    saved = shapes[:-1] if low else [*shapes, *([shape] if c.projected else [])]
    masks = [new_mask(x, *matrix(out))] if relu and kind != NONE else []
    return [out, *stat, *(new(x, s) for s in saved), *masks]


def _bwd(grad, x, residual, weights, biases, stats, acts, mask, geometry, kind, relu, low, batch_stats, needs, op,
         backend):  # fmt: skip
    """needs: x, residual, then for each BN in order: conv weight, conv bias, BN weight, BN bias."""
    k = steps.launcher(op, x, weights[0].shape[0], backend)
    types = [w.dtype for w in weights]
    weights = cast_all(weights, [x.dtype] * len(weights))
    c = _Chain(k, weights, geometry, kind)
    x, acc = nhwc(x), acc_dtype(x.dtype)
    n, last = c.n, c.n - 1
    shape = x.shape
    for i in range(n):
        shape = _out_shape(shape, weights[i], c.g[i])
    grad = given(grad, "grad", x, shape)
    acts = [saved(a, "acts", x) for a in acts]
    stats = [saved(stat, "stats", x, acc) for stat in stats]
    mask = None if mask is None else saved(mask, "mask", x, torch.uint8)
    own = kind in (PROJECTION, TENSOR_BN)
    dparams: list[list] = [[None] * 4 for _ in stats]

    def need(i, j):
        return needs[2 + 4 * i + j]

    def below(i):
        """Whether anything under convolution i wants its input's gradient."""
        return needs[0] or any(needs[2 : 2 + 4 * i])

    def source(i):
        """The input of convolution i."""
        return riding.Activation(x) if i == 0 else riding.Activation(raw=acts[i - 1], stat=stats[i - 1])

    h = source(last)
    if low:
        acts.append(riding.fprop(k, h, weights[last], biases[last], c.g[last], batch_stats[last], again=True)[0])
        if c.projected:
            again = riding.fprop(k, source(0), weights[n], biases[n], c.g[n], batch_stats[n], again=True)
            acts.append(again[0])
    shortcut = acts[n] if c.projected else (given(residual, "residual", grad) if kind == TENSOR_BN else None)
    rstat = stats[n] if own else None

    def coefficients(part, plane, i):
        T, (M, C) = part.shape[1], matrix(acts[min(i, last)])  # the shortcut has the output's shape
        dparams[i][2], dparams[i][3], coef = steps.backward_coefficients(
            k, part, plane, T, M, C, stats[i], batch_stats[i], need(i, 2), need(i, 3)
        )
        return coef

    def in_one(dy, i, bits, act, da, dres, y):
        """Reduction, coefficients and map of BN i in one launch, where that can be."""
        vectors = steps.backward_in_one(k, op, dy, acts[i], stats[i], bits, act, batch_stats[i], need(i, 2), need(i, 3),
                                        da, dres, y, backend)  # fmt: skip
        if vectors is not None:
            dparams[i][2], dparams[i][3] = vectors
        return vectors is not None

    want_res = c.projected or (kind in (TENSOR, TENSOR_BN) and needs[1])
    dres = new(x, grad.shape) if want_res else None
    whole = not own and bool(steps.one_pass_tiles(k, op, grad, batch_stats[last], 2, backend))
    da = new(x, grad.shape) if want_res or whole else None
    if whole:
        in_one(grad, last, mask, relu, da, dres, None)
        dy = riding.Gradient(da)
    else:
        M, C = matrix(grad)
        T = c.tiles(M, C)
        part = torch.empty((3 if own else 2, T, C), dtype=stats[last].dtype, device=grad.device)
        k.bn_bwd_reduce(grad, acts[last], M, C, stats[last], shortcut, rstat, mask, relu, T, part, None)
        coef = coefficients(part, 1, last)
        rcoef = coefficients(part, 2, n) if own else None
        if want_res:
            k.bn_bwd_apply(grad, acts[last], M, C, stats[last], coef, shortcut, rstat, rcoef, mask, relu, da, dres)
            dy = riding.Gradient(da)
        else:
            dy = riding.Gradient(dy=grad, raw=acts[last], stat=stats[last], coef=coef, bits=mask, relu=relu)

    dx = None
    for i in range(last, -1, -1):
        join, wants = None, needs[0] if i == 0 else below(i)
        if i == 0 and wants:
            # The gradient of x by way of the shortcut.
            if c.projected:
                wanted = True, need(n, 0), need(n, 1)
                dx, _, _, *dparams[n][:2] = riding.backward(
                    k, riding.Gradient(dres), source(0), weights[n], c.g[n], wanted
                )
                join = dx, None
            elif kind == IDENTITY:
                join = grad, mask
        dh, part, behind, dparams[i][0], dparams[i][1] = riding.backward(
            k, dy, h, weights[i], c.g[i], (wants, need(i, 0), need(i, 1)), join,
            whole=lambda dx, y, i=i: in_one(dx, i - 1, None, True, dx, None, y),
        )  # fmt: skip
        if i == 0:
            dx = dh
        elif not wants:
            break
        elif part is None:
            dy, h = riding.Gradient(dh), source(i - 1)
        else:
            # What rode along with the dgrad is behind the ReLU already.
            dy = riding.Gradient(dy=dh, raw=acts[i - 1], stat=stats[i - 1], coef=coefficients(part, 1, i - 1),
                                 relu=not behind, room=dh)  # fmt: skip
            h = source(i - 1)
    if c.projected and not needs[0] and (need(n, 0) or need(n, 1)):
        dparams[n][:2] = riding.wgrad(k, riding.Gradient(dres), source(0), weights[n], c.g[n], need(n, 1))
    for row, dw in zip(dparams, cast_all([row[0] for row in dparams[: len(types)]], types), strict=False):
        row[0] = dw
    flat = [t if need(i, j) else None for i, row in enumerate(dparams) for j, t in enumerate(row)]
    return [dx if needs[0] else None, None if c.projected else dres, *flat]


def _bwd_whole(grad, x, *rest):
    """As an operator has to return it: a placeholder for what was not asked for."""
    return [nothing(x) if t is None else t for t in _bwd(grad, x, *rest)]


def _bwd_fake(grad, x, residual, weights, biases, stats, acts, mask, geometry, kind, relu, low, batch_stats, needs, op,
              backend):  # fmt: skip
    out = [new(x, x.shape) if needs[0] else nothing(x)]
    out.append(new(x, grad.shape) if needs[1] and kind in (TENSOR, TENSOR_BN) else nothing(x))
    for i, stat in enumerate(stats):
        K = stat.shape[1]
        conv = i < len(weights)
        weight = torch.empty_like(weights[i]) if conv else nothing(x)
        row = [weight, x.new_empty(K) if conv else nothing(x), stat.new_empty(K), stat.new_empty(K)]
        out += [t if needs[2 + 4 * i + j] else nothing(x) for j, t in enumerate(row)]
    return out


fwd_op = register(
    "block_fwd(Tensor x, Tensor? residual, Tensor[] weights, Tensor?[] biases, Tensor?[] bn_weight, Tensor?[] bn_bias,"
    " Tensor?[] mean, Tensor?[] var, bool[] batch_stats, float[] eps, int[] geometry, int kind, bool relu, bool low,"
    " bool save, str op, str backend) -> Tensor[]",
    _fwd,
    _fwd_fake,
)
bwd_op = register(
    "block_bwd(Tensor grad, Tensor x, Tensor? residual, Tensor[] weights, Tensor?[] biases, Tensor[] stats,"
    " Tensor[] acts, Tensor? mask, int[] geometry, int kind, bool relu, bool low, bool[] batch_stats, bool[] needs,"
    " str op, str backend) -> Tensor[]",
    _bwd_whole,
    _bwd_fake,
    _bwd,
)


class _Block(torch.autograd.Function):
    """Differentiable inputs, flat: x, residual, then conv weight, conv bias, BN weight, BN bias per unit."""

    @staticmethod
    def forward(ctx, plan, x, residual, *params):
        geometry, kind, relu, low, op, backend, mean, var, batch_stats, eps, n_conv = plan
        weights, biases = list(params[0 : 4 * n_conv : 4]), list(params[1 : 4 * n_conv : 4])
        bn_weight, bn_bias = list(params[2::4]), list(params[3::4])
        out, *rest = fwd_op(
            x, residual, weights, biases, bn_weight, bn_bias, mean, var, batch_stats, eps, geometry, kind, relu, low,
            True, op, backend,
        )  # fmt: skip
        units = len(batch_stats)
        stats, rest = rest[:units], rest[units:]
        ctx.has_mask = relu and kind != NONE
        kept = residual if kind == TENSOR_BN else None
        ctx.save_for_backward(x, kept, *weights, *biases, *stats, *rest)
        ctx.plan, ctx.n_conv, ctx.units = (geometry, kind, relu, low, batch_stats, op, backend), n_conv, units
        ctx.types = [None if p is None else p.dtype for p in params]
        ctx.mark_non_differentiable(*stats)
        ctx.set_materialize_grads(False)  # no zeros in the place of the statistics' gradients
        return (out, *stats)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, *_stats):
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        geometry, kind, relu, low, batch_stats, op, backend = ctx.plan
        n, units = ctx.n_conv, ctx.units
        x, residual, *saved = ctx.saved_tensors
        weights, biases, stats = saved[:n], saved[n : 2 * n], saved[2 * n : 2 * n + units]
        acts, mask = list(saved[2 * n + units :]), None
        if ctx.has_mask:
            acts, mask = acts[:-1], acts[-1]
        needs = list(ctx.needs_input_grad[1:])
        grads = bwd_op(
            grad, x, residual, weights, biases, stats, acts, mask, geometry, kind, relu, low, batch_stats, needs, op,
            backend,
        )  # fmt: skip
        types = [x.dtype, x.dtype, *ctx.types]
        return None, *(cast(g, t) if need else None for g, t, need in zip(grads, types, needs, strict=True))


def run(x: Tensor, residual, units: list[ConvBN | BN], kind: int, relu: bool, low: bool, op: str) -> Tensor:
    """One block over checked arguments. ``units``: the convolutions in order, the projection (or the residual's
    BN) last. Returns the output in NHWC; running statistics are updated."""
    convs = [u for u in units if isinstance(u, ConvBN)]
    bns = [u.bn if isinstance(u, ConvBN) else u for u in units]
    mean, var = [b.running_mean for b in bns], [b.running_var for b in bns]
    batch_stats, eps = [b.training for b in bns], [float(b.eps) for b in bns]
    geometry = [v for c in convs for v in flatten(c)]
    backend = dispatch.forced()
    params: list[Tensor | None] = []
    for u, b in zip(units, bns, strict=True):
        params += [u.weight, u.bias, b.weight, b.bias] if isinstance(u, ConvBN) else [None, None, b.weight, b.bias]
    inputs = (x, residual, *params)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        plan = (geometry, kind, relu, low, op, backend, mean, var, batch_stats, eps, len(convs))
        out, *stats = _Block.apply(plan, *inputs)
    else:
        out, *stats = fwd_op(
            x, residual, [c.weight for c in convs], [c.bias for c in convs], [b.weight for b in bns],
            [b.bias for b in bns], mean, var, batch_stats, eps, geometry, kind, relu, low, False, op, backend,
        )  # fmt: skip
    if any(batch_stats):
        steps.update_running(bns, stats, _counts(x, out, convs, kind))
    return out


def _counts(x: Tensor, out: Tensor, convs: list[ConvBN], kind: int) -> list[int]:
    """Values per channel of each unit's BN."""
    shape, counts = x.shape, []
    projected = kind == PROJECTION
    for c in convs[: len(convs) - projected]:
        shape = _out_shape(shape, c.weight, (c.stride, c.padding, c.dilation, c.groups))
        counts.append(shape[0] * shape[2] * shape[3])
    if projected or kind == TENSOR_BN:
        counts.append(out.shape[0] * out.shape[2] * out.shape[3])
    return counts
