"""Contenders: the methods that the bench compares, how they race on a text, and what their turns cost.

Hugging Face's `generate`, on the same weights, is one of them: `pip install -e '.[peers]'`.
"""

import copy
import importlib.util
import os
from collections.abc import Callable, Sequence
from functools import lru_cache
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch

from minipass import pretrained
from minipass.api import DEFAULT_LOOKUP
from minipass.auto import MOST_AUTO_LOOKAHEAD, AdaptiveTree, Auto, turn_seconds
from minipass.decode import Fused, Method, Plain, TwoModels, TwoPass
from minipass.engine import Engine
from minipass.errors import InputError
from minipass.extras.benchmark import measuring
from minipass.extras.benchmark.measuring import WARM_UPS, Run, now, seconds_in_turns
from minipass.extras.benchmark.subjects import Bench, Subject
from minipass.model import GPT, GPTConfig, is_drafting
from minipass.sampling import COUPLED, REJECTION, Sampling
from minipass.texts import Prompts
from minipass.tokenizer import stop_tokens

GREEDY, SAMPLED = "greedy", "T = 0.8, top-k 10"
DECODINGS = {GREEDY: Sampling(), SAMPLED: Sampling(0.8, top_k=10), "T = 1": Sampling(1.0)}
SIZES = ("n_layer", "n_head", "n_embd", "n_kv_head", "n_inner", "vocab_size", "block_size")
GPT2 = ((12, 12, 768), (24, 16, 1024), (36, 20, 1280), (48, 25, 1600))
LLAMA = ((30, 9, 576, 3, 1536), (32, 15, 960, 5, 2560), (16, 32, 2048, 8, 8192))  # SmolLM2's smaller two, Llama 3.2's
LARGER = {  # sizes of models with random weights, whose only use is to be timed
    "cpu": [(8, 8, 512), (12, 12, 768)],
    "cuda": [*((*size, 0, 0, 50_257, 1024) for size in GPT2), *((*size, 49_152, 2048) for size in LLAMA)],
}
REPEATS = 20  # turns that are timed
READ = 2**26  # float32 numbers that are read to time the memory
WARM_UP = 16  # untimed tokens before a race


class Contender(NamedTuple):
    """A row of a table. method: a method, a function that makes one, or arguments of Hugging Face's generate.

    model: None for the subject's.
    """

    name: str
    method: Method | Callable[[Bench, Sampling], Method] | dict
    model: GPT | None = None


@lru_cache(maxsize=4)
def chooser(subject: Subject, data: str, sampling: Sampling, use_graphs: bool) -> AdaptiveTree:
    """An AdaptiveTree that knows how often the subject's drafts are right and how long turns take. This is slow to
    measure, so it is kept."""
    accuracy = subject.forced(data)["rank_accuracy"][:MOST_AUTO_LOOKAHEAD]
    return AdaptiveTree(accuracy, turn_seconds(subject.model, accuracy, sampling, use_graphs=use_graphs))


def adaptive(bench: Bench, sampling: Sampling, lookup: int = 0) -> Auto:
    """Trees that follow machine and text. Each race begins anew, without what the race before has taught."""
    known = chooser(bench.subject, bench.options.data, sampling, bench.options.cuda_graphs)
    return Auto(copy.deepcopy(known), COUPLED, lookup)


PLAIN, LOOKUP = Contender("plain", Plain()), Contender("prompt lookup alone", Fused(0, lookup=DEFAULT_LOOKUP))
AUTO = Contender("auto", adaptive)
AUTO_LOOKUP = Contender("auto + prompt lookup", lambda bench, sampling: adaptive(bench, sampling, DEFAULT_LOOKUP))


def in_a_row(bench: Bench, *names: str, lengths: Sequence[int] = ()) -> list[Contender]:
    """The named methods, or all, for each number L of drafts in a chain, without those that lack something."""
    subject, draft = bench.subject, bench.draft
    made = {
        "two-pass": TwoPass,
        "fused": Fused,
        "fused, rejection": lambda n: Fused(n, REJECTION),
        "fused + prompt lookup": lambda n: Fused(n, lookup=DEFAULT_LOOKUP),
        "tree of 4 L": lambda n: Fused(bench.tree(n, 4 * n)),
        "tree of 4 L, rejection": lambda n: Fused(bench.tree(n, 4 * n, fixed=True), REJECTION),
        "fused, no head": subject.model.draft_head and Fused,
        "two models": draft and (lambda n: TwoModels(draft.model, n)),
    }
    return [
        Contender(f"{name}, L = {n}", made[name](n), subject.headless.model if name == "fused, no head" else None)
        for name in names or made
        if made[name]
        for n in lengths or bench.options.lookahead
    ]


def race(bench: Bench, text: str, decoding: str, contenders: Sequence[Contender]) -> list[dict]:
    """Plain decoding and the contenders take turns. Gives a row for each: what was compared, and measuring.figures."""
    options, sampling, runs = bench.options, DECODINGS[decoding], []
    stop = stop_tokens(bench.subject.encoding) if bench.subject.chat_template else ()  # answers end, text goes on
    contenders = [PLAIN, *(each for each in contenders if decoding != GREEDY or REJECTION not in each.name)]
    for each in contenders:  # when greedy, both rules are the same
        model, method = each.model or bench.subject.model, each.method
        if isinstance(method, dict):
            runs.append(theirs(model, method, sampling, stop))
        else:
            method = method(bench, sampling) if callable(method) else method
            runs.append(measuring.ours(Engine(model, method, sampling, use_graphs=options.cuda_graphs), stop))
    warm_up = options.new_tokens if options.cuda_graphs else min(WARM_UP, options.new_tokens)  # each turn may be new
    what, prompts = {"text": os.path.basename(text), "decoding": decoding}, bench.prompts(text)
    samples = measuring.take_turns(runs, prompts, options.new_tokens, options.seed, ", ".join(what.values()), warm_up)
    named = zip([each.name for each in contenders], samples, strict=True)
    what["prompts"] = len(prompts)
    return [what | {"method": name} | measuring.figures(own, samples[0]) for name, own in named]


