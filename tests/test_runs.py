"""What happens to long runs: signals, closed pipes, full disks, moved folders, numbers that explode."""

import json
import math
import os
import resource
import signal
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import random_model
from matplotlib.figure import Figure

from minipass import files, losses, weights
from minipass.errors import InputError
from minipass.extras.benchmark.reporting import Report
from minipass.files import atomic_write
from minipass.tokenizer import build_encoding

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import bench  # noqa: E402
import train_tiny  # noqa: E402

draw_curves = train_tiny.draw_curves
SIX_STEPS = "--vocab-size 270 --block-size 32 --n-layer 1 --n-head 2 --n-embd 16 --n-lookahead 3 --batch-size 2 "
SIX_STEPS += "--groups 2 --eval-windows 4 --save-every 2 --device cpu"
SIX_STEPS = [*SIX_STEPS.split(), "--steps", "6"]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    path.write_text("".join(f"{i} times {i % 7} is {i * (i % 7)}.\n" for i in range(900)))
    return path


@pytest.fixture(scope="session")
def train(corpus):
    """train(out, "--lr", "0.1", ...): runs train_tiny.py's main for six steps on the corpus."""

    def run(out: Path, *arguments, settings=SIX_STEPS) -> None:
        argv = ["train_tiny.py", "--data", corpus, "--out", out, "--dtype", "float32", *settings, *arguments]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", list(map(str, argv)))
            train_tiny.main()

    return run


@pytest.fixture(scope="module")
def unbroken(train, tmp_path_factory) -> Path:
    """The folder of a run that nothing stopped."""
    out = tmp_path_factory.mktemp("unbroken")
    train(out)
    return out


@pytest.fixture
def in_the_fifth_step(monkeypatch):
    """in_the_fifth_step(action): the next run calls action() in the middle of its step 5."""

    def arrange(action) -> None:
        calls, real = [], losses.training_pass

        def training_pass(*args, **settings):
            calls.append(torch.is_grad_enabled())
            if calls[-1] and sum(calls) == 5:
                action()
            return real(*args, **settings)

        monkeypatch.setattr(losses, "training_pass", training_pass)

    return arrange


def power_cut() -> None:
    raise RuntimeError("power cut")


def cut_off(train, in_the_fifth_step, out: Path, *arguments) -> None:
    """A run that a power cut ends in its step 5: its last.pt is of step 4."""
    in_the_fifth_step(power_cut)
    with pytest.raises(RuntimeError, match="power cut"):
        train(out, *arguments)


def assert_same_run(one: Path, other: Path) -> None:
    assert (one / "log.jsonl").read_text() == (other / "log.jsonl").read_text()
    mine, theirs = (weights.load(out / "last.pt") for out in (one, other))
    for name, value in mine.model.state_dict().items():
        assert torch.equal(value, theirs.model.state_dict()[name]), name
    assert mine.training["step"] == 6
    assert (one / "model.pt").exists() and (other / "model.pt").exists()


def validations(out: Path) -> list[dict]:
    entries = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [entry for entry in entries if "heldout_loss" in entry]


# Files.


def test_a_file_is_written_through_a_link_which_stays_one(tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "far/there.txt").write_text("old")
    (tmp_path / "link").symlink_to("far/there.txt")
    (tmp_path / "new-link").symlink_to("far/new.txt")
    for link, target in (("link", "there.txt"), ("new-link", "new.txt")):
        atomic_write(tmp_path / link, lambda path: path.write_text("new"))
        assert (tmp_path / link).is_symlink()
        assert (tmp_path / "far" / target).read_text() == "new"
        assert not (tmp_path / "far" / target).is_symlink()
    assert {path.name for path in (tmp_path / "far").iterdir()} == {"there.txt", "new.txt"}, "nothing temporary is left"


