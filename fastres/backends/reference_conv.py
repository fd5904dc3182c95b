"""Convolutions with what rides along, in plain PyTorch: the oracle of every convolution kernel of ours.

x ``[N, C, H, W]``, w ``[K, C/groups, R, S]``, y and dy ``[N, K, P, Q]``: channels_last, one dtype. ``geometry`` is
``((stride_h, stride_w), (pad_h, pad_w), (dilation_h, dilation_w), groups)``. ``stat``, ``part``, ``coef``, ``mask`` as
in ``csrc/launch.h``; how the rows fall into the T tiles of ``part`` is the kernel's own choice, a tile may have any
rows. Outputs are filled, nothing is returned.
"""

from __future__ import annotations

import torch

from fastres.backends import reference
from fastres.backends.reference import acc_dtype, rows


def _matrix(t):
    return t.shape[0] * t.shape[2] * t.shape[3], t.shape[1]


def _activation(x, stat):
    """``relu(bn(x))``, rounded as ``bn_apply`` rounds it; ``x`` itself without ``stat``."""
    if stat is None:
        return x
    out = torch.empty_like(x)
    reference.bn_apply(x, *_matrix(x), stat, None, None, True, out, None)
    return out


def _affine(dy, pre, bits):
    """The BN gradient's map ``coef0*g + coef1*(a - mean) + coef2`` of ``pre = (a, stat, coef)``, rounded; g is dy where
    the ``bits`` of a ReLU's mask let it pass."""
    if pre is None:
        return dy
    a, stat, coef = pre
    out = torch.empty_like(dy)
    reference.bn_bwd_apply(dy, a, *_matrix(dy), stat, coef, None, None, None, bits, bits is not None, out, None)
    return out


def conv_fprop(x, w, geometry, out, *, stat=None, bias=None, residual=None, relu=False, part=None):
    """out = act(conv(h, w) + bias + residual), rounded once; the ReLU looks at the rounded value.

    stat      acc [5, C]: h is relu(bn(x)) rounded to dtype, and padding is zero after it; None: h is x.
    bias      acc [K], or None. residual: [N, K, P, Q], or None.
    part      acc [3, T, K], or None: count, mean, M2 of the rounded out. Legal without residual and relu only.
    """
    stride, padding, dilation, groups = geometry
    acc = acc_dtype(x.dtype)
    h = _activation(x, stat).to(acc)
    v = torch.nn.functional.conv2d(h, w.to(acc), bias, stride, padding, dilation, groups)
    if residual is not None:
        v = v + residual.to(acc)
    v = v.to(out.dtype)
    out.copy_(torch.relu(v) if relu else v)
    if part is not None:
        reference.bn_stats(out, *_matrix(out), part.shape[1], part)


def conv_dgrad(
    dy, w, geometry, dx, *, pre=None, bits=None, add=None, mask=None, act=None, stat=None, part=None, y=None
):
    """dx = gradient of the input, rounded once.

    pre       (a, stat_a, coef): dy is the BN-backward map of dy first (see ``_affine``), rounded to dtype.
    bits      uint8 [N*P*Q, ceil(K/8)], or None: the map's dy is that behind this ReLU mask. Needs pre.
    add       [N, C, H, W], or None: joins the gradient before rounding, where ``mask`` (uint8 [M, ceil(C/8)]) lets it
              pass; without ``mask`` everywhere.
    act, stat [N, C, H, W] and acc [5, C], or None: dx is kept where the ReLU of bn(act) passes, zero elsewhere.
    part      acc [2, T, C], or None: sums of dx and of dx*(act - mean) over the rounded dx. Needs act.
    y         [N, C, H, W], or None: receives relu(bn(act)).
    """
    stride, padding, dilation, groups = geometry
    acc = acc_dtype(dy.dtype)
    g = _affine(dy, pre, bits).to(acc)
    v = torch.nn.grad.conv2d_input(dx.shape, w.to(acc), g, stride, padding, dilation, groups)
    M, C = _matrix(dx)
    if add is not None:
        joined = add.to(acc)
        if mask is not None:
            zero = torch.zeros((), dtype=acc, device=dx.device)
            joined = torch.where(_bits(mask, dx), joined, zero)
        v = v + joined
    dx.copy_(v)
    if act is None:
        return
    T = 1 if part is None else part.shape[1]
    sums = torch.empty((2, T, C), dtype=stat.dtype, device=dx.device) if part is None else part
    masked = reference._masked(dx, act, stat, None, True, M, C)
    rows(dx, M, C).copy_(masked)
    reference.bn_bwd_reduce(dx, act, M, C, stat, None, None, None, False, T, sums, None)
    if y is not None:
        reference.bn_apply(act, M, C, stat, None, None, True, y, None)


def _bits(mask, like):
    M, C = _matrix(like)
    passed = reference._unpack(mask, M, C)
    N, _, H, W = like.shape
    return passed.reshape(N, H, W, C).permute(0, 3, 1, 2)


def conv_wgrad(dy, x, geometry, dw, *, pre=None, bits=None, stat=None):
    """dw ``[K, C/groups, R, S]`` channels_last, in the dtype of dy or in the accumulator type; rounded once.

    pre, bits as in `conv_dgrad`. stat: as in `conv_fprop`, for x.
    """
    stride, padding, dilation, groups = geometry
    acc = acc_dtype(dy.dtype)
    g, h = _affine(dy, pre, bits).to(acc), _activation(x, stat).to(acc)
    dw.copy_(torch.nn.grad.conv2d_weight(h, dw.shape, g, stride, padding, dilation, groups))
