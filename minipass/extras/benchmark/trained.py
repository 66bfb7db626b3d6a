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

    Each checkpoint given is evaluated on the same held-out text, at temperature 1. Where a log.jsonl lies beside it, as
    in a run's folder, the acceptance of [LA]_1 is drawn against the minutes of training, taken as even over the steps.
    A base that predicts badly is easier to draft for, so its loss stands beside.
    """
    found: list[tuple[Subject, Path | None]] = [(each, None) for each in (bench.subject, bench.frozen) if each]
    found += bench.compared
    rows, by_position, by_time = [], [], []
    for colour, (subject, log) in enumerate(found):
        record, forced = subject.loaded.record, bench.forced(subject, bench.data)
        curve = training_curve(log, record) if log else []
        trained = {name: record.get(name) for name in ("stage", "loss", "step", "seconds")}
        rows.append({"checkpoint": subject.name, "training": trained, "teacher_forced": forced, "curve": curve})
        positions = range(1, len(forced["acceptance"]) + 1)
        by_position.append(plots.Line(subject.name, positions, forced["acceptance"], colour))
        if curve:
            by_time.append(plots.Line(subject.name, *zip(*curve, strict=True), colour))
    lines = []
    for row in rows:
        trained, forced = row["training"], row["teacher_forced"]
        minutes = "-" if trained["seconds"] is None else f"{trained['seconds'] / 60:.0f}"
        kind, loss = f"{trained['stage'] or '-'}, {trained['loss'] or '-'}", f"{forced['loss']:.3f}"
        lines.append(
            [f"`{row['checkpoint']}`", kind, minutes, loss, shares(forced["acceptance"]), shares(forced["match"])]
        )
    heads = ["checkpoint", "stage, loss", "minutes", "base loss", "expected acceptance by position", "greedy match"]
    note = f"Teacher-forced on held-out text ({bench.data}), temperature 1; minutes are of the last stage of training."
    panels = [plots.Panel("look-ahead position", "expected acceptance", by_position, {"ylim": (0, 1)})]
    if by_time:
        panels.append(plots.Panel("minutes of training", "expected acceptance of [LA]_1", by_time, {"ylim": (0, 1)}))
    return Report(note + "\n\n" + table(heads, lines), {"rows": rows}, {"acceptance": plots.curves(panels)})


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

    Beside each table's acceptance stands that of a constant p, the model's mean distribution over the held-out text:
    what a drafter has who knows nothing of the context. A base that predicts badly is easier to draft for.
    """
    if not bench.compared:
        return Report("Left out: name checkpoints with tables on frozen bases, --compare RUN RUN ...", {"rows": []})
    rows = []
    for subject, _ in bench.compared:
        forced, model = bench.forced(subject, bench.data), subject.model
        tokens = bench.tokens(subject, bench.data)
        constant = constant_acceptance(model, even_windows(tokens, CONSTANT_WINDOWS, model.config.block_size))
        row = {"checkpoint": subject.name, "weights": weights_read(model), "constant_acceptance": constant}
        rows.append({**row, "teacher_forced": forced})
    rows.sort(key=lambda row: (row["weights"], len(row["teacher_forced"]["acceptance"])))
    heads = ["checkpoint", "weights", "base loss", "acceptance of a constant p", "of the table, by position"]
    cells = [
        [
            f"`{row['checkpoint']}`",
            f"{row['weights'] / 1e6:.2g}M",
            f"{row['teacher_forced']['loss']:.3f}",
            f"{row['constant_acceptance']:.2f}",
            shares(row["teacher_forced"]["acceptance"]),
        ]
        for row in rows
    ]
    lines, longest = [], {row["weights"]: row for row in rows}.values()  # of each base the table with most positions
    weights = [row["weights"] / 1e6 for row in longest]
    for position in range(min(4, *(len(row["teacher_forced"]["acceptance"]) for row in longest))):
        own = [row["teacher_forced"]["acceptance"][position] for row in longest]
        lines.append(plots.Line(f"[LA]_{position + 1}", weights, own, position))
    lines.append(plots.Line("a constant p", weights, [row["constant_acceptance"] for row in longest], 6, ":"))
    panel = plots.Panel("million weights", "expected acceptance", lines, {"xscale": "log", "ylim": (0, None)})
    note = f"Teacher-forced on held-out text ({bench.data}), temperature 1."
    return Report(note + "\n\n" + table(heads, cells), {"rows": rows}, {"bases": plots.curves([panel])})


@torch.inference_mode()
def constant_acceptance(model: GPT, windows: torch.Tensor) -> float:
    """Expected acceptance sum(min(p, q)) of the mean q as p, over windows (N, T) of text."""
    q = torch.cat([model(batch.to(model.device)).float().softmax(-1).flatten(0, 1) for batch in windows.split(4)])
    return torch.minimum(q.mean(0), q).sum(-1).mean().item()
