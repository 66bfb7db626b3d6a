"""Draft trees, pass shapes, and acceptance along a tree: what one pass verifies, and what it drafts for the next one.

A chain d_1..d_L is a tree without a fork; no drafts at all is the tree of the root alone. So plain decoding, the
paper's two passes, the fused pass and trees of drafts are the same turn with different shapes.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from minipass.errors import InputError, whole
from minipass.layout import CACHE_END, Layout, with_groups
from minipass.sampling import ACCEPTANCE, TARGET, Distribution, Sampling, reject, uniform

MOST_DRAFTS = 256  # more drafts cost more time than they save


@dataclass(frozen=True)
class DraftTree:
    """The drafts that a pass verifies. Node 0 is the root, nodes 1..N are drafts, ordered by depth.

    parents: (N,) the parent of node i is parents[i - 1]. Siblings are drafts for one position, the likeliest first.
    groups: (1 + N,) how many look-ahead tokens a fused pass has after each node, in case it is the last one accepted;
    None: as many as the tree is deep. Where there are fewer, the next pass has some drafts of little worth.
    keep: of the N drafts a pass verifies only so many, for each text those with the likeliest paths in this turn (as in
    EAGLE-2, arXiv 2406.16858); None: all. For the coupled rule, and with groups of equal length.
    Raises InputError when the nodes come in another order, or when the root has no look-ahead token.
    """

    parents: Sequence[int] = ()
    groups: Sequence[int] | None = None
    keep: int | None = None

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
        if self.keep is not None:
            if self.groups is not None:
                raise InputError("a tree that keeps some of its drafts has groups of equal length")
            keep = min(whole(self.keep, "the number of drafts to keep", 1), len(self.parents))
            object.__setattr__(self, "keep", keep if keep < len(self.parents) else None)

    @cached_property
    def depth(self) -> tuple[int, ...]:
        """For each of the nodes 0..N, the number of drafts on the path to it, itself included."""
        depth = [0]
        for parent in self.parents:
            depth.append(depth[parent] + 1)
        return tuple(depth)

    @cached_property
    def rank(self) -> tuple[int, ...]:
        """For each of the nodes 1..N, the number of siblings before it."""
        return tuple(self.parents[:i].count(parent) for i, parent in enumerate(self.parents))

    @property
    def width(self) -> int:
        """The most children of a node; 1 for a chain."""
        return 1 + max(self.rank, default=0)

    @lru_cache(maxsize=256)  # noqa: B019 - trees are few and small
    def cut(self, depth: int) -> "DraftTree":
        """The tree without the nodes deeper than `depth`."""
        n_nodes = sum(d <= depth for d in self.depth)
        return DraftTree(self.parents[: n_nodes - 1], self.groups and self.groups[:n_nodes], self.keep)

    @property
    def n_verified(self) -> int:
        """The drafts that a pass verifies."""
        return self.keep or len(self.parents)

    def lengths(self, n_lookahead: int) -> list[int]:
        """The number of look-ahead tokens after each of the nodes 0..N, at most n_lookahead."""
        return [min(n, n_lookahead) for n in self.groups or [n_lookahead] * len(self.depth)]


def chain(n_drafts: int) -> DraftTree:
    """The tree without a fork: d_1..d_L. Raises InputError for a length out of bounds."""
    return DraftTree(range(whole(n_drafts, "the number of drafts", 0, MOST_DRAFTS)))


class Level(NamedTuple):
    """Drafts that are drawn together; all int64. place: (n,), the depths whose look-ahead rows give p. parents: (n,),
    the nodes whose tokens a draft head may read there. source, rank: (m,), for each of the m drafts the index of its
    place and its rank among its siblings."""

    place: torch.Tensor
    parents: torch.Tensor
    source: torch.Tensor
    rank: torch.Tensor


class Nodes(NamedTuple):
    """A Shape's indices on a device; int64 unless said otherwise. N drafts, D deep, L look-ahead tokens. The first
    dimension is the batch B, or 1 where all its texts share the tree; some fields, without B, are always shared.

    layout: of the rows [root, drafts, look-ahead groups]. number: (1 + N,), 0..N. depth: (B, 1 + N). parents: (B, N) of
    the drafts. kept: (B, 1 + N), the nodes' numbers in the shape's tree, which has more where it keeps only some.
    elsewhere: (B, 1 + N, 1 + N) bool, [b, i, j] is False where node j is node i or on the path to it.
    path: (B, 1 + N, 1 + D), the nodes on the path from the root to each node, padded with the node itself.
    group_rows: (1 + N, L), the rows after each node that draft for the next pass; where a look-ahead token is missing,
    the last one of the group, or the root's group, replaces it. by_rank: for each rank the nodes of that rank.
    levels: drafts in the order in which they are drawn. p_row: (1 + N,), the place, counted over all levels, whose p
    each node's children were drawn from.
    """

    layout: Layout
    number: torch.Tensor
    elsewhere: torch.Tensor
    depth: torch.Tensor
    parents: torch.Tensor
    kept: torch.Tensor
    path: torch.Tensor
    group_rows: torch.Tensor
    p_row: torch.Tensor
    by_rank: tuple[torch.Tensor, ...]
    levels: tuple[Level, ...]

    def likeliest(self, n_kept: int, sure: torch.Tensor) -> "Nodes":
        """For each text the root and the n_kept nodes with the likeliest paths, in the same order, with their groups.

        sure: (B, N), how sure each draft is, given that its parent is right; the product over a path is how likely it
        is. None counts as quite sure, so no node is likelier than its parent, and the nodes kept are a tree.
        """
        sure = F.pad(sure.nan_to_num(0).clamp(0, 1 - 1e-9), (1, 0), value=1.0)  # (B, 1 + N)
        likely = torch.where(self.elsewhere, 1.0, sure[:, None]).prod(-1)  # (B, 1 + N)
        kept = likely.sort(dim=1, descending=True, stable=True).indices[:, : 1 + n_kept].sort(dim=1).values
        number = self.number[: 1 + n_kept]  # the new numbers
        place = self.kept.expand(len(kept), -1).scatter(1, kept, number.expand_as(kept))  # (B, 1 + N), old to new
        rows = torch.cat([kept, self.group_rows[kept].flatten(1)], dim=1)  # (B, R'): of the pass with all nodes
        visible, depth = self.layout.visible[0, rows[:, :, None], rows[:, None]], self.layout.depth[0, rows]
        return self._replace(
            layout=Layout(visible, depth, self.layout.lookahead[: rows.shape[1] - 1 - n_kept]),
            number=number,
            elsewhere=self.elsewhere[0][kept[:, :, None], kept[:, None]],
            depth=self.depth[0, kept],
            kept=kept,
            parents=place.gather(1, self.parents[0, kept[:, 1:] - 1]),
            path=place.gather(1, self.path[0, kept].flatten(1)).view(len(kept), 1 + n_kept, -1),
            group_rows=1 + n_kept + self.group_rows[: 1 + n_kept] - len(self.group_rows),
        )


@dataclass(frozen=True)
class Shape:
    """What a pass does: the draft tree that it verifies, and at most n_lookahead look-ahead tokens after each node."""

    tree: DraftTree = DraftTree()
    n_lookahead: int = 0

    def cut(self, room: int) -> "Shape":
        """The part that is useful when at most `room` more tokens are wanted: a turn's last token is never a draft."""
        return Shape(self.tree.cut(room - 1), max(0, min(self.n_lookahead, room - 2)))

    @property
    def n_rows(self) -> int:
        """Rows of the pass."""
        if self.tree.keep:  # groups are of equal length
            return (1 + self.tree.keep) * (1 + self.n_lookahead)
        return len(self.tree.depth) + sum(self.tree.lengths(self.n_lookahead))

    @cache  # noqa: B019 - shapes are few and small, and recorded graphs read these tensors
    def on(self, device: torch.device, by_parent: bool = False) -> Nodes:
        """The shape's indices on a device. by_parent: drafts are drawn depth by depth, each node's children from a p
        that knows its token; else all drafts are drawn at once, from one p for each depth."""
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
        # The node at whose place a node's children are drawn: itself or, if not by_parent, the first of its depth.
        draws = [i if by_parent else drafts.depth.index(depth) for i, depth in enumerate(drafts.depth)]
        drawing = sorted({draws[parent] for parent in drafts.parents})
        p_row = [drawing.index(node) if node in drawing else len(drawing) for node in draws]
        levels = []
        for _, group in groupby(drawing, key=lambda node: by_parent and drafts.depth[node]):
            level = list(group)
            each = ((draws[parent], rank) for parent, rank in zip(drafts.parents, drafts.rank, strict=True))
            drawn = [(level.index(node), rank) for node, rank in each if node in level]
            levels.append(([drafts.depth[node] for node in level], level, *zip(*drawn, strict=True)))

        def put(numbers: Sequence) -> torch.Tensor:
            return torch.as_tensor(np.array(numbers, dtype=np.int64), device=device)

        nodes = range(len(rows))
        shared = (put([each]) for each in (drafts.depth, drafts.parents, nodes, paths))
        levels, by_rank = tuple(Level(*map(put, level)) for level in levels), tuple(map(put, by_rank))
        numbers = [*shared, put(group_rows), put(p_row)]
        return Nodes(layout.to(device), put(nodes), ~visible[None].to(device), *numbers, by_rank=by_rank, levels=levels)


