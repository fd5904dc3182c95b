"""A segment as a program of the CPU module: every kernel, in order, on tensors that share one arena."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from fastres.backends import cpu
from fastres.backends.trusted import DTYPE_CODE
from fastres.inference.cpu_weights import DIRECT, PAIRS, STRASSEN, Choice, Packed, fitted_kind, sizes
from fastres.inference.plan import Block, ConvAct, GlobalAvgPool, Linear, Segment, Shape, Stem

_LINE = 64


class Arena:
    """Places for tensors: the lowest gap that is large enough, so that the whole is about what is in use at once."""

    def __init__(self):
        self.used: dict[int, int] = {}
        self.bytes = 0

    def take(self, size: int) -> int:
        size = -(-size // _LINE) * _LINE
        place = 0
        for start, taken in sorted(self.used.items()):
            if start - place >= size:
                break
            place = start + taken
        self.used[place] = size
        self.bytes = max(self.bytes, place + size)
        return place

    def free(self, place: int) -> None:
        self.used.pop(place, None)


@dataclass(frozen=True)
class Turns:
    """The first ``nodes`` of a segment run on ``images`` at a time, so that what lies between them stays in the caches;
    0 of each: none do."""

    nodes: int = 0
    images: int = 0


ALL_AT_ONCE = Turns()


class Outputs:
    """Tensors for a program's results. Small ones are made some at a time: a kernel leaves nothing of PyTorch's code in
    the caches, and the first tensor after it takes 0.05 ms, the next ones 0.003. Callable from several threads."""

    SMALL, AT_A_TIME = 16 << 10, 8  # bytes

    def __init__(self, shape: Shape, dtype: torch.dtype):
        self.shape, self.dtype = shape, dtype
        self.together = self.AT_A_TIME if torch.Size(shape).numel() * dtype.itemsize <= self.SMALL else 1
        self.ready: dict[bool, list[torch.Tensor]] = {False: [], True: []}

    def take(self) -> torch.Tensor:
        """Dense (channels_last), uninitialised, nobody else's."""
        # Tensors made in inference mode stay so.
        ready = self.ready[torch.is_inference_mode_enabled()]
        try:
            return ready.pop()
        except IndexError:
            made = [self._make() for _ in range(self.together)]
            ready += made[1:]
            return made[0]

    def _make(self) -> torch.Tensor:
        if len(self.shape) == 4:
            return cpu.empty(self.shape, self.dtype)
        return torch.empty(self.shape, dtype=self.dtype, device="cpu")


@dataclass(frozen=True)
class Built:
    """A program for one input shape. ``nodes[i]``, ``convs[i]``: the node and the convolution that step i belongs to,
    if it is one that knows several kernels and runs the one that was asked for; ``choices``: of each node's
    convolutions; ``fitted``: how many of those were fitted to the size of the image."""

    program: object
    nodes: tuple[int, ...]
    convs: tuple[Packed | None, ...]
    choices: tuple[tuple[Choice, ...], ...]
    fitted: tuple[int, ...]
    outputs: Outputs
    held: tuple
    turns: Turns

    @property
    def out_shape(self) -> Shape:
        return self.outputs.shape


