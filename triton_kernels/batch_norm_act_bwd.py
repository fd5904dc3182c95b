"""batch_norm_act, backward: the reductions, their merge, and the pass that writes the gradients.

``part`` float32 [planes, T, C]: sum g, sum g*(x - mean) and, with rstat, sum g*(r - rmean), where g is the
gradient behind the ReLU. ``coef`` float32 [3, C]: dx = coef0*g + coef1*(x - mean) + coef2.
"""

import triton
import triton.language as tl

from . import configs
from .tile import bounds, channels, load_mask, load_rows, load_stat, normalise, passes, place, relu, store_rows


@triton.jit
def _behind_relu(
    grad_ptr, mask_ptr, v, row, c0, c, C, rows_left, keep, RELU: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr
):
    """The gradient where the ReLU passed: by the mask, or by the recomputed activation v; all of it without RELU."""
    g = load_rows(grad_ptr, row, c, C, keep)
    if RELU:
        if mask_ptr is not None:
            g = tl.where(load_mask(mask_ptr, row, c0, C, rows_left, BM, BC), g, 0.0)
        else:
            g = tl.where(passes(v), g, 0.0)
    return g


@triton.jit(do_not_specialize=["M", "C", "T", "R"])
def _bn_bwd_reduce_kernel(
    grad_ptr,
    x_ptr,
    M,
    C,
    stat_ptr,
    residual_ptr,
    rstat_ptr,
    mask_ptr,
    T,
    R,
    part_ptr,
    y_ptr,
    RELU: tl.constexpr,
    ALIGNED: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
):
    C = channels(C, ALIGNED)
    t, c0, c, in_c = place(C, BC)
    lo, hi = bounds(t, R, M)
    i = tl.arange(0, BM)
    mean, scale, bias = load_stat(stat_ptr, C, c, in_c)
    sum_g = tl.zeros([BM, BC], tl.float32)
    sum_gx = tl.zeros([BM, BC], tl.float32)
    if rstat_ptr is not None:
        rmean = tl.load(rstat_ptr + c, mask=in_c, other=0.0)[None, :]
        sum_gr = tl.zeros([BM, BC], tl.float32)
    for row in range(lo, hi, BM):
        keep = (i < hi - row)[:, None] & in_c[None, :]
        x = load_rows(x_ptr, row, c, C, keep)
        v = x
        if (RELU and mask_ptr is None) or y_ptr is not None:
            v = normalise(x, mean, scale, bias).to(x_ptr.dtype.element_ty)
        g = _behind_relu(grad_ptr, mask_ptr, v, row, c0, c, C, hi - row, keep, RELU, BM, BC)
        sum_g += g
        sum_gx = tl.fma(g, x - mean, sum_gx)
        if rstat_ptr is not None:
            sum_gr = tl.fma(g, load_rows(residual_ptr, row, c, C, keep) - rmean, sum_gr)
        if y_ptr is not None:
            if RELU:
                v = relu(v)
            store_rows(y_ptr, row, c, C, keep, v)
    plane = T.to(tl.int64) * C
    out = part_ptr + t * C + c
    tl.store(out, tl.sum(sum_g, axis=0), mask=in_c)
    tl.store(out + plane, tl.sum(sum_gx, axis=0), mask=in_c)
    if rstat_ptr is not None:
        tl.store(out + 2 * plane, tl.sum(sum_gr, axis=0), mask=in_c)


@triton.jit(do_not_specialize=["plane", "T", "M", "C"])
def _bn_bwd_finalize_kernel(
    part_ptr,
    plane,
    T,
    M,
    C,
    stat_ptr,
    dweight_ptr,
    dbias_ptr,
    coef_ptr,
    BATCH_STATS: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
):
    """float64 sums over tiles: lane i takes i, i + BM, ... in ascending order, then the lanes meet in a fixed tree."""
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    in_c = c < C
    i = tl.arange(0, BM)
    offset = plane * T.to(tl.int64) * C
    sums_g = tl.zeros([BM, BC], tl.float64)
    sums_gx = tl.zeros([BM, BC], tl.float64)
    for t in range(0, T, BM):
        keep = (t + i < T)[:, None] & in_c[None, :]
        p = part_ptr + (t + i).to(tl.int64)[:, None] * C + c[None, :]
        sums_g += tl.load(p, mask=keep, other=0.0).to(tl.float64)
        sums_gx += tl.load(p + offset, mask=keep, other=0.0).to(tl.float64)
    sum_g = tl.sum(sums_g, axis=0)
    sum_gx = tl.sum(sums_gx, axis=0)
    invstd = tl.load(stat_ptr + 2 * C + c, mask=in_c, other=0.0).to(tl.float64)
    scale = tl.load(stat_ptr + 3 * C + c, mask=in_c, other=0.0)
    if dweight_ptr is not None:
        tl.store(dweight_ptr + c, (sum_gx * invstd).to(tl.float32), mask=in_c)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + c, sum_g.to(tl.float32), mask=in_c)
    coef1 = tl.zeros([BC], tl.float64)
    coef2 = tl.zeros([BC], tl.float64)
    if BATCH_STATS:
        per_row = -scale.to(tl.float64) / M.to(tl.float64)
        coef1 = per_row * invstd * invstd * sum_gx
        coef2 = per_row * sum_g
    tl.store(coef_ptr + c, scale, mask=in_c)
    tl.store(coef_ptr + C + c, coef1.to(tl.float32), mask=in_c)
    tl.store(coef_ptr + 2 * C + c, coef2.to(tl.float32), mask=in_c)


