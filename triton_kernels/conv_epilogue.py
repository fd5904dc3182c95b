"""Per-channel reductions of a convolution's output tile, while it is still in registers.

Two orientations: *rows*, v [BM, BN] with pixels along axis 0, and *columns*, v [BN, BM] with pixels along axis 1.
``ok`` [BM] says which pixels exist, ``n`` (an integer) how many do, ``t`` which of the T tiles of ``part`` this is,
``k`` [BN] which channels of K it holds; an entry of ``k`` past K - 1 is not stored.

FULL says that every tile has all its pixels, so that nothing is masked: a constant of the compiler, since a branch at
run time keeps the registers of both its sides. Call these after the tile is stored: reduced before, it occupies its
registers twice and 128x128 tiles of four warps spill.
"""

import triton
import triton.language as tl


@triton.jit
def _store_plane(part_ptr, PLANE: tl.constexpr, value, t, T, k, K):
    """One row of plane PLANE of ``part`` [planes, T, K]; T*K may pass 2**31."""
    row = (PLANE * T.to(tl.int64) + t) * K
    tl.store(part_ptr + row + k, value, mask=k < K)


@triton.jit
def _moments(v, keep, count, AXIS: tl.constexpr, MASKED: tl.constexpr):
    v = v.to(tl.float32)
    if MASKED:
        v = tl.where(keep, v, 0.0)
    mean = tl.sum(v, axis=AXIS) * (1.0 / count)
    d = v - tl.expand_dims(mean, AXIS)
    if MASKED:
        d = tl.where(keep, d, 0.0)
    return mean, tl.sum(d * d, axis=AXIS)


@triton.jit
def _stats(v, ok, n, part_ptr, t, T, k, K, AXIS: tl.constexpr, FULL: tl.constexpr):
    """Count, mean and M2. The mean first, then squares about it: exact enough however large the mean is.

    An error e of the mean enters M2 as n*e*e only, so a reciprocal may stand for the division.
    """
    count = n.to(tl.float32)
    mean, m2 = _moments(v, tl.expand_dims(ok, 1 - AXIS), count, AXIS, not FULL)
    _store_plane(part_ptr, 0, tl.zeros_like(mean) + count, t, T, k, K)
    _store_plane(part_ptr, 1, mean, t, T, k, K)
    _store_plane(part_ptr, 2, m2, t, T, k, K)


@triton.jit
def _sums(g, centred, ok, n, part_ptr, t, T, k, K, AXIS: tl.constexpr, FULL: tl.constexpr):
    g = g.to(tl.float32)
    if not FULL:
        g = tl.where(tl.expand_dims(ok, 1 - AXIS), g, 0.0)
    _store_plane(part_ptr, 0, tl.sum(g, axis=AXIS), t, T, k, K)
    _store_plane(part_ptr, 1, tl.sum(g * centred, axis=AXIS), t, T, k, K)


@triton.jit
def stats_rows(v, ok, n, part_ptr, t, T, k, K, FULL: tl.constexpr = False):
    """``part`` float32 [3, T, K]: count, mean, M2 of v [BM, BN], the rounded outputs in any float dtype."""
    _stats(v, ok, n, part_ptr, t, T, k, K, 0, FULL)


@triton.jit
def stats_columns(v, ok, n, part_ptr, t, T, k, K, FULL: tl.constexpr = False):
    """`stats_rows` of v [BN, BM]."""
    _stats(v, ok, n, part_ptr, t, T, k, K, 1, FULL)


@triton.jit
def sums_rows(g, centred, ok, n, part_ptr, t, T, k, K, FULL: tl.constexpr = False):
    """``part`` float32 [2, T, K]: sums of g and of g*centred, both [BM, BN].

    ``centred`` is float32 and finite where ``ok`` is false.
    """
    _sums(g, centred, ok, n, part_ptr, t, T, k, K, 0, FULL)


@triton.jit
def sums_columns(g, centred, ok, n, part_ptr, t, T, k, K, FULL: tl.constexpr = False):
    """`sums_rows` of g and centred [BN, BM]."""
    _sums(g, centred, ok, n, part_ptr, t, T, k, K, 1, FULL)
