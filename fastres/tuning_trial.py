"""A convolution request with data of its own: what a kernel, PyTorch and float64 make of it, and how long they take.

Nothing that lies beside a tensor may be read or written: every buffer has a rim of NaN on both sides, and outputs are
NaN until something is written to them. Activations under a ReLU are kept clear of zero, so that masks have one answer.
"""

from __future__ import annotations

import contextlib
import math
import statistics

import torch

from fastres import convolution as library
from fastres import dispatch
from fastres.backends import reference_conv
from fastres.backends.reference import _pack, acc_dtype
from fastres.problem import ConvProblem, ConvRequest

#: Elements of a rim; a multiple of any alignment a kernel asks for.
_RIM = 4096
#: Elements that are looked at together in float64.
_CHUNK = 2**24


class Miss(Exception):
    """What a kernel did wrong, in a sentence."""


def device_of(request: ConvRequest) -> torch.device:
    return torch.device("cpu") if request.device < 0 else torch.device("cuda", request.device)


@contextlib.contextmanager
def quiet(request: ConvRequest):
    """No autograd, no autocast, and the request's device the current one."""
    device = device_of(request)
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            yield


class Trial:
    """Inputs of ``request``, fresh random ones of a private generator. ``values``: "normal" or "integers"."""

    def __init__(self, request: ConvRequest, problem: ConvProblem | None = None, values: str = "normal"):
        self.request, self.problem, self.whole = request, problem or request.problem, values == "integers"
        self.device, self.dtype = device_of(request), getattr(torch, request.dtype)
        self.acc = acc_dtype(self.dtype)
        self._random = torch.Generator(self.device).manual_seed(0)
        p = self.problem
        self.x_shape, self.y_shape = (p.N, p.C, p.H, p.W), (p.N, p.K, p.P, p.Q)
        self.w_shape = (p.K, p.C // p.groups, p.R, p.S)
        self.hooks: dict[str, object] = {}
        self.main = getattr(self, f"_{request.kind}")(set(request.hooks))

    @property
    def terms(self) -> int:
        """Products summed up in an element of the output."""
        p = self.problem
        channels = {"fprop": p.C // p.groups, "dgrad": p.K // p.groups}
        kind = self.request.kind
        return p.N * p.P * p.Q if kind == "wgrad" else channels[kind] * p.R * p.S

    # ---- data

    def _fprop(self, hooks: set):
        p = self.problem
        if "prologue" in hooks:
            self.hooks["stat"] = self._stat(p.C)
        if "bias" in hooks:
            self.hooks["bias"] = self._fill((p.K,), 2, dtype=self.acc)
        if "residual" in hooks:
            self.hooks["residual"] = self._fill(self.y_shape, 2)
        if "relu" in hooks:
            self.hooks["relu"] = True
        return self._fill(self.x_shape, 2, shift=0.5), self._weight()

    def _dgrad(self, hooks: set):
        p = self.problem
        self._gradient(hooks)
        if "add" in hooks:
            self.hooks["add"] = self._fill(self.x_shape, 2)
        if "mask" in hooks:
            self.hooks["mask"] = self._mask(p.N * p.H * p.W, p.C)
        if "act" in hooks:
            self.hooks["stat"] = self._stat(p.C)
            self.hooks["act"] = self._fill(self.x_shape, 2)
            self._clear_of_zero()
        return self._fill(self.y_shape, 2), self._weight()

    def _wgrad(self, hooks: set):
        self._gradient(hooks)
        if "prologue" in hooks:
            self.hooks["stat"] = self._stat(self.problem.C)
        return self._fill(self.y_shape, 2), self._fill(self.x_shape, 2, shift=0.5)

    def _weight(self):
        return self._fill(self.w_shape, 1, scale=math.sqrt(2 / math.prod(self.w_shape[1:])))

    def _buffer(self, shape, dtype):
        """(tensor, the storage with its rims): NaN or 0xA5, four dimensions in channels_last."""
        n = math.prod(shape)
        poison = float("nan") if dtype.is_floating_point else 0xA5
        flat = torch.full((n + 2 * _RIM,), poison, dtype=dtype, device=self.device)
        body = flat[_RIM : _RIM + n]
        if len(shape) != 4:
            return body.view(shape), flat
        N, C, H, W = shape
        return body.view(N, H, W, C).permute(0, 3, 1, 2), flat

    def _fill(self, shape, bound: int, *, scale: float = 1.0, shift: float = 0.0, dtype=None):
        """Integers of at most ``bound``, or normal values, made in place: nothing of full size in between."""
        t = self._buffer(shape, dtype or self.dtype)[0]
        return self._numbers(t, bound, scale, shift)

    def _numbers(self, t, bound: int, scale: float = 1.0, shift: float = 0.0):
        if self.whole:
            return t.random_(-bound, bound + 1, generator=self._random)
        return t.normal_(shift, scale, generator=self._random)

    def _stat(self, C: int):
        mean, var, invstd, scale, bias = stat = self._buffer((5, C), self.acc)[0]
        if self.whole:
            var.fill_(1.0)
            invstd.fill_(1.0)
            scale.random_(1, 3, generator=self._random)
            scale[::4] *= -1
        else:
            var.normal_(generator=self._random).square_().add_(0.5)
            torch.rsqrt(var + 1e-5, out=invstd)
            scale.uniform_(0.5, 1.5, generator=self._random).mul_(invstd)
            scale[::4] *= -1
        self._numbers(mean, 1, 0.5, 0.5)
        self._numbers(bias, 1, 0.5)
        return stat

    def _mask(self, M: int, C: int):
        mask = self._buffer((M, -(-C // 8)), torch.uint8)[0]
        _pack(torch.rand((M, C), device=self.device, generator=self._random) < 0.5, mask)
        return mask

    def _gradient(self, hooks: set) -> None:
        if "pre" in hooks:
            self.hooks["pre"] = self._pre()
        if "bits" in hooks:
            p = self.problem
            self.hooks["bits"] = self._mask(p.N * p.P * p.Q, p.K)

    def _pre(self):
        K = self.problem.K
        a, stat, coef = self._fill(self.y_shape, 2), self._stat(K), self._buffer((3, K), self.acc)[0]
        if self.whole:
            coef[0].random_(1, 3, generator=self._random)
            self._numbers(coef[1:], 1)
            if self.request.kind == "wgrad":  # sums over all pixels stay small where the mean is zero
                stat[0], coef[2] = 0, 0
        else:
            coef[0].uniform_(0.5, 1.5, generator=self._random)
            coef[1:].normal_(0, 0.1, generator=self._random)
        return a, stat, coef

    def images(self, *tensors):
        """The same few images of each tensor at a time: temporaries in float64 stay small."""
        size = max(1, _CHUNK // max(1, math.prod(tensors[0].shape[1:])))
        return zip(*(t.split(size) for t in tensors), strict=True)

    def _activation(self, act):
        mean, _, _, scale, bias = (v.double()[:, None, None] for v in self.hooks["stat"])
        return (act.double() - mean) * scale + bias

    def _clear_of_zero(self) -> None:
        if self.whole:
            return  # integers meet zero exactly, in every kernel
        for (act,) in self.images(self.hooks["act"]):
            act.add_((self._activation(act).abs() < 2**-5).to(act.dtype), alpha=0.5)

    # ---- answers

    def outputs(self, tiles: int = 1, dtype: torch.dtype | None = None) -> dict:
        """(tensor, storage) by name, poisoned. ``dtype``: of dw, where it is not the activations'."""
        hooks, p = self.request.hooks, self.problem
        if self.request.kind == "fprop":
            shapes = {"out": self.y_shape, **({"part": (3, tiles, p.K)} if "stats" in hooks else {})}
        elif self.request.kind == "dgrad":
            shapes = {"dx": self.x_shape, **({"part": (2, tiles, p.C)} if "reduce" in hooks else {})}
            shapes |= {"y": self.x_shape} if "y" in hooks else {}
        else:
            shapes = {"dw": self.w_shape}
        wanted = {"part": self.acc, "dw": dtype or self.dtype}
        return {name: self._buffer(shape, wanted.get(name, self.dtype)) for name, shape in shapes.items()}

    def launch(self, module, config, outputs: dict) -> None:
        """Run a kernel; ``module`` offers what ``reference_conv.py`` does, with ``config``."""
        views = {name: view for name, (view, _) in outputs.items()}
        main = views.pop({"fprop": "out", "dgrad": "dx", "wgrad": "dw"}[self.request.kind])
        function = getattr(module, f"conv_{self.request.kind}")
        function(*self.main, self.problem.geometry, main, **self.hooks, **views, config=config)

    def run(self, module, config, dtype: torch.dtype | None = None, part: bool = True) -> dict:
        """Outputs of a kernel by name, without ``part`` if so wanted. Raises `Miss` if it wrote beside them."""
        tiles = module.conv_parts(self.request.kind, self.problem, config) if self.has_part else 1
        outputs = self.outputs(tiles, dtype)
        if not part:
            outputs.pop("part", None)
        self.launch(module, config, outputs)
        for name, (_, flat) in outputs.items():
            if not (flat[:_RIM].isnan().all() and flat[-_RIM:].isnan().all()):
                raise Miss(f"writes beside {name}")
        return {name: view for name, (view, _) in outputs.items()}

    @property
    def has_part(self) -> bool:
        return "stats" in self.request.hooks or "reduce" in self.request.hooks

    def truth(self) -> dict:
        """Outputs in float64, ``part`` left out."""

        def wide(value):
            if isinstance(value, tuple):
                return tuple(map(wide, value))
            return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value

        found = {}
        for name, (view, _) in self.outputs().items():
            if name != "part":
                found[name] = torch.empty_like(view, dtype=torch.float64)
        rest = {name: t for name, t in found.items() if name == "y"}
        main = next(t for name, t in found.items() if name != "y")
        hooks = {name: wide(value) for name, value in self.hooks.items()}
        function = getattr(reference_conv, f"conv_{self.request.kind}")
        function(*map(wide, self.main), self.problem.geometry, main, **hooks, **rest)
        return found

    def library(self, whole: bool = True) -> dict:
        """Outputs of PyTorch's convolution and of the passes that do the hooks' work, ``part`` among them.

        Without ``whole`` dx stays in front of the ReLU: the pass that follows it in training takes the mask along.
        """
        op = "conv_bn_act" if self.request.kind == "fprop" else "bottleneck"
        k = dispatch.choose(dispatch.Request(op, self.device, self.dtype, self.problem.K))
        return getattr(self, f"_library_{self.request.kind}")(k, whole)

    def _new(self, shape, dtype=None):
        format = torch.channels_last if len(shape) == 4 else torch.contiguous_format
        return torch.empty(shape, dtype=dtype or self.dtype, device=self.device, memory_format=format)

    def _part(self, k, planes: int, t):
        M, C = matrix(t)
        T = k.tiles(M, C)
        return M, C, T, self._new((planes, T, C), self.acc)

    def _prologue(self, k, x):
        if "stat" not in self.hooks:
            return x
        h = self._new(x.shape)
        k.bn_apply(x, *matrix(x), self.hooks["stat"], None, None, True, h, None)
        return h

    def _affine(self, k, dy):
        if "pre" not in self.hooks:
            return dy
        a, stat, coef = self.hooks["pre"]
        g = self._new(dy.shape)
        bits = self.hooks.get("bits")
        k.bn_bwd_apply(dy, a, *matrix(dy), stat, coef, None, None, None, bits, bits is not None, g, None)
        return g

    def _library_fprop(self, k, whole):
        x, w = self.main
        out = library.fprop(self._prologue(k, x), w, None, self.problem.geometry)
        after = [self.hooks.get(name) for name in ("bias", "residual")] + [bool(self.hooks.get("relu"))]
        if after != [None, None, False]:
            k.bias_act(out, *matrix(out), *after, out)
        if "stats" not in self.request.hooks:
            return {"out": out}
        M, C, T, part = self._part(k, 3, out)
        k.bn_stats(out, M, C, T, part)
        return {"out": out, "part": part}

    def _library_dgrad(self, k, whole):
        dy, w = self.main
        act, add, mask = (self.hooks.get(name) for name in ("act", "add", "mask"))
        like = self._new(self.x_shape) if act is None else act
        dx = library.dgrad(self._affine(k, dy), like, w, self.problem.geometry)
        M, C = matrix(dx)
        if mask is not None:
            k.mask_add(dx, add, mask, M, C, dx)
        elif add is not None:
            dx.add_(add)
        found = {"dx": dx}
        if act is None:
            return found
        stat = self.hooks["stat"]
        y = self._new(self.x_shape) if "y" in self.request.hooks else None
        if "reduce" in self.request.hooks:
            _, _, T, found["part"] = self._part(k, 2, dx)
            k.bn_bwd_reduce(dx, act, M, C, stat, None, None, None, True, T, found["part"], y)
        elif y is not None:
            k.bn_apply(act, M, C, stat, None, None, True, y, None)
        if y is not None:
            found["y"] = y
        if whole:
            for d, a in self.images(dx, act):
                d.masked_fill_(self._activation(a) <= 0, 0.0)
        return found

    def _library_wgrad(self, k, whole):
        dy, x = self.main
        w = self._new(self.w_shape)
        return {"dw": library.wgrad(self._affine(k, dy), self._prologue(k, x), w, self.problem.geometry, False)[0]}


def matrix(t) -> tuple[int, int]:
    """(M, C) of ``[N, C, H, W]``."""
    return t.shape[0] * t.shape[2] * t.shape[3], t.shape[1]


def microseconds(trial: Trial, module, config, runs: int = 15) -> float:
    """Median of ``runs`` runs with cold caches; ``module`` None: PyTorch's call and the hooks' passes."""
    # The harness sits above this module; its stopwatch needs nothing of it.
    from fastres.bench.timing import device_times

    with quiet(trial.request):
        if module is None:
            times = device_times(lambda: trial.library(whole=False), trial.device, runs)
        else:
            tiles = module.conv_parts(trial.request.kind, trial.problem, config) if trial.has_part else 1
            outputs = trial.outputs(tiles)
            times = device_times(lambda: trial.launch(module, config, outputs), trial.device, runs)
    return statistics.median(times) * 1e6
