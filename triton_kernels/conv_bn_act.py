"""conv_bn_act: the epilogue of a convolution with folded BN, out = act(x + bias + residual)."""

import triton
import triton.language as tl

from . import configs
from .tile import channels, load_rows, place, relu, store_rows


@triton.jit(do_not_specialize=["M", "C"])
def _bias_act_kernel(
    x_ptr,
    M,
    C,
    bias_ptr,
    residual_ptr,
    out_ptr,
    RELU: tl.constexpr,
    ALIGNED: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
):
    C = channels(C, ALIGNED)
    block, _, c, in_c = place(C, BC)
    row = block * BM
    keep = (tl.arange(0, BM) < M - row)[:, None] & in_c[None, :]
    v = load_rows(x_ptr, row, c, C, keep)
    if bias_ptr is not None:
        v += tl.load(bias_ptr + c, mask=in_c, other=0.0)[None, :]
    if residual_ptr is not None:
        v += load_rows(residual_ptr, row, c, C, keep)
    v = v.to(out_ptr.dtype.element_ty)
    if RELU:
        v = relu(v)
    store_rows(out_ptr, row, c, C, keep, v)


def bias_act(x, M, C, bias, residual, relu, out):
    if M == 0:
        return
    tile = configs.pick("bias_act", x.element_size(), C)
    _bias_act_kernel[tile.grid(M, C)](
        x, M, C, bias, residual, out, RELU=bool(relu), ALIGNED=C % 8 == 0, **tile.launch()
    )
