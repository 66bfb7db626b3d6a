"""The bench's pictures: curves, and intervals in rows. On a white ground, so that they read on light and dark pages.

The colours are told apart by colour-blind eyes, and each line has a marker of its own besides.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"
SIZE = 4.6  # inches of a panel's side


@dataclass(frozen=True)
class Line:
    """A curve through (x, y); best: index of a point to ring; colour: number of its colour and marker."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int
    style: str = "-"
    best: int | None = None


@dataclass(frozen=True)
class Panel:
    """Axes with lines. settings: more arguments of matplotlib's Axes.set."""

    xlabel: str
    ylabel: str
    lines: Sequence[Line]
    settings: dict = field(default_factory=dict)


def curves(panels: Sequence[Panel]) -> Figure:
    """The panels side by side, each with its own legend."""
    figure = Figure(figsize=(1.3 * SIZE * len(panels), SIZE), layout="constrained", facecolor="white")
    for axes, panel in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels, strict=True):
        for line in panel.lines:
            colour, marker = COLOURS[line.colour % len(COLOURS)], MARKERS[line.colour % len(MARKERS)]
            axes.plot(line.x, line.y, line.style, color=colour, marker=marker, markersize=4, label=line.label)
            if line.best is not None:
                axes.plot(line.x[line.best], line.y[line.best], "o", color=colour, markersize=12, fillstyle="none")
        axes.set(xlabel=panel.xlabel, ylabel=panel.ylabel, **panel.settings)
        axes.grid(color="#DDDDDD", linewidth=0.6)
        if panel.lines:
            axes.legend(fontsize="small")
    return figure


def intervals(
    panels: Sequence[tuple[str, Sequence[tuple[str, float, float, float]]]], xlabel: str, reference: float | None = None
) -> Figure:
    """Panels one below the other: (title, rows), a row being (label, low, middle, high), drawn as a dot with a bar."""
    heights = [1 + len(rows) for _, rows in panels]
    size = (1.6 * SIZE, 0.28 * sum(heights) + 0.35 * len(panels) + 0.5)
    figure = Figure(figsize=size, layout="constrained", facecolor="white")
    columns = figure.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=heights)
    for axes, (title, rows) in zip(columns[:, 0], panels, strict=True):
        for place, (_, low, middle, high) in enumerate(rows):
            axes.plot([low, high], [place, place], "-", color=COLOURS[0], linewidth=2)
            axes.plot(middle, place, "o", color=COLOURS[1], markersize=6)
        if reference is not None:
            axes.axvline(reference, color="#555555", linewidth=1, linestyle="--")
        axes.set_yticks(range(len(rows)), [label for label, *_ in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_title(title, fontsize=10)
        axes.grid(axis="x", color="#DDDDDD", linewidth=0.6)
    columns[-1, 0].set_xlabel(xlabel)
    return figure
