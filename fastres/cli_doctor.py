"""Tables of ``fastres doctor`` about kernels that are chosen where they serve: CPU convolutions, whole blocks."""

from __future__ import annotations

from collections.abc import Iterator

from rich import box
from rich.markup import escape
from rich.table import Table


def section(found: dict, short: bool) -> Iterator[Table]:
    """``found``: of ``doctor.examine``."""
    page = pairs("Convolutions on the CPU, for instance 3x3 of 64 channels")
    for row in found["cpu_convolutions"]:
        theirs = [kind for kind in ("fprop", "dgrad", "wgrad") if kind not in row["ours"]]
        whose = [f"[green]{', '.join(row['ours'])} by fastres[/green]"] if row["ours"] else []
        whose += [f"{', '.join(theirs)} by PyTorch"] if theirs else []
        page.add_row(row["dtype"], f"{'; '.join(whose)} [dim]({escape(row['why'])})[/dim]")
    page.add_row("matrix unit", escape(found["matrix_unit"]))
    page.add_row("pairs of bf16", escape(found["pairs_unit"]))
    yield page
    if short:
        return
    page = pairs("In one kernel, on a GPU")
    asked, gpus = found["one_pass"]["asked"], found["one_pass"]["gpus"]
    state = (
        "asked for (FASTRES_ONE_PASS=1)" if asked else "off: FASTRES_ONE_PASS=1 asks for it, no GPU has timed it yet"
    )
    page.add_row("batch normalisation", state)
    for name, reasons in gpus.items():
        page.add_row("", f"{escape(name)}: {escape('; '.join(reasons)) or 'serves 25088 x 64 in bfloat16'}")
    blocks = found["whole_blocks"]
    verdicts = [f"{block}: {why or 'one kernel'}" for block, why in blocks["verdicts"].items()]
    page.add_row("evaluation blocks", escape("\n".join(verdicts)) or "nothing decided in this process")
    for row in blocks["typical"]:
        page.add_row(
            "", f"GPU {row['gpu']}, {escape(row['shape'])}: {escape('; '.join(row['why_not'])) or 'can serve'}"
        )
    if not blocks["typical"]:
        page.add_row("", "no GPU that torch can use")
    for row in blocks["unserved"]:
        why = escape("; ".join(row["why_not"]))
        page.add_row("", f"{escape(row['shape'])}: separate convolutions on any GPU ({why})")
    yield page


def pairs(title: str) -> Table:
    """An empty page of names and what is said of them."""
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, show_header=False)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    return table
