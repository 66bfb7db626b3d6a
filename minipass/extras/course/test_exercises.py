"""The graders of the exercises, easy to hard. Each message says what is wrong and what to look at, not how to do it.

What is expected never comes from a function that is to be written: slow references compute it here, row by row.
Texts, models and noise come from SEED, which a teacher's grading changes: answers known by heart are of no use.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain as in_turn
from itertools import islice, permutations, product, repeat
from unittest.mock import patch
from weakref import ref

import numpy as np
import pytest
import torch

from minipass import layout as layouts
from minipass import sampling as noise
from minipass.decode import Decoder, Method, Result, TwoPass, fused
from minipass.engine import Engine
from minipass.layout import CACHE_END, Layout, tree, with_groups
from minipass.losses import TV_SCALE, lookahead_loss, rows_after_cuts, training_pass
from minipass.model import GPT, DraftHead, GPTConfig, KVCache
from minipass.sampling import (
    ACCEPTANCE,
    COUPLED,
    REJECTION,
    TARGET,
    Distribution,
    Sampling,
    mix,
    reject,
    stream_keys,
    uniform,
)
from minipass.texts import Texts, Turn
from minipass.trees import Drafts, DraftTree, Shape, accept, chain

exercise_1, exercise_2, exercise_3, exercise_4, exercise_5, exercise_6 = (
    getattr(pytest.mark, f"exercise_{number}") for number in range(1, 7)
)
exercise_7, exercise_8, exercise_9, exercise_10, exercise_11 = (
    getattr(pytest.mark, f"exercise_{number}") for number in range(7, 12)
)

SEED = 0


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(1000 * SEED + seed)


@lru_cache
def tiny_model(vocab_size: int = 7, n_draft: int = 0) -> GPT:
    """A random float64 model with weights so large that its drafts are often accepted and often not."""
    model = GPT(GPTConfig(vocab_size, 48, n_layer=2, n_head=2, n_embd=8, n_lookahead=3, n_draft=n_draft)).double()
    numbers = generator(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=numbers)
    if n_draft:
        model.draft_head = SlowHead(model.draft_head)
    return model.eval()


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    """Numbers in [0, 1), float64."""
    return torch.rand(shape, generator=generator(seed), dtype=torch.float64)


def random_keys(*shape: int) -> torch.Tensor:
    return torch.randint(-(2**63), 2**63 - 1, shape, generator=generator())


def shuffled(*shape: int, seed: int = 0) -> torch.Tensor:
    """Along the last dimension the numbers from 0, each row in another order."""
    return random(*shape, seed=seed).argsort(-1)


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-6) -> bool:
    return a.shape == b.shape and torch.allclose(a.double(), b.double(), rtol=0, atol=tolerance)


def like(counts: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether counts of outcomes fit their probabilities: none is more than 5 standard deviations off, and 4 more, as
    what is rare comes in whole numbers; what has a probability of 0 does not come."""
    n = counts.sum()
    allowed = 5 * (n * expected * (1 - expected)).clamp(min=0).sqrt() + torch.where(expected > 1e-12, 4, 1e-6)
    return bool(((counts - n * expected).abs() <= allowed).all())


# 1. Distributions


def probabilities(logits: torch.Tensor, **settings) -> torch.Tensor:
    """What Sampling(..).distribution gives, of all tokens."""
    before = logits.clone()
    given = Sampling(**{"temperature": 1.0} | settings).distribution(logits)
    assert torch.equal(logits, before), "the logits that were given should not change"
    assert given.tokens.shape == given.probs.shape, "tokens and probs should have the same shape (..., K)"
    return given.dense(logits.shape[-1])


def slow_probabilities(
    logits: Sequence[float], temperature: float = 0.0, top_k: int | None = None, top_p: float | None = None
) -> list[float]:
    """One row: temperature, top-k, top-p, in this order, token by token. No two logits are the same."""
    likeliest = sorted(range(len(logits)), key=lambda token: -logits[token])[: top_k if temperature else 1]
    weights = [math.exp((logits[token] - logits[likeliest[0]]) / (temperature or 1.0)) for token in likeliest]
    probs, reached = [0.0] * len(logits), 0.0
    for token, weight in zip(likeliest, weights, strict=True):
        if top_p is None or reached < top_p:
            probs[token] = weight / sum(weights)
            reached += probs[token]
    return [prob / reached for prob in probs]


@exercise_1(1)
def test_temperature_divides_the_logits():
    logits = torch.randn(2, 3, 5, generator=generator())
    for temperature in (0.5, 1.0, 2.0):
        expected = (logits.double() / temperature).softmax(-1)
        result = probabilities(logits, temperature=temperature)
        assert close(result, expected, 1e-9), "not softmax(logits / temperature) over the last dimension, in float64"
    for settings in ((0.0,), (1.0,), (1.0, 2), (1.0, None, 0.5)):
        for n in (1, 3):
            given = Sampling(*settings).distribution(logits.bfloat16(), n)
            assert given.probs.dtype == torch.float64, "probs should be float64, whatever the logits are in"
            assert given.tokens.dtype == torch.int64, "tokens should be int64"


@exercise_1(1)
def test_temperature_0_is_greedy():
    logits = torch.tensor([[1.0, 3.0, 2.0, 0.0], [5.0, 5.0, 0.0, 1.0]])
    probs = probabilities(logits, temperature=0.0)
    assert probs[0].tolist() == [0, 1, 0, 0], "at temperature 0 the most likely token should have probability 1"
    assert sorted(probs[1].tolist()) == [0, 0, 0, 1], "at temperature 0 a tie should go to one token, not be shared"
    three = Sampling(0.0).distribution(logits, 3)
    assert three.tokens[0, :3].tolist() == [1, 2, 0], "at temperature 0, n: the n likeliest tokens, the likeliest first"
    expected = logits.double().softmax(-1).gather(-1, three.tokens)
    assert close(three.probs, expected, 1e-9), (
        "at temperature 0, n above 1: each token should have its probability at temperature 1, among all tokens"
    )


@exercise_1(1)
def test_a_tiny_temperature_gives_no_nan():
    logits = torch.tensor([1.0, 3.0, 2.0], dtype=torch.float64)
    for temperature, more in product((1e-30, 1e-309), ({}, {"top_k": 2}, {"top_p": 0.9})):
        probs = probabilities(logits, temperature=temperature, **more)
        assert probs.tolist() == [0, 1, 0], "logits / 1e-309 overflow: inf - inf is NaN. Make the largest logit 0 first"


@exercise_1(2)
def test_top_k_leaves_exactly_k_tokens():
    logits = torch.tensor([[0.0, 4.0, 1.0, 3.0], [1.0, 2.0, 4.0, 3.0]])
    expected = torch.zeros(2, 4).scatter(1, torch.tensor([[1, 3], [2, 3]]), torch.tensor([[4.0, 3.0]] * 2).softmax(1))
    assert close(probabilities(logits, top_k=2), expected), "top-k: the k likeliest of each row, made to sum to 1"
    for tied in (torch.zeros(5), torch.tensor([3.0, 1, 1, 1, 0])):
        n_left = (probabilities(tied, top_k=3) > 0).sum()
        assert n_left == 3, "top-k with ties should leave exactly k tokens: select by index, not by threshold"
    assert close(probabilities(logits, top_k=9), logits.softmax(-1)), "a top-k beyond the vocabulary changes nothing"
    given = Sampling(1.0, top_k=2).distribution(logits)
    assert given.tokens.tolist() == [[1, 3], [2, 3]], "with top-k, tokens should be the k likeliest, likeliest first"
    given = Sampling(1.0, top_k=2).distribution(logits, 3)
    assert given.tokens.tolist() == [[1, 3, 2], [2, 3, 1]], "n: at least n tokens should come, even if top_k is smaller"
    assert close(given.probs, torch.tensor([[4.0, 3.0, 1.0], [4.0, 3.0, 2.0]]).softmax(1)), "n tokens should sum to 1"
    assert Sampling(1.0, top_k=3).distribution(logits, 2).tokens.shape == (2, 3), "an n below top_k changes nothing"


@exercise_1(2)
def test_top_p_leaves_the_fewest_tokens_that_reach_p():
    probs = torch.tensor([0.15, 0.5, 0.05, 0.3])
    for top_p, n_left in ((0.1, 1), (0.45, 1), (0.55, 2), (0.75, 2), (0.85, 3), (1.0, 4)):
        result = probabilities(probs.log(), top_p=top_p)
        assert (result > 0).sum() == n_left, f"top-p {top_p} of .15, .5, .05, .3 should leave {n_left} tokens"
        expected = torch.tensor(slow_probabilities(probs.log().tolist(), 1.0, None, top_p))
        assert torch.equal(result > 0, expected > 0), (
            "top-p leaves the wrong tokens: are tokens and probs in one order?"
        )
        assert close(result, expected), "after top-p the tokens left should sum to 1 in proportion"
    for top_p, n_left in ((0.25, 1), (0.3, 2), (0.5, 2), (0.75, 3)):
        n = (probabilities(torch.zeros(2, 4), top_p=top_p) > 0).sum(-1)
        assert n.tolist() == [n_left] * 2, f"top-p {top_p} of four times 0.25 should leave {n_left}: mind ties, and '='"
    tied = probabilities(torch.tensor([0.25, 0.125, 0.5, 0.125]).log(), top_p=0.8)
    assert close(tied.sort().values, torch.tensor([0, 1, 2, 4]) / 7), "of two tied tokens top-p should keep one here"


