"""Draft trees: both acceptance rules against exact enumeration, planted bugs, and the numbers of a shape. The course's
graders, exercise 6, test acceptance text by text, on random trees too."""

import itertools
import math

import pytest
import torch
from conftest import SPARSE, TREE, chi_square_p_value, random_model, sequence_probabilities, slow_logits, whole

import minipass.trees
from minipass.decode import Fused, Plain
from minipass.engine import Engine
from minipass.errors import InputError
from minipass.extras.course.test_exercises import agreement, children, random_tree, way
from minipass.layout import Layout
from minipass.model import KVCache
from minipass.sampling import (
    ACCEPTANCE,
    COUPLED,
    DRAFT,
    REJECTION,
    RULES,
    TARGET,
    Distribution,
    Sampling,
    mix,
    reject,
    stream_keys,
    uniform,
)  # fmt: skip
from minipass.texts import ACCEPTED, BONUS, CORRECTED
from minipass.trees import Drafts, DraftTree, Shape, accept, chain

CPU = torch.device("cpu")
N_SAMPLES = 8_000
DRAWN = Sampling(1.0)  # the settings of a draw at any temperature but 0


@pytest.fixture(scope="module")
def tiny():
    return random_model(seed=5, std=0.7, vocab_size=5, block_size=16, n_layer=1, n_head=1, n_embd=8, n_lookahead=3)


def random_probs(*shape: int, seed: int = 0) -> torch.Tensor:
    """(*shape) distributions over the last axis, some of whose probabilities are 0."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(*shape, generator=generator, dtype=torch.float64)
    least = logits.argmin(-1, keepdim=True)
    return logits.scatter(-1, least, -math.inf).softmax(-1)


def keys_of(drafts: DraftTree, n_texts: int, seed: int = 0) -> torch.Tensor:
    """Noise of the place after each node, (3, n_texts, 1 + N)."""
    return mix(stream_keys(torch.arange(n_texts) + seed) + torch.tensor(drafts.depth))


def drawn_drafts(drafts: DraftTree, p: torch.Tensor, keys: torch.Tensor, stream: int) -> torch.Tensor:
    """A draft (B, N) for each node: siblings are drawn without replacement from their parent's p (B, 1 + N, V)."""
    ranked = DRAWN.race(whole(p), keys[stream], drafts.width).tokens  # (B, 1 + N, width)
    return ranked[:, list(drafts.parents), list(drafts.rank)]


# Acceptance along a tree.


