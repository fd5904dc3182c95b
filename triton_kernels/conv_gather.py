"""conv_fprop and conv_dgrad by pointer gather: any stride, padding, dilation, groups and channel count.

One implicit GEMM, acc[BM, BN] = A[BM, BK] x B[BK, BN], serves both. Output pixel i of an axis sits at i*o + c and reads
its source at i*a + b + t*d for the taps t of that axis:

    fprop               a = stride  b = -padding             d = dilation   o = 1       c = 0
    dgrad, one class    a = 1       b by class               d by class     o = stride  c = class

A dgrad of stride s falls into s x s classes of input pixels; within one, the taps that reach it form an arithmetic
progression and the sum over them is a dense convolution. Each class is a launch of its own; a class without taps
(1x1, stride 2) still writes its zeros and its epilogue. Stride 1 is the single class.

The loop runs over taps and blocks of channels and stays a loop: it is what the compiler turns into asynchronous copies.
Which taps of a pixel lie within the image is known before it starts, as one bit a tap and axis. The weights are read as
they lie in memory, [K, R*S, C/groups]; a dgrad swaps the roles of K and C.
"""

import math

import triton
import triton.language as tl

from .batch_norm_act_bwd import gradient_map
from .configs import blocks
from .conv_epilogue import stats_rows, sums_rows
from .conv_tile import mask_bits
from .tile import channels, load_stat, normalise, passes, relu

#: Taps an axis may have: the validity bits of a pixel fill one int32.
MAX_TAPS = 32
#: Elements from which offsets take 64 bits.
WIDE_FROM = 2**31

_SIZES = ["M", "T0", "T", "NT", "H", "W", "P", "Q", "OH", "OW", "CI", "CO", "G", "TAPS"]
_AXES = ["ah", "bh", "dh", "oh", "ch", "aw", "bw", "dw", "ow", "cw", "tap0", "tap_r", "tap_s"]


@triton.jit
def _validity(m_ok, x, d, size, TAPS: tl.constexpr):
    """Bit t: source coordinate x + t*d lies within [0, size). All 0 where ``m_ok`` is false."""
    bits = tl.zeros(x.shape, tl.int32)
    for t in tl.static_range(TAPS):
        at = x + t * d
        bits |= (m_ok & (at >= 0) & (at < size)).to(tl.int32) << t
    return bits


