"""Tiny random models, a slow reference of what plain decoding writes, and a chi-square test.

The reference shares nothing with what it tests but the weights: its forward, context rule and noise are its own, its
target distribution is that of the course's graders.
"""

import copy
import math
import random
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from minipass import losses
from minipass.auto import AdaptiveTree, Auto, n_rows
from minipass.decode import Fused, Plain, TwoModels, TwoPass
from minipass.engine import GREEDY
from minipass.extras.course.test_exercises import FORKED, slow_probabilities
from minipass.model import GPT, GPTConfig
from minipass.sampling import COUPLED, RULES, Distribution, Sampling
from minipass.trees import DraftTree

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import train_tiny  # noqa: E402

torch.set_num_threads(1)  # the models are so small that a second thread only waits

TREE = FORKED  # three drafts for the next token, two after the first of them, and so on
SPARSE = DraftTree(TREE.parents, groups=(3, 1, 2, 0, 0, 1, 0, 0))
ACCURACY = [[0.5, 0.2, 0.1], [0.4, 0.25, 0.1], [0.3, 0.1, 0.05]]


@lru_cache
def chooser() -> AdaptiveTree:
    """Takes a while to make."""
    return AdaptiveTree(ACCURACY, lambda tree: 1 + 0.03 * n_rows(tree))


# Of each method: made from L, the rule and the draft model.
METHODS = {
    "plain": lambda n, rule, draft: Plain(),
    "two-pass": lambda n, rule, draft: TwoPass(n, rule),
    "fixed token": lambda n, rule, draft: TwoPass(n, rule, fixed_token=2),
    "fused": lambda n, rule, draft: Fused(n, rule),
    "tree": lambda n, rule, draft: Fused(TREE, rule),
    "incomplete groups": lambda n, rule, draft: Fused(SPARSE, rule),
    "two models": lambda n, rule, draft: TwoModels(draft, n, rule),
    "lookup alone": lambda n, rule, draft: Fused(0, rule, lookup=3),
    "fused with lookup": lambda n, rule, draft: Fused(n, rule, lookup=3),
    "tree with lookup": lambda n, rule, draft: Fused(TREE, rule, lookup=3),
    "auto": lambda n, rule, draft: Auto(copy.deepcopy(chooser()), rule),
}
WAYS = [(name, rule) for name in METHODS for rule in RULES if name != "plain" or rule == COUPLED]  # method and rule


