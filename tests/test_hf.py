"""GPT-2 in and out, against Transformers on small random models, and what a bad folder or table is told."""

import importlib
import json
import signal
import sys
from pathlib import Path

import pytest
import torch
from conftest import power_cut, random_model

from minipass import generate, pretrained, weights
from minipass.errors import InputError
from minipass.extras import export
from minipass.model import GPT
from minipass.tokenizer import encoding_of

sys.path.insert(0, str(Path(__file__).parents[1]))
import sample  # noqa: E402
import train_tiny  # noqa: E402

safetensors = pytest.importorskip("safetensors.torch")

SIZES = {"vocab_size": 61, "n_positions": 48, "n_layer": 3, "n_head": 2, "n_embd": 24}


@pytest.fixture(scope="session")
def transformers():
    return pytest.importorskip("transformers")


@pytest.fixture(scope="session")
def theirs(transformers):
    """A random GPT-2 of Transformers, with weights large enough for its text to go on changing."""
    torch.manual_seed(3)
    config = transformers.GPT2Config(**SIZES, initializer_range=0.3, bos_token_id=60, eos_token_id=60)
    return transformers.GPT2LMHeadModel(config).eval()


@pytest.fixture
def ours() -> GPT:
    return random_model(seed=4, n_lookahead=3).float()


@pytest.fixture
def folder(ours, tmp_path) -> Path:
    """What save_pretrained writes of `ours`."""
    weights.save_pretrained(ours, tmp_path / "gpt2")
    return tmp_path / "gpt2"


@torch.no_grad()
def assert_same_model(ours: GPT, theirs) -> None:
    ids = torch.randint(ours.config.vocab_size, (3, ours.config.block_size), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=0, atol=1e-5)
    prompt, n_new = ids[0, :5], ours.config.block_size - 5
    text = theirs.generate(prompt[None], attention_mask=torch.ones(1, 5), do_sample=False, max_new_tokens=n_new,
                           eos_token_id=None, pad_token_id=0)  # fmt: skip
    assert len(text[0, 5:].unique()) > 5, "a text that says one thing for ever shows little"
    for method in ("plain", "pass"):
        result = generate(ours, prompt.tolist(), n_new, method=method, temperature=0.0)
        assert result.tokens[0] == text[0, 5:].tolist()


@pytest.mark.parametrize("shard_size", ["1GB", "20kB"])
def test_a_folder_of_transformers_computes_the_same_here(theirs, tmp_path, shard_size):
    theirs.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (tmp_path / pretrained.INDEX).exists() == (shard_size == "20kB")
    assert_same_model(pretrained.from_pretrained(tmp_path, n_lookahead=2), theirs)


def test_names_without_the_prefix_and_old_mask_buffers_are_taken_as_well(theirs, tmp_path):
    theirs.save_pretrained(tmp_path)
    tensors = safetensors.load_file(tmp_path / pretrained.WEIGHTS)
    tensors = {name.removeprefix("transformer."): value for name, value in tensors.items()}
    tensors |= {"h.0.attn.bias": torch.ones(1, 1, 48, 48), "h.0.attn.masked_bias": torch.tensor(-1e4)}
    tensors["lm_head.weight"] = tensors["wte.weight"].clone()
    safetensors.save_file(tensors, tmp_path / pretrained.WEIGHTS)
    assert_same_model(pretrained.from_pretrained(str(tmp_path), n_lookahead=2), theirs)


def test_a_folder_of_ours_computes_the_same_in_transformers_and_again_here(transformers, theirs, tmp_path):
    theirs.save_pretrained(tmp_path / "in")
    model = pretrained.from_pretrained(tmp_path / "in", n_lookahead=3)
    weights.save_pretrained(model, tmp_path / "out")
    back, report = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values()), report
    assert_same_model(model, back.eval())
    again = pretrained.from_pretrained(tmp_path / "out")
    weights.load_adapters(again, tmp_path / "out" / weights.TABLE)
    assert again.config == model.config
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


def test_a_table_fits_another_copy_of_the_base_and_is_all_that_changes(ours, folder, tmp_path):
    copy, other = pretrained.from_pretrained(folder), pretrained.from_pretrained(folder, n_lookahead=7)
    assert copy.config.n_lookahead == 0
    weights.save_adapters(other, tmp_path / "table.safetensors")
    assert (tmp_path / "table.safetensors").stat().st_size < 1000
    weights.load_adapters(copy, tmp_path / "table.safetensors")
    assert copy.config.n_lookahead == 7
    assert torch.equal(copy.lookahead, other.lookahead)
    assert all(torch.equal(v, ours.state_dict()[name]) for name, v in copy.state_dict().items() if name != "lookahead")
    prompt, settings = [1, 2, 3], {"temperature": 0.0}
    plain = generate(copy, prompt, 20, method="plain", **settings)
    assert generate(copy, prompt, 20, method="pass", lookahead=7, **settings).tokens == plain.tokens
    with pytest.raises(InputError, match=r"needs 8 look-ahead tokens, .* has 7"):
        generate(copy, prompt, 20, method="pass", lookahead=8, **settings)