@exercise_1(1)
def test_top_p_comes_after_temperature_and_top_k():
    probs = torch.tensor([0.4, 0.3, 0.2, 0.1])
    # Of the top two, 4/7 and 3/7, one reaches 0.55; of all four it takes two.
    both = probabilities(probs.log(), top_k=2, top_p=0.55)
    assert (both > 0).sum() == 1, "top-p should count the probabilities as top-k left them"
    cold = probabilities(probs.log(), temperature=0.25, top_p=0.7)
    assert (cold > 0).sum() == 1, "top-p should count the probabilities as the temperature left them"
    logits = 2 * random(3, 2, 9, seed=8)
    for temperature, top_k, top_p in product((0.3, 1.0, 2.0), (None, 1, 4, 9), (None, 0.2, 0.5, 0.9)):
        result = probabilities(logits, temperature=temperature, top_k=top_k, top_p=top_p)
        expected = [[slow_probabilities(row, temperature, top_k, top_p) for row in rows] for rows in logits.tolist()]
        assert close(result, torch.tensor(expected)), (
            f"wrong at temperature {temperature}, top-k {top_k}, top-p {top_p}"
        )


# 2. Mask and positions

PARENTS = [-1, 0, 1, 1, 3, 0, 5, -1, 7, 2, 4]


def ancestors(parents: Sequence[int], row: int) -> list[int]:
    """The row, its parent, its parent's parent and so on."""
    return [] if row == CACHE_END else [*ancestors(parents, parents[row]), row]


def slow_layout(parents: Sequence[int], lookahead: Sequence[int] = ()) -> Layout:
    """One tree's layout, row by row."""
    visible = torch.zeros(1, len(parents), len(parents), dtype=torch.bool)
    for row in range(len(parents)):
        visible[0, row, ancestors(parents, row)] = True
    return Layout(visible, visible.sum(-1) - 1, torch.tensor(lookahead, dtype=torch.int64))


def slow_layouts(parents: Sequence[Sequence[int]], lookahead: Sequence[int] = ()) -> Layout:
    """Each text's own."""
    each = [slow_layout(rows, lookahead) for rows in parents]
    visible, depth, (numbers, *_) = zip(*((one.visible, one.depth, one.lookahead) for one in each), strict=True)
    return Layout(torch.cat(visible), torch.cat(depth), numbers)


def causal(n_rows: int, n_lookahead: int = 0) -> Layout:
    """A path whose last rows are [LA]_1, [LA]_2, .."""
    return slow_layout(range(-1, n_rows + n_lookahead - 1), range(n_lookahead))


@contextmanager
def right_layouts() -> Iterator[None]:
    """`with_groups` is graded with a `tree` that is right."""

    def tree(parents: Sequence[int] | np.ndarray, lookahead: Sequence[int] | np.ndarray = ()) -> Layout:
        return slow_layouts(np.atleast_2d(parents).tolist(), np.asarray(lookahead).tolist())

    with patch.object(layouts, "tree", tree):
        yield


def with_hanging(parents: Sequence[int], anchors: Sequence[int], lengths: Sequence[int]) -> list[int]:
    """Parents of the real rows, and of the groups that hang from the anchors."""
    rows = list(parents)
    for anchor, length in zip(anchors, lengths, strict=True):
        for i in range(length):
            rows.append(anchor if i == 0 else len(rows) - 1)
    return rows


@exercise_2(1)
def test_a_path_is_the_causal_mask():
    visible = tree(np.arange(5) - 1).visible
    assert visible.dtype == torch.bool, "visible should be a bool tensor"
    assert visible.shape == (1, 5, 5), "for parents (R,), visible should have the shape (1, R, R)"
    assert visible[0].tolist() == torch.ones(5, 5).tril().bool().tolist(), "a path should be the causal lower triangle"


def random_parents(seed: int) -> list[int]:
    return [int(torch.randint(CACHE_END, row, (), generator=generator(seed + row))) for row in range(2 + seed % 12)]


@exercise_2(2)
def test_a_row_sees_its_ancestors_and_itself():
    for parents in (PARENTS, *map(random_parents, range(25))):
        visible = tree(parents).visible[0]
        for row in range(len(parents)):
            seen = visible[row].nonzero().flatten().tolist()
            assert seen == ancestors(parents, row), (
                f"parents {parents}: row {row} should see its ancestors and itself only"
            )


@exercise_2(1)
def test_a_rows_position_is_its_parents_plus_one():
    layout = tree(PARENTS, [0, 1])
    assert layout.depth.dtype == torch.int64, "depth should be an int64 tensor"
    for parents in (PARENTS, *map(random_parents, range(25))):
        expected = slow_layout(parents).depth
        same = torch.equal(tree(parents).depth, expected)
        assert same, "depth: a row's is its parent's plus one, and 0 after CACHE_END"
    assert layout.lookahead.tolist() == [0, 1], "the layout should carry `lookahead` as it was given"
    assert tree(PARENTS).lookahead.dtype == torch.int64, "lookahead should be int64, with nothing in it too"


@exercise_2(1)
def test_each_text_has_its_own_tree():
    parents = [[-1, 0, 1, 2], [-1, 0, 0, -1]]
    both = tree(parents)
    for b in range(2):
        alone = tree(parents[b])
        same = torch.equal(both.visible[b], alone.visible[0]) and torch.equal(both.depth[b], alone.depth[0])
        assert same, "parents (B, R) should give each text the tree that it has alone"


@exercise_2(1)
def test_a_parent_must_come_before_its_row():
    for parents in ([0], [-1, 2, 0], [-2], [[-1, 0], [-1, 1]]):
        try:
            tree(np.array(parents))
        except ValueError:
            continue
        except IndexError:
            pass
        raise AssertionError(f"parents {parents}: a parent that is no earlier row should be a ValueError")


@exercise_2(2)
@right_layouts()
def test_a_group_sees_what_its_anchor_sees_and_itself():
    for parents, n in ((range(-1, 3), 2), ([-1, 0, 0, 1, 1, 2], 2), ([-1], 3)):
        layout = with_groups(parents, range(len(parents)), n)
        rows = with_hanging(parents, range(len(parents)), [n] * len(parents))
        expected = slow_layout(rows)
        assert layout.visible.shape == expected.visible.shape, "there should be P rows, and then those of the groups"
        assert torch.equal(layout.depth, expected.depth), "LA_i of a group is i places after its anchor, i from 1"
        names = [f"real row {r}" for r in range(len(parents))]
        names += [f"LA_{i + 1} of group {g}" for g in range(len(parents)) for i in range(n)]
        for row, column in product(range(len(rows)), repeat=2):
            seen, right = layout.visible[0, row, column], expected.visible[0, row, column]
            assert seen == right, (
                f"real rows with parents {list(parents)}: {names[row]} should {'' if right else 'not '}"
                f"see {names[column]}"
            )


@exercise_2(1)
@right_layouts()
def test_groups_may_have_different_lengths_or_none():
    cases = [([-1, 0, 0, 2], range(4), each) for each in ([3, 0, 1, 2], [0, 2, 0, 0], np.zeros(4, dtype=np.int64))]
    for seed in range(25):
        parents, n = random_parents(seed), seed % 5
        anchors, lengths = (torch.randint(most, (n,), generator=generator(seed)) for most in (len(parents), 4))
        cases.append((parents, anchors.numpy(), lengths.tolist()))
    for parents, anchors, lengths in cases:
        layout = with_groups(parents, anchors, lengths)
        expected = slow_layout(with_hanging(parents, anchors, lengths))
        same = torch.equal(layout.visible, expected.visible) and torch.equal(layout.depth, expected.depth)
        assert same, f"n_lookahead {lengths}: each group should have its own length, and hang from its own anchor"
        ids = [i for length in lengths for i in range(length)]
        assert layout.lookahead.tolist() == ids, "lookahead: each group begins again with [LA]_1, which is 0"
        assert layout.lookahead.dtype == torch.int64, "lookahead should be int64, with nothing in it too"
    assert with_groups([-1, 0], [1], 3).lookahead.tolist() == [0, 1, 2], "n_lookahead may be one number for all groups"
    assert with_groups([-1, 0], [], 3).visible.shape == (1, 2, 2), "without anchors the real rows are all there is"


@exercise_2(1)
@right_layouts()
def test_each_text_has_its_own_anchors():
    anchors = np.array([[0, 3], [2, 2]])
    both = with_groups(range(-1, 3), anchors, 2)
    for b in range(2):
        alone = slow_layout(with_hanging(range(-1, 3), anchors[b], [2, 2]))
        same = torch.equal(both.visible[b], alone.visible[0]) and torch.equal(both.depth[b], alone.depth[0])
        assert same, "anchors (B, G) should give each text the layout that it has alone"


# 3. The cache


def ragged_cache() -> KVCache:
    """Of three texts, 9 slots, what is in it are random numbers."""
    cache = KVCache(GPTConfig(5, 16, 2, 2, 8, 0), batch_size=3, max_len=9, dtype=torch.float64)
    cache.pairs.copy_(random(*cache.pairs.shape))
    cache.length.copy_(torch.tensor([4, 0, 2]))
    return cache


LAYOUTS = [causal(3), slow_layout([-1, 0, 0]), slow_layout([-1, -1, 1]), causal(5), causal(1), causal(1, 3)]


@exercise_3(1)
def test_every_row_sees_what_is_in_the_cache():
    cache = ragged_cache()
    for lengths, layout in product(([4, 0, 2], [0, 4, 3]), LAYOUTS):
        cache.length.copy_(torch.tensor(lengths))
        mask = cache.mask(layout)
        assert mask.shape == (3, layout.visible.shape[1], 9), "the mask should have the shape (B, R, max_len)"
        assert mask.dtype == cache.pairs.dtype, "the mask is added to scores: it should have the dtype of `pairs`"
        for b, length in enumerate(lengths):
            assert (mask[b, :, :length] == 0).all(), (
                "all rows should see (0) all slots before `length`, each text its own"
            )


@exercise_3(1)
def test_rows_see_each_other_as_the_layout_says_and_nothing_after_them():
    cache = ragged_cache()
    for lengths, layout in product(([4, 0, 2], [0, 4, 3]), LAYOUTS):
        cache.length.copy_(torch.tensor(lengths))
        mask, n_rows = cache.mask(layout), layout.visible.shape[1]
        assert ((mask == 0) | (mask == -torch.inf)).all(), "the mask should be 0 where a row sees a slot, else -inf"
        for b, length in enumerate(lengths):
            own = mask[b, :, length : length + n_rows] == 0
            assert torch.equal(own, layout.visible[0]), "this pass's slots should be seen as the layout says"
            after = mask[b, :, length + n_rows :]
            assert (after == -torch.inf).all(), "slots after this pass hold garbage: no row should see them"


