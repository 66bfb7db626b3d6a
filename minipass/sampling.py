"""How the next token is drawn: settings, target distributions, and noise that has no state.

Each random number is a hash of (seed, stream, text position, token). A token is drawn by an exponential race, argmax of
probs / e with e ~ Exp(1), which is the Gumbel-max trick. So a text is a function of weights, prompt and seed, whatever
the batch. `reject` is the acceptance rule of Chen et al. (arXiv 2302.01318) and Leviathan et al. (arXiv 2211.17192).
The coupled rule needs no function: a draft is accepted if the target draws the same token with the same noise (Daliri,
Musco, Suresh, arXiv 2408.07978).
"""

import math
from dataclasses import dataclass
from numbers import Real
from typing import NamedTuple

import torch

from minipass.errors import InputError, whole

TARGET, DRAFT, ACCEPTANCE = range(3)  # streams of noise
REJECTION, COUPLED = RULES = ("rejection", "coupled")
_MASK = [2 ** (64 - shift) - 1 for shift in (30, 27, 31)]  # these turn arithmetic shifts into logical ones


def mix(x: torch.Tensor) -> torch.Tensor:
    """A 64-bit finaliser (SplitMix64, D. Stafford's variant 13): int64 to int64, one to one, wrapping."""
    x = (x ^ ((x >> 30) & _MASK[0])) * -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9
    x = (x ^ ((x >> 27) & _MASK[1])) * -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB
    return x ^ ((x >> 31) & _MASK[2])


def stream_keys(seeds: torch.Tensor) -> torch.Tensor:
    """Seeds (B,) int64 to one key for each stream and text, (3, B, 1) int64."""
    keys = mix(seeds - 0x61C8864680B583EB)  # 0 must not stay 0
    return mix(keys + torch.arange(3, device=seeds.device)[:, None])[..., None]


def uniform(key: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
    """Numbers in (0, 1), (..., K) float64. key: (...) int64, mix(stream_keys + text position); token: (..., K) int64"""
    bits = (mix(key[..., None] + token) >> 11) & (2**53 - 1)
    return (bits | 1).double() * 2.0**-53


class Distribution(NamedTuple):
    """Probabilities `probs` (..., K) float64 of the tokens (..., K) int64; all other tokens have 0."""

    tokens: torch.Tensor
    probs: torch.Tensor

    def dense(self, vocab_size: int) -> torch.Tensor:
        """The probabilities of all tokens: (..., vocab_size) float64."""
        zeros = self.probs.new_zeros(*self.probs.shape[:-1], vocab_size)
        return zeros.scatter(-1, self.tokens, self.probs)


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen: first the temperature, then the top_k likeliest tokens, then of these, renormalised,
    the fewest whose probabilities reach top_p. Temperature 0 is greedy. Raises InputError for a value out of bounds."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.temperature, Real) or not 0 <= self.temperature < math.inf:
            raise InputError(f"temperature must be 0 or more and finite, not {self.temperature!r}")
        if self.top_k is not None:
            whole(self.top_k, "top-k", 1)
        if self.top_p is not None and (not isinstance(self.top_p, Real) or not 0 < self.top_p <= 1):
            raise InputError(f"top-p must lie in (0, 1], not {self.top_p!r}")
        for name in ("temperature", "top_p"):  # plain floats, which tensors take
            value = getattr(self, name)
            object.__setattr__(self, name, value if value is None else float(value))

    def distribution(self, logits: torch.Tensor, n: int = 1) -> Distribution:
        """Logits (..., V) to a distribution over K tokens: top_k of them (but at least n), likeliest first, or all V.
        At temperature 0 the likeliest, with probability 1; for n > 1 the n likeliest, with those of temperature 1.

        n: how many different tokens are to be drawn; more than 1 for drafts only, which may come from any distribution.
        """
        if self.temperature == 0:
            if n == 1:
                tokens = logits.argmax(-1, keepdim=True)
                return Distribution(tokens, torch.ones_like(tokens, dtype=torch.float64))
            tokens = logits.topk(n).indices
            return Distribution(tokens, logits.double().softmax(-1).gather(-1, tokens))
        n_tokens = logits.shape[-1]
        top_k = min(n_tokens, n_tokens if self.top_k is None else max(self.top_k, n))
        if top_k < n_tokens or self.top_p is not None:
            logits, tokens = logits.topk(top_k, dim=-1)
        else:
            tokens = torch.arange(n_tokens, device=logits.device).expand(logits.shape)
        logits = logits.double()
        logits = (logits - logits.amax(-1, keepdim=True)) / self.temperature
        probs = logits.softmax(-1)
        if self.top_p is not None:
            likelier = probs.cumsum(-1) - probs  # the probability of all likelier tokens: 0 for the first
            probs = torch.where(likelier < self.top_p, probs, 0.0)
            probs = probs / probs.sum(-1, keepdim=True)
        return Distribution(tokens, probs)

    def draw(self, given: Distribution, key: torch.Tensor) -> torch.Tensor:
        """One token (...) for each distribution, the winner of the race; key (...): of the noise."""
        return self.race(given, key, 1).tokens[..., 0]

    def race(self, given: Distribution, key: torch.Tensor, n: int) -> Distribution:
        """The first n tokens (..., n) of each race, as if drawn without replacement, and how sure each place was.

        The largest probs / e wins, with e = -log(u), u each token's `uniform`; the others follow in order. The number
        with each token is its share of all speeds probs / e. Probabilities need not be normalised. key (...): of the
        noise. At temperature 0 it is not read: the first n of the given tokens come, the likeliest, with their
        probabilities.
        """
        if self.temperature == 0:
            return Distribution(given.tokens[..., :n], given.probs[..., :n])
        speed = given.probs / -uniform(key, given.tokens).log()  # the fastest wins
        first = speed.topk(n)
        return Distribution(given.tokens.gather(-1, first.indices), first.values / speed.sum(-1, keepdim=True))


def reject(
    draft: torch.Tensor, p: torch.Tensor, q: Distribution, u: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tests one draft at each of n positions: accepts it with probability min(1, q / p), else gives the residual.

    draft: (B, n) int64, drawn from p (B, n, V) float64, which need not be normalised. q: normalised, over K tokens at
    each position, (B, n, K). u: (B, n) float64 in (0, 1). Returns accepted (B, n) bool; the residual, (B, n, K),
    normalize(max(0, q - p)), as probabilities of q's tokens; and p without the draft, (B, n, V). A draft whose p is 0
    was never drawn: it is not accepted, and the residual is q. If q - p is positive nowhere, the residual is q, too.
    """
    p = p / p.sum(-1, keepdim=True).clamp(min=1e-300)
    p_draft = p.gather(-1, draft[..., None]).squeeze(-1)  # (B, n)
    q_draft = torch.where(q.tokens == draft[..., None], q.probs, 0.0).sum(-1)
    accepted = (u * p_draft < q_draft) & (p_draft > 0)  # u < min(1, q / p), without dividing by a p of 0
    residual = (q.probs - p.gather(-1, q.tokens)).clamp(min=0)
    total = residual.sum(-1, keepdim=True)
    residual = torch.where((p_draft > 0)[..., None] & (total > 0), residual / total, q.probs)
    return accepted, residual, p.scatter(-1, draft[..., None], 0.0)
