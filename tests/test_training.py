"""train_tiny.py on a tiny model: what each stage moves, and that an interrupted run ends as an unbroken one."""

import json
import platform
import random
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from minipass import losses, weights
from minipass.errors import InputError
from minipass.model import GPTConfig

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import train_tiny  # noqa: E402

draw_curves = train_tiny.draw_curves
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


@pytest.fixture(scope="session")
def run_training(corpus):
    """run_training(out, "--steps", "3", ...): runs train_tiny.py's main on the corpus."""

    def run(out: Path, *arguments: str) -> None:
        handler = signal.getsignal(signal.SIGINT)  # the script takes Ctrl-C for itself; pytest gets it back
        argv = ["train_tiny.py", "--data", str(corpus), "--out", str(out), *SMALL, *arguments]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", argv)
            try:
                train_tiny.main()
            finally:
                signal.signal(signal.SIGINT, handler)

    return run


@pytest.fixture(scope="session")
def train(run_training):
    """train(out, "--steps", "3", ...): a run that comes to its end; returns what is in its model.pt."""

    def run(out: Path, *arguments: str) -> weights.Checkpoint:
        run_training(out, *arguments)
        return weights.load(out / "model.pt")

    return run


@pytest.fixture(scope="module")
def base(run_training, tmp_path_factory) -> Path:
    """A base model of 4 steps."""
    out = tmp_path_factory.mktemp("base")
    run_training(out, "--stage", "base", "--steps", "4", *SIZES)
    return out / "model.pt"


def moved(before: Path, after: weights.Checkpoint) -> set[str]:
    """Names of the parameters that differ."""
    old, new = weights.load(before).model.state_dict(), after.model.state_dict()
    return {name for name in old if not torch.equal(old[name], new[name])}


@pytest.mark.parametrize("loss", ["ce", "kl", "tv", "kl-tv"])
def test_the_lookahead_stage_moves_the_table_and_nothing_else(train, base, tmp_path, loss):
    after = train(tmp_path, "--stage", "lookahead", "--init", str(base), "--steps", "4", "--loss", loss)
    assert moved(base, after) == {"lookahead"}


def test_the_lookahead_stage_trains_a_draft_head_unless_it_is_told_not_to(train, base, tmp_path):
    arguments = ["--stage", "lookahead", "--init", str(base), "--steps", "4"]
    model = train(tmp_path / "mlp", *arguments).model
    assert model.config.n_draft == 2 * model.config.n_embd
    assert model.draft_head.c_proj.weight.abs().sum() > 0, "zero when it is new"
    assert train(tmp_path / "none", *arguments, "--head", "none").model.draft_head is None
    again = ["--stage", "lookahead", "--init", str(tmp_path / "mlp/model.pt"), "--steps", "2"]
    assert "draft_head.c_proj.weight" in moved(tmp_path / "mlp/model.pt", train(tmp_path / "more", *again))
    assert train(tmp_path / "without", *again, "--head", "none").model.config.n_draft == 0


def test_the_joint_stage_has_a_draft_head_from_the_start_and_the_base_stage_has_none(train, tmp_path):
    joint = train(tmp_path / "joint", "--stage", "joint", "--steps", "2", *SIZES).model
    assert joint.draft_head is not None and joint.config.n_draft == 2 * joint.config.n_embd
    assert train(tmp_path / "base", "--stage", "base", "--steps", "2", *SIZES).model.draft_head is None


def test_the_base_stage_leaves_the_table_alone(train, base, tmp_path):
    names = moved(base, train(tmp_path, "--stage", "base", "--init", str(base), "--steps", "3"))
    assert "lookahead" not in names
    assert "h.0.attn.c_attn.weight" in names


def test_the_joint_stage_moves_everything(train, base, tmp_path):
    names = moved(base, train(tmp_path, "--stage", "joint", "--init", str(base), "--steps", "20"))
    assert {"lookahead", "wte.weight", "h.0.mlp.c_fc.weight", "ln_f.weight"} <= names


SIX_STEPS = ["--steps", "6", "--save-every", "2", "--eval-every", "3", *SIZES]


@pytest.fixture(scope="module")
def unbroken(run_training, tmp_path_factory) -> Path:
    """The folder of a run of six steps that nothing stopped."""
    out = tmp_path_factory.mktemp("unbroken")
    run_training(out, *SIX_STEPS)
    return out


@pytest.fixture
def in_the_fifth_step(monkeypatch):
    """in_the_fifth_step(action): the next run calls action() in the middle of its step 5."""

    def arrange(action) -> None:
        calls, real = [], losses.lookahead_loss

        def lookahead_loss(*args):
            calls.append(1)
            if len(calls) == 5:
                action()
            return real(*args)

        monkeypatch.setattr(losses, "lookahead_loss", lookahead_loss)

    return arrange


def assert_same_run(one: Path, other: Path) -> None:
    """Same weights to the last bit, and the same log."""
    assert moved(one / "model.pt", weights.load(other / "model.pt")) == set()
    assert moved(one / "last.pt", weights.load(other / "last.pt")) == set()  # float32
    assert (one / "log.jsonl").read_text() == (other / "log.jsonl").read_text()


def power_cut() -> None:
    raise RuntimeError("power cut")


def test_a_run_resumed_after_a_crash_ends_as_an_unbroken_one(train, unbroken, tmp_path, in_the_fifth_step):
    in_the_fifth_step(power_cut)
    with pytest.raises(RuntimeError, match="power cut"):
        train(tmp_path, *SIX_STEPS)
    assert weights.load(tmp_path / "last.pt").training["step"] == 4
    train(tmp_path, *SIX_STEPS, "--resume")
    assert_same_run(unbroken, tmp_path)


