"""The bench's experiments: each a function that answers one question with a table, plain figures and pictures.

An experiment takes a Bench, what all of them share, and returns a Report. `EXPERIMENTS` lists them; those on time are
in costs.py, those on training in trained.py, those that generate text here.
"""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from minipass.data import even_windows
from minipass.decode import Fused, Plain, TwoPass
from minipass.extras.benchmark import costs, peers, plots, pretrained, quality, trained
from minipass.extras.benchmark.contenders import DECODINGS, FUSED, GREEDY, PLAIN, SAMPLED, TWO_PASS, Bench
from minipass.extras.benchmark.measuring import paired_quartiles, prefill_seconds, quartiles, seconds_in_turns
from minipass.extras.benchmark.reporting import OVER_PLAIN, Report, label, spread, table
from minipass.sampling import COUPLED, REJECTION

AUTO_LENGTHS = (1, 2, 3, 4)
BATCHES, BATCH_REPEATS = (1, 4, 16, 64), 3
TREE_SIZES = (2, 4, 8, 16, 32)


def headline(bench: Bench) -> Report:
    """How much does PaSS give with the shipped joint model, greedy and sampled, on code?

    Fused and tree use the coupled rule where no rule is named, two-pass the paper's, rejection.
    """
    report = Report()
    for decoding in (GREEDY, SAMPLED):
        contenders = bench.family(bench.data, decoding, bench.lookahead)
        report.data[decoding], _ = report.race(bench, bench.data, decoding, contenders)
    seconds = quartiles(prefill_seconds(bench.subject.model, bench.prompts(bench.subject, bench.data)))
    report.parts.append(f"Prefill is not in these figures; it takes {spread(seconds, 1, scale=1000)} ms.")
    report.data |= {
        "prefill_seconds": seconds,
        "teacher_forced": report.forced(bench, bench.data, *bench.subject.with_and_without_head()),
    }
    report.parts.append(bench.drafter())
    report.draw_speedups("headline")
    return report


def methods(bench: Bench) -> Report:
    """Which method gives how much, for code and for prose, greedy and sampled?

    The paper's method and its fixed-token baseline run on the frozen checkpoint, against that checkpoint's own plain
    decoding; the others on the joint one. All take turns in one run.
    """
    report, frozen = Report(data={"settings": []}), bench.frozen
    for domain in dict.fromkeys([bench.data, "docstrings"]):
        for decoding in DECODINGS:
            contenders = bench.family(domain, decoding, bench.lookahead)
            if frozen:
                add = partial(bench.contender, domain=domain, decoding=decoding, subject=frozen)
                config, plain = frozen.model.config, add(f"{PLAIN}, frozen", Plain())
                contenders.append(plain)
                for name, token in (("fixed token", config.vocab_size - 1), ("frozen", None)):
                    contenders += [
                        add(f"{TWO_PASS}, {name}", TwoPass(n, fixed_token=token), n_drafts=n, baseline=plain)
                        for n in bench.lookahead
                        if n <= config.n_lookahead
                    ]
            rows, _ = report.race(bench, domain, decoding, contenders)
            report.data["settings"].append({"domain": domain, "decoding": decoding, "rows": rows})
        report.data.setdefault("teacher_forced", {})[domain] = report.forced(
            bench, domain, bench.subject, *([frozen] if frozen else [])
        )
    report.parts.append(bench.drafter())
    report.parts.append(
        f"The frozen rows are `{frozen.name}`'s ({frozen.millions}), against its own plain row."
        if frozen
        else "No frozen rows: there is no frozen checkpoint that fits (name one with --frozen)."
    )
    report.draw_speedups("methods")
    return report


class Curves:
    """A picture of tokens/pass and speed-up, with the best speed-up of each curve ringed."""

    def __init__(self) -> None:
        self.passes: list[plots.Line] = []
        self.speedups: list[plots.Line] = []

    def add(self, title: str, x: Sequence[int], rows: Sequence[dict], colour: int, style: str) -> int:
        """Rows of measuring.figures as a curve over x; returns the x of the best."""
        passes, speedups = [row["tokens_per_pass"] for row in rows], [row["speedup"][1] for row in rows]
        best = int(np.argmax(speedups))
        self.passes.append(plots.Line(title, x, passes, colour, style))
        self.speedups.append(plots.Line(title, x, speedups, colour, style, best))
        return x[best]

    def draw(self, xlabel: str, **settings) -> plots.Figure:
        return plots.curves(
            [
                plots.Panel(xlabel, "tokens/pass", self.passes, settings),
                plots.Panel(f"{xlabel} (ringed: the best)", OVER_PLAIN, self.speedups, settings),
            ]
        )


