"""The bench on a real pretrained model that stays as it is: code, prose, chat and a text that repeats its prompt."""

import importlib.util
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from minipass import losses, weights
from minipass.api import DEFAULT_LOOKUP
from minipass.auto import MOST_AUTO_LOOKAHEAD, AdaptiveTree, Auto, best_tree, turn_seconds
from minipass.chat import encode_chat
from minipass.data import even_windows
from minipass.decode import Engine, Fused, Plain, TwoPass
from minipass.errors import InputError
from minipass.extras.benchmark import peers
from minipass.extras.benchmark.contenders import DECODINGS, FUSED, GREEDY, LOOKUP, PLAIN, SAMPLED, Bench, Subject
from minipass.extras.benchmark.measuring import ours
from minipass.extras.benchmark.reporting import Report, teacher_forced
from minipass.pretrained import SMOLLM2
from minipass.sampling import COUPLED, REJECTION
from minipass.tokenizer import stop_tokens

MODEL = SMOLLM2
CODE = "matplotlib"  # an installed package, which no training of adapters saw
SHARE_OF_PROMPTS, EVALUATED, WINDOW = 4, 12, 256  # of the bench's prompts one in so many; windows and their tokens
CHAINS, TREE_DRAFTS = (1, 2, 4), 16
QUESTIONS = (
    "What is the speed of light?",
    "Why is the sky blue?",
    "Write a Python function that reverses a string.",
    "How do I boil an egg?",
    "What is the capital of France, and what is it known for?",
    "Explain what a prime number is to a child.",
    "Give me three tips for learning a new language.",
    "What is the difference between a list and a tuple in Python?",
    "Write a short poem about the sea.",
    "How does a bicycle stay upright?",
    "What causes the seasons?",
    "Write an email that declines an invitation politely.",
)
EDIT = "Repeat this code, with a comment before each function:\n\n```python\n{code}\n```"


def pretrained(bench: Bench) -> Report:
    """What does PaSS give on a real model, frozen: SmolLM2-135M on unseen code, prose, in chat, and where text repeats?

    `table` is the paper's look-ahead table alone, the others also have what else was trained for it.
    """
    try:
        best, table = (
            Subject(name, weights.load(MODEL, device=bench.device, dtype=bench.dtype, adapters=adapters))
            for name, adapters in ((str(MODEL), None), (f"{MODEL}, table", weights.NONE))
        )
    except InputError as error:
        return Report([f"Left out: {error}."])
    if not (best.model.config.n_lookahead and table.model.config.n_lookahead):
        return Report([f"Left out: nothing in the package was trained for {MODEL}."])
    report, encoding, forced = Report(), best.loaded.encoding, {}
    folder = Path(next(iter(importlib.util.find_spec(CODE).submodule_search_locations)))
    bench = replace(bench, subject=best, data=str(folder), n_prompts=max(2, bench.n_prompts // SHARE_OF_PROMPTS))
    for domain, source in ((CODE, str(folder)), ("docstrings", "docstrings")):
        windows = even_windows(bench.tokens(best, source), EVALUATED, WINDOW + 1)
        for subject in (table, best):
            figures = forced[f"{subject.name}, {domain}"] = losses.evaluate(subject.model, windows, batch_size=4)
            text = f"{len(windows)} windows of {WINDOW} tokens ({domain})"
            report.parts.append(teacher_forced(subject.name, text, figures))
    report.data["teacher_forced"] = forced
    accuracy, alone = (forced[f"{subject.name}, {CODE}"]["rank_accuracy"] for subject in (best, table))
    code = bench.prompts(best, str(folder))
    chat = partial(encode_chat, encoding, best.loaded.chat_template)
    edits = [chat([{"role": "user", "content": EDIT.format(code=encoding.decode(prompt))}]) for prompt in code]
    domains = {
        CODE: code,
        "docstrings": bench.prompts(best, "docstrings"),
        "chat": [chat([{"role": "user", "content": question}]) for question in QUESTIONS[: bench.n_prompts]],
        "repetitive": edits,
    }
    for decoding, asked in ((GREEDY, domains), (SAMPLED, (CODE, "chat"))):
        seconds = turn_seconds(best.model, accuracy[:MOST_AUTO_LOOKAHEAD], DECODINGS[decoding])
        for domain, prompts in ((domain, domains[domain]) for domain in asked):
            rows = {
                "two-pass, table": (TwoPass(CHAINS[1]), table, CHAINS[1]),
                "fused, table": (Fused(CHAINS[-1]), table, CHAINS[-1]),
                f"tree of {TREE_DRAFTS}, table": (Fused(best_tree(alone, TREE_DRAFTS)), table, None),
                **{f"{FUSED}, L = {n}": (Fused(n), best, None) for n in CHAINS},
                f"tree of {TREE_DRAFTS}": (Fused(best_tree(accuracy, TREE_DRAFTS)), best, None),
                LOOKUP: (Fused(0, lookup=DEFAULT_LOOKUP), best, None),
                "auto + prompt lookup": (
                    Auto(AdaptiveTree(accuracy[:MOST_AUTO_LOOKAHEAD], seconds), COUPLED, DEFAULT_LOOKUP), best, None
                ),
            }  # fmt: skip
            if decoding == SAMPLED:
                rows[f"{FUSED}, L = {CHAINS[-1]}, rejection"] = Fused(CHAINS[-1], REJECTION), best, None
            stop = stop_tokens(encoding)

            def contender(name, method, subject, n, baseline, prompts=prompts, decoding=decoding, stop=stop):
                engine = Engine(subject.model, method, DECODINGS[decoding], use_graphs=bench.use_graphs)
                return ours(name, engine, prompts, bench.new_tokens, n, baseline, stop)

            plain = contender(PLAIN, Plain(), best, None, None)
            contenders = [plain, *(contender(name, *row, plain) for name, row in rows.items())]
            if peers.installed():
                sizes = (best.model, None, plain, bench.new_tokens, [], DECODINGS[decoding])
                contenders += peers.contenders(*sizes, stop)[0]
            found, _ = report.race(bench, domain, decoding, contenders, counted(domain, prompts, bench.new_tokens))
            report.data[f"{domain}, {decoding}"] = found
    report.draw_speedups("pretrained")
    return report


def counted(domain: str, prompts: Sequence[Sequence[int]], new_tokens: int) -> str:
    """How much was generated, in words."""
    lengths = sorted({min(map(len, prompts)), max(map(len, prompts))})
    return (
        f"{len(prompts)} prompts of {' to '.join(map(str, lengths))} tokens ({domain}), at most {new_tokens} new ones"
    )
