"""The turn and the methods: a turn is one pass of the model, and a method is a schedule of pass shapes.

The paper's Algorithm 1 (PaSS, arXiv 2311.13581, section 3) takes two turns to emit up to L + 2 tokens, `TwoPass`:
  draft   rows [root, LA_1..LA_L]: the root's output gives the next token, that of LA_i the draft distribution of the
          token i positions after it;
  verify  rows [next token, d_1..d_L]: their outputs give the target distributions that test the drafts.
`Fused` does both in each turn: look-ahead tokens follow every draft, in case it is the last one accepted. This is not
in the paper; BiTA (arXiv 2401.12522), PPD (2405.18628) and Apple's multi-token work (2507.11851) do it too.

Between turns the cache holds all tokens of a text but the last, the root. A `Decoder` is the device's side: its turn is
a function of tensors, which a CUDA graph can record. The host's side, the loop over turns, is in engine.py.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain as joined
from itertools import cycle, repeat
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F

from minipass import graphs
from minipass.errors import InputError
from minipass.layout import path, with_groups
from minipass.lookup import PromptLookup, copied_drafts
from minipass.model import GPT, KVCache
from minipass.sampling import COUPLED, DRAFT, REJECTION, RULES, TARGET, Distribution, Sampling, mix, stream_keys
from minipass.texts import NOT_FINITE, Texts, not_finite
from minipass.trees import Drafts, DraftTree, Nodes, Shape, accept, chain, pick

PREFILL_ROWS = 256  # of one pass, where the cache still has the beginning of a prompt
LARGE_VOCABULARY, N_CANDIDATES = 2**14, 64  # of a larger one a draft head scores only the tokens likeliest without it


class Handed(NamedTuple):
    """What a turn hands to the next: the root (B,) int64, the token before it (B,) int64, and the hidden states
    (B, L, n_embd) of the look-ahead rows after the last accepted node, from which the next drafts are drawn. logits: of
    the same rows, (B, L, V), where a draft head scores only the likeliest tokens by these; else (B, 0, V)."""

    root: torch.Tensor
    before: torch.Tensor
    hidden: torch.Tensor
    logits: torch.Tensor


class Result(NamedTuple):
    """What a turn made: drafts and q as in trees.accept, the last accepted node (B,) int64, what the turn hands on, and
    for_host, (B, 3 + D) int64: [drafts accepted, last accepted node, next token, the drafts on the path to that node].
    kept: (B or 1, 1 + N) int64, the nodes that were verified. Nodes have their numbers in the shape's tree. The next
    token is NOT_FINITE where logits of the path are not: float16 overflows in some models."""

    drafts: Drafts
    q: Distribution
    last: torch.Tensor
    handed: Handed
    for_host: torch.Tensor
    kept: torch.Tensor


class Decoder:
    """The device's state: the model (and a draft model), KV caches, and each of the B texts' noise and place."""

    def __init__(self, models: list[GPT], sampling: Sampling, rule: str, n_texts: int, max_len: int) -> None:
        self.models, self.model, self.device, self.sampling = models, models[0], models[0].device, sampling
        self.rule = rule if sampling.temperature > 0 else COUPLED  # when greedy, both rules ask what the target draws
        large = models[0].config.vocab_size > LARGE_VOCABULARY
        self.scores_candidates = large and len(models) == 1 and models[0].draft_head is not None
        self.by_parent = len(models) > 1 or models[0].draft_head is not None  # p depends on the token before
        self.caches = [KVCache(m.config, n_texts, max_len, device=m.device, dtype=m.dtype) for m in models]
        self.cache = self.caches[0]
        self.start = torch.zeros(n_texts, dtype=torch.int64, device=self.device)  # of the context, in its text
        self.keys = torch.zeros(3, n_texts, 1, dtype=torch.int64, device=self.device)
        self.active = torch.ones(n_texts, dtype=torch.bool, device=self.device)
        self.graphs: dict[tuple, graphs.Graph] = {}

    def turn(self, shape: Shape, handed: Handed, copied: torch.Tensor | None = None) -> Result:
        """One pass that verifies the N drafts of `shape` and looks ahead after each of them."""
        keys = self.noise(shape.tree.depth[-1])
        # Draft: d_i is drawn from p_i, which the look-ahead rows of the turn before give.
        nodes, drafts = self.draft(shape, handed, keys, copied)  # (B, N)
        # Verify: one pass over [root, drafts, look-ahead groups] gives the target distribution q after each draft.
        rows = torch.cat([handed.root[:, None], drafts.tokens], dim=1)  # (B, 1 + N)
        states = self.model.hidden(rows, nodes.layout, self.cache)  # (B, 1 + N + Q, n_embd)
        n_real = rows.shape[1]  # a large output matrix is read once a turn, for both kinds of rows
        logits = self.model.logits(states if self.scores_candidates else states[:, :n_real])
        q = self.sampling.distribution(logits[:, :n_real])  # (B, 1 + N, K)
        # Accept drafts on a path from the root, and draw the token after them, the next root.
        keys = keys.take_along_dim(nodes.depth[None], 2)  # (3, B, 1 + N)
        last, root = accept(nodes, drafts, q, self.sampling, keys)  # (B,), (B,)
        n_accepted, node, way = (pick(each, last) for each in (nodes.depth, nodes.kept, nodes.path))  # .., (B, 1 + D)
        # Roll back: the cache keeps the root and the accepted drafts; the next turn overwrites what follows them.
        if shape.tree.width > 1:  # the rows of a chain are in their places
            self.cache.gather(way)
        self.cache.length += self.active * (1 + n_accepted)
        # Hand on: the rows after the last accepted node have looked ahead from there.
        group, batch = nodes.group_rows[last], self.cache.batch  # (B, L), (B, 1)
        ahead = logits[batch, group] if self.scores_candidates else logits[:, :0]
        handed = Handed(root, pick(rows, last), states[batch, group], ahead)
        told = torch.where(logits[batch, way].sum(2, dtype=torch.float64).isfinite().all(1), root, NOT_FINITE)
        for_host = torch.cat([torch.stack([n_accepted, node, told], dim=1), rows.gather(1, way[:, 1:])], dim=1)
        return Result(drafts, q, node, handed, for_host, nodes.kept)

    def noise(self, depth: int) -> torch.Tensor:
        """Keys (3, B, 1 + depth) of the streams at the text position of the token after 0..depth drafts."""
        if self.sampling.temperature == 0:
            return self.keys.expand(-1, -1, 1 + depth)  # nothing reads them
        root = (self.start + self.cache.length)[:, None]
        return mix(self.keys + root + torch.arange(1, 2 + depth, device=self.device))

    def draft(
        self, shape: Shape, handed: Handed, keys: torch.Tensor, copied: torch.Tensor | None
    ) -> tuple[Nodes, Drafts]:
        """Draws a draft for each node: siblings are the best of one race, with p from look-ahead rows or a draft model.

        With a draft head or a draft model p depends on the parent's token, so drafts are drawn level by level.
        copied: (B, N) int64, only for a chain: the token to draft, with all of p. -1: draw it, or past the look-ahead
        rows, where nothing is known, take the root's token.
        Returns the nodes that the pass verifies, and their drafts.
        """
        tree, nodes = shape.tree, shape.on(self.device, self.by_parent)
        keys = keys[TARGET if self.rule == COUPLED else DRAFT]  # coupled: drafts race with the target's noise
        n_missing = max(0, tree.depth[-1] - handed.hidden.shape[1])
        hidden = F.pad(handed.hidden, (0, 0, 0, n_missing))  # (B, D or L, n_embd)
        drawing = shape if copied is None else Shape(tree.cut(handed.hidden.shape[1]))
        levels, likely = drawing.on(self.device, self.by_parent).levels, None
        if self.scores_candidates and levels:
            scores = F.pad(handed.logits, (0, 0, 0, n_missing))[:, : len(levels)]
            likely = scores.topk(max(N_CANDIDATES, tree.width)).indices
        tokens, made, sure = handed.root[:, None], [], []  # (B, 1 + drafts so far)
        for level in levels:
            candidates = None if likely is None else likely[:, level.place]
            if len(self.models) > 1:
                logits = self.run_draft_model(handed if tokens.shape[1] == 1 else None, tokens)
            else:
                before = tokens[:, level.parents] if self.by_parent else None  # (B, n)
                logits = self.model.logits(hidden[:, level.place], before, candidates)  # (B, n, V or K)
            p = self.sampling.distribution(logits, tree.width)  # (B, n, K)
            if candidates is not None:
                p = Distribution(candidates.gather(2, p.tokens), p.probs)
            race = self.sampling.race(p, keys[:, level.place], tree.width)  # (B, n, width)
            drawn = race.tokens[:, level.source, level.rank]  # (B, m)
            if tree.keep:
                sure.append(race.probs[:, level.source, level.rank])
            if copied is not None:
                given = copied[:, tokens.shape[1] - 1 :][:, : drawn.shape[1]]
                drawn = torch.where(given >= 0, given, drawn)
            tokens = torch.cat([tokens, drawn], dim=1)
            made.append(p)
        tokens = tokens[:, 1:]  # (B, N)
        n_drawn = tokens.shape[1]
        if copied is not None:
            rest = copied[:, n_drawn:]
            tokens = torch.cat([tokens, torch.where(rest < 0, handed.root[:, None], rest)], dim=1)
        if tree.keep:
            nodes = nodes.likeliest(tree.keep, torch.cat(sure, dim=1))
            tokens = tokens.gather(1, nodes.kept[:, 1:] - 1)
        if self.rule == COUPLED or not tree.parents:
            return nodes, Drafts(tokens)
        p = [each.dense(self.model.config.vocab_size) for each in made]  # (B, places, V)
        if copied is not None:
            ones = torch.ones_like(tokens[..., None], dtype=torch.float64)
            certain = Distribution(tokens[..., None], ones).dense(self.model.config.vocab_size)  # (B, N, V)
            p = [torch.where(copied[..., None] < 0, torch.cat([*p, certain[:, n_drawn:]], dim=1), certain)]
        return nodes, Drafts(tokens, F.pad(torch.cat(p, dim=1), (0, 0, 0, 1))[:, nodes.p_row])

    def run_draft_model(self, handed: Handed | None, tokens: torch.Tensor) -> torch.Tensor:
        """Logits (B, 1, V) of the draft model after the drafts so far, tokens (B, 1 + drafts).

        If all drafts were accepted it has not seen the last one. So it starts at the token before the root.
        """
        model, cache, rows = self.models[1], self.caches[1], tokens[:, -1:]
        if handed is not None:
            cache.length.copy_(self.cache.length - 1)
            rows = torch.stack([handed.before, handed.root], dim=1)
        states = model.hidden(rows, Shape(chain(rows.shape[1] - 1)).on(self.device).layout, cache)
        cache.length += rows.shape[1]
        return model.logits(states[:, -1:])

    def begin(
        self, contexts: Sequence[Sequence[int]], starts: Sequence[int], seeds: Sequence[int], n_cached: int = 0
    ) -> Handed:
        """Prefill: puts all tokens of each context but the last into the caches. The last ones are the first roots.

        n_cached: the number of tokens that are there already, from the text before. Raises InputError when the model
        computes hidden states that are not finite.
        """
        padded = torch.nn.utils.rnn.pad_sequence(list(map(torch.tensor, contexts)), batch_first=True).to(self.device)
        last = torch.tensor([len(context) - 1 for context in contexts], device=self.device)
        for model, cache in zip(self.models, self.caches, strict=True):
            cache.length.fill_(n_cached)
            for rows in padded[:, n_cached:-1].split(PREFILL_ROWS if n_cached else padded.shape[1], dim=1):
                if rows.numel():
                    layout = with_groups(path(rows.shape[1]), (), 0).to(self.device) if n_cached else None
                    states = model.hidden(rows, layout, cache)  # what is past a shorter context is overwritten later
                    past = cache.slots(rows.shape[1]) >= last[:, None]
                    if model is self.model and not (states.isfinite().all(2) | past).all():
                        raise not_finite()
                cache.length += rows.shape[1]
            cache.length.copy_(last)
        self.start.copy_(torch.tensor(starts))
        self.keys.copy_(stream_keys(torch.tensor(seeds)))
        self.set_active(range(len(contexts)))
        root = padded.gather(1, last[:, None])[:, 0]
        config, empty = self.model.config, self.cache.pairs.new_empty
        return Handed(root, root, empty(len(root), 0, config.n_embd), empty(len(root), 0, config.vocab_size))

    def set_active(self, rows: Sequence[int]) -> None:
        """The rows of the batch whose texts continue; the cached tokens of the others stay as they are."""
        self.n_active, active = len(rows), torch.zeros(len(self.start), dtype=torch.bool)
        active[list(rows)] = True
        self.active.copy_(active, non_blocking=True)

    def select(self, rows: Sequence[int], handed: Handed) -> Handed:
        """Continues with these rows of the batch alone."""
        index = torch.tensor(rows, device=self.device)
        for cache in self.caches:
            cache.select(index)
        self.start, self.keys, self.active = self.start[index], self.keys[:, index], self.active[index]
        return Handed(*(each[index] for each in handed))

    def replay(self, shape: Shape, handed: Handed, copied: torch.Tensor | None) -> Result:
        """`turn` as a CUDA graph, recorded when shapes occur for the first time."""
        inputs = [*handed] if copied is None else [*handed, copied]
        key = (shape, *(each.shape for each in inputs))
        if key not in self.graphs:
            turn = lambda *inputs: self.turn(shape, Handed(*inputs[:4]), *inputs[4:])  # noqa: E731
            self.graphs[key] = graphs.Graph(turn, inputs, [cache.length for cache in self.caches])
        # Copies, since the next replay writes to the same memory.
        return torch.utils._pytree.tree_map_only(torch.Tensor, torch.clone, self.graphs[key](*inputs))


# A schedule yields the shape of each turn, with the drafts that are copied for each text, or None.
Schedule = Iterator[tuple[Shape, list[list[int]] | None]]


@dataclass(frozen=True)
class Method:
    """Settings and a schedule of pass shapes. Raises InputError for impossible settings."""

    largest: ClassVar[tuple[Shape, ...]]  # the largest shapes of its turns
    rule, draft_model, fixed_token = COUPLED, None, None  # for methods that do not set them

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise InputError(f"unknown rule {self.rule!r}; there are {', '.join(RULES)}")
        keeps_some = any(shape.tree.keep for shape in self.largest)  # InputError for lengths out of bounds
        if keeps_some and self.rule == REJECTION:
            raise InputError("the rejection rule tests all drafts of a tree: it cannot keep the likeliest")

    def schedule(self, texts: Texts) -> Schedule:
        """The shapes of the turns for these texts. It may read what the texts hold so far."""
        raise NotImplementedError


@dataclass(frozen=True)
class Plain(Method):
    """Plain decoding, the baseline: one token a turn."""

    largest = (Shape(),)

    def schedule(self, texts: Texts) -> Schedule:
        return repeat((Shape(), None))


@dataclass(frozen=True)
class TwoPass(Method):
    """The paper's Algorithm 1 with L = n_lookahead: a turn that drafts, a turn that verifies, and so on.

    The draft turn has no drafts to accept: it draws the next token and hands on what the look-ahead rows say. The
    verify turn draws the drafts from that, tests them, and looks no further ahead.

    fixed_token: this token's embedding replaces every look-ahead embedding, as in the paper's comparison.
    """

    n_lookahead: int = 2
    rule: str = REJECTION
    fixed_token: int | None = None

    @property
    def largest(self) -> tuple[Shape, ...]:
        return Shape(n_lookahead=self.n_lookahead), Shape(chain(self.n_lookahead))

    def schedule(self, texts: Texts) -> Schedule:
        draft, verify = self.largest
        return cycle([(draft, None), (verify, None)])


@dataclass(frozen=True)
class Fused(Method):
    """Verifies and drafts in every turn. drafts: the length L of a chain (0: no look-ahead tokens), or a draft tree.

    lookup: where the text repeats itself, this many drafts are copied from it and verified instead (lookup.py).
    """

    drafts: int | DraftTree = 2
    rule: str = COUPLED
    lookup: int = 0

    @property
    def tree(self) -> DraftTree:
        return self.drafts if isinstance(self.drafts, DraftTree) else chain(self.drafts)

    @property
    def largest(self) -> tuple[Shape, ...]:
        return Shape(self.tree, self.tree.depth[-1]), copied_shape(self.lookup, self.tree.depth[-1])

    def schedule(self, texts: Texts) -> Schedule:
        return fused(texts, repeat(self.tree), self.lookup)


@dataclass(frozen=True)
class TwoModels(Method):
    """A small model drafts token by token, the large one verifies (arXiv 2211.17192, 2302.01318)."""

    draft_model: GPT = field()  # no default, whatever Method has
    n_drafts: int = 2
    rule: str = COUPLED

    def __post_init__(self) -> None:
        if not isinstance(self.draft_model, GPT):
            raise InputError(f"draft_model must be a GPT, not {self.draft_model!r}")
        super().__post_init__()

    @property
    def largest(self) -> tuple[Shape, ...]:
        return (Shape(chain(self.n_drafts)),)

    def schedule(self, texts: Texts) -> Schedule:  # the draft model needs a token before the root: first a plain turn
        return joined([(Shape(), None)], repeat((*self.largest, None)))


def fused(texts: Texts, trees: Iterator[DraftTree], lookup: int) -> Schedule:
    """Each turn verifies a tree, as deep as the turn before looked ahead, and looks ahead as deep as the tree is.

    Where a text repeats itself, copied drafts take the tree's place. A copy found by the text's last token alone is
    worth less than drafts of look-ahead tokens, and is used only where there are none.
    """
    indices, ahead = [PromptLookup() for _ in texts.texts], 0
    for tree in trees:
        drafts, depth = tree.cut(ahead), tree.depth[-1]
        copied = copied_drafts(indices, texts, lookup, 2 if drafts.parents else 1) if lookup else None
        if copied is None:
            shape = Shape(drafts, depth)
        else:
            shape = copied_shape(lookup, depth if any(tokens[0] < 0 for tokens in copied) else 0)
        yield shape, copied
        ahead = shape.n_lookahead


def copied_shape(n_drafts: int, n_lookahead: int) -> Shape:
    """A chain of copied drafts, with look-ahead tokens after the root alone: for the texts that lack copied drafts."""
    # A tree wants one token after the root at least; n_lookahead may still be 0.
    return Shape(DraftTree(chain(n_drafts).parents, (max(1, n_lookahead), *[0] * n_drafts)), n_lookahead)
