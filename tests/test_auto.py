"""The choice of a tree of drafts: the best of its size by trying all, and expected tokens/pass against a simulation."""

import bisect
import copy
import itertools
import math
import random

import numpy as np
import pytest
from conftest import ACCURACY, chi_square_p_value, chooser, random_model, sequence_probabilities

from minipass.auto import (
    FIRST_CHOICE,
    MOST_TURNS_BETWEEN,
    NO_DRAFTS,
    SIZES,
    AdaptiveTree,
    Auto,
    best_tree,
    expected_tokens,
    fastest_tree,
    likeliest_tree,
    n_rows,
    turn_seconds,
    with_fewer_rows,
)
from minipass.decode import Plain, copied_shape
from minipass.engine import Engine
from minipass.errors import InputError
from minipass.sampling import COUPLED, REJECTION, Sampling
from minipass.texts import Generation, Turn
from minipass.trees import MOST_DRAFTS, DraftTree, Shape, chain

SAMPLED = Sampling(1.0)


# Trees.


def test_the_best_tree_has_more_drafts_accepted_than_any_other_of_its_size():
    def expected_accepted(tree: DraftTree) -> float:
        reach = [1.0]
        for node, (parent, rank) in enumerate(zip(tree.parents, tree.rank, strict=True), 1):
            fits = tree.depth[node] <= len(ACCURACY) and rank < 3
            reach.append(reach[parent] * ACCURACY[tree.depth[node] - 1][rank] if fits else 0.0)
        return sum(reach[1:])

    for n in range(1, 6):
        others = []
        for parents in itertools.product(*(range(i + 1) for i in range(n))):
            try:
                others.append(expected_accepted(DraftTree(parents)))
            except InputError:  # not ordered by depth
                continue
        assert expected_accepted(best_tree(ACCURACY, n)) == pytest.approx(max(others))


def test_the_best_tree_without_alternatives_is_a_chain():
    assert best_tree([[0.5], [0.4], [0.3]], 3) == chain(3)
    assert best_tree([[0.5], [0.4], [0.3]], 9) == chain(3)
    assert best_tree([], 4) == best_tree([[0.5]], 0) == chain(0)


def simulated_tokens(tree: DraftTree, accuracy, n_turns: int = 20_000) -> float:
    """Goes through turns: at each node one of its drafts is right with this accuracy, or none; counts tokens."""
    rng, tokens = random.Random(0), 0
    limits = [[*itertools.accumulate(ranks)] for ranks in accuracy]
    available = deepest = tree.depth[-1]
    lengths = tree.lengths(deepest)
    for _ in range(n_turns):
        node, tokens = 0, tokens + 1
        while tree.depth[node] < available:
            right = bisect.bisect(limits[tree.depth[node]], rng.random())
            children = [i for i, parent in enumerate(tree.parents, 1) if parent == node and tree.rank[i - 1] == right]
            if not children:
                break
            node, tokens = children[0], tokens + 1
        available = lengths[node]
    return tokens / n_turns


@pytest.mark.parametrize("groups", [None, (3, 1, 2, 0, 0, 1, 0, 0), (1, 3, 3, 3, 3, 3, 3, 3)])
def test_expected_tokens_are_those_of_a_simulation(groups):
    tree = DraftTree((0, 0, 0, 1, 1, 2, 4), groups)
    assert expected_tokens(tree, ACCURACY) == pytest.approx(simulated_tokens(tree, ACCURACY), abs=0.03)


def test_a_chain_with_complete_groups_gives_one_token_and_the_products_of_its_accuracy():
    assert expected_tokens(chain(3), ACCURACY) == pytest.approx(1 + 0.5 + 0.5 * 0.4 + 0.5 * 0.4 * 0.3)


def test_rows_are_taken_away_one_by_one_from_the_least_worth_on():
    trees = list(with_fewer_rows(DraftTree((0, 0, 1)), ACCURACY))
    assert [n_rows(tree) for tree in trees] == [12, 11, 10, 9, 8, 7, 6, 5]
    assert trees[0].groups == (2, 2, 2, 2)
    assert trees[-1].groups == (1, 0, 0, 0)
    expected = [expected_tokens(tree, ACCURACY) for tree in trees]
    assert expected == sorted(expected, reverse=True)