@exercise_3(1)
def test_each_text_may_have_a_layout_of_its_own():
    cache = ragged_cache()
    for seed in (3, 39, 75, 2, 1):
        layout = slow_layouts([random_parents(seed + 12 * b) for b in range(3)])
        mask, n_rows = cache.mask(layout), layout.visible.shape[1]
        for b, length in enumerate(cache.length.tolist()):
            own = mask[b, :, length : length + n_rows] == 0
            assert torch.equal(own, layout.visible[b]), (
                "a layout's first dimension may be B: each text then has its own, which may be another one at each call"
            )
        held = ref(layout)
        del layout
        assert held() is None, "a turn may bring a new layout: `masks` should not hold one that is gone (weak keys)"


@exercise_3(2)
def test_keys_and_values_go_into_their_slots_and_nowhere_else():
    cache = ragged_cache()
    pairs = 1e6 * random(3, 3, 2, 2, 4, seed=1)  # (B, R, 2, n_head, head_dim)
    expected = cache.pairs.clone()
    for b, length in enumerate(cache.length.tolist()):
        expected[1, b, length : length + 3] = pairs[b]
    stored = cache.store(1, cache.slots(3), pairs)
    right = torch.equal(cache.pairs, expected)
    assert right, "pairs should go into `slots` of that layer, each text's own, and change nothing else"
    assert torch.equal(stored, expected[1]), "store should return all pairs of the layer, old ones too"
    assert cache.length.tolist() == [4, 0, 2], "`length` is for the caller to move"


@exercise_3(2)
def test_gathered_rows_come_to_the_front_of_the_pass():
    for rows in ([[0, 2, 4], [0, 1, 3], [0, 1, 2]], [[2, 0, 1], [4, 3, 2], [1, 2, 0]], [[3], [0], [4]]):
        cache = ragged_cache()
        before, expected = cache.pairs.clone(), cache.pairs.clone()
        for b, length in enumerate(cache.length.tolist()):
            for place, row in enumerate(rows[b]):
                expected[:, b, length + place] = before[:, b, length + row]
        cache.gather(torch.tensor(rows))
        assert torch.equal(cache.pairs, expected), (
            f"gather {rows}: in all layers each text's rows, counted from its `length`, should come to the front in "
            "this order, and nothing else change. Is a slot read after it was overwritten?"
        )
        assert cache.length.tolist() == [4, 0, 2], "`length` is for the caller to move"


@exercise_3(1)
@torch.no_grad()
def test_rolling_back_is_setting_the_length():
    model = deepcopy(tiny_model()).float()
    cache = KVCache(model.config, 1, 20)
    cache.pairs.fill_(1e3)
    for rows, n_kept in (([1, 2, 3, 4], 2), ([5, 6, 0, 1, 2], 1), ([3], 1)):
        logits = model(torch.tensor([rows]), causal(len(rows)), cache)
        cache.length += n_kept
    expected = model(torch.tensor([[1, 2, 5, 3]]))[:, -1:]
    assert close(logits, expected, 1e-3), "rows dropped by setting `length` still change what later passes compute"


# 4. Noise and the race

N = 20_000
UNMIXED = (0, -0x3065FB5005945240)  # mix makes 64 bits 0 of the first, 64 bits 1 of the second


@exercise_4(1)
def test_a_random_number_is_never_0_or_1():
    u = uniform(random_keys(N), torch.arange(3).expand(N, 3))
    assert u.shape == (N, 3), "key (...) and token (..., K) should give a number for each token, (..., K)"
    assert u.dtype == torch.float64, "numbers should be float64"
    assert ((u > 0) & (u < 1)).all(), "numbers should lie in (0, 1): what does >> do with a negative number?"
    edges = uniform(torch.tensor(UNMIXED), torch.zeros(2, 1, dtype=torch.int64))
    assert ((edges > 0) & (edges < 1)).all(), "where all bits are 0 or 1, rounding should not make the number 0 or 1"


@exercise_4(2)
def test_random_numbers_are_uniform_and_depend_on_key_and_token_alone():
    keys, tokens = random_keys(N), torch.tensor([0, 1, 2, 1000])
    u = uniform(keys, tokens.expand(N, 4))
    flat = torch.full((16,), 1 / 16, dtype=torch.float64)
    cells = (u * 4).long().clamp(0, 3)
    for i in range(4):
        counts = torch.bincount((u[:, i] * 16).long().clamp(0, 15), minlength=16)
        assert like(counts, flat), "numbers should be uniform: do they use the upper bits of the hash?"
        both = torch.bincount(cells[:, i] * 4 + cells[:, (i + 1) % 4], minlength=16)
        assert like(both, flat), "the numbers of two tokens should be independent: hash key and token together"
        along = torch.bincount(cells[:-1, i] * 4 + cells[1:, i], minlength=16)
        assert like(along, flat), "the numbers of two keys should be independent: hash key and token together"
    fine = (uniform(keys[:1], torch.arange(4096)[None]) * 2.0**48).long() % 2**24
    assert fine.unique().numel() > 4090, "all tokens should have numbers of their own, close ones too, of all 53 bits"
    alone = uniform(keys[7:9].flip(0), tokens.flip(0).expand(2, 4))
    assert torch.equal(alone, u[7:9].flip(0, 1)), "a number should depend on its own key and token, on nothing else"


def spread(probs: list[float], tokens: list[int], n: int = N) -> Distribution:
    """The same distribution n times."""
    return Distribution(torch.tensor(tokens).expand(n, -1), torch.tensor(probs, dtype=torch.float64).expand(n, -1))


