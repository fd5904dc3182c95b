"""Convolutions of the CPU executor: their weights as the kernels read them, and which kernel serves at which size."""

from __future__ import annotations

import functools
import statistics
import threading
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from fastres.backends import cpu, cpu_conv, cpu_winograd
from fastres.inference.plan import Conv, Linear, Shape
from fastres.problem import problem_of

#: Direct sums, or pixels of Winograd's tile, a side.
DIRECT = 0
#: Images that a measurement takes at most, and its runs.
_IMAGES, _RUNS = 8, 5
_MEASURING = threading.Lock()


@dataclass(frozen=True)
class Choice:
    """``out``: `DIRECT` or the tile of Winograd's; ``error``: of that kernel on the layer's own weights against
    float64, relative, on random pixels (0.0: not measured, there was no choice)."""

    out: int
    error: float = 0.0

    def __str__(self) -> str:
        return f"winograd {self.out}x{self.out}" if self.out else "direct"


def flat(node: Linear) -> Conv:
    """A classifier as a 1x1 convolution of images of one pixel."""
    return Conv(node.weight[:, :, None, None], node.bias)


class Packed:
    """One convolution's weights, laid out once for each kernel and instruction set that asked for them."""

    def __init__(self, conv: Conv):
        self.conv = conv
        self.weight = conv.weight.float().contiguous(memory_format=torch.channels_last)
        self.bias = conv.bias.float().contiguous()
        self._held: dict[tuple[str, int | str], Tensor] = {}
        self._choices: dict[tuple, Choice] = {}

    def get(self, isa: str, kind: int | str) -> Tensor:
        """For `DIRECT`, Winograd's tile, or "stem"."""
        found = self._held.get((isa, kind))
        if found is None:  # two threads may both pack: either result serves
            with torch.inference_mode(False), torch.no_grad():
                if kind == "stem":
                    found = cpu_conv.pack_stem(self.weight)
                else:
                    found = cpu_winograd.pack(self.weight, kind) if kind else cpu_conv.pack(self.weight)
            self._held[isa, kind] = found
        return found

    def drop(self, isa: str, kind: int) -> None:
        self._held.pop((isa, kind), None)

    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.weight, self.bias, *self._held.values()))

    def choice(self, shape: Shape, dtype: torch.dtype, precision: str) -> Choice:
        """The fastest kernel for an input of ``shape``, as measured once for sizes like it in tens of milliseconds."""
        if precision == "exact":
            return Choice(DIRECT)
        probe = torch.empty(1, dtype=dtype).expand(shape)
        if cpu_winograd.why_not(probe, torch.empty(1, dtype=dtype).expand(self.weight.shape), self.conv.geometry):
            return Choice(DIRECT)
        pixels = shape[0] * shape[2] * shape[3]
        key = (cpu.isa(), torch.get_num_threads(), dtype, pixels.bit_length())
        found = self._choices.get(key)
        if found is None:
            with _MEASURING:  # two measurements at a time would disturb each other
                found = self._choices.get(key) or self._measured(shape, dtype)
                self._choices[key] = found
                kept = {c.out for (isa, *_), c in self._choices.items() if isa == cpu.isa()}
                for kind in {DIRECT, *cpu_winograd.OUTS} - kept:
                    self.drop(cpu.isa(), kind)
        return found

    def _measured(self, shape: Shape, dtype: torch.dtype) -> Choice:
        x = torch.randn((min(shape[0], _IMAGES), *shape[1:]), generator=torch.Generator().manual_seed(0))
        x = x.to(dtype).to(memory_format=torch.channels_last)
        key = tuple(x.shape), tuple(self.weight.shape), self.conv.padding, dtype, cpu.isa(), torch.get_num_threads()
        out = _fastest.get(key)
        if out is None:
            seconds: dict[int, list[float]] = {kind: [] for kind in (DIRECT, *cpu_winograd.OUTS)}
            for _ in range(_RUNS):
                for kind, times in seconds.items():
                    begin = time.perf_counter()
                    self(x, kind)
                    times.append(time.perf_counter() - begin)
            # The first run of each packs the weights.
            out = _fastest[key] = min(seconds, key=lambda kind: statistics.median(seconds[kind][1:]))
        return Choice(out, self._error(x[:1, :, :16, :16], out))

    def _error(self, x: Tensor, kind: int) -> float:
        with torch.inference_mode(False), torch.no_grad():
            x = x.float().clone(memory_format=torch.channels_last)
            truth = torch.nn.functional.conv2d(x.double(), self.weight.double(), padding=self.conv.padding)
            found = (
                cpu_winograd.fprop(x, self.get(cpu.isa(), kind), len(self.bias), self.conv.padding, kind)
                if kind
                else cpu_conv.fprop(x, self.weight, self.conv.geometry, packed=self.get(cpu.isa(), kind))
            )
            return float((found.double() - truth).norm() / truth.norm().clamp(min=1e-300))

    def __call__(self, x: Tensor, kind: int) -> Tensor:
        packed = self.get(cpu.isa(), kind)
        if kind:
            return cpu_winograd.fprop(x, packed, len(self.bias), self.conv.padding, kind, self.bias, None, True)
        return cpu_conv.fprop(x, self.weight.to(x.dtype), self.conv.geometry, self.bias, None, True, packed=packed)


#: What was measured in this process: (input, weight, padding, dtype, instruction set, threads) -> kernel.
_fastest: dict[tuple, int] = {}


@functools.lru_cache(maxsize=4096)
def sizes(shape: Shape, weight: Shape, geometry) -> tuple[int, ...]:
    """The fields of csrc/cpu/conv.h: ConvShape."""
    return cpu_conv.sizes(problem_of(shape, weight, geometry))