def test_free_rows_buy_the_largest_tree_and_dear_rows_none():
    free, dear = fastest_tree(ACCURACY, lambda tree: 1.0), fastest_tree(ACCURACY, lambda tree: float(n_rows(tree)))
    assert len(free.parents) == max(SIZES)
    assert dear == NO_DRAFTS
    between = fastest_tree(ACCURACY, lambda tree: 1 + 0.02 * n_rows(tree))
    assert 1 < len(between.parents) < max(SIZES)


def test_a_higher_accuracy_buys_more_rows():
    low = [[share / 4 for share in ranks] for ranks in ACCURACY]
    less, more = (fastest_tree(accuracy, lambda tree: 1 + 0.03 * n_rows(tree)) for accuracy in (low, ACCURACY))
    assert n_rows(less) < n_rows(more)


# The method.


@pytest.mark.parametrize("lookup", [0, 4])
@pytest.mark.parametrize(("rule", "sampling"), [(COUPLED, SAMPLED), (COUPLED, Sampling()), (REJECTION, Sampling())])
def test_a_tree_that_changes_leaves_the_texts_as_they_are(rule, sampling, lookup, lively_model):
    """Past the window's edge, too. The rejection rule gives plain decoding's text only where there is but one."""
    prompts, trees = [[token, 3, 8] for token in range(6)], []
    # In a batch some text has copies in nearly every turn. These teach nothing, so it has to begin further off.
    alone = [[prompt] for prompt in prompts] if lookup else []
    begun_with = AdaptiveTree([[0.9]] * 3, lambda tree: 1 + 0.03 * n_rows(tree)) if lookup else copy.deepcopy(chooser())
    method = Auto(begun_with, rule, lookup)
    for seed, batch in enumerate([prompts, *alone]):
        generation = Generation()
        for turn in Engine(lively_model, method, sampling).stream(batch, 60, seed=seed):
            generation.add(turn)
            trees.append(method.chooser.tree)
        assert generation.tokens == Engine(lively_model, Plain(), sampling).generate(batch, 60, seed=seed).tokens
    assert len(set(trees)) > 1, "it did change"


class Restless(AdaptiveTree):
    """Its tree depends on what was emitted last: as strong a dependence on the past as there can be."""

    def __init__(self):
        self.trees = [DraftTree((0, 0, 1)), DraftTree((0,)), DraftTree((0, 0, 0))]
        self.tree = self.trees[0]

    def add(self, turn: Turn) -> None:
        self.tree = self.trees[turn.tokens[0][-1] % 3]


def test_a_tree_that_depends_on_the_text_leaves_the_text_as_it_is(lively_model):
    for seed in range(20):
        texts = [
            Engine(lively_model, method, SAMPLED).generate([1, 2, 3], 20, seed=seed)
            for method in (Plain(), Auto(Restless()))
        ]
        assert texts[0].tokens == texts[1].tokens


def test_a_tree_that_depends_on_the_text_leaves_the_distribution_of_the_rejection_rule_as_it_is():
    """Each text alone, since those of one batch share their tree."""
    model = random_model(seed=5, std=0.5, vocab_size=5, block_size=16, n_layer=1, n_lookahead=3)
    engine = Engine(model, Auto(Restless(), REJECTION), SAMPLED)
    samples = [tuple(engine.generate([1, 2, 3], 4, seed=seed).tokens[0]) for seed in range(500)]
    assert chi_square_p_value(samples, sequence_probabilities(model, [1, 2, 3], 4, temperature=1.0)) > 1e-3


# What it learns.


def turn_of(shape: Shape, n_tested: int, n_accepted: int, last: int) -> Turn:
    """A turn of one text."""
    tokens = [1] * (1 + n_accepted)
    return Turn([tokens], [[]], [n_tested], [n_accepted], [True], shape, [(0, shape.n_rows)], [last])


def begun(adaptive: AdaptiveTree) -> AdaptiveTree:
    """The first turn of a text, which has no drafts, is over."""
    adaptive.add(turn_of(Shape(n_lookahead=adaptive.tree.depth[-1]), 0, 0, 0))
    return adaptive


