"""Which draft tree? Chosen from how often drafts of each rank are right, and from how long turns take on this machine.

More drafts and more look-ahead tokens save passes, but every row takes time: little where a pass is bound by reading
weights, much where it is bound by computing. So does each level of drafts that a draft head draws. The choice rests on
a small model of a generation, `expected_tokens`: it may be wrong about speed, never about the text. Where no drafts are
worth their rows, it decodes plainly.
"""

import heapq
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from minipass.decode import Fused, Method, Schedule, copied_shape, fused
from minipass.engine import Engine
from minipass.errors import InputError, whole
from minipass.files import explained
from minipass.model import GPT
from minipass.sampling import COUPLED, Sampling
from minipass.texts import Texts, Turn
from minipass.trees import MOST_DRAFTS, DraftTree, Shape, chain

Accuracy = Sequence[Sequence[float]]  # (L, K): how often the draft of each rank is right at each depth, as evaluated
LONGEST_PROMPT = 64  # before the turns that are timed
N_WARM_UP, FEWEST_TURNS, ENOUGH_SECONDS = 2, 3, 3.0  # turns that are not timed; when to stop
MOST_AUTO_LOOKAHEAD = 5  # deeper trees are not worth the time to try them
SCALES = (0.3, 0.5, 0.7, 0.85, 1.0, 1.2, 1.5)  # of the accuracy, for which an AdaptiveTree keeps a tree ready
PRIOR_TESTS, FORGET = 6.0, 0.9  # what was seen weighs less from one choice to the next
FIRST_CHOICE, MOST_TURNS_BETWEEN = 4, 32  # turns until an AdaptiveTree chooses: at first, and at most
NO_DRAFTS = chain(0)  # plain decoding
SPARE = 4  # drafts for each one that a likeliest_tree keeps
SIZES = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32)  # drafts of the trees to choose from
MOST_STEPS = 16  # in which a tree loses its look-ahead rows


def _numbers(accuracy: Accuracy) -> Accuracy:
    """The accuracy as plain numbers. Raises InputError unless they are finite, equally many at each depth."""
    with explained(
        "the accuracy of drafts must be finite numbers, with equally many ranks at each depth", (TypeError, ValueError)
    ):
        numbers = np.array(accuracy, dtype=float)
        if numbers.ndim != 2 or not numbers.size or not np.isfinite(numbers).all():
            raise ValueError(f"{accuracy!r:.60}")
    return numbers.tolist()


def _time(seconds: Callable[[DraftTree], float], tree: DraftTree) -> float:
    """The seconds of a turn with this tree. Raises InputError unless they are positive and finite."""
    found = seconds(tree)
    if not 0 < found < math.inf:
        raise InputError(f"a turn of {n_rows(tree)} rows must take a finite time of more than 0 seconds, not {found}")
    return found


def best_tree(accuracy: Accuracy, n_drafts: int) -> DraftTree:
    """The tree of n_drafts nodes with the most accepted ones: it always adds the node that is most often accepted.

    The probability of a path is the product over its nodes. The tree has fewer nodes if there are not enough ranks.
    Raises InputError for an `accuracy` that is not finite numbers, and for n_drafts out of bounds.
    """
    accuracy = [] if isinstance(accuracy, Sequence) and not accuracy else _numbers(accuracy)
    whole(n_drafts, "the number of drafts in a tree", 0, MOST_DRAFTS)
    chosen: list[tuple[int, ...]] = []  # a node is named by the ranks on the way to it
    growing = [(-accuracy[0][0], (0,))] if accuracy else []  # the likeliest node first
    while growing and len(chosen) < n_drafts:
        minus_probability, ranks = heapq.heappop(growing)
        chosen.append(ranks)
        depth, rank, here = len(ranks), ranks[-1], accuracy[len(ranks) - 1]
        if depth < len(accuracy):
            heapq.heappush(growing, (minus_probability * accuracy[depth][0], (*ranks, 0)))
        if rank + 1 < len(here) and here[rank] > 0:
            heapq.heappush(growing, (minus_probability / here[rank] * here[rank + 1], (*ranks[:-1], rank + 1)))
    chosen.sort(key=lambda ranks: (len(ranks), ranks))
    number = {(): 0} | {ranks: i for i, ranks in enumerate(chosen, 1)}
    return DraftTree(tuple(number[ranks[:-1]] for ranks in chosen))