def test_a_new_table_is_near_the_mean_embedding_and_as_long_as_asked(folder):
    torch.manual_seed(0)
    model = pretrained.from_pretrained(folder, n_lookahead=500)
    table = model.lookahead
    assert table.shape == (500, 16) and table.requires_grad
    assert abs((table - model.wte.weight.mean(0)).std().item() - 0.02) < 1e-3
    with pytest.raises(InputError, match="n_lookahead must be"):
        pretrained.from_pretrained(folder, n_lookahead=-1)


def test_a_folder_without_a_table_replaces_one_with_a_table(ours, folder):
    ours.new_lookahead(0)
    weights.save_pretrained(ours, folder)
    assert sorted(path.name for path in folder.iterdir()) == [pretrained.CONFIG, pretrained.WEIGHTS]


def change_config(folder: Path, **changes) -> None:
    config = json.loads((folder / pretrained.CONFIG).read_text()) | changes
    config = {name: value for name, value in config.items() if value != "left out"}
    (folder / pretrained.CONFIG).write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"model_type": "bert"}, "model_type 'bert'"),
        ({"model_type": "left out"}, "model_type None"),
        ({"activation_function": "relu"}, "activation_function 'relu'"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings False"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx True"),
        ({"scale_attn_weights": False}, "scale_attn_weights False"),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon 1e-06"),
        ({"add_cross_attention": True}, "add_cross_attention True"),
        ({"n_embd": "left out"}, "does not say n_embd"),
        ({"n_head": 3}, "multiple of n_head"),
        ({"n_layer": "two"}, "n_layer must be"),
        ({"n_positions": 0}, "block_size must be"),
        ({"n_layer": 1}, r"unexpectedly, 12 weights, such as transformer\.h\.1\."),
        ({"n_layer": 3}, r"lacks 12 weights, such as transformer\.h\.2\."),
        ({"vocab_size": 12}, r"size mismatch for wte\.weight"),
    ],
    ids=str,
)
def test_a_config_of_something_else_is_refused_by_name(folder, change, complaint):
    change_config(folder, **change)
    with pytest.raises(InputError, match=complaint):
        pretrained.from_pretrained(folder)


@pytest.mark.parametrize("content", ["", "{", "[]", "\0"])
def test_a_damaged_config_is_refused(folder, content):
    (folder / pretrained.CONFIG).write_text(content)
    with pytest.raises(InputError, match=r"config\.json is damaged"):
        pretrained.from_pretrained(folder)


@pytest.mark.parametrize("name", [pretrained.CONFIG, pretrained.WEIGHTS])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(InputError, match=f"{name} is missing"):
        pretrained.from_pretrained(folder)


@pytest.mark.parametrize("share", [0, 0.0001, 0.5, 0.99])
@pytest.mark.parametrize("name", [pretrained.WEIGHTS, weights.TABLE])
def test_half_a_download_is_refused(folder, name, share, monkeypatch):
    monkeypatch.setattr(pretrained, "gpt2_encoding", lambda: encoding_of([bytes([b]) for b in range(10)], "gpt2"))
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: int(share * len(data))])
    with pytest.raises(InputError, match=f"{name} is damaged or only half there"):
        weights.load(folder)


def shard(folder: Path) -> list[Path]:
    """Splits model.safetensors into two files and an index."""
    tensors, weight_map = safetensors.load_file(folder / pretrained.WEIGHTS), {}
    for index, name in enumerate(tensors):
        weight_map[name] = f"model-0000{index % 2 + 1}-of-00002.safetensors"
    files = [folder / name for name in sorted(set(weight_map.values()))]
    for file in files:
        part = {name: value for name, value in tensors.items() if weight_map[name] == file.name}
        safetensors.save_file(part, file)
    (folder / pretrained.INDEX).write_text(json.dumps({"weight_map": weight_map}))
    (folder / pretrained.WEIGHTS).unlink()
    return files


