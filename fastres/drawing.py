"""What all figures share: colours, matplotlib off screen, captions."""

from __future__ import annotations

import textwrap
from pathlib import Path

INK, FAINT, GRID = "#1f2933", "#6b7785", "#e3e8ee"


def pyplot_off_screen():
    """matplotlib.pyplot, styled and drawing off screen. Raises ValueError where matplotlib is missing."""
    try:
        import matplotlib
    except ImportError as error:
        raise ValueError("a PNG needs the package matplotlib (pip install matplotlib)") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update(
        {"font.family": "DejaVu Sans", "text.color": INK, "axes.labelcolor": INK, "xtick.color": FAINT,
         "ytick.color": INK, "axes.edgecolor": GRID}
    )  # fmt: skip
    return pyplot


def save(figure, pyplot, path: Path | str) -> Path:
    """Write the figure, its directory made, and close it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160, facecolor="white")
    pyplot.close(figure)
    return path


def write_caption(figure, text: str, bottom: float) -> None:
    """``text`` in small print at height ``bottom`` (a fraction of the figure's), long lines wrapped once."""
    lines = [wrapped for line in text.splitlines() for wrapped in textwrap.wrap(line, 150)[:2]]
    figure.text(0.03, bottom, "\n".join(lines), fontsize=6.8, color=FAINT, va="bottom", linespacing=1.5)
