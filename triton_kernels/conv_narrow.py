"""conv_fprop and conv_wgrad of an image with few channels: the 7x7 stem.

In NHWC the S*C values under one row of the filter lie side by side. They are the inner dimension of the product here,
padded to a power of two (7*3 = 21 -> 32), where a kernel by channels would pad 3 to 16 and a library pads the image.
Strides and paddings in any axis, dilation along rows only; no groups.
"""

import triton
import triton.language as tl

from .configs import blocks
from .conv_epilogue import stats_rows
from .conv_tile import float32
from .tile import channels, relu


@triton.jit
def _pixels(m, M, P, Q, H, W, C, sh, sw, ph, pw):
    """Of each output pixel: its input's first row, first element in that row, and address of that element (int32:
    an image batch past 2**31 elements is refused)."""
    q = m % Q
    t = m // Q
    row = tl.where(m < M, t % P * sh - ph, -(2**20))  # pixels past the end see no row of the image
    first = (q * sw - pw) * C
    return row, first, (t // P * H + row) * W * C + first


@triton.jit(do_not_specialize=["H", "W", "P", "Q", "M", "PT", "NT", "sh", "sw", "ph", "pw", "dh", "K"])
def _fprop_kernel(
    x_ptr,
    w_ptr,
    out_ptr,
    bias_ptr,
    part_ptr,
    H,
    W,
    P,
    Q,
    M,
    PT,
    NT,
    sh,
    sw,
    ph,
    pw,
    dh,
    K,
    R: tl.constexpr,
    E: tl.constexpr,
    CHANNELS: tl.constexpr,
    RELU: tl.constexpr,
    ALIGNED: tl.constexpr,
    FULL: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BE: tl.constexpr,
):
    """E = S*C values of a filter row, BE of them with the padding."""
    K = channels(K, ALIGNED)
    pid = tl.program_id(0)
    t = pid // NT
    m = t * BM + tl.arange(0, BM)
    k = (pid % NT) * BN + tl.arange(0, BN)
    e = tl.arange(0, BE)
    row, first, base = _pixels(m, M, P, Q, H, W, CHANNELS, sh, sw, ph, pw)
    inside = (first[:, None] + e[None, :] >= 0) & (first[:, None] + e[None, :] < W * CHANNELS) & (e < E)[None, :]
    weights = w_ptr + k[None, :] * (R * E) + e[:, None]
    known = (e < E)[:, None] & (k < K)[None, :]
    acc = tl.zeros((BM, BN), tl.float32)
    for r in range(R):
        here = row + r * dh
        seen = inside & ((here >= 0) & (here < H))[:, None]
        x = tl.load(x_ptr + (base + r * dh * W * CHANNELS)[:, None] + e[None, :], mask=seen, other=0.0)
        w = tl.load(weights + r * E, mask=known, other=0.0)
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + k, mask=k < K, other=0.0)[None, :]
    v = acc.to(out_ptr.dtype.element_ty)
    if RELU:
        v = relu(v)
    out = out_ptr + (t * BM).to(tl.int64) * K + tl.arange(0, BM)[:, None] * K + k[None, :]
    tl.store(out, v, mask=(m < M)[:, None] & (k < K)[None, :])
    if part_ptr is not None:
        stats_rows(v, m < M, tl.minimum(BM, M - t * BM), part_ptr, t, PT, k, K, FULL)


