"""The bench's experiments. Each has a question, the contenders, the texts, and a picture."""

import argparse
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import wraps
from itertools import product

import matplotlib
from matplotlib.figure import Figure

from minipass import weights
from minipass.decode import Fused, TwoPass
from minipass.engine import Engine
from minipass.errors import InputError
from minipass.extras.benchmark import contenders, functions
from minipass.extras.benchmark.contenders import DECODINGS, GREEDY, SAMPLED, Contender, in_a_row
from minipass.extras.benchmark.measuring import wilson_interval
from minipass.extras.benchmark.reporting import Report, bars, picture
from minipass.extras.benchmark.subjects import BATCHES, CHAT, EDIT, PROSE, SUMMARY, Bench, Subject, heldout, load
from minipass.pretrained import SMOLLM2, is_pretrained
from minipass.sampling import REJECTION
from minipass.tokenizer import encode_text

RACE = "method tokens_per_pass accepted_by_position speedup tokens_per_second first_ms repeated_8grams same_text"
FORCED = "checkpoint text million_weights stage seconds loss acceptance constant_acceptance match"
COST = "model million_weights method rows milliseconds over_plain bandwidth_share"
DEFAULTS = {"data": "python", "prompts": 6, "new_tokens": 120}
UNSEEN = os.path.dirname(matplotlib.__file__)  # code that no training of adapters saw
EXPERIMENTS: dict[str, Callable[[Bench], Iterator[Report]]] = {}  # the Report, again after each table
Tables = Iterator[tuple]  # arguments of Report.add


def experiment(*drawn: str, series: Sequence[str] = ("text", "decoding"), **defaults) -> Callable:
    """Adds an experiment, a function that yields tables, to EXPERIMENTS. Its docstring is its question.

    drawn, series: arguments of reporting.picture, for the tables' rows. defaults: for options that the user leaves out.
    """

    def add(tables: Callable[[Bench], Tables]) -> Callable:
        @wraps(tables)
        def run(bench: Bench) -> Iterator[Report]:
            given = {name: value for name, value in vars(bench.options).items() if value is not None}
            report, options = Report(), argparse.Namespace(**DEFAULTS | defaults | given)
            for found in tables(replace(bench, options=options)):
                report.add(*found)
                yield report
            report.picture = picture(report.data["rows"], series, *drawn or ("method", "speedup"))

        run.__doc__ = " ".join(tables.__doc__.split())
        EXPERIMENTS[tables.__name__] = run
        return run

    return add


def races(
    bench: Bench, rivals: Sequence[Contender], *texts: str, decodings: Sequence[str] = (GREEDY, SAMPLED)
) -> Tables:
    """Contenders on each text (by default the corpus of --data) in each decoding."""
    for text, decoding in product(texts or [bench.options.data], decodings):
        rows = contenders.race(bench, text, decoding, rivals)
        what = ", ".join([f"`{bench.subject.name}`", rows[0]["text"], decoding, f"{rows[0]['prompts']} prompts"])
        yield "rows", f"{what}, {bench.options.new_tokens} new tokens:", rows, RACE


def forced(name: str, subjects: Sequence[Subject | None], *sources: str) -> tuple:
    """Teacher-forced figures of each subject on each corpus; a text's loops do not make these look better."""
    rows = [subject.forced(source) for source in sources for subject in subjects if subject]
    rows.sort(key=lambda row: row["million_weights"])
    return name, "Teacher-forced on held-out text:", rows, FORCED


@experiment(prompts=14)
def headline(bench: Bench) -> Tables:
    """How much does PaSS give with the shipped joint model, greedy and sampled, on code? Two-pass uses the paper's
    rejection rule; the others use the coupled rule unless a rule is named."""
    methods = in_a_row(bench, "two-pass", "fused", "fused, rejection", "tree of 4 L")
    yield from races(bench, [*methods, contenders.LOOKUP, contenders.AUTO])
    yield forced("teacher_forced", [bench.subject], bench.options.data)


@experiment()
def methods(bench: Bench) -> Tables:
    """Which method gives how much, for code and for prose, greedy and sampled?"""
    yield from races(bench, [*in_a_row(bench), contenders.LOOKUP], bench.options.data, PROSE, decodings=DECODINGS)
    yield forced("teacher_forced", [bench.subject], bench.options.data, PROSE)


@experiment("method", "tokens_per_pass", "speedup")
def lookahead(bench: Bench) -> Tables:
    """How many look-ahead tokens are best? More drafts save passes, but each pass then has more rows."""
    lengths = range(1, 1 + bench.subject.model.config.n_lookahead)
    yield from races(bench, in_a_row(bench, "two-pass", "fused", lengths=lengths))


