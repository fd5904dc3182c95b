"""stem: max pooling of relu(bn(x)), x [N, H, W, C] -> out [N, P, Q, C], window k x k, and its backward.

``idx`` uint8 [N, P, Q, C]: the winning tap r*k + s, or 255 where no gradient passes. ``WIDE`` selects int64
pixel numbers where 2**31 is in reach; int32 division is several times cheaper.
"""

import triton
import triton.language as tl

from . import configs
from .batch_norm_act_bwd import gradient_map
from .tile import bounds, channels, load_stat, normalise, passes, place, relu


@triton.jit
def _pixels(row, BM: tl.constexpr, WIDE: tl.constexpr):
    m = row + tl.arange(0, BM)
    if not WIDE:
        m = m.to(tl.int32)
    return m


@triton.jit(do_not_specialize=["N", "H", "W", "C", "P", "Q"])
def _stem_fwd_kernel(
    x_ptr,
    N,
    H,
    W,
    C,
    stat_ptr,
    P,
    Q,
    out_ptr,
    idx_ptr,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    PAD: tl.constexpr,
    WIDE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
):
    C = channels(C, ALIGNED)
    if WIDE:
        W = W.to(tl.int64)
    block, _, c, in_c = place(C, BC)
    row = block * BM
    pooled = N.to(tl.int64) * P * Q
    in_m = tl.arange(0, BM) < pooled - row
    m = _pixels(row, BM, WIDE)
    w0 = m % Q * STRIDE - PAD
    h0 = m // Q % P * STRIDE - PAD
    n = m // Q // P
    mean, scale, bias = load_stat(stat_ptr, C, c, in_c)
    # At the border a window's corner may lie before x: an offset like any other, but never read.
    corner = ((n * H + h0).to(tl.int64) * W + w0) * C
    best = tl.full([BM, BC], float("-inf"), x_ptr.dtype.element_ty)
    code = tl.zeros([BM, BC], tl.int32)
    # A window row is unrolled, the rows are a loop: K loads in flight without K*K copies of the code.
    for r in range(K):
        in_h = in_m & (h0 + r >= 0) & (h0 + r < H)
        for s in tl.static_range(K):
            keep = (in_h & (w0 + s >= 0) & (w0 + s < W))[:, None] & in_c[None, :]
            p = x_ptr + (corner + (r * W + s) * C)[:, None] + c[None, :]
            x = tl.load(p, mask=keep, other=0.0).to(tl.float32)
            v = normalise(x, mean, scale, bias).to(x_ptr.dtype.element_ty)
            # Strictly greater: the first maximum stays. The first NaN takes over and stays.
            wins = keep & ((v > best) | ((v != v) & (best == best)))
            best = tl.where(wins, v, best)
            code = tl.where(wins, r * K + s, code)
    keep = in_m[:, None] & in_c[None, :]
    o = row * C + (tl.arange(0, BM)[:, None] * C + c[None, :])
    tl.store(out_ptr + o, relu(best), mask=keep)
    if idx_ptr is not None:
        tl.store(idx_ptr + o, tl.where(passes(best), code, 255).to(tl.uint8), mask=keep)


