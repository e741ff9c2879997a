"""Figures as files, which are there whole or not at all."""

from __future__ import annotations

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from hf_bilb.storage.writing import written_aside


def save_figure(figure: Figure, path: Path) -> Path:
    """Write the figure as PNG; returns the path."""
    FigureCanvasAgg(figure)
    with written_aside(path) as aside:
        figure.savefig(aside, dpi=130, facecolor="white", format="png")
    return path