@pytest.mark.parametrize("kind", ["device", "pipe", "link to a pipe", "folder"])
def test_what_is_no_regular_file_is_refused_and_stays_what_it_is(tmp_path, kind):
    place = tmp_path / "place"
    if kind == "device":
        try:
            os.mknod(place, 0o600 | 0o020000, os.makedev(1, 3))  # a copy of /dev/null
        except PermissionError:
            pytest.skip("only root may make devices")
    elif kind == "folder":
        place.mkdir()
    else:
        os.mkfifo(tmp_path / "fifo" if "link" in kind else place)
        if "link" in kind:
            place.symlink_to("fifo")
    before = place.stat()
    with pytest.raises(
        InputError, match=rf"cannot write .*place: it is a {'folder' if kind == 'folder' else 'device'}"
    ):
        atomic_write(place, lambda path: pytest.fail("nothing is to be written"))
    assert (place.stat().st_mode, place.stat().st_ino) == (before.st_mode, before.st_ino)


def test_a_file_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    real, done = os.replace, []
    monkeypatch.setattr(files.os, "fsync", lambda number: done.append(os.fstat(number).st_size))
    monkeypatch.setattr(files.os, "replace", lambda *names: (done.append("renamed"), real(*names)))
    atomic_write(tmp_path / "file", lambda path: path.write_text("12345"))
    assert done == [5, "renamed"]


def test_a_checkpoint_that_the_disk_does_not_take_is_told_in_its_words_and_the_last_one_stays(tmp_path):
    model = random_model(seed=1, vocab_size=257)
    weights.save(tmp_path / "model.pt", model, build_encoding([]), {})
    before = (tmp_path / "model.pt").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))  # as good as a full disk
    try:
        with pytest.raises(InputError, match=r"cannot write .*model\.pt: .*File too large"):
            weights.save(tmp_path / "model.pt", model, build_encoding([]), {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [before]


def test_a_corpus_from_a_pipe_is_refused_in_one_true_sentence(train, tmp_path):
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(InputError, match='fifo" is a device or pipe'):
        train(tmp_path / "run", "--data", tmp_path / "fifo")


# Output that nobody reads.


@pytest.fixture
def nobody_reads(monkeypatch):
    """Standard output and error are pipes whose other end is closed."""
    reading, writing = os.pipe()
    os.close(reading)
    streams = [open(number, "w", buffering=1) for number in (writing, os.dup(writing))]  # noqa: SIM115
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])
    yield
    for stream in streams:
        stream.close()


def test_a_run_whose_output_nobody_reads_any_more_comes_to_its_end(train, tmp_path, nobody_reads):
    train(tmp_path)
    assert weights.load(tmp_path / "last.pt").training["step"] == 6
    assert (tmp_path / "model.pt").exists()


def test_the_bench_writes_its_results_before_it_prints_them_and_measures_all(monkeypatch, tmp_path, nobody_reads):
    def experiment(_) -> Iterator[Report]:
        """Is there anything?"""
        yield Report(["a table"], {"rows": [1]})

    monkeypatch.setattr(bench, "EXPERIMENTS", {"one": experiment, "two": experiment})
    monkeypatch.setattr(bench, "prepare", lambda args: None)
    monkeypatch.setattr(bench, "setting", lambda _: "here")
    monkeypatch.setattr(sys, "argv", ["bench.py", "--full", "--json", str(tmp_path / "figures.json")])
    bench.main()
    assert set(json.loads((tmp_path / "figures.json").read_text())["experiments"]) == {"one", "two"}


# Stopping and going on.


@pytest.fixture
def wide_scale(monkeypatch):
    """In float16 the loss is scaled by too much at first: the first steps are left out, and the scale is learned."""
    monkeypatch.setattr(torch.amp, "GradScaler", partial(torch.amp.GradScaler, init_scale=2.0**20))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_resumed_run_has_the_numbers_of_an_unbroken_one(train, in_the_fifth_step, tmp_path, wide_scale, dtype):
    train(tmp_path / "unbroken", "--dtype", dtype)
    cut_off(train, in_the_fifth_step, tmp_path / "broken", "--dtype", dtype)
    train(tmp_path / "broken", "--dtype", dtype, "--resume")
    assert_same_run(tmp_path / "unbroken", tmp_path / "broken")


