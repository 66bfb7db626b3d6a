"""The draft head: drafts that know the token before them, exact all the same, and trained on the true one."""

import copy
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import (
    METHODS,
    TREE,
    WAYS,
    chi_square_p_value,
    plain_text,
    random_model,
    random_prompts,
    sequence_probabilities,
)

from minipass import decode, trees, weights
from minipass.decode import Decoder, Fused, TwoPass
from minipass.engine import Engine
from minipass.errors import InputError
from minipass.extras.course.test_exercises import SlowHead
from minipass.layout import path, with_groups
from minipass.losses import lookahead_loss, random_cuts, training_pass
from minipass.model import GPT
from minipass.sampling import COUPLED, REJECTION, Sampling
from minipass.trees import Drafts, DraftTree, Shape, chain

CPU = torch.device("cpu")


def with_head(model: GPT, seed: int = 0, std: float = 0.5) -> GPT:
    """A copy with a draft head that says much."""
    model, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    model.new_draft_head(12)
    with torch.no_grad():
        for parameter in model.draft_head.parameters():
            parameter.normal_(std=std, generator=generator)
    return model


def by_hand(model: GPT, hidden: torch.Tensor, before: int) -> torch.Tensor:
    """Logits (V,) of one look-ahead row with hidden state (n_embd,) whose place comes after the token `before`."""
    state = F.layer_norm(hidden, hidden.shape, model.ln_f.weight, model.ln_f.bias, eps=1e-5)
    return model.wte.weight @ SlowHead(model.draft_head)(state[None], model.wte.weight[before][None])[0]


@pytest.fixture(scope="module")
def headed(lively_model) -> GPT:
    return with_head(lively_model)


@torch.no_grad()
@pytest.mark.parametrize(
    "tree", [chain(3), TREE, DraftTree((0, 0, 1, 1, 2, 3, 5))], ids=["chain", "tree", "other tree"]
)
def test_the_children_of_each_node_are_drawn_from_the_p_of_their_own_parents_token(tree, headed):
    decoder = Decoder([headed], Sampling(0.9), REJECTION, 4, 60)
    handed = decoder.begin([[1, 2], [3], [4, 5, 6], [7]], [0] * 4, [5, 6, 7, 8])
    hidden = torch.randn(4, tree.depth[-1], 16, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    handed, keys = handed._replace(hidden=hidden, logits=headed.logits(hidden)), decoder.noise(tree.depth[-1])
    _, drafts = decoder.draft(Shape(tree, 3), handed, keys, None)
    for b in range(4):
        tokens = [handed.root[b].item(), *drafts.tokens[b].tolist()]
        for node in set(tree.parents):
            p = (by_hand(headed, hidden[b, tree.depth[node]], tokens[node]) / 0.9).softmax(-1)
            torch.testing.assert_close(drafts.p[b, node], p, rtol=1e-9, atol=1e-12)
            siblings = [tokens[i] for i, parent in enumerate(tree.parents, 1) if parent == node]
            assert len(set(siblings)) == len(siblings)


@pytest.mark.parametrize("way", WAYS, ids=", ".join)
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.9), Sampling(1.0, top_k=4)], ids=["greedy", "T", "top-k"])
def test_with_a_head_too_texts_are_plain_decodings_or_under_rejection_those_of_each_prompt_alone(
    way, sampling, headed, lively_draft
):
    method, rule = way
    if rule == REJECTION and ("lookup" in method or method == "auto") and sampling.temperature > 0:
        pytest.skip("their drafts depend on the other texts of the batch")
    rng = random.Random(0)
    for _ in range(2):
        engine = Engine(headed, METHODS[method](rng.randint(1, 4), rule, lively_draft), sampling)
        prompts, n_new, stop, seed = (
            random_prompts(rng, 3),
            rng.randint(1, 30),
            rng.choice([None, 3]),
            rng.randrange(99),
        )
        texts = engine.generate(prompts, n_new, seed=seed, stop_token=stop).tokens
        for b, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
            if rule == COUPLED or sampling.temperature == 0:
                assert text == plain_text(headed, prompt, n_new, sampling, seed + b, [stop])
            else:
                assert text == engine.generate(prompt, n_new, seed=seed + b, stop_token=stop).tokens[0]


