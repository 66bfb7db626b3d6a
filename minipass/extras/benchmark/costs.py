"""The bench's experiments on time: what a pass costs by rows and size, and whether that explains what is observed."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from tqdm import tqdm

from minipass.auto import turn_times
from minipass.decode import Fused, Plain
from minipass.extras.benchmark import plots
from minipass.extras.benchmark.contenders import FUSED, GREEDY, PLAIN, Bench
from minipass.extras.benchmark.measuring import memory_bandwidth, pass_seconds, predicted_speedup, quartiles
from minipass.extras.benchmark.reporting import METHOD, Report, spread, table
from minipass.model import GPT
from minipass.texts import TARGET_MODEL

ROWS = (1, 2, 4, 8, 16, 24, 32, 48, 64)
# Layers, heads, width of the random models whose passes are timed; on CUDA these are GPT-2's sizes.
LARGER = ((8, 8, 512), (12, 12, 768))
GPT2_SIZES = ((12, 12, 768), (24, 16, 1024), (36, 20, 1280), (48, 25, 1600))
GPT2_WINDOW, GPT2_VOCABULARY = 1024, 50_257
MANY_TOKENS = 10_000  # more than are made
PASS_REPEATS, TIMED_TURNS = 30, 24
SIZES_OF_TREES = (8, 16, 32)


def cost(bench: Bench) -> Report:
    """What does a pass cost, by rows and by size of the model? PaSS lives on rows that are nearly free.

    The floor is the time of reading all weights once from memory; its speed is that of summing 256 MiB of float32. A
    model that stays in the processor's caches can be faster than that.
    """
    bandwidth, rows, lines = memory_bandwidth(bench.device), [], []
    for colour, (title, model) in enumerate(timed_models(bench)):
        kinds = [(TARGET_MODEL, n_rows) for n_rows in ROWS]
        seconds = pass_seconds([model], kinds, bench.prompt_tokens, PASS_REPEATS, bench.use_graphs)
        floor = bytes_read(model) / bandwidth
        by_rows = {n_rows: quartiles(column) for n_rows, column in zip(ROWS, seconds.T, strict=True)}
        ratios = np.median(seconds / seconds[:, :1], axis=0).tolist()
        rows.append({"model": title, "floor_seconds": floor, "seconds": by_rows, "over_one_row": ratios})
        lines.append(plots.Line(title, ROWS, 1000 * np.median(seconds, axis=0), colour))
        lines.append(plots.Line("its weights read once", [ROWS[0], ROWS[-1]], [1000 * floor] * 2, colour, ":"))
    columns = {
        "model": lambda row: row["model"],
        "weights read once": lambda row: f"{1000 * row['floor_seconds']:.2f} ms",
    }
    for i, n_rows in enumerate(ROWS):
        columns[f"{n_rows} rows"] = lambda row, i=i, n_rows=n_rows: (
            f"{1000 * row['seconds'][n_rows][1]:.2f} ms, {row['over_one_row'][i]:.2f}x"
        )
    note = (
        f"Medians of {PASS_REPEATS} passes after {bench.prompt_tokens} cached tokens, and over the pass with one row; "
        f"all but the first model have random weights. Memory is read with {bandwidth / 1e9:.1f} GB/s (the best of a "
        "few sums over 256 MiB of float32); a model that stays in the caches can be faster."
    )
    scale = {"xscale": "log", "yscale": "log", "xticks": ROWS, "xticklabels": ROWS}
    picture = plots.curves([plots.Panel("rows of a pass", "ms", lines, scale)])
    return Report([note, table(rows, columns)], {"bytes_per_second": bandwidth, "rows": rows}, {"cost": picture})


def timed_models(bench: Bench) -> Iterator[tuple[str, GPT]]:
    """The subject, then larger models with random weights, that have no use but to be timed; each with its title."""
    config, chosen = bench.subject.model.config, LARGER
    if bench.device.type == "cuda":
        config, chosen = replace(config, vocab_size=GPT2_VOCABULARY, block_size=GPT2_WINDOW), GPT2_SIZES
    for size in (None, *chosen):
        model = bench.subject.model
        if size:
            torch.manual_seed(bench.seed)
            with bench.device:
                shape = dict(zip(("n_layer", "n_head", "n_embd"), size, strict=True))
                model = GPT(replace(config, **shape)).to(bench.dtype).eval()
        yield f"{model.config.n_layer} layers, width {model.config.n_embd}, {weights_read(model) / 1e6:.3g}M", model


def weights_read(model: GPT) -> int:
    """How many weights every pass reads."""
    return sum(p.numel() for name, p in model.named_parameters() if name not in ("wpe.weight", "lookahead"))


def bytes_read(model: GPT) -> int:
    """How many bytes these are."""
    return weights_read(model) * model.wte.weight.element_size()


def sizes(bench: Bench) -> Report:
    """A simulation: what would PaSS give for larger models, if their drafts were accepted as often as the subject's?

    The time of a turn is measured, with random weights, in turns; how many tokens a turn gives is taken from the
    subject's greedy text. A larger model's drafts are likely to be better or worse than that. Plain decoding's share of
    the memory bandwidth is measured: its weights, read once a token, over the speed of summing 256 MiB of float32.
    """
    bandwidth, prompts = memory_bandwidth(bench.device), bench.prompts(bench.subject, bench.data)
    ways = {PLAIN: Plain()} | {f"{FUSED}, L = {n}": Fused(n) for n in bench.lookahead}
    ways |= {f"tree of {n}": Fused(bench.tree(bench.lookahead[-1], n)) for n in SIZES_OF_TREES}
    tokens, rows = {}, []  # of a turn, the first left out
    for name, method in tqdm(ways.items(), desc="tokens of a turn", leave=False, dynamic_ncols=True):
        engine = bench.engine(method)
        made = [engine.generate(prompt, bench.new_tokens) for prompt in prompts]
        tokens[name] = sum(len(each.tokens[0]) - 1 for each in made) / sum(each.passes - 1 for each in made)
    for title, model in timed_models(bench):
        engines = [bench.engine(method, model=model) for method in ways.values()]
        streams = [engine.stream([0] * bench.prompt_tokens, MANY_TOKENS) for engine in engines]
        times = [quartiles(own) for own in turn_times(streams, TIMED_TURNS)]
        share = bytes_read(model) / bandwidth / times[0][1]
        for name, seconds in zip(ways, times, strict=True):
            row = {"model": title, "way": name, "seconds": seconds, "tokens": tokens[name]}
            row["speedup"] = tokens[name] * times[0][1] / seconds[1]
            rows.append(row | {"bandwidth_share": share if name == PLAIN else None})
    columns = {
        "model": lambda row: row["model"] if row["way"] == PLAIN else "",
        "method": lambda row: row["way"],
        "ms/turn (quartiles)": lambda row: spread(row["seconds"], scale=1000),
        "tokens/turn": lambda row: f"{row['tokens']:.2f}",
        "simulated speed-up": lambda row: f"{row['speedup']:.2f}",
        "share of bandwidth": lambda row: f"{row['bandwidth_share']:.0%}" if row["way"] == PLAIN else "",
    }
    note = (
        f"{TIMED_TURNS} turns each, after {bench.prompt_tokens} tokens, one text; all but the first model have "
        f"random weights. Tokens/turn are those of {bench.caption(bench.subject, GREEDY, bench.counts(bench.data))}. "
        f"Memory is read with {bandwidth / 1e9:.1f} GB/s; a model that stays in the caches can read faster."
    )
    titles = list(dict.fromkeys(row["model"] for row in rows))
    drawn = [
        plots.Line(name, range(len(titles)), [row["speedup"] for row in rows if row["way"] == name], colour)
        for colour, name in enumerate(ways)
    ]
    scale = {"xticks": range(len(titles)), "xticklabels": [title.split(", ")[-1] for title in titles]}
    picture = plots.curves([plots.Panel("weights of the model", "simulated speed-up", drawn, scale)])
    return Report([note, table(rows, columns)], {"bytes_per_second": bandwidth, "rows": rows}, {"sizes": picture})


def check(bench: Bench) -> Report:
    """Does the cost model of a pass explain the speed-up? Predicted: tokens/pass x t(1 row) / t(rows).

    The rows are those of the passes that were made, prefill left out. What the model leaves out is time between passes
    (drawing, accepting, bookkeeping), and that look-ahead rows after rejected drafts need no logits.
    """
    report, one_row = Report(), (TARGET_MODEL, 1)
    contenders = bench.family(bench.data, GREEDY, bench.lookahead)
    rows, samples = report.race(bench, bench.data, GREEDY, contenders)
    kinds = sorted({kind for own in samples for sample in own for kind in sample.passes} | {one_row})
    models = [bench.subject.model, *([bench.draft.model] if bench.draft else [])]
    context = bench.prompt_tokens + bench.new_tokens // 2
    seconds = pass_seconds(models, kinds, context, PASS_REPEATS, bench.use_graphs)
    base = seconds[:, kinds.index(one_row)]
    cost_of = dict(zip(kinds, np.median(seconds / base[:, None], axis=0).tolist(), strict=True))  # paired within a turn
    for row, own in zip(rows, samples, strict=True):
        passes = [each for sample in own for each in sample.passes]
        row["predicted"] = predicted_speedup(sum(sample.n_decoded for sample in own), passes, cost_of)
        row["rows_per_pass"] = float(np.mean([n_rows for model, n_rows in passes if model == TARGET_MODEL]))
        in_passes = float(np.median(base)) * sum(cost_of[each] for each in passes)
        row["in_passes"] = in_passes / sum(sample.seconds for sample in own)
    columns = METHOD | {
        "rows/pass": lambda row: f"{row['rows_per_pass']:.1f}",
        "predicted": lambda row: f"{row['predicted']:.2f}",
        "observed (quartiles)": lambda row: spread(row["speedup"]),
        "time in passes": lambda row: f"{row['in_passes']:.0%}",
    }
    costs = ", ".join(f"{n_rows} rows {ratio:.2f}" for (model, n_rows), ratio in cost_of.items() if model == 0)
    report.parts[-1] = table(rows, columns)
    report.parts.append(
        f"A pass over one row takes {1000 * np.median(base):.2f} ms; in times of that: {costs}. {bench.drafter()}"
    )
    report.forced(bench, bench.data, bench.subject)
    report.data |= {"rows": rows, "cost": [[*kind, ratio] for kind, ratio in cost_of.items()]}
    return report
