"""conv_wgrad: dw[k, tap, c] = sum over output pixels of dy[pixel, k] * x[source of the pixel at the tap, c].

A program owns one tile [BN, BK] of (k, c) at one tap and one slab of the pixels, BM of them a step. Slabs leave float32
partial sums in a scratch buffer that a second kernel adds in ascending order: no atomics, the same bits on every run.
How many slabs there are follows from the shapes alone.

*gather* reads x by pointers: any stride, padding, dilation, groups and channel count. *patch* reads images x rows x
columns of dy and x through tensor descriptors (stride 1, one group); for 1x1 the pixels are flattened and dy is
transposed inside shared memory.
"""

import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .batch_norm_act_bwd import gradient_map
from .configs import blocks
from .conv_tile import corner, float32, inside, mask_bits, nhwc
from .tile import channels, load_stat, normalise, relu

_SIZES = ["M", "PER", "N", "H", "W", "P", "Q", "C", "K", "CG", "KG", "CT", "KT", "HT", "WT", "PT"]
_AXES = ["sh", "sw", "ph", "pw", "dh", "dw"]

#: Programs that should be in flight: two (1x1) or four blocks on each of 132 multiprocessors. One number for every GPU,
#: so that the order of summation does not depend on it.
PROGRAMS_POINTWISE = 264
PROGRAMS = 528
#: More slabs than this cost more in their merge than they gain in parallelism.
MAX_SLABS = 64
#: Steps of BM pixels under which a slab is not worth its store and its load.
MIN_STEPS = 4
#: Neighbouring elements of dw that a program of the merge adds up.
MERGE_BLOCK = 1024
#: Elements from which offsets take 64 bits.
WIDE_FROM = 2**31