@torch.no_grad()
def test_of_a_large_vocabulary_the_head_weighs_the_likeliest_tokens_without_it(headed, monkeypatch):
    monkeypatch.setattr(decode, "LARGE_VOCABULARY", 10)
    monkeypatch.setattr(decode, "N_CANDIDATES", 5)
    decoder = Decoder([headed], Sampling(0.9), REJECTION, 2, 60)
    handed = decoder.begin([[1, 2], [3]], [0] * 2, [5, 6])
    hidden = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    handed, keys = handed._replace(hidden=hidden, logits=headed.logits(hidden)), decoder.noise(3)
    _, drafts = decoder.draft(Shape(TREE, 3), handed, keys, None)
    for b in range(2):
        tokens = [handed.root[b].item(), *drafts.tokens[b].tolist()]
        for node in set(TREE.parents):
            state = hidden[b, TREE.depth[node]]
            others = headed.logits(state).sort(descending=True, stable=True).indices[5:]
            logits = by_hand(headed, state, tokens[node]).index_fill(0, others, -torch.inf)
            torch.testing.assert_close(drafts.p[b, node], (logits / 0.9).softmax(-1), rtol=1e-9, atol=1e-12)


def test_candidates_leave_the_distribution_of_texts_as_it_is(tiny, monkeypatch):
    monkeypatch.setattr(decode, "LARGE_VOCABULARY", 4)
    monkeypatch.setattr(decode, "N_CANDIDATES", 3)
    assert p_value(tiny, REJECTING["tree"]) > 1e-4


@pytest.fixture(scope="module")
def tiny() -> GPT:
    return with_head(random_model(seed=5, std=0.5, vocab_size=5, block_size=16, n_layer=1, n_lookahead=3), std=1.0)


def p_value(model: GPT, method) -> float:
    """How likely 12,000 texts at temperature 1 are."""
    texts = Engine(model, method, Sampling(1.0)).generate([[1, 2, 3]] * 12_000, 4).tokens
    return chi_square_p_value(list(map(tuple, texts)), sequence_probabilities(model, [1, 2, 3], 4, temperature=1.0))


REJECTING = {"fused": Fused(3, REJECTION), "two-pass": TwoPass(3), "tree": Fused(TREE, REJECTION)}


@pytest.mark.parametrize("method", REJECTING)
def test_under_the_rejection_rule_texts_have_exactly_the_enumerated_distribution(method, tiny):
    assert p_value(tiny, REJECTING[method]) > 1e-4


def test_the_p_of_a_siblings_parent_is_caught(tiny, monkeypatch):
    monkeypatch.setattr(
        trees.Shape, "on", lambda shape, *arguments, on=Shape.on: swapped(on(shape, *arguments), shape.tree)
    )
    assert p_value(tiny, REJECTING["tree"]) < 1e-6


def swapped(nodes: trees.Nodes, tree: DraftTree) -> trees.Nodes:
    """The first two nodes of depth 1 take each other's p."""
    if len(tree.parents) < 2:
        return nodes
    p_row = nodes.p_row.clone()
    p_row[[1, 2]] = nodes.p_row[[2, 1]]
    return nodes._replace(p_row=p_row)


@pytest.mark.parametrize("method", ["fused", "tree"])
def test_drafts_that_are_told_another_token_than_p_assumes_are_caught(method, tiny, monkeypatch):
    draft, on = Decoder.draft, Shape.on

    def blind(*arguments):
        nodes = on(*arguments)
        return nodes._replace(levels=tuple(level._replace(parents=level.parents * 0) for level in nodes.levels))

    def draft_with_another_p(*arguments):
        """p is that of drafts which all know the root alone, as if nothing had been drawn after it."""
        nodes, made = draft(*arguments)
        with monkeypatch.context() as patch:
            patch.setattr(Shape, "on", blind)
            return nodes, Drafts(made.tokens, draft(*arguments)[1].p)

    monkeypatch.setattr(Decoder, "draft", draft_with_another_p)
    assert p_value(tiny, REJECTING[method]) < 1e-6