def add_whole(adaptive: AdaptiveTree, last: int) -> None:
    """A turn with all of its tree, up to the accepted node `last`."""
    tree, depth = adaptive.tree, adaptive.tree.depth[-1]
    adaptive.add(turn_of(Shape(tree, depth), depth, tree.depth[last], last))


def test_rejected_drafts_make_the_tree_smaller_and_accepted_ones_larger():
    sizes = {}
    for right in (False, True):
        adaptive = begun(copy.deepcopy(chooser()))
        start = n_rows(adaptive.tree)
        for _ in range(50):
            last = 0
            for node, (parent, rank) in enumerate(zip(adaptive.tree.parents, adaptive.tree.rank, strict=True), 1):
                if right and parent == last and rank == 0:
                    last = node
            add_whole(adaptive, last)
        sizes[right] = n_rows(adaptive.tree)
    assert sizes[False] < start < sizes[True]


def test_accuracy_is_learned_by_depth_and_rank_from_what_was_tested():
    """A text whose first drafts are always right at depth 1 and never at depth 2 wants chains of one."""
    adaptive = begun(copy.deepcopy(chooser()))
    for _ in range(200):
        add_whole(adaptive, last=1)  # the first child
    assert adaptive.tree == chain(1)
    conditional = adaptive.accepted / adaptive.tested
    assert conditional[0, 0] > 0.9
    assert conditional[0, 1] == pytest.approx(0.2 / 0.5), "never tested, since the first was right"


@pytest.mark.parametrize("right", [False, True])
def test_where_drafts_fail_it_decodes_plainly_and_tries_again_now_and_then(right):
    """Plain turns show nothing of drafts; when those of a trial are right, it goes on with them."""
    adaptive, trees = AdaptiveTree(ACCURACY, lambda tree: 1 + 0.25 * (tree != NO_DRAFTS)), []
    for turn in range(1_000):
        trees.append(adaptive.tree)
        tree = adaptive.tree.cut(max(adaptive.available))
        accepted = right and turn >= 500 and tree.parents != ()
        shape = Shape(tree, adaptive.tree.depth[-1])
        adaptive.add(turn_of(shape, tree.depth[-1], int(accepted), int(accepted)))
    plain = [tree == NO_DRAFTS for tree in trees]
    share = FIRST_CHOICE / (FIRST_CHOICE + MOST_TURNS_BETWEEN)
    assert sum(plain[100:500]) / 400 == pytest.approx(1 - share, abs=0.03)
    assert sum(plain[750:]) == 0 if right else sum(plain[750:]) > 200


def learning(tree: DraftTree) -> AdaptiveTree:
    """One that counts, and keeps its tree."""
    adaptive = copy.deepcopy(chooser())
    adaptive.tree, adaptive.next_choice = tree, math.inf
    return begun(adaptive)


def test_what_was_never_tested_for_want_of_look_ahead_tokens_is_not_counted():
    adaptive = learning(DraftTree((0, 1, 2), groups=(3, 1, 1, 1)))
    before = adaptive.tested.copy()
    for _ in range(2):  # after node 1 there is one look-ahead token: the second turn tests one draft
        add_whole(adaptive, last=1)
    assert (adaptive.tested - before).sum(1).tolist() == [2, 1, 0]


def test_drafts_after_a_node_without_look_ahead_tokens_are_not_counted():
    """They come from the root's group, so from another place: expected_tokens says that nothing is available."""
    adaptive = learning(DraftTree((0, 1), groups=(2, 0, 0)))
    before = adaptive.tested.copy()
    for _ in range(2):
        add_whole(adaptive, last=1)
    assert (adaptive.tested - before).sum(1).tolist() == [1, 1, 0]


def test_drafts_that_were_copied_from_the_text_teach_nothing_about_look_ahead_tokens():
    adaptive = begun(copy.deepcopy(chooser()))
    before = adaptive.tested.copy()
    adaptive.add(turn_of(copied_shape(6, 2), n_tested=6, n_accepted=0, last=0))
    assert (adaptive.tested == before).all()
    assert adaptive.available == [2]