def alike(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """A target with enough of p for drafts to be accepted often."""
    return 0.6 * p + 0.4 * q


BAD_NODES = {
    "a node is accepted though its parent was not": lambda nodes: nodes._replace(
        elsewhere=~torch.eye(len(nodes.number)).bool()
    ),
    "siblings are tested in the wrong order": lambda nodes: nodes._replace(by_rank=nodes.by_rank[::-1]),
}


def test_on_a_chain_the_rejection_rule_is_the_papers():
    """Chen et al., algorithm 2, and PaSS, section 3: the first draft with u >= q / p ends the text."""
    for n in range(1, 5):
        drafts, keys = chain(n), keys_of(chain(n), 300, seed=n)
        p, q = random_probs(300, n + 1, 7, seed=n), random_probs(300, n + 1, 7, seed=10 + n)
        q = alike(p, q)
        tokens = drawn_drafts(drafts, p, keys, DRAFT)
        last, next_token = accept(Shape(drafts).on(CPU), Drafts(tokens, p), whole(q), DRAWN, keys)
        u = uniform(keys[ACCEPTANCE][:, :n], tokens[..., None])[..., 0]
        ratio = q[:, :n].gather(2, tokens[..., None])[..., 0] / p[:, :n].gather(2, tokens[..., None])[..., 0]
        n_accepted = (u < ratio).long().cumprod(1).sum(1)
        text = torch.arange(300)
        residual = (q - p).clamp(min=0)[text, n_accepted]
        final = torch.where((n_accepted == n)[:, None], q[:, n], residual / residual.sum(1, keepdim=True))
        assert torch.equal(last, n_accepted)
        assert torch.equal(next_token, DRAWN.draw(whole(final), keys[TARGET][text, n_accepted]))


# One place: a fan of siblings.


def fan_outcome(rule: str, n: int, p: torch.Tensor, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The last accepted node and the first token of N_SAMPLES texts, n siblings for one place."""
    fan, keys = DraftTree([0] * n), keys_of(DraftTree([0] * n), N_SAMPLES)
    p, q = (each.expand(N_SAMPLES, 1 + n, -1) for each in (p, q))
    tokens = drawn_drafts(fan, p, keys, TARGET if rule == COUPLED else DRAFT)
    drafts = Drafts(tokens, None if rule == COUPLED else p)
    last, next_token = accept(Shape(fan).on(CPU), drafts, whole(q), DRAWN, keys)
    return last, torch.cat([next_token[:, None], tokens], dim=1).gather(1, last[:, None])[:, 0]


def first_p_value(tokens: torch.Tensor, q: torch.Tensor) -> float:
    expected = {(token,): value for token, value in enumerate(q.tolist()) if value}
    return chi_square_p_value([(token,) for token in tokens.tolist()], expected)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("n_siblings", [1, 2, 3, 4])
def test_the_first_token_has_the_targets_distribution_whatever_the_drafts(rule, n_siblings):
    for seed in range(3):
        p, q = random_probs(2, 5, seed=10 * n_siblings + seed)
        assert first_p_value(fan_outcome(rule, n_siblings, p, q)[1], q) > 1e-3


def test_more_siblings_are_accepted_more_often_and_with_one_a_rule_accepts_what_it_can():
    p, q = 0.8 * random_probs(2, 6, seed=3) + 0.2 / 6
    rates = {rule: [(fan_outcome(rule, n, p, q)[0] > 0).double().mean().item() for n in (1, 2, 4)] for rule in RULES}
    overlap = torch.minimum(p, q).sum().item()
    race = agreement(p.tolist(), q.tolist())
    assert rates[REJECTION][0] == pytest.approx(overlap, abs=0.02)  # no rule can do more
    assert rates[COUPLED][0] == pytest.approx(race, abs=0.02)  # one token wins both races (Daliri, Musco, Suresh)
    for rule in RULES:
        assert rates[rule] == sorted(rates[rule])


@pytest.mark.parametrize("rule", RULES)
def test_fewer_likely_tokens_than_siblings_do_no_harm(rule):
    p, q = torch.tensor([[1.0, 0.0, 0.0], [0.2, 0.5, 0.3]], dtype=torch.float64)
    last, first = fan_outcome(rule, 3, p, q)
    assert rule == COUPLED or (last < 2).all(), "what was never drawn is not accepted"
    assert first_p_value(first, q) > 1e-3


# The same by exact enumeration.


def acceptance(p: torch.Tensor, q: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """For each token as the draft: the probability that it is accepted (V,), by bisection for u, and what a rejection
    leaves of q and of p (V, V)."""
    n, u = len(p), torch.full((1, len(p)), 0.5, dtype=torch.float64)
    place, step = (torch.arange(n)[None], p.expand(1, n, -1), whole(q.expand(1, n, -1))), 0.25
    for _ in range(45):
        accepted = minipass.trees.reject(*place, u)[0]
        u, step = u + torch.where(accepted, step, -step), step / 2
    _, residual, p_left = minipass.trees.reject(*place, u)
    return u[0], residual[0], p_left[0]


def emitted(p: torch.Tensor, q: torch.Tensor, n_siblings: int, left: torch.Tensor | None = None) -> torch.Tensor:
    """The distribution (V,) of what n siblings, drawn from p without replacement and tested in turn, make of q.

    left: what the rule has left of p.
    """
    if n_siblings == 0 or p.sum() == 0:
        return q
    total, p = torch.zeros_like(q), p / p.sum()
    share, residual, p_left = acceptance(p if left is None else left, q)
    for draft in p.nonzero().flatten().tolist():
        others = p * (torch.arange(len(p)) != draft)
        total[draft] += p[draft] * share[draft]
        total += p[draft] * (1 - share[draft]) * emitted(others, residual[draft], n_siblings - 1, p_left[draft])
    return total


@pytest.mark.parametrize("n_siblings", [1, 2, 3])
def test_recursive_rejection_makes_exactly_the_target_distribution(n_siblings):
    for seed in range(2):
        p, q = random_probs(2, 4, seed=seed)
        torch.testing.assert_close(emitted(p, q, n_siblings), q)


def unchanged_q(draft, p, q, u):
    accepted, _, p_left = reject(draft, p, q, u)
    return accepted, q.probs, p_left


def unchanged_p(draft, p, q, u):
    accepted, residual, _ = reject(draft, p, q, u)
    return accepted, residual, p


@pytest.mark.parametrize(("rule", "n_siblings"), [(unchanged_q, 1), (unchanged_q, 2), (unchanged_p, 2)])
def test_siblings_that_leave_p_or_q_unchanged_are_caught(rule, n_siblings, monkeypatch):
    p, q = random_probs(2, 4, seed=0)
    monkeypatch.setattr(minipass.trees, "reject", rule)
    assert (emitted(p, q, n_siblings) - q).abs().max() > 1e-3


# Whole trees: what one pass emits, against the enumerated distribution of texts.

SMALL = DraftTree((0, 0, 1, 1, 2))  # two deep, and both first drafts have children


def pass_p_value(rule: str, judged=lambda p: p, change=lambda nodes: nodes, n_texts: int = 12_000) -> float:
    """Chi-square of texts of 3 tokens from 3, begun by one pass and completed by draws from the target.

    p and q depend on the tokens before, so a node's children must be judged by its own.
    """
    v, keys, text_of = 3, keys_of(SMALL, n_texts), torch.arange(n_texts)
    q_after, p_after = (0.9 * random_probs(v, v, v, v, seed=seed) + 0.1 / v for seed in (3, 4))  # q_after[n, a, b]

    def after(table: torch.Tensor, text: list[torch.Tensor]) -> torch.Tensor:
        """(B, V), after at most two tokens (B,) each."""
        a, b = [*text, torch.zeros_like(text_of), torch.zeros_like(text_of)][:2]
        return table[len(text), a, b]

    texts, p, stream = [[]], [], TARGET if rule == COUPLED else DRAFT
    for node in range(len(SMALL.depth)):  # parents come first
        if node:
            parent, rank = SMALL.parents[node - 1], SMALL.rank[node - 1]
            texts.append([*texts[parent], DRAWN.race(whole(p[parent]), keys[stream, :, parent], 2).tokens[:, rank]])
        p.append(after(p_after, texts[node]))
    q = torch.stack([after(q_after, text) for text in texts], dim=1)
    tokens = torch.stack([text[-1] for text in texts[1:]], dim=1)
    drafts = Drafts(tokens, None if rule == COUPLED else judged(torch.stack(p, dim=1)))
    last, next_token = accept(change(Shape(SMALL).on(CPU)), drafts, whole(q), DRAWN, keys)

    n_drafts, generator, samples = torch.tensor(SMALL.depth)[last], torch.Generator().manual_seed(0), []
    paths = [torch.stack([*text, text_of, text_of, text_of][:3], dim=1) for text in texts]  # filled up, for no use
    path = torch.stack(paths, dim=1)[text_of, last]
    for i in range(3):
        completed = torch.multinomial(after(q_after, samples), 1, generator=generator)[:, 0]
        samples.append(torch.where(i < n_drafts, path[:, i], torch.where(i == n_drafts, next_token, completed)))
    expected = {}
    for a, b, c in itertools.product(range(v), repeat=3):
        expected[a, b, c] = (q_after[0, 0, 0, a] * q_after[1, a, 0, b] * q_after[2, a, b, c]).item()
    return chi_square_p_value(list(zip(*(each.tolist() for each in samples), strict=True)), expected)


@pytest.mark.parametrize("rule", RULES)
def test_one_pass_emits_exactly_the_enumerated_distribution_when_each_parent_has_its_own_p(rule):
    assert pass_p_value(rule) > 1e-3


def test_the_p_of_a_parents_sibling_makes_another_distribution():
    assert pass_p_value(REJECTION, judged=lambda p: p[:, [0, 2, 1, 3, 4, 5]]) < 1e-6


@pytest.mark.parametrize("bug", BAD_NODES)
def test_a_tree_that_is_walked_down_wrongly_makes_another_distribution(bug):
    assert pass_p_value(REJECTION, change=BAD_NODES[bug]) < 1e-6


# Whole texts.


def texts_p_value(model, rule: str, n_new: int = 3, drafts: DraftTree = TREE, **sampling) -> float:
    """Chi-square of N_SAMPLES texts, drawn with a tree, against their enumerated distribution."""
    sampling = sampling or {"temperature": 1.0}
    engine = Engine(model, Fused(drafts, rule), Sampling(**sampling))
    samples = [tuple(text) for text in engine.generate([[1, 2, 3]] * N_SAMPLES, n_new).tokens]
    return chi_square_p_value(samples, sequence_probabilities(model, [1, 2, 3], n_new, **sampling))


@pytest.mark.parametrize(
    ("drafts", "sampling"), [(TREE, {"temperature": 1.0}), (SPARSE, {"temperature": 0.8, "top_k": 3})], ids=str
)
@pytest.mark.parametrize("rule", RULES)
def test_texts_have_exactly_the_enumerated_distribution(rule, drafts, sampling, tiny):
    assert texts_p_value(tiny, rule, 5, drafts, **sampling) > 1e-3


@pytest.mark.parametrize("rule", RULES)
def test_the_enumeration_sees_every_node_of_the_tree_accepted_and_not(rule, tiny):
    turns = Engine(tiny, Fused(TREE, rule), DRAWN).stream([[1, 2, 3]] * 2000, 5)
    nodes = Shape(TREE).on(CPU)
    accepted = [~nodes.elsewhere[0, turn.result.last] for turn in turns if turn.shape.tree == TREE]
    share = torch.cat(accepted).double().mean(0)
    assert (share[1:] > 0.002).all()
    assert (share[1:] < 0.9).all()


@pytest.mark.parametrize("rule", [unchanged_p, unchanged_q])
def test_texts_show_that_p_or_q_was_left_unchanged_after_a_rejection(rule, tiny, monkeypatch):
    monkeypatch.setattr(minipass.trees, "reject", rule)
    assert texts_p_value(tiny, REJECTION) < 1e-6


def test_siblings_that_are_not_tested_in_the_order_they_were_drawn_are_caught(tiny, monkeypatch):
    race = Sampling.race

    def flipped(*arguments):
        return Distribution(*(each.flip(-1) for each in race(*arguments)))

    monkeypatch.setattr(Sampling, "race", flipped)
    assert texts_p_value(tiny, REJECTION) < 1e-6


def siblings_see_each_other(shape: Shape, *arguments, on=Shape.on):
    nodes, n_rows = on(shape, *arguments), len(shape.tree.depth)
    visible = nodes.layout.visible.clone()
    visible[:, :n_rows, :n_rows] = torch.ones(n_rows, n_rows).tril().bool()
    return nodes._replace(layout=Layout(visible, nodes.layout.depth, nodes.layout.lookahead))


@pytest.mark.parametrize("bug", ["siblings see each other", "the first rows stay in the cache"])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.8, top_k=6)], ids=["greedy", "drawn"])
def test_equality_with_plain_decoding_catches_a_wrong_mask_and_a_wrong_gather(sampling, bug, lively_model, monkeypatch):
    prompts = [[token, 3, 8] for token in range(11)]
    plain = Engine(lively_model, Plain(), sampling).generate(prompts, 30).tokens
    engine = Engine(lively_model, Fused(TREE), sampling)
    assert engine.generate(prompts, 30).tokens == plain
    if bug.startswith("siblings"):
        monkeypatch.setattr(Shape, "on", siblings_see_each_other)
    else:
        monkeypatch.setattr(KVCache, "gather", lambda cache, rows: None)
    assert engine.generate(prompts, 30).tokens != plain


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("sampling", [Sampling(), DRAWN], ids=["greedy", "drawn"])
def test_incomplete_groups_change_the_passes_not_the_text(sampling, rule, lively_model):
    prompts = [[token, 3, 8] for token in range(11)] + [[1] * 37]
    plain = Engine(lively_model, Plain(), sampling).generate(prompts, 30)
    sparse, complete = (
        Engine(lively_model, Fused(drafts, rule), sampling).generate(prompts, 30) for drafts in (SPARSE, TREE)
    )
    if rule == COUPLED or sampling == Sampling():
        assert sparse.tokens == plain.tokens
        assert sparse.prompt_passes > complete.prompt_passes
    assert all(len(text) == 30 for text in sparse.tokens)


# What a turn records.


@pytest.mark.parametrize("rule", RULES)
def test_turns_of_a_tree_tell_which_path_was_accepted(rule, lively_model):
    engine, seen = Engine(lively_model, Fused(TREE, rule), DRAWN), set()
    for turn in engine.stream([[1, 2, 3], [4]], 30, seed=4, stop_token=3):
        for b in range(2):
            if not turn.active[b] or not turn.shape.tree.parents:
                continue
            drafts, tokens = turn.shape.tree, turn.result.drafts.tokens[turn.rows[b]].tolist()
            assert turn.last[b] == turn.result.last[turn.rows[b]]
            path = way(drafts, turn.last[b])[1:]
            accepted = [t for t, origin in zip(turn.tokens[b], turn.origins[b], strict=True) if origin == ACCEPTED]
            assert accepted == [tokens[node - 1] for node in path][: len(accepted)]
            if turn.origins[b][-1] in (BONUS, CORRECTED):
                assert len(accepted) == len(path)
                siblings = children(drafts, turn.last[b])
                assert (turn.origins[b][-1] == BONUS) == (not siblings)
                assert turn.tokens[b][-1] not in [tokens[node - 1] for node in siblings] or rule == REJECTION
            seen |= set(turn.origins[b])
    assert seen >= {ACCEPTED, BONUS, CORRECTED}


@pytest.mark.parametrize("rule", RULES)
def test_drafts_are_drawn_from_what_the_look_ahead_rows_say_and_p_says_so(rule, lively_model):
    """Texts are exact for any drafts, so only this test sees drafts that come from the wrong look-ahead rows."""
    texts, sampling, n_compared = [[1, 2, 3], [4]], Sampling(0.9, top_k=6), 0
    for turn in Engine(lively_model, Fused(TREE, rule), sampling).stream([list(text) for text in texts], 30, seed=2):
        drafts, result = turn.shape.tree, turn.result
        depth = drafts.depth[-1]
        for b, text in enumerate(texts):
            if depth and turn.active[b]:
                row = turn.rows[b]
                # The look-ahead rows came after the token before the root.
                p = sampling.distribution(slow_logits(lively_model, [text[:-1]], depth)[0, -depth:], drafts.width)
                if rule == REJECTION:
                    for node, d in enumerate(drafts.depth):
                        expected = p.dense(11)[d] if d < depth else torch.zeros(11).double()
                        torch.testing.assert_close(result.drafts.p[row, node], expected)
                stream = stream_keys(torch.tensor([2 + b]))[TARGET if rule == COUPLED else DRAFT]
                keys = mix(stream + len(text) + torch.arange(depth))[0]
                ranked = sampling.race(p, keys, drafts.width).tokens  # (D, width)
                expected = [ranked[d - 1, rank] for d, rank in zip(drafts.depth[1:], drafts.rank, strict=True)]
                assert result.drafts.tokens[row].tolist() == expected
                n_compared += 1
            text += turn.tokens[b]
    assert n_compared > 10


# The shape of a tree and of a pass.


def test_a_tree_knows_depths_ranks_and_width_and_can_be_cut():
    assert TREE.depth == (0, 1, 1, 1, 2, 2, 2, 3)
    assert TREE.rank == (0, 1, 2, 0, 1, 0, 0)
    assert TREE.width == 3
    assert TREE.cut(2) == DraftTree((0, 0, 0, 1, 1, 2))
    assert TREE.cut(0) == chain(0) == DraftTree()
    assert TREE.cut(9) == TREE
    assert SPARSE.cut(1) == DraftTree((0, 0, 0), groups=(3, 1, 2, 0))
    assert chain(3) == DraftTree((0, 1, 2))
    assert (chain(3).width, chain(3).depth, chain(0).width) == (1, (0, 1, 2, 3), 1)


def test_parents_and_groups_may_be_lists_or_arrays():
    for parents in ([0, 0, 1], range(3), torch.tensor([0, 1]).numpy()):
        assert DraftTree(parents) == DraftTree(tuple(int(parent) for parent in parents))
    assert hash(DraftTree([0, 0], [2, 1, 1])) == hash(DraftTree((0, 0), (2, 1, 1)))


@pytest.mark.parametrize("parents", [(1,), (0, 2), (-1,)])
def test_a_parent_that_is_no_node_before_is_refused(parents):
    with pytest.raises(InputError, match="parent before it|whole number of at least 0"):
        DraftTree(parents)


def test_nodes_out_of_order_are_refused():
    with pytest.raises(InputError, match="must be ordered by depth, not as in"):
        DraftTree((0, 1, 0))


@pytest.mark.parametrize("groups", [(1,), (0, 1, 1), (1, 1, 1, 1)])
def test_groups_that_do_not_fit_the_nodes_are_refused(groups):
    with pytest.raises(InputError, match="groups must give the look-ahead tokens after each node, at least 1"):
        DraftTree((0, 0), groups)


@pytest.mark.parametrize("length", [-1, 1.5, 10**6])
def test_a_chain_of_impossible_length_is_refused(length):
    with pytest.raises(InputError, match="the number of drafts must be a whole number in 0.."):
        chain(length)


def test_a_shape_is_cut_to_what_is_of_use():
    """With `room` tokens wanted the last is never a draft, and of the next pass neither."""
    shape = Shape(TREE, 3)
    for room in range(1, 8):
        cut = shape.cut(room)
        assert cut.tree == TREE.cut(room - 1)
        assert cut.tree.depth[-1] == min(3, room - 1)
        assert cut.n_lookahead == max(0, min(3, room - 2))
    assert shape.cut(5) == shape
    assert Shape(SPARSE, 3).cut(2) == Shape(DraftTree((0, 0, 0), (3, 1, 2, 0)), 0)


def test_rows_are_the_nodes_and_the_groups():
    assert [Shape().n_rows, Shape(n_lookahead=4).n_rows, Shape(chain(3)).n_rows] == [1, 5, 4]
    assert [Shape(TREE, 3).n_rows, Shape(SPARSE, 3).n_rows, Shape(SPARSE, 1).n_rows] == [32, 15, 12]
    for shape in (Shape(), Shape(n_lookahead=4), Shape(TREE, 3), Shape(SPARSE, 3), Shape(SPARSE, 1)):
        assert shape.on(CPU).layout.visible.shape[1] == shape.n_rows


def test_the_numbers_of_a_shape_are_those_of_a_walk():
    for drafts in (TREE, chain(0), chain(3), *map(random_tree, range(20))):
        nodes, n_nodes, deepest = Shape(drafts, 2).on(CPU), len(drafts.depth), drafts.depth[-1]
        assert nodes.depth.tolist() == [[len(way(drafts, node)) - 1 for node in range(n_nodes)]]
        assert [nodes.number.tolist()] == nodes.kept.tolist() == [list(range(n_nodes))]
        assert nodes.parents.tolist() == [list(drafts.parents)]
        for node in range(n_nodes):
            path = way(drafts, node)
            assert (~nodes.elsewhere[0, node]).nonzero()[:, 0].tolist() == path
            assert nodes.path[0, node].tolist() == (path + [node] * deepest)[: 1 + deepest]
        for rank, siblings in enumerate(nodes.by_rank):
            assert all(drafts.parents[: node - 1].count(drafts.parents[node - 1]) == rank for node in siblings.tolist())
        assert sorted(torch.cat(nodes.by_rank).tolist()) == list(range(1, n_nodes))


def test_rows_take_the_place_of_look_ahead_rows_that_are_not_there():
    rows = Shape(DraftTree((0, 1), groups=(3, 1, 0)), 3).on(CPU).group_rows
    assert rows.tolist() == [[3, 4, 5], [6, 6, 6], [3, 4, 5]]  # real rows 0..2, then the groups
    assert Shape(chain(2), 2).on(CPU).group_rows.tolist() == [[3, 4], [5, 6], [7, 8]]
    assert Shape(chain(2)).on(CPU).group_rows.shape == (3, 0)
    cut = Shape(SPARSE, 3).cut(4)  # groups (3, 1, 2, 0, 0, 1, 0, 0), of which 2 are of use
    assert cut.on(CPU).group_rows.tolist()[:4] == [[8, 9], [10, 10], [11, 12], [8, 9]]


# Trees that keep their likeliest nodes.


def kept_by_hand(drafts: DraftTree, sure: list[float], keep: int) -> list[int]:
    """The root and the nodes with the likeliest paths, of equal ones the first."""
    likely = [math.prod(sure[each - 1] for each in way(drafts, node)[1:]) for node in range(len(drafts.depth))]
    best = sorted(range(1, len(likely)), key=lambda node: (-likely[node], node))[:keep]
    return [0, *sorted(best)]


def test_kept_nodes_are_those_with_the_likeliest_paths_and_a_tree_of_their_own():
    for seed in range(20):
        drafts, n_lookahead = random_tree(seed), 1 + seed % 3
        n = len(drafts.parents)
        for keep in range(1, n):
            sure = torch.rand(3, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            sure[0, ::2] = 1.0  # a child is then as likely as its parent
            nodes = Shape(drafts, n_lookahead).on(CPU).likeliest(keep, sure)
            for b in range(3):
                kept = nodes.kept[b].tolist()
                if b:  # where none are equal
                    assert kept == kept_by_hand(drafts, sure[b].tolist(), keep)
                parents = [kept.index(drafts.parents[node - 1]) for node in kept[1:]]  # fails if one is missing
                alone = Shape(DraftTree(parents), n_lookahead).on(CPU)
                for name in ("elsewhere", "depth", "parents"):
                    assert torch.equal(getattr(nodes, name)[b], getattr(alone, name)[0]), name
                longest = alone.path.shape[2]
                assert torch.equal(nodes.path[b, :, :longest], alone.path[0])
                assert torch.equal(nodes.group_rows, alone.group_rows)
                assert torch.equal(nodes.layout.visible[b], alone.layout.visible[0])
                assert torch.equal(nodes.layout.depth[b], alone.layout.depth[0])
                assert torch.equal(nodes.layout.lookahead, alone.layout.lookahead)


WIDE = DraftTree((0, 0, 0, 1, 1, 2, 4, 4, 6), keep=4)
KEEPING_PROMPTS = [[1, 2, 3], [4], [2, 2, 0, 1, 3]]


def kept_texts_are_plain(model, sampling: Sampling) -> bool:
    """Whether a batch, longer than the window, gets plain decoding's texts with a tree that keeps some of its nodes."""
    texts = [Engine(model, method, sampling).generate(KEEPING_PROMPTS, 30).tokens for method in (Plain(), Fused(WIDE))]
    return texts[0] == texts[1]


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.8, 3), DRAWN], ids=str)
def test_texts_are_plain_decodings_with_a_tree_that_keeps_some_of_its_nodes(sampling, tiny):
    assert kept_texts_are_plain(tiny, sampling)