@pytest.mark.parametrize("rule", [COUPLED, REJECTION])
def test_turns_with_a_new_head_are_those_without_one(rule, lively_model):
    fresh = copy.deepcopy(lively_model)
    fresh.new_draft_head(12)
    records = [
        [
            (turn.tokens, turn.origins, turn.last)
            for turn in Engine(model, Fused(TREE, rule), Sampling(0.9)).stream([[1, 2, 3], [4]], 30)
        ]
        for model in (lively_model, fresh.double())
    ]
    assert records[0] == records[1]


# Training.

B, T, G, L = 3, 20, 5, 3


@pytest.fixture
def batch() -> tuple[torch.Tensor, np.ndarray]:
    text = torch.randint(0, 11, (B, T + 1), generator=torch.Generator().manual_seed(0))
    return text, random_cuts(B, T, G, L, np.random.default_rng(0))


@torch.no_grad()
def test_training_tells_the_head_the_true_token_before_each_place(headed, batch):
    text, cuts = batch
    text_logits, draft_logits = training_pass(headed, text[:, :-1], cuts, L)
    torch.testing.assert_close(text_logits, headed(text[:, :-1]))
    for b in range(B):
        for g, cut in enumerate(cuts[b]):
            hidden = headed.hidden(text[b, None, : cut + 1], with_groups(path(cut + 1), [cut], L))[0, -L:]
            for i in range(L):
                expected = by_hand(headed, hidden[i], text[b, cut + 1 + i])
                torch.testing.assert_close(draft_logits[b, g, i], expected)


@pytest.mark.parametrize("model", ["headed", "lively_model"])
def test_two_phases_give_the_gradients_of_one(model, batch, request):
    model, (text, cuts), found = copy.deepcopy(request.getfixturevalue(model)), batch, []
    for frozen in (False, True):
        model.zero_grad()
        text_logits, draft_logits = training_pass(model, text[:, :-1], cuts, L, frozen=frozen)
        loss = lookahead_loss("kl", draft_logits, text_logits, text[:, 1:], cuts).sum()
        loss.backward()
        head = (
            [] if model.draft_head is None else [parameter.grad.clone() for parameter in model.draft_head.parameters()]
        )
        found.append([loss.detach(), model.lookahead.grad.clone(), *head])
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-12)


# Files.


def test_a_head_comes_back_from_a_checkpoint_and_from_a_tables_file(headed, lively_model, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    encoding = weights.load("joint").encoding
    model = with_head(random_model(seed=1, vocab_size=encoding.n_vocab)).float()
    weights.save(tmp_path / "model.pt", model, encoding, {})
    loaded = weights.load(tmp_path / "model.pt").model
    assert loaded.config == model.config
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
    weights.save_adapters(headed, tmp_path / "table.safetensors")
    other = copy.deepcopy(lively_model)
    weights.load_adapters(other, tmp_path / "table.safetensors")
    assert other.config == headed.config
    assert torch.equal(other.draft_head.c_fc.weight, headed.draft_head.c_fc.weight)
    assert len(safetensors.load_file(tmp_path / "table.safetensors")) == 5


def test_a_head_of_another_width_is_refused(headed, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    head = {f"draft_head.{name}": value.contiguous() for name, value in headed.draft_head.state_dict().items()}
    safetensors.save_file({"lookahead": torch.zeros(1, 32), **head}, tmp_path / "mixed.safetensors")
    with pytest.raises(InputError, match="do not fit"):
        weights.load_adapters(random_model(seed=2, n_embd=32), tmp_path / "mixed.safetensors")


def test_a_table_without_a_head_takes_the_head_away(headed, lively_model, tmp_path):
    pytest.importorskip("safetensors.torch")
    weights.save_adapters(lively_model, tmp_path / "table.safetensors")
    model = copy.deepcopy(headed)
    weights.load_adapters(model, tmp_path / "table.safetensors")
    assert model.draft_head is None
    assert model.config.n_draft == 0