@experiment("method", "tokens_per_pass", "speedup")
def trees(bench: Bench) -> Tables:
    """How many drafts should a tree have, and which exact rule is better? Coupled, drafts are the best of the target's
    own race, and a tree is chosen for each turn anew or fixed; rejection draws them without replacement and tests one
    after the other."""
    depth, sizes = bench.subject.model.config.n_lookahead, (2, 8, 32)
    chosen = {f"tree of {n}": bench.tree(depth, n) for n in sizes}
    fixed = {f"chain of {n}": n for n in (2, 4) if n <= depth}
    fixed |= {f"fixed tree of {n}": bench.tree(depth, n, fixed=True) for n in sizes}
    coupled = [Contender(name, Fused(shape)) for name, shape in (chosen | fixed).items()]
    others = [Contender(f"{name}, rejection", Fused(shape, REJECTION)) for name, shape in fixed.items()]
    yield from races(bench, [*coupled, *others], decodings=DECODINGS)


@experiment()
def auto(bench: Bench) -> Tables:
    """Does --lookahead auto find what is fastest? Against chains and trees of fixed sizes, on code and on prose."""
    lengths = range(1, 1 + min(4, bench.subject.model.config.n_lookahead))
    trees = [Contender(f"tree of {n}", Fused(bench.tree(lengths[-1], n))) for n in (4, 8)]
    rivals = [*in_a_row(bench, "fused", lengths=lengths), *trees, contenders.AUTO]
    yield from races(bench, rivals, bench.options.data, PROSE, decodings=[GREEDY])


@experiment("text", "speedup", series=["method"])
def batches(bench: Bench) -> Tables:
    """Up to which batch does PaSS pay? A pass over many texts has many rows as it is."""
    fused = in_a_row(bench, "fused", lengths=bench.options.lookahead[:1])
    yield from races(bench, fused, *BATCHES, decodings=[GREEDY])


@experiment("position", "acceptance", "match", series=["checkpoint"])
def acceptance(bench: Bench) -> Tables:
    """Which training drafts best? With the checkpoints and runs of --compare. A base that predicts badly is easier to
    draft for, so its loss is there too; a constant p shows what drafts reach that know nothing of the context."""
    yield forced("rows", [bench.subject, bench.subject.headless, *bench.compared], bench.options.data)


@experiment("checkpoint", "first_acceptance", "constant_acceptance", series=["text"])
def bases(bench: Bench) -> Tables:
    """Does the paper's recipe, a table on a frozen base, come alive as the base grows? For the runs of --compare."""
    yield forced("rows", bench.compared or [bench.subject], bench.options.data)


@experiment("rows", "milliseconds", "over_plain", series=["model"])
def cost(bench: Bench) -> Tables:
    """What does a turn cost, by rows and by size of the model? PaSS lives on rows that are nearly free. All but the
    first model have random weights; one that stays in the processor's caches can be faster than memory."""
    fused = in_a_row(bench, "fused", lengths=range(1, 1 + bench.subject.model.config.n_lookahead))
    yield "rows", "Turns after a prompt:", contenders.turns(bench, fused, larger=True), COST


@experiment("model", "predicted", series=["method"])
def sizes(bench: Bench) -> Tables:
    """A simulation: what would PaSS give for larger models, if their drafts were accepted as often as the subject's?
    The time of a turn is measured, with random weights; tokens/pass are those of the subject's greedy text."""
    trees = [Contender(f"tree of {n}", Fused(bench.tree(bench.options.lookahead[-1], n))) for n in (8, 16, 32)]
    rows = contenders.predicted(bench, [*in_a_row(bench, "fused"), *trees], larger=True)
    yield "rows", "Turns after a prompt:", rows, f"{COST} tokens_per_pass predicted"


@experiment("method", "predicted", "observed", series=["model"])
def check(bench: Bench) -> Tables:
    """Does the cost model of a turn explain the speed-up? Predicted: tokens/pass x t(plain turn) / t(turn)."""
    rows = contenders.predicted(bench, in_a_row(bench, "two-pass", "fused", "fused + prompt lookup", "tree of 4 L"))
    yield "rows", "Turns after a prompt:", rows, f"{COST} tokens_per_pass predicted observed"