@contextmanager
def right_noise() -> Iterator[None]:
    """`Sampling.race` is graded with a `uniform` that is right."""

    def uniform(key: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
        return ((mix(key[..., None] + token) >> 11) % 2**53 | 1).double() * 2.0**-53

    with patch.object(noise, "uniform", uniform):
        yield


def first(n: int, given: Distribution, keys: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """The first n tokens of each race, (..., n)."""
    race = Sampling(temperature).race(given, keys, n)
    assert race.tokens.shape == race.probs.shape == (*keys.shape, n), (
        "a race should give n tokens of each distribution, and a number with each: (..., n)"
    )
    return race.tokens


@exercise_4(2)
@right_noise()
def test_a_token_is_drawn_with_its_probability():
    probs, tokens = torch.tensor([0.1, 0.4, 0.0, 0.3, 0.2], dtype=torch.float64), [3, 0, 4, 2, 1]
    for scale in (1.0, 0.01, 20.0):
        drawn = first(1, spread((scale * probs).tolist(), tokens), random_keys(N))
        counts = torch.bincount(drawn[:, 0], minlength=5)[torch.tensor(tokens)]
        assert like(counts, probs), "tokens are not drawn with their probabilities (which may have any sum)"
    some, keys = spread([0.5, 0.3, 0.2], [0, 1, 2], 60), random_keys(60)
    drawn = first(1, some, keys)
    assert len(drawn.unique()) == 3, "each row should have the noise of its own key"
    for row, key in enumerate(keys):  # as texts that are decoded alone do, call after call
        alone = first(1, Distribution(some.tokens[:1], some.probs[:1]), key[None])
        assert alone == drawn[row], (
            "a draw should depend on its own key alone: not on its place in the batch, and not on the calls before"
        )
    for n in (1, 2):
        greedy = first(n, spread([0.5, 0.3, 0.2], [3, 1, 2], 60), keys, temperature=0.0)
        assert greedy.tolist() == [[3, 1][:n]] * 60, "at temperature 0 the first n tokens should come, without noise"


def agreement(p: Sequence[float], q: Sequence[float]) -> float:
    """The probability that one token wins both races with the same noise (Daliri, Musco, Suresh)."""
    tokens = [token for token in range(len(p)) if p[token] and q[token]]
    return sum(1 / sum(max(p[y] / p[x], q[y] / q[x]) for y in range(len(p))) for x in tokens)


@exercise_4(1)
@right_noise()
def test_the_same_noise_makes_similar_distributions_draw_the_same_token():
    p, q, keys = [0.5, 0.3, 0.1, 0.1], [0.3, 0.35, 0.3, 0.05], random_keys(N)
    drawn, order = first(1, spread(p, [0, 1, 2, 3]), keys), [2, 0, 3, 1]
    again = first(1, spread([p[i] for i in order], order), keys)
    assert torch.equal(drawn, again), "the noise is a token's own: it should not matter where in the list a token is"
    other = first(1, spread([q[i] for i in order], order), keys)
    agree = agreement(p, q)
    counts = torch.bincount((drawn == other)[:, 0].long(), minlength=2)
    expected = torch.tensor([1 - agree, agree], dtype=torch.float64)
    assert like(counts, expected), "in a race with one noise, p and q should draw the same token as often as can be"
    probs, left = random(60, 4) + 0.1, (shuffled(60, 4) + 1).double() * 2.0**-40  # 1 - u, which float32 would make 0

    def uniform(key: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
        return 1 - left.gather(-1, token)

    with patch.object(noise, "uniform", uniform):
        drawn = first(1, Distribution(shuffled(60, 4, seed=1), probs), keys[:60])
    order = shuffled(60, 4, seed=1)
    expected = order.gather(-1, (probs / left.gather(-1, order)).argmax(-1, keepdim=True))
    assert torch.equal(drawn, expected), "the largest probs / e should win, e = -log(u) in float64, u the token's own"


@exercise_4(1)
@right_noise()
def test_n_tokens_are_drawn_without_replacement():
    probs, tokens, keys = [0.45, 0.3, 0.0, 0.25], [2, 0, 3, 1], random_keys(N)
    for n in (2, 3):
        drawn = first(n, spread(probs, tokens), keys)
        expected = torch.zeros([4] * n, dtype=torch.float64)
        for order in permutations(range(4), n):
            left = [1 - sum(probs[i] for i in order[:rank]) for rank in range(n)]
            expected[tuple(tokens[i] for i in order)] = math.prod(probs[i] for i in order) / math.prod(left)
        counts = torch.bincount((drawn * 4 ** torch.arange(n - 1, -1, -1)).sum(1), minlength=4**n)
        assert like(counts, expected.flatten()), "n tokens should be those that win the race, the second, and so on"
        one = first(1, spread(probs, tokens), keys)
        assert torch.equal(drawn[:, :1], one), "the first of n tokens should be the one that comes for n = 1"
    given, keys = spread(probs, tokens, 60), random_keys(60)
    drawn = first(2, Distribution(*(each.view(20, 3, 4) for each in given)), keys.view(20, 3))
    expected = first(2, given, keys).view(20, 3, 2)
    assert torch.equal(drawn, expected), "there may be more dimensions: tokens (B, m, K), keys (B, m)"


@exercise_4(1)
@right_noise()
def test_a_place_in_the_race_comes_with_its_share_of_all_speeds():
    probs, keys = random(60, 5).where(random(60, 5, seed=1) < 0.8, 0.0) + random(60, 1, seed=2), random_keys(60)
    given = Distribution(shuffled(60, 5, seed=3), probs)
    speed = probs / -noise.uniform(key=keys, token=given.tokens).log()
    share = Distribution(given.tokens, speed / speed.sum(-1, keepdim=True)).dense(5)
    for n in (1, 3, 5):
        race = Sampling(1.0).race(given, keys, n)
        assert race.probs.dtype == torch.float64, "shares should be float64"
        assert close(race.probs, share.gather(-1, race.tokens), 1e-9), (
            "the number with a token should be its own speed probs / e, divided by the speeds of all K tokens together"
        )
        greedy = Sampling(0.0).race(given, keys, n)
        same = torch.equal(greedy.probs, probs[:, :n])
        assert same, "at temperature 0 the first n tokens should come with their probabilities, as they were given"


# 5. The acceptance rule


def slow_reject(draft: int, p: torch.Tensor, q: torch.Tensor) -> tuple[float, torch.Tensor]:
    """One test, with p and q (V,): the probability to accept, and the residual."""
    p = p / p.sum() if p.sum() > 0 else p
    if p[draft] == 0:
        return 0.0, q
    residual = (q - p).clamp(min=0)
    return min(1.0, float(q[draft] / p[draft])), residual / residual.sum() if residual.sum() > 0 else q


def grade_reject(message: str, p: torch.Tensor, tokens: torch.Tensor, probs: torch.Tensor, what: str) -> None:
    """One call for drafts of all kinds, against one test after the other. p (B, n, V), tokens and probs (B, n, K)."""
    n_batch, n, vocab_size = p.shape
    drafts, u = some_drafts(p), random(n_batch, n, seed=5)
    accepted, residual, rest = reject(drafts, p.clone(), Distribution(tokens, probs.clone()), u)
    assert accepted.shape == (n_batch, n) and residual.shape == probs.shape and rest.shape == p.shape, (
        "reject should return (B, n), (B, n, K) and (B, n, V)"
    )
    for b, i in product(range(n_batch), range(n)):
        probability, left = slow_reject(drafts[b, i], p[b, i], Distribution(tokens, probs).dense(vocab_size)[b, i])
        if what == "accepted":
            assert accepted[b, i] == (u[b, i] < probability), message
        if what == "residual":
            assert close(residual[b, i], left[tokens[b, i]], 1e-9), message
        if what == "rest":
            expected = p[b, i].clone()
            expected[drafts[b, i]] = 0
            assert close(rest[b, i] / rest[b, i].sum(), expected / expected.sum(), 1e-9), message


def some_drafts(p: torch.Tensor) -> torch.Tensor:
    """Drafts (B, n) for p (B, n, V), whatever their p."""
    return torch.randint(p.shape[-1], p.shape[:-1], generator=generator())


def same_tests(one: tuple[torch.Tensor, ...], other: tuple[torch.Tensor, ...]) -> bool:
    """Whether two calls of `reject` accept the same, and leave the same of p and q."""
    left = [each / each.sum(-1, keepdim=True) for each in (*one[1:], *other[1:])]
    return torch.equal(one[0], other[0]) and close(left[0], left[2], 1e-9) and close(left[1], left[3], 1e-9)


def dense_case() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """p (60, 3, 5), and q of all tokens in their order."""
    p, q = random(60, 3, 5, seed=1) ** 3, random(60, 3, 5, seed=2) ** 3
    return p / p.sum(-1, keepdim=True), torch.arange(5).expand(60, 3, 5), q / q.sum(-1, keepdim=True)


@exercise_5(2)
def test_a_draft_is_accepted_with_the_ratio_of_its_probabilities():
    message = "a draft d should be accepted where u < min(1, q(d) / p(d)), each with its own u, p and q"
    grade_reject(message, *dense_case(), what="accepted")
    p = torch.tensor([[[0.5, 0.25, 0.25]]], dtype=torch.float64)
    q, largest = Distribution(torch.arange(3)[None, None], p), torch.full((1, 1), 1 - 2.0**-53, dtype=torch.float64)
    assert reject(torch.tensor([[1]]), p, q, largest)[0].all(), "where p = q all drafts should be accepted"


@exercise_5(2)
def test_what_is_left_of_q_is_the_residual():
    message = "the residual should be normalize(max(0, q - p)), at each place its own"
    grade_reject(message, *dense_case(), what="residual")


@exercise_5(1)
def test_what_is_left_of_p_is_p_without_the_draft():
    grade_reject("the third result should be p with a 0 in place of the draft", *dense_case(), what="rest")
    p, tokens, probs = dense_case()
    p = 3 * p
    given = p.clone(), probs.clone()
    reject(some_drafts(p), p, Distribution(tokens, probs), random(60, 3))
    assert torch.equal(p, given[0]) and torch.equal(probs, given[1]), "p and q, as they were given, should not change"


@exercise_5(2)
def test_q_may_list_its_tokens_in_any_order_and_p_may_have_any_sum():
    p, tokens, _ = dense_case()
    drafts, u, probs = some_drafts(p), random(60, 3, seed=5), random(60, 3, 3, seed=3)
    q = Distribution(shuffled(60, 3, 5)[..., :3], probs / probs.sum(-1, keepdim=True))
    accepted, residual, rest = reject(drafts, p.clone(), Distribution(tokens, q.dense(5)), u)
    assert same_tests(reject(drafts, p.clone(), q, u), (accepted, residual.gather(-1, q.tokens), rest)), (
        "q.probs are of q.tokens, K of the V tokens in any order: look for the draft there, and take p of these"
    )
    assert same_tests(
        reject(drafts, p * 10 * random(60, 3, 1, seed=4), Distribution(tokens, q.dense(5)), u),
        (accepted, residual, rest),
    ), "p need not be normalised: it is what siblings tested before have left"


@exercise_5(1)
def test_a_draft_that_was_never_drawn_leaves_q_as_it_is():
    p, tokens, probs = dense_case()
    drafts = some_drafts(p)
    p = p.scatter(-1, drafts[..., None], 0.0)
    p[0] = 0
    p = p / p.sum(-1, keepdim=True).clamp(min=1e-9)
    accepted, residual, _ = reject(drafts, p, Distribution(tokens, probs), random(60, 3))
    left = not accepted.any() and close(residual, probs, 1e-9)
    assert left, "a draft whose p is 0 should not be accepted, and should leave q as it is"


@exercise_5(1)
def test_a_residual_of_zeros_is_q():
    p = torch.tensor([0.5, 0.25, 0.125, 0.125], dtype=torch.float64).repeat(60, 3, 1)  # which sum to 1 exactly
    given = Distribution(torch.arange(4).expand(60, 3, -1), p)
    accepted, residual, _ = reject(given.tokens[..., 1], p.clone(), given, random(60, 3))
    assert accepted.all(), "where p = q all drafts should be accepted"
    assert residual.isfinite().all() and close(residual, p), "where q - p leaves nothing, q should be left"


@exercise_5(1)
def test_accepted_drafts_and_the_residual_add_up_to_q():
    n = 2000  # values of u, evenly spaced
    u = ((torch.arange(n).double() + 0.5) / n).expand(5, n)
    p, q = torch.tensor([[0.5, 0.2, 0.2, 0.1, 0.0], [0.1, 0.3, 0.1, 0.2, 0.3]], dtype=torch.float64)
    drafts, given = (
        torch.arange(5)[:, None].expand(5, n),
        Distribution(torch.arange(5).expand(5, n, 5), q.expand(5, n, 5)),
    )
    accepted, residual, _ = reject(drafts, p.repeat(5, n, 1), given, u)
    residual = residual / residual.sum(-1, keepdim=True)
    made = torch.where(accepted[..., None], torch.eye(5).double()[drafts], residual).mean(1)  # (draft, token)
    assert close((p[:, None] * made).sum(0), q, 2e-3), "drafts from p, accepted or replaced, should be distributed as q"


# 6. Acceptance along a tree

CPU = torch.device("cpu")
FORKED = DraftTree((0, 0, 0, 1, 1, 2, 4))


class Pointed(Sampling):
    """Draws the token in the slot that the key names: what is drawn is known beforehand."""

    def draw(self, given: Distribution, key: torch.Tensor) -> torch.Tensor:
        return given.tokens.gather(-1, key[..., None]).squeeze(-1)


def children(drafts: DraftTree, node: int) -> list[int]:
    return [i for i, parent in enumerate(drafts.parents, 1) if parent == node]


def way(drafts: DraftTree, node: int) -> list[int]:
    """The nodes from the root to this one."""
    return ancestors([CACHE_END, *drafts.parents], node)


def random_tree(seed: int) -> DraftTree:
    """Of 1 to 8 drafts, with no more than 4 siblings."""
    parents, depth, numbers = [], [0], generator(seed)
    for _ in range(int(torch.randint(1, 9, (), generator=numbers))):
        fits = [node for node, d in enumerate(depth) if d + 1 >= depth[-1] and parents.count(node) < 4]
        parents.append(fits[int(torch.randint(len(fits), (), generator=numbers))])
        depth.append(depth[parents[-1]] + 1)
    return DraftTree(parents)


def trees() -> list[DraftTree]:
    """Of all kinds."""
    return [DraftTree(), chain(3), FORKED, *map(random_tree, range(12))]


def random_drafts(drafts: DraftTree, n_batch: int, vocab_size: int) -> torch.Tensor:
    """Tokens (B, N); those of siblings differ."""
    return torch.stack([
        shuffled(n_batch, vocab_size, seed=parent)[:, rank]
        for parent, rank in zip(drafts.parents, drafts.rank, strict=True)
    ], dim=1) if drafts.parents else torch.zeros(n_batch, 0, dtype=torch.int64)  # fmt: skip


def grade_coupled(drafts: DraftTree, message: str, n_kept: int | None = None) -> None:
    """n_kept: each text has nodes of its own, so many; None: all share the tree."""
    n_batch, nodes = 100, Shape(drafts).on(CPU)
    tokens = random_drafts(drafts, n_batch, 5)
    if n_kept:
        nodes = nodes.likeliest(n_kept, random(*tokens.shape, seed=8))
        tokens = tokens.gather(1, nodes.kept[:, 1:] - 1)
    n_nodes, own = 1 + tokens.shape[1], list(map(DraftTree, nodes.parents.tolist()))
    q = Distribution(shuffled(n_batch, n_nodes, 5, seed=7), torch.full((n_batch, n_nodes, 5), 0.2).double())
    keys = torch.randint(5, (3, n_batch, n_nodes), generator=generator())
    reached = torch.zeros(n_batch, dtype=torch.int64)
    for b in range(n_batch):
        for node in range(n_nodes):
            here = q.tokens[b, node].tolist()
            below = {int(tokens[b, child - 1]): child for child in children(own[b % len(own)], node)}
            if reached[b] == node:
                reached[b] = below.get(here[keys[TARGET, b, node]], node)
            else:  # no draft is right after one that is not: another grader looks at these
                keys[TARGET, b, node] = next(slot for slot, token in enumerate(here) if token not in below)
    last, next_token = accept(nodes, Drafts(tokens), q, Pointed(1.0), keys)
    assert last.shape == next_token.shape == (n_batch,), "the last accepted node and the next token should be (B,)"
    assert torch.equal(last, reached), message
    expected = [int(q.tokens[b, node, keys[TARGET, b, node]]) for b, node in enumerate(reached.tolist())]
    assert next_token.tolist() == expected, "the next token is what the target draws after the last accepted node"


@exercise_6(2)
def test_the_coupled_rule_accepts_what_the_target_draws():
    for drafts in trees():
        grade_coupled(
            drafts,
            "coupled: a draft is accepted if it is what the target draws after its parent, with the TARGET noise of "
            "that place; the root always is",
        )


@exercise_6(1)
def test_each_text_may_have_nodes_of_its_own():
    for drafts in trees()[1:]:
        grade_coupled(
            drafts,
            "coupled: the first dimension of `parents` and `elsewhere` is B where each text has nodes of its own",
            n_kept=(1 + len(drafts.parents)) // 2,
        )


@exercise_6(1)
def test_the_greedy_rule_accepts_up_to_the_first_wrong_draft():
    q = Distribution(torch.tensor([[[3], [2], [4]], [[1], [2], [4]]]), torch.ones(2, 3, 1).double())
    for tokens, n_accepted, expected in (([3, 2], 2, 4), ([3, 0], 1, 2), ([0, 2], 0, 3)):
        drafts = Drafts(torch.tensor([tokens, [0, 0]]))
        keys = torch.zeros(3, 2, 3, dtype=torch.int64)
        last, next_token = accept(Shape(chain(2)).on(CPU), drafts, q, Sampling(), keys)
        assert last.tolist() == [n_accepted, 0], "nothing after the first wrong draft may be accepted, even if it fits"
        assert next_token.tolist() == [expected, 1], "the next token is the target's after the last accepted draft"


def law(drafts: DraftTree, tokens: list[int], p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """The probability of each (last accepted node, next token), (1 + N, V), under the rejection rule."""
    result = torch.zeros_like(q)

    def visit(node: int, reached: float) -> None:
        left, p_left = q[node], p[node].clone()
        for child in children(drafts, node):
            probability, residual = slow_reject(tokens[child - 1], p_left, left)
            visit(child, reached * probability)
            reached, left = reached * (1 - probability), residual
            p_left[tokens[child - 1]] = 0
        result[node] += reached * left

    visit(0, 1.0)
    return result


def slow_draw(probs: torch.Tensor, key: torch.Tensor) -> int:
    """The token of probs (V,) that wins the race."""
    return int((probs / -uniform(key, torch.arange(len(probs))).log()).argmax())


def slow_accept(
    drafts: DraftTree, tokens: list[int], p: torch.Tensor, q: torch.Tensor, keys: torch.Tensor
) -> tuple[int, int]:
    """One text under the rejection rule, test by test. p, q: (1 + N, V); keys: (3, 1 + N)."""
    node = 0
    while True:
        left, p_left = q[node], p[node].clone()
        for child in children(drafts, node):
            token = torch.tensor([tokens[child - 1]])
            probability, residual = slow_reject(int(token), p_left, left)
            if uniform(keys[ACCEPTANCE, node], token) < probability:
                node = child
                break
            left, p_left = residual, p_left.scatter(0, token, 0.0)
        else:
            return node, slow_draw(left, keys[TARGET, node])


@exercise_6(2)
def test_the_random_numbers_of_a_test_and_of_a_draw_are_those_of_their_place():
    drafts, n_batch, n_compared = chain(3), 200, 0
    tokens, keys = random_drafts(drafts, n_batch, 5), random_keys(3, n_batch, 4)
    p, listed = random(n_batch, 4, 5, seed=1) ** 2, shuffled(n_batch, 4, 5, seed=3)[..., :4]
    q = torch.zeros_like(p).scatter(-1, listed, random(n_batch, 4, 4, seed=2) ** 2)
    p, q = p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)
    given = Distribution(listed, q.gather(-1, listed))
    last, next_token = accept(Shape(drafts).on(CPU), Drafts(tokens, p.clone()), given, Sampling(1.0), keys)
    for b in range(n_batch):
        node, expected = slow_accept(drafts, tokens[b].tolist(), p[b], q[b], keys[:, b])
        below = [slow_accept(chain(1), [token], p[b, i:], q[b, i:], keys[:, b, i:])[0]
                 for i, token in enumerate(tokens[b].tolist()) if i > node]  # fmt: skip
        if not any(below):  # else the way matters, which another grader looks at
            assert last[b] == node and (node < 3 or next_token[b] == expected), (
                "the last node or the next token is wrong. Is each test's number `uniform` of the parent's ACCEPTANCE "
                "key and the draft, and the draw after a node with the node's own TARGET key? If other points of this "
                "exercise are lost, look there first"
            )
            n_compared += 1
    assert n_compared


def grade_rejection(drafts: DraftTree, message: str, next_too: bool = True) -> None:
    n_nodes, vocab_size = len(drafts.depth), 6
    share = torch.linspace(0.1, 0.9, n_nodes).double()[:, None]  # each node has its own p and q
    p = torch.cat([torch.tensor([[0.3, 0.25, 0.2, 0.15]] * n_nodes).double(), 0.1 * share, 0.1 * (1 - share)], dim=1)
    q = torch.cat([torch.tensor([[0.1, 0.3, 0.0, 0.2]] * n_nodes).double(), 0.4 * (1 - share), 0.4 * share], dim=1)
    p, q = p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)
    listed = torch.tensor([3, 0, 5, 1, 4]).expand(n_nodes, -1)  # not token 2, which has a q of 0
    for by_rank in ((0, 3, 5), (1, 3, 4)):
        tokens = torch.tensor([by_rank[rank] for rank in drafts.rank])
        given = Distribution(listed.repeat(N, 1, 1), q.gather(-1, listed).repeat(N, 1, 1))
        proposed, keys = Drafts(tokens.expand(N, -1), p.repeat(N, 1, 1)), random_keys(3, N, n_nodes)
        last, next_token = accept(Shape(drafts).on(CPU), proposed, given, Sampling(1.0), keys)
        counts = torch.bincount(last * vocab_size + next_token, minlength=n_nodes * vocab_size).view(n_nodes, -1)
        expected = law(drafts, tokens.tolist(), p, q)
        assert like(counts.sum(1), expected.sum(1)), f"{message} are not accepted as often as they should be"
        assert not next_too or like(counts.flatten(), expected.flatten()), (
            f"{message}: the next token should come from what is left of q after the last accepted node: the residual "
            "after a rejection, q itself after a leaf"
        )


@exercise_6(2)
def test_the_rejection_rule_tests_a_draft_or_leaves_the_residual():
    grade_rejection(chain(1), "drafts under the rejection rule")
    p, tokens, probs = dense_case()
    given = p.clone(), probs.clone()
    accept(Shape(chain(2)).on(CPU), Drafts(some_drafts(p)[:, 1:], p), Distribution(tokens, probs), Sampling(1.0),
           random_keys(3, 60, 3))  # fmt: skip
    assert torch.equal(p, given[0]) and torch.equal(probs, given[1]), "p and q, as they were given, should not change"


@exercise_6(2)
def test_the_rejection_rule_tests_siblings_one_after_the_other():
    grade_rejection(DraftTree((0, 0, 0)), "siblings under the rejection rule")


@exercise_6(2)
def test_the_rejection_rule_accepts_nothing_after_a_draft_that_is_rejected():
    grade_rejection(chain(3), "drafts of a chain under the rejection rule", next_too=False)
    grade_rejection(FORKED, "drafts of a tree under the rejection rule", next_too=False)


# 7. The coupled rule


def at_places(starts: Sequence[int], lengths: Sequence[int], temperature: float = 0.7) -> tuple[Decoder, torch.Tensor]:
    """A decoder whose texts are there, and the keys (3, B, 1) of their seeds."""
    decoder = Decoder([tiny_model()], Sampling(temperature), COUPLED, len(starts), 20)
    keys = stream_keys(torch.arange(len(starts)) + SEED)
    decoder.start.copy_(torch.tensor(starts)), decoder.cache.length.copy_(torch.tensor(lengths))
    decoder.keys.copy_(keys)
    return decoder, keys


@exercise_7(1)
def test_noise_has_a_key_for_each_stream_text_and_depth():
    for temperature, depth in product((0.0, 0.7), (0, 1, 4)):
        keys = at_places([0, 5], [3, 0], temperature)[0].noise(depth)
        assert keys.shape == (3, 2, 1 + depth), "keys should be (3, B, 1 + depth), at temperature 0 too"
        assert keys.dtype == torch.int64, "keys should be int64"


@exercise_7(2)
def test_a_key_is_the_hash_of_a_seeds_stream_and_the_place_in_the_text():
    starts, lengths = [0, 0, 7, 100], [0, 5, 3, 11]
    decoder, keys = at_places(starts, lengths)
    given = decoder.noise(3)
    for stream, b, depth in product(range(3), range(4), range(4)):
        place = starts[b] + lengths[b] + 1 + depth  # the root is at start + length
        assert given[stream, b, depth] == mix(keys[stream, b] + place), (
            "a key should be `mix` of the text's own stream key plus the position in the text of the token after so "
            "many drafts: what is at `length`, and where does the context begin?"
        )
    unchanged = decoder.cache.length.tolist() == lengths and torch.equal(decoder.keys, keys)
    assert unchanged, "noise only reads: length and keys should not change"


@exercise_7(1)
def test_a_place_has_its_noise_whatever_came_before():
    for n_accepted in (0, 2):
        decoder, _ = at_places([0, 4], [6, 2])
        before = decoder.noise(4)
        decoder.cache.length += 1 + n_accepted  # as a turn counts in the root and accepted drafts
        after = decoder.noise(4)
        assert torch.equal(after[..., : 3 - n_accepted], before[..., 1 + n_accepted : 4]), (
            "the noise of a place should be the same in whatever turn it comes"
        )
    moved = at_places([6, 4], [0, 2])[0].noise(4)
    assert torch.equal(moved, before), "a context that begins later in its text should not change a place's noise"


# 8. The draft head


def new_head(n_embd: int = 4, n_draft: int = 5) -> DraftHead:
    """A draft head with random weights that say much."""
    head, numbers = DraftHead(GPTConfig(7, n_embd=n_embd, n_head=1, n_draft=n_draft)).double(), generator(3)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_(generator=numbers)
    return head


class SlowHead(torch.nn.Module):
    """What a draft head does, row by row. Other exercises are graded with it."""

    def __init__(self, head: DraftHead) -> None:
        super().__init__()
        self.weights = list(head.c_fc.parameters()), list(head.c_proj.parameters())

    def forward(self, hidden: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        (w_in, b_in), (w_out, b_out) = self.weights
        rows = []
        for state, told in zip(hidden.flatten(0, -2), before.flatten(0, -2), strict=True):
            x = w_in @ torch.cat([state, told]) + b_in
            x = 0.5 * x * (1 + (math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)).tanh())
            rows.append(state + w_out @ x + b_out)
        return torch.stack(rows).view(hidden.shape) if rows else hidden


@exercise_8(2)
@torch.no_grad()
def test_a_draft_head_adds_what_the_token_before_says():
    head = new_head()
    for shape in ((4,), (3, 4), (2, 3, 4), (2, 1, 3, 4), (2, 0, 4)):
        hidden, before = random(*shape, seed=1), random(*shape, seed=2)
        given = hidden.clone(), before.clone()
        result = head(hidden, before)
        assert result.shape == shape, "hidden (..., n_embd) should give (..., n_embd), with any dimensions before"
        assert torch.equal(hidden, given[0]) and torch.equal(before, given[1]), "what was given should not change"
        assert close(result, SlowHead(head)(hidden[None], before[None])[0], 1e-9), (
            "the result should be hidden + c_proj(gelu(c_fc([hidden, before]))), gelu being the approximation by tanh: "
            "what comes first in [hidden, before], and what is it added to?"
        )


@exercise_8(1)
@torch.no_grad()
def test_a_new_draft_head_changes_nothing():
    head = DraftHead(GPTConfig(7, n_embd=4, n_head=1, n_draft=5))  # its last matrix and bias are 0
    hidden, before = random(2, 3, 4, seed=1).float(), random(2, 3, 4, seed=2).float()
    assert torch.equal(head(hidden, before), hidden), "a head that was not trained should leave the hidden states alone"


@exercise_8(1)
@torch.no_grad()
def test_each_look_ahead_row_is_told_its_own_token():
    model = tiny_model()
    with patch.object(model, "draft_head", new_head(8, 6)):
        hidden, tokens = random(2, 3, 8, seed=4), torch.arange(7).roll(SEED)[:6].view(2, 3)
        together = model.logits(hidden, tokens)
        for b, i in product(range(2), range(3)):
            alone = model.logits(hidden[b, i], tokens[b, i])
            assert close(together[b, i], alone, 1e-9), "a row should read its own state and its own token, no other's"
            assert not close(alone, model.logits(hidden[b, i], (tokens[b, i] + 1) % 7), 1e-9), (
                "another token before should give other logits"
            )


# 9. The turn

PARTIAL = DraftTree((0, 0, 1, 1, 2), groups=(2, 1, 0, 1, 2, 0))  # not all groups are complete
PROMPTS = [[1, 2, 3], [4], [6, 5, 0, 2, 2, 1]]


@dataclass(frozen=True)
class Given(Method):
    """A method whose shapes are given: first look-ahead tokens alone, then always the same shape."""

    shape: Shape
    rule: str = COUPLED
    copied: tuple[tuple[int, ...], ...] | None = None

    @property
    def largest(self) -> tuple[Shape, ...]:
        return (self.shape,)

    def schedule(self, texts: Texts) -> Iterator[tuple[Shape, list[list[int]] | None]]:
        copied = None if self.copied is None else [list(drafts) for drafts in self.copied]
        return in_turn([(Shape(n_lookahead=self.shape.n_lookahead), None)], repeat((self.shape, copied)))


class Retold(Engine):
    """Tells the host what happened from what else a turn returned: one grader alone looks at `for_host`."""

    refills = False

    def _decoder(self, contexts: list[list[int]], n_tokens: int) -> tuple[Decoder, int]:
        self.decoder, n_cached = super()._decoder(contexts, n_tokens)
        return self.decoder, n_cached

    def _turns(self, texts: Texts) -> Iterator[Turn]:
        emit = texts.emit

        def retold(shape: Shape, _: list[list[int]], result: Result, n_models: int) -> Turn:
            made = []
            for b, (last, root) in enumerate(zip(result.last.tolist(), result.handed.root.tolist(), strict=True)):
                accepted = drafts_on_the_way(shape.tree, result, last, b)
                made.append([len(accepted), last, root, *accepted])
            turn = emit(shape, made, result, n_models)
            if self.refills:
                contexts = [texts.texts[b][texts.start[b] :] for b in texts.rows]
                self.decoder.begin(contexts, *([each[b] for b in texts.rows] for each in (texts.start, texts.seeds)))
            return turn

        texts.emit = retold
        return super()._turns(texts)


class Refilled(Retold):
    """Fills the cache anew after each turn, too: few graders look at what a turn leaves in it."""

    refills = True


SHAPES = [Shape(), Shape(chain(1), 1), Shape(chain(3), 3), Shape(FORKED, 3), Shape(PARTIAL, 2)]
KEEPING = [Shape(DraftTree(FORKED.parents, keep=3), 3), Shape(DraftTree((0, 0, 1, 1, 2), keep=2), 2)]


@torch.no_grad()
def plain_greedy(model: GPT, prompt: list[int], n_new: int) -> list[int]:
    text = list(prompt)
    for _ in range(n_new):
        text.append(model(torch.tensor([text]))[0, -1].argmax().item())
    return text[len(prompt) :]


def turns(shape: Shape, prompt: list[int], seed: int = 0, kind: type[Engine] = Refilled) -> Iterator[tuple[list, Turn]]:
    """The turns of one text, each with the text before it."""
    text = list(prompt)
    for turn in kind(tiny_model(), Given(shape, REJECTION), Sampling(0.7)).stream(prompt, 24, seed=seed):
        yield list(text), turn
        text += turn.tokens[0]


def drafts_on_the_way(drafts: DraftTree, result: Result, node: int, b: int = 0) -> list[int]:
    """Text b's drafts on the way to a node of the tree."""
    verified = result.kept[b].tolist() if drafts.keep else list(range(len(drafts.depth)))
    nodes = way(drafts, node)
    assert set(nodes) <= set(verified), (
        "`last` should be the last accepted node's number in the shape's tree, and `kept` the numbers there of all "
        "nodes that were verified, each text's own"
    )
    return [int(result.drafts.tokens[b, verified.index(each) - 1]) for each in nodes[1:]]


@exercise_9(2)
def test_greedy_text_equals_plain_decodings():
    for n_new in (1, 2, 17):
        expected = [plain_greedy(tiny_model(), prompt, n_new) for prompt in PROMPTS]
        for shape in SHAPES:
            engine = Retold(tiny_model(), Given(shape))
            for prompt, text in zip(PROMPTS, expected, strict=True):
                alone = engine.generate(prompt, n_new).tokens[0]
                assert alone == text, f"greedy text is not plain decoding's ({shape}): what is in the cache?"
            together = engine.generate(PROMPTS, n_new).tokens
            assert together == expected, "right alone, wrong in a batch: each text has its own length and last node"


@exercise_9(2)
def test_a_turn_is_one_pass_and_emits_what_was_accepted_and_one_more_token():
    for shape in SHAPES[1:]:
        calls, n_accepted = [], set()
        hook = tiny_model().ln_f.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        first_block = tiny_model().h[0].register_forward_hook(lambda *_, calls=calls: calls.append(0))
        try:
            for text, turn in turns(shape, PROMPTS[0], kind=Engine):
                passes = calls.count(0) - (not n_accepted)  # less the prefill
                calls.clear()
                assert passes == 1, f"a turn should be one pass of the model, not {passes}"
                if turn.shape == shape:
                    made = [*drafts_on_the_way(shape.tree, turn.result, turn.last[0]), int(turn.result.handed.root)]
                    assert turn.tokens[0] == made[: len(turn.tokens[0])], (
                        "what is emitted should be the drafts on the way to the last accepted node, and the next root: "
                        "look at `for_host`, the last node and the order of the drafts there"
                    )
                    assert int(turn.result.last) == turn.last[0], "`last` and for_host should name the same node"
                    n_emitted = min(turn.shape.tree.depth[turn.last[0]], len(turn.tokens[0]))  # less at the text's end
                    assert turn.n_accepted[0] == n_emitted, "for_host: drafts accepted, first"
                else:
                    made = turn.tokens[0]
                assert int(turn.result.handed.before) == [*text, *made][-2], (
                    "`before` should be the token before the next root: the last accepted draft, or this turn's root"
                )
                n_accepted.add(turn.n_accepted[0])
        finally:
            hook.remove()
            first_block.remove()
        assert len(n_accepted) > 1, "of these drafts some should be accepted and some not"


@exercise_9(2)
@torch.no_grad()
def test_targets_come_from_the_row_of_each_node():
    for shape, seed in product(SHAPES[2:], range(2)):
        for text, turn in turns(shape, PROMPTS[seed], seed=seed):
            q = turn.result.q.dense(7)[0]
            for node in range(len(turn.shape.tree.depth)):
                there = text + drafts_on_the_way(turn.shape.tree, turn.result, node)
                logits = tiny_model()(torch.tensor([there]))[0, -1]
                assert close(q[node], (logits / 0.7).softmax(-1)), (
                    f"q after node {node} is not what the model gives after the text and the drafts on the way there: "
                    "which rows did you read?"
                )


@exercise_9(2)
@torch.no_grad()
def test_the_next_drafts_come_from_the_group_of_the_last_accepted_node():
    for shape, seed in product(SHAPES[1:], range(2)):
        ends = set()
        for text, turn in turns(shape, PROMPTS[seed], seed=seed):
            lengths, last = turn.shape.tree.lengths(turn.shape.n_lookahead), turn.last[0]
            if turn.shape.n_lookahead:
                there = text  # and where there is no group, the root's instead
                if lengths[last]:
                    there = text + drafts_on_the_way(turn.shape.tree, turn.result, last)
                n_lookahead, n_text = lengths[last] or lengths[0], len(there)
                logits = tiny_model()(torch.tensor([there]), causal(n_text, n_lookahead))[0, n_text:]
                expected = logits[[min(i, n_lookahead - 1) for i in range(turn.shape.n_lookahead)]]
                given = tiny_model().logits(turn.result.handed.hidden)[0]
                assert close(given, expected), (
                    f"handed.hidden after node {last} of {turn.shape}: these are not the states of the look-ahead rows "
                    "after the last accepted node (group_rows)"
                )
                ends.add((last, len(lengths)))
        assert len(ends) > 1, "these turns should end at several nodes"
    for shape in SHAPES[1:]:
        engine = Refilled(tiny_model(), Given(shape, REJECTION), Sampling(0.7))

        def states(prompts: list, seed: int, engine: Engine = engine) -> list[torch.Tensor]:
            return [turn.result.handed.hidden for turn in islice(engine.stream(prompts, 24, seed=seed), 5)]

        alone = [states([prompt], seed=4 + b) for b, prompt in enumerate(PROMPTS)]
        for together, *each in zip(states(PROMPTS, seed=4), *alone, strict=True):
            assert close(together, torch.cat(each)), (
                "handed.hidden is right alone, wrong in a batch: each text has its own last accepted node"
            )


@exercise_9(1)
def test_copied_drafts_are_verified():
    right = plain_greedy(tiny_model(), PROMPTS[0], 16)
    copied = (tuple(right[1:4]), (-1, -1, -1))
    stream = Refilled(tiny_model(), Given(Shape(chain(3), 3), copied=copied)).stream([PROMPTS[0], PROMPTS[2]], 16)
    first, second = islice(stream, 2)
    assert second.result.drafts.tokens[0].tolist() == right[1:4], "copied drafts should be those that are verified"
    assert second.n_accepted[0] == 3, "copied drafts that are right should be accepted"
    there = Refilled(tiny_model(), Given(Shape(chain(3), 3))).stream(PROMPTS[2], 16)
    _, alone = islice(there, 2)
    own = second.result.drafts.tokens[1].tolist() == alone.result.drafts.tokens[0].tolist()
    assert own, "where `copied` is -1, a text should keep its own drafts"


@exercise_9(1)
def test_an_ended_text_stays_as_it_is():
    for shape in (Shape(chain(2), 2), Shape(PARTIAL, 2)):
        decoder = Decoder([tiny_model()], Sampling(), COUPLED, 2, 40)
        with torch.no_grad():
            handed = decoder.begin([[1, 2, 3], [4, 5]], [0, 0], [0, 0])
            decoder.set_active([1])
            expected = 1
            for _ in range(3):
                result = decoder.turn(shape, handed)
                handed, expected = result.handed, expected + 1 + shape.tree.depth[result.last[1]]
                lengths = decoder.cache.length.tolist()
                assert lengths[0] == 2, "the cache of a text that has ended (`active`) should stay as long as it is"
                assert lengths[1] == expected, "the cache should grow by the root and the accepted drafts"


@exercise_9(2)
def test_under_the_coupled_rule_a_seed_is_a_text_whatever_the_shape():
    for temperature in (0.7, 3.0):
        plain = Refilled(tiny_model(), Given(Shape()), Sampling(temperature))
        expected = plain.generate(PROMPTS, 20, seed=[5, 9, 2]).tokens
        for shape in SHAPES:
            engine = Refilled(tiny_model(), Given(shape), Sampling(temperature))
            together = engine.generate(PROMPTS, 20, seed=[5, 9, 2]).tokens
            assert together == expected, (
                f"{shape}: a seed should give the text that it gives without drafts: is the noise after each node that "
                "of its place in the text?"
            )
    assert engine.generate(PROMPTS, 20, seed=3).tokens != expected, "another seed should give another text"


@exercise_9(1)
def test_each_text_may_verify_nodes_of_its_own():
    hint = (
        "where a tree keeps some of its nodes, all is to come from the nodes that `self.draft` returns, each text's own"
    )
    for sampling, shape in product((Sampling(), Sampling(0.7), Sampling(3.0)), KEEPING):
        expected = Refilled(tiny_model(), Given(Shape()), sampling).generate(PROMPTS, 20, seed=[5, 9, 2]).tokens
        try:
            record = list(Retold(tiny_model(), Given(shape), sampling).stream(PROMPTS, 20, seed=[5, 9, 2]))
        except (IndexError, RuntimeError, ValueError) as error:
            raise AssertionError(hint) from error
        for turn in record:
            same = torch.equal(turn.result.for_host[:, 1], turn.result.last)
            assert same, "`last` and for_host should name the same node"
        tokens = [sum((turn.tokens[b] for turn in record), []) for b in range(len(PROMPTS))]
        assert tokens == expected, f"{hint}; its text is then plain decoding's, as with any tree"


@exercise_9(1)
def test_under_the_rejection_rule_the_noise_of_a_node_is_that_of_its_place():
    for shape, seed in product(SHAPES, (0, 7)):
        for text, turn in turns(shape, PROMPTS[0], seed=seed):
            tree, (drafts, q, last, handed, *_) = turn.shape.tree, turn.result
            q = q.dense(7)[0]
            p = torch.zeros_like(q) if drafts.p is None else drafts.p[0]
            keys = mix(stream_keys(torch.tensor([seed]))[:, 0] + len(text) + torch.tensor(tree.depth))
            expected = slow_accept(tree, drafts.tokens[0].tolist(), p, q, keys)
            assert (int(last), int(handed.root)) == expected, (
                f"{shape}: is the noise after each node that of its place in the text, the seed's own, for both rules?"
            )


@exercise_9(1)
@torch.no_grad()
def test_a_draft_head_is_told_the_token_before():
    model = tiny_model(7, n_draft=6)
    expected = Refilled(model, Given(Shape()), Sampling(0.7)).generate(PROMPTS, 16).tokens
    for shape, (most_tokens, n_candidates) in product(SHAPES[2:], ((10, 7), (4, 3))):
        with (
            patch("minipass.decode.LARGE_VOCABULARY", most_tokens),
            patch("minipass.decode.N_CANDIDATES", n_candidates),
        ):
            engine = Refilled(model, Given(shape), Sampling(0.7))
            try:
                tokens = engine.generate(PROMPTS, 16).tokens
                handed = [turn.result.handed for turn in engine.stream(PROMPTS[0], 16)]
            except (IndexError, RuntimeError) as error:
                raise AssertionError(
                    "with a draft head and `scores_candidates` the look-ahead rows' logits are to be handed on, too"
                ) from error
        assert tokens == expected, f"{shape}: with a draft head, too, a seed should give the text that it gives without"
        for each in handed if most_tokens < 7 else ():
            same = close(each.logits, model.logits(each.hidden))
            assert same, "with `scores_candidates`, handed.logits should be those of the same rows as handed.hidden"


@exercise_9(1)
@torch.no_grad()
def test_sampled_texts_have_the_targets_distribution():
    model, n_texts = tiny_model(4), 2000
    expected = torch.ones(1, dtype=torch.float64)
    texts = torch.tensor([[1, 2]])
    for _ in range(4):
        expected = (expected[:, None] * model(texts)[:, -1].softmax(-1)).flatten()
        texts = torch.cat([texts.repeat_interleave(4, 0), torch.arange(4).repeat(len(texts))[:, None]], dim=1)
    for rule, shape in product((COUPLED, REJECTION), (Shape(chain(2), 2), Shape(DraftTree((0, 0, 1)), 2))):
        engine = Refilled(model, Given(shape, rule), Sampling(1.0))
        tokens = torch.tensor(engine.generate([[1, 2]] * n_texts, 4).tokens)
        for i in range(3):  # the joint distribution of each two neighbours, summed over the others
            others = [axis for axis in range(4) if axis not in (i, i + 1)]
            counts = torch.bincount(tokens[:, i] * 4 + tokens[:, i + 1], minlength=16)
            assert like(counts, expected.view(4, 4, 4, 4).sum(others).flatten()), (
                f"{rule}: sampled texts do not have the target's distribution: which noise, which p, which q?"
            )


# 10. Schedules


def begun(*texts: list[int]) -> Texts:
    """Texts whose first turn is to come."""
    begun = Texts(list(texts), 100, None, 0, tiny_model().config)
    begun.begin_window(with_ended=False)
    return begun


def told(turns: Iterator, n: int = 1) -> list[tuple]:
    """Of the first n turns: the parents of the tree, the look-ahead tokens after each node and at most, the copies."""
    turns = islice(turns, n)
    return [
        (list(shape.tree.parents), shape.tree.lengths(shape.n_lookahead), shape.n_lookahead, copied)
        for shape, copied in turns
    ]


@exercise_10(2)
def test_algorithm_1_drafts_then_verifies():
    for n in (1, 3):
        turns = told(TwoPass(n).schedule(begun([1, 2])), 5)
        draft, verify = ([], [n], n, None), (list(range(n)), [0] * (n + 1), 0, None)
        assert turns[0] == draft, "the first turn should verify nothing and look ahead with L tokens"
        assert turns[1] == verify, "the second turn should verify a chain of L drafts and not look ahead"
        assert turns == [draft, verify, draft, verify, draft], "drafting and verifying should alternate without an end"


@exercise_10(2)
def test_a_fused_turn_verifies_what_the_one_before_looked_ahead_for():
    for drafts in (chain(1), chain(3), FORKED, PARTIAL):
        depth = max(drafts.depth)
        first, *others = told(fused(begun([1, 2]), repeat(drafts), 0), 4)
        assert first == ([], [depth], depth, None), "the first turn has no drafts, and looks ahead already"
        expected = list(drafts.parents), list(drafts.groups or [depth] * len(drafts.depth)), depth, None
        assert others == [expected] * 3, "each turn should verify the tree, and look ahead as deep as it is"
    assert told(fused(begun([1]), repeat(chain(0)), 0), 2) == [([], [0], 0, None)] * 2, "0 drafts is plain decoding"


@exercise_10(1)
def test_trees_may_change_from_turn_to_turn():
    given, taken = [chain(2), FORKED, chain(1), PARTIAL, chain(3)], []

    def trees() -> Iterator[DraftTree]:
        for drafts in given:
            taken.append(drafts)
            yield drafts

    schedule, depth_before = fused(begun([1, 2]), trees(), 0), 0
    for n, drafts in enumerate(given, 1):
        depth, n_nodes = max(drafts.depth), sum(depth <= depth_before for depth in drafts.depth)
        ((parents, lengths, n_lookahead, _),) = told(schedule)
        assert parents == list(drafts.parents[: n_nodes - 1]), (
            "a turn can verify a tree only as deep as the turn before looked ahead: cut it"
        )
        expected = list(drafts.groups or [depth] * len(drafts.depth))[:n_nodes]
        assert (lengths, n_lookahead) == (expected, depth), "a turn should look ahead as deep as its tree is, uncut"
        assert len(taken) == n, "a turn's tree should be taken when the turn comes: it may depend on the turn before"
        depth_before = depth


@exercise_10(1)
def test_drafts_are_copied_where_a_text_repeats_itself():
    texts = begun([1, 2, 3, 1, 2], [4, 5, 6, 0])
    schedule = fused(texts, repeat(chain(2)), 4)
    (turn,) = told(schedule)
    assert turn[3] == [[3, 1, 2, 3], [-1] * 4], "copied_drafts should give the drafts, from an index for each text"
    assert turn[:3] == ([0, 1, 2, 3], [2, 0, 0, 0, 0], 2), (
        "copied drafts are verified in a shape of their own, copied_shape; here a text without them looks ahead"
    )
    texts.texts[0].append(6), texts.texts[1].append(3)
    own = [0, 1], [2] * 3, 2, None
    assert told(schedule) == [own], "where no text repeats itself, the tree should be verified"
    texts.texts[1].append(0)
    assert told(schedule) == [own], "after a turn that looked ahead, two tokens should have stood there before"
    texts.texts[1].append(3)
    (turn,) = told(schedule)
    assert turn[3] == [[-1] * 4, [0, 3, 0, 3]], "each turn should copy from the texts as they are by then"
    assert told(fused(texts, repeat(chain(2)), 0))[0][3] is None, "lookup 0: nothing should be copied"
    texts = begun([1, 2, 3, 1])
    schedule = fused(texts, repeat(chain(2)), 4)
    (turn,) = told(schedule)
    assert turn[3] == [[2, 3, 1, 2]], "where no turn has looked ahead, one token is enough to copy what followed it"
    assert turn[1:3] == ([0] * 5, 0), "where all texts have copied drafts, no look-ahead token is needed"
    texts.texts[0].append(7)
    assert told(schedule) == [([], [2], 2, None)], "after a turn that did not look ahead there are no drafts"


# 11. The look-ahead loss

CUTS = np.array([[0, 3], [2, 1]])


def random_logits() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draft logits (2, 2, 3, 5), text logits (2, 8, 5), targets (2, 8)."""
    numbers, sizes = generator(), ((2, 2, 3, 5), (2, 8, 5))
    return *(4 * torch.randn(size, generator=numbers) for size in sizes), torch.arange(16).view(2, 8) % 5


def places() -> list[tuple[int, int, int, int]]:
    """(b, g, i, text row) of every look-ahead row."""
    return [(b, g, i, int(CUTS[b, g]) + 1 + i) for b in range(2) for g in range(2) for i in range(3)]


def grade_loss(kind: str, of_one, message: str) -> None:
    drafts, texts, targets = random_logits()
    for dtype in (torch.float32, torch.bfloat16):
        drafts, texts, expected = drafts.to(dtype), texts.to(dtype), torch.zeros(3)
        for b, g, i, row in places():
            log_p, log_q = drafts[b, g, i].float().log_softmax(-1), texts[b, row].float().log_softmax(-1)
            expected[i] += of_one(log_p, log_q, targets[b, row]) / 4
        result = lookahead_loss(kind, drafts, texts, targets, CUTS)
        assert result.shape == (3,), "the loss should be a mean for each look-ahead position, (L,)"
        assert close(result, expected, 1e-4), message if dtype == torch.float32 else "bfloat16: compute in float32"


@exercise_11(2)
def test_lookahead_row_i_belongs_to_the_ith_text_row_after_its_cut():
    per_row = torch.arange(32).view(2, 8, 2)
    picked = rows_after_cuts(per_row, CUTS, 3)
    assert picked.shape == (2, 2, 3, 2), "(B, T, ...) should give (B, G, L, ...)"
    for b, g, i, row in places():
        assert picked[b, g, i].tolist() == per_row[b, row].tolist(), "[LA]_i of cut c is at position c + i, i from 1"
    assert rows_after_cuts(per_row[..., 0], CUTS, 3).shape == (2, 2, 3), "(B, T) should give (B, G, L)"


@exercise_11(1)
def test_cross_entropy_with_the_text():
    grade_loss("ce", lambda log_p, log_q, token: -log_p[token], "ce: -log p of the text's token at the same place")


@exercise_11(2)
def test_kl_against_the_models_own_distribution():
    message = "kl: KL(q || p) = sum q (log q - log p), q being the model's own distribution at the same place"
    grade_loss("kl", lambda log_p, log_q, token: (log_q.exp() * (log_q - log_p)).sum(), message)


@exercise_11(1)
def test_total_variation_is_what_is_not_accepted():
    message = "tv: TV_SCALE x (1 - sum(min(p, q)))"
    grade_loss("tv", lambda log_p, log_q, _: TV_SCALE * (1 - torch.minimum(log_p.exp(), log_q.exp()).sum()), message)


@exercise_11(1)
def test_the_target_gets_no_gradient():
    drafts, texts, targets = random_logits()
    for kind in ("kl", "tv"):
        draft_leaf, text_leaf = drafts.clone().requires_grad_(), texts.clone().requires_grad_()
        loss = lookahead_loss(kind, draft_leaf, text_leaf, targets, CUTS).sum()
        if loss.requires_grad:
            loss.backward()
        assert draft_leaf.grad is not None and draft_leaf.grad.any(), f"{kind}: the drafts should get a gradient"
        assert text_leaf.grad is None, f"{kind}: the model should not move towards its drafts: detach the target"


@exercise_11(1)
def test_training_the_table_alone_lowers_the_loss():
    model = GPT(tiny_model().config).double()
    model.load_state_dict(tiny_model().state_dict())
    text = torch.randint(7, (4, 17), generator=generator())
    cuts, losses = np.tile([2, 5, 9], (4, 1)), []
    for _ in range(20):
        text_logits, draft_logits = training_pass(model, text[:, :-1], cuts)
        loss = lookahead_loss("kl", draft_logits, text_logits, text[:, 1:], cuts).mean()
        assert loss.requires_grad, "the look-ahead table should get a gradient"
        (gradient,) = torch.autograd.grad(loss, model.lookahead)
        with torch.no_grad():
            model.lookahead -= 0.1 * gradient
        losses.append(loss.item())
    assert losses[-1] < losses[0], "20 steps on the look-ahead table should lower the loss"
