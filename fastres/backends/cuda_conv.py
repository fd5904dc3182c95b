"""The CUDA C++ convolutions behind the signatures of ``reference_conv.py``, plus ``config``: a row of `TILES`.

Forward only: ``csrc/cuda/conv_fprop.cuh``, an implicit GEMM on tensor cores, from compute capability 8.0 on. CUDA
tensors go to the GPU, CPU tensors to the emulator, which runs the same source. Arguments are checked here, before
anything is written: device, dtype, shape, layout, alignment. ``part`` has ``conv_parts(kind, problem, config)`` tiles.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from fastres.backends import conv_checks
from fastres.backends.cuda import cuda, emulator
from fastres.backends.native import _flag
from fastres.backends.trusted import DTYPE_CODE
from fastres.problem import ConvProblem, ConvRequest, problem_of


@dataclass(frozen=True)
class TileConfig:
    """One compiled tile, a row of ``choose`` in ``csrc/cuda/conv_fprop.cu``.

    BM          output pixels of a tile; BN: output channels; BK: input channels a step.
    stages      steps that are in flight or multiplied at a time.
    warps       of the eight, side by side along pixels.
    blocks      resident on a multiprocessor, as the registers allow it.
    """

    BM: int
    BN: int
    BK: int
    stages: int
    warps: int
    blocks: int

    def __str__(self) -> str:
        return f"fprop {self.BM}|{self.BN}|{self.BK} s{self.stages}"

    @property
    def shared(self) -> int:
        """Bytes of dynamic shared memory of a block: the stages."""
        return 2 * self.stages * (self.BM + self.BN) * self.BK

    @property
    def moments(self) -> int:
        """Bytes of shared memory that the kernel declares beside, for the statistics of its warps."""
        return 8 * self.warps * self.BN


TILES = (
    TileConfig(128, 128, 32, 4, 2, 2),
    TileConfig(256, 128, 32, 3, 4, 1),
    TileConfig(128, 64, 64, 3, 4, 2),
    TileConfig(256, 64, 32, 4, 4, 2),
    TileConfig(64, 128, 64, 3, 2, 2),
    TileConfig(128, 32, 64, 3, 8, 2),
)

_DTYPES = ("bfloat16", "float16")
_HOOKS = {"bias", "residual", "relu", "stats"}
_TAPS, _LIMIT = 7, 2**31
#: Products in the time that an element takes from L2 to a multiprocessor, about: it orders the candidates.
_LOAD = 32
#: Tiles of ``part`` that are left over, at most: whoever finishes the statistics wants hundreds, not thousands.
_SHORT = 128


def _blocks(size: int, block: int) -> int:
    return -(-size // block)


def _kernels(device: int):
    """The launch functions for a GPU's index, or those of the emulator for -1."""
    return emulator if device < 0 else cuda


def _device(device: int) -> torch.device:
    return torch.device("cpu") if device < 0 else torch.device("cuda", device)


