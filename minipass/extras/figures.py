"""Pictures of the attention masks: `python -m minipass.extras.figures FOLDER`. The masks are those of layout.py.

A picture has a row for each row of a pass and a column for each row that it may see; a filled cell means "sees". The
numbers on the right are positions.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from minipass.cli import run_script
from minipass.files import atomic_write
from minipass.layout import Layout, path, with_groups
from minipass.trees import Shape, chain

REAL, LOOKAHEAD, CACHE = "#0072B2", "#E69F00", "#8C8C8C"  # colour-blind eyes tell them apart, also by dots and hatches
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Panel:
    """One mask: its layout, the names of its rows, how many of them are real, and the length of a look-ahead group.

    start: the position of the first row after the cache, minus n, the number of real tokens when the turn begins (root
    included); None without a cache.
    """

    title: str
    layout: Layout
    names: list[str]
    n_real: int
    n_lookahead: int
    start: int | None

    @property
    def after_cache(self) -> bool:
        return self.start is not None

    def positions(self) -> list[str]:
        """The position of each row, in words."""
        depths = self.layout.depth[0].tolist()
        if self.start is None:
            return [str(depth) for depth in depths]
        return [f"n{depth + self.start:+d}" if depth + self.start else "n" for depth in depths]


def two_pass(n_lookahead: int = 3) -> list[Panel]:
    """The draft pass and the verify pass of two-pass decoding (PaSS, Algorithm 1)."""
    draft = ["root", *(f"LA{i}" for i in range(1, n_lookahead + 1))]
    verify = ["x", *(f"d{i}" for i in range(1, n_lookahead + 1))]
    return [
        Panel("draft pass", Shape(n_lookahead=n_lookahead).on(CPU).layout, draft, 1, n_lookahead, start=-1),
        Panel("verify pass", Shape(chain(n_lookahead)).on(CPU).layout, verify, 1 + n_lookahead, n_lookahead, start=0),
    ]


def fused(n_lookahead: int = 3) -> list[Panel]:
    """A fused pass; row (j, i) is LA_i of the group after draft j, for the case that j drafts are accepted."""
    steps = range(1, n_lookahead + 1)
    names = ["root", *(f"d{i}" for i in steps), *(f"({j},{i})" for j in range(n_lookahead + 1) for i in steps)]
    layout = Shape(chain(n_lookahead), n_lookahead).on(CPU).layout
    return [Panel("fused pass", layout, names, 1 + n_lookahead, n_lookahead, start=-1)]


def training(n_text: int = 9, cuts: tuple[int, ...] = (1, 3, 5), n_lookahead: int = 3) -> list[Panel]:
    """A training sequence: text t0.., and for each cut c the look-ahead rows (c, 1).. after token tc."""
    names = [f"t{i}" for i in range(n_text)] + [f"({c},{i})" for c in cuts for i in range(1, n_lookahead + 1)]
    layout = with_groups(path(n_text), cuts, n_lookahead)
    title = f"training sequence, cuts after {', '.join(f't{c}' for c in cuts)}"
    return [Panel(title, layout, names, n_text, n_lookahead, start=None)]


PICTURES = {"mask-two-pass": two_pass, "mask-fused": fused, "mask-training": training}


def draw_panel(axes, panel: Panel) -> None:
    """Draws a mask with named rows and columns into matplotlib axes, one unit a cell."""
    visible, n_rows = panel.layout.visible[0].numpy(), len(panel.names)
    first = -1 if panel.after_cache else 0  # the column of the cache
    for row in range(n_rows):
        for column in range(first, n_rows):
            if column < 0:
                style = {"facecolor": CACHE, "hatch": "///"}
            elif visible[row, column]:
                style = {"facecolor": REAL if column < panel.n_real else LOOKAHEAD}
            else:
                style = {"facecolor": "white"}
            axes.add_patch(Rectangle((column, row), 1, 1, edgecolor="#CCCCCC", linewidth=0.6, **style))
    dots = np.argwhere(visible[:, panel.n_real :])
    axes.scatter(dots[:, 1] + panel.n_real + 0.5, dots[:, 0] + 0.5, s=7, color="black", zorder=3)
    for start in range(panel.n_real, n_rows, panel.n_lookahead):  # where a group begins
        axes.axhline(start, color="black", linewidth=1)
        axes.axvline(start, color="black", linewidth=1)
    columns = ["cache"] * panel.after_cache + panel.names
    axes.set(xlim=(first, n_rows), ylim=(n_rows, 0), aspect="equal")
    axes.set_xticks(np.arange(first, n_rows) + 0.5, columns, rotation=90)
    axes.set_yticks(np.arange(n_rows) + 0.5, panel.names)
    axes.xaxis.tick_top()
    side = axes.secondary_yaxis("right")
    side.set_yticks(np.arange(n_rows) + 0.5, panel.positions())
    side.set_ylabel("position")
    for each in (axes, side):
        each.tick_params(length=0, labelsize=8)
    axes.set_title(panel.title, fontsize=10, pad=10)


def picture(panels: list[Panel]) -> Figure:
    """A figure of one or more masks side by side, on a white ground so that it reads on any page."""
    sizes = [len(panel.names) + panel.after_cache for panel in panels]
    figure = Figure(figsize=(sum(0.24 * size + 1.2 for size in sizes), 0.24 * max(sizes) + 1.5), layout="constrained")
    for axes, panel in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels, strict=True):
        draw_panel(axes, panel)
    kinds = [(CACHE, "the cache", "///"), (REAL, "sees a real row", ""), (LOOKAHEAD, "sees a look-ahead row", "")]
    kinds = kinds if panels[0].after_cache else kinds[1:]
    handles = [Patch(facecolor=colour, label=label, hatch=hatch, edgecolor="#CCCCCC") for colour, label, hatch in kinds]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(kinds), fontsize=8, frameon=False)
    return figure


def write_all(folder: Path) -> list[Path]:
    """Writes every picture as PNG into `folder`; returns their paths. Raises InputError when one cannot be written."""
    paths = []
    for name, panels in PICTURES.items():
        path, figure = folder / f"{name}.png", picture(panels())
        atomic_write(path, lambda place, figure=figure: figure.savefig(
            place, format="png", dpi=130, facecolor="white", metadata={"Software": None}))  # fmt: skip
        paths.append(path)
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where the pictures go")
    for picture in write_all(parser.parse_args().folder):
        print(picture)


if __name__ == "__main__":
    run_script(main)
