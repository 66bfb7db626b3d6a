"""Llama's layout, gated adapters and a cache that is kept: against Transformers, a slow reference and planted bugs."""

import copy
import json
import random
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from conftest import TREE, noisy, plain_text, random_lively_model, random_model, slow_logits
from test_exactness import differs, each_way, engine, p_values, random_prompts

from minipass import losses, model, pretrained, weights
from minipass.decode import Decoder, Fused, Plain, TwoModels, TwoPass
from minipass.engine import GREEDY, Engine
from minipass.errors import InputError
from minipass.layout import path, with_groups
from minipass.model import GPT, GPTConfig, KVCache, Matrix, is_drafting
from minipass.sampling import COUPLED, REJECTION, Sampling
from minipass.trees import Shape

GROUPED = {"llama": True, "n_head": 4, "n_kv_head": 2, "head_dim": 6, "n_inner": 20, "tied": False}
LAYOUTS = {"gpt2": {}, "llama": GROUPED}
each_layout = pytest.mark.parametrize("layout", LAYOUTS)


def random_sizes(seed: int) -> dict:
    """Of a small Llama; heads are narrower or wider than n_embd / n_head."""
    rng = random.Random(seed)
    n_kv_head = rng.choice([1, 2])
    return {
        "llama": True, "vocab_size": 61, "block_size": 30, "n_layer": rng.randint(1, 3), "n_kv_head": n_kv_head,
        "n_head": n_kv_head * rng.choice([1, 2, 3]), "head_dim": rng.choice([4, 8, 10]), "n_embd": rng.choice([12, 24]),
        "n_inner": rng.randint(5, 40), "rope_theta": rng.choice([500.0, 10_000.0]),
        "norm_eps": rng.choice([1e-6, 0.01]), "tied": seed % 2 == 0,
    }  # fmt: skip


def random_ids(llama: GPT) -> torch.Tensor:
    """Three texts as long as the window."""
    config, generator = llama.config, torch.Generator().manual_seed(0)
    return torch.randint(config.vocab_size, (3, config.block_size), generator=generator)


@pytest.fixture
def patch(monkeypatch):
    """Plants a bug: a function that is given the original first."""

    def plant(where, name, bug):
        original = getattr(where, name)
        monkeypatch.setattr(where, name, lambda *arguments: bug(original, *arguments))

    return plant


def one_row_too_many(original, matrix, x, n_lookahead=0):
    """The adapter acts on the last real row, too."""
    return original(matrix, x, n_lookahead and n_lookahead + 1)


# What it computes.

each_size = pytest.mark.parametrize("sizes", [random_sizes(seed) for seed in range(4)], ids=range(4))


@torch.no_grad()
@each_size
def test_logits_are_llama_by_the_book(sizes):
    llama = random_model(seed=1, lora_rank=2, **sizes)
    ids = random_ids(llama)[:, :-3]
    expected = slow_logits(llama, ids.tolist(), 3)
    torch.testing.assert_close(llama(ids), expected[:, :-3], rtol=0, atol=1e-9)
    layout = with_groups(path(ids.shape[1]), [ids.shape[1] - 1], 3)
    torch.testing.assert_close(llama(ids, layout), expected, rtol=0, atol=1e-9)


@torch.no_grad()
def test_rows_behind_a_cache_are_llama_by_the_book():
    llama = random_model(seed=1, **GROUPED)
    ids, cache = random_ids(llama)[:, :20], KVCache(llama.config, 3, 24, dtype=torch.float64)
    for first, end in pairwise([0, 7, 8, 17]):
        layout = with_groups(path(end - first), [end - first - 1], 3)
        logits = llama(ids[:, first:end], layout, cache)
        expected = slow_logits(llama, ids[:, :end].tolist(), 3)[:, first:]
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-9)
        cache.length += end - first