def test_a_loss_scaler_that_begins_anew_would_be_noticed(train, in_the_fifth_step, tmp_path, wide_scale, monkeypatch):
    train(tmp_path / "unbroken", "--dtype", "float16")
    cut_off(train, in_the_fifth_step, tmp_path / "broken", "--dtype", "float16")
    monkeypatch.setattr(torch.amp.GradScaler.func, "load_state_dict", lambda *_: None)
    train(tmp_path / "broken", "--dtype", "float16", "--resume")
    with pytest.raises(AssertionError):
        assert_same_run(tmp_path / "unbroken", tmp_path / "broken")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=["SIGTERM", "SIGHUP"])
def test_what_a_scheduler_sends_saves_the_run_and_says_how_to_go_on(train, in_the_fifth_step, tmp_path, capsys, number):
    handler = signal.getsignal(number)
    in_the_fifth_step(lambda: [signal.raise_signal(number) for _ in range(2)])
    train(tmp_path)
    assert "stopped after step 5; the same command with --resume continues" in capsys.readouterr().out
    assert weights.load(tmp_path / "last.pt").training["step"] == 5
    assert signal.getsignal(number) == handler


def test_under_nohup_a_closed_terminal_stops_no_run(train, in_the_fifth_step, tmp_path):
    handler = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        in_the_fifth_step(lambda: signal.raise_signal(signal.SIGHUP))
        train(tmp_path)
    finally:
        signal.signal(signal.SIGHUP, handler)
    assert (tmp_path / "model.pt").exists()


def test_a_run_may_move_and_its_corpus_may_be_named_from_another_folder(
    train, unbroken, in_the_fifth_step, tmp_path, corpus, monkeypatch
):
    monkeypatch.chdir(corpus.parent)
    cut_off(train, in_the_fifth_step, tmp_path / "a", "--data", corpus.name)
    (tmp_path / "a").rename(tmp_path / "b")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(corpus)
    (tmp_path / "joint").mkdir()  # is not what --stage means
    train("b", "--data", "./link", "--resume")
    assert_same_run(unbroken, tmp_path / "b")


@pytest.mark.parametrize("damage", ["gone", "empty", "odd", "other"])
def test_encoded_files_that_are_lost_or_damaged_are_made_anew(train, unbroken, in_the_fifth_step, tmp_path, damage):
    cut_off(train, in_the_fifth_step, tmp_path / "broken")
    file = tmp_path / "broken/heldout-0.tokens"
    content = file.read_bytes()
    file.unlink()
    if damage != "gone":
        file.write_bytes({"empty": b"", "odd": content[:-1], "other": bytes(len(content))}[damage])
    train(tmp_path / "broken", "--resume")
    assert file.read_bytes() == content
    assert_same_run(unbroken, tmp_path / "broken")


def test_a_corpus_that_changed_is_noticed_when_it_has_to_be_read_again(train, in_the_fifth_step, tmp_path, corpus):
    text = tmp_path / "text.txt"
    text.write_bytes(corpus.read_bytes())
    cut_off(train, in_the_fifth_step, tmp_path / "run", "--data", text)
    text.write_text(corpus.read_text().replace("times", "by"))
    (tmp_path / "run/train-0.tokens").unlink()
    before = {file.name: file.read_bytes() for file in (tmp_path / "run").iterdir()}
    for _ in range(2):
        with pytest.raises(InputError, match="the text of --data has changed"):
            train(tmp_path / "run", "--data", text, "--resume")
    assert {file.name: file.read_bytes() for file in (tmp_path / "run").iterdir()} == before


WITHOUT_STEPS = [*SIX_STEPS[:-2], "--save-every", "100"]


@pytest.fixture
def a_second_a_look(monkeypatch):
    """The clock moves on by a second whenever it is looked at: each step takes two, and one for what follows."""
    seconds = iter(range(10**6))
    clock = SimpleNamespace(monotonic=lambda: float(next(seconds)))
    monkeypatch.setattr(train_tiny, "time", clock)


