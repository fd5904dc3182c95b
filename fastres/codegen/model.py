"""How long one ResNet training step should take on a chip, kernel by kernel, for each plan of `plans`.

    time of a kernel = longer + exposed * shorter,   longer, shorter of   bytes / bandwidth   and   FLOPs / rate

The longer of the two is the kernel's bound. ``exposed`` is the part of the shorter one that does not overlap, 0 for
anything but a convolution. The constants and where each was measured: `calibration`. No caches, no launch overlap:
kernels run one after the other.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib

from fastres.codegen import calibration, plans
from fastres.codegen.calibration import CHIPS, Chip

ROOT = pathlib.Path(__file__).resolve().parents[2]
PATH = ROOT / "docs" / "kernels" / "model.md"
RESULTS = ROOT / "benchmarks" / "results"
MEMORY, CORES = "memory", "tensor cores"
#: Contestant of a result row -> the plan it runs. fastres chooses per shape, A' is the plan it starts from.
CONTESTANTS = {"eager": "eager", "torch.compile": "compile", "fastres": "A'"}


@dataclasses.dataclass(frozen=True)
class Time:
    """Seconds of a kernel, and which of the two bounds it."""

    seconds: float
    bound: str


def time(kernel: plans.Kernel, chip: Chip) -> Time:
    """The model's time of one launch."""
    if kernel.work == "stem":
        load, compute, exposed = kernel.bytes / chip.bandwidth, kernel.flops / chip.rate / calibration.STEM_RATE, 0.0
    elif kernel.work == "conv":
        rate = chip.rate * min(1.0, kernel.width / calibration.FULL_WIDTH)
        load, compute, exposed = kernel.bytes / chip.bandwidth, kernel.flops / rate, calibration.EXPOSED
    else:
        load, compute, exposed = kernel.bytes / chip.bandwidth / calibration.BANDWIDTH[kernel.work], 0.0, 0.0
    return Time(max(load, compute) + exposed * min(load, compute), CORES if compute > load else MEMORY)


@dataclasses.dataclass(frozen=True)
class Sum:
    """Kernels of one plan over one block (or more), added up. ``units``: of `plans.Block.unit`."""

    launches: int
    units: float
    bytes: int
    flops: int
    seconds: float
    cores: float

    @property
    def bound(self) -> str:
        """What most of the time is bound by, and that part of it."""
        share = self.cores / self.seconds
        return f"{CORES} {share:.0%}" if share > 0.5 else f"{MEMORY} {1 - share:.0%}"


def add(kernels: list[plans.Kernel], chip: Chip, unit: int = 1) -> Sum:
    times = [time(k, chip) for k in kernels]
    return Sum(
        len(kernels),
        sum(k.activation_bytes for k in kernels) / unit,
        sum(k.bytes for k in kernels),
        sum(k.flops for k in kernels),
        sum(t.seconds for t in times),
        sum(t.seconds for t in times if t.bound == CORES),
    )


@dataclasses.dataclass(frozen=True)
class Step:
    """One training step of a plan. ``parts``: ms of the stem, the four stages, and everything else; ``kernels`` their
    sum; ``wall`` with the gaps between launches, for a host that keeps ahead of the GPU."""

    plan: str
    parts: dict[str, float]
    launches: int
    batch: int

    @property
    def kernels(self) -> float:
        return sum(self.parts.values())

    @property
    def wall(self) -> float:
        return self.kernels + self.launches * calibration.GAP_US / 1e3

    @property
    def images(self) -> float:
        """Per second."""
        return self.batch / self.wall * 1e3


def step(net: plans.Network, plan: str, chip: Chip) -> Step:
    """The whole step. Raises ``ValueError`` for an unknown plan."""
    stem = add(plans.stem_kernels(net, plan), chip)
    parts, launches = {"stem": stem.seconds * 1e3}, stem.launches
    for stage in range(1, 5):
        found = [k for b in net.blocks if b.stage == stage for k in plans.kernels(b, plan)]
        parts[f"stage {stage}"] = add(found, chip).seconds * 1e3
        launches += len(found)
    head = add(plans.head_kernels(net), chip)
    helpers = calibration.HELPERS[plan] * len(net.convolutions)
    parts["rest"] = head.seconds * 1e3 + helpers * calibration.HELPER_US / 1e3
    return Step(plan, parts, launches + head.launches + helpers, net.batch)


def kinds(net: plans.Network) -> list[tuple[str, int, plans.Block]]:
    """The different blocks: name of the first, how many there are of it, the block."""
    found: dict[tuple, list[plans.Block]] = {}
    for b in net.blocks:
        found.setdefault((b.stage, b.convolutions, b.projection is None), []).append(b)
    return [(group[0].name, len(group), group[0]) for group in found.values()]


def chip_of(name: str) -> Chip:
    """Raises ``ValueError`` for a chip that is not in the table."""
    if name not in CHIPS:
        raise ValueError(f"chip: got {name!r}, expected one of {', '.join(CHIPS)}")
    return CHIPS[name]


# ---- measured rows


@dataclasses.dataclass(frozen=True)
class Row:
    """A measured training step next to the model's: file, contestant, ms, and the plan compared with."""

    file: str
    contestant: str
    plan: str
    ms: float
    predicted: Step