@torch.no_grad()
@pytest.mark.parametrize("bug", ["angles of the next position", "no turn", "queries of another group"])
def test_a_broken_llama_is_caught(bug, patch):
    llama = random_model(seed=1, **GROUPED)
    ids = random_ids(llama)
    expected = slow_logits(llama, ids.tolist())
    if bug == "queries of another group":
        rows = llama.h[0].attn.c_attn.weight[:24]
        rows.copy_(rows.unflatten(0, (2, 2, 6)).transpose(0, 1).flatten(0, 2).clone())
    elif bug == "no turn":
        patch(model, "rotated", lambda original, heads, cos, sin: heads)
    else:
        patch(model, "rotary", lambda original, position, *more: original(position + position.gt(4), *more))
    assert (llama(ids) - expected).abs().max() > 0.1


# Transformers' folders, in and out.


@pytest.fixture(scope="module")
def transformers():
    pytest.importorskip("safetensors")
    return pytest.importorskip("transformers")


def their_llama(transformers, sizes: dict):
    """A random Llama of Transformers."""
    config = transformers.LlamaConfig(
        vocab_size=sizes["vocab_size"], max_position_embeddings=sizes["block_size"], hidden_size=sizes["n_embd"],
        num_hidden_layers=sizes["n_layer"], num_attention_heads=sizes["n_head"], head_dim=sizes["head_dim"],
        num_key_value_heads=sizes["n_kv_head"], intermediate_size=sizes["n_inner"], rms_norm_eps=sizes["norm_eps"],
        rope_theta=sizes["rope_theta"], tie_word_embeddings=sizes["tied"],
    )  # fmt: skip
    theirs, generator = transformers.LlamaForCausalLM(config).eval(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in theirs.parameters():  # the norms' too
            parameter.normal_(std=0.3, generator=generator)
    return theirs


@torch.no_grad()
def assert_same_logits(ours: GPT, theirs) -> None:
    ids = random_ids(ours)
    torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=0, atol=1e-4)


@each_size
def test_a_llama_of_transformers_computes_the_same_here(transformers, sizes, tmp_path):
    theirs = their_llama(transformers, sizes)
    for name, shard_size in (("one", "1GB"), ("shards", "3kB")):
        theirs.save_pretrained(tmp_path / name, max_shard_size=shard_size)
        assert (tmp_path / name / pretrained.INDEX).exists() == (name == "shards")
        ours = pretrained.from_pretrained(tmp_path / name, n_lookahead=2)
        assert ours.config == GPTConfig(**sizes, n_lookahead=2)
        assert_same_logits(ours, theirs)


@each_size
def test_a_llama_of_ours_computes_the_same_in_transformers_and_again_here(transformers, sizes, tmp_path):
    ours = random_model(seed=4, std=0.3, n_draft=3, lora_rank=2, **sizes).float()
    weights.save_pretrained(ours, tmp_path)
    theirs, report = transformers.LlamaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert_same_logits(ours, theirs.eval())
    again = pretrained.from_pretrained(tmp_path)
    weights.load_adapters(again, tmp_path / weights.TABLE)
    assert again.config == ours.config
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in ours.state_dict().items())


@pytest.fixture
def folder(tmp_path):
    """Of a Llama whose heads are as wide as they are by default."""
    pytest.importorskip("safetensors")
    weights.save_pretrained(random_model(seed=4, llama=True, n_head=4, n_inner=20).float(), tmp_path)
    return tmp_path


def change_config(folder, changes: dict) -> None:
    config = json.loads((folder / pretrained.CONFIG).read_text()) | changes
    config = {name: value for name, value in config.items() if value != "left out"}
    (folder / pretrained.CONFIG).write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"model_type": "mistral"}, "model_type 'mistral'.* only gpt2 or llama"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"attention_bias": True}, "attention_bias True"),
        ({"mlp_bias": True}, "mlp_bias True"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling .*linear"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_scaling .*yarn"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "rope_scaling .*llama3"),
        ({"num_key_value_heads": 3}, "n_kv_head"),
        ({"head_dim": 3}, "even width, not 3"),
        ({"num_key_value_heads": 2}, "does not hold what its config says: .*q_proj"),
        ({"intermediate_size": 10}, "does not hold what its config says: .*gate_proj"),
        ({"tie_word_embeddings": False}, "lacks 1 weights, such as lm_head"),
        ({"num_hidden_layers": 1}, "has, unexpectedly, 9 weights, such as model.layers.1"),
        ({"max_position_embeddings": "left out"}, "max_position_embeddings"),
    ],
    ids=str,
)
def test_what_is_not_computed_here_is_refused_by_its_name(folder, changes, complaint):
    change_config(folder, changes)
    with pytest.raises(InputError, match=complaint):
        pretrained.from_pretrained(folder)


