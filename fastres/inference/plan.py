"""What a session computes, as plain frozen data: no module, no executor, no shape is baked in.

A plan is a chain of parts. A :class:`Segment` is a chain of nodes whose weights have the BN folded in; an executor
takes it as a whole. A :class:`Foreign` part is a torch module that nobody here knows; known modules inside it are its
slots. Every node maps one tensor to one tensor. Weights are float32 (float64 for a float64 session), channels_last;
executors round and pack them for themselves.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from fastres.ops.params import out_size

#: Activations ``(N, C, H, W)``, or ``(N, features)`` behind the classifier's pooling.
Shape = tuple[int, ...]


def _pair(value, what: str, least: int) -> None:
    ok = isinstance(value, tuple) and len(value) == 2 and all(type(v) is int and v >= least for v in value)
    if not ok:
        raise ValueError(f"{what}: got {value!r}, expected a pair of integers >= {least}")


def _number(value, what: str, least: int) -> None:
    if type(value) is not int or value < least:
        raise ValueError(f"{what}: got {value!r}, expected an integer >= {least}")


def _flag(value, what: str) -> None:
    if type(value) is not bool:
        raise ValueError(f"{what}: got {value!r}, expected a bool")


def _tensors(weight, bias, what: str, dims: int) -> None:
    for name, t, rank in (("weight", weight, dims), ("bias", bias, 1)):
        if not isinstance(t, Tensor) or t.dim() != rank or t.dtype not in (torch.float32, torch.float64):
            got = f"{t.dtype} of shape {tuple(t.shape)}" if isinstance(t, Tensor) else type(t).__name__
            raise ValueError(f"{what}.{name}: got {got}, expected float32 or float64 with {rank} dimensions")
    if bias.shape[0] != weight.shape[0] or bias.dtype != weight.dtype or 0 in weight.shape:
        got = f"{tuple(weight.shape)} {weight.dtype} and {tuple(bias.shape)} {bias.dtype}"
        raise ValueError(f"{what}: got weight and bias of {got}, expected one dtype and as many biases as outputs")


@dataclass(frozen=True, eq=False)
class Conv:
    """A convolution with everything linear folded in: weight ``[K, C/groups, R, S]``, bias ``[K]``; pairs are
    (height, width)."""

    weight: Tensor
    bias: Tensor
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    def __post_init__(self):
        _tensors(self.weight, self.bias, "conv", 4)
        for name, least in (("stride", 1), ("padding", 0), ("dilation", 1)):
            _pair(getattr(self, name), f"conv.{name}", least)
        _number(self.groups, "conv.groups", 1)
        if self.weight.shape[0] % self.groups:
            raise ValueError(f"conv.groups: got {self.groups} for {self.weight.shape[0]} outputs, expected a divisor")

    @property
    def inputs(self) -> int:
        return self.weight.shape[1] * self.groups

    @property
    def outputs(self) -> int:
        return self.weight.shape[0]

    @property
    def geometry(self):
        """As :mod:`fastres.convolution` wants it."""
        return self.stride, self.padding, self.dilation, self.groups

    def out_shape(self, shape: Shape, what: str) -> Shape:
        if len(shape) != 4 or shape[1] != self.inputs:
            raise ValueError(f"{what}: got an input of shape {shape}, expected [N, {self.inputs}, H, W]")
        kernel = self.weight.shape[2:]
        sizes = [out_size(*v) for v in zip(shape[2:], kernel, self.stride, self.padding, self.dilation, strict=True)]
        if min(sizes) < 1:
            raise ValueError(f"{what}: got an image of {shape[2]} x {shape[3]}, too small for its {_by(kernel)} kernel")
        return (shape[0], self.outputs, *sizes)

    def flops(self, shape: Shape, what: str) -> int:
        out = self.out_shape(shape, what)
        return 2 * out[0] * out[2] * out[3] * self.weight.numel()


def _by(size) -> str:
    return " x ".join(map(str, size))


@dataclass(frozen=True, eq=False)
class Stem:
    """``max_pool(relu(conv(x)))``; the pooling window is square, its padding never wins."""

    name: str
    conv: Conv
    pool_kernel: int = 3
    pool_stride: int = 2
    pool_padding: int = 1
    op = "stem"

    def __post_init__(self):
        _number(self.pool_kernel, f"{self.name}.pool_kernel", 1)
        _number(self.pool_stride, f"{self.name}.pool_stride", 1)
        _number(self.pool_padding, f"{self.name}.pool_padding", 0)
        if 2 * self.pool_padding > self.pool_kernel:
            raise ValueError(f"{self.name}.pool_padding: got {self.pool_padding}, expected at most half the window")

    def convs(self) -> tuple[Conv, ...]:
        return (self.conv,)

    def out_shape(self, shape: Shape) -> Shape:
        N, K, H, W = self.conv.out_shape(shape, self.name)
        sizes = [out_size(size, self.pool_kernel, self.pool_stride, self.pool_padding, 1) for size in (H, W)]
        if min(sizes) < 1:
            raise ValueError(f"{self.name}: got an image of {shape[2]} x {shape[3]}, too small for its max pooling")
        return (N, K, *sizes)

    def flops(self, shape: Shape) -> int:
        return self.conv.flops(shape, self.name)


@dataclass(frozen=True, eq=False)
class ConvAct:
    """``conv(x)``, then a ReLU if ``relu``."""

    name: str
    conv: Conv
    relu: bool
    op = "conv"

    def __post_init__(self):
        _flag(self.relu, f"{self.name}.relu")

    def convs(self) -> tuple[Conv, ...]:
        return (self.conv,)

    def out_shape(self, shape: Shape) -> Shape:
        return self.conv.out_shape(shape, self.name)

    def flops(self, shape: Shape) -> int:
        return self.conv.flops(shape, self.name)


@dataclass(frozen=True, eq=False)
class Block:
    """A residual block: ``main`` convolutions with a ReLU after each but the last, plus ``shortcut(x)`` (None: ``x``
    itself), then a ReLU. Two convolutions make a ``basic_block``, three a ``bottleneck``."""

    name: str
    main: tuple[Conv, ...]
    shortcut: Conv | None

    def __post_init__(self):
        if not isinstance(self.main, tuple) or len(self.main) not in (2, 3):
            raise ValueError(f"{self.name}.main: got {len(self.main)} convolutions, expected 2 or 3")
        for before, after in zip(self.main, self.main[1:], strict=False):
            if before.outputs != after.inputs:
                got = f"{before.outputs} channels before {after.inputs}"
                raise ValueError(f"{self.name}.main: got {got}, expected the same number")

    @property
    def op(self) -> str:
        return "basic_block" if len(self.main) == 2 else "bottleneck"

    def convs(self) -> tuple[Conv, ...]:
        """The main branch, then the projection if there is one."""
        return self.main if self.shortcut is None else (*self.main, self.shortcut)

    def shapes(self, shape: Shape) -> list[Shape]:
        """Of the input and of every convolution of the main branch."""
        shapes = [shape]
        for conv in self.main:
            shapes.append(conv.out_shape(shapes[-1], self.name))
        return shapes

    def out_shape(self, shape: Shape) -> Shape:
        out = self.shapes(shape)[-1]
        beside = shape if self.shortcut is None else self.shortcut.out_shape(shape, self.name)
        if tuple(beside) != tuple(out):
            raise ValueError(f"{self.name}: got {out} beside a shortcut of {beside} for an input of {tuple(shape)}")
        return out

    def flops(self, shape: Shape) -> int:
        total = sum(c.flops(s, self.name) for c, s in zip(self.main, self.shapes(shape), strict=False))
        return total + (0 if self.shortcut is None else self.shortcut.flops(shape, self.name))


@dataclass(frozen=True, eq=False)
class GlobalAvgPool:
    """Mean over the image: ``[N, C, H, W]`` to ``[N, C]`` if ``flatten``, else to ``[N, C, 1, 1]``."""

    name: str
    flatten: bool
    op = "global_avg_pool"

    def __post_init__(self):
        _flag(self.flatten, f"{self.name}.flatten")

    def convs(self) -> tuple[Conv, ...]:
        return ()

    def out_shape(self, shape: Shape) -> Shape:
        if len(shape) != 4 or 0 in shape[1:]:
            raise ValueError(f"{self.name}: got an input of shape {shape}, expected a non-empty [N, C, H, W]")
        return shape[:2] if self.flatten else (*shape[:2], 1, 1)

    def flops(self, shape: Shape) -> int:
        return shape[0] * shape[1] * shape[2] * shape[3]


@dataclass(frozen=True, eq=False)
class Linear:
    """``x @ weight.T + bias`` on ``[N, features]``, weight ``[K, features]``, then a ReLU if ``relu``."""

    name: str
    weight: Tensor
    bias: Tensor
    relu: bool = False
    op = "linear"

    def __post_init__(self):
        _tensors(self.weight, self.bias, self.name, 2)
        _flag(self.relu, f"{self.name}.relu")

    def convs(self) -> tuple[Conv, ...]:
        return ()

    def out_shape(self, shape: Shape) -> Shape:
        if len(shape) != 2 or shape[1] != self.weight.shape[1]:
            raise ValueError(f"{self.name}: got an input of shape {shape}, expected [N, {self.weight.shape[1]}]")
        return shape[0], self.weight.shape[0]

    def flops(self, shape: Shape) -> int:
        return 2 * shape[0] * self.weight.numel()


Node = Stem | ConvAct | Block | GlobalAvgPool | Linear
NODES: tuple[type, ...] = (Stem, ConvAct, Block, GlobalAvgPool, Linear)


@dataclass(frozen=True)
class Segment:
    """A chain of known nodes, at least one."""

    nodes: tuple[Node, ...]

    def __post_init__(self):
        if not self.nodes or not all(isinstance(n, NODES) for n in self.nodes):
            raise ValueError(f"nodes: got {self.nodes!r}, expected a tuple of one node or more")

    def shapes(self, shape: Shape) -> list[Shape]:
        """Of the input and of every node's output. Raises ValueError where a node cannot take what it gets."""
        shapes = [tuple(shape)]
        for node in self.nodes:
            shapes.append(node.out_shape(shapes[-1]))
        return shapes