def measured(net: plans.Network, chip: Chip, folder: pathlib.Path = RESULTS) -> list[Row]:
    """Rows of the files in ``folder`` that are this network, batch and chip in bfloat16. A file that is no list of
    rows raises ``ValueError`` with its name."""
    found = []
    for path in sorted(folder.glob("*.json")):
        try:
            rows = json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{path.name}: expected a JSON list of result rows: {error}") from error
        if not isinstance(rows, list):
            raise ValueError(f"{path.name}: expected a JSON list of result rows, got {type(rows).__name__}")
        for row in rows:
            gpus = (row.get("machine") or {}).get("gpus") or [{}]
            if row.get("memory") == "low":
                continue  # recomputes convolutions, which no plan here does
            if (row.get("mode"), row.get("model"), row.get("dtype")) != ("training", net.name, "bf16"):
                continue
            if not _is(chip, gpus[0].get("name", "")) or tuple(row["shape"]) != (net.batch, 3, net.size, net.size):
                continue
            plan = next((p for c, p in CONTESTANTS.items() if row["backend"].startswith(c)), None)
            if plan:
                found.append(Row(path.name, row["backend"], plan, row["median_ms"], step(net, plan, chip)))
    return found


def _is(chip: Chip, device: str) -> bool:
    """Whether a device's name ("NVIDIA H100 80GB HBM3") has every word of the chip's."""
    return all(word in device.replace("-", " ").split() for word in chip.name.split())


# ---- tables: a title, a header and rows of text, for the page and for the terminal


def step_table(net: plans.Network, chip: Chip) -> tuple[list[str], list[list[str]]]:
    steps = {plan: step(net, plan, chip) for plan in plans.PLANS}
    head = ["plan", *steps["eager"].parts, "kernels, ms", "launches", "step, ms", "img/s", "of compile"]
    rows = []
    for plan, s in steps.items():
        times = [f"{ms:.2f}" for ms in s.parts.values()]
        ratio = steps["compile"].wall / s.wall
        rows.append([plans.LABELS.get(plan, f"plan {plan}"), *times, f"{s.kernels:.1f}", f"{s.launches}",
                     f"{s.wall:.1f}", f"{s.images:,.0f}", f"{ratio:.2f}x"])  # fmt: skip
    return head, rows


def block_table(net: plans.Network, chip: Chip) -> tuple[list[str], list[list[str]]]:
    head = ["block", "plan", "launches", "units", "MB", "GFLOP", "us", "us/image", "bound", "of compile"]
    rows = []
    for name, count, block in kinds(net):
        sums = {plan: add(plans.kernels(block, plan), chip, block.unit) for plan in plans.PLANS}
        for plan, s in sums.items():
            title = f"{name}{f' (x{count})' if count > 1 else ''}" if plan == "eager" else ""
            rows.append([title, plan, f"{s.launches}", f"{s.units:.2f}", f"{s.bytes / 1e6:,.0f}",
                         f"{s.flops / 1e9:.0f}", f"{s.seconds * 1e6:,.0f}", f"{s.seconds * 1e6 / net.batch:.2f}",
                         s.bound, f"{sums['compile'].seconds / s.seconds:.2f}x"])  # fmt: skip
    return head, rows


def kernel_table(block: plans.Block, plan: str, chip: Chip) -> tuple[list[str], list[list[str]]]:
    head = ["kernel", "reads", "writes", "units", "MB", "GFLOP", "us", "bound"]
    rows = []
    for k in plans.kernels(block, plan):
        t = time(k, chip)
        names = [", ".join(b.name for b in side) or "-" for side in (k.reads, k.writes)]
        units = k.activation_bytes / block.unit
        rows.append([k.name, *names, f"{units:.2f}", f"{k.bytes / 1e6:.0f}", f"{k.flops / 1e9:.1f}" if k.flops else "",
                     f"{t.seconds * 1e6:.0f}", t.bound])  # fmt: skip
    return head, rows


def measured_table(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    head = ["file", "contestant", "measured, ms", "plan", "predicted, ms", "measured / predicted"]
    return head, [
        [r.file, r.contestant, f"{r.ms:.2f}", r.plan, f"{r.predicted.wall:.2f}", f"{r.ms / r.predicted.wall:.2f}"]
        for r in rows
    ]


def report(chip: str = "h100", batch: int = 256, model: str = "resnet50", size: int = 224) -> None:
    """Print the tables. Raises ``ValueError`` for an unknown chip or model, or a size out of range."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    spec, net = chip_of(chip), plans.network(model, batch, size)
    console = Console()
    if not console.is_terminal:
        console.width = 150  # a pipe has no width; the tables fit this one

    def show(title, head, rows, text):
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
        for column in head:
            table.add_column(column, justify="left" if column in text else "right", overflow="fold")
        for row in rows:
            table.add_row(*row, end_section=row[1:2] == [plans.PLANS[-1]])
        console.print(table)

    console.print(f"[bold]{model}[/], training, batch {batch}, {size} x {size}, bf16, [bold]{spec.name}[/]: "
                  f"{spec.bandwidth / 1e12:.2f} TB/s, {spec.rate / 1e12:.0f} TFLOP/s ({spec.source})")  # fmt: skip
    text = ("block", "plan", "bound", "file", "contestant")
    show("Blocks, forward and backward", *block_table(net, spec), text)
    show("Whole step: ms of kernels, then with the gaps between launches", *step_table(net, spec), text)
    rows = measured(net, spec)
    if rows:
        show("Measured", *measured_table(rows), text)
    else:
        console.print(f"No file in benchmarks/results has this step on {spec.name}: nothing to compare with.")


def generate(jobs: int = 1) -> str:
    """The text of `PATH`."""
    from fastres.codegen import model_page

    return model_page.text()
