"""report and profile: who computes what of a session, what it should take and what it takes, as data and as a table."""

from __future__ import annotations

import datetime
import io
import statistics
import time
from collections import defaultdict
from dataclasses import asdict, dataclass

import torch

from fastres import machine
from fastres.backends import cpu
from fastres.convolution import widens
from fastres.inference import executors
from fastres.inference.plan import Foreign, Node, Shape, tensors
from fastres.inference.serving import ForeignRunner, SegmentRunner
from fastres.inference.session import InferenceSession
from fastres.nn.fitness import qualified

_PASSES = 3


@dataclass(frozen=True)
class Row:
    """One node, or one foreign torch module.

    gflop: multiplications and additions. estimated_ms: what the machine's measured rates allow, see ``Report``.
    measured_ms: median. share: of the peak. None: not known.
    """

    name: str
    op: str
    executor: str
    kernel: str
    isa: str
    tile: str
    shape: Shape | None
    gflop: float | None
    estimated_ms: float | None
    measured_ms: float | None
    share: float | None
    note: str


@dataclass(frozen=True)
class Report:
    """``print`` it, or use ``rows`` and ``to_dict``.

    total_ms: median of whole calls, not the sum of rows, which are timed one by one. peak_gflops: in this dtype on this
    machine, measured by what peak_source names; copy_gbytes: of a large copy. A row's estimate is its work at the first
    or its traffic (input, output and weights once) at the second, whichever takes longer. memory_mib: weights as packed
    and work space for this shape.
    """

    title: str
    shape: Shape
    dtype: str
    precision: str
    device: str
    chip: str
    threads: int
    torch: str
    date: str
    rows: tuple[Row, ...]
    total_ms: float | None
    peak_gflops: float | None
    peak_source: str
    copy_gbytes: float | None
    memory_mib: float
    check: str
    notes: tuple[str, ...]

    def to_dict(self) -> dict:
        return asdict(self)

    def caption(self) -> str:
        """Machine, versions and date on one line."""
        threads = f"{self.threads} thread{'s' * (self.threads > 1)}"
        where = f"{self.chip}, {threads}" if self.device == "cpu" else self.chip
        return f"{where}, torch {self.torch}, {self.date}"

    def rates(self) -> str:
        """What peak and estimates are made of."""
        return f"{self.peak_source} {self.peak_gflops:.4g} GFLOP/s, copies {self.copy_gbytes:.3g} GB/s"

    def __rich__(self):
        from rich.console import Group
        from rich.markup import escape

        return Group(self.table(), *(escape(line) for line in self.lines()))

    def table(self):
        """The rows as a ``rich.table.Table``."""
        from rich import box
        from rich.markup import escape
        from rich.table import Table

        size = " x ".join(map(str, self.shape))
        title = f"{self.title}: input {size}, {self.dtype}, precision {self.precision}, {self.device}"
        table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
        for heading in ("node", "op", "output", "executor", "kernel", "ISA", "tile"):
            table.add_column(heading, overflow="fold")
        for heading in ("GFLOP", "estimated ms", "ms", "of peak"):
            table.add_column(heading, justify="right", no_wrap=True)
        for row in self.rows:
            output = "-" if row.shape is None else "x".join(map(str, row.shape))
            texts = (row.name or "(model)", row.op, output, row.executor, row.kernel, row.isa or "-", row.tile or "-")
            share = "-" if row.share is None else f"{row.share:.0%}"
            numbers = (_number(row.gflop), _number(row.estimated_ms), _number(row.measured_ms), share)
            table.add_row(*map(escape, texts), *numbers)
        return table

    def lines(self) -> list[str]:
        """What stands below the table."""
        lines = []
        if self.total_ms is not None:
            work = sum(row.gflop or 0.0 for row in self.rows)
            rate = f", {work / self.total_ms:.3g} TFLOP/s" if work else ""
            lines.append(
                f"whole call: {self.total_ms:.3g} ms, {self.shape[0] * 1e3 / self.total_ms:.4g} images/s{rate}"
            )
        if self.peak_gflops is not None:
            lines.append(f"peak and estimates from rates measured here: {self.rates()}")
        lines.append(f"packed weights and work space: {self.memory_mib:.1f} MiB")
        lines.append(f"checked: {self.check}")
        seen = dict.fromkeys(f"{row.name or '(model)'}: {row.note}" for row in self.rows if row.note)
        return [*lines, *(f"note: {note}" for note in (*self.notes, *seen)), self.caption()]

    def __str__(self) -> str:
        from rich.console import Console

        page = io.StringIO()
        Console(file=page, width=160, color_system=None).print(self.table())
        return "\n".join([*(line.rstrip() for line in page.getvalue().splitlines()), *self.lines()])


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}" if value < 10 else f"{value:.1f}"


@dataclass(frozen=True)
class _Measured:
    """Seconds of each name, of a whole call, and each segment's input shape by the id of its runner."""

    seconds: dict[str, float]
    whole: float
    shapes: dict[int, Shape]


