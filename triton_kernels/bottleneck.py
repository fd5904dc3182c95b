"""bottleneck and basic_block: out = a + g, the residual branch's masked gradient joining the main one."""

import triton
import triton.language as tl

from . import configs
from .tile import channels, load_mask, load_rows, place, store_rows


@triton.jit(do_not_specialize=["M", "C"])
def _mask_add_kernel(
    a_ptr, grad_ptr, mask_ptr, M, C, out_ptr, ALIGNED: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr
):
    C = channels(C, ALIGNED)
    block, c0, c, in_c = place(C, BC)
    row = block * BM
    keep = (tl.arange(0, BM) < M - row)[:, None] & in_c[None, :]
    passed = load_mask(mask_ptr, row, c0, C, M - row, BM, BC)
    g = tl.where(passed, load_rows(grad_ptr, row, c, C, keep), 0.0)
    v = load_rows(a_ptr, row, c, C, keep) + g
    store_rows(out_ptr, row, c, C, keep, v.to(out_ptr.dtype.element_ty))


def mask_add(a, grad, mask, M, C, out):
    if M == 0:
        return
    tile = configs.pick("mask_add", a.element_size(), C)
    _mask_add_kernel[tile.grid(M, C)](a, grad, mask, M, C, out, ALIGNED=C % 8 == 0, **tile.launch())