@triton.jit(do_not_specialize=_SIZES + _AXES)
def _conv_kernel(
    src_ptr,
    w_ptr,
    out_ptr,
    src_stat_ptr,
    pre_ptr,
    coef_ptr,
    pre_mask_ptr,
    bias_ptr,
    add_ptr,
    mask_ptr,
    act_ptr,
    act_stat_ptr,
    y_ptr,
    part_ptr,
    M,
    T0,
    T,
    NT,
    H,
    W,
    P,
    Q,
    OH,
    OW,
    CI,
    CO,
    G,
    TAPS,
    ah,
    bh,
    dh,
    oh,
    ch,
    aw,
    bw,
    dw,
    ow,
    cw,
    tap0,
    tap_r,
    tap_s,
    TR: tl.constexpr,
    TS: tl.constexpr,
    KB: tl.constexpr,
    SWAPPED: tl.constexpr,
    DENSE: tl.constexpr,
    RELU: tl.constexpr,
    WIDE: tl.constexpr,
    ALIGNED_IN: tl.constexpr,
    ALIGNED_OUT: tl.constexpr,
    EVEN_IN: tl.constexpr,
    EVEN_OUT: tl.constexpr,
    EVEN_M: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """M = N*P*Q pixels of the class, source images H x W, output images OH x OW; CI, CO channels in and out of each of
    G groups; TR x TS taps of the class among TAPS in all. A prologue of the source is ``src_stat`` alone (BN + ReLU) or
    ``pre`` with ``src_stat`` and ``coef`` (the BN gradient's map), behind the ReLU of ``pre_mask`` if there is one."""
    CI = channels(CI, ALIGNED_IN)
    CO = channels(CO, ALIGNED_OUT)
    if WIDE:  # an image, or what a tile spans of several, passes 2**31 elements
        W = W.to(tl.int64)
        OW = OW.to(tl.int64)
    pid = tl.program_id(0)
    tile = pid // (NT * G)
    g = pid % (NT * G) // NT
    n0 = pid % NT * BN
    m0 = tile * BM
    image0 = m0 // (P * Q)
    i = tl.arange(0, BM)
    m = m0 + i
    m_ok = i < M - m0
    q = m % Q
    p = m // Q % P
    image = m // Q // P - image0
    h = p * ah + bh
    w = q * aw + bw
    vh = _validity(m_ok, h, dh, H, TR)
    vw = _validity(m_ok, w, dw, W, TS)
    rk = tl.arange(0, BK)
    rn = tl.arange(0, BN)
    in_n = n0 + rn < CO
    # Offsets are relative to the first image of the tile, whose address is 64-bit.
    source = (image * H + h) * W + w
    base = image0.to(tl.int64) * H * W * (CI * G) + g * CI
    offsets = source[:, None] * (CI * G) + rk[None, :]
    if SWAPPED:
        w_ptr += (g * CI) * (TAPS * CO) + n0
        w_offsets = rk[:, None] * (TAPS * CO) + rn[None, :]
    else:
        w_ptr += (g * CO + n0) * (TAPS * CI)
        w_offsets = rk[:, None] + rn[None, :] * (TAPS * CI)
    acc = tl.zeros((BM, BN), tl.float32)
    for step in range(TR * TS * KB):
        tap = step // KB
        c = step % KB * BK
        r = tap // TS
        s = tap % TS
        valid = ((vh >> r) & (vw >> s) & 1) != 0
        keep = valid[:, None]
        in_c = c + rk < CI
        if not EVEN_IN:
            keep = keep & in_c[None, :]
        shift = base + ((r * dh * W + s * dw) * (CI * G) + c)
        a = tl.load(src_ptr + shift + offsets, mask=keep, other=0.0)
        if src_stat_ptr is not None:
            v = a.to(tl.float32)
            if pre_ptr is not None:
                before = tl.load(pre_ptr + shift + offsets, mask=keep, other=0.0).to(tl.float32)
                if pre_mask_ptr is not None:
                    at_pixel = source + (r * dh * W + s * dw)
                    rows = pre_mask_ptr + image0.to(tl.int64) * H * W * ((CI * G + 7) // 8)
                    v = tl.where(mask_bits(rows, at_pixel, g * CI + c + rk, valid, in_c, CI * G, ALIGNED_IN), v, 0.0)
                v = gradient_map(v, before, src_stat_ptr, coef_ptr, CI * G, g * CI + c + rk, in_c)
            else:
                mean, scale, bias = load_stat(src_stat_ptr, CI * G, g * CI + c + rk, in_c)
                v = relu(normalise(v, mean, scale, bias))
            # The padding is zero after the prologue, not what the prologue makes of a zero.
            a = tl.where(keep, v, 0.0).to(a.dtype)
        at = tap0 + r * tap_r + s * tap_s
        if SWAPPED:
            w_at = w_ptr + (at + c * TAPS) * CO
        else:
            w_at = w_ptr + at * CI + c
        if EVEN_IN and EVEN_OUT:
            b = tl.load(w_at + w_offsets)
        else:
            b = tl.load(w_at + w_offsets, mask=in_c[:, None] & in_n[None, :], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)

    C = CO * G
    k = g * CO + n0 + rn
    keep = m_ok[:, None] & in_n[None, :]
    if DENSE:
        pixel = i
        first = m0.to(tl.int64)
    else:
        pixel = (image * OH + p * oh + ch) * OW + q * ow + cw
        first = image0.to(tl.int64) * OH * OW
    o_offsets = pixel[:, None] * C + k[None, :]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + k, mask=in_n, other=0.0)[None, :]
    if add_ptr is not None:
        joined = tl.load(add_ptr + first * C + o_offsets, mask=keep, other=0.0).to(tl.float32)
        if mask_ptr is not None:
            bits = mask_bits(mask_ptr + first * ((C + 7) // 8), pixel, k, m_ok, in_n, C, ALIGNED_OUT)
            joined = tl.where(bits, joined, 0.0)
        acc += joined
    v = acc.to(out_ptr.dtype.element_ty)
    if act_ptr is not None:
        mean, scale, bias = load_stat(act_stat_ptr, C, k, in_n)
        x = tl.load(act_ptr + first * C + o_offsets, mask=keep, other=0.0).to(tl.float32)
        y = normalise(x, mean, scale, bias).to(v.dtype)
        v = tl.where(passes(y), v, 0.0).to(v.dtype)
        if y_ptr is not None:
            tl.store(y_ptr + first * C + o_offsets, relu(y), mask=keep)
    if RELU:
        tl.store(out_ptr + first * C + o_offsets, relu(v), mask=keep)
    else:
        tl.store(out_ptr + first * C + o_offsets, v, mask=keep)
    # Last, when the registers of the store are free again.
    if part_ptr is not None:
        n = tl.minimum(BM, M - m0)
        # Past the group's end lies the next group's first channel, not this program's to write.
        k_own = tl.where(in_n, k, C)
        if act_ptr is not None:
            sums_rows(v, x - mean, m_ok, n, part_ptr, T0 + tile, T, k_own, C, EVEN_M)
        else:
            stats_rows(v, m_ok, n, part_ptr, T0 + tile, T, k_own, C, EVEN_M)


# ---- launchers


def _axis(size: int, taps: int, stride: int, padding: int, dilation: int):
    """The classes of one axis of a dgrad, for inputs of ``size``: (pixels, b, d, class, first tap, tap step, taps).

    Input h = i*stride + class takes weight tap r from output (h + padding - r*dilation) / stride where that is whole.
    """
    step = stride // math.gcd(stride, dilation)
    for c in range(min(stride, size)):
        hits = [r for r in range(min(step, taps)) if (c + padding - r * dilation) % stride == 0]
        first = hits[0] if hits else 0
        count = blocks(taps - first, step) if hits else 0
        b = (c + padding - first * dilation) // stride
        yield blocks(size - c, stride), b, -(step * dilation // stride), c, first, step, count


def _classes(kind: str, sizes, kernel, geometry):
    """Pairs (row axis, column axis) as `_axis` describes them, ``sizes`` those of the output; one pair for a fprop."""
    stride, padding, dilation, _ = geometry
    if kind == "fprop":
        yield tuple((sizes[i], -padding[i], dilation[i], 0, 0, 1, kernel[i]) for i in range(2))
        return
    rows, columns = (_axis(sizes[i], kernel[i], stride[i], padding[i], dilation[i]) for i in range(2))
    columns = tuple(columns)
    for row in rows:
        for column in columns:
            yield row, column


def parts(kind, problem, config) -> int:
    """Tiles T of ``part [planes, T, channels]``: each is written. The classes of a dgrad follow each other."""
    sizes = (problem.P, problem.Q) if kind == "fprop" else (problem.H, problem.W)
    kernel = problem.R, problem.S
    pairs = _classes(kind, sizes, kernel, (problem.stride, problem.padding, problem.dilation, problem.groups))
    return sum(blocks(problem.N * row[0] * column[0], config.BM) for row, column in pairs)


def _check(name: str, N: int, sizes, w, BM: int) -> None:
    R, S = w.shape[2:]
    if max(R, S) > MAX_TAPS:
        raise ValueError(f"w: got a filter of {R}x{S}, expected at most {MAX_TAPS} taps an axis")
    if w.numel() >= 2**31:
        raise ValueError(f"w: got {w.numel()} elements, expected fewer than 2**31")
    if N * sizes[0] * sizes[1] + BM >= 2**31:
        raise ValueError(f"{name}: got {N} x {sizes[0]} x {sizes[1]} pixels, expected fewer than 2**31 - {BM}")


def _launch(
    kind, src, w, geometry, out, config, precision, *, src_stat=None, pre=None, coef=None, bits=None, bias=None,
    add=None, mask=None, relu=False, act=None, act_stat=None, y=None, part=None,
):  # fmt: skip
    stride, _, _, G = geometry
    N, _, H, W = src.shape
    OH, OW = out.shape[2:]
    R, S = w.shape[2:]
    BM, BN, BK = config.BM, config.BN, config.BK
    _check("x" if kind == "fprop" else "dx", N, (OH, OW), w, BM)
    swapped = kind == "dgrad"
    CI, CO = (w.shape[0] // G, w.shape[1]) if swapped else (w.shape[1], w.shape[0] // G)
    NT = blocks(CO, BN)
    pairs = list(_classes(kind, (OH, OW), (R, S), geometry))
    T = sum(blocks(N * row[0] * column[0], BM) for row, column in pairs)
    T0 = 0
    for (P, bh, dh, ch, first_r, step_r, TR), (Q, bw, dw, cw, first_s, step_s, TS) in pairs:
        M = N * P * Q
        tiles = blocks(M, BM)
        if tiles == 0:
            continue
        if TR * TS == 0:
            TR, TS = 0, 1
        # Images a tile may touch, and what lies outside of them at the taps of the border.
        span = (BM // (P * Q) + 2) * max(H * W * CI, OH * OW * CO) * G + (abs(bh) + TR * abs(dh)) * W * CI * G
        ah, aw, oh, ow = (1, 1, *stride) if swapped else (*stride, 1, 1)
        _conv_kernel[(tiles * NT * G,)](
            src, w, out, src_stat, pre, coef, bits, bias, add, mask, act, act_stat, y, part, M, T0, T, NT, H, W, P, Q,
            OH, OW, CI, CO, G, R * S, ah, bh, dh, oh, ch, aw, bw, dw, ow, cw, first_r * S + first_s, step_r * S, step_s,
            TR=TR, TS=TS, KB=blocks(CI, BK), SWAPPED=swapped, DENSE=(oh, ow) == (1, 1), RELU=bool(relu),
            WIDE=span >= WIDE_FROM, ALIGNED_IN=CI % 8 == 0, ALIGNED_OUT=CO % 8 == 0, EVEN_IN=CI % BK == 0,
            EVEN_OUT=CO % BN == 0, EVEN_M=M % BM == 0, PRECISION=precision, BM=BM, BN=BN, BK=BK,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
        T0 += tiles


def conv_fprop(x, w, geometry, out, *, stat=None, bias=None, residual=None, relu=False, part=None, config,
               precision="ieee"):  # fmt: skip
    """``conv_fprop`` of ``backends/reference_conv.py``; ``part`` [3, T, K] with T of `parts`.

    precision   of float32 products: "ieee", or "tf32" where the caller allows it.
    Raises ValueError for a filter, weights or an output beyond 32-bit offsets.
    """
    _launch("fprop", x, w, geometry, out, config, precision, src_stat=stat, bias=bias, add=residual, relu=relu,
            part=part)  # fmt: skip


def conv_dgrad(dy, w, geometry, dx, *, pre=None, pre_stat=None, coef=None, bits=None, add=None, mask=None, act=None,
               stat=None, part=None, y=None, config, precision="ieee"):  # fmt: skip
    """``conv_dgrad`` of ``backends/reference_conv.py``, the tuple ``pre`` one by one; ``part`` [2, T, C] with T of
    `parts`.

    Raises like `conv_fprop`.
    """
    _launch("dgrad", dy, w, geometry, dx, config, precision, src_stat=pre_stat, pre=pre, coef=coef, bits=bits, add=add,
            mask=mask, act=act, act_stat=stat, y=y, part=part)  # fmt: skip
