"""add_relu: out = relu(x + residual) over n elements in storage order, and its backward.

Mask: uint8 [ceil(n/8)], bit j of byte i belongs to element 8*i + j.
"""

import triton
import triton.language as tl

from . import configs
from .tile import channels, passes, relu


@triton.jit(do_not_specialize=["n"])
def _add_relu_fwd_kernel(
    x_ptr, residual_ptr, n, out_ptr, mask_ptr, ALIGNED: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr
):
    n = channels(n, ALIGNED)
    BLOCK: tl.constexpr = BM * BC
    start = tl.program_id(0).to(tl.int64) * BLOCK
    i = tl.arange(0, BLOCK)
    keep = i < n - start
    v = tl.load(x_ptr + start + i, mask=keep, other=0.0).to(tl.float32)
    v += tl.load(residual_ptr + start + i, mask=keep, other=0.0).to(tl.float32)
    v = v.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + start + i, relu(v), mask=keep)
    if mask_ptr is not None:
        bits = tl.reshape((passes(v) & keep).to(tl.int32), [BLOCK // 8, 8]) << tl.arange(0, 8)[None, :]
        b = tl.arange(0, BLOCK // 8)
        tl.store(mask_ptr + start // 8 + b, tl.sum(bits, axis=1).to(tl.uint8), mask=b * 8 < n - start)


@triton.jit(do_not_specialize=["n"])
def _add_relu_bwd_kernel(grad_ptr, mask_ptr, n, dx_ptr, ALIGNED: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr):
    n = channels(n, ALIGNED)
    BLOCK: tl.constexpr = BM * BC
    start = tl.program_id(0).to(tl.int64) * BLOCK
    i = tl.arange(0, BLOCK)
    keep = i < n - start
    b = tl.arange(0, BLOCK // 8)
    byte = tl.load(mask_ptr + start // 8 + b, mask=b * 8 < n - start, other=0).to(tl.int32)
    passed = tl.reshape((byte[:, None] >> tl.arange(0, 8)[None, :]) & 1, [BLOCK]) != 0
    g = tl.load(grad_ptr + start + i, mask=keep, other=0.0)
    tl.store(dx_ptr + start + i, tl.where(passed, g, 0.0).to(g.dtype), mask=keep)


def add_relu_fwd(x, residual, n, out, mask):
    if n == 0:
        return
    tile = configs.pick_flat("add_relu_fwd", x.element_size(), n)
    grid = (configs.blocks(n, tile.BM * tile.BC),)
    _add_relu_fwd_kernel[grid](x, residual, n, out, mask, ALIGNED=n % 8 == 0, **tile.launch())


def add_relu_bwd(grad, mask, n, dx):
    if n == 0:
        return
    tile = configs.pick_flat("add_relu_bwd", grad.element_size(), n)
    grid = (configs.blocks(n, tile.BM * tile.BC),)
    _add_relu_bwd_kernel[grid](grad, mask, n, dx, ALIGNED=n % 8 == 0, **tile.launch())
