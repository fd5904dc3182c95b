"""conv_fprop and stride-1 conv_dgrad fed by tensor descriptors (TMA on compute capability 9.0 and later).

Two orientations of the same implicit GEMM. *patch*: the accumulator is transposed, acc[BN, BM] = W[BN, BK] x
patch[BM, BK]^T. A patch is TN images x TH rows x TW columns of x at one filter tap: the hardware fills what lies
outside of the image with zeros, so the loop holds no masks and no address arithmetic. As operand B the 4-D patch
becomes a matrix inside its shared-memory descriptor; as operand A it would travel through registers first. Statistics
run along the pixels, that is within a thread. *rows* (1x1, stride 1 only): acc[BM, BN] over the flattened pixels, for
epilogues that meet another [M, C] tensor.

dgrad is the same loop over the same weights, [K, R*S, C] in memory, with the filter walked backwards (dilation
negated) and the roles of K and C swapped by a transposed view in shared memory.
"""

import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .configs import blocks
from .conv_epilogue import stats_columns, stats_rows, sums_columns, sums_rows
from .conv_tile import corner, inside, nhwc, pixels
from .tile import load_mask, load_stat, normalise, passes, relu

_SIZES = ["N", "P", "Q", "HT", "WT", "PT", "NT", "ph", "pw", "dh", "dw", "C", "K", "M"]


@triton.jit
def _stat_column(stat_ptr, K, k):
    mean, scale, bias = load_stat(stat_ptr, K, k, k < K)
    return tl.trans(mean), tl.trans(scale), tl.trans(bias)