def pick(table: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Each text's entry of its table, or of the one that all share: (B or 1, n, ..) and (B,) int64 to (B, ..)."""
    return table.expand(len(index), *table.shape[1:])[torch.arange(len(index), device=index.device), index]


class Drafts(NamedTuple):
    """tokens: (B, N) int64, a draft for each node but the root. p: (B, 1 + N, V) float64, the draft distribution of
    each node's children (that of a node without children is not read); None where the rule needs no p."""

    tokens: torch.Tensor
    p: torch.Tensor | None = None


def accept(
    nodes: Nodes, drafts: Drafts, q: Distribution, sampling: Sampling, keys: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Accepts a path of a draft tree, from the root, and draws the token that follows it.

    q: (B, 1 + N, K), the target distributions after the root and after each draft. keys: (3, B, 1 + N) int64, the noise
    keys of the position after each node. Two exact rules:

    - coupled (no p): the target draws a token after each node, as plain decoding does; a draft is right if it is the
      same token.
    - rejection (p given): siblings are tested one after the other, each with what the tests before left of p and q
      (`reject`; for a chain this is the rule of the paper, section 3). The token after the last accepted node is drawn
      from what is left: the residual after a rejection, q itself after a leaf.

    Returns the last accepted node (B,) int64, 0 for the root, and the next token (B,) int64.
    """
    if drafts.p is not None:
        right = torch.ones(q.tokens.shape[:2], dtype=torch.bool, device=q.tokens.device)
        left, p, taken = q.probs.clone(), drafts.p.clone(), torch.zeros_like(right)
        for siblings in nodes.by_rank:  # no two with the same parent
            parents, tokens = nodes.parents[0, siblings - 1], drafts.tokens[:, siblings - 1]
            u = uniform(keys[ACCEPTANCE][:, parents], tokens[..., None]).squeeze(-1)
            here = Distribution(q.tokens[:, parents], left[:, parents])
            fits, left[:, parents], p[:, parents] = reject(tokens, p[:, parents], here, u)
            right[:, siblings] = fits & ~taken[:, parents]
            taken[:, parents] |= fits
        q = Distribution(q.tokens, left)
    drawn = sampling.draw(q, keys[TARGET])  # (B, 1 + N)
    if drafts.p is None:
        right = F.pad(drafts.tokens == drawn.take_along_dim(nodes.parents, 1), (1, 0), value=True)  # (B, 1 + N)
    accepted = (right[:, None] | nodes.elsewhere).all(-1)  # right, as are all nodes on the path to it
    last = (accepted * nodes.number).amax(1)  # nodes are ordered by depth
    return last, drawn.gather(1, last[:, None])[:, 0]
