"""The mask builder against slow, obvious references: walking from parent to parent, and the rules of the fused pass."""

import numpy as np
import pytest
import torch

from minipass.layout import CACHE_END, path, tree, with_groups
from minipass.trees import DraftTree, Shape, chain

CPU = torch.device("cpu")


def ancestors(parents: list[int], row: int) -> list[int]:
    """The row itself, its parent, its parent's parent, and so on to the end of the cache."""
    found = []
    while row != CACHE_END:
        found.append(row)
        row = parents[row]
    return found


def wrong_rows(layout, parents: list[int]) -> list[int]:
    """Rows of the first text whose mask or position is not what a walk along the parents gives."""
    wrong = []
    for row in range(len(parents)):
        seen = layout.visible[0, row].nonzero().flatten().tolist()
        found = ancestors(parents, row)
        if seen != sorted(found) or layout.depth[0, row] != len(found) - 1:
            wrong.append(row)
    return wrong


def random_parents(rng: np.random.Generator) -> list[int]:
    return [int(rng.integers(CACHE_END, row)) for row in range(int(rng.integers(1, 15)))]


def test_a_row_sees_itself_and_its_ancestors_and_its_position_is_one_past_its_parents():
    rng = np.random.default_rng(0)
    for _ in range(50):
        parents = random_parents(rng)
        assert wrong_rows(tree(parents), parents) == []


def test_a_mask_that_forgets_the_tree_is_caught():
    for broken in (path(5), np.full(5, CACHE_END)):  # a causal mask, and rows that see themselves alone
        assert wrong_rows(tree(broken), [-1, 0, 0, 1, 2])


def test_every_text_of_a_batch_may_have_a_tree_of_its_own():
    parents = np.array([[-1, 0, 1, 2], [-1, 0, 0, 1], [-1, -1, -1, -1]])
    layout = tree(parents)
    for b in range(3):
        alone = tree(parents[b])
        assert torch.equal(layout.visible[b], alone.visible[0])
        assert torch.equal(layout.depth[b], alone.depth[0])


@pytest.mark.parametrize("parents", [[0], [-1, 1], [-1, 2, 0], [-2], [[-1, 0, 1], [-1, 0, 2]]])
def test_a_parent_that_does_not_come_before_its_row_is_refused(parents):
    with pytest.raises(ValueError, match="before it"):
        tree(np.array(parents))


def test_plain_text_is_causal_and_has_no_lookahead():
    layout = tree(path(5))
    assert torch.equal(layout.visible[0], torch.ones(5, 5).tril().bool())
    assert layout.depth[0].tolist() == [0, 1, 2, 3, 4]
    assert layout.lookahead.tolist() == []


def test_a_draft_pass_is_one_path_from_the_root_through_the_lookahead_rows():
    draft = Shape(n_lookahead=4).on(CPU).layout
    for name in ("visible", "depth"):
        assert torch.equal(getattr(draft, name), getattr(tree(path(5)), name))
    assert draft.lookahead.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(("n_drafts", "n_lookahead"), [(0, 3), (1, 1), (2, 4), (4, 4), (3, 0)])
def test_fused_rows_see_what_they_should_and_nothing_else(n_drafts, n_lookahead):
    layout = Shape(chain(n_drafts), n_lookahead).on(CPU).layout
    names = [("real", j, 0) for j in range(n_drafts + 1)]  # root, d_1, ..., d_k
    names += [("lookahead", j, i) for j in range(n_drafts + 1) for i in range(1, n_lookahead + 1)]
    assert layout.visible.shape == (1, len(names), len(names))
    assert layout.lookahead.tolist() == [i - 1 for kind, _, i in names if kind == "lookahead"]
    for row, (kind, j, i) in enumerate(names):
        assert layout.depth[0, row] == j + i  # at the position of d_j, plus i
        for column, (other_kind, other_j, other_i) in enumerate(names):
            if other_kind == "real":
                expected = other_j <= j
            else:  # a look-ahead row is seen by later rows of its own group alone, and by no real row
                expected = kind == "lookahead" and other_j == j and other_i <= i
            assert layout.visible[0, row, column] == expected


def test_rows_of_a_fused_tree_see_their_own_path_alone():
    layout = Shape(DraftTree((0, 0, 1)), 2).on(CPU).layout
    seen = [row.nonzero().flatten().tolist() for row in layout.visible[0]]
    assert seen[:4] == [[0], [0, 1], [0, 2], [0, 1, 3]]
    assert seen[4:8] == [[0, 4], [0, 4, 5], [0, 1, 6], [0, 1, 6, 7]]
    assert seen[8:] == [[0, 2, 8], [0, 2, 8, 9], [0, 1, 3, 10], [0, 1, 3, 10, 11]]
    assert layout.depth[0].tolist() == [0, 1, 1, 2, 1, 2, 2, 3, 2, 3, 3, 4]


def test_training_and_fused_decoding_share_one_layout():
    training = with_groups(path(4), [0, 1, 2, 3], 2)
    fused = Shape(chain(3), 2).on(CPU).layout
    for name in ("visible", "depth", "lookahead"):
        assert torch.equal(getattr(training, name), getattr(fused, name))


def test_groups_of_any_lengths_hang_from_their_anchors():
    """The reference writes down the parents row by row."""
    rng = np.random.default_rng(1)
    for _ in range(50):
        parents = random_parents(rng)
        anchors = rng.integers(0, len(parents), size=int(rng.integers(0, 5)))
        lengths = rng.integers(0, 4, size=len(anchors))
        rows, lookahead = list(parents), []
        for anchor, length in zip(anchors.tolist(), lengths.tolist(), strict=True):
            for i in range(length):
                rows.append(anchor if i == 0 else len(rows) - 1)
                lookahead.append(i)
        layout = with_groups(parents, anchors, lengths)
        assert layout.lookahead.tolist() == lookahead
        assert layout.visible.shape == (1, len(rows), len(rows))
        assert wrong_rows(layout, rows) == []


def test_groups_hang_from_anchors_of_their_own_in_each_text_of_a_batch():
    layout = with_groups(path(5), np.array([[3, 0], [1, 4]]), 2)
    assert layout.depth[:, 5:].tolist() == [[4, 5, 1, 2], [2, 3, 5, 6]]
    assert layout.visible[1, 6].nonzero().flatten().tolist() == [0, 1, 5, 6]
    assert layout.lookahead.tolist() == [0, 1, 0, 1]
