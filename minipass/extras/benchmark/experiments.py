"""The bench's experiments: each a function that answers one question with a table, plain figures and pictures.

An experiment takes a Bench, what all of them share, and returns a Report. `EXPERIMENTS` lists them; those on time are
in costs.py, those on training in trained.py, those that generate text here.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
from tqdm import tqdm

from minipass.data import even_windows
from minipass.extras.benchmark import costs, peers, plots, quality, trained
from minipass.extras.benchmark.contenders import COPYING, DECODINGS, GREEDY, LOOKUP, SAMPLED, TREE, TWO_MODELS, Bench
from minipass.extras.benchmark.measuring import figures, now, paired_quartiles, quartiles, take_turns
from minipass.extras.benchmark.reporting import Report, forced_line, label, methods_table, speedups, spread, table
from minipass.generate import RULES, generate

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
        trees = {n: bench.tree(lengths[-1], n) for n in TREE_SIZES[:3]}
        contenders += [add(f"tree of {n}", **tree) for n, tree in trees.items() if tree["tree"].width > 1]  # no chains
        contenders.append(add("auto", **bench.adaptive(GREEDY)))
        samples = take_turns(contenders, bench.seed, domain)
        rows = figures(contenders, samples)
        best = max(range(1, len(rows) - 1), key=lambda i: rows[i]["speedup"][1])
        ratio = paired_quartiles(*([sample.rate for sample in samples[i]] for i in (-1, best)))
        forced = bench.forced(bench.subject, domain)
        data[domain] = {"rows": rows, "over_best_fixed": ratio, "teacher_forced": forced}
        texts.append(bench.caption(bench.subject, GREEDY, bench.counts(domain)) + ":")
        texts.append(methods_table(rows, greedy=True))
        texts.append(f"Auto is at {spread(ratio)} of the best fixed choice, {label(rows[best])}, prompt by prompt.")
        texts.append(forced_line(bench.subject, forced, domain))
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
    "acceptance": trained.acceptance,
    "bases": trained.bases,
    "cost": costs.cost,
    "sizes": costs.sizes,
    "check": costs.check,
    "quality": text_quality,
    "peers": against_peers,
}