def likeliest_tree(accuracy: Accuracy, n_drafts: int) -> DraftTree:
    """A tree whose n_drafts nodes are chosen anew for each text in each turn, as those with the likeliest paths among
    SPARE times as many drafts. Drafting these costs little, verifying them would. It is as deep as best_tree's, so a
    pass has the same number of rows. Raises InputError as best_tree."""
    whole(n_drafts, "the number of drafts in a tree", 1, MOST_DRAFTS)
    deepest = best_tree(accuracy, n_drafts).depth[-1]
    return DraftTree(best_tree(accuracy[:deepest], min(SPARE * n_drafts, MOST_DRAFTS)).parents, keep=n_drafts)


def reach_and_last(tree: DraftTree, accuracy: Accuracy) -> tuple[np.ndarray, np.ndarray]:
    """For turns with a = 0..D look-ahead tokens to draw drafts from, the probability that each node is accepted, and
    that it is the last accepted one: two arrays (D + 1, N + 1)."""
    depth, path = np.array(tree.depth), np.ones(len(tree.depth))
    for node, (parent, rank) in enumerate(zip(tree.parents, tree.rank, strict=True), 1):
        path[node] = path[parent] * accuracy[depth[node] - 1][rank]
    reach = path * (depth <= np.arange(1 + depth[-1])[:, None])
    last = reach.copy()
    for node, parent in enumerate(tree.parents, 1):
        last[:, parent] -= reach[:, node]
    return reach, last


def expected_tokens(tree: DraftTree, accuracy: Accuracy) -> float:
    """Tokens/pass of a long fused generation, if every position had this accuracy, independently of the others.

    How many look-ahead tokens a turn has depends on the group after the last node of the turn before: a Markov chain,
    whose stationary distribution weighs the turns.
    """
    reach, last = reach_and_last(tree, accuracy)
    goes_to = np.zeros((len(reach), len(reach)))
    for node, length in enumerate(tree.lengths(tree.depth[-1])):
        goes_to[:, length] += last[:, node]
    weight = np.linalg.matrix_power(goes_to, 64)[-1]
    return float(weight @ reach.sum(1))


def with_fewer_rows(tree: DraftTree, accuracy: Accuracy) -> Iterator[DraftTree]:
    """The tree with ever fewer look-ahead rows, from complete groups down to one row after the root, in some steps.

    The row of [LA]_t after a node is worth the probability that this node is the last accepted one, times the tokens
    that drafts at depth t add to a turn. The rows of least worth go first.
    """
    reach, last = reach_and_last(tree, accuracy)
    adds = [reach[t].sum() - reach[t - 1].sum() for t in range(1, len(reach))]  # falls with t
    rows = [(last[-1, node] * added, -t, node) for node in range(len(tree.depth)) for t, added in enumerate(adds)]
    rows.remove((last[-1, 0] * adds[0], 0, 0))
    groups, step = [len(adds)] * len(tree.depth), 1 + len(rows) // MOST_STEPS
    yield DraftTree(tree.parents, groups)
    for i, (_, _, node) in enumerate(sorted(rows), 1):
        groups[node] -= 1
        if i % step == 0 or i == len(rows):
            yield DraftTree(tree.parents, groups)


def n_rows(tree: DraftTree) -> int:
    """Rows of a fused pass with this tree."""
    return Shape(tree, tree.depth[-1]).n_rows


