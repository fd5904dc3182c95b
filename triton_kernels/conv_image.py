"""conv_fprop with statistics and conv_wgrad of an image of at most four channels with an even stride along its rows:
the stem, by tensor descriptors (TMA; compute capability 9.0 and later).

The image is copied once into rows of four channels with its zero padding around it. There the window of the filter
under one output pixel, S*4 values, is contiguous, and the next pixel's starts stride*8 bytes further: a multiple of 16.
So a descriptor whose windows overlap delivers the operand [pixels, window] of the product ready-made, one filter row
after the other, without a mask or an address computed.

The copy and the weights are padded to windows of WIDTH pixels with zeros. A pixel that is not finite would still meet
them as NaN * 0: a fprop serves only where its statistics are wanted, which such a pixel makes NaN anyway.
"""

import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .configs import blocks
from .conv_epilogue import stats_columns
from .conv_tile import corner, float32, inside, nhwc, pixels

CHANNELS = 4
WIDTH = 8  # pixels of a window; filters up to this wide


@triton.jit(do_not_specialize=["H", "W", "HP", "WP", "ph", "pw", "rows"])
def _pad_kernel(x_ptr, out_ptr, H, W, HP, WP, ph, pw, rows, C: tl.constexpr, BW: tl.constexpr):
    """Row h of an image [H, W, C] to row h + ph of [HP, WP, 4], zeros around it."""
    row = tl.program_id(0)
    h = row % HP - ph
    j = tl.program_id(1) * (BW * 4) + tl.arange(0, BW * 4)
    w, c = j // 4 - pw, j % 4
    inside = (h >= 0) & (h < H) & (w >= 0) & (w < W) & (c < C)
    source = ((row // HP).to(tl.int64) * H + h) * W * C
    v = tl.load(x_ptr + source + w * C + c, mask=inside, other=0.0)
    tl.store(out_ptr + row.to(tl.int64) * (WP * 4) + j, v, mask=j < WP * 4)


@triton.jit
def _row(x_desc, n0, p0, q0, r, SH: tl.constexpr, BM: tl.constexpr, BE: tl.constexpr):
    """[BM, BE]: what row r of the filter meets under each pixel of the patch."""
    return x_desc.load([n0, p0 + r // SH, r % SH, q0, 0]).reshape(BM, BE)


@triton.jit(do_not_specialize=["N", "P", "Q", "HT", "WT", "PT", "NT", "K"])
def _image_fprop_kernel(
    x_desc,
    w_desc,
    out_desc,
    bias_ptr,
    part_ptr,
    N,
    P,
    Q,
    HT,
    WT,
    PT,
    NT,
    K,
    R: tl.constexpr,
    SH: tl.constexpr,
    FULL: tl.constexpr,
    TN: tl.constexpr,
    TH: tl.constexpr,
    TW: tl.constexpr,
    BN: tl.constexpr,
    BE: tl.constexpr,
):
    BM: tl.constexpr = TN * TH * TW
    pid = tl.program_id(0)
    t = pid // NT
    k0 = (pid % NT) * BN
    n0, p0, q0 = corner(t, HT, WT, TN, TH, TW)
    acc = tl.zeros((BN, BM), tl.float32)
    for r in range(R):
        x = _row(x_desc, n0, p0, q0, r, SH, BM, BE)
        w = w_desc.load([k0, r * BE])
        acc = tl.dot(w, x.T, acc)
    k = k0 + tl.arange(0, BN)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + k, mask=k < K, other=0.0)[:, None]
    v = acc.to(out_desc.dtype)
    out_desc.store([n0, p0, q0, k0], v.T.reshape(TN, TH, TW, BN))
    ok = inside(n0, p0, q0, N, P, Q, TN, TH, TW)
    n = pixels(n0, p0, q0, N, P, Q, TN, TH, TW)
    stats_columns(v, ok, n, part_ptr, t, PT, k, K, FULL)


@triton.jit
def _store_row(slab_ptr, acc, k, e, K, r: tl.constexpr, R: tl.constexpr, BE: tl.constexpr):
    tl.store(slab_ptr + (k[:, None] * R + r) * BE + e[None, :], acc, mask=(k < K)[:, None])


@triton.jit(do_not_specialize=["HT", "WT", "PT", "PER", "K"])
def _image_wgrad_kernel(
    dy_desc,
    x_desc,
    slab_ptr,
    HT,
    WT,
    PT,
    PER,
    K,
    R: tl.constexpr,
    SH: tl.constexpr,
    TN: tl.constexpr,
    TH: tl.constexpr,
    TW: tl.constexpr,
    BN: tl.constexpr,
    BE: tl.constexpr,
):
    """Slab [K, R, BE] of partial sums over tiles [slab*PER, (slab+1)*PER); one accumulator a filter row.

    They are written out one by one: a loop cannot carry a list of accumulators, and one [BN, R*BE] would need the
    windows of all rows side by side, which no descriptor delivers.
    """
    BM: tl.constexpr = TN * TH * TW
    slab = tl.program_id(0)
    k0 = tl.program_id(1) * BN
    lo = slab * PER
    hi = tl.minimum(lo + PER, PT)
    a0 = tl.zeros((BN, BE), tl.float32)
    a1 = tl.zeros((BN, BE), tl.float32)
    a2 = tl.zeros((BN, BE), tl.float32)
    a3 = tl.zeros((BN, BE), tl.float32)
    a4 = tl.zeros((BN, BE), tl.float32)
    a5 = tl.zeros((BN, BE), tl.float32)
    a6 = tl.zeros((BN, BE), tl.float32)
    a7 = tl.zeros((BN, BE), tl.float32)
    for t in range(lo, hi):
        n0, p0, q0 = corner(t, HT, WT, TN, TH, TW)
        g = dy_desc.load([n0, p0, q0, k0]).reshape(BM, BN).T
        a0 = tl.dot(g, _row(x_desc, n0, p0, q0, 0, SH, BM, BE), a0)
        if R > 1:
            a1 = tl.dot(g, _row(x_desc, n0, p0, q0, 1, SH, BM, BE), a1)
        if R > 2:
            a2 = tl.dot(g, _row(x_desc, n0, p0, q0, 2, SH, BM, BE), a2)
        if R > 3:
            a3 = tl.dot(g, _row(x_desc, n0, p0, q0, 3, SH, BM, BE), a3)
        if R > 4:
            a4 = tl.dot(g, _row(x_desc, n0, p0, q0, 4, SH, BM, BE), a4)
        if R > 5:
            a5 = tl.dot(g, _row(x_desc, n0, p0, q0, 5, SH, BM, BE), a5)
        if R > 6:
            a6 = tl.dot(g, _row(x_desc, n0, p0, q0, 6, SH, BM, BE), a6)
        if R > 7:
            a7 = tl.dot(g, _row(x_desc, n0, p0, q0, 7, SH, BM, BE), a7)
    k = k0 + tl.arange(0, BN)
    e = tl.arange(0, BE)
    out = slab_ptr + slab.to(tl.int64) * K * (R * BE)
    _store_row(out, a0, k, e, K, 0, R, BE)
    if R > 1:
        _store_row(out, a1, k, e, K, 1, R, BE)
    if R > 2:
        _store_row(out, a2, k, e, K, 2, R, BE)
    if R > 3:
        _store_row(out, a3, k, e, K, 3, R, BE)
    if R > 4:
        _store_row(out, a4, k, e, K, 4, R, BE)
    if R > 5:
        _store_row(out, a5, k, e, K, 5, R, BE)
    if R > 6:
        _store_row(out, a6, k, e, K, 6, R, BE)
    if R > 7:
        _store_row(out, a7, k, e, K, 7, R, BE)


def _padded(x, geometry, R, P, Q):
    """The image in rows of four channels, and the descriptor's shape and strides of its windows by output pixel."""
    (sh, sw), (ph, pw), _, _ = geometry
    N, C, H, W = x.shape
    groups = P + (R - 1) // sh  # of sh rows each
    HP, WP = groups * sh, (Q - 1) * sw + WIDTH
    WP += WP % 2
    out = x.new_empty((N, HP, WP, CHANNELS))
    BW = 256
    grid = (N * HP, blocks(WP, BW))
    _pad_kernel[grid](x, out, H, W, HP, WP, ph, pw, N * HP, C=C, BW=BW, num_warps=4)
    line = WP * CHANNELS
    shape = [N, groups, sh, Q, WIDTH * CHANNELS]
    return out, shape, [HP * line, sh * line, line, sw * CHANNELS, 1]


def parts(kind, problem, config) -> int:
    """Tiles T of ``part [3, T, K]``: each is written."""
    images, rows, columns = config.patch
    return blocks(problem.N, images) * blocks(problem.P, rows) * blocks(problem.Q, columns)


def _windows(x, geometry, R, P, Q, config):
    padded, shape, strides = _padded(x, geometry, R, P, Q)
    TN, TH, TW = config.patch
    return TensorDescriptor(padded, shape, strides, [TN, TH, 1, TW, WIDTH * CHANNELS])


def _outputs(y, config):
    N, K, P, Q = y.shape
    return nhwc(y, (N, P, Q, K), (*config.patch, config.BN))


def conv_fprop(x, w, geometry, out, *, stat=None, bias=None, residual=None, relu=False, part=None, config,
               precision="ieee"):  # fmt: skip
    K, C, R, S = w.shape
    N, _, P, Q = out.shape
    TN, TH, TW = config.patch
    BE = WIDTH * CHANNELS
    if part is None:  # the second time over: nobody wants the statistics, but the output must be the same
        part = float32(x, (3, blocks(N, TN) * blocks(P, TH) * blocks(Q, TW), K))
    weights = w.new_zeros((K, R, WIDTH, CHANNELS))
    weights[:, :, :S, :C].copy_(w.permute(0, 2, 3, 1))
    HT, WT, NT = blocks(P, TH), blocks(Q, TW), blocks(K, config.BN)
    PT = blocks(N, TN) * HT * WT
    wd = TensorDescriptor(weights, [K, R * BE], [R * BE, 1], [config.BN, BE])
    _image_fprop_kernel[(PT * NT,)](
        _windows(x, geometry, R, P, Q, config), wd, _outputs(out, config), bias, part, N, P, Q, HT, WT, PT, NT, K, R=R,
        SH=geometry[0][0], FULL=not (N % TN or P % TH or Q % TW), TN=TN, TH=TH, TW=TW, BN=config.BN, BE=BE,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


def conv_wgrad(dy, x, geometry, dw, *, pre=None, pre_stat=None, coef=None, bits=None, stat=None, config,
               precision="ieee"):  # fmt: skip
    K, C, R, S = dw.shape
    N, _, P, Q = dy.shape
    TN, TH, TW = config.patch
    BE = WIDTH * CHANNELS
    HT, WT, columns = blocks(P, TH), blocks(Q, TW), blocks(K, config.BN)
    PT = blocks(N, TN) * HT * WT
    slabs = max(1, min(264 // columns, PT // 8))  # by shape alone, the same bits on every GPU
    per = blocks(PT, slabs)
    slabs = blocks(PT, per)
    slab = float32(dy, (slabs, K, R, WIDTH, CHANNELS))
    _image_wgrad_kernel[(slabs, columns)](
        _outputs(dy, config), _windows(x, geometry, R, P, Q, config), slab, HT, WT, PT, per, K, R=R,
        SH=geometry[0][0], TN=TN, TH=TH, TW=TW, BN=config.BN, BE=BE, num_warps=config.num_warps,
        num_stages=config.num_stages,
    )  # fmt: skip
    dw.permute(0, 2, 3, 1).copy_(slab.sum(0)[:, :, :S, :C])
