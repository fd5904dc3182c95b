"""batch_norm_act, forward: statistics, their merge, folding, and the apply pass.

``part`` float32 [3, T, C] count, mean, M2; ``stat`` float32 [5, C] mean, variance, invstd, scale, bias.
"""

import triton
import triton.language as tl

from . import configs
from .tile import bounds, channels, load_rows, load_stat, normalise, passes, place, relu, store_mask, store_rows


@triton.jit(do_not_specialize=["M", "C", "T", "R"])
def _bn_stats_kernel(x_ptr, M, C, T, R, part_ptr, ALIGNED: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr):
    """One read of x: sums of d and d*d, with d = x - pilot and the pilot the mean of the tile's first BM rows.

    M2 = sum d*d - n*(mean - pilot)^2 cancels little whatever the data: the pilot's rows belong to the tile,
    so BM*(mean - pilot)^2 <= M2 (Cauchy-Schwarz) and the subtraction magnifies rounding at most n/BM + 1 times.
    """
    C = channels(C, ALIGNED)
    t, _, c, in_c = place(C, BC)
    lo, hi = bounds(t, R, M)
    n = tl.zeros([BC], tl.float32) + (hi - lo).to(tl.float32)
    i = tl.arange(0, BM)
    first = tl.minimum(hi - lo, BM)
    x = load_rows(x_ptr, lo, c, C, (i < first)[:, None] & in_c[None, :])
    pilot = tl.sum(x, axis=0) / tl.maximum(first, 1).to(tl.float32)  # need not be exact, only close
    sums = tl.zeros([BM, BC], tl.float32)
    squares = tl.zeros([BM, BC], tl.float32)
    for row in range(lo, hi, BM):
        keep = (i < hi - row)[:, None] & in_c[None, :]
        d = tl.where(keep, load_rows(x_ptr, row, c, C, keep) - pilot[None, :], 0.0)
        sums += d
        squares = tl.fma(d, d, squares)
    total = tl.sum(sums, axis=0)
    shift = tl.div_rn(total, tl.maximum(n, 1.0))
    m2 = tl.sum(squares, axis=0) - total * shift
    plane = T.to(tl.int64) * C
    out = part_ptr + t * C + c
    tl.store(out, n, mask=in_c)
    tl.store(out + plane, pilot + shift, mask=in_c)
    tl.store(out + 2 * plane, tl.where(m2 < 0, 0.0, m2), mask=in_c)


@triton.jit
def _store_stat(stat_ptr, C, c, in_c, mean, var, weight_ptr, bias_ptr, EPS: tl.constexpr):
    """Rounds the five rows of stat from float64."""
    invstd = 1.0 / tl.sqrt(var + EPS)
    scale = invstd
    if weight_ptr is not None:
        scale = tl.load(weight_ptr + c, mask=in_c, other=0.0).to(tl.float64) * invstd
    bias = tl.zeros_like(mean)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + c, mask=in_c, other=0.0).to(tl.float64)
    tl.store(stat_ptr + c, mean.to(tl.float32), mask=in_c)
    tl.store(stat_ptr + C + c, var.to(tl.float32), mask=in_c)
    tl.store(stat_ptr + 2 * C + c, invstd.to(tl.float32), mask=in_c)
    tl.store(stat_ptr + 3 * C + c, scale.to(tl.float32), mask=in_c)
    tl.store(stat_ptr + 4 * C + c, bias.to(tl.float32), mask=in_c)


