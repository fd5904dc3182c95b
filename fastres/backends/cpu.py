"""CPU backend: the C++ kernels of ``csrc/cpu`` on CPU tensors (float32, bfloat16, float16, float64).

Threads come from the OpenMP runtime that torch has loaded, and only from there: the extension links none,
it is handed the entry points at import. ``ctx`` of every launch is ``torch.get_num_threads()``.
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

import torch

from . import native
from .trusted import Trusted, native_functions

name = "cpu"

_module, _missing = native.load("_cpu")
_one_thread = ""


def _openmp_symbols() -> tuple[list[int], str]:
    """Addresses of GOMP_parallel, omp_get_thread_num and omp_get_num_threads in torch's OpenMP runtime."""
    library = next(
        (p for p in (Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*") if p.suffix != ".lib"), None
    )
    # Looked up through libtorch_cpu, a symbol resolves to the very runtime torch is linked to, even where other
    # packages have brought their own. A torch that links everything into the process is covered by None.
    # RTLD_NOLOAD: nothing new may be loaded.
    mode = os.RTLD_NOW | getattr(os, "RTLD_NOLOAD", 0)
    try:
        handle = ctypes.CDLL(str(library) if library else None, mode=mode)
        functions = [handle.GOMP_parallel, handle.omp_get_thread_num, handle.omp_get_num_threads]
    except (OSError, AttributeError) as error:
        return [0, 0, 0], f"one thread: torch's OpenMP runtime offers no GOMP_parallel ({error})"
    return [ctypes.cast(f, ctypes.c_void_p).value or 0 for f in functions], ""


def _mapped_file(address: int) -> str:
    """The file an address belongs to, as far as this system tells."""
    maps = Path("/proc/self/maps")
    if address and maps.is_file():
        for line in maps.read_text().splitlines():
            fields = line.split(maxsplit=5)
            lo, hi = (int(x, 16) for x in fields[0].split("-"))
            if lo <= address < hi:
                return fields[5] if len(fields) > 5 else ""
    return ""


_symbols = [0, 0, 0]
if _module is not None:
    _symbols, _one_thread = _openmp_symbols()
    _module.set_openmp(*_symbols)

_launcher = native.Launcher(_module, "cpu", lambda device: torch.get_num_threads())

add_relu_fwd = _launcher.add_relu_fwd
add_relu_bwd = _launcher.add_relu_bwd
bn_stats = _launcher.bn_stats
bn_finalize = _launcher.bn_finalize
bn_fold = _launcher.bn_fold
bn_apply = _launcher.bn_apply
bn_bwd_reduce = _launcher.bn_bwd_reduce
bn_bwd_finalize = _launcher.bn_bwd_finalize
bn_bwd_apply = _launcher.bn_bwd_apply
bias_act = _launcher.bias_act
mask_add = _launcher.mask_add
stem_fwd = _launcher.stem_fwd
stem_bwd_reduce = _launcher.stem_bwd_reduce
stem_bwd_apply = _launcher.stem_bwd_apply


def why_not(request) -> list[str]:
    """Reasons why this backend cannot serve ``request``, [] if it can."""
    reasons = []
    if _module is None:
        reasons.append(_missing)
    if request.device.type != "cpu":
        reasons.append(f"tensors are on {request.device}, the cpu backend serves CPU tensors")
    if request.dtype not in native.DTYPE_CODE:
        reasons.append(f"dtype {request.dtype} is not float32, bfloat16, float16 or float64")
    return reasons


def tiles(M: int, C: int) -> int:
    """Number of row tiles of a reduction over ``[M, C]``: a function of the shape alone, so that the result is the
    same for every number of threads. 128 rows a tile keep the partial sums below 3% of the activations (4 bytes);
    the kernels split tiles into blocks of channels where that leaves threads idle."""
    return max(1, min(128, M // 128))


def wins_wgrad(dy: torch.Tensor, x: torch.Tensor, w: torch.Tensor, groups: int) -> bool:
    """Whether :func:`conv_wgrad` is the faster weight gradient. Measured against oneDNN on 2 cores of a Zen 2, fp32,
    batch 8, the layers of ResNet-50: 1.17x to 1.46x for 3x3; for 1x1, where packing weighs more, 1.06x to 1.35x from
    256 channels on with at most 1568 pixels, 0.6x to 0.87x with 6272 and more; 0.22x for the 3-channel stem. Without
    a measurement on AVX-512 oneDNN keeps the work there."""
    K, C, R, S = w.shape
    pixels = dy.shape[0] * dy.shape[2] * dy.shape[3]
    if groups != 1 or x.dtype != torch.float32 or pixels == 0:
        return False
    wins = min(K, C) >= 32 if R * S >= 9 else min(K, C) >= 256 and pixels <= 2048
    return wins and _module is not None and _module.isa() == "avx2"


def conv_wgrad(dy, x, stride, padding, dilation, dw) -> None:
    """Fill ``dw`` with the weight gradient of a convolution without groups.

    dy ``[N, K, P, Q]``, x ``[N, C, H, W]``, dw ``[K, C, R, S]``: float32 on the CPU, dense channels_last.
    """
    for what, t in (("dy", dy), ("x", x), ("dw", dw)):
        if t.device.type != "cpu" or t.dtype != torch.float32:
            raise TypeError(f"conv_wgrad: {what}: got {t.dtype} on {t.device}, expected float32 on the CPU")
        if not t.is_contiguous(memory_format=torch.channels_last):
            raise ValueError(f"conv_wgrad: {what}: got strides {t.stride()}, expected dense channels_last")
    (N, K, P, Q), (_, C, H, W), (_, _, R, S) = dy.shape, x.shape, dw.shape
    if x.shape[0] != N or dw.shape[:2] != (K, C):
        raise ValueError(f"conv_wgrad: dw: got shape {tuple(dw.shape)}, expected ({K}, {C}, R, S) with one batch size")
    sizes = (N, H, W, C, K, P, Q, R, S, *stride, *padding, *dilation)
    _require().conv_wgrad(0, dy.data_ptr(), x.data_ptr(), sizes, dw.data_ptr(), torch.get_num_threads())


def isa() -> str:
    """Instruction set in use: "avx512", "avx2" or "scalar"."""
    return _require().isa()


def available_isas() -> list[str]:
    """Instruction sets compiled in that this machine can run, the best first."""
    return _require().available_isas()


def set_isa(isa: str) -> None:
    """Use another instruction set from now on; ValueError naming the available ones if it is none of them."""
    _require().set_isa(isa)


def run_info() -> dict:
    """How the backend runs on this machine: extension, instruction sets, threads and where they come from."""
    if _module is None:
        return {"available": False, "reason": _missing}
    return {
        "available": True,
        "file": _module.__file__,
        "isa": _module.isa(),
        "available_isas": _module.available_isas(),
        "threads": torch.get_num_threads() if _module.has_openmp() else 1,
        "openmp": _mapped_file(_symbols[0]) or _one_thread,
    }


def _require():
    if _module is None:
        raise RuntimeError(_missing)
    return _module


#: The launch functions without their checks, for the ops.
trusted = Trusted(sys.modules[__name__], {} if _module is None else native_functions(_module, torch.get_num_threads))
