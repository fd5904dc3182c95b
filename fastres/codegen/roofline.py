"""Roofline of ResNet-50's stages: where each plan stands, and where cuDNN's convolutions were measured."""

from __future__ import annotations

import pathlib

from fastres.codegen import calibration, model, plans

PATH = model.PATH.with_name("roofline-resnet50.png")

INK, FAINT, GRID = "#1f2933", "#6b7785", "#e3e8ee"
COLOURS = {"eager": "#9aa7b4", "compile": "#6f8fb3", "fastres": "#f2a65a", "A'": "#e4572e", "A": "#8c1c0b"}
SHAPES = {1: ("o", "1x1"), 3: ("s", "3x3")}


def stage_point(net: plans.Network, plan: str, stage: int, chip: model.Chip) -> tuple[float, float, float]:
    """FLOP/byte, TFLOP/s and us an image of a whole stage, forward and backward."""
    total = model.add([k for b in net.blocks if b.stage == stage for k in plans.kernels(b, plan)], chip)
    return total.flops / total.bytes, total.flops / total.seconds / 1e12, total.seconds * 1e6 / net.batch


def layer_points(net: plans.Network, stage: int) -> dict[int, list[tuple[float, float]]]:
    """Filter size -> (FLOP/byte, TFLOP/s) of cuDNN's measured kernels in a stage, alone, batch 256."""
    found: dict[int, list[tuple[float, float]]] = {1: [], 3: []}
    for p in dict.fromkeys(p for b in net.blocks if b.stage == stage for p in b.convolutions):
        times = calibration.LAYERS[(p.C, p.K, p.H, p.R, p.stride[0])]
        for kind, us in zip(("fprop", "dgrad", "wgrad"), times, strict=True):
            k = plans.product(kind, p, "", "", "")
            found[p.R].append((k.flops / k.bytes, k.flops / us / 1e6))
    return found


def draw(path: pathlib.Path | str = PATH) -> pathlib.Path:
    """Draws the figure for the H100. Raises ``ValueError`` where matplotlib is missing."""
    try:
        import matplotlib
    except ImportError as error:
        raise ValueError("a PNG needs the package matplotlib (pip install matplotlib)") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    style = {"font.family": "DejaVu Sans", "text.color": INK, "axes.labelcolor": FAINT, "xtick.color": FAINT,
             "ytick.color": FAINT, "axes.edgecolor": GRID}  # fmt: skip
    chip, net = model.CHIPS["h100"], plans.network("resnet50", 256)
    with pyplot.rc_context(style):
        figure, grid = pyplot.subplots(2, 2, figsize=(11, 9), sharex=True, sharey=True)
        figure.subplots_adjust(left=0.075, right=0.975, top=0.865, bottom=0.115, wspace=0.06, hspace=0.15)
        for stage, axes in enumerate(grid.flat, 1):
            _panel(axes, net, stage, chip)
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.set_xlim(12, 1500)
            axes.set_ylim(25, 1250)
            axes.xaxis.set_major_locator(ticker.FixedLocator([20, 50, 100, 200, 500, 1000]))
            axes.yaxis.set_major_locator(ticker.FixedLocator([50, 100, 200, 400, 800]))
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
                axis.set_minor_locator(ticker.NullLocator())
            axes.tick_params(length=0, labelsize=8.5)
            axes.grid(color=GRID, linewidth=0.8, zorder=0)
            for side in ("top", "right"):
                axes.spines[side].set_visible(False)
        for axes in grid[1]:
            axes.set_xlabel("FLOP per byte of memory traffic", fontsize=9)
        for axes in grid[:, 0]:
            axes.set_ylabel("TFLOP/s", fontsize=9)
        figure.text(0.03, 0.958, "ResNet-50 training, stage by stage", fontsize=15, fontweight="bold", va="center")
        detail = (
            f"batch {net.batch}, bf16, {chip.name}: {chip.bandwidth / 1e12:.1f} TB/s, {chip.rate / 1e12:.0f} TFLOP/s"
        )
        figure.text(0.97, 0.958, detail, fontsize=9.5, color=FAINT, va="center", ha="right")
        figure.text(0.03, 0.922, "Fusion removes bytes, so a stage moves right and up along the roof.", fontsize=10)
        handles, labels = grid[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="upper right", bbox_to_anchor=(0.98, 0.942), ncols=3, frameon=False,
                      fontsize=9, handletextpad=0.4, columnspacing=1.4)  # fmt: skip
        caption = (
            "Filled: a plan over the whole stage, forward and backward, as the performance model predicts it "
            "(docs/kernels/model.md); numbers: us an image.\n"
            f"Hollow: cuDNN's fprop, dgrad and wgrad alone, measured: {calibration.SOURCE}."
        )
        figure.text(0.03, 0.018, caption, fontsize=7.5, color=FAINT, va="bottom", linespacing=1.6)
        path = pathlib.Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        # No software version in the file: the same numbers give the same bytes.
        figure.savefig(path, dpi=150, facecolor="white", metadata={"Software": None})
        pyplot.close(figure)
    return path


def _panel(axes, net: plans.Network, stage: int, chip: model.Chip) -> None:
    ridge = chip.rate / chip.bandwidth
    axes.plot([1, ridge, 1e4], [chip.bandwidth / 1e12, chip.rate / 1e12, chip.rate / 1e12], color=INK, linewidth=1.4,
              label="roof")  # fmt: skip
    for size, points in layer_points(net, stage).items():
        marker, name = SHAPES[size]
        axes.scatter(*zip(*points, strict=True), s=26, marker=marker, facecolors="none", edgecolors="#7b8794",
                     linewidths=0.9, zorder=3, label=f"cuDNN {name}, measured")  # fmt: skip
    for row, plan in enumerate(plans.PLANS):
        x, y, us = stage_point(net, plan, stage, chip)
        axes.scatter([x], [y], s=80, color=COLOURS[plan], edgecolors="white", linewidths=0.8, zorder=5)
        # The plans crowd along the roof: their names and times stand in the corner that is always empty.
        height, weight = 0.36 - 0.065 * row, "bold" if plan == "A'" else "normal"
        place = {"transform": axes.transAxes, "va": "center", "fontsize": 9.5, "fontweight": weight}
        axes.scatter([0.585], [height], s=60, color=COLOURS[plan], transform=axes.transAxes, zorder=5)
        axes.text(0.61, height, plans.LABELS.get(plan, f"plan {plan}"), ha="left", **place)
        axes.text(0.97, height, f"{us:.1f}", ha="right", **place)
    axes.text(0.97, 0.43, "predicted us/image", ha="right", va="center", fontsize=8, color=FAINT,
              transform=axes.transAxes)  # fmt: skip
    blocks = [b for b in net.blocks if b.stage == stage]
    last = blocks[-1].chain[-1]
    title = f"stage {stage}: {len(blocks)} blocks, {last.P} x {last.Q}, {blocks[0].chain[0].K} -> {last.K} channels"
    axes.set_title(title, loc="left", fontsize=10, color=INK)
