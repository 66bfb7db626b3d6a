"""Training in several processes, or in parts: the same loss curve as in one piece."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from minipass.errors import InputError

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import train_tiny  # noqa: E402

SETTINGS = "--steps 1000 --eval-every 3 --save-every 4 --batch-size 4 --groups 2 --device cpu --dtype float32".split()
SETTINGS += "--vocab-size 300 --block-size 32 --n-layer 1 --n-head 2 --n-embd 16 --n-lookahead 3".split()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    path.write_text("".join(f"{i} times {i % 7} is {i * (i % 7)}.\n" for i in range(1500)))
    return path


def command(corpus: Path, out: Path, *arguments: str) -> list[str]:
    return [str(ROOT / "train_tiny.py"), "--data", str(corpus), "--out", str(out), *SETTINGS, *arguments]


@pytest.fixture
def train_until(corpus, monkeypatch):
    """train_until(step, out, ...): a run in this process, which Ctrl-C ends behind that step; returns its curve."""

    def run(step: int, out: Path, *arguments: str) -> list[tuple]:
        real, handler, pressed = train_tiny.learning_rate, signal.getsignal(signal.SIGINT), []

        def learning_rate(peak, steps_before, *others):
            if steps_before + 1 == step and not pressed:
                pressed.append(True)
                signal.raise_signal(signal.SIGINT)
            return real(peak, steps_before, *others)

        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", command(corpus, out, *arguments))
            patch.setattr(train_tiny, "learning_rate", learning_rate)
            try:
                train_tiny.main()
            finally:
                signal.signal(signal.SIGINT, handler)
        return curve(out)

    return run


def curve(out: Path) -> list[tuple]:
    """(step, training loss, held-out loss or 0) of each step in a run's log."""
    log = out / "log.jsonl"
    entries = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    return [(entry["step"], entry["loss"], entry.get("heldout_loss", 0.0)) for entry in entries]


def assert_same_curve(one: list[tuple], other: list[tuple]) -> None:
    assert len(one) == len(other) > 3
    for mine, theirs in zip(one, other, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5)


def start_two(*arguments: str) -> list[subprocess.Popen]:
    """What `torchrun --nproc_per_node 2` starts, without the seconds that torchrun itself takes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return [
        subprocess.Popen([sys.executable, *arguments], **pipes, env=os.environ | shared | {"RANK": r, "LOCAL_RANK": r})
        for r in "01"
    ]


def test_two_processes_take_the_steps_of_one_and_one_goes_on_where_two_stopped(corpus, train_until, tmp_path):
    two, one = tmp_path / "two", tmp_path / "one"
    processes = start_two(*command(corpus, two))
    try:
        deadline = time.monotonic() + 300
        while len(curve(two)) < 4 and processes[0].poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        for process in processes:
            process.send_signal(signal.SIGINT)  # as torchrun passes it on
        (out, err), (other_out, other_err) = (process.communicate(timeout=300) for process in processes)
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], err + other_err
    assert "--resume continues" in out
    assert (other_out, other_err) == ("", ""), "one process speaks for all"
    steps = len(curve(two))
    assert f"stopped after step {steps};" in out
    expected = train_until(steps + 3, one)
    assert_same_curve(curve(two), expected[:steps])
    assert_same_curve(train_until(steps + 3, two, "--resume"), expected)


def test_a_batch_taken_in_parts_and_recomputed_activations_change_no_step(train_until, tmp_path):
    whole = train_until(4, tmp_path / "whole")
    parts = train_until(4, tmp_path / "parts", "--accumulate", "2", "--checkpoint-activations")
    assert_same_curve(whole, parts)


def test_a_batch_that_cannot_be_shared_equally_is_refused(train_until, tmp_path):
    with pytest.raises(InputError, match="--batch-size 4 cannot be split into 1 x 3 equal parts"):
        train_until(1, tmp_path, "--accumulate", "3")


def test_a_mistake_in_two_processes_is_one_sentence_of_one_of_them(corpus, tmp_path):
    processes = start_two(*command(corpus, tmp_path, "--n-embd", "15"))
    try:
        outputs = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [2, 2]
    assert [out for out, _ in outputs] == ["", ""]
    sentence = "train_tiny.py: n_embd (15) must be a multiple of n_head (2)"
    assert [err.strip() for _, err in outputs] == [sentence, ""]
