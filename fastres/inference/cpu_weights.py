"""Convolutions of the CPU executor: their weights as the kernels read them, and which kernel serves at which size."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from fastres.backends import cpu, cpu_conv, cpu_matrix, cpu_strassen, cpu_winograd
from fastres.inference.fitting import Fit, fit
from fastres.inference.plan import Block, Conv, Linear, Shape
from fastres.problem import problem_of

#: Direct sums, by products of floats or of pairs of bfloat16, or pixels of Winograd's tile, a side, or the matrix unit:
#: less than none, as many as its products of bfloat16 for one of the dtype; or Strassen's: less than none,
#: as many as its products of parts; by them, its levels.
DIRECT, PAIRS, MATRIX, STRASSEN = 0, -2, (-1, -3), {-7: 1, -49: 2}
#: What `cpu_conv.pairs_unit` must find for pairs to be asked.
PAIRED = {"full"}
#: What must execute the matrix unit's instructions (`cpu_matrix.unit`) for it to be asked.
UNITS = {"instructions"}
_LINE = 16  # floats


@dataclass(frozen=True)
class Choice:
    """``out``: `DIRECT`, of `STRASSEN`, the tile of Winograd's or the matrix unit's; ``error``: its `Packed.error`
    (0.0: not measured); ``whole``: with all of its block, depth first."""

    out: int
    error: float = 0.0
    whole: bool = False

    @property
    def algorithm(self) -> str:
        """Of fewer products than direct sums have, if it is one."""
        return "winograd" if self.out > DIRECT else "strassen" if self.out in STRASSEN else ""

    def __str__(self) -> str:
        if self.out in MATRIX:
            name = "matrix bf16" if self.out == -1 else f"matrix {-self.out} x bf16"
            return f"{name}, depth first" if self.whole else name
        if self.algorithm:
            return f"winograd {self.out}x{self.out}" if self.out > DIRECT else f"strassen {-self.out}"
        return "direct" if self.out == DIRECT else "direct, pairs of bf16"


def matrix(dtype: torch.dtype, precision: str) -> tuple[int, ...]:
    """The matrix unit's kernel for a dtype, where the precision allows it and the unit is there. Products of bfloat16
    lose nothing, whatever the precision."""
    if dtype == torch.float64 or cpu_matrix.unit() not in UNITS:
        return ()
    if dtype == torch.bfloat16:
        return (-1,)
    return () if precision == "exact" or (dtype == torch.float32 and precision != "high") else (-3,)


def paired(dtype: torch.dtype) -> bool:
    """Whether pairs of bfloat16 serve a dtype here: they are as the matrix unit's products, whatever the precision."""
    return dtype == torch.bfloat16 and cpu_conv.pairs_unit() in PAIRED


def fitted_kind(kind: int, dtype: torch.dtype) -> int:
    """The kernel of a convolution that was fitted to small images, where ``kind`` is that of the whole one."""
    if kind in (DIRECT, PAIRS, *MATRIX):
        return kind
    return PAIRS if paired(dtype) else DIRECT


def whole(node, dtype: torch.dtype, precision: str) -> tuple[int, ...]:
    """The matrix unit's kernel for a whole node, as `matrix`, where there is one and a choice is allowed."""
    if not isinstance(node, Block) or precision == "exact":
        return ()
    shapes = [(tuple(c.weight.shape), c.geometry) for c in node.convs()]
    return () if cpu_matrix.block_why_not(shapes, node.shortcut is not None) else matrix(dtype, precision)


def flat(node: Linear) -> Conv:
    """A classifier as a 1x1 convolution of images of one pixel."""
    return Conv(node.weight[:, :, None, None], node.bias)


