"""The choice of a tree of drafts: the best of its size by trying all, and expected tokens/pass against a simulation."""

import itertools

import numpy as np
import pytest
import torch
from conftest import chi_square_p_value, random_model, sequence_probabilities

from minipass.generate import RULES, Generation, Round, generate, stream
from minipass.layout import DraftTree, chain
from minipass.rounds import copied_chain
from minipass.shapes import (
    SIZES,
    AdaptiveTree,
    best_tree,
    expected_tokens,
    fastest_tree,
    n_rows,
    round_seconds,
    with_fewer_rows,
)

HITS = [[0.5, 0.2, 0.1], [0.4, 0.25, 0.1], [0.3, 0.1, 0.05]]


def test_the_best_tree_keeps_more_than_any_other_of_its_size():
    hits = [[0.5, 0.2, 0.1], [0.4, 0.25, 0.1], [0.3, 0.1, 0.05]]

    def expected_kept(shape: DraftTree) -> float:
        reach, total = [1.0], 0.0
        for node, (parent, rank) in enumerate(zip(shape.parents, shape.rank, strict=True), 1):
            depth = shape.depth[node]
            fits = depth <= len(hits) and rank < 3
            reach.append(reach[parent] * hits[depth - 1][rank] if fits else 0.0)
            total += reach[-1]
        return total

    for n in range(1, 6):
        others = []
        for parents in itertools.product(*(range(i + 1) for i in range(n))):
            try:
                others.append(expected_kept(DraftTree(parents)))
            except ValueError:
                continue
        assert expected_kept(best_tree(hits, n)) == pytest.approx(max(others))


def test_the_best_tree_of_hits_without_alternatives_is_a_chain():
    assert best_tree([[0.5], [0.4], [0.3]], 3) == chain(3)
    assert best_tree([[0.5], [0.4], [0.3]], 9) == chain(3)
    assert best_tree([], 4) == best_tree([[0.5]], 0) == chain(0)


def simulated_tokens(tree: DraftTree, hits, n_rounds: int = 40_000) -> float:
    """Goes through rounds: at each node one of its drafts is right with these hits, or none; counts tokens."""
    rng, tokens = np.random.default_rng(0), 0
    available = deepest = tree.depth[-1]
    lengths = tree.lengths(deepest)
    for _ in range(n_rounds):
        node, tokens = 0, tokens + 1
        while tree.depth[node] < available:
            right = rng.choice(4, p=[*hits[tree.depth[node]], 1 - sum(hits[tree.depth[node]])])
            children = [i for i, parent in enumerate(tree.parents, 1) if parent == node and tree.rank[i - 1] == right]
            if not children:
                break
            node, tokens = children[0], tokens + 1
        available = lengths[node]
    return tokens / n_rounds


@pytest.mark.parametrize("groups", [None, (3, 1, 2, 0, 0, 1, 0, 0), (1, 3, 3, 3, 3, 3, 3, 3)])
def test_expected_tokens_are_those_of_a_simulation(groups):
    tree = DraftTree((0, 0, 0, 1, 1, 2, 4), groups)
    assert expected_tokens(tree, HITS) == pytest.approx(simulated_tokens(tree, HITS), abs=0.02)


def test_a_chain_with_complete_groups_gives_one_token_and_the_products_of_its_hits():
    assert expected_tokens(chain(3), HITS) == pytest.approx(1 + 0.5 + 0.5 * 0.4 + 0.5 * 0.4 * 0.3)


def test_rows_are_taken_away_one_by_one_from_the_least_worth_on():
    shapes = list(with_fewer_rows(DraftTree((0, 0, 1)), HITS))
    assert [n_rows(shape) for shape in shapes] == [12, 11, 10, 9, 8, 7, 6, 5]
    assert shapes[0].groups == (2, 2, 2, 2)
    assert shapes[-1].groups == (1, 0, 0, 0)
    expected = [expected_tokens(shape, HITS) for shape in shapes]
    assert expected == sorted(expected, reverse=True)


def test_free_rows_buy_the_largest_tree_and_dear_rows_the_smallest():
    free, dear = fastest_tree(HITS, lambda rows: 1.0), fastest_tree(HITS, lambda rows: float(rows))
    assert len(free.parents) == max(SIZES)
    assert len(dear.parents) == 1
    between = fastest_tree(HITS, lambda rows: 1 + 0.02 * rows)
    assert 1 < len(between.parents) < max(SIZES)


def test_more_hits_buy_more_rows():
    few = [[hit / 4 for hit in ranks] for ranks in HITS]
    assert n_rows(fastest_tree(few, cost)) < n_rows(fastest_tree(HITS, cost))


def cost(rows: int) -> float:
    return 1 + 0.03 * rows