def report(session: InferenceSession, shape: Shape, seconds: float | None, again: bool = False) -> Report:
    """``seconds`` of measuring unless that was done for this shape, dtype and number of threads; None: none."""
    key = (shape, torch.get_num_threads())
    measured = session._measured.get(key)
    if seconds is not None and (measured is None or again):
        measured = session._measured[key] = _measure(session, shape, seconds)
    peak, source, copies = None, "", None
    if measured is not None:
        peak, source, copies = _rates(session)
    if measured is not None:
        shapes = measured.shapes
    else:
        with torch.no_grad(), session._no_autocast():
            shapes = session.runner.shapes(_pixels(session, shape).to(session.dtype))
    rows: list[Row] = []
    memory = 0
    for leaf in session.runner.leaves():
        if isinstance(leaf, ForeignRunner):
            rows.append(_foreign(leaf, measured))
        elif id(leaf) in shapes:
            rows += _rows(leaf, shapes[id(leaf)], session, measured, peak, copies)
            memory += _memory(leaf, shapes[id(leaf)])
        else:
            rows += [_unused(node) for node in leaf.segment.nodes]
    return Report(
        session.title, shape, str(session.dtype)[6:], session.precision, str(session.device),
        machine.chip(session.device), torch.get_num_threads(), torch.__version__,
        datetime.date.today().isoformat(), tuple(rows), measured and measured.whole * 1e3,
        peak and peak / 1e9, source, copies and copies / 1e9, memory / 2**20,
        session.verdict.message if session.verdict else "not: the unfused model itself runs", session.notes,
    )  # fmt: skip


def _pixels(session: InferenceSession, shape: Shape) -> torch.Tensor:
    x = cpu.random(shape).to(session.device, session.dtype)
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


def _rates(session: InferenceSession) -> tuple[float, str, float]:
    """Peak FLOP/s and what measured it, bytes/s of copies."""
    dtype, threads = session.dtype, torch.get_num_threads()
    if widens(torch.empty(0, dtype=dtype, device=session.device)):
        dtype = torch.float32
    copies = machine.copy_rate(session.device, threads)
    for name in session.target.executors:
        peak = executors.load(name).peak(session.device, dtype, threads, session.precision)
        if peak is not None:
            return peak, f"the {name} executor's own loop", copies
    return machine.matmul_rate(session.device, dtype, threads), "torch.mm", copies


def _measure(session: InferenceSession, shape: Shape, seconds: float) -> _Measured:
    """Whole calls and passes node by node take turns, after one of each to warm up."""
    x = _pixels(session, shape)
    session(x)
    per_name: dict[str, list[float]] = defaultdict(list)
    whole: list[float] = []
    with torch.no_grad(), session._no_autocast():
        shapes = session.runner.shapes(x)
        end = time.perf_counter() + seconds
        while len(whole) < _PASSES or time.perf_counter() < end:
            whole.append(_timed_call(session, x))
            once: dict[str, float] = defaultdict(float)
            for name, took in session.runner.timed(x)[1]:
                once[name] += took
            for name, took in once.items():
                per_name[name].append(took)
    return _Measured({n: statistics.median(t) for n, t in per_name.items()}, statistics.median(whole), shapes)


def _timed_call(session: InferenceSession, x: torch.Tensor) -> float:
    begin = time.perf_counter()
    session(x)
    if session.device.type == "cuda":
        torch.cuda.synchronize(session.device)
    return time.perf_counter() - begin


def _rows(leaf: SegmentRunner, shape: Shape, session, measured, peak, copies) -> list[Row]:
    kernels, rows = {}, []
    for assignment, at, node, given in leaf.places(shape):
        if at == 0:
            kernels[id(assignment)] = assignment.prepared.kernels(given)
        kernel = kernels[id(assignment)][at]
        flops, took = node.flops(given), None if measured is None else measured.seconds.get(node.name)
        estimate = share = None
        if peak is not None:
            traffic = _traffic(node, given, session.dtype.itemsize)
            estimate = max(flops / peak, traffic / copies) * 1e3
        if took and peak is not None and node.op != "global_avg_pool":
            share = flops / took / peak
        rows.append(Row(
            node.name, node.op, assignment.executor, kernel.kernel, kernel.isa, kernel.tile, node.out_shape(given),
            flops / 1e9, estimate, None if took is None else took * 1e3, share,
            "; ".join(filter(None, (kernel.note, *(p for p in assignment.passed_over if p.startswith(node.name))))),
        ))  # fmt: skip
    return rows


def _traffic(node: Node, shape: Shape, itemsize: int) -> int:
    weights = sum(t.numel() for t in tensors(node).values())
    return itemsize * (torch.Size(shape).numel() + torch.Size(node.out_shape(shape)).numel() + weights)


def _memory(leaf: SegmentRunner, shape: Shape) -> int:
    first = {id(a): given for a, at, _, given in leaf.places(shape) if at == 0}
    return sum(a.prepared.memory(first[id(a)]) for a in leaf.assignments)


def _foreign(leaf: ForeignRunner, measured: _Measured | None) -> Row:
    foreign: Foreign = leaf.foreign
    kind = next(c for c in type(foreign.module).__mro__ if not c.__name__.startswith("Served"))
    took = None if measured is None else measured.seconds.get(foreign.name)
    notes = [*foreign.reasons, *(f"{s.slot.path} left its last call to torch: {s.left}" for s in leaf.slots if s.left)]
    time_ms = None if took is None else took * 1e3
    name = foreign.name
    return Row(
        name, "torch module", "torch", qualified(kind), "", "", None, None, None, time_ms, None, "; ".join(notes)
    )


def _unused(node: Node) -> Row:
    note = "did not run on this input"
    return Row(node.name, node.op, "-", "-", "", "", None, None, None, None, None, note)
