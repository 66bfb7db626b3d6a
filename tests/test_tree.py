"""Trees of drafts: both rules against exact enumeration, planted bugs, the chain as a special case."""

import itertools

import pytest
import torch
from conftest import chi_square_p_value, random_model, sequence_probabilities

import minipass.decoder
import minipass.rounds
import minipass.sampling
from minipass.generate import ACCEPTED, BONUS, CORRECTED, RULES, generate, stream
from minipass.layout import DraftTree, Layout, ancestors, chain, fused_layout, group_rows
from minipass.model import KVCache
from minipass.sampling import draw, draw_candidates, probabilities, speculative_accept, tree_accept

TREE = DraftTree((0, 0, 0, 1, 1, 2, 4))  # three drafts for the next token, two and one behind, one more behind one
CPU = torch.device("cpu")
N_SAMPLES = 12_000


@pytest.fixture(scope="module")
def tiny():
    return random_model(seed=5, std=0.5, vocab_size=5, block_size=16, n_layer=1, n_lookahead=3)


def tree_p_value(model, rule: str, n_new: int = 4, tree: DraftTree = TREE, **sampling) -> float:
    """Chi-square of N_SAMPLES texts, drawn with a tree, against their enumerated distribution."""
    sampling = sampling or {"temperature": 1.0}
    settings = {"method": "pass-tree", "tree": tree, "rule": rule, "generator": torch.Generator().manual_seed(0)}
    result = generate(model, [[1, 2, 3]] * N_SAMPLES, n_new, **settings, **sampling)
    samples = [tuple(tokens) for tokens in result.tokens]
    return chi_square_p_value(samples, sequence_probabilities(model, [1, 2, 3], n_new, **sampling))


# The rule alone: one place, random p and q, by enumeration.


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("n_candidates", [1, 2, 3, 4])
def test_the_first_token_has_the_targets_distribution_whatever_the_drafts(rule, n_candidates):
    generator = torch.Generator().manual_seed(n_candidates)
    fan = DraftTree((0,) * n_candidates)
    for _ in range(3):
        p, q = torch.rand(2, 4, generator=generator, dtype=torch.float64).pow(3).softmax(-1)
        probs = p.expand(N_SAMPLES, 1, 4)
        drafts = draw_candidates(probs, n_candidates, generator)[:, 0]
        targets = q.expand(N_SAMPLES, 1 + n_candidates, 4)
        kept, next_token = tree_accept(fan, drafts, None if rule == "matching" else probs, targets, generator)
        assert (kept[:, 1:].sum(1) <= 1).all(), "siblings are rivals"
        first = torch.where(
            kept[:, 1:].any(1), drafts.gather(1, kept[:, 1:].long().argmax(1, True)).squeeze(1), next_token
        )
        samples = [(token,) for token in first.tolist()]
        assert chi_square_p_value(samples, {(token,): q[token].item() for token in range(4)}) > 1e-3


def test_more_candidates_are_kept_more_often_and_recursive_rejection_keeps_all_that_is_possible_with_one():
    generator = torch.Generator().manual_seed(0)
    p, q = torch.rand(2, 6, generator=generator, dtype=torch.float64).pow(3).softmax(-1)
    rates = {rule: [] for rule in RULES}
    for n in (1, 2, 4):
        probs, targets = p.expand(N_SAMPLES, 1, 6), q.expand(N_SAMPLES, 1 + n, 6)
        drafts = draw_candidates(probs, n, generator)[:, 0]
        for rule in RULES:
            kept, _ = tree_accept(
                DraftTree((0,) * n), drafts, None if rule == "matching" else probs, targets, generator
            )
            rates[rule].append(kept[:, 1:].any(1).double().mean().item())
    assert rates["recursive"][0] == pytest.approx(torch.minimum(p, q).sum().item(), abs=0.02)
    assert rates["matching"][0] == pytest.approx((p * q).sum().item(), abs=0.02)
    for rule in RULES:
        assert rates[rule] == sorted(rates[rule])


def test_candidates_are_drawn_without_replacement():
    probs = torch.tensor([0.5, 0.3, 0.2, 0.0], dtype=torch.float64)
    pairs = draw_candidates(probs.expand(N_SAMPLES, 4), 2, torch.Generator().manual_seed(0))
    expected = {(a, b): (probs[a] * probs[b] / (1 - probs[a])).item() for a, b in itertools.permutations(range(3), 2)}
    assert chi_square_p_value(list(map(tuple, pairs.tolist())), expected) > 1e-3