def test_a_text_that_has_ended_teaches_nothing():
    adaptive = learning(chain(2))
    before = adaptive.tested.copy()
    adaptive.add(Turn([[]], [[]], [0], [0], [False], Shape(chain(2), 2), [(0, 9)], [0]))
    assert (adaptive.tested == before).all()


def test_the_cut_tree_of_a_texts_end_is_counted_as_deep_as_it_was_tested():
    adaptive = learning(DraftTree((0, 0, 1)))
    before = adaptive.tested.copy()
    adaptive.add(turn_of(Shape(adaptive.tree.cut(1), 0), n_tested=1, n_accepted=0, last=0))
    assert (adaptive.tested - before).tolist() == [[1, 1, 0], [0, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize("accuracy", [[], [[0.5, math.nan]], [[0.5], [math.inf]]])
def test_an_accuracy_that_is_missing_or_not_finite_is_refused(accuracy):
    with pytest.raises(InputError, match="accuracy"):
        AdaptiveTree(accuracy, lambda tree: 1.0)


def test_the_time_of_a_turn_is_measured_for_any_tree():
    seconds = turn_seconds(random_model(seed=1).float(), ACCURACY, SAMPLED, turns=4)
    small, large = DraftTree((0,)), DraftTree((0, 0, 1, 2), (1, 9, 99, 0, 0))
    assert 0 < seconds(NO_DRAFTS) <= seconds(small) <= seconds(large) < math.inf
    assert seconds(chain(MOST_DRAFTS)) < math.inf


def test_a_time_for_each_row_and_for_each_level_is_found(monkeypatch):
    """With turns that move a clock of their own: plain ones by 5 seconds, others by 6, a row by 0.1, a level by 2."""
    now = [0.0]

    def true_seconds(tree: DraftTree) -> float:
        return 5.0 if tree == NO_DRAFTS else 6 + 0.1 * n_rows(tree) + 2.0 * tree.depth[-1]

    class Clocked:
        def __init__(self, model, method, *args, **settings):
            self.tree = method.tree

        def stream(self, *args):
            while True:
                now[0] += true_seconds(self.tree)
                yield

    monkeypatch.setattr("minipass.auto.Engine", Clocked)
    monkeypatch.setattr("minipass.auto.time.perf_counter", lambda: now[0])
    seconds = turn_seconds(random_model(seed=1), ACCURACY, SAMPLED)
    for tree in (NO_DRAFTS, chain(1), chain(3), best_tree(ACCURACY, 12), DraftTree((0, 0, 1), (2, 0, 0, 0))):
        assert seconds(tree) == pytest.approx(true_seconds(tree))


def test_an_accuracy_may_be_an_array():
    assert best_tree(np.array(ACCURACY), 5) == best_tree(ACCURACY, 5)
    assert likeliest_tree(np.array(ACCURACY), 5) == likeliest_tree(ACCURACY, 5)


def test_a_likeliest_tree_has_as_many_rows_as_the_best_fixed_one_and_more_drafts_to_choose_from():
    accuracy = [[0.6 * 0.8**depth * 0.3**rank for rank in range(5)] for depth in range(6)]
    for n in (1, 2, 5, 16):
        fixed, chosen = best_tree(accuracy, n), likeliest_tree(accuracy, n)
        assert chosen.depth[-1] == fixed.depth[-1]
        assert (chosen.n_verified, Shape(chosen, 2).n_rows) == (n, Shape(fixed, 2).n_rows)
        assert len(chosen.parents) == 4 * n or n == 1  # at most five drafts for one place


def test_of_drafts_that_are_never_tested_the_accuracy_measured_before_stays():
    adaptive = AdaptiveTree([[0.5, 0.2], [0.4, 0.1]], lambda tree: 1.0 + len(tree.parents))
    before = (adaptive.accepted / adaptive.tested).copy()
    for _ in range(10_000):
        adaptive._choose()
    np.testing.assert_allclose(adaptive.accepted / adaptive.tested, before)
    np.testing.assert_allclose(adaptive.tested, 6.0)