@experiment("method", "parses", series=["decoding"])
def quality(bench: Bench) -> Tables:
    """Is the text as good with PaSS as without? Held-out heads of functions are completed by each method: how many
    parse, and how many are plain decoding's. Coupled, all are but for rounding; with rejection, others as good."""
    options, encoding, count, rows, plain = bench.options, bench.subject.encoding, bench.options.samples, [], []
    found = functions.function_heads(document.text for document in heldout(options.data))
    found = [head for head in found if len(encode_text(encoding, head)) <= options.prompt_tokens]
    if not found:
        raise InputError(f"{options.data} holds out no Python function whose head has at most --prompt-tokens")
    heads = [found[i * len(found) // count] for i in range(count)]
    names = ("two-pass", "fused", "fused, rejection", "tree of 4 L", "tree of 4 L, rejection", "two models")
    for each in [contenders.PLAIN, *in_a_row(bench, *names, lengths=options.lookahead[:1])]:
        engine = Engine(bench.subject.model, each.method, DECODINGS[SAMPLED], use_graphs=options.cuda_graphs)
        made = functions.complete(engine, encoding, heads, options.new_tokens, options.seed)
        plain, n_parsed = plain or made, sum(functions.parsed(code) is not None for code in made)
        row = {"decoding": SAMPLED, "method": each.name, "parses": wilson_interval(n_parsed, count), "samples": count}
        rows.append(row | {"as_plain": sum(map(str.__eq__, made, plain))})
    yield "rows", f"`{bench.subject.name}`, {SAMPLED}, 95% intervals:", rows, "method samples parses as_plain"


@experiment()
def peers(bench: Bench) -> Tables:
    """Is PaSS faster than Hugging Face `generate` on the same weights: plain, with an assistant, with prompt lookup?"""
    theirs = [Contender(*each) for each in contenders.forms(bench.draft and bench.draft.model).items()]
    ours = in_a_row(bench, "two-pass", "fused", "fused + prompt lookup", "tree of 4 L", "two models")
    yield from races(bench, [*ours, contenders.LOOKUP, *theirs])


def real(bench: Bench) -> Bench:
    """The bench with SmolLM2 as its subject, or with the model of others that --checkpoint names."""
    best = bench.subject if is_pretrained(bench.subject.name) else load(SMOLLM2, *bench.place)
    return replace(bench, subject=best, draft=None)


def most_ahead(subject: Subject, *others: Subject) -> int:
    """The look-ahead tokens that all have, at most 4. Raises InputError where one has none."""
    if not (most := min(4, *(each.model.config.n_lookahead for each in (subject, *others)))):
        raise InputError(f"nothing in the package was trained for {subject.name}")
    return most


@experiment(data=UNSEEN, new_tokens=60)
def pretrained(bench: Bench) -> Tables:
    """What does PaSS give on a real model, frozen, on code that our training did not see: SmolLM2-135M, or the model of
    others that --checkpoint names? `table` is the paper's look-ahead table alone, `fixed token` an ordinary token in
    its place. (Of Hugging Face, no assistant: a smaller model of these tokens would have to be there.)"""
    bench = real(bench)
    corpus, best = bench.options.data, bench.subject
    table = replace(load(best.name, *bench.place, weights.NONE), name=f"{best.name}, table")
    most = most_ahead(best, table)
    paper = {"two-pass": TwoPass(min(2, most)), "fused": Fused(most), "tree of 16": Fused(bench.tree(most, 16, table))}
    alone = [Contender(f"{name}, table", method, table.model) for name, method in paper.items()]
    fixed = TwoPass(min(2, most), fixed_token=best.model.config.vocab_size - 1)  # the paper's comparison: no table
    alone.append(Contender("two-pass, fixed token", fixed, table.model))
    more = {"fused, rejection": Fused(most, REJECTION), "tree of 16": Fused(bench.tree(most, 16))}
    fused = in_a_row(bench, "fused", lengths=[n for n in (1, 2, 4) if n <= most])
    both = [*fused, contenders.AUTO, contenders.LOOKUP, contenders.AUTO_LOOKUP]
    both += [Contender(*each) for each in (more | contenders.forms(None)).items()]
    yield from races(bench, [*alone, *both], corpus, decodings=[GREEDY])
    yield from races(bench, both, corpus, decodings=[SAMPLED])
    yield forced("teacher_forced", [table, best], corpus, PROSE)
    yield "turns", "What rows cost:", contenders.turns(bench, fused), COST


@experiment(data=UNSEEN, prompts=4, new_tokens=60)
def uses(bench: Bench) -> Tables:
    """What does the real model gain in use: prose, chat, and where text repeats its prompt?"""
    bench = real(bench)
    most_ahead(bench.subject)
    theirs = [Contender(*each) for each in contenders.forms(None).items()]
    fused = in_a_row(bench, "fused", lengths=[1])
    both = [*fused, contenders.AUTO, contenders.LOOKUP, contenders.AUTO_LOOKUP, *theirs]
    yield from races(bench, both, PROSE, CHAT, EDIT, SUMMARY, decodings=[GREEDY])
    yield from races(bench, both, CHAT, decodings=[SAMPLED])


def overview(experiments: dict) -> Figure | None:
    """Plain decoding against PaSS (`auto`), for the tiny and the real model, greedy and sampled; None if one of them is
    missing. experiments: what bench.py has written as JSON."""
    speedups, wanted = {}, product((("headline", "tiny model"), ("pretrained", "SmolLM2")), (GREEDY, SAMPLED))
    try:
        for (name, title), decoding in wanted:
            rows = [row for row in experiments[name]["rows"] if (row["method"], row["decoding"]) == ("auto", decoding)]
            speedups[f"{title},\n{'greedy' if decoding == GREEDY else 'sampled'}"] = float(rows[0]["speedup"][1])
    except (KeyError, TypeError, ValueError, IndexError):  # from an older bench, or not measured
        return None
    return bars(speedups, "plain", "PaSS", "Speed, writing code")
