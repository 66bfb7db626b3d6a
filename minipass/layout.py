"""Rows of a pass: who sees whom, and where each row stands. Every pass of every method, and training, is built here.

A pass is a tree. Each row has a parent: another row of the same pass, or the end of the cache. A row sees the whole
cache, its ancestors and itself; its position is its parent's plus one. Nothing else is needed: plain causal text is a
path, a draft pass is a path with look-ahead rows hanging from its end, a fused pass has look-ahead rows hanging from
every row of the path, and a training sequence is the text with look-ahead rows hanging from random cuts (PaSS,
section 3; arXiv 2311.13581).
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

CACHE_END = -1  # the parent of a row that directly follows what is in the cache


@dataclass(frozen=True)
class Layout:
    """Where the R rows of one pass stand; `B` is left out (1) when all rows of the batch share it.

    visible: (B or 1, R, R) bool, visible[b, r, s] is True where row r sees row s of the same pass.
    depth: (B or 1, R) int64, a row's position counted from the end of the cache.
    """

    visible: torch.Tensor
    depth: torch.Tensor

    def to(self, device: torch.device | str) -> "Layout":
        """The same layout on another device."""
        return Layout(self.visible.to(device), self.depth.to(device))


def tree(parents: np.ndarray) -> Layout:
    """Turns parents into mask and positions: the one mask builder of this package.

    parents: (R,) or (B, R) integers; parents[r] is a row before r, or CACHE_END.
    Raises ValueError when a parent does not stand before its row.
    """
    parents = np.atleast_2d(np.asarray(parents))  # (B, R)
    n_batch, n_rows = parents.shape
    if ((parents < CACHE_END) | (parents >= np.arange(n_rows))).any():
        raise ValueError("each row's parent must be CACHE_END or a row before it")
    visible = np.zeros((n_batch, n_rows + 1, n_rows), dtype=bool)  # one more row, the last: CACHE_END sees no row
    batch = np.arange(n_batch)
    for row in range(n_rows):
        visible[:, row] = visible[batch, parents[:, row]]  # what the parent sees ...
        visible[:, row, row] = True  # ... and itself
    visible = visible[:, :n_rows]
    depth = visible.sum(-1) - 1  # as many rows before it as it has ancestors
    return Layout(torch.from_numpy(visible.copy()), torch.from_numpy(depth))


def path_with_groups(n_path: int, anchors: np.ndarray, n_lookahead: int) -> Layout:
    """A path of n_path real rows, then for each anchor a path of n_lookahead look-ahead rows hanging from it.

    anchors: (G,) or (B, G) rows of the path. The rows stand in this order: path, group 0, group 1, ...
    Returns a Layout of R = n_path + G * n_lookahead rows. One layout for all: training hangs the
    groups from random cuts, fused decoding from every row, a draft pass from the last row, a verify pass has none.
    """
    anchors = np.atleast_2d(np.asarray(anchors, dtype=np.int64))  # (B, G)
    n_batch, n_groups = anchors.shape
    path = np.arange(n_path) - 1
    first_row = n_path + n_lookahead * np.arange(n_groups)  # of each group
    groups = first_row[:, None] + np.arange(n_lookahead) - 1  # (G, L): each row hangs from the one before it ...
    groups = np.broadcast_to(groups, (n_batch, n_groups, n_lookahead)).copy()
    groups[:, :, :1] = anchors[:, :, None]  # ... but the first from its anchor
    path = np.broadcast_to(path, (n_batch, n_path))
    return tree(np.concatenate([path, groups.reshape(n_batch, -1)], axis=1))


@lru_cache(maxsize=256)
def path_layout(n_path: int, device: torch.device) -> Layout:
    """A path of real rows: plain decoding (1 row) and the verify pass (root or free token, then the drafts)."""
    return path_with_groups(n_path, np.zeros(0), 0).to(device)


@lru_cache(maxsize=256)
def draft_layout(n_lookahead: int, device: torch.device) -> Layout:
    """Rows [root, LA_1..LA_L] of a draft pass (Algorithm 1)."""
    return path_with_groups(1, np.zeros(1), n_lookahead).to(device)


@lru_cache(maxsize=256)
def fused_layout(n_drafts: int, n_lookahead: int, device: torch.device) -> Layout:
    """Rows of a fused pass: [root, d_1..d_k], then k + 1 groups of look-ahead rows; group j hangs from row j."""
    return path_with_groups(1 + n_drafts, np.arange(1 + n_drafts), n_lookahead).to(device)


def lookahead_ids(vocab_size: int, n_lookahead: int, n_groups: int = 1) -> torch.Tensor:
    """Input ids of n_groups groups of look-ahead tokens, (n_groups * n_lookahead,) int64.

    Look-ahead token [LA]_i has the input id vocab_size + i - 1, behind all ordinary tokens; it is never an output.
    """
    return (vocab_size + torch.arange(n_lookahead)).repeat(n_groups)
