"""The compiled modules behind the launch signature: addresses, checks, loading.

C++ receives raw addresses, so everything that could send it astray is caught here, once for all modules:
device, dtype, layout, number of elements, alignment and aliasing of every argument, before anything is
written. ``cpu.py`` and ``cuda.py`` are thin: they say which module to load and what ``ctx`` means.
"""

from __future__ import annotations

import functools
import importlib
import json
import math
from collections.abc import Callable
from pathlib import Path

import torch

from fastres.backends.trusted import DTYPE_CODE, EMPTY, SIGNATURES, native_functions

#: Launch functions every native module offers, in the order of ``csrc/launch.h``.
FUNCTIONS = tuple(SIGNATURES)


def load(module: str):
    """Import ``fastres.<module>``: ``(module, "")``, or ``(None, reason)`` where it is absent or broken."""
    try:
        return importlib.import_module(f"fastres.{module}"), ""
    except ImportError as error:
        return None, f"extension fastres.{module} is not available: {error}"


@functools.cache
def build_info() -> dict:
    """What the installation was compiled with (``_build.json`` beside the package), {} if nothing was."""
    path = Path(__file__).resolve().parent.parent / "_build.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def _describe(t: torch.Tensor) -> str:
    return f"shape {tuple(t.shape)}, strides {t.stride()}, {t.dtype} on {t.device}"


def is_nhwc(t: torch.Tensor, M: int, C: int) -> bool:
    """Whether the storage of ``t`` is the dense matrix ``[M, C]``: channels_last, contiguous ``[..., C]``, or flat."""
    n = t.numel()
    if n != M * C:
        return False
    rank = t.dim()
    if rank == 4 and t.size(1) == C and t.is_contiguous(memory_format=torch.channels_last):
        return True
    if rank == 5 and t.size(1) == C and t.is_contiguous(memory_format=torch.channels_last_3d):
        return True
    return n == 0 or (rank > 0 and t.is_contiguous() and (rank == 1 or t.size(-1) == C))


def is_dense(t: torch.Tensor) -> bool:
    """Whether ``t`` covers its memory without gaps or overlaps, in any order of dimensions."""
    if t.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(t.stride(), t.shape, strict=True) if n != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def _order(t: torch.Tensor) -> list[tuple[int, int]]:
    return [(n, s) for n, s in zip(t.shape, t.stride(), strict=True) if n != 1]


