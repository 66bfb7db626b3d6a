"""How the bench says what it found: Markdown tables, and words for figures."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from matplotlib.figure import Figure

from minipass.extras.benchmark.contenders import Subject


@dataclass
class Report:
    """What an experiment found: Markdown, plain values for JSON, and pictures by name."""

    text: str
    data: dict
    pictures: dict[str, Figure] = field(default_factory=dict)


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def shares(values: Sequence[float]) -> str:
    """0.61 0.28 ..., or - for none."""
    return " ".join(f"{value:.2f}" for value in values) or "-"


def spread(three: Sequence[float], digits: int = 2) -> str:
    """A median with its quartiles."""
    low, middle, high = (f"{value:.{digits}f}" for value in three)
    return f"{middle} ({low} to {high})"


def methods_table(rows: Sequence[dict], greedy: bool) -> str:
    """The table of measuring.figures. Texts are compared with plain decoding's only where there is one right text."""
    heads = ["method", "L", "tokens/pass", "kept by position", "speed-up (quartiles)", "tokens/s", "repeated 8-grams"]
    lines = [
        [
            row["method"],
            str(row["lookahead"] or "-"),
            f"{row['tokens_per_pass']:.2f}" if row["tokens_per_pass"] else "-",
            shares(row["kept_by_position"]),
            spread(row["speedup"]),
            f"{row['tokens_per_second'][1]:.0f}",
            f"{row['repeated_8grams']:.0%}",
            *([f"{row['same_text']:.0%}"] if greedy else []),
        ]
        for row in rows
    ]
    return table([*heads, "as plain"] if greedy else heads, lines)


def forced_line(subject: Subject, forced: dict, domain: str) -> str:
    """Teacher-forced figures in words."""
    return (
        f"`{subject.name}` teacher-forced on held-out text ({domain}): base loss {forced['loss']:.3f} nats/token; "
        f"expected acceptance by position {shares(forced['acceptance'])}; greedy match {shares(forced['match'])}."
    )


def label(row: dict) -> str:
    """A row of measuring.figures by name and L."""
    return f"{row['method']}, L = {row['lookahead']}" if row["lookahead"] else row["method"]


def speedups(rows: Sequence[dict]) -> list[tuple[str, float, float, float]]:
    """Rows of plots.intervals, without the baselines."""
    return [(label(row), *row["speedup"]) for row in rows if row["speedup"] != [1.0, 1.0, 1.0]]
