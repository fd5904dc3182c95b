"""What the tests of the cuDNN backend share: problems, combinations of hooks, arguments, a device's description."""

from __future__ import annotations

import contextlib
import types

import torch

from fastres.backends import cudnn, cudnn_plans
from fastres.problem import ConvProblem

POINT = ConvProblem(2, 6, 6, 16, 24, 1, 1)
SQUARE = ConvProblem(2, 7, 5, 16, 8, 3, 3, padding=(1, 1))
STRIDED = ConvProblem(2, 8, 7, 8, 16, 3, 3, stride=(2, 2), padding=(1, 1))
PROBLEMS = (POINT, SQUARE, STRIDED)

#: Every combination of hooks that ``reference_conv.py`` gives a meaning to and a graph can have.
SERVED = (
    ("fprop", ()),
    ("fprop", ("bias",)),
    ("fprop", ("bias", "relu", "residual")),
    ("fprop", ("prologue",)),
    ("fprop", ("bias", "prologue", "relu", "residual")),
    ("fprop", ("stats",)),
    ("fprop", ("bias", "stats")),
    ("fprop", ("prologue", "stats")),
    ("dgrad", ()),
    ("dgrad", ("add",)),
    ("dgrad", ("act",)),
    ("dgrad", ("act", "add")),
    ("dgrad", ("act", "y")),
    ("dgrad", ("act", "reduce")),
    ("dgrad", ("act", "add", "reduce", "y")),
    ("dgrad", ("pre",)),
    ("dgrad", ("act", "pre", "reduce")),
    ("wgrad", ()),
    ("wgrad", ("prologue",)),
)


def case(kind, hooks, p, dtype, seed=0):
    """Random arguments of a launch (CPU), and NaN-filled buffers for its outputs."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape, kind=torch.float32):
        t = torch.randn(shape, generator=generator)
        return t.to(kind, memory_format=torch.channels_last) if len(shape) == 4 else t

    def stat(C):
        s = rand(5, C)
        s[1] = s[1].square() + 0.5
        s[2] = (s[1] + 1e-5).rsqrt()
        # relu(bias) > 0 somewhere: a padded zero must not become it.
        s[3], s[4] = s[2] * (1 + 0.3 * s[3]), s[4].abs()
        return s

    def empty(*shape, kind=dtype):
        t = torch.full(shape, float("nan"), dtype=kind)
        return t.to(memory_format=torch.channels_last) if len(shape) == 4 else t

    x, w, y = (p.N, p.C, p.H, p.W), (p.K, p.C, p.R, p.S), (p.N, p.K, p.P, p.Q)
    arguments = dict(geometry=p.geometry)
    if kind != "dgrad":
        arguments["x"] = rand(*x, kind=dtype)
    if kind != "wgrad":
        arguments["w"] = rand(*w, kind=dtype)
    if kind != "fprop":
        arguments["dy"] = rand(*y, kind=dtype)
    if "prologue" in hooks or "act" in hooks:
        arguments["stat"] = stat(p.C)
    if "bias" in hooks:
        arguments["bias"] = rand(p.K)
    if "residual" in hooks:
        arguments["residual"] = rand(*y, kind=dtype)
    if "relu" in hooks:
        arguments["relu"] = True
    if "pre" in hooks:
        arguments["pre"] = (rand(*y, kind=dtype), stat(p.K), rand(3, p.K))
    if "add" in hooks:
        arguments["add"] = rand(*x, kind=dtype)
    if "act" in hooks:
        arguments["act"] = rand(*x, kind=dtype)
    outputs = {"fprop": dict(out=empty(*y)), "dgrad": dict(dx=empty(*x)), "wgrad": dict(dw=empty(*w))}[kind]
    if "y" in hooks:
        outputs["y"] = empty(*x)
    if "stats" in hooks:
        outputs["part"] = empty(3, 1, p.K, kind=torch.float32)
    if "reduce" in hooks:
        outputs["part"] = empty(2, 1, p.C, kind=torch.float32)
    return arguments, outputs


#: What cuDNN asks a device for, as it stores it; the values of an H100.
H100 = {
    **dict(deviceName="H100", deviceVer=900, driverVer=13000, cudaDeviceId=0, pciDeviceId=0, isTccDriver=0),
    **dict(multiProcessorCount=132, smCountOrigin=0, warpSize=32, supportCoopLaunch=1, maxCtasPerSM=32),
    **dict(maxGridSize=[2147483647, 65535, 65535], maxBlockSize=[1024, 1024, 64], maxThreadsPerBlock=1024),
    **dict(maxThreadsPerSM=2048, regsPerBlock=65536, maxRegistersPerSM=65536, maxSharedMemoryPerBlock=49152),
    **dict(maxSharedMemoryPerBlockOptin=232448, reservedSharedMemoryPerBlock=1024, totalGlobalMem=80 * 2**30),
    **dict(smClockRateKHz=1980000, memClockRateKHz=2619000, l2CacheSize=50 * 2**20),
}


def forget():
    for cached in (cudnn_plans.missing, cudnn_plans.plans, cudnn._candidates, cudnn._served, cudnn._device_reason):
        cached.cache_clear()
    cudnn_plans._contexts.__dict__.clear()


def pretend_device(monkeypatch) -> None:
    """CPU tensors pass for those of an 8.0 GPU."""
    monkeypatch.setattr(cudnn, "_index", lambda device: 0)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: types.SimpleNamespace(cuda_stream=7))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 92400)


def launch(kind, arguments, outputs, config):
    getattr(cudnn, f"conv_{kind}")(**arguments, **outputs, config=config)
