"""The bar chart of a profile: every node's time beside what the machine's rates would allow. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path

from fastres.drawing import FAINT, GRID, INK, pyplot_off_screen, save, write_caption
from fastres.inference.reporting import Report

_COLOURS = {
    "stem": "#7a5195", "conv": "#58508d", "basic_block": "#e4572e", "bottleneck": "#e4572e",
    "global_avg_pool": "#6b7785", "linear": "#2f8f6b", "torch module": "#b4bec9",
}  # fmt: skip


def profile_chart(report: Report, path: Path) -> Path:
    """One bar a node (median ms), a tick where its estimate lies, its share of peak beside it."""
    pyplot = pyplot_off_screen()
    rows = [row for row in report.rows if row.measured_ms is not None]
    figure, axes = pyplot.subplots(figsize=(9, 1.75 + 0.3 * len(rows)))
    height = figure.get_size_inches()[1]
    longest = max(len(row.name or "(model)") for row in rows)
    figure.subplots_adjust(
        left=min(0.08 + 0.0085 * longest, 0.4), right=0.97, top=1 - 0.62 / height, bottom=0.82 / height
    )
    widest = max(max(row.measured_ms, row.estimated_ms or 0.0) for row in rows)
    axes.set_xlim(0, widest * 1.3)
    for place, row in enumerate(rows):
        axes.barh(place, row.measured_ms, height=0.66, color=_COLOURS.get(row.op, "#8d99ae"), zorder=2)
        if row.estimated_ms is not None:
            axes.plot([row.estimated_ms] * 2, [place - 0.38, place + 0.38], color=INK, linewidth=1.6, zorder=3)
        text = f"{row.measured_ms:.3g} ms"
        if row.share is not None:
            text += f"   {row.share:.0%} of peak"
        anchor = max(row.measured_ms, row.estimated_ms or 0.0) + widest * 0.012
        axes.text(anchor, place, text, va="center", fontsize=8, color=INK)
    axes.set_yticks(range(len(rows)), [row.name or "(model)" for row in rows], fontsize=8.5)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xticks([tick for tick in axes.get_xticks() if tick <= widest])
    axes.tick_params(axis="both", length=0)
    axes.tick_params(axis="x", labelsize=8)
    axes.grid(axis="x", color=GRID, linewidth=0.8, zorder=0)
    for side in ("top", "right", "bottom"):
        axes.spines[side].set_visible(False)
    axes.set_xlabel(
        "milliseconds, median, each node on its own (shorter is better); black tick: estimate",
        fontsize=8.5,
        color=FAINT,
    )
    top = 1 - 0.3 / height
    figure.text(
        0.03, top, f"{report.title.rpartition('.')[2]}, inference by node", fontsize=13, fontweight="bold", va="center"
    )
    size = " x ".join(map(str, report.shape))
    whole = f"{size}, {report.dtype}, whole call {report.total_ms:.3g} ms"
    figure.text(0.97, top, whole, fontsize=9.5, color=FAINT, va="center", ha="right")
    write_caption(
        figure, f"{report.caption()}\npeak and estimates from rates measured here: {report.rates()}", 0.1 / height
    )
    return save(figure, pyplot, path)
