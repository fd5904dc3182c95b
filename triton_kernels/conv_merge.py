"""Shortens ``part``: a convolution leaves one partial result a tile of pixels, thousands of them; whoever finishes the
statistics wants hundreds. Tiles meet in ascending order in float64, so the bits do not depend on the GPU."""

import triton
import triton.language as tl

from .configs import blocks

#: Tiles that are left over, at most.
SHORT = 128


@triton.jit(do_not_specialize=["T", "R", "OUT", "C"])
def _merge_kernel(part_ptr, T, R, OUT, C, out_ptr, PLANES: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr):
    """Group g takes tiles [g*R, (g+1)*R). Three planes are (count, mean, M2), two are sums."""
    g = tl.program_id(0)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    i = tl.arange(0, BM)
    lo = g * R
    hi = tl.minimum(lo + R, T)
    plane = T.to(tl.int64) * C
    out = out_ptr + g * C + c
    out_plane = OUT.to(tl.int64) * C
    if PLANES == 3:
        counts = tl.zeros([BM, BC], tl.float64)
        sums = tl.zeros([BM, BC], tl.float64)
        for t in range(lo, hi, BM):
            keep = (t + i < hi)[:, None] & (c < C)[None, :]
            p = part_ptr + (t + i).to(tl.int64)[:, None] * C + c[None, :]
            n = tl.load(p, mask=keep, other=0.0).to(tl.float64)
            counts += n
            sums += n * tl.load(p + plane, mask=keep, other=0.0).to(tl.float64)
        count = tl.sum(counts, axis=0)
        mean = tl.sum(sums, axis=0) / tl.where(count > 0, count, 1.0)
        squares = tl.zeros([BM, BC], tl.float64)
        for t in range(lo, hi, BM):
            keep = (t + i < hi)[:, None] & (c < C)[None, :]
            p = part_ptr + (t + i).to(tl.int64)[:, None] * C + c[None, :]
            n = tl.load(p, mask=keep, other=0.0).to(tl.float64)
            d = tl.load(p + plane, mask=keep, other=0.0).to(tl.float64) - mean[None, :]
            squares += tl.load(p + 2 * plane, mask=keep, other=0.0).to(tl.float64) + n * d * d
        tl.store(out, count.to(tl.float32), mask=c < C)
        tl.store(out + out_plane, mean.to(tl.float32), mask=c < C)
        tl.store(out + 2 * out_plane, tl.sum(squares, axis=0).to(tl.float32), mask=c < C)
    else:
        for p in tl.static_range(PLANES):
            total = tl.zeros([BM, BC], tl.float64)
            for t in range(lo, hi, BM):
                keep = (t + i < hi)[:, None] & (c < C)[None, :]
                a = part_ptr + p * plane + (t + i).to(tl.int64)[:, None] * C + c[None, :]
                total += tl.load(a, mask=keep, other=0.0).to(tl.float64)
            tl.store(out + p * out_plane, tl.sum(total, axis=0).to(tl.float32), mask=c < C)


def short(T: int) -> int:
    """Tiles that ``merge`` makes of T."""
    return T if T <= SHORT else blocks(T, blocks(T, SHORT))


def merge(part, out) -> None:
    """``part`` float32 [planes, T, C] into ``out`` [planes, short(T), C]."""
    planes, T, C = part.shape
    groups = out.shape[1]
    grid = (groups, blocks(C, 32))
    _merge_kernel[grid](part, T, blocks(T, groups), groups, C, out, PLANES=planes, BM=64, BC=32, num_warps=4)