@triton.jit
def _store_tile(out_ptr, acc, slab, tap, k, c, K, KG, CG, k_end, TAPS: tl.constexpr):
    """acc [BN, BK] into slab [K, TAPS, CG]; ``k`` over all K channels, ``c`` within the group."""
    out = out_ptr + slab.to(tl.int64) * K * (TAPS * CG)
    keep = (k < k_end)[:, None] & (c < CG)[None, :]
    tl.store(out + ((k[:, None] * TAPS + tap) * CG + c[None, :]), acc.to(out_ptr.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=_SIZES + _AXES)
def _gather_kernel(
    dy_ptr,
    x_ptr,
    out_ptr,
    pre_ptr,
    pre_stat_ptr,
    coef_ptr,
    bits_ptr,
    stat_ptr,
    M,
    PER,
    H,
    W,
    P,
    Q,
    K,
    KG,
    C,
    CG,
    KT,
    CT,
    sh,
    sw,
    ph,
    pw,
    dh,
    dw,
    TAPS: tl.constexpr,
    S: tl.constexpr,
    WIDE: tl.constexpr,
    ALIGNED_K: tl.constexpr,
    ALIGNED_C: tl.constexpr,
    EVEN_K: tl.constexpr,
    EVEN_C: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """dy [M, K] with M = N*P*Q, x [N*H*W, C]; KG = K/groups, CG = C/groups; KT, CT tiles a group; PER pixels a slab."""
    K = channels(K, ALIGNED_K)
    KG = channels(KG, ALIGNED_K)
    C = channels(C, ALIGNED_C)
    CG = channels(CG, ALIGNED_C)
    pid = tl.program_id(0)
    slab = tl.program_id(1)
    tap = pid % TAPS
    c0 = pid // TAPS % CT * BK
    k0 = pid // (TAPS * CT) % KT * BN
    g = pid // (TAPS * CT * KT)
    lo = slab * PER
    hi = tl.minimum(lo + PER, M)
    i = tl.arange(0, BM)
    c = c0 + tl.arange(0, BK)
    k = k0 + tl.arange(0, BN)
    in_c = c < CG
    in_k = k < KG
    # Row and column of the tile's pixels at this tap; they advance without a division, see below.
    m = lo + i
    w = m % Q * sw + (tap % S * dw - pw)
    h = m // Q % P * sh + (tap // S * dh - ph)
    if WIDE:
        pixel = (m // Q // P).to(tl.int64) * H * W + (h * W + w)
    else:
        pixel = (m // Q // P * H + h) * W + w
    w_end = Q * sw + (tap % S * dw - pw)
    h_end = P * sh + (tap // S * dh - ph)
    # BM pixels on: step_n images, step_h rows and step_w columns, with a carry from columns to rows to images.
    step_w = BM % Q * sw
    step_h = BM // Q % P * sh
    step = (BM // Q // P * H + step_h) * W + step_w
    carry_w = sh * W - Q * sw
    carry_h = (H - P * sh) * W
    x_offsets = g * CG + c
    if pre_ptr is None:
        # The transpose is read as such: tl.trans of the load would make it synchronous on compute capability 8.x.
        dy_offsets = (g * KG + k)[:, None] + i[None, :] * K
    else:
        dy_offsets = i[:, None] * K + (g * KG + k)[None, :]
    at = lo.to(tl.int64) * K
    bits_at = lo.to(tl.int64) * ((K + 7) // 8)
    acc = tl.zeros((BN, BK), tl.float32)
    for m0 in range(lo, hi, BM):
        in_m = i < hi - m0
        valid = in_m & (h >= 0) & (h < H) & (w >= 0) & (w < W)
        x_keep = valid[:, None]
        if not EVEN_C:
            x_keep = x_keep & in_c[None, :]
        x = tl.load(x_ptr + (pixel[:, None] * C + x_offsets[None, :]), mask=x_keep, other=0.0)
        if pre_ptr is None:
            if EVEN_K:
                dy = tl.load(dy_ptr + at + dy_offsets, mask=in_m[None, :], other=0.0)
            else:
                dy = tl.load(dy_ptr + at + dy_offsets, mask=in_k[:, None] & in_m[None, :], other=0.0)
        else:
            keep = in_m[:, None] & in_k[None, :]
            v = tl.load(dy_ptr + at + dy_offsets, mask=keep, other=0.0).to(tl.float32)
            before = tl.load(pre_ptr + at + dy_offsets, mask=keep, other=0.0).to(tl.float32)
            if bits_ptr is not None:
                v = tl.where(mask_bits(bits_ptr + bits_at, i, g * KG + k, in_m, in_k, K, ALIGNED_K), v, 0.0)
            v = gradient_map(v, before, pre_stat_ptr, coef_ptr, K, g * KG + k, in_k)
            dy = tl.trans(tl.where(keep, v, 0.0).to(dy_ptr.dtype.element_ty))
        if stat_ptr is not None:
            mean, scale, bias = load_stat(stat_ptr, C, x_offsets, in_c)
            a = relu(normalise(x.to(tl.float32), mean, scale, bias))
            # The padding is zero after the prologue, not what the prologue makes of a zero.
            x = tl.where(x_keep, a, 0.0).to(x.dtype)
        acc = tl.dot(dy, x, acc, input_precision=PRECISION)
        at += BM * K
        bits_at += BM * ((K + 7) // 8)
        w += step_w
        over_w = w >= w_end
        w = tl.where(over_w, w - Q * sw, w)
        h += step_h + tl.where(over_w, sh, 0)
        over_h = h >= h_end
        h = tl.where(over_h, h - P * sh, h)
        pixel += step + tl.where(over_w, carry_w, 0) + tl.where(over_h, carry_h, 0)
    _store_tile(out_ptr, acc, slab, tap, g * KG + k, c, K, KG, CG, g * KG + KG, TAPS)


@triton.jit
def _load_patch(desc, n0, h0, w0, c0, FLAT: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr):
    if FLAT:
        return desc.load([n0, c0])
    else:
        return desc.load([n0, h0, w0, c0]).reshape(BM, BC)


@triton.jit(do_not_specialize=_SIZES + _AXES)
def _patch_kernel(
    dy_desc,
    x_desc,
    out_ptr,
    pre_desc,
    pre_stat_ptr,
    coef_ptr,
    bits_ptr,
    stat_ptr,
    N,
    H,
    W,
    P,
    Q,
    K,
    C,
    CT,
    HT,
    WT,
    PT,
    PER,
    ph,
    pw,
    dh,
    dw,
    TAPS: tl.constexpr,
    S: tl.constexpr,
    FLAT: tl.constexpr,
    PRECISION: tl.constexpr,
    TN: tl.constexpr,
    TH: tl.constexpr,
    TW: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """PT patches of dy's images, PER a slab. What a patch holds outside of its image is zero, in x (the padding) and in
    dy (the ragged edge). FLAT: pixels as N images of 1x1, descriptors of two dimensions."""
    BM: tl.constexpr = TN * TH * TW
    pid = tl.program_id(0)
    slab = tl.program_id(1)
    tap = pid % TAPS
    c0 = pid // TAPS % CT * BK
    k0 = pid // (TAPS * CT) * BN
    shift_h = tap // S * dh - ph
    shift_w = tap % S * dw - pw
    k = k0 + tl.arange(0, BN)
    c = c0 + tl.arange(0, BK)
    i = tl.arange(0, BM)
    lo = slab * PER
    hi = tl.minimum(lo + PER, PT)
    acc = tl.zeros((BN, BK), tl.float32)
    for t in range(lo, hi):
        n0, p0, q0 = corner(t, HT, WT, TN, TH, TW)
        dy = _load_patch(dy_desc, n0, p0, q0, k0, FLAT, BM, BN)
        x = _load_patch(x_desc, n0, p0 + shift_h, q0 + shift_w, c0, FLAT, BM, BK)
        if pre_desc is not None:
            before = _load_patch(pre_desc, n0, p0, q0, k0, FLAT, BM, BN).to(tl.float32)
            there = inside(n0, p0, q0, N, P, Q, TN, TH, TW)
            v = dy.to(tl.float32)
            if bits_ptr is not None:
                image = (n0 + i // (TH * TW)).to(tl.int64)
                pixel = (image * P + p0 + i // TW % TH) * Q + q0 + i % TW
                v = tl.where(mask_bits(bits_ptr, pixel, k, there, k < K, K, True), v, 0.0)
            v = gradient_map(v, before, pre_stat_ptr, coef_ptr, K, k, k < K)
            dy = tl.where(there[:, None], v, 0.0).to(dy.dtype)
        if stat_ptr is not None:
            mean, scale, bias = load_stat(stat_ptr, C, c, c < C)
            a = relu(normalise(x.to(tl.float32), mean, scale, bias))
            ok = inside(n0, p0 + shift_h, q0 + shift_w, N, H, W, TN, TH, TW)
            x = tl.where(ok[:, None], a, 0.0).to(x.dtype)
        acc = tl.dot(dy.T, x, acc, input_precision=PRECISION)
    _store_tile(out_ptr, acc, slab, tap, k, c, K, K, C, K, TAPS)


@triton.jit(do_not_specialize=["n", "slabs"])
def _merge_kernel(slab_ptr, out_ptr, n, slabs, BLOCK: tl.constexpr):
    """out[n] = slab 0 + slab 1 + ..., rounded once."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    keep = i < n
    total = tl.zeros([BLOCK], tl.float32)
    for _ in range(slabs):
        total += tl.load(slab_ptr + i, mask=keep, other=0.0)
        slab_ptr += n
    tl.store(out_ptr + i, total.to(out_ptr.dtype.element_ty), mask=keep)


# ---- launcher


def _split(steps: int, tiles: int, taps: int) -> tuple[int, int]:
    """Slabs, and the steps of each: fewer in the last."""
    programs = PROGRAMS_POINTWISE if taps == 1 else PROGRAMS
    per = blocks(steps, max(1, min(programs // tiles, MAX_SLABS, steps // MIN_STEPS)))
    return blocks(steps, per), per


def _launch_gather(dy, x, geometry, out, slabs, per, pre, stat, config, options):
    (sh, sw), (ph, pw), (dh, dw), G = geometry
    N, C, H, W = x.shape
    _, K, P, Q = dy.shape
    BM, BN, BK = config.BM, config.BN, config.BK
    CG, KG = C // G, K // G
    KT, CT = blocks(KG, BN), blocks(CG, BK)
    # A slab's last step may look past the last image.
    wide = (N + BM // (P * Q) + 2) * H * W * C >= WIDE_FROM
    a, pre_stat, coef, bits = pre
    _gather_kernel[(KT * CT * G * options["TAPS"], slabs)](
        dy, x, out, a, pre_stat, coef, bits, stat, N * P * Q, per * BM, H, W, P, Q, K, KG, C, CG, KT, CT, sh, sw, ph,
        pw, dh, dw, WIDE=wide, ALIGNED_K=KG % 8 == 0, ALIGNED_C=CG % 8 == 0, EVEN_K=KG % BN == 0,
        EVEN_C=CG % BK == 0, BM=BM, BN=BN, BK=BK, **options,
    )  # fmt: skip


def _launch_patch(dy, x, geometry, out, slabs, per, pre, stat, config, options):
    _, (ph, pw), (dh, dw), _ = geometry
    N, C, H, W = x.shape
    _, K, P, Q = dy.shape
    BM, BN, BK = config.BM, config.BN, config.BK
    flat = not config.patch
    if flat:
        N, H, W, P, Q = N * P * Q, 1, 1, 1, 1
    TN, TH, TW = config.patch or (BM, 1, 1)

    def images(t, rows, columns, channels, block):
        if flat:
            return TensorDescriptor(t, [N, channels], [channels, 1], [BM, block])
        return nhwc(t, (N, rows, columns, channels), (TN, TH, TW, block))

    a, pre_stat, coef, bits = pre
    HT, WT = blocks(P, TH), blocks(Q, TW)
    KT, CT = blocks(K, BN), blocks(C, BK)
    _patch_kernel[(KT * CT * options["TAPS"], slabs)](
        images(dy, P, Q, K, BN), images(x, H, W, C, BK), out, None if a is None else images(a, P, Q, K, BN), pre_stat,
        coef, bits, stat, N, H, W, P, Q, K, C, CT, HT, WT, blocks(N, TN) * HT * WT, per, ph, pw, dh, dw, FLAT=flat,
        TN=TN, TH=TH, TW=TW, BN=BN, BK=BK, **options,
    )  # fmt: skip


def _check(dy, dw, geometry, config) -> None:
    N, _, P, Q = dy.shape
    if N * P * Q + config.BM >= 2**31:
        raise ValueError(f"dy: got {N} x {P} x {Q} pixels, expected fewer than 2**31 - {config.BM}")
    if dw.numel() >= 2**31:
        raise ValueError(f"dw: got {dw.numel()} elements, expected fewer than 2**31")
    if config.kernel == "wgrad_patch":
        stride, padding, _, groups = geometry
        if tuple(stride) != (1, 1) or groups != 1:
            raise ValueError(
                f"geometry: got stride {stride}, groups {groups}, expected stride 1, groups 1 for {config}"
            )
        taps = tuple(dw.shape[2:])
        if not config.patch and (taps != (1, 1) or tuple(padding) != (0, 0)):
            raise ValueError(
                f"config: got flattened pixels ({config}) for a filter of {taps} and padding {padding}, expected 1x1, 0"
            )


def conv_wgrad(dy, x, geometry, dw, *, pre=None, pre_stat=None, coef=None, bits=None, stat=None, config,
               precision="ieee"):  # fmt: skip
    """``conv_wgrad`` of ``backends/reference_conv.py``, the tuple ``pre`` one by one; dw in any float dtype, rounded
    from float32 once.

    precision   of float32 products: "ieee", or "tf32" where the caller allows it.
    Allocates the slabs: float32 [slabs, K, R*S, C/groups].
    Raises ValueError for a pixel count beyond 32 bits and for what tensor descriptors do not serve.
    """
    _check(dy, dw, geometry, config)
    N, K, P, Q = dy.shape
    C = x.shape[1]
    R, S = dw.shape[2:]
    G = geometry[3]
    if N * P * Q == 0:
        dw.zero_()
        return
    gather = config.kernel == "wgrad_gather"
    TN, TH, TW = config.patch or (config.BM, 1, 1)
    steps = blocks(N, TN) * blocks(P, TH) * blocks(Q, TW) if config.patch else blocks(N * P * Q, config.BM)
    tiles = blocks(K // G, config.BN) * blocks(C // G, config.BK) * R * S * G
    slabs, per = _split(steps, tiles, R * S)
    n = dw.numel()
    out = dw if slabs == 1 else float32(dy, slabs * n)
    options = {"TAPS": R * S, "S": S, "PRECISION": precision, "num_warps": config.num_warps,
               "num_stages": config.num_stages}  # fmt: skip
    launch = _launch_gather if gather else _launch_patch
    launch(dy, x, geometry, out, slabs, per, (pre, pre_stat, coef, bits), stat, config, options)
    if slabs > 1:
        _merge_kernel[(blocks(n, MERGE_BLOCK),)](out, dw, n, slabs, BLOCK=MERGE_BLOCK, num_warps=4)