@triton.jit(do_not_specialize=["N", "H", "W", "C", "P", "Q", "T", "R"])
def _stem_bwd_reduce_kernel(
    grad_ptr,
    idx_ptr,
    x_ptr,
    N,
    H,
    W,
    C,
    stat_ptr,
    P,
    Q,
    T,
    R,
    part_ptr,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    PAD: tl.constexpr,
    WIDE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
):
    C = channels(C, ALIGNED)
    if WIDE:
        W = W.to(tl.int64)
    t, _, c, in_c = place(C, BC)
    lo, hi = bounds(t, R, N.to(tl.int64) * P * Q)
    i = tl.arange(0, BM)
    mean = tl.load(stat_ptr + c, mask=in_c, other=0.0)[None, :]
    sum_g = tl.zeros([BM, BC], tl.float32)
    sum_gx = tl.zeros([BM, BC], tl.float32)
    for row in range(lo, hi, BM):
        keep = (i < hi - row)[:, None] & in_c[None, :]
        o = row * C + (i[:, None] * C + c[None, :])
        code = tl.load(idx_ptr + o, mask=keep, other=255).to(tl.int32)
        keep = keep & (code != 255)
        g = tl.load(grad_ptr + o, mask=keep, other=0.0).to(tl.float32)
        m = _pixels(row, BM, WIDE)
        w0 = m % Q * STRIDE - PAD
        h0 = m // Q % P * STRIDE - PAD
        corner = ((m // Q // P * H + h0).to(tl.int64) * W + w0) * C
        # One gathered element each: its tap differs from its neighbours'.
        tap = (code // K * W + code % K) * C
        x = tl.load(x_ptr + corner[:, None] + (tap + c[None, :]), mask=keep, other=0.0).to(tl.float32)
        sum_g += g
        sum_gx += tl.where(keep, g * (x - mean), 0.0)
    plane = T.to(tl.int64) * C
    out = part_ptr + t * C + c
    tl.store(out, tl.sum(sum_g, axis=0), mask=in_c)
    tl.store(out + plane, tl.sum(sum_gx, axis=0), mask=in_c)


@triton.jit(do_not_specialize=["N", "H", "W", "C", "P", "Q"])
def _stem_bwd_apply_kernel(
    grad_ptr,
    idx_ptr,
    x_ptr,
    N,
    H,
    W,
    C,
    stat_ptr,
    coef_ptr,
    P,
    Q,
    dx_ptr,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    PAD: tl.constexpr,
    WIDE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
):
    """Each input pixel collects from the windows that cover it: no atomics, taps in ascending order."""
    C = channels(C, ALIGNED)
    if WIDE:
        W = W.to(tl.int64)
    block, _, c, in_c = place(C, BC)
    row = block * BM
    in_m = tl.arange(0, BM) < N.to(tl.int64) * H * W - row
    keep = in_m[:, None] & in_c[None, :]
    m = _pixels(row, BM, WIDE)
    w = m % W + PAD
    h = m // W % H + PAD
    n = m // W // H
    g = tl.zeros([BM, BC], tl.float32)
    COVER: tl.constexpr = (K + STRIDE - 1) // STRIDE
    for i in range(COVER):
        p = h // STRIDE - i
        r = h - p * STRIDE
        in_p = in_m & (p >= 0) & (p < P) & (r < K)
        for j in tl.static_range(COVER):
            q = w // STRIDE - j
            s = w - q * STRIDE
            window = (in_p & (q >= 0) & (q < Q) & (s < K))[:, None] & in_c[None, :]
            o = (((n * P + p).to(tl.int64) * Q + q) * C)[:, None] + c[None, :]
            code = tl.load(idx_ptr + o, mask=window, other=255).to(tl.int32)
            part = tl.load(grad_ptr + o, mask=window, other=0.0).to(tl.float32)
            g += tl.where(code == (r * K + s)[:, None], part, 0.0)
    o = row * C + (tl.arange(0, BM)[:, None] * C + c[None, :])
    x = tl.load(x_ptr + o, mask=keep, other=0.0).to(tl.float32)
    dx = gradient_map(g, x, stat_ptr, coef_ptr, C, c, in_c)
    tl.store(dx_ptr + o, dx.to(dx_ptr.dtype.element_ty), mask=keep)


def _geometry(N, H, W, C, P, Q, k, stride, pad, BM):
    # The last program's pixel numbers run up to BM past the end; a window spans k*W*C elements.
    wide = max(N * max(H * W, P * Q) + BM, (k * W + k) * C) >= 2**31
    return {"K": k, "STRIDE": stride, "PAD": pad, "WIDE": wide, "ALIGNED": C % 8 == 0}


def stem_fwd(x, N, H, W, C, stat, P, Q, k, stride, pad, out, idx):
    if N == 0:
        return
    tile = configs.pick("stem_fwd", x.element_size(), C)
    _stem_fwd_kernel[tile.grid(N * P * Q, C)](
        x, N, H, W, C, stat, P, Q, out, idx, **_geometry(N, H, W, C, P, Q, k, stride, pad, tile.BM), **tile.launch()
    )


def stem_bwd_reduce(grad, idx, x, N, H, W, C, stat, P, Q, k, stride, pad, T, part):
    tile = configs.pick("stem_bwd_reduce", x.element_size(), C)
    R = -(-N * P * Q // T)
    _stem_bwd_reduce_kernel[(T * configs.blocks(C, tile.BC),)](
        grad,
        idx,
        x,
        N,
        H,
        W,
        C,
        stat,
        P,
        Q,
        T,
        R,
        part,
        **_geometry(N, H, W, C, P, Q, k, stride, pad, tile.BM),
        **tile.launch(),
    )


def stem_bwd_apply(grad, idx, x, N, H, W, C, stat, coef, P, Q, k, stride, pad, dx):
    if N == 0:
        return
    tile = configs.pick("stem_bwd_apply", x.element_size(), C)
    _stem_bwd_apply_kernel[tile.grid(N * H * W, C)](
        grad,
        idx,
        x,
        N,
        H,
        W,
        C,
        stat,
        coef,
        P,
        Q,
        dx,
        **_geometry(N, H, W, C, P, Q, k, stride, pad, tile.BM),
        **tile.launch(),
    )