@pytest.mark.parametrize("field", ["elsewhere", "parents", "path", "layout", "depth"])
def test_a_field_that_is_not_made_anew_for_the_kept_nodes_is_caught(field, tiny, monkeypatch):
    likeliest = minipass.trees.Nodes.likeliest

    def half(nodes, keep, sure):
        first = likeliest(nodes, keep, torch.full_like(sure, 0.9))  # others, mostly
        return likeliest(nodes, keep, sure)._replace(**{field: getattr(first, field)})

    monkeypatch.setattr(minipass.trees.Nodes, "likeliest", half)
    assert not kept_texts_are_plain(tiny, DRAWN)


def test_a_tree_that_keeps_some_nodes_accepts_more_than_one_of_as_many(tiny):
    many = [[1, 2, 3]] * 200
    fixed, kept = (Engine(tiny, Fused(tree), DRAWN).generate(many, 12) for tree in (DraftTree((0, 0, 1, 1)), WIDE))
    assert kept.tokens_per_pass > fixed.tokens_per_pass


def test_the_record_of_a_turn_names_the_nodes_of_the_whole_tree(tiny):
    seen = set()
    for turn in Engine(tiny, Fused(WIDE), DRAWN).stream([[1, 2, 3]] * 50, 12):
        if turn.shape.tree != WIDE:
            continue
        for b, last in enumerate(turn.last):
            if turn.rows[b] is None or not turn.active[b] or len(turn.tokens[b]) <= turn.n_accepted[b]:
                continue
            kept = turn.result.kept[turn.rows[b]].tolist()
            drafts, path = turn.result.drafts.tokens[turn.rows[b]].tolist(), way(WIDE, last)[1:]
            assert turn.tokens[b][: turn.n_accepted[b]] == [drafts[kept.index(node) - 1] for node in path]
            has_children = any(WIDE.parents[node - 1] == last for node in kept[1:])
            assert turn.origins[b][-1] == (CORRECTED if has_children else BONUS)
            seen.add(turn.origins[b][-1])
    assert seen == {CORRECTED, BONUS}


def test_what_cannot_keep_some_nodes_is_refused():
    with pytest.raises(InputError, match="rejection"):
        Fused(WIDE, REJECTION)
    with pytest.raises(InputError, match="groups"):
        DraftTree((0, 0), (1, 1, 1), keep=1)
    for keep in (0, -1, 1.5, "2"):
        with pytest.raises(InputError):
            DraftTree((0, 0), keep=keep)
    assert DraftTree((0, 0), keep=2) == DraftTree((0, 0), keep=7) == DraftTree((0, 0))
    assert WIDE.cut(1) == DraftTree((0, 0, 0)) and WIDE.cut(2).keep == 4 and Shape(WIDE, 3).n_rows == 5 * 4