@triton.jit
def gradient_map(g, x, stat_ptr, coef_ptr, C, c, in_c):
    """coef0*g + coef1*(x - mean) + coef2 of a tile, float32."""
    mean = tl.load(stat_ptr + c, mask=in_c, other=0.0)[None, :]
    coef0 = tl.load(coef_ptr + c, mask=in_c, other=0.0)[None, :]
    coef1 = tl.load(coef_ptr + C + c, mask=in_c, other=0.0)[None, :]
    coef2 = tl.load(coef_ptr + 2 * C + c, mask=in_c, other=0.0)[None, :]
    centred = tl.fma(tl.broadcast_to(coef1, x.shape), x - mean, tl.broadcast_to(coef2, x.shape))
    return tl.fma(tl.broadcast_to(coef0, x.shape), g, centred)


@triton.jit(do_not_specialize=["M", "C"])
def _bn_bwd_apply_kernel(
    grad_ptr,
    x_ptr,
    M,
    C,
    stat_ptr,
    coef_ptr,
    residual_ptr,
    rstat_ptr,
    rcoef_ptr,
    mask_ptr,
    dx_ptr,
    dres_ptr,
    RELU: tl.constexpr,
    ALIGNED: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
):
    C = channels(C, ALIGNED)
    block, c0, c, in_c = place(C, BC)
    row = block * BM
    keep = (tl.arange(0, BM) < M - row)[:, None] & in_c[None, :]
    x = load_rows(x_ptr, row, c, C, keep)
    v = x
    if RELU and mask_ptr is None:
        mean, scale, bias = load_stat(stat_ptr, C, c, in_c)
        v = normalise(x, mean, scale, bias).to(x_ptr.dtype.element_ty)
    g = _behind_relu(grad_ptr, mask_ptr, v, row, c0, c, C, M - row, keep, RELU, BM, BC)
    dx = gradient_map(g, x, stat_ptr, coef_ptr, C, c, in_c)
    if dres_ptr is not None:
        dr = g
        if rcoef_ptr is not None:
            dr = gradient_map(g, load_rows(residual_ptr, row, c, C, keep), rstat_ptr, rcoef_ptr, C, c, in_c)
        store_rows(dres_ptr, row, c, C, keep, dr.to(dres_ptr.dtype.element_ty))
    store_rows(dx_ptr, row, c, C, keep, dx.to(dx_ptr.dtype.element_ty))


def bn_bwd_reduce(grad, x, M, C, stat, residual, rstat, mask, relu, T, part, y):
    tile = configs.pick("bn_bwd_reduce", x.element_size(), C)
    R = -(-M // T)
    # Without rstat the residual is not read, without relu the mask is not.
    residual = residual if rstat is not None else None
    mask = mask if relu else None
    _bn_bwd_reduce_kernel[(T * configs.blocks(C, tile.BC),)](
        grad,
        x,
        M,
        C,
        stat,
        residual,
        rstat,
        mask,
        T,
        R,
        part,
        y,
        RELU=bool(relu),
        ALIGNED=C % 8 == 0,
        **tile.launch(),
    )


def bn_bwd_finalize(part, plane, T, M, C, stat, batch_stats, dweight, dbias, coef):
    tile = configs.pick("bn_bwd_finalize", 4, 8)
    _bn_bwd_finalize_kernel[(configs.blocks(C, tile.BC),)](
        part, plane, T, M, C, stat, dweight, dbias, coef, BATCH_STATS=bool(batch_stats), **tile.launch()
    )


def bn_bwd_apply(grad, x, M, C, stat, coef, residual, rstat, rcoef, mask, relu, dx, dres):
    if M == 0:
        return
    tile = configs.pick("bn_bwd_apply", x.element_size(), C)
    if dres is None or rcoef is None:
        residual = rstat = rcoef = None
    _bn_bwd_apply_kernel[tile.grid(M, C)](
        grad,
        x,
        M,
        C,
        stat,
        coef,
        residual,
        rstat,
        rcoef,
        mask if relu else None,
        dx,
        dres,
        RELU=bool(relu),
        ALIGNED=C % 8 == 0,
        **tile.launch(),
    )
