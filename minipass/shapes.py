"""Which tree of drafts? Chosen from how often drafts of each rank are right, and from what rows cost on this machine.

More drafts and more look-ahead tokens save passes, but every row takes time: a little where a pass is bound by reading
weights, much where it is bound by computing. The choice rests on a small model of a generation, `expected_tokens`: it
may be wrong about speed, never about the text.
"""

import heapq
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from minipass.generate import Round, stream
from minipass.layout import DraftTree, chain
from minipass.model import GPT

Hits = Sequence[Sequence[float]]  # (L, K): how often the draft of each rank is right at each depth, losses.evaluate's
N_WARM_UP = 3  # rounds: the first is prefill
MANY_TOKENS = 10_000  # more than are made
MOST_AUTO_LOOKAHEAD = 5  # deeper trees are not worth the time to try them
SCALES = (0.3, 0.5, 0.7, 0.85, 1.0, 1.2, 1.5)  # of the hits, for which an AdaptiveTree keeps a tree ready
PRIOR_TESTS, FORGET = 6.0, 0.95  # what was seen weighs less from one choice to the next
FIRST_CHOICE, MOST_ROUNDS_BETWEEN = 4, 32  # rounds until an AdaptiveTree chooses, doubled up to the latter
MOST_HITS = 0.97  # of all ranks of a place together, at the largest scale
SIZES = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32)  # drafts of the trees to choose from


def best_tree(hits: Hits, n_drafts: int) -> DraftTree:
    """The tree of n_drafts nodes that keeps most drafts: always adds the node that is reached and kept most often.

    The probability of a path is the product of its nodes'. Fewer nodes come back when hits do not give as many.
    """
    chosen: list[tuple[int, ...]] = []  # a node is named by the ranks on the way to it
    growing = [(-hits[0][0], (0,))] if hits else []  # the likeliest node first
    while growing and len(chosen) < n_drafts:
        minus_probability, ranks = heapq.heappop(growing)
        chosen.append(ranks)
        depth, rank = len(ranks), ranks[-1]
        if depth < len(hits):
            heapq.heappush(growing, (minus_probability * hits[depth][0], (*ranks, 0)))
        if rank + 1 < len(hits[depth - 1]) and hits[depth - 1][rank] > 0:
            sibling = minus_probability / hits[depth - 1][rank] * hits[depth - 1][rank + 1]
            heapq.heappush(growing, (sibling, (*ranks[:-1], rank + 1)))
    chosen.sort(key=lambda ranks: (len(ranks), ranks))
    number = {(): 0} | {ranks: i for i, ranks in enumerate(chosen, 1)}
    return DraftTree(tuple(number[ranks[:-1]] for ranks in chosen))


def reach_and_last(tree: DraftTree, hits: Hits) -> tuple[np.ndarray, np.ndarray]:
    """For rounds that have a = 0..D look-ahead tokens, the probability that each node is kept, and that it is the last
    one kept: two arrays (D + 1, N + 1)."""
    depth, path = np.array(tree.depth), np.ones(len(tree.depth))
    for node, (parent, rank) in enumerate(zip(tree.parents, tree.rank, strict=True), 1):
        path[node] = path[parent] * hits[depth[node] - 1][rank]
    reach = path * (depth <= np.arange(1 + depth[-1])[:, None])
    last = reach.copy()
    for node, parent in enumerate(tree.parents, 1):
        last[:, parent] -= reach[:, node]
    return reach, last


def expected_tokens(tree: DraftTree, hits: Hits) -> float:
    """Tokens/pass of a long fused generation, if every place had these hits, independent of each other.

    How many look-ahead tokens a round has depends on the group behind the last node of the round before: a Markov
    chain, whose stationary distribution weighs the rounds.
    """
    reach, last = reach_and_last(tree, hits)
    goes_to = np.zeros((len(reach), len(reach)))
    for node, length in enumerate(tree.lengths(tree.depth[-1])):
        goes_to[:, length] += last[:, node]
    weight = np.linalg.matrix_power(goes_to, 64)[-1]
    return float(weight @ reach.sum(1))


def with_fewer_rows(tree: DraftTree, hits: Hits) -> Iterator[DraftTree]:
    """The tree with ever fewer look-ahead rows, from complete groups down to one row behind the root.

    The row of [LA]_t behind a node is worth the probability that this node is the last one kept, times what drafts at
    depth t add to a round. The least worth goes first.
    """
    reach, last = reach_and_last(tree, hits)
    adds = [reach[t].sum() - reach[t - 1].sum() for t in range(1, len(reach))]  # falls with t
    rows = [(last[-1, node] * added, -t, node) for node in range(len(tree.depth)) for t, added in enumerate(adds)]
    rows.remove((last[-1, 0] * adds[0], 0, 0))
    groups = [len(adds)] * len(tree.depth)
    yield DraftTree(tree.parents, tuple(groups))
    for _, _, node in sorted(rows):
        groups[node] -= 1
        yield DraftTree(tree.parents, tuple(groups))


def n_rows(tree: DraftTree) -> int:
    """Rows of a fused pass with this tree."""
    return len(tree.depth) + sum(tree.lengths(tree.depth[-1]))


