"""Convolutions through cuDNN's graphs, optional: ``pip install fastres[cudnn]`` brings nvidia-cudnn-frontend.

The functions of ``reference_conv.py`` for CUDA tensors in bf16 and fp16, plus ``config``: a row of `candidates`. Where
the package is absent, broken or drives another cuDNN than PyTorch's, `why_not` says so and nothing is served. Graphs
are planned and compiled once a request and config; they run on the current stream.

What differs from our own kernels: statistics come as sum and sum of squares in fp32, so the M2 they give is off by
about (mean/sigma)^2 * 2^-24 of itself; prologues may be worded otherwise (``cudnn_graphs.PROLOGUES``); and cuDNN does
not promise that a NaN passes its ReLU.
``fastres.tuning`` checks each config against the reference on the very shape before it serves.
"""

from __future__ import annotations

import functools

import torch

from fastres.backends import conv_checks, cudnn_graphs, cudnn_plans
from fastres.backends.cudnn_graphs import GraphConfig
from fastres.backends.cudnn_plans import Plans, Unsupported, missing, version
from fastres.problem import ConvRequest, problem_of

__all__ = [
    "GraphConfig",
    "Unsupported",
    "candidates",
    "conv_dgrad",
    "conv_fprop",
    "conv_parts",
    "conv_wgrad",
    "missing",
    "version",
    "why_not",
]

name = "cudnn"

MIN_CAPABILITY = (8, 0)

_CL = torch.channels_last
_OPTIONAL = ("residual", "pre", "add", "act", "y")


@functools.lru_cache(maxsize=64)
def _device_reason(device: int) -> str:
    if torch.version.cuda is None or not torch.cuda.is_available():
        return "no CUDA device is available"
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        return "compute capability {}.{} or later is needed, got {}.{}".format(*MIN_CAPABILITY, *capability)
    return ""


def why_not(request: ConvRequest) -> list[str]:
    """Reasons why cuDNN's graphs cannot serve a ``fastres.problem.ConvRequest``; empty if they can.

    The package is imported, and cuDNN asked for a plan, only where nothing else stands in the way.
    """
    reasons = cudnn_graphs.why_not(request)
    if request.device < 0:
        reasons.append("CUDA tensors are served, not CPU ones")
    elif reason := _device_reason(request.device):
        reasons.append(reason)
    if not torch.backends.cudnn.enabled:
        reasons.append("torch.backends.cudnn.enabled is False")
    if not reasons and missing():
        reasons.append(missing())
    if not reasons and not candidates(request):
        reasons += _declined(request)
    return reasons


def _declined(request: ConvRequest) -> list[str]:
    return [f"{config}: {cudnn_plans.plans(request, config, '')}" for config in cudnn_graphs.wordings(request)]


def candidates(request: ConvRequest) -> tuple[GraphConfig, ...]:
    """Configs that cuDNN has plans for, the likeliest winner first; () where it cannot serve."""
    if cudnn_graphs.why_not(request) or request.device < 0 or _device_reason(request.device):
        return ()
    if not torch.backends.cudnn.enabled or missing():
        return ()
    return _candidates(request)


@functools.lru_cache(maxsize=4096)
def _candidates(request: ConvRequest) -> tuple[GraphConfig, ...]:
    limit = cudnn_graphs.RANKS_FUSED if request.hooks else cudnn_graphs.RANKS_ALONE
    rows = []
    for wording in cudnn_graphs.wordings(request):
        plans = cudnn_plans.plans(request, wording, "")
        if not isinstance(plans, str):
            rows += plans.ranks(wording, limit)
    # The first choice of every wording before the second of any.
    return tuple(sorted(rows, key=lambda config: config.rank))


def conv_parts(kind: str, problem, config: GraphConfig) -> int:
    """Tiles T of the ``part`` that a launch fills: cuDNN merges its own."""
    return 1


def _index(device: torch.device) -> int:
    return -1 if device.type != "cuda" else device.index or 0


