"""Convolutions with what rides along: our kernel where it has won its place, else PyTorch's call and passes around it.

Operands come as `Activation` and `Gradient`: what a BN makes of a tensor, written out only when somebody needs it as a
tensor. A kernel with a prologue forms such an operand while it loads it. Whether that beats the pass which writes it,
for all who read it together, is `fastres.tuning`'s to say, as is which kernel serves; without a verdict the pass stays.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastres import convolution as library
from fastres import dispatch, tuning
from fastres.memory import new
from fastres.problem import ConvRequest, Geometry, OperandRequest, problem_of

_CL = torch.channels_last
_STATS, _ACT, _ACT_Y = ("stats",), ("act", "reduce"), ("act", "reduce", "y")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _matrix(t: Tensor) -> tuple[int, int]:
    N, C, H, W = t.shape
    return N * H * W, C


class Activation:
    """A convolution's input: ``tensor``, or ``relu(bn(raw))`` with ``stat`` of the BN, which `written` makes a tensor,
    in ``room`` (None: memory of its own)."""

    __slots__ = ("raw", "room", "stat", "tensor")

    def __init__(self, tensor=None, raw=None, stat=None, room=None):
        self.tensor, self.raw, self.stat, self.room = tensor, raw, stat, room

    def written(self, k) -> Tensor:
        if self.tensor is None:
            raw = self.raw
            out = new(raw, raw.shape) if self.room is None else self.room
            k.bn_apply(raw, *_matrix(raw), self.stat, None, None, True, out, None)
            self.tensor = out
        return self.tensor


class Gradient:
    """Gradient of a convolution's output: ``tensor``, or what the BN behind ``raw`` makes of ``dy`` by ``stat`` and
    ``coef``. ``relu``: dy lies in front of a ReLU, whose mask is ``bits``, or is recomputed from ``raw``. ``room``: as
    in `Activation`."""

    __slots__ = ("bits", "coef", "dy", "raw", "relu", "room", "stat", "tensor")

    def __init__(self, tensor=None, dy=None, raw=None, stat=None, coef=None, bits=None, relu=False, room=None):
        self.tensor, self.dy, self.raw, self.stat, self.coef = tensor, dy, raw, stat, coef
        self.bits, self.relu, self.room = bits if relu else None, relu, room

    @property
    def like(self) -> Tensor:
        return self.dy if self.tensor is None else self.tensor

    @property
    def loadable(self) -> bool:
        """Whether a kernel could form it while loading."""
        return self.tensor is None and (self.bits is not None or not self.relu)

    def written(self, k) -> Tensor:
        if self.tensor is None:
            dy, raw = self.dy, self.raw
            out = new(dy, dy.shape) if self.room is None else self.room
            k.bn_bwd_apply(dy, raw, *_matrix(dy), self.stat, self.coef, None, None, None, self.bits, self.relu, out,
                           None)  # fmt: skip
            self.tensor = out
        return self.tensor


# ---- who serves


#: (kind, hooks, shapes, geometry, dtype, device, forced backend) -> what `_decide` found, under `_generation`; the same
#: with the operands offered -> what `_taken` found.
_known: dict[tuple, tuple | None] = {}
_generation = -1


def _served(like: Tensor) -> bool:
    """Whether kernels of ours could serve at all; forgets what a tuning may have changed."""
    if like.device.type != "cuda" and not tuning.interpreting():
        return False
    if tuning.generation != _generation:
        _forget()
    return True


def _choice(kind: str, hooks: tuple, x_shape, w: Tensor, g: Geometry, like: Tensor, *operands: Tensor):
    """(module, request, config) of our own kernel, or None where the library's call serves."""
    if not _served(like):
        return None
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
    if dtype not in _DTYPES or 0 in x_shape or 0 in w_shape:
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


def _operands(kind: str, offered: tuple, hooks: tuple, x_shape, w: Tensor, g: Geometry, like: Tensor) -> tuple:
    """Which of the ``offered`` operands the kernels form while loading."""
    if not offered or like.dtype not in _DTYPES or 0 in x_shape or not _served(like):
        return ()
    key = (kind, offered, hooks, x_shape, w.shape, g, like.dtype, like.get_device(), dispatch.forced())
    if key in _known:
        return _known[key]
    dtype = str(like.dtype).removeprefix("torch.")
    request = OperandRequest(kind, problem_of(x_shape, w.shape, g), dtype, offered, hooks, like.get_device())
    taken, settled = tuning.operands(request)
    if settled:
        _known[key] = taken
    return taken


def _part(planes: int, module, request: ConvRequest, config, channels: int, like: Tensor) -> Tensor:
    T = module.conv_parts(request.kind, request.problem, config)
    return torch.empty((planes, T, channels), dtype=torch.float32, device=like.device)


