"""Evaluation blocks and stems as a kernel for all of one would see them, or why their geometry is no kernel's."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from fastres.backends.block_kernels import BottleneckShape
from fastres.backends.eval_kernels import BasicBlockShape, StemShape

#: What a kernel is asked for.
Shape = BottleneckShape | BasicBlockShape | StemShape


class Unit(NamedTuple):
    """What a convolution is, as far as a kernel must know."""

    name: str
    weight: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...] = (1, 1)
    groups: int = 1

    @classmethod
    def of(cls, name: str, conv) -> Unit:
        weight = tuple(conv.weight.shape)
        dilation = (1, 1) if weight[2:] == (1, 1) else tuple(conv.dilation)  # a pointwise one has nothing to spread
        return cls(name, weight, tuple(conv.stride), tuple(conv.padding), dilation, conv.groups)

    def differs(self, wanted: Unit) -> list[str]:
        """Each property that is not the wanted one: what was got, and what is expected."""
        return [
            f"{self.name} has {field} {_words(got)}, expected {_words(expected)}"
            for field, got, expected in zip(self._fields[1:], self[1:], wanted[1:], strict=True)
            if got != expected
        ]


def _words(value) -> str:
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)


@dataclasses.dataclass(frozen=True)
class Unserved:
    """A block or stem whose geometry no kernel has, on x of ``sizes``. ``units``: its convolutions in order, of a block
    the projection last; ``others``: what else is in the way, in words."""

    op: str
    sizes: tuple[int, ...]
    units: tuple[Unit, ...]
    projected: bool = False
    others: tuple[str, ...] = ()

    def __str__(self) -> str:
        main = self.units[: len(self.units) - self.projected]
        outputs = [str(unit.weight[0]) for unit in (main if self.op == "bottleneck" else main[-1:])]
        words = f"{self.op.replace('_', ' ')} {_words(self.sizes)} -> {' -> '.join(dict.fromkeys(outputs))}"
        for field in ("stride", "dilation", "groups"):
            largest = max(getattr(unit, field) for unit in main)
            if largest not in (1, (1, 1)):
                words += f", {field} {_words(largest)}"
        return words if self.op == "stem" else f"{words} with {'a projection' if self.projected else 'an identity'}"

    @property
    def reasons(self) -> list[str]:
        """Why no kernel serves it: what was got, and what is expected."""
        reasons = list(self.others)
        if self.op == "stem":
            wanted = [Unit("conv1", (StemShape.K, 3, 7, 7), (2, 2), (3, 3))]
        else:
            main = [unit.weight[0] for unit in self.units[: len(self.units) - self.projected]]
            wanted = [
                Unit("", weight, (1, 1), (weight[2] // 2,) * 2)
                for weight in _weights(self.sizes[1], main, self.projected)
            ]
            if len(main) not in (2, 3):
                reasons.append(f"has {len(main)} convolutions, expected two or three")
            if len(main) == 2 and self.projected:
                reasons.append("has a projection, expected the identity")
        # Where the number of convolutions is another one, nothing more is to be said of each.
        pairs = zip(self.units, wanted, strict=False)
        return reasons + [reason for unit, expected in pairs for reason in unit.differs(expected)]


def _weights(C: int, outputs: Sequence[int], projected: bool) -> list[tuple[int, ...]]:
    """The weights' shapes in a block from ``C`` channels that a kernel may serve, by its convolutions' outputs; of the
    projection, too. Empty for other numbers of convolutions than two and three."""
    if len(outputs) == 2:
        return [(C, C, 3, 3)] * 2
    if len(outputs) != 3:
        return []
    mid, K = outputs[0], outputs[2] if projected else C
    return [(mid, C, 1, 1), (mid, mid, 3, 3), (K, mid, 1, 1)] + [(K, C, 1, 1)] * projected


def shape_of(x: Tensor, convs, shortcut) -> BottleneckShape | BasicBlockShape | Unserved:
    """The block as a kernel would see it: 1x1, 3x3, 1x1 of stride 1, or 3x3, 3x3 of stride 1 with the identity.
    Everything else is :class:`Unserved`."""
    N, C, H, W = x.shape
    projected = shortcut is not None
    units = (*convs, shortcut) if projected else tuple(convs)
    outputs = [conv.weight.shape[0] for conv in convs]
    wanted = _weights(C, outputs, projected)
    if len(wanted) != len(units) or not all(map(_is, units, wanted)):
        names = [f"conv{i}" for i in range(1, len(convs) + 1)] + ["the projection"] * projected
        op = "basic_block" if len(convs) == 2 else "bottleneck"
        return Unserved(op, (N, C, H, W), tuple(map(Unit.of, names, units)), projected)
    if len(convs) == 2:
        return BasicBlockShape(N, H, W, C)
    return BottleneckShape(N, H, W, C, outputs[0], outputs[2], projected)


def stem_shape(x: Tensor, conv, kernel: int, stride: int, padding: int) -> StemShape | Unserved:
    """The stem as a kernel would see it; :class:`Unserved` where its geometry is not that of a ResNet; pooling as
    given."""
    others = []
    if (kernel, stride, padding) != (3, 2, 1):
        got = f"window {kernel}, stride {stride}, padding {padding}"
        others.append(f"max pooling has {got}, expected window 3, stride 2, padding 1")
    if x.shape[1] != 3:
        others.append(f"the input has {x.shape[1]} channels, expected 3")
    if max(x.stride()[1:]) >= 2**31:  # addresses inside an image take 32 bits
        others.append(f"the input has strides {_words(x.stride())}, expected those inside an image below 2**31")
    if others or not _is(conv, (StemShape.K, 3, 7, 7), 2):
        return Unserved("stem", tuple(x.shape), (Unit.of("conv1", conv),), False, tuple(others))
    return StemShape(x.shape[0], *x.shape[2:])


def _is(conv, weight: tuple[int, ...], stride: int = 1) -> bool:
    """Whether ``conv`` has a weight of this shape, this stride, half the kernel for padding, neither groups nor
    dilation."""
    given = (conv.weight.shape, conv.stride, conv.padding, conv.groups)
    fits = given == (weight, (stride,) * 2, (weight[2] // 2,) * 2, 1)
    return fits and (weight[2] == 1 or conv.dilation == (1, 1))


#: What `fastres doctor` asks about: the stem and blocks of stride 1 in the first two stages of ResNet-18 and 50.
TYPICAL = (
    StemShape(8, 224, 224),
    BasicBlockShape(8, 56, 56, 64),
    BasicBlockShape(8, 28, 28, 128),
    BottleneckShape(8, 56, 56, 64, 64, 256, True),
    BottleneckShape(8, 56, 56, 256, 64, 256, False),
    BottleneckShape(8, 28, 28, 512, 128, 512, False),
)

#: What `fastres doctor` tells of as never served: the blocks of stride 2 that begin ResNet-50's and 18's second stage.
TYPICALLY_UNSERVED = (
    Unserved(
        "bottleneck",
        (8, 256, 56, 56),
        (
            Unit("conv1", (128, 256, 1, 1), (1, 1), (0, 0)),
            Unit("conv2", (128, 128, 3, 3), (2, 2), (1, 1)),
            Unit("conv3", (512, 128, 1, 1), (1, 1), (0, 0)),
            Unit("the projection", (512, 256, 1, 1), (2, 2), (0, 0)),
        ),
        True,
    ),
    Unserved(
        "basic_block",
        (8, 64, 56, 56),
        (
            Unit("conv1", (128, 64, 3, 3), (2, 2), (1, 1)),
            Unit("conv2", (128, 128, 3, 3), (1, 1), (1, 1)),
            Unit("the projection", (128, 64, 1, 1), (2, 2), (0, 0)),
        ),
        True,
    ),
)
