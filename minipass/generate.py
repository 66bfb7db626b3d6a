"""Decoding: plain, PaSS in two passes (Algorithm 1), PaSS fused in one (a chain or a tree of drafts), two models.

Each method is a short loop over rounds: draft, verify, accept, keep in the cache, emit. `stream` yields one Round at a
time; `generate` collects them. The invariant between rounds: the cache holds the keys and values of all emitted tokens
but the last, the root.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from minipass.errors import InputError
from minipass.layout import (
    DraftTree,
    Layout,
    chain,
    draft_layout,
    fused_layout,
    group_rows,
    lookahead_ids,
    path,
    path_layout,
    with_groups,
)
from minipass.model import GPT, KVCache
from minipass.sampling import (
    check_sampling,
    draw,
    draw_candidates,
    probabilities,
    speculative_accept,
    tree_accept,
)

if TYPE_CHECKING:
    from minipass.shapes import AdaptiveTree

FREE, ACCEPTED, CORRECTED, BONUS = "free", "accepted", "corrected", "bonus"
METHODS = ("autoregressive", "pass-two-pass", "pass", "pass-tree", "fixed-token", "speculative")
RULES = ("matching", "recursive")  # of tree_accept
DEFAULT_LOOKAHEAD = 2  # the fastest on a CPU for the shipped model (bench.py); where rows are cheap, 4 and more are
DEFAULT_TREE = DraftTree((0, 0, 0, 1, 1, 2, 4))  # see shapes.py for a better one
Prompts = Sequence[int] | Sequence[Sequence[int]]


@dataclass(frozen=True)
class Round:
    """What one round did, for each of the B prompts.

    tokens: the emitted tokens; origins: for each of them FREE (drawn from a target that no draft was tested against),
    ACCEPTED (a kept draft), CORRECTED (from the residual after a rejection) or BONUS (all drafts were kept).
    drafts (B, k) int64, draft_probs (B, D, V) and target_probs (B, k + 1, V): what was tested, None when nothing was;
    a chain of D = k drafts, or a tree of k nodes and depth D.
    n_tested, n_accepted: drafts in a row that could have been emitted, and those that were (within the text's end).
    tree: how the drafts hang together; kept: of a tree, which nodes are on the path that was kept, (B, k + 1) bool.
    passes: forward passes of the target model; draft_passes: of the draft model.
    active: whether a prompt was still being continued when the round began.
    """

    tokens: list[list[int]]
    origins: list[list[str]]
    n_tested: list[int]
    n_accepted: list[int]
    active: list[bool]
    passes: int
    draft_passes: int = 0
    drafts: torch.Tensor | None = None
    draft_probs: torch.Tensor | None = None
    target_probs: torch.Tensor | None = None
    tree: DraftTree | None = None
    kept: torch.Tensor | None = None


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
        self.passes += record.passes
        self.draft_passes += record.draft_passes
        self.rounds += 1
        self.prompt_passes += record.passes * sum(record.active)
        longest = max([len(self.tested), *record.n_tested])
        for counts, numbers in ((self.tested, record.n_tested), (self.accepted, record.n_accepted)):
            counts += [0] * (longest - len(counts))
            for number in numbers:
                for position in range(number):
                    counts[position] += 1


class _Run:
    """What a generation carries from round to round: the target's cache, how much each prompt may still emit.

    A run ends where its texts end or fill the window; `stream` then begins another with what is kept of them.
    """

    def __init__(
        self,
        model: GPT,
        prompts: list[list[int]],
        wanted: list[int],
        *,
        trees: Sequence[DraftTree],
        rule: str,
        sampling: dict,
        stop_token: int | None,
        generator: torch.Generator | None,
    ) -> None:
        self.model, self.prompts, self.tree, self.rule = model, prompts, trees[0], rule
        self.trees = trees  # those that may come to be used
        self.sampling, self.stop_token, self.generator = sampling, stop_token, generator
        self.remaining = [
            min(left, model.config.block_size - len(prompt)) for left, prompt in zip(wanted, prompts, strict=True)
        ]
        self.cache = self.new_cache(model)
        self.unreported_passes = 0

    def new_cache(self, model: GPT) -> KVCache:
        """Room for the longest text, for a round that overshoots its end, and for the largest pass."""
        longest = max(map(len, self.prompts))
        depth, n_nodes = max(tree.depth[-1] for tree in self.trees), max(len(tree.depth) for tree in self.trees)
        most_rows = n_nodes * (1 + depth)  # of a fused pass; prefill's longest + L are fewer than the sum
        max_len = longest + max(self.remaining) + depth + most_rows
        return KVCache(model.config, len(self.prompts), max_len, device=model.device, dtype=model.dtype)

    @property
    def finished(self) -> bool:
        return max(self.remaining) == 0

    def room_for_drafts(self, already: int = 0) -> int:
        """How many drafts in a row this round can use behind `already` of its tokens: the last is never a draft."""
        return max(0, min(self.tree.depth[-1], max(self.remaining) - already - 1))

    def probs(self, logits: torch.Tensor) -> torch.Tensor:
        return probabilities(logits, **self.sampling)

    def draw(self, probs: torch.Tensor) -> torch.Tensor:
        return draw(probs, self.generator)

    def draft(self, tree: DraftTree, draft_logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Drafts for the N nodes of a tree of depth D from the logits of D look-ahead rows: (B, N), probs (B, D, V)."""
        draft_probs = self.probs(draft_logits)
        if self.rule == "matching":
            ranked = draft_logits.topk(min(tree.width, draft_logits.shape[2])).indices  # (B, D, width)
        else:
            ranked = draw_candidates(draft_probs, tree.width, self.generator)
        place = [depth - 1 for depth in tree.depth[1:]]
        return ranked[:, place, tree.rank], draft_probs

    def accept(
        self, drafts: torch.Tensor, draft_probs: torch.Tensor, target_probs: torch.Tensor, tree: DraftTree | None = None
    ) -> "Verified":
        """Tests a chain of drafts (B, k), or a tree of them."""
        if tree is None or (tree.width == 1 and self.rule == "recursive"):
            accepted = speculative_accept(drafts, draft_probs, target_probs, self.generator)
            return Verified(drafts, draft_probs, target_probs, *accepted)
        p = None if self.rule == "matching" else draft_probs
        kept, next_token = tree_accept(tree, drafts, p, target_probs, self.generator)
        rows = (~kept).long().argsort(dim=1, stable=True)
        return Verified(drafts, draft_probs, target_probs, kept.sum(1) - 1, next_token, tree, kept, rows)

    def keep_path(self, verified: "Verified") -> torch.Tensor:
        """Keeps the root and the accepted drafts of a tree in the cache; returns the row of the last, (B,)."""
        if verified.kept is not None:  # of a chain the rows are where they belong
            self.cache.gather(verified.rows[:, : 1 + verified.tree.depth[-1]])
        self.keep(1 + verified.n_accepted)
        return verified.last()

    def prefill(self, extra_ids: torch.Tensor) -> torch.Tensor:
        """The first pass: the prompts, and behind each prompt's last token the rows extra_ids (L,).

        Returns the logits of the last token and of the extra rows, (B, 1 + L, V).
        """
        self.unreported_passes += 1
        return _prefill(self.model, self.cache, self.prompts, extra_ids)

    def forward(self, ids: torch.Tensor, layout: Layout) -> torch.Tensor:
        """One pass of the target behind the cache: ids (B, R) to logits (B, R, V). None of its rows is kept yet."""
        self.unreported_passes += 1
        return self.model(ids, layout, self.cache)

    def keep(self, n_rows: torch.Tensor | int) -> None:
        """Counts the first n_rows of the last pass in; what lies behind is thereby dropped. Ended prompts stand."""
        going_on = torch.tensor([remaining > 0 for remaining in self.remaining], device=self.cache.length.device)
        self.cache.length += going_on * n_rows

    def ends_with(self, tokens: torch.Tensor) -> bool:
        """Whether emitting tokens (B,) would end every prompt that is still going on."""
        pairs = zip(self.remaining, tokens.tolist(), strict=True)
        return all(remaining <= 1 or token == self.stop_token for remaining, token in pairs)

    def emit(
        self, free: torch.Tensor | None = None, verified: "Verified | None" = None, draft_passes: int = 0
    ) -> Round:
        """Ends a round: what it made, cut at the stop token and at each prompt's limit. free: (B,) tokens."""
        record = Round([], [], [], [], [left > 0 for left in self.remaining], self.unreported_passes, draft_passes)
        self.unreported_passes = 0
        n_drafts = verified.draft_probs.shape[1] if verified else 0
        if n_drafts:
            fields = ("drafts", "draft_probs", "target_probs", "tree", "kept")
            record = replace(record, **{name: getattr(verified, name) for name in fields})
        free_tokens = free.tolist() if free is not None else None
        if verified:
            columns = [column.tolist() for column in (verified.n_accepted, verified.next_token)]
            draft_tokens, last_rows = verified.path().tolist(), verified.last().tolist()
        for b, remaining in enumerate(self.remaining):
            tokens, origins = ([free_tokens[b]], [FREE]) if free is not None else ([], [])
            if verified:
                n_accepted, next_token = columns[0][b], columns[1][b]
                tokens += draft_tokens[b][:n_accepted] + [next_token]
                none_left = n_accepted == n_drafts or (verified.tree and last_rows[b] not in verified.tree.parents)
                last = FREE if n_drafts == 0 else BONUS if none_left else CORRECTED
                origins += [ACCEPTED] * n_accepted + [last]
            end = min(len(tokens), remaining)
            if self.stop_token in tokens[:end]:
                end = tokens.index(self.stop_token) + 1
                self.remaining[b] = 0
            else:
                self.remaining[b] -= end
            kept = origins[:end].count(ACCEPTED)
            record.tokens.append(tokens[:end])
            record.origins.append(origins[:end])
            record.n_accepted.append(kept)
            record.n_tested.append(kept if end < len(tokens) else n_drafts)
        return record


class Verified(NamedTuple):
    """Drafts with both their distributions, and what acceptance made of them; names and shapes as in Round.

    rows: of a tree, its nodes with the kept ones, from the root on, in front: (B, N + 1).
    """

    drafts: torch.Tensor
    draft_probs: torch.Tensor
    target_probs: torch.Tensor
    n_accepted: torch.Tensor
    next_token: torch.Tensor
    tree: DraftTree | None = None
    kept: torch.Tensor | None = None
    rows: torch.Tensor | None = None

    def path(self) -> torch.Tensor:
        """The drafts (B, k) with those that were kept, n_accepted of each row, in front."""
        return self.drafts if self.rows is None else self.drafts.gather(1, self.rows[:, 1:] - 1)

    def last(self) -> torch.Tensor:
        """The row of the last token that was kept, (B,): 0 is the root."""
        return self.n_accepted if self.rows is None else self.rows.gather(1, self.n_accepted[:, None]).squeeze(1)


def _prefill(model: GPT, cache: KVCache, prompts: list[list[int]], extra_ids: torch.Tensor) -> torch.Tensor:
    """Puts ragged prompts into an empty cache; logits of each prompt's last token and of the extra rows behind it."""
    lengths = np.array([len(prompt) for prompt in prompts])
    longest, n_extra = int(lengths.max()), len(extra_ids)
    padded = torch.zeros(len(prompts), longest, dtype=torch.int64)
    for b, prompt in enumerate(prompts):
        padded[b, : len(prompt)] = torch.tensor(prompt)  # what is behind a short prompt is dropped below
    ids = torch.cat([padded.to(model.device), extra_ids.expand(len(prompts), -1)], dim=1)
    layout = with_groups(path(longest), lengths[:, None] - 1, n_extra).to(model.device)
    last = torch.from_numpy(lengths)[:, None] - 1
    extra = (longest + torch.arange(n_extra)).expand(len(prompts), -1)
    logits = model(ids, layout, cache, rows=torch.cat([last, extra], dim=1).to(model.device))
    cache.length += torch.from_numpy(lengths).to(model.device)
    return logits


def _autoregressive(run: _Run) -> Iterator[Round]:
    """One token a pass."""
    logits = run.prefill(_no_tokens(run))
    while True:
        root = run.draw(run.probs(logits[:, -1]))
        yield run.emit(free=root)
        if run.finished:
            return
        logits = run.forward(root[:, None], path_layout(1, run.model.device))
        run.keep(1)


def _two_pass(run: _Run, stand_ins: torch.Tensor) -> Iterator[Round]:
    """The paper's Algorithm 1: a draft pass over [root, LA_1..LA_L], then a verify pass over [x, d_1..d_k].

    stand_ins: (L,) input ids of the look-ahead tokens (or of the fixed token that stands in for them). The first draft
    pass is prefill, with the look-ahead rows behind the prompt's last token.
    """
    logits = run.prefill(stand_ins[: run.room_for_drafts(already=1)])
    while True:
        # Draft: the root's logits give the next token x exactly, LA_i's the draft distribution i places after x.
        free = run.draw(run.probs(logits[:, 0]))  # (B,)
        if run.ends_with(free):
            yield run.emit(free=free)
            return
        draft_probs = run.probs(logits[:, 1:])  # (B, k, V)
        drafts = run.draw(draft_probs)  # (B, k)

        # Verify. The look-ahead rows were never kept, so x follows the root in the cache.
        n_drafts = drafts.shape[1]
        rows = torch.cat([free[:, None], drafts], dim=1)
        target_probs = run.probs(run.forward(rows, path_layout(1 + n_drafts, run.model.device)))
        verified = run.accept(drafts, draft_probs, target_probs)
        run.keep(1 + verified.n_accepted)
        yield run.emit(free=free, verified=verified)
        if run.finished:
            return

        # The next round's draft pass; its root is kept, its look-ahead rows are not.
        rows = torch.cat([verified.next_token[:, None], _repeat(stand_ins[: run.room_for_drafts(1)], run)], dim=1)
        logits = run.forward(rows, draft_layout(rows.shape[1] - 1, run.model.device))
        run.keep(1)


def _fused(run: _Run) -> Iterator[Round]:
    """One pass a round: verifies this round's drafts and drafts the next round's behind each node that may be the last.

    Rows: the root, the drafts (a chain d_1..d_k, or a tree), then behind each of these a group of look-ahead tokens for
    the case that it is the last one kept.
    """
    vocab_size, device = run.model.config.vocab_size, run.model.device
    batch = torch.arange(len(run.prompts), device=device)[:, None]
    logits = run.prefill(lookahead_ids(vocab_size, run.room_for_drafts(already=1)).to(device))
    root = run.draw(run.probs(logits[:, 0]))
    draft_logits = logits[:, 1:]  # (B, L, V)
    yield run.emit(free=root)
    while not run.finished:
        tree = run.tree.cut(min(draft_logits.shape[1], run.room_for_drafts()))
        n_rows = len(tree.depth)  # root and drafts
        n_lookahead = run.room_for_drafts(already=1)  # what the next round can use at most
        drafts, draft_probs = run.draft(tree, draft_logits[:, : tree.depth[-1]])  # (B, N), (B, D, V)

        groups = lookahead_ids(vocab_size, *tree.lengths(n_lookahead)).to(device)
        rows = torch.cat([root[:, None], drafts, _repeat(groups, run)], dim=1)
        logits = run.forward(rows, fused_layout(tree, n_lookahead, device))
        target_probs = run.probs(logits[:, :n_rows])  # (B, N + 1, V)
        verified = run.accept(drafts, draft_probs, target_probs, tree)
        last = run.keep_path(verified)

        # The group behind the last row that was kept: its outputs are the next draft distributions.
        next_rows = group_rows(tree, n_lookahead, device)[last]  # (B, n_lookahead)
        draft_logits = logits[batch, next_rows]
        root = verified.next_token
        yield run.emit(verified=verified)


def _speculative(run: _Run, draft_model: GPT) -> Iterator[Round]:
    """Two models (arXiv 2211.17192, 2302.01318): a small one drafts token by token, the target verifies in one pass."""
    device = run.model.device
    draft_cache = run.new_cache(draft_model)
    _prefill(draft_model, draft_cache, run.prompts, _no_tokens(run))
    logits = run.prefill(_no_tokens(run))
    before = torch.tensor([prompt[-1] for prompt in run.prompts], device=device)  # the token before the root
    root = run.draw(run.probs(logits[:, -1]))
    yield run.emit(free=root)
    while not run.finished:
        n_drafts = run.room_for_drafts()
        drafts = root.new_empty(len(root), 0)
        draft_probs = logits.new_empty(len(root), 0, logits.shape[2], dtype=run.probs(logits[:1, :1]).dtype)
        # The draft model has not seen the last draft if all were kept, so it starts at the token before the root.
        draft_cache.length = run.cache.length - 1
        rows = torch.stack([before, root], dim=1)
        for _ in range(n_drafts):
            draft_logits = draft_model(rows, path_layout(rows.shape[1], device), draft_cache)
            draft_cache.length = draft_cache.length + rows.shape[1]
            p = run.probs(draft_logits[:, -1:])  # (B, 1, V)
            rows = run.draw(p)  # (B, 1)
            drafts, draft_probs = torch.cat([drafts, rows], dim=1), torch.cat([draft_probs, p], dim=1)

        rows = torch.cat([root[:, None], drafts], dim=1)
        target_probs = run.probs(run.forward(rows, path_layout(1 + n_drafts, device)))
        verified = run.accept(drafts, draft_probs, target_probs)
        run.keep(1 + verified.n_accepted)
        before = rows.gather(1, verified.n_accepted[:, None]).squeeze(1)  # the last kept draft, or the root
        root = verified.next_token
        yield run.emit(verified=verified, draft_passes=n_drafts)


def _no_tokens(run: _Run) -> torch.Tensor:
    return torch.empty(0, dtype=torch.int64, device=run.model.device)


def _repeat(ids: torch.Tensor, run: _Run) -> torch.Tensor:
    """The same ids (R,) for every prompt: (B, R)."""
    return ids.expand(len(run.prompts), -1)


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
        trees, rule = [chain(0 if method == "autoregressive" else lookahead)], "recursive"
    fixed_token = config.vocab_size - 1 if fixed_token is None else fixed_token
    if not 0 <= fixed_token < config.vocab_size:
        raise InputError(f"fixed_token must lie in 0..{config.vocab_size - 1}, not {fixed_token}")
    if method == "speculative" and (draft_model is None or draft_model.config.vocab_size != config.vocab_size):
        raise InputError("method 'speculative' needs a draft_model with the same vocabulary")
    settings = {
        "trees": trees,
        "rule": rule,
        "sampling": {"temperature": temperature, "top_k": top_k, "top_p": top_p},
        "stop_token": stop_token,
        "generator": generator,
    }
    rounds = {
        "autoregressive": _autoregressive,
        "pass-two-pass": lambda run: _two_pass(run, lookahead_ids(config.vocab_size, lookahead).to(model.device)),
        "fixed-token": lambda run: _two_pass(run, torch.full((lookahead,), fixed_token, device=model.device)),
        "pass": _fused,
        "pass-tree": _fused,
        "speculative": lambda run: _speculative(run, draft_model),
    }[method]
    contexts, wanted = prompts, [max_new_tokens] * len(prompts)
    while max(wanted):
        run = _Run(model, [list(context) for context in contexts], wanted, **settings)
        for record in rounds(run):
            if adaptive:
                adaptive.add(record)
                run.tree = adaptive.tree.cut(lookahead)
            for b, tokens in enumerate(record.tokens):
                contexts[b] += tokens
                wanted[b] = 0 if stop_token in tokens else wanted[b] - len(tokens)
            yield record
        contexts = [kept_context(context, config.block_size) for context in contexts]


def kept_context(context: list[int], block_size: int) -> list[int]:
    """What a text goes on from: all of it, or of a text that fills the window its last half."""
    return context if len(context) < block_size else context[-(block_size // 2) :]


def generate(model: GPT, prompt_ids: Prompts, max_new_tokens: int, **settings: Any) -> Generation:
    """Runs `stream` (same arguments, same errors) to its end and returns the new tokens of each prompt with counts."""
    result = Generation()
    for record in stream(model, prompt_ids, max_new_tokens, **settings):
        result.add(record)
    return result