def fastest_tree(accuracy: Accuracy, seconds: Callable[[DraftTree], float]) -> DraftTree:
    """The tree with most expected tokens per second, or none where plain decoding has most."""
    trees = dict.fromkeys(best_tree(accuracy[:depth], n) for depth in range(1, 1 + len(accuracy)) for n in SIZES)
    shapes = [shape for tree in trees for shape in with_fewer_rows(tree, accuracy)]
    return max([NO_DRAFTS, *shapes], key=lambda shape: expected_tokens(shape, accuracy) / _time(seconds, shape))


def turn_seconds(
    model: GPT, accuracy: Accuracy, sampling: Sampling, *, rule: str = COUPLED, use_graphs: bool = False, turns: int = 9
) -> Callable[[DraftTree], float]:
    """Measures turns of several shapes; returns the time of a turn with any tree.

    A plain turn takes what was measured. Turns with drafts take some time, and more for each row and, since a draft
    head draws level by level, for each level: least squares. The shapes take turns with each other, `turns` times each;
    fewer where that takes long, as on a CPU with a large model. A turn has waited for the device when it comes, so the
    clock needs no more.
    """
    accuracy = _numbers(accuracy)
    complete = [best_tree(accuracy[:depth], n) for depth, n in ((0, 0), (1, 1), (2, 2), (2, 8))]
    deep = [best_tree(accuracy, n) for n in (5, 24)]  # with look-ahead rows after the root alone, so with few rows
    timed = complete + [DraftTree(tree.parents, (tree.depth[-1], *[0] * len(tree.parents))) for tree in deep]
    n_tokens = (N_WARM_UP + turns) * (1 + len(accuracy))
    prompt = [0] * max(1, min(model.config.block_size // 4, LONGEST_PROMPT))
    engines = [Engine(model, Fused(tree, rule), sampling, use_graphs=use_graphs) for tree in timed]
    streams, times = [engine.stream(prompt, n_tokens) for engine in engines], []
    started = time.perf_counter()
    for turn in range(N_WARM_UP + turns):
        if turn >= N_WARM_UP + FEWEST_TURNS and time.perf_counter() - started >= ENOUGH_SECONDS:
            break
        times.append([])
        for stream in streams:
            began = time.perf_counter()
            next(stream)
            times[-1].append(time.perf_counter() - began)
    plain, *drafting = np.median(times[N_WARM_UP:], axis=0).tolist()
    sizes, mean = np.array([(n_rows(tree), tree.depth[-1]) for tree in timed[1:]]), np.mean(drafting)
    slopes = np.ones(2)
    for _ in range(2):  # the second time without what took less than no time
        slopes = np.linalg.lstsq((sizes - sizes.mean(0)) * (slopes > 0), drafting - mean, rcond=None)[0]
    row, level = slopes.clip(min=0).tolist()
    fixed = float(mean - sizes.mean(0) @ (row, level))
    return lambda tree: max(plain, fixed + row * n_rows(tree) + level * tree.depth[-1]) if tree.parents else plain


class AdaptiveTree:
    """Changes, while a text is written, to the tree that is fastest for how often its drafts were accepted so far.

    Where that is none, turns decode plainly; since these show nothing of drafts, a tree is tried again now and then.

    accuracy: as evaluated beforehand; seconds: of a turn with a tree. The choice, from a few trees, depends on past
    turns alone, so a text with a seed of its own keeps the target's distribution. What was learned from one text serves
    the next one. Raises InputError when a figure is missing or not finite, or a turn takes no time.
    """

    def __init__(self, accuracy: Accuracy, seconds: Callable[[DraftTree], float]):
        accuracy = _numbers(accuracy)
        fastest = [fastest_tree(scaled(accuracy, scale), seconds) for scale in SCALES]
        self.trees = list(dict.fromkeys([*fastest, *(chain(n) for n in range(1 + len(accuracy)))]))
        self.seconds = [_time(seconds, tree) for tree in self.trees]
        self.tree = fastest[SCALES.index(1.0)]
        # For each depth and rank: how often it was tested after its better siblings failed, and how often accepted.
        # The accuracy measured beforehand counts as PRIOR_TESTS tests.
        accuracy = np.array(accuracy, dtype=float)
        missed = 1 - accuracy.cumsum(1) + accuracy  # by all better siblings
        self.tested = np.full_like(accuracy, PRIOR_TESTS)
        self.accepted = PRIOR_TESTS * np.clip(accuracy / np.maximum(missed, 1e-9), 0, 1)
        self.n_turns, self.next_choice = 0, FIRST_CHOICE
        self.available = [0]  # look-ahead tokens after the last accepted node of each text

    def add(self, turn: Turn) -> None:
        """Takes a turn into account; `tree` is then the next turn's."""
        tree = turn.shape.tree
        if len(self.available) != len(turn.last):  # another stream's
            self.available = turn.n_tested
        if tree.depth[-1] > 0 and tree == self.tree.cut(tree.depth[-1]):  # else its drafts were not only look-ahead's
            for b, last in enumerate(turn.last):
                if turn.active[b]:
                    self._count(tree, last, min(turn.n_tested[b], self.available[b]))
        lengths = tree.lengths(turn.shape.n_lookahead)
        self.available = [lengths[last] for last in turn.last]
        self.n_turns += 1
        if self.n_turns >= self.next_choice:
            self.next_choice += min(self.n_turns, MOST_TURNS_BETWEEN)
            self._choose()

    def _count(self, tree: DraftTree, last: int, n_tested: int) -> None:
        """Counts in the tests on the way to the last node accepted, and those after it, up to n_tested drafts deep."""
        accepted, node = {}, last  # of each node on the way to the last one, the child that was accepted
        while node:
            accepted[tree.parents[node - 1]], node = node, tree.parents[node - 1]
        for child, parent in enumerate(tree.parents, 1):
            after = accepted.get(parent, len(tree.depth) if parent == last else 0)  # siblings after it were not tested
            if child <= after and tree.depth[child] <= n_tested:
                self.tested[tree.depth[child] - 1, tree.rank[child - 1]] += 1
                self.accepted[tree.depth[child] - 1, tree.rank[child - 1]] += child == after

    def _choose(self) -> None:
        conditional = self.accepted / self.tested
        missed = np.cumprod(1 - conditional, axis=1) / np.maximum(1 - conditional, 1e-9)
        accuracy = (conditional * missed).tolist()
        rates = [expected_tokens(tree, accuracy) / own for tree, own in zip(self.trees, self.seconds, strict=True)]
        fastest, second = (self.trees[i] for i in np.argsort(rates)[:-3:-1])
        if fastest == self.tree == NO_DRAFTS:
            self.tree, self.next_choice = second, self.n_turns + FIRST_CHOICE  # tries again
        else:
            self.tree = fastest
        keep = np.clip(PRIOR_TESTS / self.tested, FORGET, 1)  # what is never tested keeps the weight that it had
        self.accepted, self.tested = keep * self.accepted, keep * self.tested


@dataclass(frozen=True)
class Auto(Method):
    """Fused turns whose tree changes with the text (a method, as those of decode.py)."""

    chooser: AdaptiveTree
    rule: str = COUPLED
    lookup: int = 0

    @property
    def largest(self) -> tuple[Shape, ...]:
        shapes = [Shape(tree, tree.depth[-1]) for tree in self.chooser.trees]
        return *shapes, copied_shape(self.lookup, max(shape.n_lookahead for shape in shapes))

    def schedule(self, texts: Texts) -> Schedule:
        def trees() -> Iterator[DraftTree]:
            while True:
                if texts.turn is not None:
                    self.chooser.add(texts.turn)
                yield self.chooser.tree

        return fused(texts, trees(), self.lookup)


def scaled(accuracy: Accuracy, scale: float) -> Accuracy:
    """The accuracy on a text that is easier or harder to draft: of all ranks of a place together at most 0.97."""
    return [[scale * a * min(1.0, 0.97 / (scale * sum(ranks) + 1e-9)) for a in ranks] for ranks in accuracy]