@functools.lru_cache(maxsize=4096)
def _served(kind, hooks, x_shape, w_shape, geometry, dtype, device: torch.device, config, dw_dtype) -> Plans:
    """The plans behind a call. Raises ValueError with the reasons where there are none."""
    problem = problem_of(x_shape, w_shape, geometry)
    request = ConvRequest(kind, problem, str(dtype).removeprefix("torch."), hooks, _index(device))
    reasons = why_not(request)
    if not reasons:
        wording = GraphConfig(config.prologue, config.vectors, config.sums)
        if wording not in cudnn_graphs.wordings(request):
            known = ", ".join(map(str, cudnn_graphs.wordings(request)))
            raise ValueError(f"config: got {config}, expected the wording of {known}, for {request}")
        plans = cudnn_plans.plans(request, wording, "" if dw_dtype in ("", request.dtype) else dw_dtype)
        if not isinstance(plans, str):
            return plans
        reasons = [plans]
    raise Unsupported(f"backend 'cudnn' cannot serve {request}: {'; '.join(reasons)}")


# ---- the functions of reference_conv.py


def conv_fprop(x, w, geometry, out, *, stat=None, bias=None, residual=None, relu=False, part=None, config):
    """See ``reference_conv.conv_fprop``. stat, bias and part float32; part ``[3, 1, K]``.

    Raises TypeError or ValueError for arguments that do not fit, `Unsupported` where cuDNN does not serve them.
    """
    hooks = _hooks(prologue=stat, bias=bias, residual=residual, relu=relu or None, stats=part)
    plans = _served("fprop", hooks, x.shape, w.shape, geometry, x.dtype, x.device, config, "")
    p = plans.request.problem
    y, filters = (p.N, p.K, p.P, p.Q), (p.K, p.C, p.R, p.S)
    addresses = _activations("conv_fprop", x, x=(x, x.shape), w=(w, filters), out=(out, y), residual=(residual, y))
    vectors = {"stat": (stat, (5, p.C)), "bias": (bias, (p.K,)), "part": (part, (3, 1, p.K))}
    addresses |= _vectors("conv_fprop", x.device, **vectors)
    kept = _prologue(addresses, stat, p.C, x.dtype, config)
    if part is None:
        plans.run(config, addresses, None)
    else:
        sums = part[1:]
        addresses |= {"sum": part.data_ptr() + 4 * p.K, "square_sum": part.data_ptr() + 8 * p.K}
        plans.run(config, addresses, sums)
        _finish(part, p.N * p.P * p.Q)
    del kept  # alive until its reader was launched


def _finish(part: torch.Tensor, n: int) -> None:
    """``part [3, 1, K]`` with sum and sum of squares in its last planes -> count, mean, M2. A negative M2 is the
    rounding of a vanishing one."""
    mean = part[1].div_(n)
    part[2].addcmul_(mean, mean, value=-n).clamp_(min=0)
    part[0].fill_(n)


def conv_dgrad(
    dy, w, geometry, dx, *, pre=None, bits=None, add=None, mask=None, act=None, stat=None, part=None, y=None, config
):
    """See ``reference_conv.conv_dgrad``. stat, coef and part float32; part ``[2, 1, C]``; no mask.

    Raises TypeError or ValueError for arguments that do not fit, `Unsupported` where cuDNN does not serve them.
    """
    if (act is None) != (stat is None):
        raise ValueError("conv_dgrad: act and stat come together")
    hooks = _hooks(pre=pre, bits=bits, add=add, mask=mask, act=act, reduce=part, y=y)
    plans = _served("dgrad", hooks, dx.shape, w.shape, geometry, dy.dtype, dy.device, config, "")
    p = plans.request.problem
    grad, x, filters = (p.N, p.K, p.P, p.Q), (p.N, p.C, p.H, p.W), (p.K, p.C, p.R, p.S)
    a, stat_a, coef = pre or (None, None, None)
    addresses = _activations(
        "conv_dgrad", dy, dy=(dy, grad), w=(w, filters), dx=(dx, x), pre=(a, grad), add=(add, x), act=(act, x), y=(y, x)
    )
    vectors = {
        "stat": (stat, (5, p.C)),
        "part": (part, (2, 1, p.C)),
        "pre_mean": (stat_a, (5, p.K)),
        "coef0": (coef, (3, p.K)),
    }
    addresses |= _vectors("conv_dgrad", dy.device, **vectors)
    if coef is not None:
        addresses |= {"coef1": coef.data_ptr() + 4 * p.K, "coef2": coef.data_ptr() + 8 * p.K}
    if stat is not None:
        addresses |= _rows(stat, p.C)
    if part is not None:
        addresses |= {"sum": part.data_ptr(), "centred_sum": part.data_ptr() + 4 * p.C}
    plans.run(config, addresses, part)