def _span(p: ConvProblem, config: TileConfig) -> int:
    """Elements of x that a tile's offsets may be apart."""
    image = p.H * p.W * p.C
    return (config.BM // (p.P * p.Q) + 2) * image + (p.padding[0] + p.R * p.dilation[0]) * p.W * p.C


def why_not(request: ConvRequest) -> list[str]:
    """Reasons why these kernels cannot serve a ``fastres.problem.ConvRequest``; empty if they can."""
    p, kernels = request.problem, _kernels(request.device)
    reasons = [reason for reason in (kernels.missing, kernels._device_reason(_device(request.device))) if reason]
    if request.kind != "fprop":
        return [*reasons, f"fprop is served, not {request.kind}"]
    if request.dtype not in _DTYPES:
        reasons.append(f"bfloat16 and float16 are served, not {request.dtype}")
    unknown = sorted(set(request.hooks) - _HOOKS)
    if unknown:
        reasons.append(f"operands go from memory to the tensor cores as they are: no {', '.join(unknown)}")
    if "stats" in request.hooks and {"relu", "residual"} & set(request.hooks):
        reasons.append("statistics are those of an output without ReLU and residual")
    if p.C % (8 * p.groups) or p.K % (8 * p.groups):
        channels = f"{p.C / p.groups:g} and {p.K / p.groups:g}"
        reasons.append(f"channels of a group must be multiples of 8, got {channels}")
    if max(p.R, p.S) > _TAPS:
        reasons.append(f"filters of up to {_TAPS} taps an axis are served, not {p.R}x{p.S}")
    if 0 in p.elements:
        return [*reasons, "a tensor is empty"]
    if p.elements[1] >= _LIMIT or p.N * p.P * p.Q + max(c.BM for c in TILES) >= _LIMIT:
        reasons.append("w must have fewer than 2**31 elements, out fewer than 2**31 pixels")
    if all(_span(p, config) >= _LIMIT for config in TILES):
        reasons.append("what a tile spans of x must have fewer than 2**31 elements")
    return reasons


def conv_candidates(request: ConvRequest) -> tuple[TileConfig, ...]:
    """Configurations for ``request``, the likeliest winner first; () where none can serve."""
    if why_not(request):
        return ()
    p = request.problem
    chip, columns, pixels = _kernels(request.device).chip(_device(request.device)), p.K // p.groups, p.N * p.P * p.Q
    found = [c for c in TILES if c.shared + c.moments <= chip.shared_per_block and _span(p, c) < _LIMIT]
    narrowest = min(c.BN for c in found)
    found = [c for c in found if c.BN <= max(narrowest, 1 << (columns - 1).bit_length())]

    def cost(config: TileConfig) -> int:
        # Products of whole waves of tiles, padding counted, and what is loaded for them.
        tiles = _blocks(pixels, config.BM) * _blocks(columns, config.BN) * p.groups
        waves = _blocks(tiles, chip.multiprocessors * config.blocks) * config.blocks
        depth = _blocks(p.C // p.groups, config.BK) * config.BK
        return waves * depth * (config.BM * config.BN + _LOAD * (config.BM + config.BN))

    return tuple(sorted(found, key=cost))


def _tiles(problem: ConvProblem, config: TileConfig) -> int:
    """Tiles of pixels, each with statistics of its own."""
    return _blocks(problem.N * problem.P * problem.Q, config.BM)


def conv_parts(kind: str, problem: ConvProblem, config: TileConfig) -> int:
    """Tiles T of the ``part`` that a launch fills."""
    T = _tiles(problem, config)
    return T if T <= _SHORT else _blocks(T, _blocks(T, _SHORT))


@functools.lru_cache(maxsize=4096)
def _plan(x_shape, w_shape, geometry, config: TileConfig) -> tuple:
    """(sizes of x, sizes of w and the geometry, tile, tiles of pixels), as the launch takes them."""
    p = problem_of(x_shape, w_shape, geometry)
    filters = (p.K, p.R, p.S, *p.stride, *p.padding, *p.dilation, p.groups)
    return (p.N, p.H, p.W, p.C), filters, TILES.index(config), _tiles(p, config)


def conv_fprop(x, w, geometry, out, *, stat=None, bias=None, residual=None, relu=False, part=None, config):
    """See ``reference_conv.conv_fprop``; without ``stat``. bias float32, part float32 [3, conv_parts, K].

    Raises TypeError or ValueError naming the argument before anything is written.
    """
    fn = "conv_fprop"
    for name, t in (("x", x), ("w", w)):
        if not isinstance(t, torch.Tensor) or t.dim() != 4:
            raise ValueError(f"{fn}: {name} must have four dimensions, got {getattr(t, 'shape', type(t).__name__)}")
    if config not in TILES:
        raise ValueError(f"{fn}: config must be one of {', '.join(map(str, TILES))}, got {config}")
    if stat is not None:
        raise ValueError(f"{fn}: stat must be None, operands are loaded as they are")
    given = {"bias": bias is not None, "residual": residual is not None, "relu": _flag(fn, "relu", relu),
             "stats": part is not None}  # fmt: skip
    problem = problem_of(x.shape, w.shape, geometry)
    index = x.device.index if x.device.type == "cuda" else -1
    hooks = tuple(sorted(hook for hook, there in given.items() if there))
    request = ConvRequest(fn[5:], problem, str(x.dtype).removeprefix("torch."), hooks, index)
    reasons = why_not(request)
    if _span(problem, config) >= _LIMIT and not reasons:
        reasons = [f"what a tile of {config} spans of x must have fewer than 2**31 elements"]
    if reasons:
        raise ValueError(f"{fn}: {request} is not served: {'; '.join(reasons)}")
    y, filters = (problem.N, problem.K, problem.P, problem.Q), (problem.K, problem.C // problem.groups, *w.shape[2:])
    for name, t, shape in (("x", x, x.shape), ("w", w, filters), ("out", out, y), ("residual", residual, y)):
        if t is not None or name != "residual":
            conv_checks.activation(fn, name, t, x, shape, "the CUDA kernels")
    parts = conv_parts("fprop", problem, config)
    for name, t, shape in (("bias", bias, (problem.K,)), ("part", part, (3, parts, problem.K))):
        if t is not None:
            conv_checks.vector(fn, name, t, x.device, shape)
    for name, t in (("x", x), ("w", w), ("bias", bias), ("residual", residual), ("part", part)):
        if t is not None and conv_checks.overlap(t, out):
            raise ValueError(f"{fn}: out must not overlap {name} in memory")
    trusted.conv_fprop(x, w, geometry, out, bias=bias, residual=residual, relu=relu, part=part, config=config)


class _Trusted:
    """The same functions without their checks, for ops that allocated or checked every argument themselves."""

    conv_parts = staticmethod(conv_parts)

    @staticmethod
    def conv_fprop(x, w, geometry, out, *, stat=None, bias=None, residual=None, relu=False, part=None, config):
        sizes, filters, tile, T = _plan(x.shape, w.shape, geometry, config)
        device = x.device
        kernels = cuda if device.type == "cuda" else emulator
        long = part
        if part is not None and part.shape[1] != T:
            long = part.new_empty((3, T, part.shape[2]))
        kernels.invoke(
            "conv_fprop", device, DTYPE_CODE[x.dtype], x.data_ptr(), *sizes, w.data_ptr(), *filters,
            0 if bias is None else bias.data_ptr(), 0 if residual is None else residual.data_ptr(), int(relu),
            0 if long is None else long.data_ptr(), out.data_ptr(), tile,
        )  # fmt: skip
        if long is not part:
            K, G = part.shape[2], part.shape[1]
            kernels.invoke("merge_moments", device, long.data_ptr(), T, K, G, part.data_ptr())


trusted = _Trusted()