def lookahead(bench: Bench) -> Report:
    """How many look-ahead tokens are best? More drafts save passes, but each pass then has more rows."""
    report, curves, names = Report(), Curves(), (TWO_PASS, FUSED)
    lengths = range(1, bench.subject.model.config.n_lookahead + 1)
    for style, decoding in (("-", GREEDY), ("--", SAMPLED)):
        rows, _ = report.race(bench, bench.data, decoding, bench.family(bench.data, decoding, lengths, names))
        best = {}
        for colour, name in enumerate(names):
            own = [row for row in rows if row["method"] == name]
            best[name] = curves.add(f"{name}, {decoding}", lengths, own, colour, style)
        report.data[decoding] = {"rows": rows, "best": best}
        report.parts.append("Best L by wall clock: " + ", ".join(f"{n} {name}" for name, n in best.items()) + ".")
    report.data["teacher_forced"] = report.forced(bench, bench.data, bench.subject)
    report.pictures["lookahead"] = curves.draw("look-ahead tokens L")
    return report


def trees(bench: Bench) -> Report:
    """How many drafts should a tree have, and which exact rule is better? Chains and trees over the same L tokens.

    A tree of N drafts has (N + 1)(1 + its depth) rows. Coupled, drafts are the best of the target's own race;
    rejection draws them without replacement and tests one after the other. Greedy, both do the same.
    """
    report, curves, depth = Report(), Curves(), bench.lookahead[-1]
    for style, decoding in zip(("-", "--", ":"), DECODINGS, strict=True):
        plain = bench.contender(PLAIN, Plain(), bench.data, decoding)
        add = partial(bench.contender, domain=bench.data, decoding=decoding, n_drafts=depth, baseline=plain)
        contenders, rules = [plain], (COUPLED,) if decoding == GREEDY else (COUPLED, REJECTION)
        for rule in rules:
            contenders.append(add(f"chain, {rule}", Fused(depth, rule)))
            contenders += [add(f"tree of {n}, {rule}", Fused(bench.tree(depth, n), rule)) for n in TREE_SIZES]
        rows, _ = report.race(bench, bench.data, decoding, contenders)
        report.data[decoding] = rows
        for colour, rule in enumerate(rules):
            own = [row for row in rows if row["method"].startswith("tree") and row["method"].endswith(rule)]
            curves.add(f"{decoding}, {rule}", TREE_SIZES, own, colour, style)
    report.data["teacher_forced"] = report.forced(bench, bench.data, bench.subject)
    scale = {"xscale": "log", "xticks": TREE_SIZES, "xticklabels": TREE_SIZES}
    report.pictures["trees"] = curves.draw("drafts in a tree", **scale)
    return report


def auto(bench: Bench) -> Report:
    """Does --lookahead auto find what is fastest? Against chains and trees of fixed sizes, on code and on prose."""
    report = Report()
    lengths = [n for n in AUTO_LENGTHS if n <= bench.subject.model.config.n_lookahead]
    trees = {n: bench.tree(lengths[-1], n) for n in TREE_SIZES[:3]}
    for domain in dict.fromkeys([bench.data, "docstrings"]):
        plain = bench.contender(PLAIN, Plain(), domain, GREEDY)
        add = partial(bench.contender, domain=domain, decoding=GREEDY, baseline=plain)
        contenders = [plain, *(add(FUSED, Fused(n), n_drafts=n) for n in lengths)]
        contenders += [add(f"tree of {n}", Fused(tree)) for n, tree in trees.items() if tree.width > 1]  # no chains
        contenders.append(add("auto", bench.auto(GREEDY)))
        rows, samples = report.race(bench, domain, GREEDY, contenders)
        best = max(range(1, len(rows) - 1), key=lambda i: rows[i]["speedup"][1])
        ratio = paired_quartiles(*([sample.rate for sample in samples[i]] for i in (-1, best)))
        report.parts.append(
            f"Auto is at {spread(ratio)} of the best fixed choice, {label(rows[best])}, prompt by prompt."
        )
        forced = report.forced(bench, domain, bench.subject)
        report.data[domain] = {"rows": rows, "over_best_fixed": ratio, "teacher_forced": forced}
    report.draw_speedups("auto")
    return report


