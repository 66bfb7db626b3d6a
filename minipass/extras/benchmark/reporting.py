"""How the bench says what it found: Markdown tables, and words for figures."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from matplotlib.figure import Figure

from minipass.extras.benchmark import plots
from minipass.extras.benchmark.contenders import Bench, Subject
from minipass.extras.benchmark.measuring import Contender, Sample, figures, take_turns

OVER_PLAIN = "speed-up over plain decoding"


@dataclass
class Report:
    """What an experiment found: Markdown, plain values for JSON, and pictures by name. panels: of plots.intervals."""

    parts: list[str] = field(default_factory=list)
    data: dict = field(default_factory=dict)
    pictures: dict[str, Figure] = field(default_factory=dict)
    panels: list[tuple[str, list[tuple[str, float, float, float]]]] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "\n\n".join(self.parts)

    def race(
        self, bench: Bench, domain: str, decoding: str, contenders: Sequence[Contender], counts: str = ""
    ) -> tuple[list[dict], list[list[Sample]]]:
        """Runs contenders against each other: measuring.figures of each, as a table too, and the samples."""
        title = f"{domain}, {decoding}"
        samples = take_turns(contenders, bench.seed, title)
        rows = figures(contenders, samples)
        self.parts.append(bench.caption(bench.subject, decoding, counts or bench.counts(domain)) + ":")
        self.parts.append(table(rows, METHODS_TABLE))
        speedups = [(label(row), *row["speedup"]) for row in rows if row["speedup"] != [1.0, 1.0, 1.0]]  # no baselines
        self.panels.append((title, speedups))
        return rows, samples

    def draw_speedups(self, name: str) -> None:
        """One picture of all races."""
        self.pictures[name] = plots.intervals(self.panels, f"{OVER_PLAIN} (median, quartiles)", 1.0)

    def forced(self, bench: Bench, domain: str, *subjects: Subject) -> dict[str, dict]:
        """Says the teacher-forced figures of each subject; returns them by name."""
        found = {each.name: bench.forced(each, domain) for each in subjects}
        self.parts += [teacher_forced(name, f"held-out text ({domain})", forced) for name, forced in found.items()]
        return found


def table(rows: Sequence[dict], columns: dict[str, Callable[[dict], str]]) -> str:
    """A Markdown table: by its head, what each column says of a row."""
    lines = [[*columns], ["---"] * len(columns), *([cell(row) for cell in columns.values()] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def teacher_forced(name: str, text: str, figures: dict) -> str:
    """losses.evaluate's figures of a checkpoint, in a sentence."""
    return (
        f"`{name}` teacher-forced on {text}: base loss {figures['loss']:.3f} nats/token; expected acceptance by "
        f"position {shares(figures['acceptance'])}; greedy match {shares(figures['match'])}."
    )


def shares(values: Sequence[float]) -> str:
    """0.61 0.28 ..., or - for none."""
    return " ".join(f"{value:.2f}" for value in values) or "-"


def spread(three: Sequence[float], digits: int = 2, scale: float = 1) -> str:
    """A median with its quartiles."""
    low, middle, high = (f"{scale * value:.{digits}f}" for value in three)
    return f"{middle} ({low} to {high})"


def label(row: dict) -> str:
    """A row of measuring.figures by name and L."""
    return f"{row['method']}, L = {row['lookahead']}" if row["lookahead"] else row["method"]


METHOD: dict[str, Callable[[dict], str]] = {
    "method": lambda row: row["method"],
    "L": lambda row: str(row["lookahead"] or "-"),
    "tokens/pass": lambda row: f"{row['tokens_per_pass']:.2f}" if row["tokens_per_pass"] else "-",
}
METHODS_TABLE = METHOD | {
    "accepted by position": lambda row: shares(row["accepted_by_position"]),
    "speed-up (quartiles)": lambda row: spread(row["speedup"]),
    "tokens/s": lambda row: f"{row['tokens_per_second'][1]:.0f}",
    "repeated 8-grams": lambda row: f"{row['repeated_8grams']:.0%}",
    "as plain": lambda row: f"{row['same_text']:.0%}",
}