@dataclass(frozen=True, eq=False)
class Slot:
    """A known module inside a foreign one: ``parts`` run one after the other.

    ``taps[i]`` names part i's output where the module returns a dict of features; no tap at all: it returns the last.
    """

    path: str
    parts: tuple[Plan, ...]
    taps: tuple[str | None, ...]


@dataclass(frozen=True, eq=False)
class Foreign:
    """A torch module left as it is, with the ``reasons`` why; ``slots`` are the known modules inside it."""

    name: str
    module: nn.Module
    reasons: tuple[str, ...]
    slots: tuple[Slot, ...] = ()


@dataclass(frozen=True)
class Plan:
    """Parts that run one after the other; neighbouring segments are one."""

    parts: tuple[Segment | Foreign, ...]

    def nodes(self) -> Iterator[Node]:
        """Every known node, those inside foreign modules too."""
        for part in self.parts:
            if isinstance(part, Segment):
                yield from part.nodes
            else:
                for slot in part.slots:
                    for plan in slot.parts:
                        yield from plan.nodes()

    def foreign(self) -> Iterator[Foreign]:
        for part in self.parts:
            if isinstance(part, Foreign):
                yield part
                for slot in part.slots:
                    for plan in slot.parts:
                        yield from plan.foreign()

    def weights_bytes(self) -> int:
        """Memory of all nodes' weights as the plan holds them."""
        return sum(t.numel() * t.element_size() for node in self.nodes() for t in tensors(node).values())


def tensors(node: Node) -> dict[str, Tensor]:
    """A node's weights by their place in it, such as ``main.0.weight``."""
    found: dict[str, Tensor] = {}

    def visit(prefix: str, value) -> None:
        if isinstance(value, Tensor):
            found[prefix] = value
        elif isinstance(value, tuple):
            for i, item in enumerate(value):
                visit(f"{prefix}.{i}", item)
        elif isinstance(value, Conv | Linear):
            for field in fields(value):
                visit(f"{prefix}.{field.name}" if prefix else field.name, getattr(value, field.name))

    for field in fields(node):
        visit(field.name, getattr(node, field.name))
    return found