def test_fewer_likely_tokens_than_ranks_do_no_harm():
    p, q = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.2, 0.5, 0.3])
    probs, targets = p.expand(N_SAMPLES, 1, 3), q.expand(N_SAMPLES, 4, 3)
    generator = torch.Generator().manual_seed(0)
    drafts = draw_candidates(probs, 3, generator)[:, 0]
    kept, next_token = tree_accept(DraftTree((0, 0, 0)), drafts, probs, targets, generator)
    assert not kept[:, 2:].any(), "what was not drawn is not kept"
    first = torch.where(kept[:, 1], drafts[:, 0], next_token).tolist()
    assert chi_square_p_value([(token,) for token in first], {(i,): q[i].item() for i in range(3)}) > 1e-3


# Whole texts.


@pytest.mark.parametrize("sampling", [{"temperature": 0.8, "top_k": 3}, {"temperature": 1.0}], ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_texts_have_exactly_the_enumerated_distribution(rule, sampling, tiny):
    assert tree_p_value(tiny, rule, **sampling) > 1e-3


@pytest.mark.parametrize("rule", RULES)
def test_the_enumeration_sees_every_node_of_the_tree_kept_and_left(rule, tiny):
    settings = {"method": "pass-tree", "tree": TREE, "rule": rule, "temperature": 1.0}
    records = stream(tiny, [[1, 2, 3]] * 2000, 6, **settings, generator=torch.Generator().manual_seed(0))
    kept = [record.kept for record in records if record.tree == TREE]
    share = torch.cat(kept).double().mean(0)
    assert (share[1:] > 0.002).all()
    assert (share[1:] < 0.9).all()


# Planted bugs that the enumeration must catch.


def test_p_not_updated_after_a_rejection_is_caught(tiny, monkeypatch):
    class Unscattered(torch.Tensor):
        """A distribution that forgets which tokens were rejected."""

        def scatter(self, *_):
            return self

    original = minipass.sampling._recursive_rejection

    def broken(drafts, tokens, draft_probs, target_probs, generator):
        return original(drafts, tokens, draft_probs.as_subclass(Unscattered), target_probs, generator)

    monkeypatch.setattr(minipass.sampling, "_recursive_rejection", broken)
    assert tree_p_value(tiny, "recursive") < 1e-6


def test_residual_not_updated_after_a_rejection_is_caught(tiny, monkeypatch):
    original = minipass.sampling._recursive_rejection

    def broken(drafts, tokens, draft_probs, target_probs, generator):
        return original(drafts, tokens, draft_probs, target_probs, generator)[0], target_probs

    monkeypatch.setattr(minipass.sampling, "_recursive_rejection", broken)
    assert tree_p_value(tiny, "recursive") < 1e-6


def siblings_see_each_other(drafts, n_lookahead, device):
    layout = fused_layout(drafts, n_lookahead, device)
    visible, n_rows = layout.visible.clone(), len(drafts.depth)
    visible[:, :n_rows, :n_rows] = torch.ones(n_rows, n_rows).tril().bool()
    return Layout(visible, layout.depth)


@pytest.mark.parametrize("bug", ["siblings see each other", "the first rows stay in the cache"])
@pytest.mark.parametrize("rule", RULES)
def test_greedy_equality_catches_a_wrong_mask_and_a_wrong_gather(rule, bug, lively_model, monkeypatch):
    settings = {"method": "pass-tree", "tree": TREE, "rule": rule}
    prompts = [[token, 3, 8] for token in range(11)]
    plain = generate(lively_model, prompts, 30, method="autoregressive").tokens
    assert generate(lively_model, prompts, 30, **settings).tokens == plain
    if bug.startswith("siblings"):
        monkeypatch.setattr(minipass.rounds, "fused_layout", siblings_see_each_other)
    else:
        monkeypatch.setattr(KVCache, "gather", lambda cache, rows: None)
    assert generate(lively_model, prompts, 30, **settings).tokens != plain


def test_candidates_that_are_not_tested_in_the_order_they_were_drawn_are_caught(tiny, monkeypatch):
    monkeypatch.setattr(minipass.decoder, "draw_candidates", lambda *args: draw_candidates(*args).flip(-1))
    assert tree_p_value(tiny, "recursive") < 1e-6


# A tree of width 1 is the chain.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_on_a_chain_tree_accept_is_speculative_accept_bit_for_bit(dtype):
    generator = torch.Generator().manual_seed(0)
    for n in range(1, 5):
        p = torch.rand(500, n, 7, generator=generator, dtype=dtype).pow(4).softmax(-1)
        q = torch.rand(500, n + 1, 7, generator=generator, dtype=dtype).pow(4).softmax(-1)
        drafts = draw(p, generator)
        one = speculative_accept(drafts, p, q, torch.Generator().manual_seed(n))
        kept, next_token = tree_accept(chain(n), drafts, p, q, torch.Generator().manual_seed(n))
        assert torch.equal(one[0], kept.sum(1) - 1)
        assert torch.equal(one[1], next_token)


@pytest.mark.parametrize(
    "sampling", [{"temperature": 0.0}, {"temperature": 1.0}, {"temperature": 0.8, "top_k": 4}], ids=str
)
def test_pass_tree_with_a_chain_is_pass_bit_for_bit(sampling, lively_model):
    prompts, settings = [[1, 2, 3], [4], [7, 8, 9, 1]], {"lookahead": 3, **sampling}
    records = [
        list(stream(lively_model, prompts, 30, generator=torch.Generator().manual_seed(1), **settings, **way))
        for way in ({"method": "pass"}, {"method": "pass-tree", "tree": chain(3), "rule": "recursive"})
    ]
    for one, other in zip(*records, strict=True):
        assert (one.tokens, one.origins, one.n_accepted) == (other.tokens, other.origins, other.n_accepted)
        if one.drafts is not None:
            assert torch.equal(one.target_probs, other.target_probs)


# What a round records.


@pytest.mark.parametrize("rule", RULES)
def test_records_of_a_tree_tell_which_path_was_kept(rule, lively_model):
    seen = set()
    settings = {"method": "pass-tree", "tree": TREE, "rule": rule, "temperature": 1.0, "stop_token": 3}
    records = stream(lively_model, [[1, 2, 3], [4]], 30, **settings, generator=torch.Generator().manual_seed(4))
    for record in records:
        for b in range(2):
            if record.drafts is None or not record.active[b]:
                continue
            nodes = record.kept[b].nonzero().flatten().tolist()
            assert nodes[0] == 0
            assert all(record.tree.parents[node - 1] == before for before, node in itertools.pairwise(nodes))
            kept = [
                token for token, origin in zip(record.tokens[b], record.origins[b], strict=True) if origin == ACCEPTED
            ]
            assert kept == record.drafts[b][[node - 1 for node in nodes[1:]]].tolist()[: len(kept)]
            if record.origins[b][-1] in (BONUS, CORRECTED):
                children = [
                    node for node in range(1, len(record.tree.depth)) if record.tree.parents[node - 1] == nodes[-1]
                ]
                assert (record.origins[b][-1] == BONUS) == (not children)
                assert (
                    record.tokens[b][-1] not in record.drafts[b][[child - 1 for child in children]]
                    or rule == "recursive"
                )
            seen |= set(record.origins[b])
    assert seen >= {ACCEPTED, BONUS, CORRECTED}


@torch.no_grad()
@pytest.mark.parametrize("rule", RULES)
def test_recorded_distributions_are_what_the_model_says_behind_each_node(rule, lively_model):
    """Exactness holds for any p, so only this test sees drafts that come from the wrong look-ahead rows."""
    texts, sampling, n_compared = [[1, 2, 3], [4]], {"temperature": 0.9, "top_k": 6}, 0
    settings = {"method": "pass-tree", "tree": TREE, "rule": rule, **sampling}
    records = stream(lively_model, [list(t) for t in texts], 30, **settings, generator=torch.Generator().manual_seed(2))
    for record in records:
        for b, text in enumerate(texts):
            if record.drafts is not None and record.active[b]:
                depth = record.tree.depth[-1]
                rows = text[:-1] + [11, 12, 13][:depth]  # look-ahead rows stood behind the token before the root
                p = probabilities(lively_model(torch.tensor([rows]))[0, len(rows) - depth :], **sampling)
                torch.testing.assert_close(record.draft_probs[b], p)
                for node in range(len(record.tree.depth)):
                    path, at = [], node
                    while at:
                        path.insert(0, record.drafts[b, at - 1].item())
                        at = record.tree.parents[at - 1]
                    q = probabilities(lively_model(torch.tensor([text + path]))[0, -1], **sampling)
                    torch.testing.assert_close(record.target_probs[b, node], q)
                n_compared += 1
            text += record.tokens[b]
    assert n_compared > 10


# Groups that are not complete.

SPARSE = DraftTree(TREE.parents, groups=(3, 1, 2, 0, 0, 1, 0, 0))


@pytest.mark.parametrize("rule", RULES)
def test_incomplete_groups_change_the_passes_not_the_text(rule, lively_model):
    prompts = [[token, 3, 8] for token in range(11)] + [[1] * 37]
    settings = {"method": "pass-tree", "rule": rule}
    plain = generate(lively_model, prompts, 30, method="autoregressive")
    sparse = generate(lively_model, prompts, 30, tree=SPARSE, **settings)
    assert sparse.tokens == plain.tokens
    assert sparse.passes >= generate(lively_model, prompts, 30, tree=TREE, **settings).passes


@pytest.mark.parametrize("rule", RULES)
def test_texts_from_incomplete_groups_have_exactly_the_enumerated_distribution(rule, tiny):
    assert tree_p_value(tiny, rule, tree=SPARSE) > 1e-3


def test_a_group_that_is_not_there_is_stood_in_for_by_rows_that_are():
    rows = group_rows(DraftTree((0, 1), groups=(3, 1, 0)), 3, CPU)
    assert rows.tolist() == [[3, 4, 5], [6, 6, 6], [3, 4, 5]]  # real rows 0..2, then the groups
    complete = group_rows(chain(2), 2, CPU)
    assert complete.tolist() == [[3, 4], [5, 6], [7, 8]]


@pytest.mark.parametrize("groups", [(1,), (0, 1, 1)])
def test_groups_that_do_not_fit_the_nodes_are_refused(groups):
    with pytest.raises(ValueError, match="groups"):
        DraftTree((0, 0), groups)


# The shape of a tree.


def test_a_tree_knows_depths_ranks_and_width_and_can_be_cut():
    assert TREE.depth == (0, 1, 1, 1, 2, 2, 2, 3)
    assert TREE.rank == (0, 1, 2, 0, 1, 0, 0)
    assert TREE.width == 3
    assert TREE.cut(2) == DraftTree((0, 0, 0, 1, 1, 2))
    assert TREE.cut(0) == chain(0)
    assert TREE.cut(9) == TREE
    assert (chain(3).width, chain(3).depth) == (1, (0, 1, 2, 3))


@pytest.mark.parametrize("parents", [(1,), (0, 2), (-1,), (0, 1, 0)])
def test_nodes_out_of_order_are_refused(parents):
    with pytest.raises(ValueError, match="node"):
        DraftTree(parents)


def test_rows_of_a_fused_tree_see_their_own_path_alone():
    drafts = DraftTree((0, 0, 1))
    layout = fused_layout(drafts, 2, CPU)
    seen = [row.nonzero().flatten().tolist() for row in layout.visible[0]]
    assert seen[:4] == [[0], [0, 1], [0, 2], [0, 1, 3]]
    assert seen[4:] == [
        [0, 4],
        [0, 4, 5],
        [0, 1, 6],
        [0, 1, 6, 7],
        [0, 2, 8],
        [0, 2, 8, 9],
        [0, 1, 3, 10],
        [0, 1, 3, 10, 11],
    ]
    assert layout.depth[0].tolist() == [0, 1, 1, 2, 1, 2, 2, 3, 2, 3, 3, 4]


def test_gather_puts_the_kept_rows_behind_what_each_text_has():
    cache = KVCache(random_model(0).config, batch_size=2, max_len=10)
    cache.keys += torch.arange(10.0)[:, None]
    cache.values -= torch.arange(10.0)[:, None]
    cache.length = torch.tensor([2, 4])
    cache.gather(torch.tensor([[0, 3, 5], [2, 1, 0]]))
    assert cache.keys[0, :, 0, :, 0].tolist() == [[0, 1, 2, 5, 7, 5, 6, 7, 8, 9], [0, 1, 2, 3, 6, 5, 4, 7, 8, 9]]
    assert torch.equal(cache.values, -cache.keys)
    assert cache.length.tolist() == [2, 4]


def test_ancestors_of_a_draft_tree_are_those_of_the_mask_builder():
    assert ancestors(TREE, CPU)[7].nonzero().flatten().tolist() == [0, 1, 4, 7]
