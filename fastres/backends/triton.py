"""The Triton kernels behind the launch signature: CUDA tensors, or CPU tensors under ``TRITON_INTERPRET=1``.

Triton is imported on first use, not with fastres: most CPU users never need it.
float64 is not served (the kernels accumulate in float32); neither is bfloat16 under the interpreter, which
truncates where the hardware rounds to nearest even.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import sys

import torch

from fastres.backends import native
from fastres.backends.replay import replayed
from fastres.backends.trusted import SIGNATURES, Trusted, current_device

name = "triton"

#: Oldest GPU the kernels are compiled for and checked against (docs/kernels/triton.md).
MIN_CAPABILITY = (8, 0)

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@functools.cache
def interpreting() -> bool:
    """Whether Triton runs its kernels on the CPU. Fixed at first use: Triton reads it as the kernels load."""
    return os.environ.get("TRITON_INTERPRET", "0").strip().lower() in ("1", "true", "on", "yes", "y")


@functools.cache
def _kernels():
    interpreting()
    return importlib.import_module("fastres.triton_kernels")


@functools.cache
def _missing() -> str:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    try:
        _kernels()
    except ImportError as error:
        return f"fastres.triton_kernels cannot be imported: {error}"
    return ""


def _device_reason(device: torch.device) -> str:
    if device.type == "cpu":
        return "" if interpreting() else "CPU tensors are served under TRITON_INTERPRET=1 only"
    if device.type != "cuda":
        return f"CUDA tensors are served, not {device.type}"
    if interpreting():
        return "TRITON_INTERPRET=1 is set: kernels run on the CPU, CUDA tensors are not served"
    if torch.version.cuda is None or not torch.cuda.is_available():
        return "no CUDA device is available (and TRITON_INTERPRET=1 is not set)"
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        return "compute capability {}.{} or later is needed, got {}.{}".format(*MIN_CAPABILITY, *capability)
    return ""


def why_not(request) -> list[str]:
    """Reasons why these kernels cannot serve ``request`` (`fastres.dispatch.Request`); empty if they can."""
    reasons = [_device_reason(request.device)]
    if request.dtype not in _DTYPES:
        reasons.append(f"float32, bfloat16 and float16 are served, not {str(request.dtype).removeprefix('torch.')}")
    elif request.dtype == torch.bfloat16 and interpreting():
        reasons.append("Triton's interpreter truncates bfloat16 instead of rounding to nearest even")
    # Triton is imported only where nothing else stands in the way.
    if not any(reasons):
        reasons.append(_missing())
    return [reason for reason in reasons if reason]


def tiles(M: int, C: int) -> int:
    """Row tiles T of a reduction over ``[M, C]``: by shape alone, whatever the GPU."""
    return _kernels().tiles(M, C)


class _Checks(native.Launcher):
    """The argument checks of `native.Launcher`, which end where C++ would be called."""

    def _args(self, fn: str, name: str, like) -> native.Arguments:
        arguments = super()._args(fn, name, like)
        if arguments.dtype not in _DTYPES:
            raise TypeError(f"{fn}: {name} must be float32, bfloat16 or float16 for Triton, got {arguments.dtype}")
        return arguments

    def invoke(self, fn: str, device: torch.device, *addresses) -> None:
        """Nothing: the kernel takes the tensors themselves, see `_launch`."""


@functools.cache
def _checks() -> _Checks:
    return _Checks(None, "cpu" if interpreting() else "cuda", lambda device: 0)


def _launch(fn: str):
    def launch(*args, **kwargs):
        getattr(_checks(), fn)(*args, **kwargs)
        kernel = getattr(_kernels(), fn)
        # Triton launches on the current device; the checks made sure that the tensors share one.
        device = next(t.device for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor))
        if device.type == "cuda" and device.index != current_device():
            with torch.cuda.device(device):
                kernel(*args, **kwargs)
        else:
            kernel(*args, **kwargs)

    launch.__name__ = launch.__qualname__ = fn
    launch.__doc__ = f"``{fn}`` of ``csrc/launch.h``: arguments checked, then the Triton kernel launched."
    return launch


# One adapter each: the checks know the arguments, `fastres.triton_kernels` the launch.
for _fn in native.FUNCTIONS:
    globals()[_fn] = _launch(_fn)


@functools.cache
def _unchecked() -> dict:
    launchers = _kernels()
    if interpreting():
        return {fn: getattr(launchers, fn) for fn in SIGNATURES}
    return {fn: replayed(getattr(launchers, fn), signature) for fn, signature in SIGNATURES.items()}


class _Trusted(Trusted):
    """Filled on first use, for the sake of importing Triton late."""

    def __init__(self, checked):
        super().__init__(checked, {})

    def __getattr__(self, name: str):
        if name not in SIGNATURES:
            return super().__getattr__(name)
        self.__dict__.update(_unchecked())
        return self.__dict__[name]


#: The launch functions without their checks, for the ops.
trusted = _Trusted(sys.modules[__name__])