def test_shards_are_put_together_and_a_missing_or_half_one_is_named(ours, folder):
    files = shard(folder)
    assert torch.equal(pretrained.from_pretrained(folder).h[1].mlp.c_fc.weight, ours.h[1].mlp.c_fc.weight)
    data = files[1].read_bytes()
    files[1].write_bytes(data[:-1])
    with pytest.raises(InputError, match=f"{files[1].name} is damaged"):
        pretrained.from_pretrained(folder)
    files[1].unlink()
    with pytest.raises(InputError, match=f"{files[1].name} is missing"):
        pretrained.from_pretrained(folder)
    (folder / pretrained.INDEX).write_text('{"weight_map": [1]}')
    with pytest.raises(InputError, match="weight_map"):
        pretrained.from_pretrained(folder)


def left_out(tensors: dict) -> None:
    del tensors["transformer.h.1.ln_2.bias"]


def one_too_many(tensors: dict) -> None:
    tensors["transformer.h.1.attn.q_norm.weight"] = torch.zeros(8)


def of_another_shape(tensors: dict) -> None:
    tensors["transformer.h.1.mlp.c_fc.weight"] = torch.zeros(2, 3, 4)


def a_head_of_its_own(tensors: dict) -> None:
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"] + 1


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (left_out, r"lacks 1 weights, such as transformer\.h\.1\.ln_2\.bias"),
        (one_too_many, "unexpectedly, 1 weights"),
        (of_another_shape, "does not hold what its config says"),
        (a_head_of_its_own, "an output head of its own"),
    ],
)
def test_weights_that_do_not_fit_are_refused(folder, damage, complaint):
    tensors = safetensors.load_file(folder / pretrained.WEIGHTS)
    damage(tensors)
    safetensors.save_file(tensors, folder / pretrained.WEIGHTS)
    with pytest.raises(InputError, match=complaint):
        pretrained.from_pretrained(folder)


def test_a_table_of_another_width_or_kind_is_refused_and_changes_nothing(ours, folder, tmp_path):
    before = ours.lookahead.clone()
    weights.save_adapters(random_model(seed=0, n_embd=32), tmp_path / "wide.safetensors")
    with pytest.raises(InputError, match="trained for another model"):
        weights.load_adapters(ours, tmp_path / "wide.safetensors")
    safetensors.save_file({"lookahead": torch.zeros(4, 32)}, tmp_path / "unnamed.safetensors")  # an older file
    with pytest.raises(InputError, match=r"\(4, 32\) does not fit a model with n_embd 16"):
        weights.load_adapters(ours, tmp_path / "unnamed.safetensors")
    with pytest.raises(InputError, match="holds no adapters"):
        weights.load_adapters(ours, folder / pretrained.WEIGHTS)
    with pytest.raises(InputError, match="is missing"):
        weights.load_adapters(ours, tmp_path / "none.safetensors")
    assert torch.equal(ours.lookahead, before)


def test_without_network_and_cached_file_the_cache_folder_is_named(monkeypatch, tmp_path):
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=f"cache folder {tmp_path}"):
        pretrained.from_pretrained("gpt2")
    with pytest.raises(InputError, match="there is no folder gpt3"):
        pretrained.from_pretrained("gpt3")


def test_without_the_extra_the_sentence_says_what_to_install(monkeypatch, folder):
    def absent(name):
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(InputError, match=r"needs the package safetensors: pip install -e '\.\[hf\]'"):
        pretrained.from_pretrained(folder)


# The scripts, on a GPT-2 over bytes.


