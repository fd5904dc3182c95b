"""What the kernels share: how a program finds its tile, and the ReLU with its bit mask.

A tile is ``BM`` rows by ``BC`` channels of an NHWC activation. Row offsets are int64 scalars, so ``M*C`` may
pass 2**31; offsets inside a tile fit int32.

``ALIGNED`` says that ``C % 8 == 0``. `channels` turns it into a fact the compiler can use: with it, and with
addresses that Triton's own specialisation knows to be multiples of 16, eight 16-bit channels (or four floats)
move as one 16-byte access. Any other C or address takes the element-wise variant of the same kernel.

bfloat16: ``.to(tl.bfloat16)`` rounds to nearest even on a GPU. Triton's interpreter truncates instead, so its
results for bfloat16 are not those of the hardware and are not tested.
"""

import triton
import triton.language as tl


@triton.jit
def channels(C, ALIGNED: tl.constexpr):
    """C itself, shown to be a multiple of 8 where it is."""
    if ALIGNED:
        C = (C // 8) * 8
    return C


@triton.jit
def place(C, BC: tl.constexpr):
    """This program's block of rows (int64), its first channel, its channels and which of them exist.

    Channel blocks run fastest: neighbouring programs read neighbouring addresses of the same rows.
    """
    blocks = tl.cdiv(C, BC)
    pid = tl.program_id(0)
    c0 = (pid % blocks) * BC
    c = c0 + tl.arange(0, BC)
    return (pid // blocks).to(tl.int64), c0, c, c < C


@triton.jit
def bounds(t, R, M):
    """Rows [lo, hi) of tile t: R of them, fewer or none at the end."""
    lo = tl.minimum(t * R, M)
    return lo, tl.minimum(lo + R, M)


@triton.jit
def load_rows(ptr, row, c, C, keep):
    """[BM, BC] float32 from the rows that start at ``row``; 0 where ``keep`` is false."""
    i = tl.arange(0, keep.shape[0])
    return tl.load(ptr + row * C + (i[:, None] * C + c[None, :]), mask=keep, other=0.0).to(tl.float32)


@triton.jit
def store_rows(ptr, row, c, C, keep, value):
    i = tl.arange(0, keep.shape[0])
    tl.store(ptr + row * C + (i[:, None] * C + c[None, :]), value, mask=keep)


@triton.jit
def passes(v):
    """Where the ReLU lets the gradient pass: a NaN does, as in PyTorch."""
    return ~(v <= 0)


@triton.jit
def relu(v):
    """max(v, 0) that keeps a NaN (the hardware's max would drop it)."""
    return tl.where(v <= 0, 0.0, v).to(v.dtype)


@triton.jit
def load_stat(stat_ptr, C, c, in_c):
    """Mean, scale and bias of the tile's channels, each [1, BC]. What is not used is not loaded."""
    mean = tl.load(stat_ptr + c, mask=in_c, other=0.0)[None, :]
    scale = tl.load(stat_ptr + 3 * C + c, mask=in_c, other=0.0)[None, :]
    bias = tl.load(stat_ptr + 4 * C + c, mask=in_c, other=0.0)[None, :]
    return mean, scale, bias


@triton.jit
def normalise(x, mean, scale, bias):
    """BN of a tile. One fused multiply-add, so that a recomputed mask sees the very value of the forward pass."""
    return tl.fma(x - mean, tl.broadcast_to(scale, x.shape), tl.broadcast_to(bias, x.shape))


@triton.jit
def store_mask(ptr, row, c0, C, rows_left, passed):
    """Packs ``passed`` [BM, BC] into the bytes of rows ``row ...``; bits past C must be false already."""
    BM: tl.constexpr = passed.shape[0]
    BB: tl.constexpr = passed.shape[1] // 8
    bits = tl.reshape(passed.to(tl.int32), [BM, BB, 8]) << tl.arange(0, 8)[None, None, :]
    stride = (C + 7) // 8
    i = tl.arange(0, BM)
    b = c0 // 8 + tl.arange(0, BB)
    keep = (i < rows_left)[:, None] & (b < stride)[None, :]
    tl.store(ptr + row * stride + (i[:, None] * stride + b[None, :]), tl.sum(bits, axis=2).to(tl.uint8), mask=keep)


@triton.jit
def load_mask(ptr, row, c0, C, rows_left, BM: tl.constexpr, BC: tl.constexpr):
    """[BM, BC] booleans from the mask bytes of rows ``row ...``; false outside."""
    BB: tl.constexpr = BC // 8
    stride = (C + 7) // 8
    i = tl.arange(0, BM)
    b = c0 // 8 + tl.arange(0, BB)
    keep = (i < rows_left)[:, None] & (b < stride)[None, :]
    byte = tl.load(ptr + row * stride + (i[:, None] * stride + b[None, :]), mask=keep, other=0).to(tl.int32)
    bits = (byte[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
    return tl.reshape(bits, [BM, BC]) != 0
