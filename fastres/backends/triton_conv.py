"""The Triton convolutions behind the signatures of ``reference_conv.py``, plus ``config``: a row of ``conv_configs``.

Arguments are checked here, before anything is written: device, dtype, shape, layout, alignment. ``part`` has
``conv_parts(kind, problem, config)`` tiles.
"""

from __future__ import annotations

import functools
import importlib

import torch

from fastres.backends import conv_checks
from fastres.backends import triton as base
from fastres.backends.replay import replayed
from fastres.problem import problem_of


@functools.cache
def _module(name: str):
    return importlib.import_module(f"fastres.triton_kernels.{name}")


def configs():
    """``triton_kernels/conv_configs.py``; imports Triton."""
    return _module("conv_configs")


def kernels(config):
    """The launchers that know ``config``."""
    return _module(configs().FILES[config.kernel])


@functools.lru_cache(maxsize=4096)
def conv_parts(kind: str, problem, config) -> int:
    """Tiles T of the ``part`` that a launch fills."""
    return _module("conv_merge").short(kernels(config).parts(kind, problem, config))


def _check(fn: str, like, shapes: dict, config) -> None:
    """Activations and weights by name with the shape they must have; None: not given."""
    aligned_for = config.kernel if config.kernel in configs().DESCRIPTORS else ""
    for name, (t, shape) in shapes.items():
        if t is not None:
            conv_checks.activation(fn, name, t, like, shape, aligned_for)


def _check_vectors(fn: str, device, vectors: dict) -> None:
    for name, (t, shape) in vectors.items():
        if t is not None:
            conv_checks.vector(fn, name, t, device, shape)