def batches(bench: Bench) -> Report:
    """Up to which batch does PaSS pay? A pass over many texts has many rows as it is."""
    length, rows = bench.lookahead[0], []
    engines = {PLAIN: bench.engine(Plain()), f"{FUSED}, L = {length}": bench.engine(Fused(length))}
    for size in BATCHES:
        windows = even_windows(bench.tokens(bench.subject, bench.data), size, bench.prompt_tokens).tolist()
        prompts = [window[i % (bench.prompt_tokens // 2) :] for i, window in enumerate(windows)]  # ragged
        actions = [partial(engine.generate, prompts, bench.new_tokens) for engine in engines.values()]
        rates = len(prompts) * bench.new_tokens / seconds_in_turns(
            actions, BATCH_REPEATS, bench.device, f"batches of {size}"
        )  # fmt: skip
        rows += [
            {"batch": size, "method": name, "rate": quartiles(own), "speedup": paired_quartiles(own, rates[:, 0])}
            for name, own in zip(engines, rates.T, strict=True)
        ]
    note = (
        f"{bench.caption(bench.subject, GREEDY)}: different held-out prompts of {bench.prompt_tokens // 2} to "
        f"{bench.prompt_tokens} tokens ({bench.data}), {bench.new_tokens} new tokens each, prefill included; "
        f"{BATCH_REPEATS} runs of each in turns. A batch continues until its last text has ended."
    )
    columns = {
        "batch": lambda row: str(row["batch"]),
        "method": lambda row: row["method"],
        "tokens/s, all texts": lambda row: f"{row['rate'][1]:.0f}",
        "speed-up (quartiles)": lambda row: spread(row["speedup"]),
    }
    lines = [
        plots.Line(name, BATCHES, [row["speedup"][1] for row in rows if row["method"] == name], colour)
        for colour, name in enumerate(engines)
    ]
    scale = {"xscale": "log", "xticks": BATCHES, "xticklabels": BATCHES}
    picture = plots.curves([plots.Panel("texts in a batch", OVER_PLAIN, lines, scale)])
    return Report([note, table(rows, columns)], {"rows": rows}, {"batches": picture})


def text_quality(bench: Bench) -> Report:
    """Is the text as good with PaSS as without? Held-out function heads are completed by each method."""
    heads = quality.function_heads(each.text for each in bench.heldout(bench.data))
    encoded = quality.usable_heads(heads, bench.subject.loaded.encoding, bench.prompt_tokens)
    if not encoded:
        return Report([f"Left out: the held-out part of {bench.data} has no Python function of a length that fits."])
    picked, length = [encoded[i * len(encoded) // bench.n_samples] for i in range(bench.n_samples)], bench.lookahead[0]
    rows = []
    for name, method in {PLAIN: Plain(), **bench.methods(length, SAMPLED)}.items():
        engine = bench.engine(method, SAMPLED, bench.subject.model_of(name))
        encoding = bench.subject.loaded.encoding
        rows.append({"method": name, **quality.judge(engine, encoding, picked, bench.new_tokens, bench.seed, name)})
    note = (
        f"{bench.caption(bench.subject, SAMPLED)}: {bench.n_samples} heads of functions in held-out files "
        f"({len(encoded)} different ones), {bench.new_tokens} new tokens each, L = {length}. A completion "
        "is cut before its first line that is not indented, or before its last line where it has none. 95% intervals: "
        "Wilson's, and +- 1.96 standard errors. Under the coupled rule the texts are plain decoding's but for rounding."
    )
    columns = {
        "method": lambda row: row["method"],
        "samples": lambda row: str(row["samples"]),
        "parses (95%)": lambda row: "{:.1%} ({:.1%} to {:.1%})".format(row["parses"], *row["interval"]),
        "log-likelihood per token under the base, nats": lambda row: (
            f"{row['log_likelihood']:.3f} +- {row['half_width']:.3f}"
        ),
    }
    drawn = [(row["method"], row["interval"][0], row["parses"], row["interval"][1]) for row in rows]
    picture = plots.intervals([(f"completed functions, {SAMPLED}", drawn)], "share that parses (95%)")
    return Report([note, table(rows, columns), bench.drafter()], {"rows": rows}, {"quality": picture})


def against_peers(bench: Bench) -> Report:
    """Is PaSS faster than Hugging Face `generate` on the same weights: plain, with an assistant, with prompt lookup?"""
    if not peers.installed():
        return Report(["Left out: transformers is not installed (pip install -e '.[peers]')."], {"rows": []})
    report, draft = Report(), bench.draft.model if bench.draft else None
    for decoding in (GREEDY, SAMPLED):
        contenders = bench.family(bench.data, decoding, bench.lookahead)
        arguments = (bench.subject.model, draft, contenders[0], bench.new_tokens, bench.lookahead, DECODINGS[decoding])
        theirs, difference = peers.contenders(*arguments)
        rows, _ = report.race(bench, bench.data, decoding, contenders + theirs)
        own, others = (
            max((row for row in rows if (row["tokens_per_pass"] is None) == hf), key=lambda row: row["speedup"][1])
            for hf in (False, True)
        )
        report.data[decoding] = {"rows": rows, "largest_difference": difference}
        report.parts.append(
            f"Fastest of ours: {label(own)}, {own['speedup'][1]:.2f}; of theirs: {label(others)}, "
            f"{others['speedup'][1]:.2f}."
        )
    report.parts.append(
        f"HF is transformers {peers.version()} with the same weights: its logits in float32 differ by at most "
        f"{difference:.0e}. Ratios are against our plain decoding. {bench.drafter()}"
    )
    report.forced(bench, bench.data, bench.subject)
    report.draw_speedups("peers")
    return report


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
    "pretrained": pretrained.pretrained,
}