@pytest.mark.parametrize(
    ("changes", "sizes"),
    [
        ({}, {}),
        ({"rope_theta": "left out"}, {}),
        ({"rope_theta": 500.0}, {"rope_theta": 500.0}),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, {"rope_theta": 5e5}),
        ({"rope_scaling": {"rope_type": "default"}, "hidden_act": "left out"}, {}),
        ({"rms_norm_eps": "left out"}, {"norm_eps": 1e-6}),
        ({"head_dim": None, "num_key_value_heads": None}, {"head_dim": 0, "n_kv_head": 0}),
    ],
    ids=str,
)
def test_defaults_may_be_said_or_left_out(folder, changes, sizes):
    before = pretrained.from_pretrained(folder).config
    change_config(folder, changes)
    assert pretrained.from_pretrained(folder).config == replace(before, **sizes)


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
BPE = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2, "ba": 3}, "merges": ["a b", "b a"]}


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"model": {"type": "Unigram", "vocab": []}}, "'Unigram'.* only a BPE of bytes"),
        ({"pre_tokenizer": {"type": "Metaspace"}}, "Metaspace.* only a BPE of bytes"),
        ({"pre_tokenizer": None}, "only a BPE of bytes"),
        ({"normalizer": {"type": "NFC"}}, "only a BPE of bytes"),
        ({"pre_tokenizer": BYTE_LEVEL | {"add_prefix_space": True}}, "add_prefix_space"),
        ({"pre_tokenizer": {"pretokenizers": [{"type": "Whitespace"}, BYTE_LEVEL]}}, "cuts text by .*Whitespace"),
        ({"pre_tokenizer": {"pretokenizers": []}}, "tokenizer.json"),
        ({"model": BPE | {"merges": ["b a", "a b"]}}, "another order"),
        ({"model": BPE | {"merges": ["a c"]}}, "tokenizer.json is damaged"),
    ],
    ids=str,
)
def test_a_tokenizer_that_cannot_be_read_is_refused(folder, changes, complaint):
    content = {"model": BPE, "pre_tokenizer": BYTE_LEVEL, "added_tokens": []}
    (folder / pretrained.TOKENIZER).write_text(json.dumps(content))
    assert pretrained.load_pretrained(folder).encoding.encode("ab") == [2]
    (folder / pretrained.TOKENIZER).write_text(json.dumps(content | changes))
    with pytest.raises(InputError, match=complaint):
        pretrained.load_pretrained(folder)


def test_a_folder_without_a_tokenizer_is_refused(folder):
    with pytest.raises(InputError, match="tokenizer.json is missing"):
        pretrained.load_pretrained(folder)


# The promise: what every method writes is plain decoding's, with adapters that are not zero.


@pytest.fixture(scope="module")
def lively():
    """A Llama with adapters and a small window, and its draft model."""
    llama = random_lively_model(seed=0, block_size=16, lora_rank=2, **GROUPED)
    return llama, noisy(llama)


@pytest.fixture(scope="module")
def cases(lively):
    """Random calls, half of them greedy, and what the reference writes; texts go past the window."""
    rng, cases = random.Random(1), []
    for i in range(6):
        prompts, n_new, seed = random_prompts(rng, rng.randint(1, 2)), rng.randint(10, 20), rng.randrange(1000)
        sampling = Sampling(rng.uniform(0.5, 1.5), rng.choice([None, 4])) if i % 2 else GREEDY
        texts = [plain_text(lively[0], prompt, n_new, sampling, seed + b) for b, prompt in enumerate(prompts)]
        cases.append((prompts, n_new, sampling, seed, texts))
    return cases


