"""Logits to probabilities, drawing tokens, and speculative acceptance: the one rule behind every method's exactness.

The acceptance rule is from Chen et al., arXiv 2302.01318, and Leviathan et al., arXiv 2211.17192: whatever the draft
distribution p is, what comes out has the target's distribution q, since min(p, q) is kept and the residual is the rest.
"""

import math

import torch

from minipass.errors import InputError


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