def test_a_run_goes_on_to_its_own_bound_and_says_when_it_is_finished(
    train, in_the_fifth_step, tmp_path, capsys, a_second_a_look
):
    in_the_fifth_step(lambda: signal.raise_signal(signal.SIGINT))
    train(tmp_path, "--minutes", "0.5", settings=WITHOUT_STEPS)
    train(tmp_path, "--resume", settings=WITHOUT_STEPS)
    state = weights.load(tmp_path / "last.pt").training
    assert 30 <= state["seconds"] < 33 and state["minutes"] == 0.5
    assert f"wrote {tmp_path / 'model.pt'}" in capsys.readouterr().out
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    train(tmp_path, "--resume", settings=WITHOUT_STEPS)
    out, err = capsys.readouterr()
    assert f"is finished, after step {state['step']}; to train longer: more --minutes, or --init" in out
    assert "step/s" not in err
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    train(tmp_path, "--resume", "--minutes", "1", settings=WITHOUT_STEPS)
    assert weights.load(tmp_path / "last.pt").training["seconds"] >= 60
    os.utime(tmp_path / "model.pt", (0, 0))  # as if it could not be written at the end of the longer run
    capsys.readouterr()
    train(tmp_path, "--resume", settings=WITHOUT_STEPS)
    assert f"wrote {tmp_path / 'model.pt'}" in capsys.readouterr().out
    assert (tmp_path / "model.pt").stat().st_mtime > 0


def test_where_no_run_is_there_is_none_to_go_on_with(train, tmp_path):
    (tmp_path / "model.pt").write_bytes(b"of another kind")
    with pytest.raises(InputError, match=f"there is no run in {tmp_path} to go on with"):
        train(tmp_path, "--resume")


@pytest.mark.parametrize("lost", ["settings", "history", "step", "optimizers"])
def test_a_training_state_of_which_a_part_is_lost_is_refused_by_the_files_name(
    train, in_the_fifth_step, tmp_path, lost
):
    cut_off(train, in_the_fifth_step, tmp_path)
    content = torch.load(tmp_path / "last.pt", weights_only=True)
    if lost == "optimizers":
        content["training"]["optimizers"].pop()
    else:
        del content["training"][lost]
    torch.save(content, tmp_path / "last.pt")
    with pytest.raises(InputError, match=r"last\.pt holds a damaged training state"):
        train(tmp_path, "--resume")


def test_a_finished_run_without_its_model_writes_it(train, tmp_path):
    train(tmp_path)
    (tmp_path / "model.pt").unlink()
    train(tmp_path, "--resume", settings=WITHOUT_STEPS)  # its steps are known
    assert weights.load(tmp_path / "model.pt").record["step"] == 6


# Numbers.


@pytest.mark.parametrize("arguments", [["--lr", "1e29"], ["--position-decay", "1e29"]], ids=" ".join)
@pytest.mark.parametrize("stage", ["joint", "base"])
def test_a_loss_that_is_not_finite_ends_the_run_and_the_last_good_files_stay(train, tmp_path, arguments, stage):
    if stage == "base" and arguments[0] != "--lr":
        return  # it has no look-ahead loss
    with pytest.raises(InputError, match="not finite any more after step .*: begin anew with a lower --lr"):
        train(tmp_path, *arguments, "--stage", stage, "--save-every", "1")
    assert not (tmp_path / "model.pt").exists()
    last = weights.load(tmp_path / "last.pt")  # which refuses what is not finite
    assert last.training["step"] < 6
    assert all(math.isfinite(entry["loss"]) for entry in last.training["history"])


@pytest.mark.parametrize("option", ["--lr", "--position-decay", "--lookahead-weight", "--minutes"])
def test_numbers_that_a_float32_cannot_hold_are_refused(train, tmp_path, option):
    with pytest.raises(InputError, match=rf"{option} must be less than 1e\+30, not 1e\+300"):
        train(tmp_path / "run", option, "1e300")
    assert not (tmp_path / "run").exists()


