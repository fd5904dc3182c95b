"""Who computes the segments of a plan. An executor is a module (or object) with the members of :class:`Executor`.

A session asks the executors of its device in order and gives each the longest runs of neighbouring nodes that it can
serve. An executor never sees a torch module, and a plan never names an executor: either may change without the other.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fastres.inference.plan import Node, Segment, Shape

#: Of float32 arithmetic. "exact": float32 and direct sums. "highest": float32 throughout, fast algorithms allowed.
#: "high": sums of two bf16, or TF32 on a GPU, allowed.
PRECISIONS = ("exact", "highest", "high")


@dataclass(frozen=True)
class Kernel:
    """How an executor computes one node at one input shape, for reports. Empty: nothing to say."""

    kernel: str
    isa: str = ""
    tile: str = ""
    note: str = ""


class Prepared(Protocol):
    """A segment ready to run. Threads may call it at the same time, with other shapes each time."""

    def run(self, x: Tensor) -> Tensor:
        """The segment's output, in new memory. ``x``: on the device, in the dtype, of a shape that the segment takes
        (``Segment.shapes`` did not raise), in any layout, and left as it is. Four dimensions come back channels_last.
        """
        ...

    def timed(self, x: Tensor) -> tuple[Tensor, list[float]]:
        """``run``, and the seconds each node took; the device is idle when it returns."""
        ...

    def kernels(self, shape: Shape) -> list[Kernel]:
        """One for each node, at an input of that shape."""
        ...

    def memory(self, shape: Shape) -> int:
        """Bytes of packed weights and work space held for inputs of that shape, the output not counted."""
        ...

    # An executor that measures which kernel serves has these two besides, so that a loaded session need not measure.
    #
    # def choices(self) -> list[dict]: what was measured so far, as JSON.
    # def choose(self, choices: list[dict]) -> list[str]: take that over. Returns what is not taken, and why; raises
    # KeyError, TypeError or ValueError for what `choices` does not return.


class Executor(Protocol):
    name: str

    def why_not(self, node: Node, device: torch.device, dtype: torch.dtype, precision: str) -> list[str]:
        """Reasons why the node is not served; empty: it is."""
        ...

    def precision(self, device: torch.device, dtype: torch.dtype, asked: str) -> str:
        """The precision that it computes in where ``asked`` is wanted: that one, or a better one."""
        ...

    def peak(self, device: torch.device, dtype: torch.dtype, threads: int, precision: str) -> float | None:
        """FLOP/s of the arithmetic that it uses, measured on this machine; None: it has no measure of its own."""
        ...

    def prepare(self, segment: Segment, device: torch.device, dtype: torch.dtype, precision: str) -> Prepared:
        """Weights packed, once. Every node has been found servable."""
        ...


#: Executor -> the module (or object) that holds it.
EXECUTORS: dict[str, object] = {
    "cpu": "fastres.inference.cpu_executor",
    "torch": "fastres.inference.torch_executor",
}
#: Tried in this order on a device; the last serves everything.
ORDER: dict[str, tuple[str, ...]] = {"cpu": ("cpu", "torch"), "cuda": ("torch",)}


def load(name: str) -> Executor:
    """The executor of that name. Raises ValueError for a name that is none."""
    if name not in EXECUTORS:
        raise ValueError(f"executor: got {name!r}, expected one of {', '.join(map(repr, EXECUTORS))}")
    found = EXECUTORS[name]
    return importlib.import_module(found) if isinstance(found, str) else found


class Unserved(ValueError):
    """No executor that may be used serves a node; the message has everybody's reasons."""


@dataclass(frozen=True, eq=False)
class Assignment:
    """Neighbouring nodes of a segment, the executor that serves them, and why the ones before it do not."""

    executor: str
    segment: Segment
    prepared: Prepared
    passed_over: tuple[str, ...]


def assign(
    segment: Segment, device: torch.device, dtype: torch.dtype, precision: str, names: tuple[str, ...]
) -> list[Assignment]:
    """The segment cut into runs of nodes by who serves them. Raises Unserved if nobody serves a node."""
    runs: list[tuple[str, list[Node], list[str]]] = []
    for node in segment.nodes:
        name, passed = _first(node, device, dtype, precision, names)
        if runs and runs[-1][0] == name:
            runs[-1][1].append(node)
            runs[-1][2].extend(reason for reason in passed if reason not in runs[-1][2])
        else:
            runs.append((name, [node], passed))
    cut = [(name, Segment(tuple(nodes)), tuple(passed)) for name, nodes, passed in runs]
    return [Assignment(n, s, load(n).prepare(s, device, dtype, precision), passed) for n, s, passed in cut]


def _first(node: Node, device, dtype, precision, names) -> tuple[str, list[str]]:
    passed: list[str] = []
    for name in names:
        reasons = load(name).why_not(node, device, dtype, precision)
        if not reasons:
            return name, passed
        passed += [f"{node.name}: not served by {name}: {reason}" for reason in reasons]
    raise Unserved("; ".join(passed))


def order(device: torch.device, named: str | None) -> tuple[str, ...]:
    """The executors to try. A named one must serve every node: it alone is tried."""
    if named is not None:
        load(named)
        return (named,)
    if device.type not in ORDER:
        raise ValueError(f"device: got {device}, expected one of {', '.join(ORDER)}")
    return ORDER[device.type]
