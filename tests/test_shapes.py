"""The choice of a tree of drafts: the best of its size by trying all, and expected tokens/pass against a simulation."""

import itertools

import numpy as np
import pytest
from conftest import random_model

from minipass.layout import DraftTree, chain
from minipass.shapes import SIZES, best_tree, expected_tokens, fastest_tree, n_rows, round_seconds, with_fewer_rows

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
    cost = lambda rows: 1 + 0.03 * rows  # noqa: E731
    assert n_rows(fastest_tree(few, cost)) < n_rows(fastest_tree(HITS, cost))


def test_the_time_of_a_round_is_measured_for_any_number_of_rows():
    seconds = round_seconds(random_model(seed=1).float(), HITS, n_rounds=4, temperature=1.0)
    assert all(seconds(rows) > 0 for rows in (1, 10, 100, 1000))
