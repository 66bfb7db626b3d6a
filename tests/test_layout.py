"""The layouts of the passes. The mask builder itself is tested by the course's graders, exercise 2."""

import pytest
import torch
from conftest import SPARSE, TREE

from minipass.extras.course.test_exercises import slow_layout, with_hanging
from minipass.trees import DraftTree, Shape, chain

SHAPES = [
    Shape(),
    Shape(n_lookahead=4),
    *(Shape(chain(n_drafts), n_lookahead) for n_drafts, n_lookahead in ((1, 1), (2, 4), (4, 4), (3, 0))),
    *(Shape(drafts, n_lookahead) for drafts in (DraftTree((0, 0, 1)), TREE, SPARSE) for n_lookahead in (1, 3)),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_pass_is_its_draft_tree_and_a_group_that_hangs_from_each_node(shape):
    parents, lengths = [-1, *shape.tree.parents], shape.tree.lengths(shape.n_lookahead)
    ids = [i for length in lengths for i in range(length)]
    expected = slow_layout(with_hanging(parents, range(len(parents)), lengths), ids)
    layout = shape.on(torch.device("cpu")).layout
    for name in ("visible", "depth", "lookahead"):
        assert torch.equal(getattr(layout, name), getattr(expected, name))


def test_rows_of_a_fused_tree_see_their_own_path_alone():
    """Written by hand: the reference, too, could be wrong."""
    layout = Shape(DraftTree((0, 0, 1)), 2).on(torch.device("cpu")).layout
    seen = [row.nonzero().flatten().tolist() for row in layout.visible[0]]
    assert seen[:4] == [[0], [0, 1], [0, 2], [0, 1, 3]]
    assert seen[4:8] == [[0, 4], [0, 4, 5], [0, 1, 6], [0, 1, 6, 7]]
    assert seen[8:] == [[0, 2, 8], [0, 2, 8, 9], [0, 1, 3, 10], [0, 1, 3, 10, 11]]
    assert layout.depth[0].tolist() == [0, 1, 1, 2, 1, 2, 2, 3, 2, 3, 3, 4]
