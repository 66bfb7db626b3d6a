"""Decoding: plain, PaSS in two passes (Algorithm 1), PaSS fused in one (a chain or a tree of drafts), two models.

`stream` checks what it is given and yields one Round at a time; `generate` collects them. What a round does stands in
rounds.py.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from minipass import capture
from minipass.decoder import DRAFTER, TARGET, Decoder
from minipass.errors import InputError
from minipass.layout import DraftTree, chain, group_ids
from minipass.model import GPT
from minipass.rounds import (
    ACCEPTED,
    BONUS,
    CORRECTED,
    FREE,
    Round,
    Run,
    autoregressive,
    fused,
    speculative,
    two_pass,
)
from minipass.sampling import check_sampling

if TYPE_CHECKING:
    from minipass.shapes import AdaptiveTree

__all__ = ["ACCEPTED", "BONUS", "CORRECTED", "FREE", "METHODS", "RULES", "Generation", "Round", "generate", "stream"]

METHODS = ("autoregressive", "pass-two-pass", "pass", "pass-tree", "fixed-token", "speculative", "prompt-lookup")
RULES = ("matching", "recursive")  # of tree_accept
DEFAULT_LOOKAHEAD = 2  # the fastest on a CPU for the shipped model (bench.py); where rows are cheap, 4 and more are
DEFAULT_PROMPT_LOOKUP = 10
DEFAULT_TREE = DraftTree((0, 0, 0, 1, 1, 2, 4))  # see shapes.py for a better one
Prompts = Sequence[int] | Sequence[Sequence[int]]


@dataclass
class Generation:
    """All rounds of one call. tokens: for each prompt its new tokens, with the stop token if one ended it."""

    tokens: list[list[int]] = field(default_factory=list)
    passes: int = 0
    draft_passes: int = 0
    rounds: int = 0
    prompt_passes: int = 0  # passes summed over the prompts that they continued
    tested: list[int] = field(default_factory=list)  # by draft position
    accepted: list[int] = field(default_factory=list)

    @property
    def tokens_per_pass(self) -> float:
        """Emitted tokens for each pass of the target model, prefill included: 1.0 for plain decoding."""
        return sum(map(len, self.tokens)) / max(self.prompt_passes, 1)

    @property
    def acceptance(self) -> list[float]:
        """By draft position, the share of the drafts made there that were kept."""
        return [kept / made for kept, made in zip(self.accepted, self.tested, strict=True)]

    def add(self, record: Round) -> None:
        """Counts one more round in."""
        self.tokens = self.tokens or [[] for _ in record.tokens]
        for tokens, new in zip(self.tokens, record.tokens, strict=True):
            tokens += new
        models = [model for model, _ in record.passes]
        self.passes += models.count(TARGET)
        self.draft_passes += models.count(DRAFTER)
        self.rounds += 1
        self.prompt_passes += models.count(TARGET) * sum(record.active)
        longest = max([len(self.tested), *record.n_tested])
        for counts, numbers in ((self.tested, record.n_tested), (self.accepted, record.n_accepted)):
            counts += [0] * (longest - len(counts))
            for number in numbers:
                for position in range(number):
                    counts[position] += 1


def _check_prompts(model: GPT, prompt_ids: Prompts) -> list[list[int]]:
    prompts = prompt_ids.tolist() if isinstance(prompt_ids, torch.Tensor) else list(prompt_ids)
    if not prompts or not isinstance(prompts[0], Sequence | torch.Tensor | np.ndarray):
        prompts = [prompts]
    prompts = [[int(token) for token in prompt] for prompt in prompts]
    config = model.config
    for prompt in prompts:
        if not prompt:
            raise InputError("the prompt is empty; it must have at least one token")
        if len(prompt) >= config.block_size:
            raise InputError(
                f"the prompt has {len(prompt)} tokens, but the context window holds {config.block_size} "
                "with at least one new token"
            )
        if min(prompt) < 0 or max(prompt) >= config.vocab_size:
            raise InputError(f"prompt tokens must lie in 0..{config.vocab_size - 1}")
    return prompts


@torch.inference_mode()
def stream(
    model: GPT,
    prompt_ids: Prompts,
    max_new_tokens: int,
    *,
    method: str = "pass",
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    lookahead: int | None = None,
    stop_token: int | None = None,
    generator: torch.Generator | None = None,
    draft_model: GPT | None = None,
    fixed_token: int | None = None,
    tree: "DraftTree | AdaptiveTree | None" = None,
    rule: str | None = None,
    prompt_lookup: int | None = None,
    captures: dict | None = None,
) -> Iterator[Round]:
    """Continues one or several prompts, yielding a Round at a time. What comes out has the target's distribution.

    prompt_ids: a sequence of token ids, or a list of such sequences, of any lengths.
    max_new_tokens: at most so many for each prompt; a text ends earlier at stop_token, which is emitted. Where a text
    has filled the context window, its context becomes the last half of the window (`kept_context`), for all methods
    alike: the target's distribution is that of plain decoding with this rule.
    method: one of METHODS. temperature, top_k, top_p: see sampling.probabilities.
    lookahead: drafts in a round, L (None: DEFAULT_LOOKAHEAD, or what the model's table has if that is less).
    draft_model: the drafter of `speculative`, same vocabulary. fixed_token: what stands in for look-ahead tokens in
    `fixed-token` (None: the last token of the vocabulary, end of text).
    tree: the drafts of a round of `pass-tree` (None: DEFAULT_TREE), cut at `lookahead`; a shapes.AdaptiveTree changes
    it from round to round. rule: how drafts are tested, one of RULES, see sampling.tree_accept (None: what kept
    more in bench.py's experiment on trees, recursive rejection, and matching where there is one right token).
    prompt_lookup: in a fused round, copy so many drafts from the text where its last tokens stood before, see
    lookup.py (None: 0, and DEFAULT_PROMPT_LOOKUP for `prompt-lookup`, which drafts in no other way).
    captures: on CUDA, rounds are replayed as graphs, which are kept in this dict from one call to the next; begin with
    an empty one. None: eagerly. A captured round does not become shorter at a text's end.
    Raises InputError for anything out of bounds, before the first pass.
    """
    if method not in METHODS:
        raise InputError(f"unknown method {method!r}; there are {', '.join(METHODS)}")
    check_sampling(temperature, top_k, top_p)
    prompts = _check_prompts(model, prompt_ids)
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
    config, uses_table = model.config, method in ("pass", "pass-two-pass", "pass-tree")
    adaptive = None if tree is None or isinstance(tree, DraftTree) else tree
    trees = adaptive.trees if adaptive else [tree or DEFAULT_TREE]
    if lookahead is None:
        lookahead = max(tree.depth[-1] for tree in trees) if method == "pass-tree" else DEFAULT_LOOKAHEAD
        lookahead = min(lookahead, config.n_lookahead) if uses_table else lookahead
    if lookahead < 1 or (uses_table and lookahead > config.n_lookahead):
        most = f"..{config.n_lookahead}" if uses_table else " or more"
        raise InputError(f"lookahead must lie in 1{most} for this model and method, not {lookahead}")
    if method == "pass-tree":
        trees = [tree.cut(lookahead) for tree in trees]
        rule = rule or ("recursive" if temperature > 0 else "matching")
        if rule not in RULES:
            raise InputError(f"unknown rule {rule!r}; there are {', '.join(RULES)}")
        width = max(tree.width for tree in trees)
        if width > config.vocab_size:
            raise InputError(f"the tree has {width} drafts for one place, the vocabulary {config.vocab_size} tokens")
    else:
        drafts_nothing = method in ("autoregressive", "prompt-lookup")  # with look-ahead tokens
        trees, rule = [chain(0 if drafts_nothing else lookahead)], "recursive"
    fixed_token = config.vocab_size - 1 if fixed_token is None else fixed_token
    if not 0 <= fixed_token < config.vocab_size:
        raise InputError(f"fixed_token must lie in 0..{config.vocab_size - 1}, not {fixed_token}")
    if method == "speculative" and (draft_model is None or draft_model.config.vocab_size != config.vocab_size):
        raise InputError("method 'speculative' needs a draft_model with the same vocabulary")
    if prompt_lookup is None:
        prompt_lookup = DEFAULT_PROMPT_LOOKUP if method == "prompt-lookup" else 0
    if prompt_lookup < 0 or (prompt_lookup and method not in ("pass", "pass-tree", "prompt-lookup")):
        raise InputError(f"prompt_lookup must be 0 or more, and 0 for method {method!r}, not {prompt_lookup}")
    if captures is not None and not capture.available(model.device):
        raise InputError(f"rounds can be captured on CUDA only, not on {model.device}")
    rounds = {
        "autoregressive": autoregressive,
        "pass-two-pass": lambda run: two_pass(run, group_ids(config.vocab_size, (lookahead,), model.device)),
        "fixed-token": lambda run: two_pass(run, torch.full((lookahead,), fixed_token, device=model.device)),
        "pass": fused,
        "pass-tree": fused,
        "prompt-lookup": fused,
        "speculative": speculative,
    }[method]

    deepest = max(prompt_lookup, *(tree.depth[-1] for tree in trees))
    most_rows = max(1 + prompt_lookup + lookahead, *(len(tree.depth) * (1 + tree.depth[-1]) for tree in trees))
    n_tokens = config.block_size  # for which the cache has room, and behind them for a round that overshoots
    if captures is None:
        n_tokens = min(n_tokens, max(map(len, prompts)) + max_new_tokens)
    settings = {
        "rule": rule,
        "sampling": {"temperature": temperature, "top_k": top_k, "top_p": top_p},
        "draft_model": draft_model if method == "speculative" else None,
    }
    n_slots = n_tokens + deepest + most_rows
    with _decoders(captures, generator, model, len(prompts), n_slots, **settings) as decoder_for:
        contexts, wanted, tree = prompts, [max_new_tokens] * len(prompts), trees[0]
        while max(wanted):
            left = [min(n, config.block_size - len(text)) for n, text in zip(wanted, contexts, strict=True)]
            decoder = decoder_for(sum(n > 0 for n in left))
            run = Run(decoder, contexts, left, tree, stop_token=stop_token, prompt_lookup=prompt_lookup)
            for record in rounds(run):
                if adaptive:
                    adaptive.add(record)
                    tree = run.tree = adaptive.tree.cut(lookahead)
                for b, tokens in enumerate(record.tokens):
                    wanted[b] = 0 if stop_token in tokens else wanted[b] - len(tokens)
                yield record
            contexts = [kept_context(text, config.block_size) for text in run.texts]


@contextmanager
def _decoders(
    captures: dict | None, generator: torch.Generator | None, model: GPT, batch_size: int, n_slots: int, **settings: Any
) -> Iterator[Callable[[int], Decoder]]:
    """Gives a decoder for so many texts of the batch. With captures it is always the same one, for all texts, that may
    have served before: its graphs know their own generator alone, so that this one goes on from the state of the
    caller's and in the end gives it back."""
    if captures is None:
        yield lambda n_texts: Decoder(model, n_texts, n_slots, **settings, generator=generator)
        return
    key = (model, batch_size, n_slots, repr(settings["sampling"]), settings["rule"], settings["draft_model"])
    decoder = captures.pop(key, None)  # nobody else's as long as this generation goes on
    if decoder is None:
        own = torch.Generator(model.device)
        decoder = Decoder(model, batch_size, n_slots, **settings, generator=own, graphs={})
    if generator is None:
        decoder.generator.manual_seed(int(torch.randint(2**62, ())))
    else:
        decoder.generator.set_state(generator.get_state())
    try:
        yield lambda n_texts: decoder
    finally:
        if generator is not None:
            generator.set_state(decoder.generator.get_state())
        captures[key] = decoder


def kept_context(context: list[int], block_size: int) -> list[int]:
    """What a text goes on from: all of it, or of a text that fills the window its last half."""
    return context if len(context) < block_size else context[-(block_size // 2) :]


def generate(model: GPT, prompt_ids: Prompts, max_new_tokens: int, **settings: Any) -> Generation:
    """Runs `stream` (same arguments, same errors) to its end and returns the new tokens of each prompt with counts."""
    result = Generation()
    for record in stream(model, prompt_ids, max_new_tokens, **settings):
        result.add(record)
    return result