@each_way
def test_greedy_and_coupled_texts_of_a_llama_are_those_of_plain_decoding(way, lively, cases):
    for prompts, n_new, sampling, seed, texts in cases:
        if way[1] == COUPLED or sampling == GREEDY:
            drawing = engine(way, *lively, sampling, n=1 + seed % 4)
            assert drawing.generate(prompts, n_new, seed=seed).tokens == texts


def test_texts_of_the_llama_change_and_some_drafts_are_right(lively, cases):
    texts = [text for *_, sampling, _, texts in cases if sampling == GREEDY for text in texts]
    assert sum(len(prompt) + n_new > 17 for prompts, n_new, *_ in cases for prompt in prompts) > 4, "windows move"
    changes = [before != after for text in texts for before, after in pairwise(text)]
    assert sum(changes) / len(changes) > 0.4
    for method in (TwoPass(2), Fused(2), Fused(TREE)):
        result = Engine(lively[0], method).generate([[token] for token in range(11)], 20)
        assert 0.05 < sum(result.accepted) / sum(result.tested) < 0.9


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(1.0)], ids=["greedy", "sampled"])
@pytest.mark.parametrize("method", ["fused", "tree", "tree with lookup"])
def test_at_the_windows_edge_beside_texts_with_room_a_llama_writes_plain_text(method, sampling, lively, patch):
    rng, way = random.Random(2), (method, COUPLED)
    prompts = [[rng.randrange(11) for _ in range(length)] for length in (14, 1, 15, 16)]
    expected = [plain_text(lively[0], prompt, 8, sampling, seed) for seed, prompt in enumerate(prompts)]
    assert engine(way, *lively, sampling).generate(prompts, 8).tokens == expected
    # A last position one short is caught.
    patch(model, "rotary", lambda original, position, *more: original(position.clamp(max=14), *more))
    assert engine(way, *lively, sampling).generate(prompts, 8).tokens != expected


@pytest.mark.parametrize("method", ["two-pass", "fused"])
def test_under_the_rejection_rule_texts_of_a_llama_have_exactly_the_enumerated_distribution(method, patch, monkeypatch):
    monkeypatch.setattr("test_exactness.N_SAMPLES", 4000)
    sizes = {"vocab_size": 5, "block_size": 6, "n_layer": 1, "n_embd": 8, "n_kv_head": 1, "n_inner": 12, "lora_rank": 1}
    tiny = random_model(seed=9, std=0.7, n_lookahead=2, llama=True, **sizes)
    drawing = engine((method, REJECTION), tiny, None, Sampling(1.0), n=2)
    assert min(p_values(drawing, [[1, 2, 0, 4]])) > 1e-4  # past the window
    result = drawing.generate([[1, 2, 0, 4]] * 300, 4)
    assert 0.1 < sum(result.accepted) / sum(result.tested) < 1
    patch(Matrix, "forward", one_row_too_many)
    assert min(p_values(drawing, [[1, 2, 0, 4]])) < 1e-6


# Gated adapters.


