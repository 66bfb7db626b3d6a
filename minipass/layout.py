"""A pass is a tree of rows: this file turns their parents into the attention mask and the positions.

Each row has a parent: another row of the same pass, or the end of the cache. A row sees the whole cache, its ancestors
and itself, and its position is its parent's plus one. Plain text is a path. A draft pass is a path that ends in
look-ahead rows. A fused pass hangs a group of look-ahead rows from each node of a tree of drafts. A training sequence
hangs groups from random cuts of a text (PaSS, section 3; arXiv 2311.13581).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

CACHE_END = -1  # the parent of a row that directly follows the cache


@dataclass(frozen=True, eq=False)
class Layout:
    """The R rows of one pass: first the real ones, then the Q look-ahead rows.

    The first dimension is the batch B, or 1 where all its texts share the layout.
    visible: (B or 1, R, R) bool, visible[b, r, s] is True where row r sees row s of the same pass.
    depth: (B or 1, R) int64, a row's position counted from the end of the cache.
    lookahead: (Q,) int64, i - 1 for the row of the look-ahead token [LA]_i.
    """

    visible: torch.Tensor
    depth: torch.Tensor
    lookahead: torch.Tensor

    def to(self, device: torch.device | str) -> "Layout":
        """The same layout on another device."""
        return Layout(self.visible.to(device), self.depth.to(device), self.lookahead.to(device))


def tree(parents: Sequence[int] | np.ndarray, lookahead: Sequence[int] | np.ndarray = ()) -> Layout:
    """Turns parents into mask and positions: the one mask builder of this package.

    parents: (R,) or (B, R) integers, a list, range or array; parents[r] is a row before r, or CACHE_END.
    lookahead: (Q,) integers, which look-ahead token each of the last Q rows is, counted from 0; Q may be 0.
    Raises ValueError for a parent that is neither an earlier row nor CACHE_END.
    """
    parents = np.atleast_2d(np.asarray(parents, dtype=np.int64))  # (B, R)
    n_batch, n_rows = parents.shape
    if ((parents < CACHE_END) | (parents >= np.arange(n_rows))).any():
        raise ValueError("each row's parent must be CACHE_END or a row before it")
    visible = np.zeros((n_batch, n_rows + 1, n_rows), dtype=bool)  # the last row, for CACHE_END, sees no row
    batch = np.arange(n_batch)
    for row in range(n_rows):
        visible[:, row] = visible[batch, parents[:, row]]  # what the parent sees ...
        visible[:, row, row] = True  # ... and itself
    visible = visible[:, :n_rows].copy()
    depth = np.count_nonzero(visible, axis=-1) - 1
    return Layout(*map(torch.from_numpy, (visible, depth, np.array(lookahead, dtype=np.int64))))


def path(n_rows: int) -> np.ndarray:
    """Parents of a path: the first row follows the cache, each other row the one before it. (n_rows,) int64"""
    return np.arange(n_rows) + CACHE_END


def with_groups(
    parents: Sequence[int] | np.ndarray, anchors: Sequence[int] | np.ndarray, n_lookahead: int | Sequence[int]
) -> Layout:
    """Real rows, then for each anchor a group: a path of look-ahead rows [LA]_1, [LA]_2, .. that hangs from it.

    parents: (P,) of the real rows. anchors: (G,) or (B, G) real rows; G may be 0. n_lookahead: the rows of every group,
    an int, or of each group, (G,); 0 is no rows. Each is a list, range or array of integers.
    Training hangs groups from random cuts of a text, a fused pass from every node, a draft pass from the root.
    """
    anchors = np.atleast_2d(np.asarray(anchors, dtype=np.int64))  # (B, G)
    lengths = np.broadcast_to(np.asarray(n_lookahead, dtype=np.int64), anchors.shape[1])
    first_row = len(parents) + lengths.cumsum() - lengths  # of each group
    hanging = np.arange(len(parents), len(parents) + lengths.sum()) - 1  # each row from the one before it ...
    rows = np.broadcast_to(np.concatenate([parents, hanging]), (len(anchors), len(parents) + len(hanging))).copy()
    rows[:, first_row[lengths > 0]] = anchors[:, lengths > 0]  # ... but the first of a group from its anchor
    return tree(rows, np.concatenate([np.arange(0), *map(np.arange, lengths)]))