@triton.jit(do_not_specialize=["T", "C"])
def _bn_finalize_kernel(
    part_ptr, T, C, weight_ptr, bias_ptr, stat_ptr, EPS: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr
):
    """Lane i merges tiles i, i + BM, ... in ascending order, then the lanes meet in a fixed tree.

    Two loops: the mean first, then M2 about it. EPS is a compile-time constant because a float argument would
    arrive as float32.
    """
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    in_c = c < C
    i = tl.arange(0, BM)
    plane = T.to(tl.int64) * C
    counts = tl.zeros([BM, BC], tl.float64)
    sums = tl.zeros([BM, BC], tl.float64)
    for t in range(0, T, BM):
        keep = (t + i < T)[:, None] & in_c[None, :]
        p = part_ptr + (t + i).to(tl.int64)[:, None] * C + c[None, :]
        n = tl.load(p, mask=keep, other=0.0).to(tl.float64)
        counts += n
        sums += n * tl.load(p + plane, mask=keep, other=0.0).to(tl.float64)
    count = tl.sum(counts, axis=0)
    mean = tl.sum(sums, axis=0) / count
    squares = tl.zeros([BM, BC], tl.float64)
    for t in range(0, T, BM):
        keep = (t + i < T)[:, None] & in_c[None, :]
        p = part_ptr + (t + i).to(tl.int64)[:, None] * C + c[None, :]
        n = tl.load(p, mask=keep, other=0.0).to(tl.float64)
        d = tl.load(p + plane, mask=keep, other=0.0).to(tl.float64) - mean[None, :]
        squares += tl.load(p + 2 * plane, mask=keep, other=0.0).to(tl.float64) + n * d * d
    _store_stat(stat_ptr, C, c, in_c, mean, tl.sum(squares, axis=0) / count, weight_ptr, bias_ptr, EPS)


@triton.jit(do_not_specialize=["C"])
def _bn_fold_kernel(
    running_mean_ptr, running_var_ptr, weight_ptr, bias_ptr, C, stat_ptr, EPS: tl.constexpr, BC: tl.constexpr
):
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    in_c = c < C
    mean = tl.load(running_mean_ptr + c, mask=in_c, other=0.0).to(tl.float64)
    var = tl.load(running_var_ptr + c, mask=in_c, other=1.0).to(tl.float64)
    _store_stat(stat_ptr, C, c, in_c, mean, var, weight_ptr, bias_ptr, EPS)


@triton.jit(do_not_specialize=["M", "C"])
def _bn_apply_kernel(
    x_ptr,
    M,
    C,
    stat_ptr,
    residual_ptr,
    rstat_ptr,
    out_ptr,
    mask_ptr,
    RELU: tl.constexpr,
    ALIGNED: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
):
    C = channels(C, ALIGNED)
    block, c0, c, in_c = place(C, BC)
    row = block * BM
    keep = (tl.arange(0, BM) < M - row)[:, None] & in_c[None, :]
    mean, scale, bias = load_stat(stat_ptr, C, c, in_c)
    v = normalise(load_rows(x_ptr, row, c, C, keep), mean, scale, bias)
    if residual_ptr is not None:
        r = load_rows(residual_ptr, row, c, C, keep)
        if rstat_ptr is not None:
            rmean, rscale, rbias = load_stat(rstat_ptr, C, c, in_c)
            r = normalise(r, rmean, rscale, rbias)
        v += r
    v = v.to(out_ptr.dtype.element_ty)
    if mask_ptr is not None:
        store_mask(mask_ptr, row, c0, C, M - row, passes(v) & in_c[None, :])
    if RELU:
        v = relu(v)
    store_rows(out_ptr, row, c, C, keep, v)


def bn_stats(x, M, C, T, part):
    tile = configs.pick("bn_stats", x.element_size(), C)
    R = -(-M // T)
    _bn_stats_kernel[(T * configs.blocks(C, tile.BC),)](x, M, C, T, R, part, ALIGNED=C % 8 == 0, **tile.launch())


def bn_finalize(part, T, C, weight, bias, eps, stat):
    tile = configs.pick("bn_finalize", 4, 8)
    grid = (configs.blocks(C, tile.BC),)
    _bn_finalize_kernel[grid](part, T, C, weight, bias, stat, EPS=float(eps), **tile.launch())


def bn_fold(running_mean, running_var, weight, bias, eps, C, stat):
    tile = configs.pick("bn_fold", 4, 128)
    grid = (configs.blocks(C, tile.BC),)
    options = tile.launch()
    del options["BM"]
    _bn_fold_kernel[grid](running_mean, running_var, weight, bias, C, stat, EPS=float(eps), **options)


def bn_apply(x, M, C, stat, residual, rstat, relu, out, mask):
    if M == 0:
        return
    tile = configs.pick("bn_apply", x.element_size(), C)
    _bn_apply_kernel[tile.grid(M, C)](
        x, M, C, stat, residual, rstat, out, mask, RELU=bool(relu), ALIGNED=C % 8 == 0, **tile.launch()
    )