def test_a_weight_that_is_not_finite_is_never_saved(train, in_the_fifth_step, monkeypatch, tmp_path):
    real = train_tiny.learning_rate

    def learning_rate(peak, step, *others):  # the last update alone is one too far: no loss is there to tell
        return math.inf if step == 5 else real(peak, step, *others)

    monkeypatch.setattr(train_tiny, "learning_rate", learning_rate)
    with pytest.raises(InputError, match="not finite any more after step 6"):
        train(tmp_path, "--eval-every", "1000")
    assert weights.load(tmp_path / "last.pt").training["step"] == 4
    assert not (tmp_path / "model.pt").exists()


def test_a_validation_takes_as_many_groups_as_fit_and_a_base_none(train, tmp_path):
    train(tmp_path / "narrow", "--block-size", "10")
    assert len(validations(tmp_path / "narrow")[-1]["acceptance"]) == 3
    train(tmp_path / "base", "--stage", "base", "--groups", "1000", "--window", "3")
    assert validations(tmp_path / "base")[-1]["acceptance"] == []


def test_too_little_held_out_text_is_named(train, tmp_path, corpus):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/ast.py").write_bytes(corpus.read_bytes())
    (tmp_path / "in/opcode.py").write_text("short")  # held out, by its name
    with pytest.raises(InputError, match="the held-out part of .*in has 6 tokens, but one window takes 33"):
        train(tmp_path / "run", "--data", tmp_path / "in")


def test_a_run_of_any_length_is_validated_six_times(train, tmp_path, a_second_a_look):
    train(tmp_path / "steps", "--steps", "13", "--save-every", "100")
    assert [entry["step"] for entry in validations(tmp_path / "steps")] == [3, 5, 7, 9, 11, 13]
    train(tmp_path / "time", "--minutes", "1", settings=WITHOUT_STEPS)
    assert len(validations(tmp_path / "time")) == 6
    assert validations(tmp_path / "time")[-1]["step"] == weights.load(tmp_path / "time/last.pt").training["step"]


def test_the_acceptance_of_knowing_nothing_is_that_of_the_mean_distribution():
    model, generator = random_model(seed=3), torch.Generator().manual_seed(0)
    windows = torch.randint(11, (3, 13), generator=generator)  # 12 - 4 cuts are all that fit
    figures = losses.evaluate(model, windows, n_groups=1000, batch_size=2)
    q = torch.cat([model(window[None, :-1])[0, 1:9].softmax(-1) for window in windows]).detach()  # after cuts 0 to 7
    mean = [sum(row[token] for row in q.tolist()) / len(q) for token in range(11)]
    expected = sum(min(mean[t], row[t]) for row in q.tolist() for t in range(11)) / len(q)
    assert figures["constant_acceptance"] == pytest.approx(expected)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert losses.evaluate(model, windows)["constant_acceptance"] == pytest.approx(1), "a uniform model tells nothing"


def test_acceptance_is_shown_with_that_of_knowing_nothing_and_the_change_of_loss_is_marked(
    train, tmp_path, monkeypatch, capsys
):
    train(tmp_path)
    validated = validations(tmp_path)
    assert f"({validated[-1]['constant_acceptance']:.2f} by knowing nothing)" in capsys.readouterr().out
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: (drawn.append(self), Path(path).write_bytes(b"png")))
    draw_curves(tmp_path, weights.load(tmp_path / "last.pt").training["history"])
    left, right = drawn[0].axes
    (mark,) = [line for line in left.lines if line.get_linestyle() == ":"]
    assert list(mark.get_xdata()) == [6, 6] and mark.get_label() == "look-ahead loss is tv"  # the first 4.5 are of kl
    assert right.lines[-1].get_label() == "knowing nothing"
    assert list(right.lines[-1].get_ydata()) == [entry["constant_acceptance"] for entry in validated]