@triton.jit(do_not_specialize=["H", "W", "P", "Q", "M", "PER", "sh", "sw", "ph", "pw", "dh", "K"])
def _wgrad_kernel(
    dy_ptr,
    x_ptr,
    slab_ptr,
    H,
    W,
    P,
    Q,
    M,
    PER,
    sh,
    sw,
    ph,
    pw,
    dh,
    K,
    R: tl.constexpr,
    E: tl.constexpr,
    CHANNELS: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BE: tl.constexpr,
    BR: tl.constexpr,
):
    """BR filter rows of one slab [K, R, E] of partial sums from pixels [slab*PER, (slab+1)*PER)."""
    K = channels(K, ALIGNED)
    GROUPS: tl.constexpr = (R + BR - 1) // BR
    slab = tl.program_id(0) // GROUPS  # the groups of a slab run side by side and share dy in the cache
    k = tl.program_id(1) * BN + tl.arange(0, BN)
    j = tl.arange(0, BR * BE)
    e = j % BE
    r = tl.program_id(0) % GROUPS * BR + j // BE
    lo = slab * PER
    hi = tl.minimum(lo + PER, M)
    acc = tl.zeros((BN, BR * BE), tl.float32)
    for m0 in range(lo, hi, BM):
        m = m0 + tl.arange(0, BM)
        row, first, base = _pixels(m, hi, P, Q, H, W, CHANNELS, sh, sw, ph, pw)
        here = row[:, None] + (r * dh)[None, :]
        at = first[:, None] + e[None, :]
        seen = (here >= 0) & (here < H) & (at >= 0) & (at < W * CHANNELS) & ((e < E) & (r < R))[None, :]
        x = tl.load(x_ptr + base[:, None] + (r * dh * W * CHANNELS + e)[None, :], mask=seen, other=0.0)
        dy = dy_ptr + m.to(tl.int64)[:, None] * K + k[None, :]
        g = tl.load(dy, mask=(m < hi)[:, None] & (k < K)[None, :], other=0.0)
        acc = tl.dot(tl.trans(g), x, acc, input_precision=PRECISION)
    out = slab_ptr + slab.to(tl.int64) * K * (R * E) + k[:, None] * (R * E) + (r * E + e)[None, :]
    tl.store(out, acc, mask=(k < K)[:, None] & ((e < E) & (r < R))[None, :])


def _power(n: int) -> int:
    return max(16, 1 << (n - 1).bit_length())


def parts(kind, problem, config) -> int:
    """Tiles T of ``part [3, T, K]``: each is written."""
    return blocks(problem.N * problem.P * problem.Q, config.BM)


def conv_fprop(x, w, geometry, out, *, stat=None, bias=None, residual=None, relu=False, part=None, config,
               precision="ieee"):  # fmt: skip
    (sh, sw), (ph, pw), (dh, _), _ = geometry
    K, C, R, S = w.shape
    _, _, H, W = x.shape
    N, _, P, Q = out.shape
    M = N * P * Q
    PT, NT = blocks(M, config.BM), blocks(K, config.BN)
    _fprop_kernel[(PT * NT,)](
        x, w, out, bias, part, H, W, P, Q, M, PT, NT, sh, sw, ph, pw, dh, K, R=R, E=S * C, CHANNELS=C, RELU=relu,
        ALIGNED=K % 8 == 0, FULL=M % config.BM == 0, PRECISION=precision, BM=config.BM, BN=config.BN, BE=_power(S * C),
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


def conv_wgrad(dy, x, geometry, dw, *, pre=None, pre_stat=None, coef=None, bits=None, stat=None, config,
               precision="ieee"):  # fmt: skip
    (sh, sw), (ph, pw), (dh, _), _ = geometry
    K, C, R, S = dw.shape
    _, _, H, W = x.shape
    N, _, P, Q = dy.shape
    M = N * P * Q
    columns = blocks(K, config.BN)
    # By shape alone: enough programs for any GPU, and no slab under 16 steps.
    slabs = max(1, min(528 // columns, M // (16 * config.BM)))
    per = blocks(M, slabs * config.BM) * config.BM
    slabs = max(1, blocks(M, per))
    BE = _power(S * C)
    slab = float32(dy, (slabs, K, R * S * C))
    BR = max(1, min(config.BK // BE, 1 << (R - 1).bit_length()))
    _wgrad_kernel[(slabs * blocks(R, BR), columns)](
        dy, x, slab, H, W, P, Q, M, per, sh, sw, ph, pw, dh, K, R=R, E=S * C, CHANNELS=C, ALIGNED=K % 8 == 0,
        PRECISION=precision, BM=config.BM, BN=config.BN, BE=BE, BR=BR, num_warps=config.num_warps,
        num_stages=config.num_stages,
    )  # fmt: skip
    dw.permute(0, 2, 3, 1).copy_(slab.sum(0).view(K, R, S, C))
