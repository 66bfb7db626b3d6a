"""train_tiny.py on a tiny model: what each stage moves, and that an interrupted run ends as an unbroken one."""

import json
import random
import sys
from pathlib import Path

import pytest
import torch

from minipass import checkpoint, losses
from minipass.errors import InputError

sys.path.insert(0, str(Path(__file__).parents[1]))
import train_tiny  # noqa: E402

SIZES = "--vocab-size 300 --block-size 32 --n-layer 1 --n-head 2 --n-embd 16 --n-lookahead 3".split()
SMALL = "--batch-size 2 --groups 2 --device cpu --dtype float32".split()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """A file of small sentences, repetitive enough to be learned in a few steps."""
    rng = random.Random(0)
    lines = [f"the {rng.choice(['cat', 'dog', 'fox'])} sat on the {rng.choice(['mat', 'hat'])}.\n" for _ in range(900)]
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    path.write_text("".join(lines))
    return path


@pytest.fixture
def train(corpus, monkeypatch):
    """train(out, "--steps", "3", ...): runs train_tiny.py's main on the corpus; returns what is in model.pt."""

    def run(out: Path, *arguments: str) -> checkpoint.Checkpoint:
        monkeypatch.setattr(
            sys, "argv", ["train_tiny.py", "--data", str(corpus), "--out", str(out), *SMALL, *arguments]
        )
        train_tiny.main()
        return checkpoint.load(out / "model.pt")

    return run


@pytest.fixture(scope="module")
def base(corpus, tmp_path_factory) -> Path:
    """A base model of 4 steps."""
    out, patch = tmp_path_factory.mktemp("base"), pytest.MonkeyPatch()
    patch.setattr(sys, "argv", ["train_tiny.py", "--stage", "base", "--data", str(corpus), "--out", str(out), "--steps",
                                "4", *SMALL, *SIZES])  # fmt: skip
    train_tiny.main()
    patch.undo()
    return out / "model.pt"


def moved(before: Path, after: checkpoint.Checkpoint) -> set[str]:
    """Names of the parameters that differ."""
    old, new = checkpoint.load(before).model.state_dict(), after.model.state_dict()
    return {name for name in old if not torch.equal(old[name], new[name])}


@pytest.mark.parametrize("loss", ["ce", "kl", "tv", "kl-tv"])
def test_the_lookahead_stage_moves_the_table_and_nothing_else(train, base, tmp_path, loss):
    after = train(tmp_path, "--stage", "lookahead", "--init", str(base), "--steps", "4", "--loss", loss)
    assert moved(base, after) == {"lookahead"}


def test_the_base_stage_leaves_the_table_alone(train, base, tmp_path):
    names = moved(base, train(tmp_path, "--stage", "base", "--init", str(base), "--steps", "3"))
    assert "lookahead" not in names
    assert "h.0.attn.c_attn.weight" in names


def test_the_joint_stage_moves_everything(train, base, tmp_path):
    names = moved(base, train(tmp_path, "--stage", "joint", "--init", str(base), "--steps", "20"))
    assert {"lookahead", "wte.weight", "wpe.weight", "h.0.mlp.c_fc.weight", "ln_f.weight"} <= names


def test_a_resumed_run_ends_with_the_numbers_of_an_unbroken_one(train, tmp_path, monkeypatch):
    arguments = ["--steps", "6", "--save-every", "2", "--eval-every", "3", *SIZES]
    unbroken = train(tmp_path / "unbroken", *arguments)

    calls, real = [], losses.lookahead_loss

    def fail_in_the_fifth_step(*args):
        calls.append(1)
        if len(calls) == 5:
            raise RuntimeError("power cut")
        return real(*args)

    monkeypatch.setattr(losses, "lookahead_loss", fail_in_the_fifth_step)
    with pytest.raises(RuntimeError, match="power cut"):
        train(tmp_path / "broken", *arguments)
    monkeypatch.setattr(losses, "lookahead_loss", real)
    resumed = train(tmp_path / "broken", *arguments, "--resume")
    for name, value in unbroken.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name])
    assert (tmp_path / "broken/log.jsonl").read_text() == (tmp_path / "unbroken/log.jsonl").read_text()


def test_the_same_seed_gives_the_same_model_and_another_seed_another(train, tmp_path):
    arguments = ["--steps", "2", *SIZES]
    first, second = train(tmp_path / "a", *arguments), train(tmp_path / "b", *arguments)
    other = train(tmp_path / "c", *arguments, "--seed", "1")
    assert torch.equal(first.model.wte.weight, second.model.wte.weight)
    assert not torch.equal(first.model.wte.weight, other.model.wte.weight)


def test_training_learns_and_leaves_its_log_curve_and_record(train, tmp_path):
    loaded = train(tmp_path, "--steps", "60", "--eval-every", "30", *SIZES)
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log] == list(range(1, 61))
    assert log[-1]["heldout_loss"] < 0.8 * log[0]["loss"]
    assert len(log[-1]["acceptance"]) == 3
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    record = loaded.record
    assert (record["stage"], record["steps"], record["seed"], record["parents"]) == ("joint", 60, 0, [])
    assert record["heldout_loss"] == log[-1]["heldout_loss"]


def test_a_model_remembers_what_it_was_made_from(train, base, tmp_path):
    loaded = train(tmp_path, "--stage", "lookahead", "--init", str(base), "--steps", "1")
    assert [parent["stage"] for parent in loaded.record["parents"]] == ["base"]


def test_a_new_table_of_another_length_fits_a_finished_base(train, base, tmp_path):
    loaded = train(tmp_path, "--stage", "lookahead", "--init", str(base), "--steps", "1", "--n-lookahead", "5")
    assert loaded.model.lookahead.shape == (5, 16)


def test_a_run_is_not_overwritten_and_resumes_only_with_its_own_settings(train, tmp_path):
    train(tmp_path, "--steps", "1", *SIZES)
    with pytest.raises(InputError, match="already holds a run"):
        train(tmp_path, "--steps", "1", *SIZES)
    with pytest.raises(InputError, match="has seed 0, not 1"):
        train(tmp_path, "--steps", "1", *SIZES, "--resume", "--seed", "1")
