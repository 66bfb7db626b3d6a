"""Rows of a pass: who sees whom, and where each row stands. Every pass of every method, and training, is built here.

A pass is a tree. Each row has a parent: another row of the same pass, or the end of the cache. A row sees the whole
cache, its ancestors and itself; its position is its parent's plus one. Nothing else is needed: plain causal text is a
path, a draft pass is a path with look-ahead rows hanging from its end, a fused pass has look-ahead rows hanging from
every row of a path (or tree) of drafts, and a training sequence is the text with look-ahead rows hanging from random
cuts (PaSS, section 3; arXiv 2311.13581).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

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


def path(n_rows: int) -> np.ndarray:
    """Parents of a path: each row hangs from the one before it, the first from the end of the cache. (n_rows,) int64"""
    return np.arange(n_rows) + CACHE_END


def with_groups(parents: np.ndarray, anchors: np.ndarray, n_lookahead: int | Sequence[int]) -> Layout:
    """Real rows, then for each anchor a path of look-ahead rows that hangs from it.

    parents: (P,) of the real rows; anchors: (G,) or (B, G), real rows; n_lookahead: rows of each group, or (G,) of each
    its own. The rows stand in this order: real, group 0, group 1, ... One layout for all: training hangs the groups
    from random cuts of a text, fused decoding from every row, a draft pass from the last row, a verify pass has none.
    """
    anchors = np.atleast_2d(np.asarray(anchors, dtype=np.int64))  # (B, G)
    lengths = np.broadcast_to(n_lookahead, anchors.shape[1])
    first_row = len(parents) + lengths.cumsum() - lengths  # of each group
    hanging = np.arange(len(parents), len(parents) + lengths.sum()) - 1  # each row from the one before it ...
    rows = np.broadcast_to(np.concatenate([parents, hanging]), (len(anchors), len(parents) + len(hanging))).copy()
    rows[:, first_row[lengths > 0]] = anchors[:, lengths > 0]  # ... but the first of a group from its anchor
    return tree(rows)


@dataclass(frozen=True)
class DraftTree:
    """The drafts that a round tests, as nodes of a tree. Node 0 is the root, nodes 1..N are drafts; a path is a chain.

    parents: (N,) the parent of node i is parents[i - 1]. Nodes stand by depth, so that every beginning is a tree, and
    the row of a node in a pass is its number. Siblings are rivals for one place: the first has rank 0.
    groups: (1 + N,) how many look-ahead tokens a fused pass has behind each node, for the case that it is the last one
    kept; None: as many as the tree is deep. Where the next round misses some, it tests drafts that are worth nothing.
    Raises ValueError when the nodes stand in another order, or when there is no look-ahead token behind the root.
    """

    parents: tuple[int, ...]
    groups: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.groups is not None and (len(self.groups) != 1 + len(self.parents) or self.groups[0] < 1):
            raise ValueError("groups must give each node's look-ahead tokens, the root's at least 1")
        if any(not 0 <= parent <= i for i, parent in enumerate(self.parents)):
            raise ValueError("each node's parent must be a node before it")
        if list(self.depth) != sorted(self.depth):
            raise ValueError("the nodes of a draft tree must stand by depth")

    @cached_property
    def depth(self) -> tuple[int, ...]:
        """Of the nodes 0..N: how many drafts lie on the way to each, itself included."""
        depth = [0]
        for parent in self.parents:
            depth.append(depth[parent] + 1)
        return tuple(depth)

    @cached_property
    def rank(self) -> tuple[int, ...]:
        """Of the nodes 1..N: how many siblings stand before each."""
        return tuple(self.parents[:i].count(parent) for i, parent in enumerate(self.parents))

    @cached_property
    def children(self) -> tuple[tuple[int, ...], ...]:
        """Of the nodes 0..N: their children, by rank."""
        found: list[list[int]] = [[] for _ in self.depth]
        for node, parent in enumerate(self.parents, 1):
            found[parent].append(node)
        return tuple(map(tuple, found))

    @property
    def width(self) -> int:
        """The most children of a node; 1 for a chain."""
        return 1 + max(self.rank, default=0)

    @lru_cache(maxsize=256)  # noqa: B019 - trees are few and small
    def cut(self, depth: int) -> "DraftTree":
        """The tree without the nodes deeper than `depth`."""
        n_nodes = sum(d <= depth for d in self.depth)
        return DraftTree(self.parents[: n_nodes - 1], self.groups and self.groups[:n_nodes])

    def lengths(self, n_lookahead: int) -> list[int]:
        """Look-ahead tokens behind each of the nodes 0..N when at most n_lookahead are of use."""
        return [min(n, n_lookahead) for n in self.groups or [n_lookahead] * len(self.depth)]


@lru_cache(maxsize=256)
def chain(n_drafts: int) -> DraftTree:
    """The tree without a fork: d_1..d_L."""
    return DraftTree(tuple(range(n_drafts)))


@lru_cache(maxsize=256)
def path_layout(n_path: int, device: torch.device) -> Layout:
    """A path of real rows: plain decoding (1 row) and the verify pass (root or free token, then the drafts)."""
    return tree(path(n_path)).to(device)


@lru_cache(maxsize=256)
def draft_layout(n_lookahead: int, device: torch.device) -> Layout:
    """Rows [root, LA_1..LA_L] of a draft pass (Algorithm 1)."""
    return with_groups(path(1), np.zeros(1), n_lookahead).to(device)


@lru_cache(maxsize=256)
def fused_layout(drafts: DraftTree, n_lookahead: int, device: torch.device) -> Layout:
    """Rows of a fused pass: the root and N drafts, then 1 + N groups of look-ahead rows; group j hangs from row j."""
    parents = np.array([CACHE_END, *drafts.parents])
    return with_groups(parents, np.arange(len(parents)), drafts.lengths(n_lookahead)).to(device)


@lru_cache(maxsize=256)
def group_rows(drafts: DraftTree, n_lookahead: int, device: torch.device) -> torch.Tensor:
    """Where in a fused pass the next round's drafts come from when node j is the last one kept: (1 + N, n_lookahead).

    For look-ahead tokens that are not there, another row stands in, the last of the group or of the root's group: any
    distribution may be drafted from.
    """
    lengths = np.array(drafts.lengths(n_lookahead))
    first_row = len(lengths) + lengths.cumsum() - lengths
    first_row, lengths = np.where(lengths > 0, (first_row, lengths), ([first_row[0]], [lengths[0]]))
    rows = first_row[:, None] + np.minimum(np.arange(n_lookahead), lengths[:, None] - 1)
    return torch.from_numpy(rows).to(device)


class NodeTensors(NamedTuple):
    """A DraftTree's numbers on a device, int64. Of the nodes 1..N, (N,) each: parents; place, the look-ahead row that
    drafts them, counted from 0; rank. depth: of the nodes 0..N. by_rank: which of the nodes 1..N, counted from 0, have
    rank 0, 1, ..."""

    parents: torch.Tensor
    place: torch.Tensor
    rank: torch.Tensor
    depth: torch.Tensor
    by_rank: tuple[torch.Tensor, ...]


@lru_cache(maxsize=256)
def node_tensors(drafts: DraftTree, device: torch.device) -> NodeTensors:
    """Made once, since a round must bring nothing from the host."""
    by_rank = [[i for i, other in enumerate(drafts.rank) if other == rank] for rank in range(drafts.width)]
    numbers = (drafts.parents, [depth - 1 for depth in drafts.depth[1:]], drafts.rank, drafts.depth, *by_rank)
    tensors = [torch.tensor(each, dtype=torch.int64, device=device) for each in numbers]
    return NodeTensors(*tensors[:4], by_rank=tuple(tensors[4:]))


@lru_cache(maxsize=256)
def ancestors(drafts: DraftTree, device: torch.device) -> torch.Tensor:
    """(1 + N, 1 + N) bool: [i, j] is True where node j lies on the way to node i, or is it."""
    return tree([CACHE_END, *drafts.parents]).visible[0].to(device)


def lookahead_ids(vocab_size: int, *lengths: int) -> torch.Tensor:
    """Input ids of groups with so many look-ahead tokens each, one behind the other: (sum of lengths,) int64.

    Look-ahead token [LA]_i has the input id vocab_size + i - 1, behind all ordinary tokens; it is never an output.
    """
    return torch.cat([vocab_size + torch.arange(length) for length in lengths])


@lru_cache(maxsize=256)
def group_ids(vocab_size: int, lengths: Sequence[int], device: torch.device) -> torch.Tensor:
    """These on a device, made once."""
    return lookahead_ids(vocab_size, *lengths).to(device)
