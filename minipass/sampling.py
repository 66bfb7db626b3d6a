"""Logits to probabilities, drawing tokens, and speculative acceptance: the rules behind every method's exactness.

The acceptance rule is from Chen et al., arXiv 2302.01318, and Leviathan et al., arXiv 2211.17192: whatever the draft
distribution p is, what comes out has the target's distribution q, since min(p, q) is kept and the residual is the rest.
`tree_accept` is the same for several drafts at each place.
"""

import math

import torch

from minipass.errors import InputError
from minipass.layout import DraftTree, ancestors, node_tensors


def check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raises InputError for a temperature, top-k or top-p out of bounds."""
    if not 0 <= temperature < math.inf:
        raise InputError(f"temperature must be 0 or more and finite, not {temperature}")
    if top_k is not None and top_k < 1:
        raise InputError(f"top-k must be at least 1, not {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise InputError(f"top-p must lie in (0, 1], not {top_p}")


def probabilities(
    logits: torch.Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> torch.Tensor:
    """The distribution to sample from: logits (..., V) to probabilities (..., V), float32 (float64 stays).

    First the temperature, then the top_k most likely tokens, then of these the fewest whose probabilities reach top_p.
    Temperature 0 is greedy: all on the most likely token, so that exactness for any q covers it too.
    Raises InputError for settings out of bounds.
    """
    check_sampling(temperature, top_k, top_p)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if temperature < torch.finfo(logits.dtype).tiny:  # 0, or so little that it would round to 0
        return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    logits = logits - logits.amax(-1, keepdim=True)  # a tiny temperature then overflows to -inf, not to inf - inf
    logits = logits / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        values, tokens = logits.topk(top_k, dim=-1)  # exactly top_k, also when there are ties
        logits = torch.full_like(logits, -math.inf).scatter_(-1, tokens, values)
    probs = logits.softmax(-1)
    if top_p is not None and top_p < 1:
        ordered, tokens = probs.sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(-1) - ordered  # the probability of all likelier tokens
        ordered = ordered.masked_fill(before >= top_p, 0.0)
        probs = torch.zeros_like(probs).scatter_(-1, tokens, ordered)
        probs = probs / probs.sum(-1, keepdim=True)
    return probs


def draw(probs: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """One token for each distribution: probs (..., V), not necessarily normalised, to tokens (...) int64.

    Inverts the cumulative distribution in float64 with one random number a token; a token of probability 0 is never
    drawn. (`torch.multinomial` draws V random numbers a token, a noticeable part of a small model's pass.)
    """
    cumulative = probs.double().cumsum(-1)
    total = cumulative[..., -1:]
    u = torch.rand(total.shape, dtype=total.dtype, device=total.device, generator=generator)
    below_total = torch.minimum(u * total, torch.nextafter(total, torch.zeros_like(total)))  # u * total may round up
    return torch.searchsorted(cumulative, below_total, right=True).squeeze(-1)


def speculative_accept(
    draft_tokens: torch.Tensor,
    draft_probs: torch.Tensor,
    target_probs: torch.Tensor,
    generator: torch.Generator | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keeps a prefix of the drafts and draws one more token, so that the result has the target's distribution.

    draft_tokens: (B, L) int64, d_i drawn from p_i; L may be 0, which is plain sampling.
    draft_probs: (B, L, V), the p_i; target_probs: (B, L + 1, V), q_i given the context and d_1..d_{i-1}.
    Returns n_accepted (B,), how many drafts are kept, and next_token (B,): the correction after a rejection, or the
    bonus token when all are kept.
    """
    n_drafts = draft_tokens.shape[1]
    batch = torch.arange(len(draft_tokens), device=draft_tokens.device)
    p_of_draft = draft_probs.gather(2, draft_tokens[..., None]).squeeze(2)  # (B, L)
    q_of_draft = target_probs[:, :n_drafts].gather(2, draft_tokens[..., None]).squeeze(2)
    u = torch.rand(p_of_draft.shape, dtype=p_of_draft.dtype, device=p_of_draft.device, generator=generator)
    kept = u * p_of_draft < q_of_draft  # u < min(1, q / p), without dividing by a p of 0
    n_accepted = kept.long().cumprod(1).sum(1)  # all up to the first rejection

    # The residual max(0, q - p) of the first rejected draft. Behind the last draft p is 0, which makes the bonus token
    # a draw from q itself.
    q = target_probs[batch, n_accepted]  # (B, V)
    p = torch.nn.functional.pad(draft_probs, (0, 0, 0, 1))[batch, n_accepted]
    residual = (q - p).clamp(min=0)
    residual = torch.where(residual.sum(-1, keepdim=True) > 0, residual, q)  # p == q but for rounding
    return n_accepted, draw(residual, generator)


def draw_candidates(probs: torch.Tensor, n: int, generator: torch.Generator | None = None) -> torch.Tensor:
    """n different tokens for each distribution, drawn one after the other without replacement.

    probs: (..., V); returns (..., n) int64. Where fewer than n tokens have a probability, some token fills up; one that
    was not drawn is never kept by `tree_accept`. With n = 1 this is `draw`.
    """
    candidates = []
    for _ in range(n):
        candidates.append(draw(probs, generator).clamp(max=probs.shape[-1] - 1))  # none left: draw gives V
        probs = probs.scatter(-1, candidates[-1][..., None], 0.0)
    return torch.stack(candidates, dim=-1)


def tree_accept(
    drafts: DraftTree,
    draft_tokens: torch.Tensor,
    draft_probs: torch.Tensor | None,
    target_probs: torch.Tensor,
    generator: torch.Generator | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keeps a path of a tree of drafts from the root on and draws one more token, exactly as the target would.

    drafts: a tree of N nodes and depth D. draft_tokens: (B, N) int64, siblings differ. target_probs: (B, N + 1, V), the
    target's distribution behind the root and behind each node. Two rules, both exact at any temperature:

    - *matching*, when draft_probs is None: at each node x is drawn from the target, as plain decoding does, and the
      path goes on if x is one of the drafts there. How these were chosen does not matter.
    - *recursive rejection*, for siblings that `draw_candidates` drew from draft_probs (B, D, V), the p of each depth:
      they are tested one after the other with min(1, q / p); after a rejection q becomes normalize(max(0, q - p)) and
      p loses the rejected token. For a chain this is `speculative_accept`, bit for bit.

    Returns kept (B, N + 1) bool, the nodes of the path (the root always is), and next_token (B,), drawn behind its end.
    """
    device, n_nodes = draft_tokens.device, 1 + len(drafts.parents)
    fits = torch.ones(len(draft_tokens), n_nodes, dtype=torch.bool, device=device)  # a node, if its parent is kept
    if draft_probs is None:
        drawn = draw(target_probs, generator)  # (B, N + 1)
        fits[:, 1:] = draft_tokens == drawn[:, node_tensors(drafts, device).parents]
    else:
        fits[:, 1:], residual = _recursive_rejection(drafts, draft_tokens, draft_probs, target_probs, generator)

    kept = (fits[:, None] | ~ancestors(drafts, device)).all(-1)  # (B, N + 1), those with all that lies before them
    last = kept.long().cumsum(1).argmax(1)  # nodes stand by depth: the last kept one is the path's end
    batch = torch.arange(len(kept), device=device)
    return kept, drawn[batch, last] if draft_probs is None else draw(residual[batch, last], generator)


def _recursive_rejection(drafts, draft_tokens, draft_probs, target_probs, generator):
    """Tests the children of all nodes side by side, rank by rank: which node stands the test at its parent, (B, N), and
    behind each node the distribution (B, N + 1, V), not normalised, of a token when none of its children does."""
    device = draft_tokens.device
    nodes_of = node_tensors(drafts, device)
    fits = torch.zeros_like(draft_tokens, dtype=torch.bool)
    taken = torch.zeros(target_probs.shape[:2], dtype=torch.bool, device=device)  # nodes that have a fitting child
    q = target_probs.clone()  # (B, N + 1, V), becomes the residual as the children of a node are rejected
    p = torch.nn.functional.pad(draft_probs, (0, 0, 0, 1))[
        :, nodes_of.depth
    ]  # of each node's children, the deepest none
    q_sum, p_sum = torch.ones_like(q[..., :1]), torch.ones_like(q[..., :1])
    for nodes in nodes_of.by_rank:  # counted without the root
        behind, tokens = nodes_of.parents[nodes], draft_tokens[:, nodes]  # (n,), (B, n): no two with the same parent
        q_here, p_here = q[:, behind] / q_sum[:, behind], p[:, behind] / p_sum[:, behind]
        p_of_draft = p_here.gather(2, tokens[..., None]).squeeze(2)
        q_of_draft = q_here.gather(2, tokens[..., None]).squeeze(2)
        u = torch.rand(p_of_draft.shape, dtype=p_of_draft.dtype, device=device, generator=generator)
        was_drawn = p_of_draft > 0  # not so where p had fewer tokens than the tree has ranks
        fits[:, nodes] = (u * p_of_draft < q_of_draft) & was_drawn & ~taken[:, behind]
        taken[:, behind] |= fits[:, nodes]

        residual = (q_here - p_here).clamp(min=0)
        total = residual.sum(-1, keepdim=True)
        rejected = was_drawn[..., None] & (total > 0)  # total 0: p == q but for rounding
        q[:, behind], q_sum[:, behind] = torch.where(rejected, residual, q_here), torch.where(rejected, total, 1.0)
        p_left = p[:, behind].scatter(2, tokens[..., None], 0.0)
        p[:, behind], p_sum[:, behind] = p_left, p_left.sum(-1, keepdim=True).clamp(min=torch.finfo(p.dtype).tiny)
    return fits, q
