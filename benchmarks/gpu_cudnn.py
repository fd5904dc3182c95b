"""cuDNN's graphs on a GPU: right against float64, the same on every run, and how fast next to PyTorch's call.

``run(emit)`` is a stage of ``gpu_stages.py``. Fused bf16 graphs take seconds each to compile; the whole is planned for
three minutes. Without a GPU or without nvidia-cudnn-frontend it emits why, and passes: the backend is optional.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable

import torch

from fastres.backends import cudnn, reference, reference_conv
from fastres.bench.timing import device_times
from fastres.problem import ConvProblem, ConvRequest

DEVICE = torch.device("cuda")

#: ResNet-50's kinds of convolution: the 3x3, the expanding 1x1, and a strided 3x3.
SHAPES = (
    ConvProblem(256, 28, 28, 128, 128, 3, 3, padding=(1, 1)),
    ConvProblem(256, 56, 56, 64, 256, 1, 1),
    ConvProblem(256, 28, 28, 256, 256, 3, 3, stride=(2, 2), padding=(1, 1)),
)

#: (kind, hooks) of the patterns that training uses, and of the prologues beyond.
PATTERNS = (
    ("fprop", ()),
    ("fprop", ("stats",)),
    ("fprop", ("prologue", "stats")),
    ("dgrad", ()),
    ("dgrad", ("add",)),
    ("dgrad", ("act", "reduce")),
    ("dgrad", ("act", "reduce", "y")),
    ("wgrad", ()),
    ("wgrad", ("prologue",)),
)


def run(emit: Callable, shapes=SHAPES, runs: int = 20) -> bool:
    """Emit a row a pattern, shape, dtype and config; whether all that cuDNN accepts is right."""
    if not torch.cuda.is_available():
        emit(kind="cudnn", status="refused", why="no CUDA device is available")
        return True
    if cudnn.missing():
        emit(kind="cudnn", status="refused", why=cudnn.missing())
        return True
    emit(kind="cudnn", status="found", versions=cudnn.version())
    good = True
    for problem in shapes:
        for dtype in (torch.bfloat16, torch.float16):
            for kind, hooks in PATTERNS:
                good &= _pattern(emit, problem, dtype, kind, hooks, runs)
                torch.cuda.empty_cache()
    return good


def _pattern(emit, problem, dtype, kind, hooks, runs) -> bool:
    name = str(dtype).removeprefix("torch.")
    request = ConvRequest(kind, problem, name, hooks, torch.cuda.current_device())
    row = dict(kind="cudnn", problem=str(problem), dtype=name, pattern=" + ".join((kind, *hooks)))
    reasons = cudnn.why_not(request)
    if reasons:
        emit(**row, status="refused", why="; ".join(reasons))
        return True
    configs = cudnn.candidates(request)
    if dtype == torch.float16 and hooks:
        # What float16 has beyond bfloat16: precompiled engines. The compiled ones are the same as in bfloat16.
        configs = tuple(c for c in configs if c.sums == "genstats" or c.vectors == "activation")
    if not configs:
        return True
    arguments, outputs = _case(request, dtype)
    truth = _truth(request, arguments, outputs)
    library = statistics.median(device_times(_library(request, arguments), DEVICE, runs))
    good = True
    for config in configs:
        good &= _config(emit, row, request, config, arguments, outputs, truth, library, runs)
    return good


def _config(emit, row, request, config, arguments, outputs, truth, library, runs) -> bool:
    row = dict(row, config=str(config))
    function = getattr(cudnn, f"conv_{request.kind}")
    for buffer in outputs.values():
        buffer.fill_(float("nan"))
    try:
        try:
            function(**arguments, **outputs, config=config)
            if config.sums == "reductions":
                row["repeats"] = True  # the first call of a plan has seen to it
        except cudnn.Unsupported as error:
            if "differ from run to run" not in str(error):
                raise
            # Measured all the same: whether it would be worth an exception is a question of its time.
            row["repeats"], config = False, dataclasses.replace(config, repeatable=False)
            function(**arguments, **outputs, config=config)
        torch.cuda.synchronize()
    except cudnn.Unsupported as error:
        emit(**row, status="refused", why=str(error)[:400])
        return True
    errors = _errors(request, arguments, outputs, truth)
    wrong = [key for key, (error, limit) in errors.items() if not error <= limit]
    times = device_times(lambda: function(**arguments, **outputs, config=config), DEVICE, runs)
    seconds = statistics.median(times)
    emit(
        **row,
        status="failed" if wrong else "passed",
        **{f"error_{key}": error for key, (error, _) in errors.items()},
        microseconds=seconds * 1e6,
        library_microseconds=library * 1e6,
        library="PyTorch's convolution alone, cudnn.benchmark",
    )
    return not wrong


def _case(request: ConvRequest, dtype: torch.dtype) -> tuple[dict, dict]:
    """Random arguments of the launch, and buffers for its outputs."""
    p, hooks = request.problem, request.hooks
    generator = torch.Generator(DEVICE).manual_seed(0)

    def rand(*shape, scale=1.0, kind=dtype):
        t = torch.randn(shape, device=DEVICE, generator=generator, dtype=torch.float32) * scale
        return t.to(kind, memory_format=torch.channels_last) if len(shape) == 4 else t

    def stat(C):
        s = rand(5, C)
        s[1] = s[1].square() + 0.5
        s[2] = (s[1] + 1e-5).rsqrt()
        s[3], s[4] = s[2] * (1 + 0.3 * s[3]), 0.5 * s[4]
        return s

    fan = p.C * p.R * p.S if request.kind == "fprop" else p.K * p.R * p.S
    x_shape, w_shape, y_shape = (p.N, p.C, p.H, p.W), (p.K, p.C, p.R, p.S), (p.N, p.K, p.P, p.Q)
    arguments = dict(geometry=p.geometry)
    if request.kind != "dgrad":
        arguments["x"] = rand(*x_shape)
    if request.kind != "wgrad":
        arguments["w"] = rand(*w_shape, scale=fan**-0.5)
    if request.kind != "fprop":
        arguments["dy"] = rand(*y_shape)
    if "prologue" in hooks or "act" in hooks:
        arguments["stat"] = stat(p.C)
    if "act" in hooks:
        arguments["act"] = rand(*x_shape)
    if "add" in hooks:
        arguments["add"] = rand(*x_shape)
    name, shape = {"fprop": ("out", y_shape), "dgrad": ("dx", x_shape), "wgrad": ("dw", w_shape)}[request.kind]
    outputs = {name: rand(*shape)}
    if "y" in hooks:
        outputs["y"] = rand(*x_shape)
    if "stats" in hooks:
        outputs["part"] = rand(3, 1, p.K)
    if "reduce" in hooks:
        outputs["part"] = rand(2, 1, p.C)
    return arguments, outputs


def _wide(value):
    return value.double() if isinstance(value, torch.Tensor) else value


def _truth(request: ConvRequest, arguments: dict, outputs: dict) -> dict[str, torch.Tensor]:
    """Outputs in float64, without the sums: those are held against the rounded output itself."""
    buffers = {key: torch.empty_like(t, dtype=torch.float64) for key, t in outputs.items() if key != "part"}
    wide = {key: _wide(value) for key, value in arguments.items()}
    getattr(reference_conv, f"conv_{request.kind}")(**wide, **buffers)
    return buffers


def _errors(request, arguments, outputs, truth) -> dict[str, tuple[float, float]]:
    """(error, limit) of each output, relative to its largest value: two roundings of the dtype. Elements at a ReLU's
    edge may flip by their own size; 0.5 % of them are left out. Sums may have been taken before the rounding."""
    eps = torch.finfo(next(iter(outputs.values())).dtype).eps
    errors = {}
    for key, exact in truth.items():
        error = (outputs[key].double() - exact).abs().flatten()
        if "act" in request.hooks or "prologue" in request.hooks:
            # NaN sorts last: kthvalue would hide it.
            worst = error.float().kthvalue(max(1, int(error.numel() * 0.995))).values.double()
            worst = torch.where(error.isnan().any(), error.new_tensor(float("nan")), worst)
        else:
            worst = error.max()
        errors[key] = ((worst / exact.abs().max()).item(), 2 * eps)
    part = outputs.get("part")
    if part is None:
        return errors
    exact = torch.empty_like(part, dtype=torch.float64)
    if request.kind == "fprop":
        out = outputs["out"].double()
        reference.bn_stats(out, out.numel() // out.shape[1], out.shape[1], 1, exact)
        planes = ("count", "mean", "M2")
    else:
        dx, act, stat = outputs["dx"].double(), arguments["act"].double(), arguments["stat"].double()
        M, C = dx.numel() // dx.shape[1], dx.shape[1]
        reference.bn_bwd_reduce(dx, act, M, C, stat, None, None, None, False, 1, exact, None)
        planes = ("sum", "centred_sum")
    for plane, ours, right in zip(planes, part.double(), exact, strict=True):
        errors[plane] = (((ours - right).abs().max() / right.abs().max()).item(), 2 * eps)
    return errors


def _library(request: ConvRequest, arguments: dict) -> Callable:
    """PyTorch's call for the convolution alone, with cuDNN's own choice by measurement."""
    p = request.problem
    stride, padding, dilation, groups = p.geometry
    dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16}[request.dtype]

    def operand(name, *shape):
        if name in arguments:
            return arguments[name]
        return torch.randn(shape, device=DEVICE).to(dtype, memory_format=torch.channels_last)

    x, w = operand("x", p.N, p.C, p.H, p.W), operand("w", p.K, p.C, p.R, p.S)

    def call():
        with torch.backends.cudnn.flags(enabled=True, benchmark=True):
            if request.kind == "fprop":
                return torch.ops.aten.convolution(x, w, None, stride, padding, dilation, False, (0, 0), groups)
            which = [request.kind == "dgrad", request.kind == "wgrad", False]
            return torch.ops.aten.convolution_backward(
                arguments["dy"], x, w, None, stride, padding, dilation, False, (0, 0), groups, which
            )

    return call
