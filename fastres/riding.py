"""Convolutions with what rides along: our kernel where it has won its place, else PyTorch's call and nothing riding.

Each function says what was done beside the convolution; the caller does the rest in passes of its own. The choice by
shape is `fastres.tuning`'s; the separate passes are always a candidate there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastres import convolution as library
from fastres import dispatch, tuning
from fastres.problem import ConvRequest, Geometry, problem_of

_CL = torch.channels_last
_STATS, _ACT, _ACT_Y = ("stats",), ("act", "reduce"), ("act", "reduce", "y")


#: (kind, hooks, shapes, geometry, dtype, device, forced backend) -> what `_decide` found, under `_generation`.
_known: dict[tuple, tuple | None] = {}
_generation = -1


def _choice(kind: str, hooks: tuple, x_shape, w: Tensor, g: Geometry, like: Tensor, *operands: Tensor):
    """(module, request, config) of our own kernel, or None where the library's call serves."""
    if like.device.type != "cuda" and not tuning.interpreting():
        return None
    if tuning.generation != _generation:
        _forget()
    key = (kind, hooks, x_shape, w.shape, g, like.dtype, like.get_device(), dispatch.forced())
    found = _known[key] if key in _known else _decide(key)
    if found is None or any(t.data_ptr() % 16 for t in (like, w, *operands)):
        return None
    return found


def _forget() -> None:
    global _generation
    _known.clear()
    _generation = tuning.generation


def _decide(key: tuple):
    kind, hooks, x_shape, w_shape, g, dtype, device, _ = key
    if dtype not in (torch.float32, torch.bfloat16, torch.float16) or 0 in x_shape or 0 in w_shape:
        return None
    request = ConvRequest(kind, problem_of(x_shape, w_shape, g), str(dtype).removeprefix("torch."), hooks, device)
    choice = tuning.choose(request)
    found = None
    if choice.config is not None:
        module = tuning.module(choice)
        # Every operand is checked or allocated by the op that calls.
        found = (getattr(module, "trusted", module), request, choice.config)
    if tuning.settled(request):
        _known[key] = found
    return found


def _part(planes: int, module, request: ConvRequest, config, channels: int, like: Tensor) -> Tensor:
    T = module.conv_parts(request.kind, request.problem, config)
    return torch.empty((planes, T, channels), dtype=torch.float32, device=like.device)


def fprop(x: Tensor, w: Tensor, bias: Tensor | None, g: Geometry, stats: bool, again: bool = False):
    """(y, part): ``part [3, T, K]`` are the statistics of y, or None if they were not gathered on the way.

    ``again``: y is computed a second time, by the kernel that made it, without its statistics.
    """
    ours = _choice("fprop", _STATS, x.shape, w, g, x) if stats and bias is None else None
    if ours is None:
        return library.fprop(x, w, bias, g), None
    module, request, config = ours
    p = request.problem
    y = torch.empty((p.N, p.K, p.P, p.Q), dtype=x.dtype, device=x.device, memory_format=_CL)
    part = None if again else _part(3, module, request, config, p.K, x)
    module.conv_fprop(x, w.contiguous(memory_format=_CL), g, y, part=part, config=config)
    return y, part


def fprop_act(x: Tensor, w: Tensor, bias: Tensor | None, g: Geometry, residual: Tensor | None, relu: bool):
    """``act(conv(x) + bias + residual)`` in one kernel, or None where no kernel of ours serves. bias float32."""
    present = (("bias", bias is not None), ("relu", relu), ("residual", residual is not None))
    operands = () if residual is None else (residual,)
    ours = _choice("fprop", tuple(name for name, there in present if there), x.shape, w, g, x, *operands)
    if ours is None:
        return None
    module, request, config = ours
    p = request.problem
    y = torch.empty((p.N, p.K, p.P, p.Q), dtype=x.dtype, device=x.device, memory_format=_CL)
    module.conv_fprop(x, w.contiguous(memory_format=_CL), g, y, bias=bias, residual=residual, relu=relu, config=config)
    return y


def dgrad(dy: Tensor, x: Tensor, w: Tensor, g: Geometry) -> Tensor:
    """Gradient of the input; of ``x`` only shape and dtype matter."""
    ours = _choice("dgrad", (), x.shape, w, g, dy)
    if ours is None:
        return library.dgrad(dy, x, w, g)
    module, _, config = ours
    dx = torch.empty(x.shape, dtype=dy.dtype, device=dy.device, memory_format=_CL)
    module.conv_dgrad(dy, w.contiguous(memory_format=_CL), g, dx, config=config)
    return dx


def dgrad_act(dy: Tensor, w: Tensor, g: Geometry, act: Tensor, stat: Tensor, want_y: bool):
    """Gradient behind the ReLU of ``bn(act)``: (dx, part, y), or None where nothing rides along.

    ``part [2, T, C]``: the sums of the BN's backward; y: the activation ``relu(bn(act))`` if asked for.
    """
    ours = _choice("dgrad", _ACT_Y if want_y else _ACT, act.shape, w, g, dy, act)
    if ours is None:
        return None
    module, request, config = ours
    dx = torch.empty(act.shape, dtype=dy.dtype, device=dy.device, memory_format=_CL)
    y = torch.empty_like(dx) if want_y else None
    part = _part(2, module, request, config, request.problem.C, dy)
    module.conv_dgrad(dy, w.contiguous(memory_format=_CL), g, dx, act=act, stat=stat, part=part, y=y, config=config)
    return dx, part, y


def dgrad_add(dy: Tensor, w: Tensor, g: Geometry, grad: Tensor, mask: Tensor | None) -> Tensor | None:
    """Gradient of the input plus ``grad`` (where ``mask`` lets it pass); None where that needs a pass of its own."""
    ours = _choice("dgrad", ("add",) if mask is None else ("add", "mask"), grad.shape, w, g, dy, grad)
    if ours is None:
        return None
    module, _, config = ours
    dx = torch.empty(grad.shape, dtype=dy.dtype, device=dy.device, memory_format=_CL)
    module.conv_dgrad(dy, w.contiguous(memory_format=_CL), g, dx, add=grad, mask=mask, config=config)
    return dx


def wgrad(dy: Tensor, x: Tensor, w: Tensor, g: Geometry, with_bias: bool) -> tuple[Tensor, Tensor | None]:
    """Gradients of the weight, in its strides, and, if asked for, of the bias."""
    ours = None if with_bias else _choice("wgrad", (), x.shape, w, g, dy, x)
    if ours is None:
        return library.wgrad(dy, x, w, g, with_bias)
    module, _, config = ours
    dw = torch.empty_like(w, memory_format=_CL)
    module.conv_wgrad(dy, x, g, dw, config=config)
    return (dw if dw.stride() == w.stride() else torch.empty_like(w).copy_(dw)), None