def forms(draft: GPT | None) -> dict[str, dict]:
    """`generate` as its documentation uses it: plain, with prompt lookup and, where there is a draft model, with an
    assistant. Raises InputError without transformers."""
    if importlib.util.find_spec("transformers") is None:
        raise InputError("transformers is not installed: pip install -e '.[peers]'")
    found = {"HF plain": {}, "HF prompt lookup": {"prompt_lookup_num_tokens": 10}}
    return found if draft is None else found | {"HF assistant": {"assistant_model": draft}}


@lru_cache(maxsize=4)
def as_theirs(model: GPT):
    """The model as one of transformers, with its dtype and device."""
    import transformers

    transformers.logging.set_verbosity_error()  # it warns about sampling's defaults in greedy decoding
    transformers.logging.disable_progress_bar()
    with TemporaryDirectory() as folder:
        pretrained.write_folder(model, folder)
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=model.dtype).to(model.device).eval()


def theirs(model: GPT, form: dict, sampling: Sampling, stop_tokens: Sequence[int]) -> Run:
    """A run that continues prompts with `generate`."""
    from transformers import GenerationConfig

    them, assistant, form = as_theirs(model), None, form | {"eos_token_id": list(stop_tokens) or None}
    if sampling.temperature > 0:
        form |= {"do_sample": True, "temperature": sampling.temperature, "top_k": sampling.top_k or 0}
    if "assistant_model" in form:
        form["assistant_model"] = assistant = as_theirs(form["assistant_model"])

    def run(prompt: Prompts, n_new: int, seed: int) -> measuring.Sample:
        for each in (them, assistant or them):  # an assistant adapts in a run: the next one starts afresh
            each.generation_config = GenerationConfig(pad_token_id=0)
        ids, came = torch.tensor([prompt], device=model.device), []  # when tokens came, and how many: the prompt first
        streamer = SimpleNamespace(put=lambda tokens: came.append((now(), tokens.numel())), end=lambda: None)
        torch.manual_seed(seed)  # it draws from the global generator
        began = now()
        out = them.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n_new, streamer=streamer, **form)
        return measuring.sample([out[0, len(prompt) :].tolist()], came[1][1], began, came[1][0], now())

    return run


def turns(bench: Bench, contenders: Sequence[Contender], larger: bool = False) -> list[dict]:
    """Times turns after a prompt, where plain decoding and the contenders take turns.

    Returns rows: the time of a turn, the same relative to plain decoding, and the share of the memory's speed that
    reading all weights once in this time needs. larger: also models of the sizes in LARGER.
    """
    options, contenders, found, own = bench.options, [PLAIN, *contenders], [], bench.subject.model
    memory = torch.ones(READ, device=own.device)
    bandwidth = memory.nbytes / seconds_in_turns([memory.sum], REPEATS).min()
    for size in (None, *(LARGER[own.device.type] if larger else ())):
        model = own if size is None else random_model(own, size, options.seed)
        engines = [Engine(model, each.method, use_graphs=options.cuda_graphs) for each in contenders]
        deepest = max(shape.tree.depth[-1] for each in contenders for shape in each.method.largest)
        most = (WARM_UPS + REPEATS) * (1 + deepest)  # tokens of these turns
        streams = [engine.stream([0] * options.prompt_tokens, most) for engine in engines]
        seconds = seconds_in_turns([stream.__next__ for stream in streams], REPEATS)
        unread = ["wpe.weight", *["wte.weight"] * (not model.config.tied)]  # only a few rows are read
        read = sum(p.numel() for name, p in model.named_parameters() if name not in unread and not is_drafting(name))
        config, n_bytes = model.config, read * model.wte.weight.element_size()
        title = f"{config.n_layer} layers, width {config.n_embd}{', Llama' * config.llama}"
        for each, column in zip(contenders, seconds.T, strict=True):
            row = {"model": title, "million_weights": read / 1e6, "method": each.name}
            row |= {"rows": each.method.largest[0].n_rows, "milliseconds": measuring.quartiles(1000 * column)}
            row["over_plain"] = float(np.median(column / seconds[:, 0]))
            found.append(row | {"bandwidth_share": n_bytes / bandwidth / float(np.median(column))})
    return found


def random_model(like: GPT, size: Sequence[int], seed: int) -> GPT:
    """A model with random weights, with a size from LARGER and otherwise the settings of `like`."""
    sizes = {name: getattr(like.config, name) for name in ("vocab_size", "block_size", "n_lookahead", "n_draft")}
    sizes |= dict(zip(SIZES, size, strict=False))
    torch.manual_seed(seed)
    with like.device:
        return GPT(GPTConfig(**sizes, llama=sizes.get("n_kv_head", 0) > 0)).to(like.dtype).eval()


def predicted(bench: Bench, contenders: Sequence[Contender], larger: bool = False) -> list[dict]:
    """`turns`, with the speed-up predicted from the tokens/pass of the subject's greedy text, and the observed one."""
    own = {row["method"]: row for row in race(bench, bench.options.data, GREEDY, contenders)}
    found = turns(bench, contenders, larger)
    for row in found:
        tokens, seen = own[row["method"]]["tokens_per_pass"], None if larger else own[row["method"]]["speedup"]
        row |= {"tokens_per_pass": tokens, "predicted": tokens / row["over_plain"], "observed": seen}
    return found