@triton.jit(do_not_specialize=_SIZES)
def _patch_kernel(
    x_desc,
    w_desc,
    out_desc,
    bias_ptr,
    residual_desc,
    part_ptr,
    act_desc,
    stat_ptr,
    y_desc,
    N,
    P,
    Q,
    HT,
    WT,
    PT,
    NT,
    ph,
    pw,
    dh,
    dw,
    C,
    K,
    TAPS: tl.constexpr,
    S: tl.constexpr,
    KB: tl.constexpr,
    SWAPPED: tl.constexpr,
    RELU: tl.constexpr,
    PRECISION: tl.constexpr,
    FULL: tl.constexpr,
    TN: tl.constexpr,
    TH: tl.constexpr,
    TW: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """C input and K output channels of this product (a dgrad's are the convolution's K and C)."""
    BM: tl.constexpr = TN * TH * TW
    pid = tl.program_id(0)
    t = pid // NT
    k0 = (pid % NT) * BN
    n0, p0, q0 = corner(t, HT, WT, TN, TH, TW)
    acc = tl.zeros((BN, BM), tl.float32)
    for i in range(TAPS * KB):
        tap = i // KB
        c = (i % KB) * BK
        x = x_desc.load([n0, p0 + tap // S * dh - ph, q0 + tap % S * dw - pw, c]).reshape(BM, BK)
        if SWAPPED:
            w = w_desc.load([c, tap * K + k0])
            acc = tl.dot(w.T, x.T, acc, input_precision=PRECISION)
        else:
            w = w_desc.load([k0, tap * C + c])
            acc = tl.dot(w, x.T, acc, input_precision=PRECISION)
    k = k0 + tl.arange(0, BN)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + k, mask=k < K, other=0.0)[:, None]
    if residual_desc is not None:
        acc += residual_desc.load([n0, p0, q0, k0]).reshape(BM, BN).T.to(tl.float32)
    v = acc.to(out_desc.dtype)
    if act_desc is not None:
        mean, scale, bias = _stat_column(stat_ptr, K, k)
        a = act_desc.load([n0, p0, q0, k0]).reshape(BM, BN).T.to(tl.float32)
        h = normalise(a, mean, scale, bias).to(v.dtype)
        v = tl.where(passes(h), v, 0.0).to(v.dtype)
        if y_desc is not None:
            y_desc.store([n0, p0, q0, k0], relu(h).T.reshape(TN, TH, TW, BN))
    if RELU:
        v = relu(v)
    out_desc.store([n0, p0, q0, k0], v.T.reshape(TN, TH, TW, BN))
    if part_ptr is not None:  # after the store, when its registers are free again
        ok = inside(n0, p0, q0, N, P, Q, TN, TH, TW)
        n = pixels(n0, p0, q0, N, P, Q, TN, TH, TW)
        if act_desc is None:
            stats_columns(v, ok, n, part_ptr, t, PT, k, K, FULL)
        else:
            sums_columns(v, a - mean, ok, n, part_ptr, t, PT, k, K, FULL)


@triton.jit(do_not_specialize=_SIZES)
def _rows_kernel(
    x_desc,
    w_desc,
    out_desc,
    bias_ptr,
    residual_ptr,
    mask_ptr,
    part_ptr,
    act_ptr,
    stat_ptr,
    y_desc,
    M,
    PT,
    NT,
    C,
    K,
    SWAPPED: tl.constexpr,
    RELU: tl.constexpr,
    PRECISION: tl.constexpr,
    FULL: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """K is a multiple of BN; what is read beside the operands comes in 16-byte pieces."""
    pid = tl.program_id(0)
    t = pid // NT
    k0 = (pid % NT) * BN
    m0 = t * BM
    acc = tl.zeros((BM, BN), tl.float32)
    for c in range(0, C, BK):
        x = x_desc.load([m0, c])
        if SWAPPED:
            acc = tl.dot(x, w_desc.load([c, k0]), acc, input_precision=PRECISION)
        else:
            acc = tl.dot(x, w_desc.load([k0, c]).T, acc, input_precision=PRECISION)
    K = (K // BN) * BN
    k = k0 + tl.arange(0, BN)
    i = tl.arange(0, BM)
    ok = i < M - m0
    offsets = i[:, None] * K + tl.arange(0, BN)[None, :]
    base = m0.to(tl.int64) * K + k0
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + k)[None, :]
    if residual_ptr is not None:
        r = tl.load(residual_ptr + base + offsets, mask=ok[:, None], other=0.0)
        if mask_ptr is not None:
            r = tl.where(load_mask(mask_ptr, m0.to(tl.int64), k0, K, M - m0, BM, BN), r, 0.0).to(r.dtype)
        acc += r.to(tl.float32)
    v = acc.to(out_desc.dtype)
    if act_ptr is not None:
        mean, scale, bias = load_stat(stat_ptr, K, k, k < K)
        a = tl.load(act_ptr + base + offsets, mask=ok[:, None], other=0.0).to(tl.float32)
        h = normalise(a, mean, scale, bias).to(v.dtype)
        v = tl.where(passes(h), v, 0.0).to(v.dtype)
        if y_desc is not None:
            y_desc.store([m0, k0], relu(h))
    if RELU:
        v = relu(v)
    out_desc.store([m0, k0], v)
    if part_ptr is not None:
        n = tl.minimum(BM, M - m0)
        if act_ptr is None:
            stats_rows(v, ok, n, part_ptr, t, PT, k, K, FULL)
        else:
            sums_rows(v, a - mean, ok, n, part_ptr, t, PT, k, K, FULL)


def _flat(patch, taps, pad) -> bool:
    """Whether pixels are as good as images: a 1x1 convolution without padding."""
    return patch[1] == patch[2] == taps == 1 and tuple(pad) == (0, 0)


def parts(kind, problem, config) -> int:
    """Tiles T of ``part [planes, T, channels]``: each is written."""
    P, Q = (problem.P, problem.Q) if kind == "fprop" else (problem.H, problem.W)
    if not config.patch or _flat(config.patch, problem.R * problem.S, problem.padding):
        return blocks(problem.N * P * Q, config.BM)
    images, rows, columns = config.patch
    return blocks(problem.N, images) * blocks(P, rows) * blocks(Q, columns)


def _launch(x, w, out, taps, S, pad, dilation, swapped, config, precision, *, bias=None, residual=None, mask=None,
            relu=False, part=None, act=None, stat=None, y=None):  # fmt: skip
    """``x``, ``out``: [N, channels, H, W] of one size of image each; ``w``: the weights' memory as [rows, columns]."""
    N, C, _, _ = x.shape
    _, K, P, Q = out.shape
    BM, BN, BK = config.BM, config.BN, config.BK
    rows, columns = w.shape[0], w.shape[1] * taps
    wd = TensorDescriptor(w, [rows, columns], [columns, 1], [BK, BN] if swapped else [BN, BK])
    NT = blocks(K, BN)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    if config.kernel == "rows":
        M = N * P * Q
        PT = blocks(M, BM)

        def flat(t, channels, columns):
            return None if t is None else TensorDescriptor(t, [M, channels], [channels, 1], [BM, columns])

        _rows_kernel[(PT * NT,)](
            flat(x, C, BK), wd, flat(out, K, BN), bias, residual, mask, part, act, stat, flat(y, K, BN), M, PT, NT, C,
            K, SWAPPED=swapped, RELU=relu, PRECISION=precision, FULL=M % BM == 0, BM=BM, BN=BN, BK=BK, **options,
        )  # fmt: skip
        return
    patch = list(config.patch)
    if _flat(patch, taps, pad):
        N, P, Q, H, W = N * P * Q, 1, 1, 1, 1
    else:
        H, W = x.shape[2:]
    HT, WT = blocks(P, patch[1]), blocks(Q, patch[2])
    PT = blocks(N, patch[0]) * HT * WT

    def image(t):
        return None if t is None else nhwc(t, (N, P, Q, K), [*patch, BN])

    _patch_kernel[(PT * NT,)](
        nhwc(x, (N, H, W, C), [*patch, BK]), wd, image(out), bias, image(residual), part, image(act), stat, image(y),
        N, P, Q, HT, WT, PT, NT, *pad, *dilation, C, K, TAPS=taps, S=S, KB=C // BK, SWAPPED=swapped, RELU=relu,
        PRECISION=precision, FULL=not (N % patch[0] or P % patch[1] or Q % patch[2]), TN=patch[0], TH=patch[1],
        TW=patch[2], BN=BN, BK=BK, **options,
    )  # fmt: skip


def conv_fprop(x, w, geometry, out, *, stat=None, bias=None, residual=None, relu=False, part=None, config,
               precision="ieee"):  # fmt: skip
    _, padding, dilation, _ = geometry
    K, C, R, S = w.shape
    _launch(x, w, out, R * S, S, padding, dilation, False, config, precision, bias=bias, residual=residual, relu=relu,
            part=part)  # fmt: skip


def conv_dgrad(dy, w, geometry, dx, *, pre=None, pre_stat=None, coef=None, bits=None, add=None, mask=None, act=None,
               stat=None, part=None, y=None, config, precision="ieee"):  # fmt: skip
    _, padding, dilation, _ = geometry
    K, C, R, S = w.shape
    # dx[h] gathers dy[h + pad - r*dilation].
    backwards = (-padding[0], -padding[1]), (-dilation[0], -dilation[1])
    _launch(dy, w, dx, R * S, S, *backwards, True, config, precision, residual=add, mask=mask, act=act, stat=stat,
            part=part, y=y)  # fmt: skip
