"""What ``fastres tune`` does and prints, and the tuning section of ``fastres doctor``."""

from __future__ import annotations

import math
from collections.abc import Iterator

from rich import box
from rich.markup import escape
from rich.table import Table


def tune(model: str, batch: int, size: int, dtype: str, train: bool) -> list:
    """Rows of ``fastres.tune`` for a known model on random pixels. Raises BenchError, one line for the user."""
    import torch

    import fastres
    from fastres.bench import BenchError, contestants, harness, inputs

    if model not in contestants.names():
        raise BenchError(f"MODEL: got {model!r}, expected one of {', '.join(contestants.names())}")
    if dtype not in harness.DTYPES:
        raise BenchError(f"--dtype: got {dtype!r}, expected one of {', '.join(harness.DTYPES)}")
    for what, value, least in (("batch", batch, 2 if train else 1), ("size", size, 32)):
        if value < least:
            raise BenchError(f"--{what}: got {value}, expected at least {least}")
    if not torch.cuda.is_available():
        raise BenchError("tune: torch sees no CUDA device; on a CPU convolutions are PyTorch's, nothing to tune")
    device, precision = torch.device("cuda", torch.cuda.current_device()), harness.DTYPES[dtype]
    built, _ = contestants.baseline(model)
    x, _ = inputs.batch_of(batch, size, None, 0)
    # As ``fastres bench`` runs them: training under autocast, inference all in one dtype.
    held = torch.float32 if train else precision
    built, x = (t.to(device, held, memory_format=torch.channels_last) for t in (built.train(train), x))
    built = contestants.fused(train)(built)
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True  # the strongest PyTorch a user can have with one line
    try:
        return fastres.tune(built, x, train=train, dtype=precision if train else None)
    except ValueError as error:
        raise BenchError(str(error)) from error
    finally:
        torch.backends.cudnn.benchmark = before


def results(rows: list, title: str) -> Iterator:
    """The table, then lines on what was rejected and where the winners are."""
    from fastres import tuning
    from fastres.problem import OperandRequest
    from fastres.tuning import LIBRARY, PASSES

    table = _table(title)
    for heading in ("request", "library us", "chosen", "us", "ratio"):
        right = heading not in ("request", "chosen")
        table.add_column(heading, justify="right" if right else "left", no_wrap=right, overflow="fold")
    for row in rows:
        style = None if row.choice.backend in (LIBRARY.backend, PASSES) else "green"
        cells = (_us(row.library_us), escape(str(row.choice)), _us(row.us), f"{row.ratio:.2f}x")
        table.add_row(escape(str(row.request)), *cells, style=style)
    yield table
    plans = [row for row in rows if isinstance(row.request, OperandRequest)]
    # What forms an operand while loading stands for a pass as well, and serves only where a plan says so.
    plain = [row for row in rows if row not in plans and not set(row.request.hooks) & {"prologue", "pre"}]
    before, after = sum(row.library_us for row in plain), sum(row.us for row in plain)
    both = f"{_us(before)} us with PyTorch's calls, {_us(after)} us as chosen"
    yield f"{len(plain)} distinct convolutions, each once: {both}"
    if plans:
        loading = [row for row in plans if row.choice.backend != PASSES]
        spared = sum(row.library_us - row.us for row in loading)
        places = f"{len(loading)} of {len(plans)} places"
        yield f"operands formed while loading: in {places}, {_us(spared)} us less than passes"
    for row in rows:
        for choice, why in row.rejected.items():
            yield f"rejected: {choice} for {row.request}: {why}"
    for gpu in tuning.status()["gpus"]:
        yield f"winners: {gpu['file'] or 'in memory only'}"


def _us(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def section(found: dict, short: bool) -> Iterator[Table]:
    """Tables of ``doctor``: where the cache is and how full, then what is in force and what was switched off."""
    page = _table("Verified tuning of convolutions", show_header=False)
    page.add_column(style="cyan", no_wrap=True)
    page.add_column(overflow="fold")
    page.add_row("cache", escape(found["directory"] or "none: set FASTRES_CACHE_DIR"))
    mine = {gpu["file"] for gpu in found["gpus"]}
    for name, holds in found["files"].items():
        if not any(file and file.endswith(name) for file in mine):
            held = f"{holds} entries of another GPU or other versions" if isinstance(holds, int) else holds
            page.add_row(escape(name), f"[dim]{escape(held)}[/dim]")
    for gpu in found["gpus"]:
        ours = sum(entry["chosen"] not in ("library", "passes") for entry in gpu["in_force"])
        counts = f"{gpu['entries']} entries; {len(gpu['in_force'])} tuned, of which {ours} by kernels of ours"
        page.add_row(gpu["gpu"], f"{counts}; {len(gpu['rejected'])} configurations rejected")
        page.add_row("", escape(gpu["file"] or "in memory only"))
    if not found["gpus"]:
        page.add_row("in force", "nothing: no GPU that torch can use")
    yield page
    for gpu in found["gpus"] if not short else ():
        if gpu["in_force"]:
            yield _in_force(gpu)
        if gpu["rejected"]:
            yield _rejected(gpu)


def _in_force(gpu: dict) -> Table:
    table = _table(f"Tuned on {gpu['gpu']}")
    for heading in ("request", "serves", "us", "library us"):
        table.add_column(heading, justify="right" if heading.endswith("us") else "left", overflow="fold")
    for entry in gpu["in_force"]:
        cells = (entry["request"], entry["chosen"], _us(entry["us"]), _us(entry["library_us"]))
        table.add_row(*map(escape, cells))
    return table


def _rejected(gpu: dict) -> Table:
    table = _table(f"Switched off on {gpu['gpu']}")
    for heading in ("configuration", "request", "why"):
        table.add_column(heading, overflow="fold")
    for entry in gpu["rejected"]:
        table.add_row(*map(escape, (entry["choice"], entry["request"], entry["why"])))
    return table


def _table(title: str, **options) -> Table:
    return Table(
        title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False, **options
    )  # fmt: skip