class Packed:
    """One convolution's weights, laid out once for each kernel and instruction set that asked for them."""

    def __init__(self, conv: Conv, stem: bool = False, pixels: bool = True):
        """``pixels``: whether images have more than one."""
        self.conv, self.stem, self.pixels = conv, stem, pixels
        self.weight = conv.weight.float().contiguous(memory_format=torch.channels_last)
        self.bias = conv.bias.float().contiguous()
        self._held: dict[tuple[str, int], Tensor] = {}
        self._moved: set[tuple[str, int]] = set()
        #: For images so small that not all taps meet them.
        self._fitted: dict[Fit, Packed] = {}

    def fitted(self, shape: Shape) -> tuple[Packed, Shape]:
        """What computes the same of an input of ``shape`` with no more weights than that needs, and the shape that it
        takes the input as; itself where it needs all."""
        found = None if self.stem else fit(self.weight.shape, self.conv.geometry, shape[2:])
        if found is None:
            return self, shape
        if found not in self._fitted:  # as in `get`
            self._fitted[found] = Packed(found.conv(self.conv))
        return self._fitted[found], found.shape(shape)

    def everything(self) -> list[Packed]:
        """Itself and what was fitted."""
        return [self, *self._fitted.values()]

    def get(self, isa: str, kind: int) -> Tensor:
        """For a kernel of `Choice.out`."""
        found = self._held.get((isa, kind))
        if found is None:  # two threads may both pack: either result serves
            with torch.inference_mode(False), torch.no_grad():
                if kind in (DIRECT, PAIRS):
                    w, pairs = self.weight, kind == PAIRS
                    found = cpu_conv.pack_stem(w, pairs) if self.stem else cpu_conv.pack(w, self.conv.groups, pairs)
                elif kind in MATRIX:
                    operands = torch.bfloat16 if kind == -1 else torch.float32
                    if self.stem:
                        found = cpu_matrix.pack_stem(self.weight, operands)
                    else:
                        found = cpu_matrix.pack(self.weight, operands, self.conv.groups)
                elif kind in STRASSEN:
                    found = cpu_strassen.pack(self.weight, STRASSEN[kind])
                else:
                    found = cpu_winograd.pack(self.weight, kind, self.conv.stride[0])
            self._held[isa, kind] = found
        return found

    def keep(self, isa: str, kinds: set[int], dtype: torch.dtype) -> None:
        """Forget what was laid out for an instruction set and is not needed any more."""
        for p in self._fitted.values():
            p.keep(isa, {fitted_kind(kind, dtype) for kind in kinds}, dtype)
        for held, kind in list(self._held):
            if held == isa and kind not in kinds:
                self._held.pop((held, kind), None)
                self._moved.discard((held, kind))

    def scattered(self, isa: str) -> dict[int, Tensor]:
        """What is laid out for an instruction set and not part of a block, by kernel."""
        return {kind: t for (of, kind), t in self._held.items() if of == isa and (of, kind) not in self._moved}

    def moved(self, isa: str, kind: int, packed: Tensor) -> None:
        self._held[isa, kind] = packed
        self._moved.add((isa, kind))

    def bytes(self) -> int:
        tensors = (t for p in self.everything() for t in (p.weight, p.bias, *p._held.values()))
        return sum(t.numel() * t.element_size() for t in tensors)

    def kinds(self, dtype: torch.dtype, precision: str) -> tuple[int, ...]:
        """The kernels that can serve; one under "exact", whose bits do not depend on the clock."""
        pairs = paired(dtype) and (self.stem or cpu_conv.groups_serve(self.weight.shape, self.conv.groups, True))
        direct = PAIRS if pairs else DIRECT
        if self.stem:
            served = not cpu_matrix.stem_why_not(self.weight.shape, self.conv.geometry)
            unit = matrix(dtype, precision) if served else ()
            return unit if unit and precision == "exact" else (direct, *unit)
        w = cpu.stand_in(self.weight.shape, dtype)
        x = cpu.stand_in((1, self.conv.inputs, 16, 16), dtype)
        fast = precision != "exact" and not cpu_winograd.why_not(x, w, self.conv.geometry)
        unit = matrix(dtype, precision) if cpu_matrix.groups_serve(self.weight.shape, self.conv.groups) else ()
        if unit and precision == "exact":
            return unit
        fewer = cpu_winograd.outs(self.conv.stride[0], dtype) if fast else ()
        if precision != "exact" and direct == DIRECT and not unit and self.pixels:
            if not cpu_strassen.why_not(x, w, self.conv.geometry):
                fewer += tuple(k for k, n in STRASSEN.items() if min(w.shape[:2]) >= cpu_strassen.LEAST[n])
        return (direct, *fewer, *unit)

    def error(self, out: int) -> float:
        """How far Winograd's tile ``out`` or Strassen's product is from float64 on random pixels, relative, in
        float32."""
        x = cpu.random((1, self.conv.inputs, 16, 16))
        x = x.relu_().contiguous(memory_format=torch.channels_last)
        with torch.inference_mode(False), torch.no_grad():
            # Padding and dilation are other pixels, not other sums.
            stride, padding = self.conv.stride, tuple(n // 2 for n in self.weight.shape[2:])
            truth = torch.nn.functional.conv2d(x.double(), self.weight.double(), None, stride, padding)
            packed, K = self.get(cpu.isa(), out), len(self.bias)
            if out in STRASSEN:
                found = cpu_strassen.fprop(x, packed, K, stride=stride, levels=STRASSEN[out])
            else:
                found = cpu_winograd.fprop(x, packed, K, padding, out, stride=stride[0])
            return float((found.double() - truth).norm() / truth.norm().clamp(min=1e-300))


def gather(packed: list[Packed], isa: str) -> bool:
    """Move what is laid out, and was not moved before, into one block in the order of its use; whether there was any.

    The block has huge pages: a pass over weights in small ones waits long for the tables of pages.
    """
    held = [(p, kind, t) for of in packed for p in of.everything() for kind, t in p.scattered(isa).items()]
    if not held:
        return False
    starts = list(itertools.accumulate((-(-t.numel() // _LINE) * _LINE for *_, t in held), initial=0))
    block = cpu_conv.floats(starts[-1])
    for (p, kind, t), start in zip(held, starts, strict=False):
        p.moved(isa, kind, block[start : start + t.numel()].copy_(t))
    return True


@functools.lru_cache(maxsize=4096)
def sizes(shape: Shape, weight: Shape, geometry) -> tuple[int, ...]:
    """The fields of csrc/cpu/conv.h: ConvShape."""
    return cpu_conv.sizes(problem_of(shape, weight, geometry))