def fastest_tree(hits: Hits, seconds: Callable[[int], float]) -> DraftTree:
    """The tree with most expected tokens per second. seconds: of a round, by the rows of its pass."""
    shapes = [
        shape
        for depth in range(1, 1 + len(hits))
        for n_drafts in SIZES
        for shape in with_fewer_rows(best_tree(hits[:depth], n_drafts), hits)
    ]
    return max(shapes, key=lambda shape: expected_tokens(shape, hits) / seconds(n_rows(shape)))


def round_times(model: GPT, prompt: list[int], ways: Sequence[dict], n_rounds: int) -> list[list[float]]:
    """Seconds of n_rounds rounds in each of several ways, stream's settings, that take turns; after a warm-up.

    A round has waited for the device when it is there, so that the clock needs no more.
    """
    runs = [stream(model, prompt, MANY_TOKENS, **settings) for settings in ways]
    times: list[list[float]] = [[] for _ in ways]
    for turn in range(N_WARM_UP + n_rounds):
        for run, own in zip(runs, times, strict=True):
            began = time.perf_counter()
            next(run)
            if turn >= N_WARM_UP:
                own.append(time.perf_counter() - began)
    return times


def round_seconds(model: GPT, hits: Hits, n_rounds: int = 9, **settings: Any) -> Callable[[int], float]:
    """Measures rounds with trees of several sizes in turns; returns the time of a round, interpolated over rows.

    settings: more of stream's, temperature and the like. Takes a fraction of a second for a small model on a CPU.
    """
    trees = [best_tree(hits, n) for n in (1, 2, 4, 8, 16, 32)]
    prompt = [0] * max(1, model.config.block_size // 4)
    times = round_times(model, prompt, [{"method": "pass-tree", "tree": tree, **settings} for tree in trees], n_rounds)
    rows, medians = [n_rows(tree) for tree in trees], [statistics.median(own) for own in times]
    return lambda n: float(np.interp(n, rows, medians))


class AdaptiveTree:
    """Goes over, while a text is written, to the tree that is fastest for how often its drafts were kept so far.

    hits: as measured beforehand; seconds: of a round by rows. The choice, from a few trees, depends on past rounds
    alone, so that the text keeps the target's distribution. What was learned from one text serves the next one.
    """

    def __init__(self, hits: Hits, seconds: Callable[[int], float]):
        fastest = [fastest_tree(scaled(hits, scale), seconds) for scale in SCALES]
        self.trees = list(dict.fromkeys([*fastest, *(chain(n) for n in range(1, 1 + len(hits)))]))
        self.seconds = [seconds(n_rows(tree)) for tree in self.trees]
        self.tree = fastest[SCALES.index(1.0)]
        # Of each depth and rank: how often it was tested, its better siblings having failed, and how often kept. What
        # was measured beforehand counts as PRIOR_TESTS tests.
        hits = np.array(hits, dtype=float)
        missed = 1 - hits.cumsum(1) + hits  # by all better siblings
        self.tested = np.full_like(hits, PRIOR_TESTS)
        self.kept = PRIOR_TESTS * np.clip(hits / np.maximum(missed, 1e-9), 0, 1)
        self.n_rounds, self.next_choice = 0, FIRST_CHOICE
        self.available: list[int] = []  # look-ahead tokens behind the last kept node of each text

    def add(self, record: Round) -> None:
        """Takes a round into account; `tree` is then the next round's."""
        tree = record.tree
        if tree is None:
            self.available = []  # a new text: prefill has all look-ahead tokens
            return
        if tree == self.tree.cut(tree.depth[-1]):  # else its drafts were not those of look-ahead tokens alone
            for b, last in enumerate(record.last):
                if record.active[b]:
                    n_tested = record.n_tested[b]
                    self._count(tree, last, min(n_tested, self.available[b]) if self.available else n_tested)
        lengths = tree.lengths(max(tree.depth[-1], 1))
        self.available = [lengths[last] for last in record.last]
        self.n_rounds += 1
        if self.n_rounds >= self.next_choice:
            self.next_choice += min(self.n_rounds, MOST_ROUNDS_BETWEEN)
            self._choose()

    def _count(self, tree: DraftTree, last: int, n_tested: int) -> None:
        """Counts in the tests on the way to the last node kept, and those behind it, up to n_tested drafts deep."""
        way = [last]
        while way[0]:
            way.insert(0, tree.parents[way[0] - 1])
        for depth, node in enumerate(way[:n_tested]):
            for child in tree.children[node]:
                self.tested[depth, tree.rank[child - 1]] += 1
                if child in way:
                    self.kept[depth, tree.rank[child - 1]] += 1
                    break

    def _choose(self) -> None:
        conditional = self.kept / self.tested
        missed = np.cumprod(1 - conditional, axis=1) / np.maximum(1 - conditional, 1e-9)
        hits = (conditional * missed).tolist()
        rates = [expected_tokens(tree, hits) / seconds for tree, seconds in zip(self.trees, self.seconds, strict=True)]
        self.tree = self.trees[int(np.argmax(rates))]
        self.kept, self.tested = FORGET * self.kept, FORGET * self.tested


def scaled(hits: Hits, scale: float) -> Hits:
    """Hits of a text that is easier or harder to draft."""
    return [[scale * hit * min(1.0, MOST_HITS / (scale * sum(ranks) + 1e-9)) for hit in ranks] for ranks in hits]