class Builder:
    """``pick``: the kernel of a convolution."""

    def __init__(self, shape: Shape, dtype: torch.dtype, isa: str, pick: Callable[[Packed], Choice]):
        self.dtype, self.isa, self.pick = dtype, isa, pick
        self.module = cpu._require()
        self.arena, self.steps, self.nodes, self.convs, self.held = Arena(), [], [], [], []
        self.fitted = 0
        self.shape, self.place, self.result = shape, self.module.PLACE_INPUT, self.module.PLACE_OUTPUT

    def build(self, segment: Segment, weights: list[list[Packed]], turns: Turns = ALL_AT_ONCE) -> Built:
        """``turns.images`` divide the input's."""
        choices, fitted, in_turns = [], [], None
        last = len(segment.nodes) - 1
        images, times = self.shape[0], self.shape[0] // turns.images if turns.images else 1
        if turns.nodes:
            in_turns = self._begin_turns(segment.nodes[: turns.nodes], times, turns.nodes == len(segment.nodes))
        for at, (node, packed) in enumerate(zip(segment.nodes, weights, strict=True)):
            before, self.fitted = len(self.steps), 0
            choices.append(self._node(node, packed, at in (last, turns.nodes - 1)))
            fitted.append(self.fitted)
            self.nodes += [at] * (len(self.steps) - before)
            if at == turns.nodes - 1:
                in_turns = (len(self.steps), times, *in_turns)
                self.shape, self.result = (images, *self.shape[1:]), self.module.PLACE_OUTPUT
        program = self.module.Program(DTYPE_CODE[self.dtype], self.arena.bytes)
        for add, step in self.steps:
            add(program, *step)
        if in_turns:
            program.take_turns(*in_turns)
        outputs, of_steps = Outputs(self.shape, self.dtype), (tuple(self.nodes), tuple(self.convs))
        return Built(program, *of_steps, tuple(choices), tuple(fitted), outputs, tuple(self.held), turns)

    def _begin_turns(self, nodes: tuple, times: int, last: bool) -> tuple[int, int, int]:
        """From here on for one turn's images; the bytes of its input, its result's place and bytes."""
        out = self.shape
        for node in nodes:
            out = node.out_shape(out)
        self.result = self._target(out, last)
        self.shape = (self.shape[0] // times, *self.shape[1:])
        return self._bytes(self.shape), self.result, self._bytes(out) // times

    def _node(self, node, packed: list[Packed], last: bool) -> tuple[Choice, ...]:
        if isinstance(node, Block):
            whole = all(self.pick(p).whole for p in packed)
            return (self._whole_block if whole else self._block)(node, packed, last)
        if isinstance(node, ConvAct):
            return (self._replace(packed[0], node.relu, last),)
        if isinstance(node, Linear):
            self.shape = (*self.shape, 1, 1)
            choice = self._replace(packed[0], node.relu, last)
            self.shape = self.shape[:2]
            return (choice,)
        out = node.out_shape(self.shape)
        target = self._target(out, last)
        if isinstance(node, Stem):
            pool = (node.pool_kernel, node.pool_stride, node.pool_padding, *out[2:])
            (conv,) = packed
            choice = self.pick(conv)
            weights = self._weights(conv.get(self.isa, choice.out), conv.bias)
            fields = sizes(self.shape, tuple(conv.weight.shape), node.conv.geometry)
            Op = self.module.Op
            op = {DIRECT: Op.stem, PAIRS: Op.pairs_stem}.get(choice.out, Op.matrix_stem)
            self._step(op, self.module.PLACE_NONE, target, fields, pool, 0, weights, True, conv)
            self._move(target, out)
            return (choice,)
        assert isinstance(node, GlobalAvgPool)
        N, C, H, W = self.shape
        fields = (N, H, W, C, C, 1, 1, H, W, 1, 1, 0, 0, 1, 1, 1)
        self._step(self.module.Op.mean, self.module.PLACE_NONE, target, fields, (0,) * 5, 0, (0, 0), False)
        self._move(target, out)
        return ()

    def _replace(self, packed: Packed, relu: bool, last: bool) -> Choice:
        """The current tensor through one convolution."""
        out = packed.conv.out_shape(self.shape, "conv")
        target = self._target(out, last)
        choice = self._conv(packed, self.module.PLACE_NONE, target, relu)
        self._move(target, out)
        return choice

    def _block(self, node: Block, packed: list[Packed], last: bool) -> tuple[Choice, ...]:
        x, x_shape = self.place, self.shape
        inputs, out = node.shapes(x_shape), node.out_shape(x_shape)
        beside, projected = x, None
        if node.shortcut is not None:
            beside = self._target(out, last)
            projected = self._conv(packed[-1], self.module.PLACE_NONE, beside, False)
        choices = []
        for i, conv in enumerate(packed[: len(node.main)]):
            final = i + 1 == len(node.main)
            if not final:
                target = self.arena.take(self._bytes(inputs[i + 1]))
            elif beside != self.module.PLACE_INPUT and (projected or not last):
                target = beside  # sums are added where the shortcut lies
            else:
                target = self._target(out, last)
            choices.append(self._conv(conv, beside if final else self.module.PLACE_NONE, target, True))
            self._move(target, inputs[i + 1], keep=x if i == 0 else None)
        if x != target:
            self.arena.free(x)
        return (*choices, *(() if projected is None else (projected,)))

    def _whole_block(self, node: Block, packed: list[Packed], last: bool) -> tuple[Choice, ...]:
        """As one kernel, the matrix unit's of blocks."""
        out, projected = node.out_shape(self.shape), node.shortcut is not None
        inputs = [*node.shapes(self.shape)[: len(node.main)], *([self.shape] if projected else [])]
        choices = tuple(map(self.pick, packed))
        convs = [
            (sizes(shape, tuple(p.weight.shape), p.conv.geometry), *self._weights(p.get(self.isa, c.out), p.bias))
            for shape, p, c in zip(inputs, packed, choices, strict=True)
        ]
        target = self._target(out, last)
        self.convs.append(None)
        self.steps.append((self.module.Program.add_block, (self.place, target, convs, projected)))
        self._move(target, out)
        return choices

    def _conv(self, packed: Packed, residual: int, target: int, relu: bool) -> Choice:
        asked = choice = self.pick(packed)
        used, shape = packed.fitted(self.shape)
        if used is not packed:
            self.fitted += 1
            kind = fitted_kind(asked.out, self.dtype)
            choice = asked if kind == asked.out else Choice(kind)
        weights = self._weights(used.get(self.isa, choice.out), used.bias)
        fields = sizes(shape, tuple(used.weight.shape), used.conv.geometry)
        Op = self.module.Op
        if choice.algorithm:
            op = getattr(Op, choice.algorithm)
        else:
            op = {DIRECT: Op.direct, PAIRS: Op.pairs}.get(choice.out, Op.matrix)
        tile = STRASSEN.get(choice.out, choice.out)
        of = packed if choice == asked else None
        self._step(op, residual, target, fields, (0,) * 5, tile, weights, relu, of)
        return choice

    def _step(self, op, residual: int, target: int, fields, pool, out: int, weights, relu: bool, conv=None) -> None:
        self.convs.append(conv)
        self.steps.append(
            (self.module.Program.add, (op, self.place, residual, target, fields, pool, out, *weights, relu))
        )

    def _weights(self, packed: torch.Tensor, bias: torch.Tensor) -> tuple[int, int]:
        self.held += [packed, bias]
        return packed.data_ptr(), bias.data_ptr()

    def _bytes(self, shape: Shape) -> int:
        return torch.Size(shape).numel() * self.dtype.itemsize

    def _target(self, shape: Shape, last: bool) -> int:
        return self.result if last else self.arena.take(self._bytes(shape))

    def _move(self, place: int, shape: Shape, keep: int | None = None) -> None:
        """``place`` is the current tensor; the one before is not needed any more, unless it is to be kept."""
        if self.place != keep and self.place != place:
            self.arena.free(self.place)
        self.place, self.shape = place, shape