def conv_wgrad(dy, x, geometry, dw, *, pre=None, bits=None, stat=None, config):
    """See ``reference_conv.conv_wgrad``. stat float32; dw in the dtype of dy or float32; no pre.

    Raises TypeError or ValueError for arguments that do not fit, `Unsupported` where cuDNN does not serve them.
    """
    if dw.dtype not in (dy.dtype, torch.float32):
        raise ValueError(f"conv_wgrad: dw must be {dy.dtype} or torch.float32, got {dw.dtype}")
    hooks = _hooks(pre=pre, bits=bits, prologue=stat)
    out = str(dw.dtype).removeprefix("torch.")
    plans = _served("wgrad", hooks, x.shape, dw.shape, geometry, dy.dtype, dy.device, config, out)
    p = plans.request.problem
    addresses = _activations("conv_wgrad", dy, dy=(dy, (p.N, p.K, p.P, p.Q)), x=(x, x.shape))
    addresses |= _activations("conv_wgrad", dw, dw=(dw, (p.K, p.C, p.R, p.S)))
    addresses |= _vectors("conv_wgrad", dy.device, stat=(stat, (5, p.C)))
    kept = _prologue(addresses, stat, p.C, dy.dtype, config)
    plans.run(config, addresses, None)
    del kept  # alive until its reader was launched


def _hooks(**given) -> tuple[str, ...]:
    return tuple(sorted(hook for hook, argument in given.items() if argument is not None))


def _activations(fn: str, like: torch.Tensor, **tensors) -> dict[str, int]:
    """Addresses of activations and weights, each with the shape it must have; optional ones that are None left out."""
    addresses = {}
    for key, (t, shape) in tensors.items():
        if t is None and key in _OPTIONAL:
            continue
        conv_checks.activation(fn, key, t, like, shape, "cuDNN")
        addresses[key] = t.data_ptr()
    return addresses


def _vectors(fn: str, device: torch.device, **tensors) -> dict[str, int]:
    """The same for float32 vectors, contiguous."""
    addresses = {}
    for key, (t, shape) in tensors.items():
        if t is None:
            continue
        conv_checks.vector(fn, key, t, device, shape)
        addresses[key] = t.data_ptr()
    return addresses


def _rows(stat: torch.Tensor, C: int) -> dict[str, int]:
    """Addresses of the rows of ``stat [5, C]`` that a BN is applied with."""
    start = stat.data_ptr()
    return {"mean": start, "scale": start + 12 * C, "bias_bn": start + 16 * C}


def _prologue(addresses: dict[str, int], stat, C: int, dtype: torch.dtype, config: GraphConfig):
    """Fill in the vectors of the prologue; what must stay alive until the launch."""
    if stat is None:
        return None
    addresses |= _rows(stat, C)
    if config.prologue != "folded":
        return None
    scale, bias = stat[3], torch.addcmul(stat[4], stat[0], stat[3], value=-1)
    if config.vectors == "activation":
        scale, bias = scale.to(dtype), bias.to(dtype)
    addresses |= {"scale": scale.data_ptr(), "bias_bn": bias.data_ptr()}
    return scale, bias