def test_a_run_resumed_after_ctrl_c_ends_as_an_unbroken_one(
    run_training, unbroken, tmp_path, in_the_fifth_step, capsys
):
    in_the_fifth_step(lambda: signal.raise_signal(signal.SIGINT))
    try:
        run_training(tmp_path, *SIX_STEPS)
    except KeyboardInterrupt:
        pytest.fail("the step in hand was not finished")
    out = capsys.readouterr().out
    assert "stopped after step 5" in out
    assert "--resume continues" in out
    assert not (tmp_path / "model.pt").exists()
    run_training(tmp_path, *SIX_STEPS, "--resume")
    assert_same_run(unbroken, tmp_path)


def test_a_second_ctrl_c_stops_at_once(run_training, tmp_path, in_the_fifth_step):
    in_the_fifth_step(lambda: [signal.raise_signal(signal.SIGINT) for _ in range(2)])
    with pytest.raises(KeyboardInterrupt):
        run_training(tmp_path, *SIX_STEPS)
    assert weights.load(tmp_path / "last.pt").training["step"] == 4


def test_resuming_a_finished_run_changes_nothing(run_training, unbroken, tmp_path):
    run_training(tmp_path, *SIX_STEPS)
    run_training(tmp_path, *SIX_STEPS, "--resume")
    assert_same_run(unbroken, tmp_path)


def test_the_same_seed_gives_the_same_model_and_another_seed_another(train, tmp_path):
    arguments = ["--steps", "2", *SIZES]
    first, second = train(tmp_path / "a", *arguments), train(tmp_path / "b", *arguments)
    other = train(tmp_path / "c", *arguments, "--seed", "1")
    assert torch.equal(first.model.wte.weight, second.model.wte.weight)
    assert not torch.equal(first.model.wte.weight, other.model.wte.weight)


def test_groups_take_turns_in_length_with_the_same_rows_and_follow_from_seed_and_step_alone():
    config = GPTConfig(vocab_size=50, block_size=64, n_lookahead=8)
    settings = {"batch_size": 3, "groups": 2, "seed": 5, "window": None}
    args, tokens = SimpleNamespace(stage="joint", **settings), [np.arange(1000) % 50]
    lengths = []
    for step in range(6):
        windows, cuts, n_lookahead = train_tiny.draw_batch(tokens, config, args, step)
        again = train_tiny.draw_batch(tokens, config, args, step)
        assert torch.equal(windows, again[0]) and (cuts == again[1]).all()
        assert windows.shape == (3, 65)
        assert cuts.shape[1] * n_lookahead == 2 * 8
        lengths.append(n_lookahead)
    assert lengths == [8, 4, 2, 8, 4, 2]
    assert train_tiny.draw_batch(tokens, config, SimpleNamespace(stage="base", **settings), 0)[1].shape == (3, 0)


def test_training_learns_and_leaves_its_log_curves_and_record(train, tmp_path, monkeypatch):
    monkeypatch.setattr(train_tiny, "draw_curves", draw_curves)
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
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    for changed in (["--seed", "1"], ["--n-embd", "32"], ["--lr", "0.1"], ["--stage", "base"], ["--steps", "2"]):
        with pytest.raises(InputError, match=f"has {changed[0][2:].replace('-', '_')} .*, not .*{changed[1]}"):
            train(tmp_path, "--steps", "1", *SIZES, "--resume", *changed)
    assert before == {file: file.read_bytes() for file in tmp_path.iterdir()}
    (tmp_path / "last.pt").unlink()  # what remains is still a model that somebody trained
    with pytest.raises(InputError, match="already holds a run"):
        train(tmp_path, "--steps", "1", *SIZES)


def test_a_base_needs_no_lookahead_tokens_and_other_stages_say_that_they_do(train, tmp_path):
    loaded = train(tmp_path / "base", "--stage", "base", "--steps", "1", *SIZES, "--n-lookahead", "0")
    assert loaded.model.lookahead.shape == (0, 16)
    assert loaded.record["acceptance"] == []
    with pytest.raises(InputError, match="needs look-ahead tokens"):
        train(tmp_path / "joint", "--stage", "joint", "--steps", "1", *SIZES, "--n-lookahead", "0")


def test_only_the_table_may_have_another_size_than_the_base(train, base, tmp_path):
    with pytest.raises(InputError, match="--init has n_embd 16, which cannot be changed to 32"):
        train(tmp_path, "--init", str(base), "--steps", "1", "--n-embd", "32")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_lookahead_stage_trains_in_half_precision(train, base, tmp_path, dtype):
    after = train(tmp_path, "--stage", "lookahead", "--init", str(base), "--steps", "2", "--dtype", dtype)
    assert after.model.lookahead.isfinite().all()


def test_half_precision_trains_as_well(train, tmp_path):
    for dtype in ("bfloat16", "float16"):
        loaded = train(tmp_path / dtype, "--steps", "2", *SIZES, "--dtype", dtype)
        assert all(value.isfinite().all() for value in loaded.model.state_dict().values())


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library than glibc")
def test_memory_that_a_step_has_freed_is_used_again_in_the_next():
    measure = """if True:
        import resource, sys, torch, train_tiny

        def page_faults():
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            torch.ones(2**24)  # 64 MiB, freed at once
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

        usual = sum(page_faults() for _ in range(30))
        train_tiny.keep_freed_memory()
        print(usual, sum(page_faults() for _ in range(30)))
    """
    done = subprocess.run([sys.executable, "-c", measure], cwd=ROOT, capture_output=True, text=True, check=True)
    usual, kept = map(int, done.stdout.split())
    assert kept < usual / 2  # small objects take bits of what was freed, so it takes a few rounds
