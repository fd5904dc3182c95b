"""A plan made to run: segments by their executors, foreign modules by torch, known modules inside them by class.

A known module inside a foreign one keeps its object and gets a subclass of its class whose forward runs its plan, so
that the foreign code around it finds every attribute, child and hook where it was.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import time
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastres.inference import executors
from fastres.inference.executors import Assignment
from fastres.inference.plan import Foreign, Node, Plan, Segment, Shape, Slot
from fastres.nn import fitness
from fastres.ops.bn import nhwc

#: Names and seconds of what ran, while somebody measures in this thread.
_RECORD: contextvars.ContextVar[list[tuple[str, float]] | None] = contextvars.ContextVar("record", default=None)
#: Shapes of the segments' last inputs, while somebody wants to know.
_SHAPES: contextvars.ContextVar[dict[int, Shape] | None] = contextvars.ContextVar("shapes", default=None)
#: Input shapes that a segment remembers the check of.
_REMEMBERED = 64


@dataclass(frozen=True)
class Target:
    """Where and in what a plan runs, and which executors may serve it, in this order."""

    device: torch.device
    dtype: torch.dtype
    precision: str
    executors: tuple[str, ...]


class SegmentRunner:
    """A segment, cut by who serves it."""

    def __init__(self, segment: Segment, target: Target):
        self.segment = segment
        self.assignments = executors.assign(segment, target.device, target.dtype, target.precision, target.executors)
        self._shapes = functools.lru_cache(_REMEMBERED)(segment.shapes)

    def __call__(self, x: Tensor) -> Tensor:
        self._shapes(tuple(x.shape))  # a shape that it cannot take gets its message here, before anything runs
        shapes, record = _SHAPES.get(), _RECORD.get()
        if shapes is not None:
            shapes[id(self)] = tuple(x.shape)
        if record is None:
            for a in self.assignments:
                x = a.prepared.run(x)
            return x
        for a in self.assignments:
            x, seconds = a.prepared.timed(x)
            record.extend(zip([n.name for n in a.segment.nodes], seconds, strict=True))
        return x

    def places(self, shape: Shape) -> Iterator[tuple[Assignment, int, Node, Shape]]:
        """``(assignment, index of the node in it, node, the node's input shape)`` for an input of ``shape``."""
        shapes = iter(self._shapes(tuple(shape)))
        for assignment in self.assignments:
            for at, node in enumerate(assignment.segment.nodes):
                yield assignment, at, node, next(shapes)


class SlotRunner:
    """What a known module inside a foreign one computes, and why it last did not."""

    def __init__(self, slot: Slot, target: Target):
        self.slot, self.target = slot, target
        self.parts = [Runner(plan, target, inside=True) for plan in slot.parts]
        self.left: str | None = None

    def why_not(self, args: tuple, kwargs: dict) -> str | None:
        if len(args) != 1 or kwargs:
            return f"called with {len(args)} positional and {len(kwargs)} named arguments, expected one tensor"
        (x,) = args
        reason = fitness.why_not_call(x)
        if reason is not None:
            return reason
        if x.dtype is not self.target.dtype or x.device != self.target.device:
            got = f"{x.dtype} on {x.device}"
            return f"called with {got}, the session computes {self.target.dtype} on {self.target.device}"
        return None

    def __call__(self, x: Tensor):
        features = OrderedDict()
        for part, tap in zip(self.parts, self.slot.taps, strict=True):
            x = part(x)
            if tap is not None:
                features[tap] = x
        return features or x


class Served:
    """Mixin of the classes that known modules inside foreign ones get. What it cannot serve the module computes."""

    def forward(self, *args, **kwargs):
        slot: SlotRunner = self.__dict__["_fastres_slot"]
        slot.left = slot.why_not(args, kwargs)
        return slot(*args) if slot.left is None else super().forward(*args, **kwargs)


@functools.cache
def _served(kind: type[nn.Module]) -> type:
    return type(f"Served{kind.__name__}", (Served, kind), {"__module__": kind.__module__})


class ForeignRunner:
    """A torch module in the session's dtype, its slots served. What comes from another module keeps its strides: four
    dimensions need not be channels and pixels."""

    def __init__(self, foreign: Foreign, target: Target):
        self.foreign = foreign
        self.module = foreign.module.to(target.device, target.dtype)
        self.slots = []
        for slot in foreign.slots:
            inner = self.module.get_submodule(_relative(slot.path, foreign.name))
            runner = SlotRunner(slot, target)
            inner.__dict__["_fastres_slot"] = runner
            if not isinstance(inner, Served):
                inner.__class__ = _served(type(inner))
            self.slots.append(runner)

    def __call__(self, x):
        record = _RECORD.get()
        if record is None:
            return self.module(x)
        inside, begin = len(record), _now(x)
        y = self.module(x)
        own = _now(x) - begin - sum(seconds for _, seconds in record[inside:])
        record.append((self.foreign.name, own))
        return y


def _relative(path: str, owner: str) -> str:
    return path[len(owner) + 1 :] if owner else path


def _now(x) -> float:
    if isinstance(x, Tensor) and x.is_cuda:
        torch.cuda.synchronize(x.device)
    return time.perf_counter()


class Runner:
    """Every part of a plan, ready; ``inside`` a foreign module, or of what a session is called with: images, then.
    Callable from several threads at once."""

    def __init__(self, plan: Plan, target: Target, inside: bool = False):
        self.inside = inside
        kinds = {Segment: SegmentRunner, Foreign: ForeignRunner}
        self.parts = [kinds[type(part)](part, target) for part in plan.parts]

    def __call__(self, x):
        if not self.inside and isinstance(x, Tensor) and x.dim() == 4:
            x = nhwc(x)
        for part in self.parts:
            x = part(x)
        return x

    def leaves(self) -> Iterator[SegmentRunner | ForeignRunner]:
        """Segments and foreign modules, those inside slots before their owner."""
        for part in self.parts:
            for slot in getattr(part, "slots", ()):
                for runner in slot.parts:
                    yield from runner.leaves()
            yield part

    def timed(self, x) -> tuple[object, list[tuple[str, float]]]:
        """The output, and name and seconds of everything that ran, in order."""
        with _setting(_RECORD, []) as record:
            return self(x), record

    def shapes(self, x) -> dict[int, Shape]:
        """Input shape of each segment that ran, by the id of its runner."""
        with _setting(_SHAPES, {}) as shapes:
            self(x)
            return shapes


def served_precision(runner: Runner, target: Target) -> list[str]:
    """What to say where "high" was asked for and something better is computed."""
    if target.precision != "high":
        return []
    served: dict[str, str] = {}
    for part in runner.leaves():
        for a in getattr(part, "assignments", ()):
            served[a.executor] = executors.load(a.executor).precision(target.device, target.dtype, target.precision)
    return [
        f"precision 'high' was asked for; the {name} executor has no such kernels here and computes {got!r}"
        for name, got in served.items()
        if got != "high"
    ]


@contextlib.contextmanager
def _setting(variable, value):
    token = variable.set(value)
    try:
        yield value
    finally:
        variable.reset(token)
