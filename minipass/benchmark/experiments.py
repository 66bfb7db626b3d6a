"""The bench's experiments: each a function that answers one question with a table, plain figures and pictures.

An experiment takes a Bench, what all of them share, and returns a Report. `EXPERIMENTS` lists them.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from minipass.benchmark import peers, plots, quality
from minipass.benchmark.contenders import (
    COPYING,
    DECODINGS,
    GREEDY,
    LOOKUP,
    SAMPLED,
    TREE,
    TWO_MODELS,
    Bench,
    Subject,
)
from minipass.benchmark.measuring import (
    figures,
    memory_bandwidth,
    now,
    paired_quartiles,
    pass_seconds,
    predicted_speedup,
    quartiles,
    round_quartiles,
    take_turns,
)
from minipass.benchmark.reporting import Report, forced_line, label, methods_table, shares, speedups, spread, table
from minipass.data import even_windows
from minipass.errors import InputError
from minipass.generate import RULES, generate
from minipass.model import GPT, GPTConfig

ROWS = (1, 2, 4, 8, 16, 24, 32, 48, 64)
# Layers, heads, width of the random models whose passes are timed; on CUDA these are GPT-2's sizes.
LARGER = ((8, 8, 512), (12, 12, 768))
GPT2_SIZES = ((12, 12, 768), (24, 16, 1024), (36, 20, 1280), (48, 25, 1600))
GPT2_WINDOW, GPT2_VOCABULARY = 1024, 50_257
TIMED_ROUNDS = 24
PASS_REPEATS = 30
CONSTANT_WINDOWS = 32
AUTO_LENGTHS = (1, 2, 3, 4)
BATCHES, BATCH_REPEATS = (1, 4, 16, 64), 3
TREE_SIZES = (2, 4, 8, 16, 32)


def headline(bench: Bench) -> Report:
    """How much does PaSS give with the shipped joint model, greedy and sampled, on code?"""
    texts, data, panels = [], {}, []
    for decoding in (GREEDY, SAMPLED):
        contenders = bench.family(bench.data, decoding, bench.lookahead)
        rows = figures(contenders, take_turns(contenders, bench.seed, decoding))
        data[decoding] = rows
        texts.append(bench.caption(bench.subject, decoding, bench.counts(bench.data)) + ":")
        texts.append(methods_table(rows, decoding == GREEDY))
        first = [1000 * seconds for seconds in rows[0]["first_round_seconds"]]
        texts.append(f"Prefill is not in these figures; with plain decoding it takes {spread(first, 1)} ms.")
        panels.append((decoding, speedups(rows)))
    data["teacher_forced"] = bench.forced(bench.subject, bench.data)
    texts.append(forced_line(bench.subject, data["teacher_forced"], bench.data) + " " + bench.drafter())
    pictures = {"headline": plots.intervals(panels, "speed-up over plain decoding (median, quartiles)", 1.0)}
    return Report("\n\n".join(texts), data, pictures)


def methods(bench: Bench) -> Report:
    """Which method gives how much, for code and for prose, greedy and sampled?

    The paper's method and its fixed-token baseline run on the frozen checkpoint, against that checkpoint's own plain
    decoding; the others on the joint one. All take turns in one run.
    """
    texts, data, panels = [], [], []
    for domain in dict.fromkeys([bench.data, "docstrings"]):
        for decoding in DECODINGS:
            contenders = bench.family(domain, decoding, bench.lookahead)
            if bench.frozen:
                plain = bench.ours("autoregressive, frozen", bench.frozen, domain, decoding, method="autoregressive")
                contenders.append(plain)
                for name, method in (("two-pass, fixed token", "fixed-token"), ("two-pass, frozen", "pass-two-pass")):
                    settings = {"method": method, "baseline": plain}
                    contenders += [
                        bench.ours(name, bench.frozen, domain, decoding, lookahead=L, **settings)
                        for L in bench.lookahead
                        if bench.frozen.model.config.n_lookahead >= L
                    ]
            rows = figures(contenders, take_turns(contenders, bench.seed, f"{domain}, {decoding}"))
            forced = {each.name: bench.forced(each, domain) for each in (bench.subject, bench.frozen) if each}
            data.append({"domain": domain, "decoding": decoding, "rows": rows, "teacher_forced": forced})
            texts.append(bench.caption(bench.subject, decoding, bench.counts(domain)) + ":")
            texts.append(methods_table(rows, decoding == GREEDY))
            panels.append((f"{domain}, {decoding}", speedups(rows)))
        texts += [
            forced_line(each, bench.forced(each, domain), domain) for each in (bench.subject, bench.frozen) if each
        ]
    texts.append(bench.drafter())
    if bench.frozen:
        texts.append(
            f"The frozen rows are `{bench.frozen.name}`'s ({bench.frozen.millions}), against its own plain row."
        )
    else:
        texts.append("No frozen rows: there is no frozen checkpoint that fits (name one with --frozen).")
    pictures = {"methods": plots.intervals(panels, "speed-up over plain decoding (median, quartiles)", 1.0)}
    return Report("\n\n".join(texts), {"settings": data}, pictures)


def lookahead(bench: Bench) -> Report:
    """How many look-ahead tokens are best? More drafts save passes, but each pass then has more rows."""
    texts, data, panels = [], {}, ([], [])
    lengths = range(1, bench.subject.model.config.n_lookahead + 1)
    for style, decoding in (("-", GREEDY), ("--", SAMPLED)):
        contenders = bench.family(bench.data, decoding, lengths, without=(TREE, TWO_MODELS, COPYING, LOOKUP))
        rows = figures(contenders, take_turns(contenders, bench.seed, decoding))
        best = {}
        for colour, method in enumerate(dict.fromkeys(contender.name for contender in contenders[1:])):
            own = [row for row in rows if row["method"] == method]
            ratios = [row["speedup"][1] for row in own]
            best[method] = lengths[int(np.argmax(ratios))]
            title = f"{method}, {decoding}"
            passes = [row["tokens_per_pass"] for row in own]
            panels[0].append(plots.Line(title, lengths, passes, colour, style))
            panels[1].append(plots.Line(title, lengths, ratios, colour, style, best=best[method] - 1))
        data[decoding] = {"rows": rows, "best": best}
        texts.append(bench.caption(bench.subject, decoding, bench.counts(bench.data)) + ":")
        texts.append(methods_table(rows, decoding == GREEDY))
        texts.append("Best L by wall clock: " + ", ".join(f"{L} {method}" for method, L in best.items()) + ".")
    data["teacher_forced"] = bench.forced(bench.subject, bench.data)
    texts.append(forced_line(bench.subject, data["teacher_forced"], bench.data))
    picture = plots.curves(
        [
            plots.Panel("look-ahead tokens L", "tokens/pass", panels[0]),
            plots.Panel("look-ahead tokens L (ringed: the best)", "speed-up over plain decoding", panels[1]),
        ]
    )
    return Report("\n\n".join(texts), data, {"lookahead": picture})


def trees(bench: Bench) -> Report:
    """How many drafts should a tree have, and which exact rule is better? Chains and trees over the same L tokens.

    A tree of N drafts has (N + 1)(1 + its depth) rows. Matching takes the likeliest tokens as drafts and keeps one if
    the target draws it; recursive rejection draws the drafts without replacement. Greedy, both do the same.
    """
    texts, data, panels = [], {}, ([], [])
    depth, settings = bench.lookahead[-1], DECODINGS.items()
    for style, (decoding, sampling) in zip(("-", "--", ":"), settings, strict=True):
        plain = bench.ours("autoregressive", bench.subject, bench.data, decoding, method="autoregressive")
        add = partial(bench.ours, subject=bench.subject, domain=bench.data, decoding=decoding, baseline=plain)
        contenders = [plain, add("chain", method="pass", lookahead=depth)]
        rules = RULES if sampling["temperature"] > 0 else RULES[:1]
        for rule in rules:
            contenders += [add(f"tree of {n}, {rule}", **bench.tree(depth, n, rule=rule)) for n in TREE_SIZES]
        rows = figures(contenders, take_turns(contenders, bench.seed, decoding))
        data[decoding] = rows
        for colour, rule in enumerate(rules):
            own = [row for row in rows if row["method"].endswith(rule)]
            title = f"{decoding}, {rule}"
            panels[0].append(plots.Line(title, TREE_SIZES, [row["tokens_per_pass"] for row in own], colour, style))
            panels[1].append(plots.Line(title, TREE_SIZES, [row["speedup"][1] for row in own], colour, style))
        texts.append(bench.caption(bench.subject, decoding, bench.counts(bench.data)) + ":")
        texts.append(methods_table(rows, decoding == GREEDY))
    data["teacher_forced"] = bench.forced(bench.subject, bench.data)
    texts.append(forced_line(bench.subject, data["teacher_forced"], bench.data))
    scale = {"xscale": "log", "xticks": TREE_SIZES, "xticklabels": TREE_SIZES}
    picture = plots.curves(
        [
            plots.Panel("drafts in a tree", "tokens/pass", panels[0], scale),
            plots.Panel("drafts in a tree", "speed-up over plain decoding", panels[1], scale),
        ]
    )
    return Report("\n\n".join(texts), data, {"trees": picture})


def auto(bench: Bench) -> Report:
    """Does --lookahead auto find what is fastest? Against chains and trees of fixed sizes, on code and on prose."""
    texts, data, panels = [], {}, []
    lengths = [L for L in AUTO_LENGTHS if bench.subject.model.config.n_lookahead >= L]
    for domain in dict.fromkeys([bench.data, "docstrings"]):
        plain = bench.ours("autoregressive", bench.subject, domain, GREEDY, method="autoregressive")
        add = partial(bench.ours, subject=bench.subject, domain=domain, decoding=GREEDY, baseline=plain)
        contenders = [plain]
        contenders += [add("fused", method="pass", lookahead=L) for L in lengths]
        contenders += [add(f"tree of {n}", **bench.tree(lengths[-1], n)) for n in TREE_SIZES[:3]]
        contenders.append(add("auto", **bench.adaptive(GREEDY)))
        rows = figures(contenders, take_turns(contenders, bench.seed, domain))
        data[domain] = {"rows": rows, "teacher_forced": bench.forced(bench.subject, domain)}
        best = max(rows[1:-1], key=lambda row: row["speedup"][1])
        texts.append(bench.caption(bench.subject, GREEDY, bench.counts(domain)) + ":")
        texts.append(methods_table(rows, greedy=True))
        ratio = rows[-1]["speedup"][1] / best["speedup"][1]
        texts.append(f"Auto is at {ratio:.2f} of the best fixed choice, {label(best)}.")
        texts.append(forced_line(bench.subject, data[domain]["teacher_forced"], domain))
        panels.append((domain, speedups(rows)))
    pictures = {"auto": plots.intervals(panels, "speed-up over plain decoding (median, quartiles)", 1.0)}
    return Report("\n\n".join(texts), data, pictures)


def batches(bench: Bench) -> Report:
    """Up to which batch does PaSS pay? A pass over many texts has many rows as it is."""
    model, device = bench.subject.model, bench.device
    chosen = {"autoregressive": {"method": "autoregressive"}}
    chosen |= {f"fused, L = {L}": {"method": "pass", "lookahead": L} for L in bench.lookahead[:1]}
    rows = []
    for size in BATCHES:
        windows = even_windows(bench.tokens(bench.subject, bench.data), size, bench.prompt_tokens).tolist()
        prompts = [window[i % (bench.prompt_tokens // 2) :] for i, window in enumerate(windows)]  # ragged
        rates: dict[str, list[float]] = {name: [] for name in chosen}
        for repeat in tqdm(range(1 + BATCH_REPEATS), desc=f"batches of {size}", leave=False, dynamic_ncols=True):
            for name, settings in chosen.items():
                began = now(device)
                result = generate(model, prompts, bench.new_tokens, captures=bench.captures, **settings)
                seconds = now(device) - began
                if repeat:
                    rates[name].append(sum(map(len, result.tokens)) / seconds)
        plain = rates["autoregressive"]
        rows += [
            {"batch": size, "method": name, "rate": quartiles(own), "speedup": paired_quartiles(own, plain)}
            for name, own in rates.items()
        ]
    heads = ["batch", "method", "tokens/s, all texts", "speed-up (quartiles)"]
    cells = [[str(r["batch"]), r["method"], f"{r['rate'][1]:.0f}", spread(r["speedup"])] for r in rows]
    note = (
        f"{bench.caption(bench.subject, GREEDY)}: different held-out prompts of {bench.prompt_tokens // 2} to "
        f"{bench.prompt_tokens} tokens ({bench.data}), {bench.new_tokens} new tokens each, prefill included; "
        f"{BATCH_REPEATS} runs of each in turns. A batch goes on until its last text has ended."
    )
    lines = [
        plots.Line(name, BATCHES, [row["speedup"][1] for row in rows if row["method"] == name], colour)
        for colour, name in enumerate(chosen)
    ]
    scale = {"xscale": "log", "xticks": BATCHES, "xticklabels": BATCHES}
    picture = plots.curves([plots.Panel("texts in a batch", "speed-up over plain decoding", lines, scale)])
    return Report(note + "\n\n" + table(heads, cells), {"rows": rows}, {"batches": picture})


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


def cost(bench: Bench) -> Report:
    """What does a pass cost, by rows and by size of the model? PaSS lives on rows that are nearly free.

    The floor is the time of reading all weights once from memory; its speed is that of summing 256 MiB of float32. A
    model that stays in the processor's caches can be faster than that.
    """
    bandwidth = memory_bandwidth(bench.device)
    rows, lines = [], []
    for colour, size in enumerate([None, *larger_sizes(bench)]):
        model = random_model(bench, size) if size else bench.subject.model
        n_weights = weights_read(model)
        kinds = [(0, n_rows) for n_rows in ROWS]
        seconds = pass_seconds([model], kinds, bench.prompt_tokens, PASS_REPEATS)
        floor = n_weights * model.wte.weight.element_size() / bandwidth
        title = f"{model.config.n_layer} layers, width {model.config.n_embd}, {n_weights / 1e6:.3g}M"
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


def larger_sizes(bench: Bench) -> list[GPTConfig]:
    """Sizes of models that are larger than the subject and have no use but to be timed."""
    config = bench.subject.model.config
    if bench.device.type == "cuda":
        config = replace(config, vocab_size=GPT2_VOCABULARY, block_size=GPT2_WINDOW)
    chosen = GPT2_SIZES if bench.device.type == "cuda" else LARGER
    return [replace(config, n_layer=n, n_head=h, n_embd=d) for n, h, d in chosen]


def random_model(bench: Bench, config: GPTConfig) -> GPT:
    """One with random weights."""
    torch.manual_seed(bench.seed)
    with bench.device:
        return GPT(config).to(bench.dtype).eval()


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
    ways |= {f"tree of {n}": bench.tree(bench.lookahead[-1], n) for n in TREE_SIZES[2:]}
    prompts = bench.prompts(bench.subject, bench.data)
    generated = {}
    for name, settings in tqdm(ways.items(), desc="tokens of a round", leave=False, dynamic_ncols=True):
        made = [generate(subject, prompt, bench.new_tokens, captures=bench.captures, **settings) for prompt in prompts]
        generated[name] = sum(len(each.tokens[0]) - 1 for each in made) / sum(each.rounds - 1 for each in made)
    rows, lines = [], []
    for config in [None, *larger_sizes(bench)]:
        model = random_model(bench, config) if config else subject
        shape = model.config
        title = f"{shape.n_layer} layers, width {shape.n_embd}, {weights_read(model) / 1e6:.3g}M"
        settings = [{"captures": bench.captures and {}, **each} for each in ways.values()]
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


def check(bench: Bench) -> Report:
    """Does the cost model of a pass explain the speed-up? Predicted: tokens/pass x t(1 row) / t(rows).

    The rows are those of the passes that were made, prefill left out. What the model leaves out is time between passes:
    drawing, accepting, bookkeeping.
    """
    contenders = bench.family(bench.data, GREEDY, bench.lookahead)
    samples = take_turns(contenders, bench.seed, "check")
    kinds = sorted({kind for own in samples for sample in own for kind in sample.passes} | {(0, 1)})
    models = max((each.models for each in contenders), key=len)
    seconds = pass_seconds(models, kinds, bench.prompt_tokens + bench.new_tokens // 2, PASS_REPEATS)
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


def text_quality(bench: Bench) -> Report:
    """Is the text as good with PaSS as without? Held-out function heads are completed by each method."""
    texts = [each.text for each in bench.heldout(bench.data)]
    heads = quality.function_heads(texts)
    encoded = quality.usable_heads(heads, bench.subject.loaded.encoding, bench.prompt_tokens)
    if not encoded:
        return Report(f"Left out: the held-out part of {bench.data} has no Python function of a length that fits.", {})
    picked = [encoded[i * len(encoded) // bench.n_samples] for i in range(bench.n_samples)]
    length = bench.lookahead[0]
    chosen = {"autoregressive": {"method": "autoregressive"}}
    chosen |= {name: settings(length) for name, settings in bench.methods().items()}
    rows = []
    for name, settings in chosen.items():
        settings |= {"captures": bench.captures, **DECODINGS[SAMPLED]}
        judged = quality.judge(bench.subject.loaded, picked, bench.new_tokens, bench.seed, name, **settings)
        rows.append({"method": name, **judged})
    lines = [
        [
            row["method"],
            str(row["samples"]),
            f"{row['parses']:.1%} ({row['interval'][0]:.1%} to {row['interval'][1]:.1%})",
            f"{row['log_likelihood']:.3f} +- {row['half_width']:.3f}",
        ]
        for row in rows
    ]
    note = (
        f"{bench.caption(bench.subject, SAMPLED)}: {bench.n_samples} heads of functions in held-out files "
        f"({len(encoded)} different ones), {bench.new_tokens} new tokens each, L = {length}. A completion "
        "is cut before its first line that is not indented, or before its last line where it has none. 95% intervals: "
        "Wilson's, and +- 1.96 standard errors."
    )
    columns = table(["method", "samples", "parses (95%)", "log-likelihood per token under the base, nats"], lines)
    drawn = [(row["method"], row["interval"][0], row["parses"], row["interval"][1]) for row in rows]
    picture = plots.intervals([(f"completed functions, {SAMPLED}", drawn)], "share that parses (95%)")
    return Report(note + "\n\n" + columns + "\n\n" + bench.drafter(), {"rows": rows}, {"quality": picture})


def against_peers(bench: Bench) -> Report:
    """Is PaSS faster than Hugging Face `generate` on the same weights: plain, with an assistant, with prompt lookup?"""
    if not peers.installed():
        return Report("Left out: transformers is not installed (pip install -e '.[peers]').", {"rows": []})
    draft = bench.draft.model if bench.draft else None
    texts, data, panels = [], {}, []
    for decoding in (GREEDY, SAMPLED):
        contenders = bench.family(bench.data, decoding, bench.lookahead)
        sampling = DECODINGS[decoding] if decoding != GREEDY else None
        arguments = (bench.subject.model, draft, contenders[0], bench.new_tokens, bench.lookahead, sampling)
        theirs, difference = peers.contenders(*arguments)
        contenders += theirs
        rows = figures(contenders, take_turns(contenders, bench.seed, f"peers, {decoding}"))
        fastest = max((row for row in rows if row["tokens_per_pass"]), key=lambda row: row["speedup"][1])
        others = max((row for row in rows if not row["tokens_per_pass"]), key=lambda row: row["speedup"][1])
        data[decoding] = {"rows": rows, "largest_difference": difference}
        texts += [
            bench.caption(bench.subject, decoding, bench.counts(bench.data)) + ":",
            methods_table(rows, decoding == GREEDY),
            f"Fastest of ours: {label(fastest)}, {fastest['speedup'][1]:.2f}; of theirs: {label(others)}, "
            f"{others['speedup'][1]:.2f}.",
        ]
        panels.append((decoding, speedups(rows)))
    texts += [
        f"HF is transformers {peers.version()} with the same weights: its logits in float32 differ by at most "
        f"{difference:.0e}. Ratios are against our plain decoding. {bench.drafter()}",
        forced_line(bench.subject, bench.forced(bench.subject, bench.data), bench.data),
    ]
    picture = plots.intervals(panels, "speed-up over our plain decoding (median, quartiles)", 1.0)
    return Report("\n\n".join(texts), data, {"peers": picture})


EXPERIMENTS: dict[str, Callable[[Bench], Report]] = {
    "headline": headline,
    "methods": methods,
    "lookahead": lookahead,
    "trees": trees,
    "auto": auto,
    "batches": batches,
    "acceptance": acceptance,
    "bases": bases,
    "cost": cost,
    "sizes": sizes,
    "check": check,
    "quality": text_quality,
    "peers": against_peers,
}