class Arguments:
    """Checks the arguments of one launch and turns them into addresses. Inputs first, then outputs.

    ``like`` is the tensor that fixes device and activation dtype of the launch. Every method returns the
    address, 0 for an absent optional argument, and raises TypeError (not a tensor, dtype) or ValueError
    (device, size, layout, alignment, aliasing) naming function, argument, what it got and what it expected.
    """

    __slots__ = ("acc", "code", "device", "dtype", "fn", "item", "spans")

    def __init__(self, fn: str, device_type: str, name: str, like: torch.Tensor):
        self.fn = fn
        if not isinstance(like, torch.Tensor):
            raise TypeError(f"{fn}: {name} must be a tensor, got {type(like).__name__}")
        self.dtype = like.dtype
        self.device = like.device
        self.spans: list[tuple[str, int, int]] = []
        if self.device.type != device_type:
            raise ValueError(f"{fn}: {name} must be on a {device_type} device, got {self.device}")
        code = DTYPE_CODE.get(self.dtype)
        if code is None:
            raise TypeError(f"{fn}: {name} must be float32, bfloat16, float16 or float64, got {self.dtype}")
        self.code = code
        self.acc = torch.float64 if code == 3 else torch.float32
        self.item = like.element_size()

    def _address(self, name: str, t, dtype: torch.dtype, n: int, item: int, may_be: tuple[str, ...] | None) -> int:
        """``may_be``: None for an input; for an output the names of the inputs whose very buffer it may be."""
        if not isinstance(t, torch.Tensor):
            raise TypeError(f"{self.fn}: {name} must be a tensor, got {type(t).__name__}")
        if t.dtype is not dtype:
            raise TypeError(f"{self.fn}: {name} must be {dtype}, got {t.dtype}")
        if t.device != self.device:
            raise ValueError(f"{self.fn}: {name} must be on {self.device}, got {t.device}")
        lo = t.data_ptr()
        if lo % item:
            raise ValueError(f"{self.fn}: {name} must be aligned to {item} bytes, got address {lo:#x}")
        hi = lo + n * item
        if may_be is not None and n:
            for other, a, b in self.spans:
                if lo < b and a < hi and not (other in may_be and lo == a and hi == b):
                    allowed = f" (it may be exactly {' or '.join(may_be)})" if may_be else ""
                    raise ValueError(f"{self.fn}: {name} must not overlap {other} in memory{allowed}, got {lo:#x}")
        self.spans.append((name, lo, hi))
        return lo or EMPTY

    def act(self, name: str, t, M: int, C: int, out=None, optional=False) -> int:
        """Activations ``[M, C]`` in dense NHWC. Outputs pass ``out=()`` or the names of inputs they may be."""
        if t is None and optional:
            return 0
        address = self._address(name, t, self.dtype, M * C, self.item, out)
        if not is_nhwc(t, M, C):
            raise ValueError(
                f"{self.fn}: {name} must be {M} x {C} elements in dense NHWC ([N, C, H, W] in channels_last or "
                f"contiguous [..., C]), got {_describe(t)}"
            )
        return address

    def flat(self, name: str, t, n: int, like: torch.Tensor, out=None) -> int:
        """``n`` activations in storage order: dense, and laid out as ``like`` where the shapes agree."""
        address = self._address(name, t, self.dtype, n, self.item, out)
        if t.numel() != n or not is_dense(t):
            raise ValueError(f"{self.fn}: {name} must be {n} dense elements, got {_describe(t)}")
        if t.shape == like.shape and n and _order(t) != _order(like):
            raise ValueError(f"{self.fn}: {name} must have the strides {like.stride()}, got {_describe(t)}")
        return address

    def array(self, name: str, t, *shape: int, out=None, optional=False) -> int:
        """A contiguous array of the accumulator type with the number of elements of ``shape``."""
        if t is None and optional:
            return 0
        n = math.prod(shape)
        address = self._address(name, t, self.acc, n, 8 if self.code == 3 else 4, out)
        if t.numel() != n or not t.is_contiguous():
            raise ValueError(f"{self.fn}: {name} must be contiguous {list(shape)} ({n} elements), got {_describe(t)}")
        return address

    def bytes(self, name: str, t, *shape: int, out=None, optional=False) -> int:
        """A contiguous uint8 array."""
        if t is None and optional:
            return 0
        n = math.prod(shape)
        address = self._address(name, t, torch.uint8, n, 1, out)
        if t.numel() != n or not t.is_contiguous():
            raise ValueError(f"{self.fn}: {name} must be contiguous {list(shape)} ({n} bytes), got {_describe(t)}")
        return address

    def taps(self, name: str, t, M: int, C: int, out=None, optional=False) -> int:
        """Winning taps of the stem, uint8 ``[M, C]`` with the layout of the pooled activations."""
        if t is None and optional:
            return 0
        address = self._address(name, t, torch.uint8, M * C, 1, out)
        if not is_nhwc(t, M, C):
            raise ValueError(f"{self.fn}: {name} must be {M} x {C} elements in dense NHWC, got {_describe(t)}")
        return address

    def mask(self, name: str, t, M: int, C: int, out=None, optional=False) -> int:
        """ReLU mask, uint8 ``[M, ceil(C/8)]``."""
        return self.bytes(name, t, M, -(-C // 8), out=out, optional=optional)


def _need(fn: str, condition: bool, sentence: str) -> None:
    if not condition:
        raise ValueError(f"{fn}: {sentence}")


def _flag(fn: str, name: str, value) -> int:
    if value not in (0, 1):
        raise ValueError(f"{fn}: {name} must be a bool, got {value!r}")
    return int(value)


class Launcher:
    """The launch functions of one compiled module, with the signatures of ``reference.py``.

    ``module``       the extension module (functions as in ``csrc/launch.h``, addresses as integers).
    ``device_type``  "cpu" or "cuda": where tensors must live.
    ``ctx``          device -> the integer passed as ``ctx`` (threads, stream, seed).
    A subclass may override :meth:`invoke`, for instance to set the current device around the call.
    """

    def __init__(self, module, device_type: str, ctx: Callable[[torch.device], int]):
        self.module = module
        self.device_type = device_type
        self.ctx = ctx

    def invoke(self, fn: str, device: torch.device, *args) -> None:
        if self.module is None:
            raise RuntimeError(f"{fn}: the extension module is not available")
        getattr(self.module, fn)(*args, self.ctx(device))

    def unchecked(self) -> dict[str, Callable]:
        """The launch functions of the module without their checks, for `fastres.backends.trusted.Trusted`."""
        if self.module is None:
            return {}
        device = torch.device(self.device_type)
        return native_functions(self.module, lambda: self.ctx(device))

    def _args(self, fn: str, name: str, like) -> Arguments:
        return Arguments(fn, self.device_type, name, like)

    # ---- add_relu

    def add_relu_fwd(self, x, residual, n, out, mask):
        a = self._args("add_relu_fwd", "x", x)
        xp = a.flat("x", x, n, x)
        rp = a.flat("residual", residual, n, x)
        op = a.flat("out", out, n, x, out=("x", "residual"))
        mp = a.bytes("mask", mask, -(-n // 8), out=(), optional=True)
        self.invoke("add_relu_fwd", a.device, a.code, xp, rp, n, op, mp)

    def add_relu_bwd(self, grad, mask, n, dx):
        a = self._args("add_relu_bwd", "grad", grad)
        gp = a.flat("grad", grad, n, grad)
        mp = a.bytes("mask", mask, -(-n // 8))
        dp = a.flat("dx", dx, n, grad, out=("grad",))
        self.invoke("add_relu_bwd", a.device, a.code, gp, mp, n, dp)

    # ---- batch_norm_act

    def bn_stats(self, x, M, C, T, part):
        a = self._args("bn_stats", "x", x)
        _need("bn_stats", T >= 1, f"T must be at least 1, got {T}")
        xp = a.act("x", x, M, C)
        pp = a.array("part", part, 3, T, C, out=())
        self.invoke("bn_stats", a.device, a.code, xp, M, C, T, pp)

    def bn_finalize(self, part, T, C, weight, bias, eps, stat):
        a = self._acc_args("bn_finalize", "part", part)
        _need("bn_finalize", T >= 1, f"T must be at least 1, got {T}")
        pp = a.array("part", part, 3, T, C)
        wp = a.array("weight", weight, C, optional=True)
        bp = a.array("bias", bias, C, optional=True)
        sp = a.array("stat", stat, 5, C, out=())
        self.invoke("bn_finalize", a.device, a.code, pp, T, C, wp, bp, float(eps), sp)

    def bn_fold(self, running_mean, running_var, weight, bias, eps, C, stat):
        a = self._acc_args("bn_fold", "running_mean", running_mean)
        mp = a.array("running_mean", running_mean, C)
        vp = a.array("running_var", running_var, C)
        wp = a.array("weight", weight, C, optional=True)
        bp = a.array("bias", bias, C, optional=True)
        sp = a.array("stat", stat, 5, C, out=())
        self.invoke("bn_fold", a.device, a.code, mp, vp, wp, bp, float(eps), C, sp)

    def bn_apply(self, x, M, C, stat, residual, rstat, relu, out, mask):
        a = self._args("bn_apply", "x", x)
        _need("bn_apply", rstat is None or residual is not None, "rstat was given without residual")
        xp = a.act("x", x, M, C)
        sp = a.array("stat", stat, 5, C)
        rp = a.act("residual", residual, M, C, optional=True)
        rs = a.array("rstat", rstat, 5, C, optional=True)
        op = a.act("out", out, M, C, out=("x",))
        mp = a.mask("mask", mask, M, C, out=(), optional=True)
        self.invoke("bn_apply", a.device, a.code, xp, M, C, sp, rp, rs, _flag("bn_apply", "relu", relu), op, mp)

    def bn_bwd_reduce(self, grad, x, M, C, stat, residual, rstat, mask, relu, T, part, y):
        fn = "bn_bwd_reduce"
        a = self._args(fn, "grad", grad)
        _need(fn, T >= 1, f"T must be at least 1, got {T}")
        _need(fn, rstat is None or residual is not None, "rstat was given without residual")
        _need(fn, not relu or mask is not None or residual is None, "with relu and a residual, mask is required")
        _need(fn, y is None or residual is None, "y can be recomputed without a residual only")
        gp = a.act("grad", grad, M, C)
        xp = a.act("x", x, M, C)
        sp = a.array("stat", stat, 5, C)
        rp = a.act("residual", residual, M, C, optional=True)
        rs = a.array("rstat", rstat, 5, C, optional=True)
        mp = a.mask("mask", mask, M, C, optional=True)
        pp = a.array("part", part, 2 if rstat is None else 3, T, C, out=())
        yp = a.act("y", y, M, C, out=(), optional=True)
        self.invoke(fn, a.device, a.code, gp, xp, M, C, sp, rp, rs, mp, _flag(fn, "relu", relu), T, pp, yp)

    def bn_bwd_finalize(self, part, plane, T, M, C, stat, batch_stats, dweight, dbias, coef):
        fn = "bn_bwd_finalize"
        a = self._acc_args(fn, "part", part)
        _need(fn, T >= 1, f"T must be at least 1, got {T}")
        _need(fn, plane in (1, 2), f"plane must be 1 (x) or 2 (residual), got {plane!r}")
        planes = 3 if plane == 2 or part.numel() == 3 * T * C else 2
        pp = a.array("part", part, planes, T, C)
        sp = a.array("stat", stat, 5, C)
        wp = a.array("dweight", dweight, C, out=(), optional=True)
        bp = a.array("dbias", dbias, C, out=(), optional=True)
        cp = a.array("coef", coef, 3, C, out=())
        self.invoke(fn, a.device, a.code, pp, plane, T, M, C, sp, _flag(fn, "batch_stats", batch_stats), wp, bp, cp)

    def bn_bwd_apply(self, grad, x, M, C, stat, coef, residual, rstat, rcoef, mask, relu, dx, dres):
        fn = "bn_bwd_apply"
        a = self._args(fn, "grad", grad)
        _need(fn, not relu or mask is not None or residual is None, "with relu and a residual, mask is required")
        if rcoef is not None:
            missing = [n for n, t in (("residual", residual), ("rstat", rstat), ("dres", dres)) if t is None]
            _need(fn, not missing, f"rcoef was given without {', '.join(missing)}")
        gp = a.act("grad", grad, M, C)
        xp = a.act("x", x, M, C)
        sp = a.array("stat", stat, 5, C)
        cp = a.array("coef", coef, 3, C)
        rp = a.act("residual", residual, M, C, optional=True)
        rs = a.array("rstat", rstat, 5, C, optional=True)
        rc = a.array("rcoef", rcoef, 3, C, optional=True)
        mp = a.mask("mask", mask, M, C, optional=True)
        dp = a.act("dx", dx, M, C, out=("grad",))
        dr = a.act("dres", dres, M, C, out=(), optional=True)
        self.invoke(fn, a.device, a.code, gp, xp, M, C, sp, cp, rp, rs, rc, mp, _flag(fn, "relu", relu), dp, dr)

    # ---- conv_bn_act

    def bias_act(self, x, M, C, bias, residual, relu, out):
        a = self._args("bias_act", "x", x)
        xp = a.act("x", x, M, C)
        bp = a.array("bias", bias, C, optional=True)
        rp = a.act("residual", residual, M, C, optional=True)
        op = a.act("out", out, M, C, out=("x",))
        self.invoke("bias_act", a.device, a.code, xp, M, C, bp, rp, _flag("bias_act", "relu", relu), op)

    # ---- bottleneck, basic_block

    def mask_add(self, a, grad, mask, M, C, out):
        args = self._args("mask_add", "a", a)
        ap = args.act("a", a, M, C)
        gp = args.act("grad", grad, M, C)
        mp = args.mask("mask", mask, M, C)
        op = args.act("out", out, M, C, out=("a",))
        self.invoke("mask_add", args.device, args.code, ap, gp, mp, M, C, op)

    # ---- stem

    def stem_fwd(self, x, N, H, W, C, stat, P, Q, k, stride, pad, out, idx):
        a = self._args("stem_fwd", "x", x)
        _check_pool("stem_fwd", H, W, P, Q, k, stride, pad)
        xp = a.act("x", x, N * H * W, C)
        sp = a.array("stat", stat, 5, C)
        op = a.act("out", out, N * P * Q, C, out=())
        ip = a.taps("idx", idx, N * P * Q, C, out=(), optional=True)
        self.invoke("stem_fwd", a.device, a.code, xp, N, H, W, C, sp, P, Q, k, stride, pad, op, ip)

    def stem_bwd_reduce(self, grad, idx, x, N, H, W, C, stat, P, Q, k, stride, pad, T, part):
        a = self._args("stem_bwd_reduce", "grad", grad)
        _need("stem_bwd_reduce", T >= 1, f"T must be at least 1, got {T}")
        _check_pool("stem_bwd_reduce", H, W, P, Q, k, stride, pad)
        gp = a.act("grad", grad, N * P * Q, C)
        ip = a.taps("idx", idx, N * P * Q, C)
        xp = a.act("x", x, N * H * W, C)
        sp = a.array("stat", stat, 5, C)
        pp = a.array("part", part, 2, T, C, out=())
        self.invoke("stem_bwd_reduce", a.device, a.code, gp, ip, xp, N, H, W, C, sp, P, Q, k, stride, pad, T, pp)

    def stem_bwd_apply(self, grad, idx, x, N, H, W, C, stat, coef, P, Q, k, stride, pad, dx):
        a = self._args("stem_bwd_apply", "grad", grad)
        _check_pool("stem_bwd_apply", H, W, P, Q, k, stride, pad)
        gp = a.act("grad", grad, N * P * Q, C)
        ip = a.taps("idx", idx, N * P * Q, C)
        xp = a.act("x", x, N * H * W, C)
        sp = a.array("stat", stat, 5, C)
        cp = a.array("coef", coef, 3, C)
        dp = a.act("dx", dx, N * H * W, C, out=())
        self.invoke("stem_bwd_apply", a.device, a.code, gp, ip, xp, N, H, W, C, sp, cp, P, Q, k, stride, pad, dp)

    def _acc_args(self, fn: str, name: str, like) -> Arguments:
        a = self._args(fn, name, like)
        if a.code not in (0, 3):
            raise TypeError(f"{fn}: {name} must be float32 or float64, got {a.dtype}")
        return a


def _check_pool(fn: str, H: int, W: int, P: int, Q: int, k: int, stride: int, pad: int) -> None:
    _need(fn, k >= 1 and k * k <= 225, f"k must be 1..15, got {k}")
    _need(fn, stride >= 1, f"stride must be at least 1, got {stride}")
    _need(fn, 0 <= pad <= k // 2, f"pad must be 0..k//2 = {k // 2}, got {pad}")
    expected = tuple(max(0, (size + 2 * pad - k) // stride + 1) for size in (H, W))
    _need(fn, (P, Q) == expected, f"P, Q must be {expected} for H, W = {(H, W)}, got {(P, Q)}")
