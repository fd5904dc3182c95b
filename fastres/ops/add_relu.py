"""add_relu: ``out = max(x + residual, 0)``, the tail of every residual block.

Forward rounds the sum to the dtype of ``x`` once and keeps one bit an element: whether the gradient passes,
``!(sum <= 0)`` as in PyTorch. Backward: ``dx = dresidual = grad where the bit is set``. Elementwise, so any dense
layout is served in storage order; both inputs must have one dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastres import dispatch
from fastres.library import register
from fastres.ops.bn import launcher, nothing, saved
from fastres.ops.params import check_activation, check_like


def add_relu_ref(x: Tensor, residual: Tensor, *, upcast: bool = False) -> Tensor:
    """``relu(x + residual)`` in plain PyTorch; ``upcast`` computes in float64 (the oracle)."""
    if upcast:
        x, residual = x.double(), residual.double()
    return torch.relu(x + residual)


def _same_storage_order(t: Tensor, like: Tensor) -> Tensor:
    return t if t.stride() == like.stride() else torch.empty_like(like).copy_(t)


def _bits(x: Tensor) -> Tensor:
    return torch.empty((x.numel() + 7) // 8, dtype=torch.uint8, device=x.device)


def _fwd(x: Tensor, residual: Tensor, save_mask: bool, backend: str):
    k = launcher("add_relu", x, None, backend)
    check_like(residual, "residual", x)
    out = torch.empty_like(x)  # the strides of x if it is dense, else dense in the same order
    x, residual = _same_storage_order(x, out), _same_storage_order(residual, out)
    mask = _bits(x) if save_mask else None
    k.add_relu_fwd(x, residual, x.numel(), out, mask)
    return out, nothing(x, torch.uint8) if mask is None else mask


def _fwd_fake(x, residual, save_mask, backend):
    return torch.empty_like(x), _bits(x) if save_mask else nothing(x, torch.uint8)


def _bwd(grad: Tensor, mask: Tensor, stride: list[int], backend: str) -> Tensor:
    k = launcher("add_relu", grad, None, backend)
    mask = saved(mask, "mask", grad, torch.uint8)
    if mask.numel() != (grad.numel() + 7) // 8:
        raise ValueError(
            f"mask: got {mask.numel()} bytes in backward, expected a bit for each of {grad.numel()} elements"
        )
    dx = torch.empty_strided(grad.shape, stride, dtype=grad.dtype, device=grad.device)
    k.add_relu_bwd(_same_storage_order(grad, dx), mask, grad.numel(), dx)
    return dx


def _bwd_fake(grad, mask, stride, backend):
    return torch.empty_strided(grad.shape, stride, dtype=grad.dtype, device=grad.device)


fwd_op = register(
    "add_relu_fwd(Tensor x, Tensor residual, bool save_mask, str backend) -> (Tensor, Tensor)", _fwd, _fwd_fake
)
bwd_op = register("add_relu_bwd(Tensor grad, Tensor mask, SymInt[] stride, str backend) -> Tensor", _bwd, _bwd_fake)


class _AddReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, backend):
        out, mask = fwd_op(x, residual, True, backend)
        ctx.save_for_backward(mask)
        ctx.backend, ctx.stride = backend, out.stride()
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (mask,) = ctx.saved_tensors
        dx = bwd_op(grad, mask, ctx.stride, ctx.backend)
        return dx if ctx.needs_input_grad[0] else None, dx if ctx.needs_input_grad[1] else None, None


def add_relu(x: Tensor, residual: Tensor) -> Tensor:
    """``relu(x + residual)`` in one pass over memory.

    Args:
        x: float32, bfloat16, float16 or float64, any shape and dense layout.
        residual: of the same shape, dtype and device.

    Returns: a tensor of the shape, dtype and layout of ``x``. Differentiable once; saves one bit an element.

    Raises: TypeError for a non-tensor or a wrong dtype, ValueError for a wrong shape, device or backend.

    Equivalent to ``torch.relu(x + residual)``. Saved bit mask after S. Rota Bulo et al.'s observation that
    ReLU's backward needs the sign only ("In-Place Activated BatchNorm", CVPR 2018).
    """
    check_activation(x, "x", like=x)
    check_activation(residual, "residual", like=x)
    backend = dispatch.forced()
    if torch.is_grad_enabled() and (x.requires_grad or residual.requires_grad):
        return _AddReLU.apply(x, residual, backend)
    return fwd_op(x, residual, False, backend)[0]
