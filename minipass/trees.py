"""Draft trees, pass shapes, and acceptance along a tree: what one pass verifies, and what it drafts for the next one.

A chain d_1..d_L is the tree without a fork, and no drafts at all is the tree of the root alone. So plain decoding, the
paper's two passes, the fused pass and trees of alternatives are one step with other shapes.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from minipass.errors import InputError, whole
from minipass.layout import CACHE_END, Layout, with_groups
from minipass.sampling import ACCEPTANCE, TARGET, Distribution, Sampling, reject, uniform

MOST_DRAFTS = 256  # beyond, a pass only costs


@dataclass(frozen=True)
class DraftTree:
    """The drafts that a pass verifies. Node 0 is the root, nodes 1..N are drafts, ordered by depth.

    parents: (N,) the parent of node i is parents[i - 1]. Siblings are alternatives for one place, the likeliest first.
    groups: (1 + N,) how many look-ahead tokens a fused pass has after each node, in case it is the last one accepted;
    None: as many as the tree is deep. Where some are missing, the next pass verifies drafts that are worth little.
    Raises InputError when the nodes come in another order, or when the root has no look-ahead token.
    """

    parents: Sequence[int] = ()
    groups: Sequence[int] | None = None

    def __post_init__(self) -> None:
        for name in ("parents", "groups") if self.groups is not None else ("parents",):
            given = getattr(self, name)
            if not isinstance(given, Iterable):
                raise InputError(f"the {name} of a draft tree must be a sequence, not {given!r}")
            object.__setattr__(self, name, tuple(whole(number, f"one of the {name}", 0) for number in given))
        if len(self.parents) > MOST_DRAFTS or any(parent > i for i, parent in enumerate(self.parents)):
            raise InputError(
                f"each of at most {MOST_DRAFTS} nodes must have a parent before it, not as in {self.parents}"
            )
        if list(self.depth) != sorted(self.depth):
            raise InputError(f"the nodes of a draft tree must be ordered by depth, not as in {self.parents}")
        if self.groups is not None and (len(self.groups) != 1 + len(self.parents) or self.groups[0] < 1):
            raise InputError("groups must give the look-ahead tokens after each node, at least 1 after the root")

    @cached_property
    def depth(self) -> tuple[int, ...]:
        """Of the nodes 0..N: the number of drafts on the way to each, itself included."""
        depth = [0]
        for parent in self.parents:
            depth.append(depth[parent] + 1)
        return tuple(depth)

    @cached_property
    def rank(self) -> tuple[int, ...]:
        """Of the nodes 1..N: the number of siblings before each."""
        return tuple(self.parents[:i].count(parent) for i, parent in enumerate(self.parents))

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
        """Look-ahead tokens after each of the nodes 0..N, when at most n_lookahead are of use."""
        return [min(n, n_lookahead) for n in self.groups or [n_lookahead] * len(self.depth)]


def chain(n_drafts: int) -> DraftTree:
    """The tree without a fork: d_1..d_L. Raises InputError for a length out of bounds."""
    return DraftTree(range(whole(n_drafts, "the number of drafts", 0, MOST_DRAFTS)))


class Level(NamedTuple):
    """Drafts that are drawn together, int64. place: (n,), the depths whose look-ahead rows draw. parents: (n,), the
    nodes whose tokens these rows may know. source, rank: (m,), of each draft drawn, its place's index and its rank."""

    place: torch.Tensor
    parents: torch.Tensor
    source: torch.Tensor
    rank: torch.Tensor


class Nodes(NamedTuple):
    """A Shape's numbers on a device, int64 unless said otherwise, made once. N drafts, up to L look-ahead tokens.

    layout: of the rows [root, drafts, look-ahead groups]. depth, number: (1 + N,). parents: (N,) of the drafts.
    elsewhere: (1 + N, 1 + N) bool, [i, j] is True unless node j is on the way to node i, or is it.
    path: (1 + N, 1 + D), the nodes on the way to each from the root, padded with the node itself.
    group_rows: (1 + N, L), the rows after each node that draft for the next pass; where a look-ahead token is missing,
    the last of the group, or the root's, takes its place. by_rank: for each rank the drafts that have it, as nodes.
    levels: drafts in the order in which they are drawn. p_row: (1 + N,), which of all their places drew the children.
    """

    layout: Layout
    elsewhere: torch.Tensor
    depth: torch.Tensor
    number: torch.Tensor
    parents: torch.Tensor
    path: torch.Tensor
    group_rows: torch.Tensor
    p_row: torch.Tensor
    by_rank: tuple[torch.Tensor, ...]
    levels: tuple[Level, ...]