def adapted(model, prompts, n_new: int, **settings):
    """Decodes with trees that change; returns the generation and the trees used."""
    adaptive = AdaptiveTree(HITS, cost)
    settings = {"method": "pass-tree", "tree": adaptive, "generator": torch.Generator().manual_seed(0), **settings}
    result, used = Generation(), []
    for record in stream(model, prompts, n_new, **settings):
        result.add(record)
        used.append(record.tree)
    return result, used


@pytest.mark.parametrize("rule", RULES)
def test_a_tree_that_adapts_leaves_greedy_text_as_it_is(rule, lively_model):
    prompts = [[token, 3, 8] for token in range(6)]
    result, used = adapted(lively_model, prompts, 60, rule=rule)
    assert result.tokens == generate(lively_model, prompts, 60, method="autoregressive").tokens
    assert len(set(used)) > 2, "it did change"


@pytest.mark.parametrize("rule", RULES)
def test_a_tree_that_adapts_leaves_the_distribution_as_it_is(rule):
    """Each text alone, since those of one batch share their tree."""
    model = random_model(seed=5, std=0.5, vocab_size=5, block_size=16, n_layer=1, n_lookahead=3)
    generator, samples = torch.Generator().manual_seed(0), []
    trees = [DraftTree((0, 0, 1)), DraftTree((0,)), DraftTree((0, 0, 0))]

    class Restless(AdaptiveTree):
        def __init__(self):
            self.trees, self.tree = trees, trees[0]

        def add(self, record):  # by what was emitted last: as strong a dependence on the past as there can be
            self.tree = trees[record.tokens[0][-1] % 3]

    for _ in range(2000):
        settings = {"method": "pass-tree", "rule": rule, "temperature": 1.0, "generator": generator}
        samples += map(tuple, generate(model, [1, 2, 3], 4, tree=Restless(), **settings).tokens)
    assert chi_square_p_value(samples, sequence_probabilities(model, [1, 2, 3], 4, temperature=1.0)) > 1e-3


def test_drafts_that_are_not_kept_make_the_tree_smaller_and_kept_ones_larger():
    sizes = {}
    for right in (False, True):
        adaptive = AdaptiveTree(HITS, cost)
        start = n_rows(adaptive.tree)
        for _ in range(50):
            tree, kept = adaptive.tree, [True]
            for parent, rank in zip(tree.parents, tree.rank, strict=True):
                kept.append(right and kept[parent] and rank == 0)
            n = sum(kept) - 1
            last = max(i for i, there in enumerate(kept) if there)
            deepest = tree.depth[-1]
            adaptive.add(Round([[1]], [[]], [deepest], [n], [True], ((0, 1),), tree=tree, last=[last]))
        sizes[right] = n_rows(adaptive.tree)
    assert sizes[False] < start < sizes[True]


def test_hits_are_learned_by_depth_and_rank_from_what_was_tested():
    """A text whose first drafts are always right at depth 1 and never at depth 2 wants chains of one."""
    adaptive = AdaptiveTree(HITS, cost)
    for _ in range(200):
        tree = adaptive.tree
        depth = tree.depth[-1]
        adaptive.add(Round([[1, 1]], [[]], [depth], [1], [True], ((0, 1),), tree=tree, last=[1]))  # the first child
    assert adaptive.tree == chain(1)
    conditional = adaptive.kept / adaptive.tested
    assert conditional[0, 0] > 0.9
    assert conditional[0, 1] == pytest.approx(0.2 / 0.5), "never tested, since the first was right"


def test_what_was_never_tested_for_want_of_look_ahead_tokens_is_not_counted():
    tree = DraftTree((0, 1, 2), groups=(3, 1, 1, 1))
    adaptive = AdaptiveTree(HITS, cost)
    adaptive.tree, adaptive.next_choice = tree, 10**9
    before = adaptive.tested.copy()
    for _ in range(2):  # behind node 1 there is one look-ahead token, so that the second round tests one draft
        adaptive.add(Round([[1, 1]], [[]], [3], [1], [True], ((0, 1),), tree=tree, last=[1]))
    assert (adaptive.tested - before).sum(1).tolist() == [2, 1, 0]


def test_drafts_that_were_copied_from_the_text_teach_nothing_about_look_ahead_tokens():
    adaptive, copied = AdaptiveTree(HITS, cost), copied_chain(6, 2)
    before = adaptive.tested.copy()
    adaptive.add(Round([[1]], [[]], [6], [0], [True], ((0, 1),), tree=copied, last=[0]))
    assert (adaptive.tested == before).all()
    assert adaptive.available == [2]


def test_the_time_of_a_round_is_measured_for_any_number_of_rows():
    seconds = round_seconds(random_model(seed=1).float(), HITS, n_rounds=4, temperature=1.0)
    assert all(seconds(rows) > 0 for rows in (1, 10, 100, 1000))