def _check_mask(fn: str, mask, like, name: str = "mask") -> None:
    if mask is None:
        return
    N, C, H, W = like.shape
    if mask.dtype != torch.uint8 or not mask.is_contiguous() or mask.numel() != N * H * W * -(-C // 8):
        raise ValueError(f"{fn}: {name} must be contiguous uint8 [{N * H * W}, {-(-C // 8)}], got {list(mask.shape)}")


def _check_pre(fn: str, dy, pre, bits) -> None:
    if pre is not None:
        K = dy.shape[1]
        _check_vectors(fn, dy.device, {"stat of pre": (pre[1], (5, K)), "coef of pre": (pre[2], (3, K))})
    elif bits is not None:
        raise ValueError(f"{fn}: bits need pre")
    _check_mask(fn, bits, dy, "bits")


def precision(dtype: torch.dtype) -> str:
    """How float32 operands enter the tensor cores: PyTorch's own switch for convolutions decides."""
    if dtype != torch.float32:
        return "ieee"
    # cudnn.allow_tf32 raises where someone used the newer switches; this one knows both.
    return "tf32" if torch.backends.cudnn.conv.fp32_precision == "tf32" else "ieee"


def conv_fprop(x, w, geometry, out, *, stat=None, bias=None, residual=None, relu=False, part=None, config):
    """See ``reference_conv.conv_fprop``. bias and stat float32, part float32 [3, conv_parts, K]."""
    problem = problem_of(x.shape, w.shape, geometry)
    K, P, Q = problem.K, problem.P, problem.Q
    y = (problem.N, K, P, Q)
    _check("conv_fprop", x, {"x": (x, x.shape), "w": (w, w.shape), "out": (out, y), "residual": (residual, y)}, config)
    if part is not None and (relu or residual is not None):
        raise ValueError("conv_fprop: part is legal without relu and residual only")
    T = conv_parts("fprop", problem, config) if part is not None else 0
    vectors = {"bias": (bias, (K,)), "stat": (stat, (5, problem.C)), "part": (part, (3, T, K))}
    _check_vectors("conv_fprop", x.device, vectors)
    trusted.conv_fprop(
        x, w, geometry, out, stat=stat, bias=bias, residual=residual, relu=relu, part=part, config=config
    )


def conv_dgrad(
    dy, w, geometry, dx, *, pre=None, bits=None, add=None, mask=None, act=None, stat=None, part=None, y=None, config
):
    """See ``reference_conv.conv_dgrad``. part float32 [2, conv_parts, C]."""
    problem = problem_of(dx.shape, w.shape, geometry)
    grad = (problem.N, problem.K, problem.P, problem.Q)
    x = dx.shape
    shapes = {"dy": (dy, grad), "w": (w, w.shape), "dx": (dx, x), "add": (add, x), "act": (act, x), "y": (y, x)}
    _check("conv_dgrad", dy, {**shapes, **({"pre": (pre[0], grad)} if pre else {})}, config)
    _check_pre("conv_dgrad", dy, pre, bits)
    T = conv_parts("dgrad", problem, config) if part is not None else 0
    _check_vectors("conv_dgrad", dy.device, {"stat": (stat, (5, problem.C)), "part": (part, (2, T, problem.C))})
    _check_mask("conv_dgrad", mask, dx)
    if act is None and not (stat is part is y is None):
        raise ValueError("conv_dgrad: stat, part and y need act")
    trusted.conv_dgrad(
        dy, w, geometry, dx, pre=pre, bits=bits, add=add, mask=mask, act=act, stat=stat, part=part, y=y, config=config
    )


def conv_wgrad(dy, x, geometry, dw, *, pre=None, bits=None, stat=None, config):
    """See ``reference_conv.conv_wgrad``. dw in the dtype of dy or float32."""
    problem = problem_of(x.shape, dw.shape, geometry)
    grad = (problem.N, problem.K, problem.P, problem.Q)
    shapes = {"dy": (dy, grad), "x": (x, x.shape)}
    _check("conv_wgrad", dy, {**shapes, **({"pre": (pre[0], grad)} if pre else {})}, config)
    _check_pre("conv_wgrad", dy, pre, bits)
    if dw.dtype not in (dy.dtype, torch.float32) or not dw.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(f"conv_wgrad: dw must be channels_last {dy.dtype} or float32, got {dw.dtype} {dw.stride()}")
    _check_vectors("conv_wgrad", dy.device, {"stat": (stat, (5, problem.C))})
    trusted.conv_wgrad(dy, x, geometry, dw, pre=pre, bits=bits, stat=stat, config=config)


_SIGNATURES = {
    "conv_fprop": "x@ w@ geometry out* | stat? bias? residual? relu part? config precision",
    "conv_dgrad": "dy* w@ geometry dx@ | pre? pre_stat? coef? bits? add? mask? act? stat? part? y? config precision",
    "conv_wgrad": "dy* x@ geometry dw@ | pre? pre_stat? coef? bits? stat? config precision",
}


@functools.cache
def _replayed(kernel: str, function: str):
    """A launcher by the name of its kernel, warm launches repeated without Triton's Python."""
    launcher = getattr(_module(configs().FILES[kernel]), function)
    return launcher if base.interpreting() else replayed(launcher, _SIGNATURES[function])


@functools.cache
def _merge():
    launcher = _module("conv_merge").merge
    return launcher if base.interpreting() else replayed(launcher, "part@ out@")


def _with_long_part(launch, parts: int, part, *args, **options) -> None:
    """Launch with a part of as many tiles as the kernel has, merged into the caller's."""
    if part is None or part.shape[1] == parts:
        launch(*args, part=part, **options)
        return
    long = part.new_empty((part.shape[0], parts, part.shape[2]))
    launch(*args, part=long, **options)
    _merge()(long, part)


@functools.lru_cache(maxsize=4096)
def _parts(kind: str, x_shape, w_shape, geometry, config) -> int:
    return kernels(config).parts(kind, problem_of(x_shape, w_shape, geometry), config)


_NO_PRE = (None, None, None)


class _Trusted:
    """The same functions without their checks, for ops that allocated or checked every argument themselves."""

    conv_parts = staticmethod(conv_parts)

    @staticmethod
    def conv_fprop(x, w, geometry, out, *, stat=None, bias=None, residual=None, relu=False, part=None, config):
        parts = 0 if part is None else _parts("fprop", x.shape, w.shape, geometry, config)
        _with_long_part(
            _replayed(config.kernel, "conv_fprop"), parts, part, x, w, geometry, out, stat=stat, bias=bias,
            residual=residual, relu=relu, config=config, precision=precision(x.dtype),
        )  # fmt: skip

    @staticmethod
    def conv_dgrad(dy, w, geometry, dx, *, pre=None, bits=None, add=None, mask=None, act=None, stat=None, part=None,
                   y=None, config):  # fmt: skip
        a, pre_stat, coef = pre or _NO_PRE
        parts = 0 if part is None else _parts("dgrad", dx.shape, w.shape, geometry, config)
        _with_long_part(
            _replayed(config.kernel, "conv_dgrad"), parts, part, dy, w, geometry, dx, pre=a, pre_stat=pre_stat,
            coef=coef, bits=bits, add=add, mask=mask, act=act, stat=stat, y=y, config=config,
            precision=precision(dy.dtype),
        )  # fmt: skip

    @staticmethod
    def conv_wgrad(dy, x, geometry, dw, *, pre=None, bits=None, stat=None, config):
        a, pre_stat, coef = pre or _NO_PRE
        _replayed(config.kernel, "conv_wgrad")(
            dy, x, geometry, dw, pre=a, pre_stat=pre_stat, coef=coef, bits=bits, stat=stat, config=config,
            precision=precision(dy.dtype),
        )  # fmt: skip


trusted = _Trusted()


def conv_candidates(request) -> tuple:
    """Configurations for a ``fastres.problem.ConvRequest``, the likeliest winner first; () where none can serve."""
    itemsize = 4 if request.dtype == "float32" else 2
    capability = (9, 0) if request.device < 0 else torch.cuda.get_device_capability(request.device)
    return configs().candidates(request.kind, request.problem, request.hooks, itemsize, capability)