@pytest.fixture(scope="session", autouse=True)
def blank_curves() -> Iterator[None]:
    """To draw a tiny run's curves takes longer than the run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_tiny, "draw_curves", lambda folder, _: (folder / "loss.png").touch())
        yield


def random_prompts(rng: random.Random, n: int, longest: int = 16) -> list[list[int]]:
    """Of any lengths, up to that of the window."""
    return [[rng.randrange(11) for _ in range(rng.randint(1, longest))] for _ in range(n)]


def whole(probs: torch.Tensor) -> Distribution:
    """Probabilities of all tokens as a Distribution."""
    return Distribution(torch.arange(probs.shape[-1]).expand(probs.shape), probs)


def random_model(seed: int, std: float = 0.4, **sizes: int) -> GPT:
    """A float64 model with weights large enough for its distributions to be uneven and to differ from row to row."""
    defaults = {"vocab_size": 11, "block_size": 40, "n_layer": 2, "n_head": 2, "n_embd": 16, "n_lookahead": 4}
    model = GPT(GPTConfig(**(defaults | sizes))).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=std, generator=generator)
    return model.eval()


@pytest.fixture(scope="session")
def model() -> GPT:
    return random_model(seed=1)


@pytest.fixture(scope="session")
def draft_model() -> GPT:
    return random_model(seed=2, n_layer=1, n_lookahead=0)


def random_lively_model(seed: int, **sizes: int) -> GPT:
    """A model whose greedy text keeps changing: with random weights alone it repeats one token for ever, and then a
    wrong position or a wrong cache length would not show."""
    model = random_model(seed, **sizes)
    with torch.no_grad():
        for block in model.h:
            block.attn.c_proj.weight.mul_(3)  # what was read counts for more than the last token
            block.mlp.c_proj.weight.mul_(3)
        for name, parameter in model.named_parameters():
            if "ln_" in name and name.endswith("weight"):
                parameter.fill_(1)
    return model


def noisy(model: GPT) -> GPT:
    """The same model but for some noise: it drafts well, not perfectly."""
    draft, generator = copy.deepcopy(model), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return draft


@pytest.fixture(scope="session")
def lively_model() -> GPT:
    return random_lively_model(seed=2)


@pytest.fixture(scope="session")
def lively_draft(lively_model) -> GPT:
    return noisy(lively_model)


@torch.no_grad()
def slow_logits(model: GPT, ids: Sequence[Sequence[int]], n_lookahead: int = 0) -> torch.Tensor:
    """The logits of GPT-2 or Llama on whole texts (B, n) and look-ahead tokens after them: (B, n + n_lookahead, V)."""
    w, config, ids = model.state_dict(), model.config, torch.tensor(ids)
    n_text, n_rows = ids.shape[1], ids.shape[1] + n_lookahead
    n_kv_head, head_dim = config.n_kv_head or config.n_head, config.head_dim or config.n_embd // config.n_head
    x = torch.cat([w["wte.weight"][ids], w["lookahead"][:n_lookahead].expand(len(ids), -1, -1)], dim=1)
    if not config.llama:
        x = x + w["wpe.weight"][:n_rows]

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        y = x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)
        if f"{name}.down" in w:
            y[:, n_text:] += x[:, n_text:] @ w[f"{name}.down"].T @ w[f"{name}.up"].T
        return y

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        if config.llama:
            return x / (x.square().mean(-1, keepdim=True) + config.norm_eps).sqrt() * w[f"{name}.weight"]
        return F.layer_norm(x, (config.n_embd,), w[f"{name}.weight"], w[f"{name}.bias"])

    def turned(head: torch.Tensor) -> torch.Tensor:
        """Pair i of the two halves is a complex number, turned by position * theta ** (-2 i / head_dim)."""
        speed = config.rope_theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
        angle = torch.arange(n_rows)[:, None] * speed
        pairs = torch.complex(*head.chunk(2, -1)) * torch.polar(torch.ones_like(angle), angle)
        return torch.cat([pairs.real, pairs.imag], -1).to(head)

    later = torch.ones(n_rows, n_rows, dtype=torch.bool).triu(1)
    for i in range(config.n_layer):
        heads = linear(norm(x, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn").split(head_dim, -1)
        qs, ks, vs = heads[: config.n_head], heads[config.n_head : -n_kv_head], heads[-n_kv_head:]
        if config.llama:
            qs, ks = map(turned, qs), list(map(turned, ks))
        read = []
        for h, q in enumerate(qs):
            shared = h * n_kv_head // config.n_head
            scores = q @ ks[shared].transpose(1, 2) / math.sqrt(head_dim)
            read.append(scores.masked_fill(later, -math.inf).softmax(-1) @ vs[shared])
        x = x + linear(torch.cat(read, -1), f"h.{i}.attn.c_proj")
        y = linear(norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc")
        if config.llama:
            gate, value = y.chunk(2, -1)
            y = gate / (1 + torch.exp(-gate)) * value
        else:
            y = 0.5 * y * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))
        x = x + linear(y, f"h.{i}.mlp.c_proj")
    return norm(x, "ln_f") @ w["wte.weight" if config.tied else "lm_head.weight"].T


def slow_mix(x: int) -> int:
    """SplitMix64's finaliser, on Python's integers."""
    x %= 2**64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31


def slow_key(seed: int, stream: int, position: int) -> int:
    return slow_mix(slow_mix(slow_mix(seed + 0x9E3779B97F4A7C15) + stream) + position)


def slow_uniform(key: int, token: int) -> float:
    return (slow_mix(key + token) >> 11 | 1) / 2**53


def slow_race(probs: list[float], seed: int, position: int) -> list[int]:
    """The tokens in the order in which they win the race of the target's noise (stream 0) at a text position."""
    key = slow_key(seed, 0, position)

    def time(token: int) -> float:
        return -math.log(slow_uniform(key, token)) / probs[token] if probs[token] > 0 else math.inf

    return sorted(range(len(probs)), key=time)