# ---- forward


def fprop(k, h: Activation, w: Tensor, bias, g: Geometry, stats: bool, again: bool = False, taken=None):
    """(y, part): ``part [3, T, K]`` are the statistics of y, or None if they were not gathered on the way.

    ``again``: y is computed a second time, by the kernel that made it, without its statistics. ``k``: the backend of
    the passes. ``taken``: operands that are formed while loading; None: what the tuning found.
    """
    hooks, ours, stat = _STATS if stats else (), None, None
    if taken is None and bias is None and h.tensor is None:
        taken = _operands("forward", ("prologue",), hooks, h.raw.shape, w, g, h.raw)
    if taken and h.tensor is None:
        ours, x, stat = _choice("fprop", ("prologue", *hooks), h.raw.shape, w, g, h.raw), h.raw, h.stat
    if ours is None:
        x, stat = h.written(k), None
        ours = _choice("fprop", _STATS, x.shape, w, g, x) if stats and bias is None else None
    if ours is None:
        return library.fprop(x, w, bias, g), None
    module, request, config = ours
    p = request.problem
    y = torch.empty((p.N, p.K, p.P, p.Q), dtype=x.dtype, device=x.device, memory_format=_CL)
    part = None if again or not stats else _part(3, module, request, config, p.K, x)
    module.conv_fprop(x, w.contiguous(memory_format=_CL), g, y, stat=stat, part=part, config=config)
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


# ---- backward


def _on_gradient(k, kind: str, hooks: tuple, x_shape, w, g: Geometry, dy: Gradient, load: bool, *operands):
    """(own kernel or None, the tensor it takes for dy, what else it takes); ``load``: dy is formed by it."""
    if load and dy.loadable:
        pre = ("pre",) if dy.bits is None else ("bits", "pre")
        ours = _choice(kind, tuple(sorted((*hooks, *pre))), x_shape, w, g, dy.dy, dy.raw, *operands)
        if ours is not None:
            return ours, dy.dy, {"pre": (dy.raw, dy.stat, dy.coef), "bits": dy.bits}
    t = dy.written(k)
    return _choice(kind, hooks, x_shape, w, g, t, *operands), t, {}


def dgrad(k, dy: Gradient, x: Tensor, w: Tensor, g: Geometry, load: bool = False) -> Tensor:
    """Gradient of the input; of ``x`` only shape and dtype matter."""
    ours, t, more = _on_gradient(k, "dgrad", (), x.shape, w, g, dy, load)
    if ours is None:
        return library.dgrad(t, x, w, g)
    module, _, config = ours
    dx = torch.empty(x.shape, dtype=t.dtype, device=t.device, memory_format=_CL)
    module.conv_dgrad(t, w.contiguous(memory_format=_CL), g, dx, config=config, **more)
    return dx


def dgrad_act(k, dy: Gradient, h: Activation, w: Tensor, g: Geometry, want_y: bool, load: bool = False, whole=None):
    """Gradient towards the BN + ReLU that made ``h``: (dx, part, behind).

    ``part [2, T, C]``: the sums of that BN's backward. ``behind``: dx lies behind the ReLU already. ``want_y``: h is
    written on the way. ``whole(dx, y)``: the whole of that BN's backward in place of the sums, where it returns True;
    part is None then, and dx the gradient of the convolution before.
    """
    act, stat = h.raw, h.stat
    hooks = _ACT_Y if want_y else _ACT
    ours, t, more = _on_gradient(k, "dgrad", hooks, act.shape, w, g, dy, load, act)
    y = new(act, act.shape) if want_y else None
    if ours is not None:
        module, request, config = ours
        dx = torch.empty(act.shape, dtype=t.dtype, device=t.device, memory_format=_CL)
        part = _part(2, module, request, config, request.problem.C, t)
        module.conv_dgrad(t, w.contiguous(memory_format=_CL), g, dx, act=act, stat=stat, part=part, y=y, config=config,
                          **more)  # fmt: skip
    else:
        dx = dgrad(k, dy, act, w, g)
        part = None
        if whole is None or not whole(dx, y):
            M, C = _matrix(dx)
            T = k.tiles(M, C)
            part = torch.empty((2, T, C), dtype=stat.dtype, device=dx.device)
            k.bn_bwd_reduce(dx, act, M, C, stat, None, None, None, True, T, part, y)
    if want_y:
        h.tensor = y
    return dx, part, ours is not None


def _joined(join) -> tuple:
    return () if join is None else ("add",) if join[1] is None else ("add", "mask")