@dataclass(frozen=True)
class Shape:
    """What a pass does: the draft tree that it verifies, and at most n_lookahead look-ahead tokens after each node."""

    tree: DraftTree = DraftTree()
    n_lookahead: int = 0

    def cut(self, room: int) -> "Shape":
        """What is of use when at most `room` more tokens are wanted: the last of a turn is never a draft."""
        return Shape(self.tree.cut(room - 1), max(0, min(self.n_lookahead, room - 2)))

    @property
    def n_rows(self) -> int:
        """Rows of the pass."""
        return len(self.tree.depth) + sum(self.tree.lengths(self.n_lookahead))

    @lru_cache(maxsize=1024)  # noqa: B019 - shapes are few and small
    def on(self, device: torch.device, by_parent: bool = False) -> Nodes:
        """The shape's numbers on a device. by_parent: children are drawn depth by depth, and know their parent's token;
        else all drafts are drawn at once, from one distribution for each depth."""
        drafts, rows = self.tree, [CACHE_END, *self.tree.parents]
        lengths = np.array(drafts.lengths(self.n_lookahead))
        first_row = len(lengths) + lengths.cumsum() - lengths
        first, length = np.where(lengths > 0, (first_row, lengths), (first_row[:1], lengths[:1]))
        group_rows = first[:, None] + np.minimum(np.arange(self.n_lookahead), length[:, None] - 1)
        layout = with_groups(rows, range(len(rows)), lengths)
        visible = layout.visible[0, : len(rows), : len(rows)]  # of the nodes alone
        ways = [node.nonzero()[:, 0].tolist() for node in visible]
        paths = [way + way[-1:] * (1 + drafts.depth[-1] - len(way)) for way in ways]
        by_rank = [[node for node, rank in enumerate(drafts.rank, 1) if rank == r] for r in range(drafts.width)]
        # Which node's place draws a node's children: its own, or, if not by_parent, that of the first of its depth.
        draws = [i if by_parent else drafts.depth.index(depth) for i, depth in enumerate(drafts.depth)]
        drawing = sorted({draws[parent] for parent in drafts.parents})
        p_row = [drawing.index(node) if node in drawing else len(drawing) for node in draws]
        levels = []
        for _, group in groupby(drawing, key=lambda node: by_parent and drafts.depth[node]):
            level, drawn = list(group), zip(drafts.parents, drafts.rank, strict=True)
            drawn = [(level.index(draws[parent]), rank) for parent, rank in drawn if draws[parent] in level]
            levels.append(([drafts.depth[node] for node in level], level, *zip(*drawn, strict=True)))

        def put(numbers: Sequence) -> torch.Tensor:
            return torch.as_tensor(np.array(numbers, dtype=np.int64), device=device)

        numbers = map(put, (drafts.depth, range(len(rows)), drafts.parents, paths, group_rows, p_row))
        levels = tuple(Level(*map(put, level)) for level in levels)
        return Nodes(layout.to(device), ~visible.to(device), *numbers, by_rank=tuple(map(put, by_rank)), levels=levels)


class Drafts(NamedTuple):
    """tokens: (B, N) int64, a draft for each node but the root. p: (B, 1 + N, V) float64, what each node's children
    were drawn from, 0 for a node without; None where the rule needs no p."""

    tokens: torch.Tensor
    p: torch.Tensor | None = None


def accept(
    nodes: Nodes, drafts: Drafts, q: Distribution, sampling: Sampling, keys: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The last node of a draft tree that is accepted, with all on the way to it, and the token that follows it.

    q: (B, 1 + N, K), the target distributions after the root and after each draft. keys: (3, B, 1 + N), the noise of
    the place after each node. Two exact rules:

    - coupled (no p): the target draws a token after each node, as plain decoding does; a draft is right if it is that.
    - rejection (p given): siblings are tested one after the other, each with what those before it left of p and q
      (`reject`; for a chain this is the rule of the paper, section 3). The token after the last accepted node comes
      from what is left: the residual after a rejection, q itself after a leaf.

    Returns the last accepted node (B,), 0 for the root, and next_token (B,).
    """
    if drafts.p is not None:
        right = torch.ones(q.tokens.shape[:2], dtype=torch.bool, device=q.tokens.device)
        left, p, taken = q.probs.clone(), drafts.p.clone(), torch.zeros_like(right)
        for siblings in nodes.by_rank:  # no two with the same parent
            parents, tokens = nodes.parents[siblings - 1], drafts.tokens[:, siblings - 1]
            u = uniform(keys[ACCEPTANCE][:, parents], tokens[..., None]).squeeze(-1)
            here = Distribution(q.tokens[:, parents], left[:, parents])
            fits, left[:, parents], p[:, parents] = reject(tokens, p[:, parents], here, u)
            right[:, siblings] = fits & ~taken[:, parents]
            taken[:, parents] |= fits
        q = Distribution(q.tokens, left)
    drawn = sampling.draw(q, keys[TARGET])  # (B, 1 + N)
    if drafts.p is None:
        right = F.pad(drafts.tokens == drawn[:, nodes.parents], (1, 0), value=True)  # (B, 1 + N)
    accepted = (right[:, None] | nodes.elsewhere).all(-1)  # right, and so is all on the way to it: a path
    last = (accepted * nodes.number).amax(1)  # nodes are ordered by depth
    return last, drawn.gather(1, last[:, None])[:, 0]
