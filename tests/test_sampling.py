"""Noise against SplitMix64, planted bugs, extremes, and many texts. The course's graders, exercises 1, 4, 5 and 6, test
distributions, the race and acceptance."""

import itertools
import math
from fractions import Fraction

import pytest
import torch
from conftest import (
    chi_square,
    p_value,
    random_model,
    sequence_probabilities,
    slow_key,
    slow_mix,
    slow_uniform,
    whole,
)  # fmt: skip
from torch.overrides import TorchFunctionMode

import minipass.decode
import minipass.sampling
import minipass.trees
from minipass.decode import TwoPass
from minipass.engine import Engine
from minipass.errors import InputError
from minipass.sampling import DRAFT, TARGET, Distribution, Sampling, mix, stream_keys, uniform
from minipass.trees import Drafts, Shape, accept, chain

V = 9
CPU = torch.device("cpu")
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def random_probs(*shape: int, seed: int = 0, v: int = V) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(*shape, v, generator=generator, dtype=torch.float64)).softmax(-1)


def keys_for(n: int, n_positions: int = 1) -> torch.Tensor:
    """Noise of n texts at some positions: (3, n, n_positions)."""
    return mix(stream_keys(torch.arange(n)) + torch.arange(n_positions))


# The hash.


def unmixed(x: int) -> int:
    """What `mix` makes x of, both unsigned."""
    x ^= x >> 31 ^ x >> 62
    x = x * pow(0x94D049BB133111EB, -1, 2**64) % 2**64
    x ^= x >> 27 ^ x >> 54
    x = x * pow(0xBF58476D1CE4E5B9, -1, 2**64) % 2**64
    return x ^ x >> 30 ^ x >> 60


def signed(x: int) -> int:
    """An unsigned 64-bit number as int64 has it."""
    return x - 2**64 if x >= 2**63 else x


def mix_32(x: torch.Tensor) -> torch.Tensor:
    """Planted: a good finaliser (MurmurHash3's), of 32 bits."""
    low = 2**32 - 1
    x = x & low
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & low
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & low
    return x ^ (x >> 16)