def dgrad_add(k, dy: Gradient, w: Tensor, g: Geometry, grad: Tensor, mask: Tensor | None, load: bool = False) -> Tensor:
    """Gradient of the input plus ``grad`` (where ``mask`` lets it pass)."""
    ours, t, more = _on_gradient(k, "dgrad", _joined((grad, mask)), grad.shape, w, g, dy, load, grad)
    if ours is not None:
        module, _, config = ours
        dx = torch.empty(grad.shape, dtype=t.dtype, device=t.device, memory_format=_CL)
        module.conv_dgrad(t, w.contiguous(memory_format=_CL), g, dx, add=grad, mask=mask, config=config, **more)
        return dx
    return _add(k, dgrad(k, dy, grad, w, g), grad, mask)


def _add(k, dx: Tensor, grad: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return dx.add_(grad)
    k.mask_add(dx, grad, mask, *_matrix(dx), dx)
    return dx


def wgrad(k, dy: Gradient, h: Activation, w: Tensor, g: Geometry, with_bias: bool, taken: tuple = ()):
    """Gradients of the weight, in its strides, and, if asked for, of the bias. ``taken``: operands to form."""
    load = "pre" in taken
    ours = x = stat = None
    if not with_bias:
        if "prologue" in taken and h.tensor is None:
            x, stat = h.raw, h.stat
            ours, t, more = _on_gradient(k, "wgrad", ("prologue",), x.shape, w, g, dy, load, x)
        if ours is None:
            x, stat = h.written(k), None
            ours, t, more = _on_gradient(k, "wgrad", (), x.shape, w, g, dy, load, x)
    if ours is None:
        return library.wgrad(dy.written(k), h.written(k), w, g, with_bias)
    module, _, config = ours
    dw = torch.empty_like(w, memory_format=_CL)
    module.conv_wgrad(t, x, g, dw, stat=stat, config=config, **more)
    return (dw if dw.stride() == w.stride() else torch.empty_like(w).copy_(dw)), None


def _both_library(x: Tensor, w: Tensor, g: Geometry, dy: Tensor, join, with_bias: bool) -> bool:
    """Whether PyTorch's call serves dgrad and wgrad."""
    shape, add = x.shape, None
    if join is not None:
        add = _choice("dgrad", _joined(join), shape, w, g, dy, join[0])
    ours = add or _choice("dgrad", (), shape, w, g, dy) or (not with_bias and _choice("wgrad", (), shape, w, g, dy, x))
    return not ours


def backward(
    k, dy: Gradient, h: Activation, w: Tensor, g: Geometry, needs: tuple, join=None, taken: tuple | None = None,
    whole=None,
):  # fmt: skip
    """Both gradients of one convolution in a chain: (dx, part, behind, dw, db), None for what ``needs`` (dx, dw, db)
    does not ask for.

    Where a BN + ReLU made ``h``, dx is that of `dgrad_act`, with ``part`` and ``behind``; ``join``: the ``grad`` and
    ``mask`` of `dgrad_add`; ``whole``: that of `dgrad_act`. ``taken``: operands that are formed while loading; None:
    what the tuning found.
    """
    want_dx, want_dw, want_db = needs
    act = h.raw is not None
    if taken is None:
        taken = ()
        if want_dx and want_dw and not want_db:
            hooks = _ACT if act else _joined(join)
            if dy.loadable:
                offered = ("pre",) if h.tensor is not None else ("prologue", "pre")
                hooks = hooks if dy.bits is None else tuple(sorted((*hooks, "bits")))
            else:
                offered = () if h.tensor is not None else ("prologue",)
            taken = _operands("backward", offered, hooks, (h.raw if act else h.tensor).shape, w, g, dy.like)
    dx = part = dw = db = None
    behind, load = False, "pre" in taken
    if want_dx and want_dw and not act and not taken and _both_library(h.tensor, w, g, dy.like, join, want_db):
        dx, dw, db = library.both(dy.written(k), h.tensor, w, g, want_db)
        return (dx if join is None else _add(k, dx, *join)), part, behind, dw, db
    if want_dx and act:
        want_y = want_dw and h.tensor is None and "prologue" not in taken
        dx, part, behind = dgrad_act(k, dy, h, w, g, want_y, load, whole)
    elif want_dx and join is not None:
        dx = dgrad_add(k, dy, w, g, *join, load)
    elif want_dx:
        dx = dgrad(k, dy, h.tensor, w, g, load)
    if want_dw or want_db:
        if not want_dw and h.tensor is None:
            h = Activation(h.raw)  # of the bias alone: the values do not enter
        dw, db = wgrad(k, dy, h, w, g, want_db, taken)
    return dx, part, behind, dw, db
