"""The CUDA C++ kernels behind the launch signature, twice: ``cuda`` on a GPU, ``emulator`` on the host.

Both run the same ``csrc/cuda/*.cu``. The emulator executes every CUDA thread of a block as a fiber, in an order
drawn from ``emulator.seed()``, and raises RuntimeError for a race, a missing barrier or a misaligned access. float64
is not served: the kernels accumulate in float32.
"""

from __future__ import annotations

import functools

import torch

from fastres.backends import block_kernels, eval_kernels, hopper_kernels, native, one_pass, rotated_kernels
from fastres.backends.trusted import Trusted, current_device, current_stream, elsewhere, native_functions

#: Oldest GPU the kernels are compiled for by default (docs/kernels/cuda.md).
MIN_CAPABILITY = (8, 0)

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# csrc/cuda/rows.cuh: kThreads, kVec, lanes of a block at most, kBlocks, kRowsPerThread.
_THREADS, _VEC, _LANES, _BLOCKS, _ROWS_PER_THREAD = 256, 8, 32, 528, 4


@functools.lru_cache(maxsize=4096)
def _tiles(M: int, C: int) -> int:
    groups = -(-C // _VEC)
    channel_blocks = max(1, -(-groups // _LANES))
    lanes = max(1, -(-groups // channel_blocks))
    rows = _THREADS // lanes * _ROWS_PER_THREAD
    return max(1, min(-(-_BLOCKS // channel_blocks), -(-M // rows)))


class _Kernels(
    one_pass.Launcher, block_kernels.Launcher, eval_kernels.Launcher, rotated_kernels.Launcher, native.Launcher
):
    """Launch functions of one compiled module; the signatures are those of ``reference.py``."""

    def __init__(self, name: str, module: str, device_type: str):
        self.name = name
        loaded, self.missing = native.load(module)
        super().__init__(loaded, device_type, self._ctx)

    def _ctx(self, device: torch.device) -> int:
        raise NotImplementedError

    def _device_reason(self, device: torch.device) -> str:
        raise NotImplementedError

    def why_not(self, request) -> list[str]:
        """Reasons why these kernels cannot serve ``request`` (`fastres.dispatch.Request`); empty if they can."""
        reasons = [self.missing, self._device_reason(request.device)]
        if request.dtype not in _DTYPES:
            reasons.append(f"float32, bfloat16 and float16 are served, not {str(request.dtype).removeprefix('torch.')}")
        return [reason for reason in reasons if reason]

    @staticmethod
    def tiles(M: int, C: int) -> int:
        """Row tiles T of a reduction over ``[M, C]``: by shape alone, so that the bits do not depend on the GPU."""
        return _tiles(M, C)

    @functools.cached_property
    def hopper(self) -> hopper_kernels.Hopper:
        """The bottleneck's version for sm_90 alone."""
        return hopper_kernels.Hopper(self)

    def not_hopper(self, device: torch.device) -> str:
        """Why sm_90a code cannot run on ``device``, "" if it can."""
        raise NotImplementedError

    @functools.cached_property
    def trusted(self) -> Trusted:
        """The launch functions without their checks, for the ops."""
        return Trusted(self, self.unchecked())

    def _args(self, fn: str, name: str, like) -> native.Arguments:
        arguments = super()._args(fn, name, like)
        if arguments.dtype not in _DTYPES:
            raise TypeError(f"{fn}: {name} must be float32, bfloat16 or float16 on {self.name!r}, got {like.dtype}")
        return arguments

    def invoke(self, fn: str, device: torch.device, *args) -> None:
        if self.module is None:
            raise RuntimeError(f"{fn}: {self.missing}")
        super().invoke(fn, device, *args)


class _Cuda(_Kernels):
    """On the current stream of the tensors' device, whichever device is current. An error of the launch raises
    RuntimeError here, one inside the kernel at the next synchronisation."""

    def _ctx(self, device: torch.device) -> int:
        return current_stream(device.index)

    def unchecked(self) -> dict:
        return {} if self.module is None else native_functions(self.module, None)

    def _device_reason(self, device: torch.device) -> str:
        if device.type != "cuda":
            return f"CUDA tensors are served, not {device.type}"
        if torch.version.cuda is None or not torch.cuda.is_available():
            return "no CUDA device is available to PyTorch"
        capability = torch.cuda.get_device_capability(device)
        if capability < MIN_CAPABILITY:
            return "compute capability {}.{} or later is needed, got {}.{}".format(*MIN_CAPABILITY, *capability)
        return ""

    def chip(self, device: torch.device) -> one_pass.Chip:
        return one_pass.chip_of(device.index)

    def not_hopper(self, device: torch.device) -> str:
        if not self.module.has_sm90a():
            return "this build has no code for sm_90a (FASTRES_CUDA_ARCHS)"
        capability = torch.cuda.get_device_capability(device)
        return "" if capability == (9, 0) else "compute capability 9.0 is needed, got {}.{}".format(*capability)

    def invoke(self, fn: str, device: torch.device, *args) -> None:
        # The module's own CUDA runtime launches into the context that is current on this thread.
        if device.index == current_device():
            super().invoke(fn, device, *args)
        else:
            elsewhere(device.index, super().invoke, fn, device, *args)


class _Emulator(_Kernels):
    """The seed orders blocks and threads; results must not depend on it."""

    _seed = 0

    def seed(self) -> int:
        """Seed of the order in which blocks and threads run."""
        return self._seed

    def set_seed(self, seed: int) -> None:
        """Choose another order for the launches that follow."""
        if not isinstance(seed, int) or not 0 <= seed < 2**63:
            raise ValueError(f"set_seed: seed must be an integer in [0, 2**63), got {seed!r}")
        self._seed = seed

    def chip(self, device: torch.device) -> one_pass.Chip:
        return one_pass.Chip(**self.module.chip())

    def not_hopper(self, device: torch.device) -> str:
        name = self.chip(device).name
        return "" if name == "sm_90a" else f"sm_90a is needed, got {name}"

    def _ctx(self, device: torch.device) -> int:
        return self._seed

    def _device_reason(self, device: torch.device) -> str:
        return "" if device.type == "cpu" else f"CPU tensors are served, not {device.type}"


cuda = _Cuda("cuda", "_cuda", "cuda")
emulator = _Emulator("emulator", "_emulator", "cpu")