@contextmanager
def power_cut(monkeypatch: pytest.MonkeyPatch, in_step: int) -> Iterator[None]:
    """Training inside breaks off in this step, counted from 1, and must."""
    real, calls = losses.lookahead_loss, []

    def breaks_off(*args):
        calls.append(1)
        if len(calls) == in_step:
            raise RuntimeError("power cut")
        return real(*args)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="power cut"):
        patch.setattr(losses, "lookahead_loss", breaks_off)
        yield


def next_context(context: list[int], block_size: int) -> list[int]:
    """What the model reads: a context with more than block_size tokens becomes its last half window."""
    return context[-(block_size // 2) :] if len(context) > block_size else context


def plain_text(
    model: GPT, prompt: list[int], n_new: int, sampling: Sampling = GREEDY, seed: int = 0, stop: Collection[int] = ()
) -> list[int]:
    """What plain decoding writes for a seed: no cache, no drafts, no batch, the whole context for each token."""
    context, new = list(prompt), []
    while len(new) < n_new and not (new and new[-1] in stop):
        context = next_context(context, model.config.block_size)
        logits = slow_logits(model, [context])[0, -1].tolist()
        probs = slow_probabilities(logits, sampling.temperature, sampling.top_k, sampling.top_p)
        new.append(slow_race(probs, seed, len(prompt) + len(new))[0])
        context = [*context, new[-1]]
    return new


def sequence_probabilities(
    model: GPT, prompt: list[int], n_new: int, stop_token: int | None = None, **sampling
) -> dict[tuple, float]:
    """The exact probability of every continuation, which ends after n_new tokens or at stop_token."""
    growing, ended, context_start = {(): 1.0}, {}, 0
    for n in range(n_new):
        n_context = len(prompt) + n - context_start
        context_start += n_context - len(next_context([0] * n_context, model.config.block_size))
        contexts, grown = [[*prompt, *text][context_start:] for text in growing], {}
        for text, logits in zip(growing, slow_logits(model, contexts)[:, -1].tolist(), strict=True):
            for token, probability in enumerate(slow_probabilities(logits, **sampling)):
                if probability > 0:
                    goes_to = ended if token == stop_token else grown
                    goes_to[(*text, token)] = growing[text] * probability
        growing = grown
    return growing | ended


def chi_square(outcomes: torch.Tensor, probs: torch.Tensor) -> tuple[float, int]:
    """Of outcomes (n,), numbers of `probs` (K,): chi-square and its degrees of freedom.

    Outcomes are pooled, the likely ones alone and the unlikely ones together, until 5 of each cell are expected. Where
    one has probability 0, chi-square is infinite.
    """
    counts, n = torch.bincount(outcomes, minlength=len(probs)), len(outcomes)
    if counts[probs == 0].any():
        return math.inf, 1
    cells, observed, expected = [], 0, 0.0
    for outcome in probs.argsort(stable=True).tolist():
        observed, expected = observed + counts[outcome].item(), expected + n * probs[outcome].item()
        if expected >= 5:
            cells.append((observed, expected))
            observed, expected = 0, 0.0
    if expected > 0:
        last_observed, last_expected = cells.pop()
        cells.append((last_observed + observed, last_expected + expected))
    return sum((count - mean) ** 2 / mean for count, mean in cells), len(cells) - 1


def p_value(outcomes: torch.Tensor, probs: torch.Tensor) -> float:
    """How likely outcomes as unlike `probs` as these are."""
    statistic, freedom = chi_square(outcomes, probs)
    half = torch.tensor([freedom / 2, statistic / 2], dtype=torch.float64)
    return torch.special.gammaincc(half[0], half[1]).item()


def chi_square_p_value(samples: list[tuple], expected: dict[tuple, float]) -> float:
    """How likely samples as unlike `expected` as these are; 0.0 when one has probability 0."""
    if any(sample not in expected for sample in samples):
        return 0.0
    number = {outcome: i for i, outcome in enumerate(expected)}
    outcomes = torch.tensor([number[sample] for sample in samples])
    return p_value(outcomes, torch.tensor(list(expected.values()), dtype=torch.float64))
