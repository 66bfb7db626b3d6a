"""The layouts of the passes, row by row. The mask builder itself is tested by the course's graders, exercise 2."""

import pytest
import torch

from minipass.layout import path, tree, with_groups
from minipass.trees import DraftTree, Shape, chain

CPU = torch.device("cpu")


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