@torch.no_grad()
@each_layout
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_adapters_change_lookahead_rows_and_not_a_bit_of_a_real_one(layout, dtype, patch):
    adapted = random_model(seed=1, lora_rank=2, **LAYOUTS[layout]).to(dtype)
    without = copy.deepcopy(adapted)
    without.new_adapters(0)
    ids, rows = random_ids(adapted), Shape(TREE, 3).on(torch.device("cpu")).layout

    def hidden(llama: GPT) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the real rows and the look-ahead rows of a fused pass behind a prefilled cache."""
        cache = KVCache(llama.config, 3, 64, dtype=dtype)
        llama.hidden(ids[:, :9], cache=cache)
        cache.length += 9
        states = llama.hidden(ids[:, :8], rows, cache)
        return states[:, :8], states[:, 8:]

    (real, ahead), (expected, other) = hidden(adapted), hidden(without)
    assert torch.equal(real, expected)
    assert ((ahead - other).abs().amax(2) > 1e-3).all()
    patch(Matrix, "forward", one_row_too_many)
    assert not torch.equal(hidden(adapted)[0], expected)


@torch.no_grad()
@each_layout
def test_lookahead_rows_with_adapters_are_the_layout_by_the_book(layout):
    adapted, n_text = random_model(seed=1, lora_rank=2, **LAYOUTS[layout]), 9
    ids = random_ids(adapted)[:, :n_text]
    logits = adapted(ids, with_groups(path(n_text), [n_text - 1], 4))
    torch.testing.assert_close(logits, slow_logits(adapted, ids.tolist(), 4), rtol=0, atol=1e-9)


@each_layout
def test_adapters_are_on_the_first_matrix_of_each_attention_and_mlp(layout):
    model = random_model(seed=3, lora_rank=2, **LAYOUTS[layout])
    ups = {name for name, _ in model.named_parameters() if name.endswith(".up")}
    assert ups == {f"h.{i}.{part}.up" for i in range(model.config.n_layer) for part in ("attn.c_attn", "mlp.c_fc")}


@torch.no_grad()
@each_layout
def test_new_adapters_change_nothing_yet(layout):
    before = random_model(seed=1, **LAYOUTS[layout])
    after = copy.deepcopy(before)
    after.new_adapters(3)
    ids, rows = random_ids(before)[:, :9], with_groups(path(9), [3, 8], 4)
    assert torch.equal(before(ids, rows), after(ids, rows))


@each_layout
@pytest.mark.parametrize("method", ["two-pass", "tree"])
def test_an_adapter_that_acts_on_one_row_too_many_is_caught_by_the_text(layout, method, patch):
    adapted = random_lively_model(seed=2, block_size=16, lora_rank=2, **LAYOUTS[layout])
    assert not differs((method, COUPLED), adapted, None, Sampling(0.7))
    patch(Matrix, "forward", one_row_too_many)
    assert differs((method, COUPLED), adapted, None, Sampling(0.7))


# Training behind a frozen base.


def gradients(trained: GPT, text: torch.Tensor, cuts: np.ndarray, kind: str, *, frozen: bool) -> dict:
    """Of the look-ahead loss, by what only drafting reads."""
    drafting = {name: value for name, value in trained.named_parameters() if is_drafting(name)}
    text_logits, draft_logits = losses.training_pass(trained, text[:, :-1], cuts, frozen=frozen)
    loss = losses.lookahead_loss(kind, draft_logits.double(), text_logits, text[:, 1:], cuts).sum()
    return dict(zip(drafting, torch.autograd.grad(loss, drafting.values()), strict=True))


@pytest.fixture
def batch():
    """Texts and cuts, three of each text."""
    text = torch.randint(0, 11, (2, 16), generator=torch.Generator().manual_seed(0))
    return text, losses.random_cuts(2, 15, 3, 4, np.random.default_rng(0))


@each_layout
@pytest.mark.parametrize("kind", losses.LOOKAHEAD_LOSSES)
def test_behind_a_frozen_base_two_phases_give_the_gradients_of_one(layout, kind, batch, patch):
    trained = random_model(seed=3, n_draft=5, lora_rank=2, **LAYOUTS[layout])
    one, two = (gradients(trained, *batch, kind, frozen=frozen) for frozen in (False, True))
    assert {name.rpartition(".")[2] for name in two} == {"lookahead", "weight", "bias", "down", "up"}
    for name, gradient in one.items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(two[name], gradient, rtol=1e-4, atol=1e-6)
    # Rows without gradients to their own keys and values are caught.
    patch(losses.BehindText, "store", lambda original, *arguments: original(*arguments[:-1], arguments[-1].detach()))
    broken = gradients(trained, *batch, kind, frozen=True)
    assert max((broken[name] - gradient).abs().max() for name, gradient in one.items()) > 1e-3


@each_layout
def test_the_gradients_are_how_the_loss_of_draft_passes_by_the_book_changes(layout, batch):
    trained, (text, cuts) = random_model(seed=3, lora_rank=2, **LAYOUTS[layout]), batch
    moved, generator, step = gradients(trained, *batch, "ce", frozen=True), torch.Generator().manual_seed(0), 1e-5
    way = {name: torch.randn(value.shape, generator=generator).to(value) for name, value in moved.items()}

    def slow_loss(size: float) -> float:
        """With everything moved by `size` along the way."""
        other, total = copy.deepcopy(trained), 0.0
        with torch.no_grad():
            for name, value in other.named_parameters():
                value += size * way.get(name, torch.zeros(()))
        for b, cut in np.ndindex(cuts.shape):
            cut = cuts[b, cut]
            log_p = slow_logits(other, [text[b, : cut + 1].tolist()], 4)[0, -4:].log_softmax(-1)
            total -= log_p[range(4), text[b, cut + 2 : cut + 6]].sum().item()
        return total / cuts.size

    slope = (slow_loss(step) - slow_loss(-step)) / (2 * step)
    expected = sum((moved[name] * way[name]).sum().item() for name in moved)
    assert slope == pytest.approx(expected, rel=1e-4)


# A cache that is kept from text to text.


def conversation(rng: random.Random, drawing: Engine, n_prompts: int = 8, longest: int = 24):
    """Prompts that begin as the texts before, with what comes out: (prompt, new tokens) of each."""
    text = [3]
    for _ in range(n_prompts):
        same = text[: rng.randint(0, len(text))] if rng.random() < 0.7 else text
        prompt = [*same, *(rng.randrange(11) for _ in range(rng.randint(0, 6)))][:longest] or [3]
        new = drawing.generate(prompt, rng.choice([1, 4, 9, 30]), seed=5, stop_token=rng.choice([None, 4])).tokens[0]
        text = prompt + new
        yield prompt, new


@pytest.fixture(scope="module")
def talker():
    """A Llama whose window a conversation outgrows."""
    return random_lively_model(seed=0, block_size=24, lora_rank=2, **GROUPED)


@pytest.mark.parametrize("method", ["plain", "two-pass", "fused", "tree with lookup"])
def test_a_kept_cache_leaves_every_text_as_it_is(method, talker, monkeypatch):
    monkeypatch.setattr("minipass.decode.PREFILL_ROWS", 3)  # the rest of a prompt comes in several passes
    for seed in range(2):
        keeping, fresh = (engine((method, COUPLED), talker, None, Sampling(seed % 2)) for _ in range(2))
        keeping.keep_cache = True
        assert [*conversation(random.Random(seed), keeping)] == [*conversation(random.Random(seed), fresh)]


def real_rows(monkeypatch) -> list[int]:
    """Grows with each pass by the number of its rows."""
    rows, hidden = [], GPT.hidden

    def counted(model, ids, *arguments, **more):
        rows.append(ids.shape[1])
        return hidden(model, ids, *arguments, **more)

    monkeypatch.setattr(GPT, "hidden", counted)
    return rows


def n_shared(text: list[int], prompt: list[int]) -> int:
    """Tokens with which both begin, without either's last one, which is in no cache."""
    same = [a == b for a, b in zip(text[:-1], prompt[:-1], strict=False)]
    return same.index(False) if False in same else len(same)