def uniform_32(key: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
    """Planted: what `uniform` would be with 32 bits."""
    return (mix_32(key[..., None] + token).double() + 0.5) * 2.0**-32


def test_the_hash_is_splitmix64s():
    assert slow_mix(0x9E3779B97F4A7C15) == 0xE220A8397B1DCDAF  # SplitMix64's first number for seed 0, as published
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randint(-(2**63), 2**63 - 1, (2000,), generator=generator).tolist()
    numbers += [0, 1, -1, 2**63 - 1, -(2**63), *range(-50, 50)]
    assert mix(torch.tensor(numbers)).tolist() == [signed(slow_mix(x)) for x in numbers]


def test_noise_is_the_hash_of_seed_stream_position_and_token():
    seeds, positions, tokens = [0, 1, 2, 12345, 2**63 - 1, -1, -(2**63)], [0, 1, 255, 10**6], [0, 1, 50256]
    keys = mix(stream_keys(torch.tensor(seeds)) + torch.tensor(positions))  # (3, seeds, positions)
    assert keys.shape == (3, len(seeds), len(positions))
    numbers = uniform(keys, torch.tensor(tokens))  # (3, seeds, positions, tokens)
    expected = [
        slow_uniform(slow_key(*at), token) for *at, token in itertools.product(seeds, range(3), positions, tokens)
    ]
    assert numbers.transpose(0, 1).flatten().tolist() == expected


def one_to_one(hashed) -> bool:
    """Whether different numbers stay different: neighbours, numbers with equal low halves, and random ones."""
    generator = torch.Generator().manual_seed(0)
    ahead, random = torch.arange(-200_000, 200_000), torch.randint(-(2**63), 2**63 - 1, (400_000,), generator=generator)
    return all(len(hashed(x).unique()) == len(x.unique()) for x in (ahead, ahead << 32, random))


def test_the_hash_is_one_to_one_and_undone_step_by_step():
    assert one_to_one(mix)
    assert not one_to_one(mix_32)
    assert [unmixed(slow_mix(x)) for x in range(1000)] == list(range(1000))


class Dtypes(TorchFunctionMode):
    """Notes the dtype of whatever torch computes."""

    seen = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.seen.append(result.dtype)
        return result


def test_the_hash_is_the_same_on_any_device_as_it_never_leaves_int64():
    with Dtypes() as dtypes:
        uniform(mix(stream_keys(torch.arange(3)) + torch.arange(4)), torch.arange(5))
    assert dtypes.seen[-2:] == [torch.float64] * 2  # made a double, exactly, and scaled by 2^-53
    assert set(dtypes.seen[:-2]) == {torch.int64}


@CUDA
def test_a_gpu_makes_the_noise_of_the_cpu():
    keys = keys_for(1000, 20)
    assert torch.equal(keys_for(1000, 20).cuda().cpu(), keys)
    assert torch.equal(mix(stream_keys(torch.arange(1000).cuda()) + torch.arange(20).cuda()).cpu(), keys)
    assert torch.equal(uniform(keys.cuda(), torch.arange(99).cuda()).cpu(), uniform(keys, torch.arange(99)))


def uniform_p_value(cells: torch.Tensor, n_cells: int) -> float:
    return p_value(cells.flatten(), torch.full((n_cells,), 1 / n_cells, dtype=torch.float64))


def noise_p_values(seed_step: int = 1) -> dict[str, float]:
    """Of the numbers for 24 seeds, 3 streams, 48 positions and 48 tokens: chi-squares of their first and last bits, and
    of neighbours along each axis, which share a 16 by 16 table."""
    keys = minipass.sampling.stream_keys(torch.arange(24) * seed_step)
    numbers = minipass.sampling.uniform(minipass.sampling.mix(keys + torch.arange(48)), torch.arange(48))
    values = {"first bits": uniform_p_value((numbers * 256).long(), 256)}
    values["last bits"] = uniform_p_value((numbers * 2.0**52).long() % 256, 256)
    cells = (numbers * 16).long()
    for axis, name in enumerate(("streams", "seeds", "positions", "tokens")):
        n = cells.shape[axis]
        pairs = cells.narrow(axis, 0, n - 1) * 16 + cells.narrow(axis, 1, n - 1)
        values[name] = uniform_p_value(pairs, 256)
    return values


@pytest.mark.parametrize("seed_step", [1, 40_000, 2**32])
def test_noise_is_uniform_and_neighbours_along_every_axis_have_nothing_in_common(seed_step):
    for name, value in noise_p_values(seed_step).items():
        assert value > 1e-3, name


WEYL = {"mix": lambda x: x * -0x61C8864680B583EB}  # uniform, and each number follows from the one before
BAD_NOISE = {  # what is patched, and which chi-square sees it
    "seeds": WEYL | {"stream_keys": lambda seeds: (seeds + 2**40 * torch.arange(3)[:, None])[..., None]},
    "streams": {"stream_keys": lambda seeds: stream_keys(seeds)[:1].expand(3, -1, -1)},
    "positions": WEYL,
    "tokens": {"uniform": lambda key, token: uniform(key, token * 0)},
    "last bits": {"uniform": uniform_32},
}


@pytest.mark.parametrize("caught", BAD_NOISE)
def test_bad_noise_is_caught(caught, monkeypatch):
    for name, function in BAD_NOISE[caught].items():
        monkeypatch.setattr(minipass.sampling, name, function)
    assert noise_p_values()[caught] < 1e-6


# The race.


def test_a_race_with_one_number_for_all_tokens_is_caught(monkeypatch):
    monkeypatch.setattr(minipass.sampling, "uniform", lambda key, token: uniform(key, token * 0))
    probs = random_probs(1)[0]
    assert p_value(Sampling(1.0).draw(whole(probs.expand(2000, -1)), keys_for(2000)[TARGET, :, 0]), probs) < 1e-6


def test_what_is_drawn_does_not_depend_on_which_tokens_of_probability_zero_are_listed():
    probs, keys = random_probs(500, v=20), keys_for(500)[TARGET, :, 0]
    top, tokens = probs.topk(5)
    sparse, dense = Distribution(tokens, top), whole(Distribution(tokens, top).dense(20))
    assert torch.equal(Sampling(1.0).draw(sparse, keys), Sampling(1.0).draw(dense, keys))


# Target distributions.


def dense(sampling: Sampling, logits: torch.Tensor, n: int = 1) -> torch.Tensor:
    return sampling.distribution(logits, n).dense(logits.shape[-1])


def test_more_draws_than_top_k_tokens_widen_it_before_top_p_counts():
    logits = torch.randn(5, V, generator=torch.Generator().manual_seed(1))
    assert Sampling(0.8, top_k=2, top_p=0.1).distribution(logits, 4).probs.gt(0).sum(-1).eq(1).all()


def test_the_smallest_top_p_leaves_the_likeliest_token():
    logits = torch.tensor([[1.0, 3.0, 2.0], [0.0, 0.0, 0.0]])
    for top_p in (1e-46, 5e-324):
        probs = dense(Sampling(1.0, top_p=top_p), logits)
        assert probs[0].tolist() == [0, 1, 0]
        assert sorted(probs[1].tolist()) == [0, 0, 1]


@pytest.mark.parametrize("settings", [{}, {"top_k": 2}, {"top_p": 0.9}], ids=str)
def test_huge_logits_are_not_nan(settings):
    probs = dense(Sampling(1.0, **settings), torch.tensor([[3e38, -3e38, 3e38, 1.0]]))
    assert probs.sum().item() == 1
    assert probs[0, [1, 3]].tolist() == [0, 0]
    large = torch.tensor([[1e4, 1e4 - 1, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(dense(Sampling(1.0), large), (large - 1e4).softmax(-1))


@pytest.mark.parametrize(
    "settings",
    [{"temperature": value} for value in (-1.0, math.nan, math.inf)]
    + [{"top_k": value} for value in (0, -3)]
    + [{"top_p": value} for value in (0.0, -0.5, 1.01, math.nan)],
)
def test_settings_out_of_bounds_are_refused(settings):
    with pytest.raises(InputError):
        Sampling(**settings)


# A chain of drafts: the paper's acceptance.


def accept_many(p: torch.Tensor, q: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Drafts from p (L, V), tested against q (L + 1, V) that do not depend on the drafts, n = 20,000 times:
    drafts (n, L), how many are accepted (n,), the token after them (n,)."""
    keys, sampling, (p, q) = keys_for(20_000, len(q)), Sampling(1.0), (each.expand(20_000, -1, -1) for each in (p, q))
    drafts = sampling.draw(whole(p), keys[DRAFT, :, :-1])
    nodes, p = Shape(chain(p.shape[1])).on(CPU), torch.cat([p, torch.zeros_like(p[:, :1])], dim=1)
    last, next_token = accept(nodes, Drafts(drafts, p), whole(q), sampling, keys)
    return drafts, last, next_token  # node n of a chain is the n-th draft


def first_token(drafts: torch.Tensor, n_accepted: torch.Tensor, next_token: torch.Tensor) -> torch.Tensor:
    return torch.where(n_accepted > 0, drafts[:, 0], next_token)


def position_p_values(p: torch.Tensor, q: torch.Tensor) -> list[float]:
    """At each position, of the texts that got so far, chi-square against q."""
    drafts, n_accepted, next_token = accept_many(p, q)
    text = torch.cat([drafts, torch.zeros_like(drafts[:, :1])], dim=1)
    text[torch.arange(len(text)), n_accepted] = next_token
    return [p_value(text[n_accepted >= position, position], q[position]) for position in range(len(q))]


def test_what_comes_out_has_the_target_distribution_at_each_position():
    assert min(position_p_values(random_probs(2, seed=1), random_probs(3, seed=2))) > 1e-3


@pytest.mark.parametrize(
    "bug", ["u reused at all places", "u is that of the draw", "the residual's noise is the draw's"]
)
def test_noise_that_is_used_twice_is_caught(bug, monkeypatch):
    if bug == "u reused at all places":
        once = lambda key, token: uniform(key[:, :1].expand_as(key), token * 0)  # noqa: E731
        monkeypatch.setattr(minipass.trees, "uniform", once)
    elif bug == "u is that of the draw":
        monkeypatch.setattr(minipass.trees, "ACCEPTANCE", DRAFT)
    else:
        monkeypatch.setattr(minipass.trees, "TARGET", DRAFT)
    assert min(position_p_values(random_probs(2, seed=1), random_probs(3, seed=2))) < 1e-6


def test_a_draft_that_was_not_drawn_at_random_leaves_the_target_distribution_as_it_is():
    p, q = torch.eye(V)[4:5].double(), random_probs(2, seed=2)
    assert p_value(first_token(*accept_many(p, q)), q[0]) > 1e-3


def test_distributions_from_float32_logits_do_as_well():
    p, q = (Sampling(1.0).distribution(random_probs(n, seed=n).float().log()).probs for n in (1, 2))
    assert p_value(first_token(*accept_many(p, q)), q[0]) > 1e-3


# Whole texts, many of them.


def texts_z(n_runs: int = 12, n_texts: int = 40_000) -> tuple[float, float]:
    """Standard deviations by which two-pass texts under the rejection rule miss their enumerated distribution: the sum
    of the runs' chi-squares, which sees what a block of seeds has, and the chi-square of all runs as one, which sees
    what they have in common. One run alone hides a bias."""
    model = random_model(seed=5, std=0.5, vocab_size=5, block_size=16, n_layer=1, n_lookahead=2)
    prompt, engine = [1, 2, 3], Engine(model, TwoPass(2), Sampling(1.0))
    texts = sequence_probabilities(model, prompt, 4, temperature=1.0)
    number = {text: i for i, text in enumerate(texts)}
    expected, runs = torch.tensor(list(texts.values()), dtype=torch.float64), []
    for run in range(n_runs):
        tokens = engine.generate([prompt] * n_texts, 4, seed=run * n_texts).tokens
        runs.append(torch.tensor([number[tuple(text)] for text in tokens]))
    by_run = [sum(each) for each in zip(*(chi_square(run, expected) for run in runs), strict=True)]
    as_one = chi_square(torch.cat(runs), expected)
    return tuple((statistic - freedom) / math.sqrt(2 * freedom) for statistic, freedom in (by_run, as_one))


@pytest.mark.slow
def test_half_a_million_texts_in_blocks_of_seeds_have_exactly_the_enumerated_distribution():
    by_run, as_one = texts_z()
    assert abs(by_run) < 4
    assert abs(as_one) < 4


def test_settings_are_plain_floats_whatever_number_was_given():
    given = Sampling(Fraction(1, 2), top_p=1)
    assert (given.temperature, given.top_p) == (0.5, 1.0)
    assert {type(given.temperature), type(given.top_p)} == {float}
    assert given.distribution(torch.randn(2, 5)).probs.sum(-1).allclose(torch.ones(2).double())
