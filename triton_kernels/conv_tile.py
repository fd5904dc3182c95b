"""What the convolutions share: where a patch of TN images x TH rows x TW columns lies, which of its pixels exist, the
bits of a ReLU mask, the descriptor of an NHWC tensor, scratch memory."""

import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor


@triton.jit
def corner(t, HT, WT, TN: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr):
    """First image, row and column of patch t; columns run fastest, HT x WT patches cover an image."""
    return t // (WT * HT) * TN, (t // WT) % HT * TH, (t % WT) * TW


@triton.jit
def inside(n0, h0, w0, N, H, W, TN: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr):
    """[TN*TH*TW]: which pixels of a patch lie within the N images of H x W."""
    i = tl.arange(0, TN * TH * TW)
    h = h0 + i // TW % TH
    w = w0 + i % TW
    return (n0 + i // (TH * TW) < N) & (h >= 0) & (h < H) & (w >= 0) & (w < W)


@triton.jit
def pixels(n0, h0, w0, N, H, W, TN: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr):
    """How many those are, for a patch that begins inside."""
    return tl.minimum(TN, N - n0) * tl.minimum(TH, H - h0) * tl.minimum(TW, W - w0)


@triton.jit
def mask_bits(mask_ptr, pixel, k, m_ok, in_n, C, PACKED: tl.constexpr):
    """[BM, BN] booleans: bit k[j] of mask row pixel[i], false where ``m_ok`` or ``in_n`` is.

    PACKED: ``k`` is whole bytes, eight neighbouring channels each, which are loaded once and not eight times.
    """
    BM: tl.constexpr = pixel.shape[0]
    BN: tl.constexpr = k.shape[0]
    stride = (C + 7) // 8
    if PACKED:
        b = tl.min(tl.reshape(k, [BN // 8, 8]), axis=1) // 8
        in_b = tl.max(tl.reshape(in_n.to(tl.int32), [BN // 8, 8]), axis=1) != 0
        keep = m_ok[:, None] & in_b[None, :]
        byte = tl.load(mask_ptr + (pixel[:, None] * stride + b[None, :]), mask=keep, other=0).to(tl.int32)
        bits = tl.reshape((byte[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1, [BM, BN])
    else:
        keep = m_ok[:, None] & in_n[None, :]
        byte = tl.load(mask_ptr + (pixel[:, None] * stride + (k // 8)[None, :]), mask=keep, other=0).to(tl.int32)
        bits = (byte >> (k % 8)[None, :]) & 1
    return bits != 0


def nhwc(t, shape, block):
    """Descriptor of the memory of ``t`` as [N, H, W, C]."""
    N, H, W, C = shape
    return TensorDescriptor(t, [N, H, W, C], [H * W * C, W * C, C, 1], list(block))


def float32(like, shape):
    """A float32 buffer on the device of ``like``, without importing torch."""
    return like.new_empty(0).float().new_empty(shape)
