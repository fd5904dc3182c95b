"""PNG figures of result rows and loss curves. Needs matplotlib; drawn off screen."""

from __future__ import annotations

import re
from pathlib import Path

from fastres.bench import rows as result_rows
from fastres.drawing import FAINT, GRID, INK, pyplot_off_screen, save, write_caption

COLOURS = {"eager": "#b4bec9", "torch.compile": "#6f8fb3", result_rows.FOLDED: "#f2a65a", "fastres": "#e4572e"}
LABELS = {"eager": "PyTorch eager\n(channels_last)", "torch.compile": "torch.compile"}


def bench_chart(rows: list[dict], path: Path | str) -> Path:
    """One horizontal bar per contestant: median time, quartile whiskers, images/s, ratio to eager, provenance."""
    pyplot = pyplot_off_screen()
    first = rows[0]
    figure, axes = pyplot.subplots(figsize=(9, 1.9 + 0.72 * len(rows)))
    height = figure.get_size_inches()[1]
    figure.subplots_adjust(left=0.17, right=0.97, top=1 - 0.85 / height, bottom=0.98 / height)

    widest = max(r["quantiles_ms"]["p75"] for r in rows)
    axes.set_xlim(0, widest * 1.45)
    for place, row in enumerate(rows):
        median, q = row["median_ms"], row["quantiles_ms"]
        axes.barh(place, median, height=0.62, color=COLOURS.get(row["backend"], "#8d99ae"), zorder=2)
        axes.plot([q["p25"], q["p75"]], [place, place], color=INK, linewidth=1.2, zorder=3, solid_capstyle="butt")
        for end in (q["p25"], q["p75"]):
            axes.plot([end, end], [place - 0.09, place + 0.09], color=INK, linewidth=1.2, zorder=3)
        ratio = row["ratio_to_eager"]
        error = row["error_vs_float64"]["logits"]
        text = f"{median:,.{0 if median >= 1000 else 1}f} ms   {row['images_per_s']:,.1f} img/s   error {error:.0e}"
        verdict = "outside the error budget" if ratio is None else f"{ratio:.2f}x eager"
        if ratio is not None and result_rows.is_ours(row["backend"]) and row["best_peer"] != "eager":
            verdict += f", {row['ratio_to_best_peer']:.2f}x {row['best_peer']}"
        anchor = max(q["p75"], median) + widest * 0.015
        ours = row["backend"] == "fastres"
        axes.text(anchor, place - 0.13, verdict if row["backend"] != "eager" else "baseline", va="center",
                  fontsize=11 if ours else 10, fontweight="bold" if ours else "normal",
                  color=COLOURS["fastres"] if ours else INK)  # fmt: skip
        axes.text(anchor, place + 0.19, text, va="center", fontsize=8, color=FAINT)

    axes.set_yticks(range(len(rows)), [_label(r) for r in rows], fontsize=9.5)
    axes.invert_yaxis()
    axes.set_xticks([tick for tick in axes.get_xticks() if tick <= widest])
    axes.tick_params(axis="both", length=0)
    axes.tick_params(axis="x", labelsize=8)
    axes.grid(axis="x", color=GRID, linewidth=0.8, zorder=0)
    for side in ("top", "right", "bottom"):
        axes.spines[side].set_visible(False)
    step = "one training step" if first["mode"] == "training" else "inference"
    label = f"milliseconds per batch of {first['shape'][0]} (median, whiskers: quartiles)"
    axes.set_xlabel(f"{label}; shorter is better; error: logits against float64", fontsize=8.5, color=FAINT)
    size = first["shape"][2]
    title = f"{first['model']}, {step}"
    figure.text(0.03, 1 - 0.34 / height, title, fontsize=14, fontweight="bold", va="center")
    detail = f"batch {first['shape'][0]}, {size} x {size} px, {first['dtype']}, {first['device'].upper()}"
    figure.text(0.97, 1 - 0.34 / height, detail, fontsize=9.5, color=FAINT, va="center", ha="right")
    write_caption(figure, result_rows.caption(first), 0.1 / height)
    return save(figure, pyplot, path)


def _label(row: dict) -> str:
    """Contestants of fastres with the function that makes them."""
    call = re.match(r"[\w.]+", row.get("call", ""))
    folded = ", fold" if "fold=True" in row.get("call", "") else ""
    return LABELS.get(row["backend"]) or (f"{call[0]}{folded}" if call else row["backend"])


def loss_curves(curves: dict[str, list[float]], path: Path | str, *, title: str, detail: str, caption: str) -> Path:
    """Two (or more) loss curves over optimizer steps, drawn so that coinciding curves are both seen."""
    pyplot = pyplot_off_screen()
    figure, axes = pyplot.subplots(figsize=(8, 4.6))
    figure.subplots_adjust(left=0.09, right=0.97, top=0.86, bottom=0.22)
    styles = [{"color": COLOURS["eager"], "linewidth": 5}, {"color": COLOURS["fastres"], "linewidth": 1.4}]
    for (label, losses), style in zip(curves.items(), styles, strict=False):
        axes.plot(range(1, len(losses) + 1), losses, label=label, **style)
    axes.set_yscale("log")
    axes.set_xlabel("optimizer step", fontsize=9, color=FAINT)
    axes.set_ylabel("training loss (cross entropy)", fontsize=9, color=FAINT)
    axes.tick_params(length=0, labelsize=8, which="both")
    axes.grid(color=GRID, linewidth=0.8, which="major")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(frameon=True, edgecolor="white", framealpha=1, fontsize=9.5)
    figure.text(0.03, 0.935, title, fontsize=13, fontweight="bold", va="center")
    figure.text(0.97, 0.935, detail, fontsize=9, color=FAINT, va="center", ha="right")
    write_caption(figure, caption, 0.02)
    return save(figure, pyplot, path)
