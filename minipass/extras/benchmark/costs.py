"""The bench's experiments on time: what a pass costs by rows and size, and whether that explains what is observed."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from tqdm import tqdm

from minipass.extras.benchmark import plots
from minipass.extras.benchmark.contenders import GREEDY, Bench
from minipass.extras.benchmark.measuring import (
    figures,
    memory_bandwidth,
    pass_seconds,
    predicted_speedup,
    quartiles,
    round_quartiles,
    take_turns,
)
from minipass.extras.benchmark.reporting import Report, forced_line, spread, table
from minipass.generate import generate
from minipass.model import GPT

ROWS = (1, 2, 4, 8, 16, 24, 32, 48, 64)
# Layers, heads, width of the random models whose passes are timed; on CUDA these are GPT-2's sizes.
LARGER = ((8, 8, 512), (12, 12, 768))
GPT2_SIZES = ((12, 12, 768), (24, 16, 1024), (36, 20, 1280), (48, 25, 1600))
GPT2_WINDOW, GPT2_VOCABULARY = 1024, 50_257
PASS_REPEATS, TIMED_ROUNDS = 30, 24
SIZES_OF_TREES = (8, 16, 32)


def cost(bench: Bench) -> Report:
    """What does a pass cost, by rows and by size of the model? PaSS lives on rows that are nearly free.

    The floor is the time of reading all weights once from memory; its speed is that of summing 256 MiB of float32. A
    model that stays in the processor's caches can be faster than that.
    """
    bandwidth = memory_bandwidth(bench.device)
    rows, lines = [], []
    for colour, (title, model) in enumerate(timed_models(bench)):
        n_weights = weights_read(model)
        kinds = [(0, n_rows) for n_rows in ROWS]
        seconds = pass_seconds([model], kinds, bench.prompt_tokens, PASS_REPEATS, bench.captures is not None)
        floor = n_weights * model.wte.weight.element_size() / bandwidth
        rows.append(
            {
                "model": title,
                "floor_seconds": floor,
                "seconds": {n_rows: quartiles(column) for n_rows, column in zip(ROWS, seconds.T, strict=True)},
                "over_one_row": np.median(seconds / seconds[:, :1], axis=0).tolist(),
            }
        )
        lines.append(plots.Line(title, ROWS, 1000 * np.median(seconds, axis=0), colour))
        lines.append(plots.Line("its weights read once", [ROWS[0], ROWS[-1]], [1000 * floor] * 2, colour, ":"))
    heads = ["model", "weights read once", *(f"{n_rows} rows" for n_rows in ROWS)]
    cells = [
        [
            row["model"],
            f"{1000 * row['floor_seconds']:.2f} ms",
            *(
                f"{1000 * three[1]:.2f} ms, {ratio:.2f}x"
                for three, ratio in zip(row["seconds"].values(), row["over_one_row"], strict=True)
            ),
        ]
        for row in rows
    ]
    note = (
        f"Medians of {PASS_REPEATS} passes behind {bench.prompt_tokens} cached tokens, and over the pass with one row; "
        f"all but the first model have random weights. Memory is read with {bandwidth / 1e9:.1f} GB/s (the best of a "
        "few sums over 256 MiB of float32); a model that stays in the caches can be faster."
    )
    scale = {"xscale": "log", "yscale": "log", "xticks": ROWS, "xticklabels": ROWS}
    picture = plots.curves([plots.Panel("rows of a pass", "ms", lines, scale)])
    return Report(note + "\n\n" + table(heads, cells), {"bytes_per_second": bandwidth, "rows": rows}, {"cost": picture})


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


def sizes(bench: Bench) -> Report:
    """A simulation: what would PaSS give for larger models, if their drafts were kept as often as the subject's?

    The time of a round is measured, with random weights, in turns; how many tokens a round gives is taken from the
    subject's greedy text. A larger model's drafts are likely to be better or worse than that. Plain decoding's share of
    the memory bandwidth is measured: its weights, read once a token, over the speed of summing 256 MiB of float32.
    """
    bandwidth, subject = memory_bandwidth(bench.device), bench.subject.model
    ways = {"autoregressive": {"method": "autoregressive"}}
    ways |= {f"fused, L = {L}": {"method": "pass", "lookahead": L} for L in bench.lookahead}
    ways |= {f"tree of {n}": bench.tree(bench.lookahead[-1], n) for n in SIZES_OF_TREES}
    prompts = bench.prompts(bench.subject, bench.data)
    generated = {}
    for name, settings in tqdm(ways.items(), desc="tokens of a round", leave=False, dynamic_ncols=True):
        made = [generate(subject, prompt, bench.new_tokens, captures=bench.captures, **settings) for prompt in prompts]
        generated[name] = sum(len(each.tokens[0]) - 1 for each in made) / sum(each.rounds - 1 for each in made)
    rows, lines = [], []
    for title, model in timed_models(bench):
        captures = None if bench.captures is None else {}  # these graphs go with their model
        settings = [{"captures": captures, **each} for each in ways.values()]
        seconds = round_quartiles(model, [0] * bench.prompt_tokens, TIMED_ROUNDS, settings)
        plain = seconds[0][1]
        share = weights_read(model) * model.wte.weight.element_size() / bandwidth / plain
        for name, three in zip(ways, seconds, strict=True):
            speedup = generated[name] * plain / three[1]
            rows.append({"model": title, "way": name, "seconds": three, "tokens": generated[name], "speedup": speedup})
            rows[-1]["bandwidth_share"] = share if name == "autoregressive" else None
            lines.append(
                [
                    title if name == "autoregressive" else "",
                    name,
                    spread([1000 * each for each in three]),
                    f"{generated[name]:.2f}",
                    f"{speedup:.2f}",
                    f"{share:.0%}" if name == "autoregressive" else "",
                ]
            )
    heads = ["model", "method", "ms/round (quartiles)", "tokens/round", "simulated speed-up", "share of bandwidth"]
    note = (
        f"{TIMED_ROUNDS} rounds each, behind {bench.prompt_tokens} tokens, one text; all but the first model have "
        f"random weights. Tokens/round are those of {bench.caption(bench.subject, GREEDY, bench.counts(bench.data))}. "
        f"Memory is read with {bandwidth / 1e9:.1f} GB/s; a model that stays in the caches can read faster."
    )
    titles = list(dict.fromkeys(row["model"] for row in rows))
    drawn = [
        plots.Line(name, range(len(titles)), [row["speedup"] for row in rows if row["way"] == name], colour)
        for colour, name in enumerate(ways)
    ]
    scale = {"xticks": range(len(titles)), "xticklabels": [title.split(", ")[-1] for title in titles]}
    picture = plots.curves([plots.Panel("weights of the model", "simulated speed-up", drawn, scale)])
    data = {"bytes_per_second": bandwidth, "rows": rows}
    return Report(note + "\n\n" + table(heads, lines), data, {"sizes": picture})


def check(bench: Bench) -> Report:
    """Does the cost model of a pass explain the speed-up? Predicted: tokens/pass x t(1 row) / t(rows).

    The rows are those of the passes that were made, prefill left out. What the model leaves out is time between passes:
    drawing, accepting, bookkeeping.
    """
    contenders = bench.family(bench.data, GREEDY, bench.lookahead)
    samples = take_turns(contenders, bench.seed, "check")
    kinds = sorted({kind for own in samples for sample in own for kind in sample.passes} | {(0, 1)})
    models = max((each.models for each in contenders), key=len)
    context, captured = bench.prompt_tokens + bench.new_tokens // 2, bench.captures is not None
    seconds = pass_seconds(models, kinds, context, PASS_REPEATS, captured)
    ratios = np.median(seconds / seconds[:, kinds.index((0, 1)), None], axis=0)  # paired within each turn
    cost_of = dict(zip(kinds, ratios.tolist(), strict=True))
    one_row = float(np.median(seconds[:, kinds.index((0, 1))]))
    rows = figures(contenders, samples)
    for row, own in zip(rows, samples, strict=True):
        n_decoded, passes = sum(s.n_decoded for s in own), [each for s in own for each in s.passes]
        row["predicted"] = predicted_speedup(n_decoded, passes, cost_of)
        row["rows_per_pass"] = float(np.mean([n_rows for which, n_rows in passes if which == 0]))
        row["in_passes"] = one_row * sum(cost_of[each] for each in passes) / sum(s.seconds for s in own)
    heads = ["method", "L", "tokens/pass", "rows/pass", "predicted", "observed (quartiles)", "time in passes"]
    lines = [
        [
            row["method"],
            str(row["lookahead"] or "-"),
            f"{row['tokens_per_pass']:.2f}",
            f"{row['rows_per_pass']:.1f}",
            f"{row['predicted']:.2f}",
            spread(row["speedup"]),
            f"{row['in_passes']:.0%}",
        ]
        for row in rows
    ]
    costs = ", ".join(f"{n_rows} rows {ratio:.2f}" for (which, n_rows), ratio in cost_of.items() if which == 0)
    texts = [
        bench.caption(bench.subject, GREEDY, bench.counts(bench.data)) + ":",
        table(heads, lines),
        f"A pass over one row takes {1000 * one_row:.2f} ms; in times of that: {costs}. {bench.drafter()}",
        forced_line(bench.subject, bench.forced(bench.subject, bench.data), bench.data),
    ]
    return Report("\n\n".join(texts), {"rows": rows, "cost": [[*kind, ratio] for kind, ratio in cost_of.items()]})
