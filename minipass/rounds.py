"""The rounds of every decoding method: draft, verify, accept, keep in the cache, emit.

What a round computes stands in functions of a Decoder and of tensors (`fused_round`, `draft_pass`, ...): all their
indices are tensors, and none of them waits for the device, so that a CUDA graph can replay them (capture.py). Each
method is then a short loop (`autoregressive`, `two_pass`, `fused`, `speculative`), which yields a Round at a time. The
invariant between rounds: the cache holds the keys and values of all emitted tokens but the last, the root.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

import torch

from minipass.decoder import DRAFTER, TARGET, Decoder, Verified, prefill
from minipass.layout import DraftTree, chain, draft_layout, fused_layout, group_ids, group_rows, path_layout
from minipass.lookup import PromptLookup

FREE, ACCEPTED, CORRECTED, BONUS = "free", "accepted", "corrected", "bonus"


@dataclass(frozen=True)
class Round:
    """What one round did, for each of the B prompts.

    tokens: the emitted tokens; origins: for each of them FREE (drawn from a target that no draft was tested against),
    ACCEPTED (a kept draft), CORRECTED (from the residual after a rejection) or BONUS (all drafts were kept).
    n_tested, n_accepted: drafts in a row that could have been emitted, and those that were (within the text's end).
    active: whether a prompt was still being continued when the round began.
    passes: (model, rows) of each forward pass, where the model is TARGET or DRAFTER.
    drafts (B, k) int64, draft_probs (B, D, V) and target_probs (B, k + 1, V): what was tested, None when nothing was;
    a chain of D = k drafts, or a tree of k nodes and depth D. Without meaning where a prompt is not active.
    tree: how the drafts hang together; last: the node of the last one kept, 0 is the root; kept: which nodes are on the
    path that was kept, (B, k + 1) bool, None for a chain that speculative_accept tested.
    """

    tokens: list[list[int]]
    origins: list[list[str]]
    n_tested: list[int]
    n_accepted: list[int]
    active: list[bool]
    passes: tuple[tuple[int, int], ...]
    drafts: torch.Tensor | None = None
    draft_probs: torch.Tensor | None = None
    target_probs: torch.Tensor | None = None
    tree: DraftTree | None = None
    kept: torch.Tensor | None = None
    last: list[int] = field(default_factory=list)


class Run:
    """A generation from the host's side: the texts, how much each may still have, and the record of each round.

    A run ends where its texts end or fill the window; `generate.stream` then begins another with what is kept of them.
    """

    def __init__(
        self,
        decoder: Decoder,
        texts: Sequence[Sequence[int]],
        remaining: list[int],
        tree: DraftTree,
        *,
        stop_token: int | None,
        prompt_lookup: int = 0,
    ) -> None:
        """The decoder has a row for each text, or only for those with something remaining."""
        self.decoder, self.tree, self.remaining, self.stop_token = decoder, tree, remaining, stop_token
        self.texts, self.prompt_lookup = [list(text) for text in texts], prompt_lookup
        self.lookups = [PromptLookup(text) for text in texts] if prompt_lookup else []
        all_texts = decoder.batch_size == len(texts)
        self.rows = [b for b, left in enumerate(remaining) if all_texts or left]  # the text of each row of the decoder
        decoder.passes = []
        for cache in decoder.caches:
            cache.length.zero_()
        self.tell_who_goes_on()

    def tell_who_goes_on(self) -> None:
        """The cache of a text that has ended stays as it is."""
        going_on = torch.tensor([self.remaining[b] > 0 for b in self.rows])
        self.decoder.going_on.copy_(going_on, non_blocking=True)

    def without_ended(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Leaves ended texts out once half of the decoder's are: tensors (B, ...) to those of the rest.

        A captured round keeps its shape.
        """
        places = [place for place, b in enumerate(self.rows) if self.remaining[b]]
        if self.decoder.graphs is None and places and 2 * len(places) <= len(self.rows):
            self.rows, index = [self.rows[place] for place in places], torch.tensor(places, device=self.decoder.device)
            self.decoder.select(index)
            tensors = tuple(each[index] for each in tensors)
        return tensors

    @property
    def finished(self) -> bool:
        return max(self.remaining) == 0

    def room_for(self, n_drafts: int, already: int = 0) -> int:
        """How many of n_drafts in a row this round can use behind `already` of its tokens: the last is never a draft.

        A captured round always has all of them, and what is too much is cut off when it is emitted.
        """
        if self.decoder.graphs is not None:
            return n_drafts
        return max(0, min(n_drafts, max(self.remaining) - already - 1))

    def room_for_drafts(self, already: int = 0) -> int:
        return self.room_for(self.tree.depth[-1], already)

    def prompts(self) -> list[list[int]]:
        """The text of each row of the decoder so far."""
        return [self.texts[b] for b in self.rows]

    def prefill(self, extra_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The first pass: the prompts, and behind each prompt's last token the rows extra_ids (k,).

        Returns the next token (B,), drawn from the target, and the logits of the extra rows, (B, k, V).
        """
        decoder = self.decoder
        prompts = self.prompts()
        logits = prefill(decoder.model, decoder.cache, prompts, extra_ids)
        decoder.passes.append((TARGET, max(map(len, prompts)) + len(extra_ids)))
        return decoder.next_token(logits), logits[:, 1:]

    def ends_with(self, tokens: torch.Tensor) -> bool:
        """Whether emitting tokens (B,) would end every prompt that is still going on.

        A captured round does not wait to see a stop token: that would take more time than what it saves.
        """
        if max(self.remaining) <= 1 or self.decoder.graphs is not None:
            return max(self.remaining) <= 1
        pairs = zip(self.rows, tokens.tolist(), strict=True)
        return all(self.remaining[b] <= 1 or token == self.stop_token for b, token in pairs)

    def copied_drafts(self) -> torch.Tensor | None:
        """For each text what followed where its last tokens stood before, (B, k); -1 for the drafts of the look-ahead
        rows, where there is no such place. None when no text has one."""
        n_drafts = self.room_for(self.prompt_lookup)
        if n_drafts == 0:
            return None
        found = [self.lookups[b].drafts(n_drafts) if self.remaining[b] else [] for b in self.rows]
        if not any(found):
            return None
        drafts = torch.tensor([each or [-1] * n_drafts for each in found])
        return drafts.to(self.decoder.device, non_blocking=True)

    def emit(self, free: torch.Tensor | None = None, verified: Verified | None = None) -> Round:
        """Ends a round: what it made, cut at the stop token and at each prompt's limit. free: (B,) tokens.

        Here, and nowhere else, the host waits for the device.
        """
        decoder, n_texts = self.decoder, len(self.texts)
        record = Round(
            tokens=[[] for _ in range(n_texts)],
            origins=[[] for _ in range(n_texts)],
            n_tested=[0] * n_texts,
            n_accepted=[0] * n_texts,
            active=[left > 0 for left in self.remaining],
            passes=tuple(decoder.passes),
            last=[0] * n_texts,
        )
        decoder.passes = []
        n_drafts = verified.draft_probs.shape[1] if verified else 0
        if n_drafts:
            tensors = {name: getattr(verified, name) for name in ("drafts", "draft_probs", "target_probs", "kept")}
            tensors = {name: self._for_all_texts(each) for name, each in tensors.items() if each is not None}
            record = replace(record, **tensors, tree=verified.tree)
        columns = [free[:, None]] if free is not None else []
        if verified:
            columns += [torch.stack([verified.n_accepted, verified.last, verified.next_token], dim=1), verified.path]
        for b, made in zip(self.rows, torch.cat(columns, dim=1).tolist(), strict=True):
            tokens, origins = ([made.pop(0)], [FREE]) if free is not None else ([], [])
            if verified:
                n_accepted, last, next_token, *drafts = made
                tokens += drafts[:n_accepted] + [next_token]
                none_left = last not in verified.tree.parents
                origins += [ACCEPTED] * n_accepted
                origins.append(FREE if n_drafts == 0 else BONUS if none_left else CORRECTED)
                record.last[b] = last
            end = min(len(tokens), self.remaining[b])
            if self.stop_token in tokens[:end]:
                end = tokens.index(self.stop_token) + 1
                self.remaining[b] = 0
            else:
                self.remaining[b] -= end
            record.tokens[b], record.origins[b] = tokens[:end], origins[:end]
            record.n_accepted[b] = origins[:end].count(ACCEPTED)
            record.n_tested[b] = record.n_accepted[b] if end < len(tokens) else n_drafts
            self.texts[b] += tokens[:end]
            if self.lookups:
                self.lookups[b].extend(tokens[:end])
        if record.active != [left > 0 for left in self.remaining]:
            self.tell_who_goes_on()
        return record

    def _for_all_texts(self, of_rows: torch.Tensor) -> torch.Tensor:
        """A tensor of the decoder's rows as one of all texts, zeros for those left out; it stays what it is."""
        if len(self.rows) < len(self.texts):
            of_all = of_rows.new_zeros(len(self.texts), *of_rows.shape[1:])
            of_all[self.rows] = of_rows
            return of_all
        return of_rows if self.decoder.graphs is None else of_rows.clone()  # a replay writes to the same memory


# Plain decoding: one token a pass.


def plain_pass(decoder: Decoder, root: torch.Tensor) -> torch.Tensor:
    """Root (B,) to the next one."""
    logits = decoder.forward(root[:, None], path_layout(1, decoder.device))
    decoder.keep(1)
    return decoder.next_token(logits)


def autoregressive(run: Run) -> Iterator[Round]:
    """The baseline."""
    root, _ = run.prefill(_no_tokens(run.decoder))
    yield run.emit(free=root)
    while not run.finished:
        (root,) = run.without_ended(root)
        root = run.decoder.run(plain_pass, root)
        yield run.emit(free=root)


# The paper's Algorithm 1: two passes a round.


def draft_pass(decoder: Decoder, stand_ins: torch.Tensor, root: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows [root, LA_1..LA_k], of which only the root stays. stand_ins: (k,), the ids of the look-ahead tokens.

    The root's logits give the next token x exactly, LA_i's the draft distribution i places after x: returns x (B,) and
    these logits (B, k, V).
    """
    rows = torch.cat([root[:, None], decoder.repeat(stand_ins)], dim=1)
    logits = decoder.forward(rows, draft_layout(len(stand_ins), decoder.device))
    decoder.keep(1)
    return decoder.next_token(logits), logits[:, 1:]


def verify_pass(decoder: Decoder, free: torch.Tensor, draft_logits: torch.Tensor) -> Verified:
    """Rows [x, d_1..d_k] behind the root, since the look-ahead rows were not kept: tests the drafts."""
    draft_probs = decoder.probs(draft_logits)  # (B, k, V)
    drafts = decoder.draw(draft_probs)  # (B, k)
    rows = torch.cat([free[:, None], drafts], dim=1)
    target_probs = decoder.probs(decoder.forward(rows, path_layout(rows.shape[1], decoder.device)))
    return decoder.accept(drafts, draft_probs, target_probs, chain(drafts.shape[1]))


def two_pass(run: Run, stand_ins: torch.Tensor) -> Iterator[Round]:
    """A draft pass, then a verify pass. The first draft pass is prefill, with the look-ahead rows behind the prompt.

    stand_ins: (L,) input ids of the look-ahead tokens (or of the fixed token that stands in for them).
    """
    free, draft_logits = run.prefill(stand_ins[: run.room_for_drafts(already=1)])
    while not run.ends_with(free):
        verified = run.decoder.run(verify_pass, free, draft_logits)
        yield run.emit(free=free, verified=verified)
        if run.finished:
            return
        (root,) = run.without_ended(verified.next_token)
        free, draft_logits = run.decoder.run(draft_pass, stand_ins[: run.room_for_drafts(already=1)], root)
    yield run.emit(free=free)


# Fused: one pass a round verifies this round's drafts, a chain or a tree, and drafts the next round's.


def fused_round(
    decoder: Decoder,
    tree: DraftTree,
    n_lookahead: int,
    root: torch.Tensor,
    draft_logits: torch.Tensor,
    copied: torch.Tensor | None = None,
) -> tuple[Verified, torch.Tensor]:
    """Rows: the root, the drafts, then behind each of these a group of look-ahead tokens, for the case that it is the
    last one kept.

    n_lookahead: how many of these the next round can use at most. Returns what became of the drafts, and the logits of
    the group behind the last kept one, (B, n_lookahead, V): the next round's drafts.
    """
    device, vocab_size, n_rows = decoder.device, decoder.model.config.vocab_size, len(tree.depth)
    drafts, draft_probs = decoder.draft(tree, draft_logits, copied)  # (B, N), (B, D, V)
    groups = group_ids(vocab_size, tuple(tree.lengths(n_lookahead)), device)
    rows = torch.cat([root[:, None], drafts, decoder.repeat(groups)], dim=1)
    logits = decoder.forward(rows, fused_layout(tree, n_lookahead, device))
    target_probs = decoder.probs(logits[:, :n_rows])  # (B, N + 1, V)
    verified = decoder.accept(drafts, draft_probs, target_probs, tree)
    next_rows = group_rows(tree, n_lookahead, device)[verified.last]  # (B, n_lookahead)
    return verified, logits[decoder.cache.batch, next_rows]


def fused(run: Run) -> Iterator[Round]:
    """Prefill drafts for the first round. Where a text repeats itself, prompt lookup has the drafts of a round."""
    decoder = run.decoder
    vocab_size, device = decoder.model.config.vocab_size, decoder.device
    root, draft_logits = run.prefill(group_ids(vocab_size, (run.room_for_drafts(already=1),), device))
    yield run.emit(free=root)
    while not run.finished:
        root, draft_logits = run.without_ended(root, draft_logits)
        copied = run.copied_drafts()
        if copied is None:
            tree = run.tree.cut(min(draft_logits.shape[1], run.room_for_drafts()))
        else:
            tree = copied_chain(copied.shape[1], run.tree.depth[-1])
        n_lookahead = run.room_for_drafts(already=1)
        verified, draft_logits = decoder.run(fused_round, tree, n_lookahead, root, draft_logits, copied)
        root = verified.next_token
        yield run.emit(verified=verified)


@lru_cache(maxsize=256)
def copied_chain(n_drafts: int, n_lookahead: int) -> DraftTree:
    """A chain of copied drafts. It has look-ahead tokens behind the root alone, for the case that none was right: where
    all were, the text most likely goes on repeating itself."""
    return replace(chain(n_drafts), groups=(n_lookahead, *[0] * n_drafts)) if n_lookahead else chain(n_drafts)


# Two models (arXiv 2211.17192, 2302.01318): a small one drafts token by token, the target verifies in one pass.


def speculative_round(
    decoder: Decoder, n_drafts: int, before: torch.Tensor, root: torch.Tensor
) -> tuple[Verified, torch.Tensor]:
    """n_drafts passes of the draft model, then one of the target over [root, d_1..d_k].

    before: (B,), the token before the root. Returns what became of the drafts, and the next round's `before`.
    """
    device, vocab_size = decoder.device, decoder.model.config.vocab_size
    drafts = root.new_empty(len(root), 0)
    draft_probs = decoder.probs(torch.empty(len(root), 0, vocab_size, dtype=decoder.model.dtype, device=device))
    # The draft model has not seen the last draft if all were kept, so it starts at the token before the root.
    draft_cache = decoder.caches[DRAFTER]
    draft_cache.length.copy_(decoder.cache.length - 1)
    rows = torch.stack([before, root], dim=1)
    for _ in range(n_drafts):
        logits = decoder.forward(rows, path_layout(rows.shape[1], device), DRAFTER)
        draft_cache.length += rows.shape[1]
        p = decoder.probs(logits[:, -1:])  # (B, 1, V)
        rows = decoder.draw(p)  # (B, 1)
        drafts, draft_probs = torch.cat([drafts, rows], dim=1), torch.cat([draft_probs, p], dim=1)

    rows = torch.cat([root[:, None], drafts], dim=1)
    target_probs = decoder.probs(decoder.forward(rows, path_layout(1 + n_drafts, device)))
    verified = decoder.accept(drafts, draft_probs, target_probs, chain(n_drafts))
    return verified, rows.gather(1, verified.last[:, None]).squeeze(1)


def speculative(run: Run) -> Iterator[Round]:
    """Both models read the prompt first."""
    decoder = run.decoder
    prefill(decoder.models[DRAFTER], decoder.caches[DRAFTER], run.prompts(), _no_tokens(decoder))
    before = torch.tensor([text[-1] for text in run.prompts()], device=decoder.device)
    root, _ = run.prefill(_no_tokens(decoder))
    yield run.emit(free=root)
    while not run.finished:
        before, root = run.without_ended(before, root)
        verified, before = decoder.run(speculative_round, run.room_for_drafts(), before, root)
        root = verified.next_token
        yield run.emit(verified=verified)


def _no_tokens(decoder: Decoder) -> torch.Tensor:
    return torch.empty(0, dtype=torch.int64, device=decoder.device)