@pytest.fixture
def gpt2_over_bytes(monkeypatch, tmp_path) -> Path:
    """A folder with a random GPT-2 whose tokens are bytes; gpt2's own vocabulary would take a download."""
    for module in (pretrained, weights):
        monkeypatch.setattr(module, "gpt2_encoding", lambda: encoding_of([bytes([b]) for b in range(256)], "gpt2"))
    model = random_model(seed=5, vocab_size=257, block_size=32, n_layer=1, n_lookahead=0, std=0.1)
    weights.save_pretrained(model.float(), tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def call(monkeypatch, tmp_path):
    """call(script, "--flag", ...): runs its main."""
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # Ctrl-C stays pytest's
    (tmp_path / "text.txt").write_text("one line after the other, each of them a little longer.\n" * 40)

    def run(script, *arguments) -> None:
        monkeypatch.setattr(sys, "argv", ["script", *map(str, arguments)])
        script.main()

    return run


def training(folder: Path, *arguments) -> tuple:
    settings = "--steps 6 --batch-size 2 --groups 2 --save-every 2 --device cpu --dtype float32".split()
    return ("--data", folder.parent / "text.txt", "--init", folder, *settings, *arguments)


@pytest.mark.parametrize("head", ["none", "mlp"])
def test_the_lookahead_stage_stores_what_it_trains_alone_and_continues_from_it(
    head, gpt2_over_bytes, call, monkeypatch, tmp_path
):
    arguments = training(gpt2_over_bytes, "--stage", "lookahead", "--n-lookahead", "5", "--head", head)
    call(train_tiny, *arguments, "--out", tmp_path / "unbroken")
    files = {path.name: path.stat().st_size for path in (tmp_path / "unbroken").iterdir()}
    assert set(files) == {
        "heldout-0.tokens",
        "last.pt",
        "log.jsonl",
        "loss.png",
        "adapters.safetensors",
        "train-0.tokens",
    }
    assert files["adapters.safetensors"] < (2000 if head == "none" else 10000)
    last = torch.load(tmp_path / "unbroken/last.pt", weights_only=True)
    trained = {"lookahead"} if head == "none" else {"lookahead", "draft_head"}
    assert {name.partition(".")[0] for name in last["weights"]} == trained

    with power_cut(monkeypatch, in_step=5):
        call(train_tiny, *arguments, "--out", tmp_path / "broken")
    call(train_tiny, *arguments, "--out", tmp_path / "broken", "--resume")
    broken, unbroken = (
        safetensors.load_file(tmp_path / out / "adapters.safetensors") for out in ("broken", "unbroken")
    )
    assert broken.keys() == unbroken.keys()
    assert all(torch.equal(value, unbroken[name]) for name, value in broken.items())
    assert (tmp_path / "broken/log.jsonl").read_bytes() == (tmp_path / "unbroken/log.jsonl").read_bytes()

    resumed = weights.load(tmp_path / "broken/last.pt").model
    assert torch.equal(resumed.lookahead.bfloat16(), broken["lookahead"])
    assert torch.equal(resumed.wte.weight, pretrained.from_pretrained(gpt2_over_bytes).wte.weight)
    weights.save_pretrained(random_model(seed=5, vocab_size=257, block_size=16, n_layer=1), gpt2_over_bytes)
    with pytest.raises(InputError, match="is another model now"):
        weights.load(tmp_path / "broken/last.pt")


def test_the_joint_stage_trains_a_gpt2_with_a_new_table_and_stores_both(gpt2_over_bytes, call, tmp_path):
    call(train_tiny, *training(gpt2_over_bytes, "--stage", "joint", "--out", tmp_path / "run"))
    trained = weights.load(tmp_path / "run/model.pt")
    assert trained.model.config.n_lookahead == 8
    assert trained.encoding.name == "gpt2"
    untrained = pretrained.from_pretrained(gpt2_over_bytes).bfloat16().float()
    assert not torch.equal(trained.model.wte.weight, untrained.wte.weight)
    call(export, tmp_path / "run/model.pt", tmp_path / "out")
    exported = weights.load(tmp_path / "out").model
    tensors = trained.model.state_dict()
    assert all(torch.equal(value, tensors[name]) for name, value in exported.state_dict().items())


def test_sampling_with_a_table_gives_the_text_without_it(gpt2_over_bytes, call, capsys, tmp_path):
    base = pretrained.from_pretrained(gpt2_over_bytes, n_lookahead=3)
    weights.save_adapters(base, tmp_path / "table.safetensors")
    settings = ["--prompt", "Hi", "--temperature", "0", "--dtype", "float32", "--device", "cpu", "--json"]
    settings += ["--checkpoint", gpt2_over_bytes, "--adapters", tmp_path / "table.safetensors"]
    texts = []
    for extra in ([], ["--pass"], ["--pass", "two-pass", "--lookahead", "3"]):
        call(sample, *settings, *extra)
        texts.append(json.loads(capsys.readouterr().out)["tokens"])
    assert texts[0] == texts[1] == texts[2]
    with pytest.raises(InputError, match=r"1\.\.3 .* not 4"):
        call(sample, *settings, "--pass", "--lookahead", "4")
    with pytest.raises(InputError, match="has no look-ahead tokens: name a file of them with --adapters"):
        call(sample, *settings[:-2], "--pass")
    weights.save_adapters(random_model(seed=0, n_embd=32), tmp_path / "table.safetensors")
    with pytest.raises(InputError, match="trained for another model"):
        call(sample, *settings, "--pass")


def test_a_folder_whose_tokens_are_not_gpt2s_is_refused_where_text_is_needed(gpt2_over_bytes, folder):
    with pytest.raises(InputError, match="a vocabulary of 257 tokens, but a model of 11"):
        weights.load(folder)
