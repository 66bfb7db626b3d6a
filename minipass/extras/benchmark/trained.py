"""The bench's experiments on training: which checkpoint drafts best, and does a frozen base's size matter?"""

import json
from pathlib import Path

import torch

from minipass.data import even_windows
from minipass.errors import InputError
from minipass.extras.benchmark import plots
from minipass.extras.benchmark.contenders import Bench, Subject
from minipass.extras.benchmark.costs import weights_read
from minipass.extras.benchmark.reporting import Report, shares, table
from minipass.model import GPT

CONSTANT_WINDOWS = 32


def acceptance(bench: Bench) -> Report:
    """Which training drafts best? Teacher-forced acceptance by position, and how it grew with training time.

    Each checkpoint given is evaluated on the same held-out text, at temperature 1. Where a log.jsonl is beside it, as
    in a run's folder, the acceptance of [LA]_1 is drawn against the minutes of training, taken as even over the steps.
    A base that predicts badly is easier to draft for, so its loss is there too.
    """
    found: list[tuple[Subject, Path | None]] = [(each, None) for each in (bench.subject, bench.frozen) if each]
    rows, by_position, by_time = [], [], []
    for colour, (subject, log) in enumerate(found + bench.compared):
        record, forced = subject.loaded.record, bench.forced(subject, bench.data)
        curve = training_curve(log, record) if log else []
        trained = {name: record.get(name) for name in ("stage", "loss", "step", "seconds")}
        rows.append({"checkpoint": subject.name, "training": trained, "teacher_forced": forced, "curve": curve})
        positions = range(1, len(forced["acceptance"]) + 1)
        by_position.append(plots.Line(subject.name, positions, forced["acceptance"], colour))
        if curve:
            by_time.append(plots.Line(subject.name, *zip(*curve, strict=True), colour))
    columns = {
        "checkpoint": lambda row: f"`{row['checkpoint']}`",
        "stage, loss": lambda row: "{}, {}".format(*(row["training"][name] or "-" for name in ("stage", "loss"))),
        "minutes": lambda row: "-" if row["training"]["seconds"] is None else f"{row['training']['seconds'] / 60:.0f}",
        "base loss": lambda row: f"{row['teacher_forced']['loss']:.3f}",
        "expected acceptance by position": lambda row: shares(row["teacher_forced"]["acceptance"]),
        "greedy match": lambda row: shares(row["teacher_forced"]["match"]),
    }
    note = f"Teacher-forced on held-out text ({bench.data}), temperature 1; minutes are of the last stage of training."
    panels = [plots.Panel("look-ahead position", "expected acceptance", by_position, {"ylim": (0, 1)})]
    if by_time:
        panels.append(plots.Panel("minutes of training", "expected acceptance of [LA]_1", by_time, {"ylim": (0, 1)}))
    return Report([note, table(rows, columns)], {"rows": rows}, {"acceptance": plots.curves(panels)})


def training_curve(log: Path, record: dict) -> list[tuple[float, float]]:
    """(minutes, acceptance of [LA]_1) of each validation in a run's log.jsonl; none where there is no such file.

    Raises InputError when the log is of another kind.
    """
    try:
        entries = [json.loads(line) for line in log.read_text().splitlines()]
        minutes_a_step = record["seconds"] / 60 / record["step"]
        return [(e["step"] * minutes_a_step, e["acceptance"][0]) for e in entries if e.get("acceptance")]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise InputError(f"{log} is not the log of a training run ({type(error).__name__})") from error


def bases(bench: Bench) -> Report:
    """Does the paper's recipe, a table on a frozen base, come alive as the base grows? For the runs of --compare.

    Beside each table's acceptance is that of a constant p, the model's mean distribution over the held-out text: what
    a drafter has who knows nothing of the context. A base that predicts badly is easier to draft for.
    """
    if not bench.compared:
        return Report(["Left out: name checkpoints with tables on frozen bases, --compare RUN RUN ..."], {"rows": []})
    rows = []
    for subject, _ in bench.compared:
        forced, model = bench.forced(subject, bench.data), subject.model
        tokens = bench.tokens(subject, bench.data)
        constant = constant_acceptance(model, even_windows(tokens, CONSTANT_WINDOWS, model.config.block_size))
        row = {"checkpoint": subject.name, "weights": weights_read(model), "constant_acceptance": constant}
        rows.append({**row, "teacher_forced": forced})
    rows.sort(key=lambda row: (row["weights"], len(row["teacher_forced"]["acceptance"])))
    columns = {
        "checkpoint": lambda row: f"`{row['checkpoint']}`",
        "weights": lambda row: f"{row['weights'] / 1e6:.2g}M",
        "base loss": lambda row: f"{row['teacher_forced']['loss']:.3f}",
        "acceptance of a constant p": lambda row: f"{row['constant_acceptance']:.2f}",
        "of the table, by position": lambda row: shares(row["teacher_forced"]["acceptance"]),
    }
    longest = {row["weights"]: row for row in rows}.values()  # of each base the table with most positions
    lines, weights = [], [row["weights"] / 1e6 for row in longest]
    for position in range(min(4, *(len(row["teacher_forced"]["acceptance"]) for row in longest))):
        own = [row["teacher_forced"]["acceptance"][position] for row in longest]
        lines.append(plots.Line(f"[LA]_{position + 1}", weights, own, position))
    lines.append(plots.Line("a constant p", weights, [row["constant_acceptance"] for row in longest], 6, ":"))
    panel = plots.Panel("million weights", "expected acceptance", lines, {"xscale": "log", "ylim": (0, None)})
    note = f"Teacher-forced on held-out text ({bench.data}), temperature 1."
    return Report([note, table(rows, columns)], {"rows": rows}, {"bases": plots.curves([panel])})


@torch.inference_mode()
def constant_acceptance(model: GPT, windows: torch.Tensor) -> float:
    """Expected acceptance sum(min(p, q)) of the mean q as p, over windows (N, T) of text."""
    q = torch.cat([model(batch.to(model.device)).float().softmax(-1).flatten(0, 1) for batch in windows.split(4)])
    return torch.minimum(q.mean(0), q).sum(-1).mean().item()
