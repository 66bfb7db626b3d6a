"""The mask builder against slow, obvious references: walking from parent to parent, and the rules of the fused pass."""

import numpy as np
import pytest
import torch

from minipass.layout import (
    CACHE_END,
    chain,
    draft_layout,
    fused_layout,
    lookahead_ids,
    path,
    path_layout,
    tree,
    with_groups,
)

CPU = torch.device("cpu")


def ancestors(parents: list[int], row: int) -> list[int]:
    """The row itself, its parent, its parent's parent, and so on to the end of the cache."""
    found = []
    while row != CACHE_END:
        found.append(row)
        row = parents[row]
    return found


def test_a_row_sees_itself_and_its_ancestors_and_stands_one_behind_its_parent():
    rng = np.random.default_rng(0)
    for _ in range(50):
        n_rows = int(rng.integers(1, 15))
        parents = [int(rng.integers(CACHE_END, row)) for row in range(n_rows)]
        layout = tree(np.array(parents))
        for row in range(n_rows):
            seen = layout.visible[0, row].nonzero().flatten().tolist()
            assert seen == sorted(ancestors(parents, row))
            assert layout.depth[0, row] == len(seen) - 1


def test_every_row_of_a_batch_may_have_a_tree_of_its_own():
    parents = np.array([[-1, 0, 1, 2], [-1, 0, 0, 1], [-1, -1, -1, -1]])
    layout = tree(parents)
    for b in range(3):
        alone = tree(parents[b])
        assert torch.equal(layout.visible[b], alone.visible[0])
        assert torch.equal(layout.depth[b], alone.depth[0])


@pytest.mark.parametrize("parents", [[0], [-1, 1], [-1, 2, 0], [-2], [[-1, 0, 1], [-1, 0, 2]]])
def test_a_parent_that_does_not_stand_before_its_row_is_refused(parents):
    with pytest.raises(ValueError, match="before it"):
        tree(np.array(parents))


def test_plain_text_is_causal():
    layout = path_layout(5, CPU)
    assert torch.equal(layout.visible[0], torch.ones(5, 5).tril().bool())
    assert layout.depth[0].tolist() == [0, 1, 2, 3, 4]


def test_a_draft_pass_is_one_path_from_the_root_through_the_lookahead_rows():
    for name in ("visible", "depth"):
        assert torch.equal(getattr(draft_layout(4, CPU), name), getattr(path_layout(5, CPU), name))


@pytest.mark.parametrize(("n_drafts", "n_lookahead"), [(0, 3), (1, 1), (2, 4), (4, 4), (3, 0)])
def test_fused_rows_see_what_they_should_and_nothing_else(n_drafts, n_lookahead):
    layout = fused_layout(chain(n_drafts), n_lookahead, CPU)
    names = [("real", j, 0) for j in range(n_drafts + 1)]  # root, d_1, ..., d_k
    names += [("lookahead", j, i) for j in range(n_drafts + 1) for i in range(1, n_lookahead + 1)]
    assert layout.visible.shape == (1, len(names), len(names))
    for row, (kind, j, i) in enumerate(names):
        assert layout.depth[0, row] == j + i  # at the position of d_j, plus i
        for column, (other_kind, other_j, other_i) in enumerate(names):
            if other_kind == "real":
                expected = other_j <= j
            else:  # a look-ahead row is seen by later rows of its own group alone, and by no real row
                expected = kind == "lookahead" and other_j == j and other_i <= i
            assert layout.visible[0, row, column] == expected


def test_training_and_fused_decoding_share_one_layout():
    training = with_groups(path(4), np.array([[0, 1, 2, 3]]), 2)
    fused = fused_layout(chain(3), 2, CPU)
    assert torch.equal(training.visible, fused.visible)
    assert torch.equal(training.depth, fused.depth)


def test_groups_hang_from_their_anchors_in_each_row_of_a_batch():
    layout = with_groups(path(5), np.array([[3, 0], [1, 4]]), 2)
    assert layout.depth[:, 5:].tolist() == [[4, 5, 1, 2], [2, 3, 5, 6]]
    assert layout.visible[1, 6].nonzero().flatten().tolist() == [0, 1, 5, 6]


def test_lookahead_ids_lie_behind_the_vocabulary_and_repeat_for_each_group():
    assert lookahead_ids(100, 3, 0, 2).tolist() == [100, 101, 102, 100, 101]
