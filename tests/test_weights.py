"""Files: what is saved comes back, a failed save harms nothing, and no bad file is loaded or run."""

import pickle

import pytest
import torch

from minipass import weights
from minipass.errors import InputError
from minipass.model import GPT, GPTConfig
from minipass.tokenizer import build_encoding, train_bpe


@pytest.fixture(scope="module")
def encoding():
    return build_encoding(train_bpe(["to be or not to be, that is the question of the day"] * 3, 270))


@pytest.fixture
def small(encoding) -> GPT:
    return GPT(GPTConfig(encoding.n_vocab, 16, 1, 2, 8, 3))


@pytest.fixture
def saved(tmp_path, small, encoding):
    path = tmp_path / "model.pt"
    weights.save(path, small, encoding, {"stage": "joint", "steps": 7})
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_model_tokenizer_and_record_come_back(tmp_path, small, encoding, dtype):
    weights.save(tmp_path / "new" / "m.pt", small, encoding, {"steps": 7}, dtype=dtype)
    loaded = weights.load(tmp_path / "new" / "m.pt")
    assert loaded.model.config == small.config
    for name, value in small.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], value.to(dtype).float())
    assert loaded.record == {"steps": 7}
    assert loaded.training is None
    text = "the question\n<|endoftext|> \N{SNOWMAN}"
    assert loaded.encoding.encode_ordinary(text) == encoding.encode_ordinary(text)


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), RuntimeError("write failed")])
def test_a_full_disk_leaves_the_old_file_and_no_other(saved, small, encoding, monkeypatch, failure):
    def half_a_save(content, path):
        path.write_bytes(b"half")
        raise failure

    before = saved.read_bytes()
    monkeypatch.setattr(torch, "save", half_a_save)
    with pytest.raises(InputError, match="cannot write"):
        weights.save(saved, small, encoding, {})
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


def test_an_interrupt_in_the_middle_of_a_save_leaves_the_old_file_and_no_other(saved, small, encoding, monkeypatch):
    def interrupted_save(content, path):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    before = saved.read_bytes()
    monkeypatch.setattr(torch, "save", interrupted_save)
    with pytest.raises(KeyboardInterrupt):
        weights.save(saved, small, encoding, {})
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match="there is no checkpoint"):
        weights.load(tmp_path / "none.pt")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.7, 0.99])
def test_a_truncated_file_is_refused(saved, share):
    data = saved.read_bytes()
    saved.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(InputError):
        weights.load(saved)


@pytest.mark.parametrize(
    "data", [b"\0" * 1000, b"just a line of text\n" * 9, bytes(range(256)) * 40, b"PK\x03\x04junk"]
)
def test_a_file_of_another_kind_is_refused(tmp_path, data):
    path = tmp_path / "other.pt"
    path.write_bytes(data)
    with pytest.raises(InputError):
        weights.load(path)


class RunsCode:
    """Pickled, this asks the reader to create a file."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return open, (self.marker, "w")


@pytest.mark.parametrize("write", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))])
def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(tmp_path, write):
    marker, path = tmp_path / "it ran", tmp_path / "evil.pt"
    write({"format": weights.FORMAT, "version": weights.VERSION, "config": RunsCode(marker)}, path)
    with pytest.raises(InputError):
        weights.load(path)
    assert not marker.exists()


def change_nothing_else(path, **changes):
    content = torch.load(path, weights_only=True)
    torch.save(content | changes, path)


@pytest.mark.parametrize(
    "changes",
    [
        {"format": "something else"},
        {"version": 99},
        {"config": {"n_layer": 2}},
        {"config": {"no_such_size": 2}},
        {"config": None},
        {"weights": {}},
        {"tokenizer": {"name": "minipass"}},
        {"tokenizer": {"name": "minipass", "tokens": [bytes([byte]) for byte in range(256)]}},
        {"tokenizer": {"name": "minipass", "tokens": [b"a", b"a"]}},
        {"tokenizer": {"name": "minipass", "tokens": "abc"}},
        {"tokenizer": None},
        {"weights": None},
        {"weights": {1: torch.zeros(2)}},
        {"record": "trained with care"},
        {"training": [1, 2, 3]},
    ],
)
def test_a_file_that_does_not_fit_together_is_refused(saved, changes):
    change_nothing_else(saved, **changes)
    with pytest.raises(InputError):
        weights.load(saved)


@pytest.mark.parametrize("key", ["format", "version", "config", "weights", "tokenizer"])
def test_a_file_with_a_part_left_out_is_refused(saved, key):
    content = torch.load(saved, weights_only=True)
    del content[key]
    torch.save(content, saved)
    with pytest.raises(InputError):
        weights.load(saved)


def test_weights_of_another_size_are_refused_in_a_message_that_names_them(saved):
    content = torch.load(saved, weights_only=True)
    content["weights"]["wpe.weight"] = torch.zeros(5, 8)
    torch.save(content, saved)
    with pytest.raises(InputError, match="wpe.weight"):
        weights.load(saved)


@pytest.mark.parametrize("name", ["x" * 300, "x" * 300 + ".pt", ".", ""])
def test_a_name_that_cannot_be_a_file_is_refused(name):
    with pytest.raises(InputError, match="there is no checkpoint"):
        weights.load(name)


@pytest.mark.parametrize("place", ["model.pt/below/a/file.pt", "x" * 300])
def test_a_place_that_cannot_be_written_is_an_input_error(saved, small, encoding, place):
    with pytest.raises(InputError, match="cannot write"):
        weights.save(saved.parent / place, small, encoding, {})
    assert list(saved.parent.iterdir()) == [saved]


def test_the_state_for_going_on_comes_back(tmp_path, small, encoding):
    optimizer = torch.optim.AdamW(small.parameters())
    small(torch.tensor([[1, 2, 3]])).sum().backward()
    optimizer.step()
    training = {"step": 3, "optimizers": [optimizer.state_dict()]}
    weights.save(tmp_path / "last.pt", small, encoding, {}, training=training)
    loaded = weights.load(tmp_path / "last.pt").training
    assert loaded["step"] == 3
    moment = optimizer.state_dict()["state"][1]["exp_avg"]
    assert torch.equal(loaded["optimizers"][0]["state"][1]["exp_avg"], moment)


def test_a_torch_file_of_something_else_is_refused(tmp_path):
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    with pytest.raises(InputError, match="not a minipass checkpoint"):
        weights.load(tmp_path / "tensor.pt")


@pytest.mark.parametrize("name", sorted(path.stem for path in weights.SHIPPED.glob("*.pt")))
def test_a_shipped_checkpoint_loads_by_its_name(name):
    loaded = weights.load(name)
    assert loaded.record["stage"] == {"joint": "joint", "frozen": "lookahead", "draft": "base"}[name]
    assert (loaded.model.config.n_lookahead > 0) == (name != "draft")


def test_without_its_draft_head_a_model_has_no_accuracy_of_drafts():
    """It was measured with the head: trees and auto made from it would be those of another model."""
    assert weights.load("joint").record["rank_accuracy"]
    alone = weights.load("joint", adapters="none")
    assert alone.model.draft_head is None
    assert alone.record["rank_accuracy"] == []
