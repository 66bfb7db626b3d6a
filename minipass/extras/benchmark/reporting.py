"""How the bench reports: Markdown tables, and pictures that are readable on light and dark pages.

Colour-blind eyes can tell the pictures' colours apart, and each series also has its own marker.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from matplotlib.figure import Figure

COLOURS, LARGE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"), 20


@dataclass
class Report:
    """An experiment's results: parts in Markdown, plain values for JSON, and a picture."""

    parts: list[str] = field(default_factory=list)
    data: dict[str, list[dict]] = field(default_factory=dict)
    picture: Figure | None = None

    def add(self, name: str, caption: str, rows: Sequence[dict], columns: str) -> None:
        """Adds rows to the values under `name`, and as a table of the fields that `columns` names."""
        self.data.setdefault(name, []).extend(rows)
        fields = columns.split()
        lines = [map(words, fields), ["---"] * len(fields), *([say(row[each]) for each in fields] for row in rows)]
        self.parts += [caption, "\n".join(f"| {' | '.join(line)} |" for line in lines)]


def words(field: str) -> str:
    """A field's name as tables and pictures show it."""
    return field.replace("_", " ").replace(" per ", "/")


def say(value: Any) -> str:
    """A value as a table shows it; a tuple of low, middle and high becomes "middle (low to high)"."""
    if isinstance(value, tuple):
        return "{1} ({0} to {2})".format(*map(say, value))
    if isinstance(value, list):
        return " ".join(map(say, value)) or "-"
    if isinstance(value, float):
        return f"{value:.2f}" if abs(value) < 10 else f"{value:.0f}"
    return "-" if value is None else str(value)


def picture(rows: Sequence[dict], series: Sequence[str], x: str, *ys: str) -> Figure:
    """A panel for each y, over x. All are names of fields; the fields in `series` tell one series from another.

    A y of three numbers becomes a point with an error bar. If x is "position", y is a list, a value for each position.
    """
    figure = Figure(figsize=(7.0 * len(ys), 6.0), layout="constrained", facecolor="white")
    for axes, y in zip(figure.subplots(1, len(ys), squeeze=False)[0], ys, strict=True):
        lines: dict[str, list] = {}
        for row in rows:
            name = ", ".join(row[each] for each in series)
            for place, value in enumerate(row[y], 1) if x == "position" else [(row[x], row[y])]:
                lines.setdefault(name, []).append((place, *np.broadcast_to(np.array(value, float), 3)))
        for number, (name, points) in enumerate(lines.items()):
            places, low, middle, high = zip(*points, strict=True)
            style = {"color": COLOURS[number % 7], "marker": "osD^vPX"[number % 7], "label": name, "markersize": 5}
            style["linestyle"] = "none" if x == "method" else "-"
            axes.errorbar(places, middle, np.abs(np.subtract([low, high], middle)), **style)
        axes.tick_params("x", rotation=90 if isinstance(rows[0].get(x), str) else 0)
        axes.set(xlabel=words(x), ylabel=words(y))
        axes.grid(color="#DDDDDD", linewidth=0.6)
        axes.legend(fontsize="small", loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)
    return figure


def bars(speedups: dict[str, float], base: str, name: str, title: str) -> Figure:
    """For each label the base's bar, and one that is so many times as long; in large letters, for small screens."""
    figure = Figure(figsize=(8.7, 1.7 * len(speedups) + 0.9), layout="constrained", facecolor="white")
    axes, places, lengths = figure.subplots(), np.arange(len(speedups)), [*speedups.values()]
    said = [f" {name} {length:.2f}x" for length in lengths]
    axes.bar_label(axes.barh(places - 0.2, 1, 0.38, color="#999999"), [f" {base}"] * len(lengths), fontsize=LARGE)
    axes.bar_label(axes.barh(places + 0.2, lengths, 0.38, color=COLOURS[1]), said, fontsize=LARGE)
    axes.set_yticks(places, labels=[*speedups], fontsize=LARGE)
    axes.set_title(title, fontsize=LARGE)
    axes.set(xlim=(0, 1.35 * max(1, *lengths)), ylim=(len(lengths) - 0.5, -0.5), xticks=[])
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    return figure
