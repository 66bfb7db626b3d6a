"""What rounds work with on the device: a model and its cache, drafting, acceptance, and graphs that replay all that."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from minipass import capture
from minipass.layout import DraftTree, Layout, node_tensors, path, with_groups
from minipass.model import GPT, KVCache
from minipass.sampling import draw, draw_candidates, probabilities, speculative_accept, tree_accept

TARGET, DRAFTER = 0, 1  # the models of a pass


class Verified(NamedTuple):
    """Drafts with both their distributions, and what acceptance made of them; names and shapes as in Round.

    n_accepted (B,); last (B,), the row of the last token that was kept, 0 is the root; next_token (B,), the next root.
    path: (B, k), the drafts with those that were kept, n_accepted of each row, in front.
    """

    drafts: torch.Tensor
    draft_probs: torch.Tensor
    target_probs: torch.Tensor
    n_accepted: torch.Tensor
    last: torch.Tensor
    next_token: torch.Tensor
    path: torch.Tensor
    tree: DraftTree
    kept: torch.Tensor | None


class Decoder:
    """What the rounds of a generation work with on the device: a model or two, their caches, how tokens are drawn.

    With graphs (None: without), `run` replays each function of tensors as a CUDA graph; the graphs live as long as the
    decoder, which serves one generation after another.
    """

    def __init__(
        self,
        model: GPT,
        batch_size: int,
        max_len: int,
        *,
        rule: str,
        sampling: dict,
        generator: torch.Generator | None = None,
        draft_model: GPT | None = None,
        graphs: dict | None = None,
    ) -> None:
        self.model = model
        self.rule, self.sampling, self.generator, self.graphs = rule, sampling, generator, graphs
        self.device = model.device
        self.models = [model, draft_model] if draft_model else [model]  # by TARGET, DRAFTER
        self.caches = [
            KVCache(each.config, batch_size, max_len, device=each.device, dtype=each.dtype) for each in self.models
        ]
        self.cache = self.caches[TARGET]
        self.going_on = torch.ones(batch_size, dtype=torch.bool, device=self.device)
        self.passes: list[tuple[int, int]] = []  # since a round was last recorded

    def select(self, texts: torch.Tensor) -> None:
        """Goes on with these texts of the batch alone: (B',) int64."""
        for cache in self.caches:
            cache.select(texts)
        self.going_on = self.going_on[texts]

    @property
    def batch_size(self) -> int:
        """Texts that are worked on."""
        return len(self.going_on)

    def run(self, function: Callable, *arguments: Any) -> Any:
        """function(self, *arguments); with graphs recorded when it is first called with arguments of these shapes."""
        if self.graphs is None:
            return function(self, *arguments)
        tensors = [each for each in arguments if isinstance(each, torch.Tensor)]
        key = (function, *(each.shape if isinstance(each, torch.Tensor) else each for each in arguments))
        before = self.passes
        if key not in self.graphs:

            def of_tensors(*values: torch.Tensor) -> Any:
                self.passes, left = [], iter(values)
                return function(self, *(next(left) if isinstance(each, torch.Tensor) else each for each in arguments))

            lengths = [cache.length for cache in self.caches]
            self.graphs[key] = capture.Graph(of_tensors, tensors, lengths, self.generator), self.passes
        graph, passes = self.graphs[key]
        self.passes = before + passes
        return graph(*tensors)

    def forward(self, ids: torch.Tensor, layout: Layout, which: int = TARGET) -> torch.Tensor:
        """One pass behind the cache: ids (B, R) to logits (B, R, V). None of its rows is kept yet."""
        self.passes.append((which, ids.shape[1]))
        return self.models[which](ids, layout, self.caches[which])

    def keep(self, n_rows: torch.Tensor | int) -> None:
        """Counts the first n_rows of the last pass in; what lies behind is thereby dropped. Ended prompts stand."""
        self.cache.length += self.going_on * n_rows

    def probs(self, logits: torch.Tensor) -> torch.Tensor:
        return probabilities(logits, **self.sampling)

    def draw(self, probs: torch.Tensor) -> torch.Tensor:
        return draw(probs, self.generator)

    def next_token(self, logits: torch.Tensor) -> torch.Tensor:
        """What follows the first row of a pass: logits (B, R, V) to tokens (B,), from the target alone."""
        return self.draw(self.probs(logits[:, 0]))

    def repeat(self, ids: torch.Tensor) -> torch.Tensor:
        """The same ids (R,) for every prompt: (B, R)."""
        return ids.expand(self.batch_size, -1)

    def draft(
        self, tree: DraftTree, draft_logits: torch.Tensor, copied: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Drafts for the N nodes of a tree of depth D, (B, N), and the distributions that they were drawn from,
        (B, D, V).

        draft_logits: (B, n, V) of look-ahead rows; where n < D, deeper drafts are drawn blindly. copied: for a chain,
        (B, N) tokens to draft instead, all of p on them; where it is negative nothing was copied.
        """
        depth = tree.depth[-1]
        draft_logits = F.pad(draft_logits, (0, 0, 0, max(0, depth - draft_logits.shape[1])))[:, :depth]
        draft_probs = self.probs(draft_logits)
        if self.rule == "matching":
            ranked = draft_logits.topk(min(tree.width, draft_logits.shape[2])).indices  # (B, D, width)
        else:
            ranked = draw_candidates(draft_probs, tree.width, self.generator)
        nodes = node_tensors(tree, self.device)
        drafts = ranked[:, nodes.place, nodes.rank]
        if copied is not None:
            drafts = torch.where(copied >= 0, copied, drafts)
            one_hot = torch.zeros_like(draft_probs).scatter_(2, drafts[..., None], 1.0)
            draft_probs = torch.where((copied >= 0)[..., None], one_hot, draft_probs)
        return drafts, draft_probs

    def accept(
        self, drafts: torch.Tensor, draft_probs: torch.Tensor, target_probs: torch.Tensor, tree: DraftTree
    ) -> Verified:
        """Tests a tree of drafts, such as a chain, (B, k), and keeps the root and what was accepted in the cache."""
        given = (drafts, draft_probs, target_probs)
        if tree.width == 1 and (self.rule == "recursive" or self.sampling["temperature"] == 0):
            n_accepted, next_token = speculative_accept(*given, self.generator)
            self.keep(1 + n_accepted)  # of a chain the rows are where they belong
            return Verified(*given, n_accepted, n_accepted, next_token, path=drafts, tree=tree, kept=None)
        p = None if self.rule == "matching" else draft_probs
        kept, next_token = tree_accept(tree, drafts, p, target_probs, self.generator)
        rows = (~kept).long().argsort(dim=1, stable=True)  # (B, N + 1), the kept nodes in front
        n_accepted = kept.sum(1) - 1
        if tree.width > 1:
            self.cache.gather(rows[:, : 1 + tree.depth[-1]])
        self.keep(1 + n_accepted)
        last, path = rows.gather(1, n_accepted[:, None]).squeeze(1), drafts.gather(1, rows[:, 1:] - 1)
        return Verified(*given, n_accepted, last, next_token, path, tree, kept)


def prefill(model: GPT, cache: KVCache, prompts: list[list[int]], extra_ids: torch.Tensor) -> torch.Tensor:
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