@pytest.mark.parametrize("method", ["plain", "fused"])
def test_only_rows_that_are_new_are_computed(method, talker, monkeypatch):
    rows = real_rows(monkeypatch)
    keeping, fresh = (engine((method, COUPLED), talker, None) for _ in range(2))
    keeping.keep_cache = True
    text, turns = [], [(0, 9), (9, 2), (8, 3), (12, 1), (12, 1), (14, 0), (5, 5), (0, 6), (9, 11), (3, 0)]
    for n_same, n_other in turns:  # tokens of the text before, and others
        prompt, counts = [*text[:n_same], *range(n_other)], []
        for drawing in (fresh, keeping):
            rows.clear()
            new = drawing.generate(prompt, 3).tokens[0]
            counts.append(sum(rows))
        assert counts[0] - counts[1] == n_shared(text, prompt)
        text = prompt + new


def test_after_numbers_that_are_not_finite_nothing_is_kept(talker):
    model = copy.deepcopy(talker)
    keeping, weight = Engine(model, Fused(2), keep_cache=True), model.h[0].mlp.c_proj.weight.data
    right = weight.clone()
    keeping.generate([1, 2, 3], 1)
    weight.fill_(torch.inf)
    with pytest.raises(InputError, match="not finite"):
        keeping.generate([1, 2, 3, 4], 9)
    weight.copy_(right)
    text = [1, 2, 3, 4, 5, 6]
    assert keeping.generate(text, 4).tokens == [plain_text(model, text, 4)]


