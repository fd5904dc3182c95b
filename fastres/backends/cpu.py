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


#: Activations from here on come from the pool.
POOL_BYTES = 2 << 20


def empty(shape: tuple[int, int, int, int], dtype: torch.dtype) -> torch.Tensor:
    """An uninitialised dense channels_last tensor ``[N, C, H, W]``.

    A large one lies in memory that is kept when the tensor goes, for the next step's: the C library gives large blocks
    back to the system, and every step pays for fresh pages again (3 us for 4 KiB in a virtual machine, a tenth of a
    training step). The pool holds about as much as was ever in use at once; :func:`release_memory` empties it.
    """
    N, C, H, W = shape
    n = N * C * H * W
    if n * dtype.itemsize < POOL_BYTES or _module is None:
        return torch.empty(shape, dtype=dtype, device="cpu", memory_format=torch.channels_last)
    flat = torch.frombuffer(_module.PoolBlock(n * dtype.itemsize), dtype=dtype, count=n)
    # Not a view of `flat`: PyTorch treats views made without gradients differently when they are written later.
    return torch.empty(0, dtype=dtype, device="cpu").set_(flat.untyped_storage(), 0, shape, (H * W * C, 1, W * C, C))


def stand_in(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A CPU tensor of a shape and dtype that takes no memory, for questions about them; not to be written."""
    return torch.empty(1, dtype=dtype, device="cpu").expand(*shape)


def random(shape: tuple[int, ...]) -> torch.Tensor:
    """Normal float32 values, the same every time, whatever the default device and dtype are."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")


def memory_info() -> dict[str, int]:
    """Bytes of the activations' pool: ``in_use``, and ``peak``, the most in use at once."""
    return dict(zip(("in_use", "peak"), _require().pool_info(), strict=True))


def release_memory() -> None:
    """Give the idle part of the activations' pool back to the system."""
    _require().pool_release()


def isa() -> str:
    """Instruction set in use: "avx512", "avx2" or "scalar"."""
    return _require().isa()


def isa_or_none() -> str | None:
    """:func:`isa`, or None where the extension is missing."""
    return None if _module is None else _module.isa()


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