def test_one_kept_token_too_many_is_caught(talker, patch):
    def begin(original, decoder, contexts, starts, seeds, n_cached):
        return original(decoder, contexts, starts, seeds, n_cached + (0 < n_cached < len(contexts[0]) - 1))

    keeping, fresh = Engine(talker, Fused(2), keep_cache=True), Engine(talker, Fused(2))
    expected = list(conversation(random.Random(0), fresh))
    patch(Decoder, "begin", begin)
    assert list(conversation(random.Random(0), keeping)) != expected


def assert_nothing_wrong_is_kept(keeping: Engine, prompts: list[list[int]]) -> None:
    for prompt in prompts:
        assert keeping.generate(prompt, 6).tokens == Engine(keeping.models[0], Plain()).generate(prompt, 6).tokens


def test_the_last_text_of_a_batch_is_not_taken_for_the_first(talker):
    keeping, prompts = Engine(talker, Fused(2), keep_cache=True), [[6, 1], [1, 2, 3, 4, 5, 6, 7, 8]]
    texts = keeping.generate(prompts, 30, stop_token=5).tokens
    assert len(texts[0]) < 14 and len(texts[1]) == 30, "the second's window moves, and it is alone by then"
    assert_nothing_wrong_is_kept(keeping, [prompts[0] + texts[0]])


def test_texts_in_turns_do_not_share_a_cache(talker):
    keeping, prompts = Engine(talker, Fused(2), keep_cache=True), [[1, 2, 3, 4], [1, 2, 5, 6, 7]]
    keeping.generate([1, 2, 3], 20)
    streams, texts = [keeping.stream(prompt, 12) for prompt in prompts], [[], []]
    while any(streams):
        for b, stream in enumerate(streams):
            turn = next(stream, None) if stream else None
            texts[b] += turn.tokens[0] if turn else []
            streams[b] = stream if turn else None
    assert texts == [plain_text(talker, prompt, 12) for prompt in prompts]


def test_what_an_interrupted_prefill_has_overwritten_is_not_kept(talker, monkeypatch):
    keeping, begin, prompt = Engine(talker, Fused(2), keep_cache=True), Decoder.begin, [1, 2, 3, 4, 5, 6]

    def interrupted(*arguments):
        begin(*arguments)
        raise KeyboardInterrupt

    keeping.generate(prompt, 6)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Decoder, "begin", interrupted)
        keeping.generate([1, 2, 9, 9, 9, 9], 6)
    assert_nothing_wrong_is_kept(keeping, [[*prompt, 7]])


def test_a_stream_that_is_left_keeps_what_it_has(talker, monkeypatch):
    keeping, prompt = Engine(talker, Fused(2), keep_cache=True), [1, 2, 3, 4, 5, 6]
    stream = keeping.stream(prompt, 12)
    text = prompt + [token for _ in range(3) for token in next(stream).tokens[0]]
    stream.close()
    rows = real_rows(monkeypatch)
    assert keeping.generate([*text, 1], 1).tokens == Engine(talker, Plain()).generate([*text, 1], 1).tokens
    assert rows[0] == 1, "the last token of the text, which was the root"


def test_two_models_have_no_cache_to_keep(lively):
    with pytest.raises(InputError, match="keep_cache is for methods with one model"):
        Engine(lively[0], TwoModels(lively[1]), keep_cache=True)
