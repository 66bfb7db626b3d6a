"""The scripts as a person meets them: every mistake is one sentence and exit status 2, and good input just works."""

import io
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import random_model

from minipass import weights
from minipass.auto import AdaptiveTree, Auto, n_rows
from minipass.cli import run_script
from minipass.engine import Engine
from minipass.model import GPT, GPTConfig
from minipass.tokenizer import build_encoding

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import sample  # noqa: E402
import train_tiny  # noqa: E402

TOO_LONG = "x" * 300  # for a file's name
NO_CUDA = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory) -> Path:
    """A random model over bytes, with a window of 40."""
    path = tmp_path_factory.mktemp("model") / "tiny.pt"
    torch.manual_seed(0)
    model = GPT(GPTConfig(257, 40, 1, 2, 16, 3))
    with torch.no_grad():
        model.wte.weight.mul_(20)
    weights.save(path, model, build_encoding([]), {"stage": "joint"})
    return path


@pytest.fixture
def call(monkeypatch, capfdbinary):
    """call(script, "--flag", ..., stdin=b""): exit status, standard output (bytes) and standard error (text)."""

    def run(script, *arguments, stdin: bytes = b"") -> SimpleNamespace:
        monkeypatch.setattr(sys, "argv", [Path(script.__file__).name, *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        handler = signal.getsignal(signal.SIGINT)
        status = 0
        try:
            run_script(script.main)
        except SystemExit as stop:
            status = stop.code
        finally:
            signal.signal(signal.SIGINT, handler)
        sys.stdout.flush()
        out, err = capfdbinary.readouterr()
        return SimpleNamespace(status=status, out=out, err=err.decode())

    return run


def assert_one_sentence(result) -> None:
    assert result.status == 2
    assert result.out == b""
    assert "Traceback" not in result.err
    assert len(result.err.strip().splitlines()) == 1, result.err


SAMPLE_MISTAKES = [
    ["--prompt", ""],
    ["a second prompt"],
    ["--keep-newline"],
    ["--pass", "--lookahead", "0"],
    ["--pass", "--lookahead", "-1"],
    ["--pass", "--lookahead", "4"],
    ["--pass", "two-pass", "--lookahead", "4"],
    ["--pass", "two-pass", "--lookahead", "auto"],
    ["--lookahead", "auto"],
    ["--lookahead", "2"],
    ["--lookahead", "1000000000000"],
    ["--prompt-lookup", "--lookahead", "2"],
    ["--pass", "--lookahead", "auto"],  # no record of accuracy in a model that was not trained
    ["--tree-size", "8"],
    ["--pass", "--tree-size", "8"],
    ["--pass", "tree", "--tree-size", "8"],  # for the same reason
    ["--pass", "tree", "--lookahead", "auto", "--tree-size", "8"],
    ["--rule", "coupled"],
    ["--pass", "tree", "--lookahead", "0"],
    ["--pass", "tree", "--lookahead", "4"],
    ["--pass", "tree", "--tree-size", "0"],
    ["--pass", "tree", "--tree-size", "257"],
    ["--pass", "--prompt-lookup", "-1"],
    ["--prompt-lookup", "257"],
    ["--prompt-lookup", "1000000000000"],
    ["--pass", "two-pass", "--prompt-lookup"],
    ["--pass", "--cuda-graphs", "--device", "cpu"],
    ["--compare", "--cuda-graphs", "--device", "cpu"],
    ["--temperature", "-1"],
    ["--temperature", "nan"],
    ["--temperature", "inf"],
    ["--top-k", "0"],
    ["--top-p", "0"],
    ["--top-p", "1.5"],
    ["--top-p", "nan"],
    ["--max-new-tokens", "0"],
    ["--prompt", "longer than the window " * 2, "--max-new-tokens", "0"],
    ["--seed", "-1"],
    ["--seed", str(2**63)],
    ["--json", "--temperature", "nan"],
    ["--compare", "--top-k", "0"],
    ["--dtype", "int4"],
    ["--device", "abacus"],
    ["--device", "mps"],
    pytest.param(["--device", "cuda"], marks=NO_CUDA),
    ["--checkpoint", "no-such-model"],
    ["--checkpoint", "/no/such/file.pt"],
    ["--checkpoint", "/"],
    pytest.param(["--checkpoint", TOO_LONG], id="a checkpoint's name that is too long"),
    ["--compare", "--json"],
]


@pytest.mark.parametrize("arguments", SAMPLE_MISTAKES, ids=" ".join)
def test_a_mistake_in_sampling_is_one_sentence(call, tiny_checkpoint, arguments):
    assert_one_sentence(call(sample, "--checkpoint", tiny_checkpoint, "--prompt", "Hi", *arguments))


def test_an_empty_standard_input_is_one_sentence(call, tiny_checkpoint):
    assert_one_sentence(call(sample, "--checkpoint", tiny_checkpoint, "--prompt", "-"))


class MakesFolder:
    """Pickled, this asks the reader to make a folder."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("script", [sample, train_tiny], ids=["sample", "train_tiny"])
@pytest.mark.parametrize("kind", ["empty", "truncated", "text", "pickle", "version"])
def test_a_bad_checkpoint_is_one_sentence(call, tiny_checkpoint, tmp_path, script, kind):
    path, good, marker = tmp_path / "bad.pt", tiny_checkpoint.read_bytes(), tmp_path / "the pickle's code ran"
    if kind == "version":
        torch.save(torch.load(tiny_checkpoint, weights_only=True) | {"version": 0}, path)
    else:
        pickled = pickle.dumps(MakesFolder(marker))
        path.write_bytes({"empty": b"", "truncated": good[:5000], "text": b"hello\n", "pickle": pickled}[kind])
    where = ["--checkpoint"] if script is sample else ["--data", plain_text(tmp_path), "--out", tmp_path, "--init"]
    assert_one_sentence(call(script, *where, path))
    assert not marker.exists()


@pytest.mark.parametrize(
    ("script", "arguments", "complaint"),
    [
        (sample, ["--pass", "bogus"], "invalid choice"),
        (sample, ["--pass", "--lookahead", "some"], "whole number or auto"),
        (sample, ["--pass", "--rule", "matching"], "invalid choice"),
        (sample, ["--top-k", "many"], "invalid int value"),
        (sample, ["--no-such-flag"], "unrecognized arguments"),
        (train_tiny, ["--stage", "bogus"], "invalid choice"),
        (train_tiny, ["--loss", "bogus"], "invalid choice"),
        (train_tiny, ["--steps", "1.5"], "invalid int value"),
    ],
)
def test_what_the_command_line_does_not_know_is_told_with_exit_status_2(call, script, arguments, complaint):
    result = call(script, *arguments)
    assert (result.status, result.out) == (2, b"")
    assert complaint in result.err
    assert "Traceback" not in result.err


def plain_text(folder: Path) -> Path:
    path = folder / "text.txt"
    path.write_text("one line after the other, and each of them a little longer.\n" * 50)
    return path


SIZES = "--vocab-size 257 --block-size 32 --n-layer 1 --n-head 2 --n-embd 16 --n-lookahead 3".split()

TRAINING_MISTAKES = [
    ["--data", "/no/such/folder"],
    ["--data", "EMPTY"],
    ["--data", "BINARY"],
    ["--data", "SHORT"],
    ["--data", "FOLDER"],
    ["--resume"],
    ["--out", "BELOW_A_FILE"],
    ["--n-embd", "15"],
    ["--n-layer", "0"],
    ["--vocab-size", "10"],
    ["--groups", "0"],
    ["--groups", "30"],
    ["--steps", "0"],
    ["--minutes", "-1"],
    ["--lr", "nan"],
    ["--decay", "2"],
    ["--seed", "-1"],
    ["--seed", str(2**70)],
    ["--dtype", "int4"],
    ["--device", "abacus"],
    pytest.param(["--device", "cuda"], marks=NO_CUDA),
    ["--dtype", "float64"],
    ["--stage", "lookahead"],
    ["--init", "/no/such/file.pt"],
    ["--adapters", "adapters.safetensors"],
    pytest.param(["--out", TOO_LONG], id="a folder's name that is too long"),
]


@pytest.mark.parametrize("arguments", TRAINING_MISTAKES, ids=" ".join)
def test_a_mistake_in_training_is_one_sentence(call, tmp_path, arguments):
    places = {name: tmp_path / name for name in ("EMPTY", "BINARY", "SHORT", "FOLDER")}
    places["EMPTY"].write_bytes(b"")
    places["BINARY"].write_bytes(bytes(range(256)) * 100)
    places["SHORT"].write_text("too short\n")
    places["FOLDER"].mkdir()
    places["BELOW_A_FILE"] = places["SHORT"] / "run"
    arguments = [places.get(argument, argument) for argument in arguments]
    result = call(train_tiny, "--data", plain_text(tmp_path), "--out", tmp_path / "run", "--steps", "1",
                  "--batch-size", "2", "--groups", "2", *SIZES, *arguments)  # fmt: skip
    assert_one_sentence(result)
    assert not (tmp_path / "run" / "model.pt").exists()


def test_a_run_that_cannot_go_on_so_is_one_sentence_and_stays_as_it_is(call, tmp_path):
    run = ["--data", plain_text(tmp_path), "--out", tmp_path / "run", "--steps", "1", "--batch-size", "2"]
    run += ["--groups", "2", *SIZES]
    assert call(train_tiny, *run).status == 0
    last = tmp_path / "run/last.pt"
    before = last.read_bytes()
    assert_one_sentence(call(train_tiny, *run))
    assert_one_sentence(call(train_tiny, *run, "--resume", "--n-embd", "32"))
    assert_one_sentence(call(train_tiny, *run, "--resume", "--seed", "1"))
    assert last.read_bytes() == before
    last.write_bytes(before[: len(before) // 2])
    assert_one_sentence(call(train_tiny, *run, "--resume"))


# Good input.


WAYS = {  # options and the method's name
    "--pass": "pass",
    "--pass two-pass": "two-pass",
    "--pass tree": "tree",
    "--pass --prompt-lookup": "pass",
    "--prompt-lookup 4": "prompt-lookup",
}
FIGURES = {"text", "tokens", "passes", "tokens_per_pass", "acceptance", "tokens_per_second", "method"}


def test_greedy_text_with_pass_equals_the_text_without(call, tiny_checkpoint):
    settings = ["--checkpoint", tiny_checkpoint, "--prompt", "Hi", "--temperature", "0", "--dtype", "float32", "--json"]
    plain, *others = (json.loads(call(sample, *settings, *way.split()).out) for way in ("", *WAYS))
    assert plain["method"] == "plain"
    assert plain["passes"] == len(plain["tokens"])
    assert [run["method"] for run in others] == list(WAYS.values())
    for run in (plain, *others):
        assert set(run) == FIGURES
        assert run["tokens"] == plain["tokens"]
        assert run["passes"] <= plain["passes"]


@pytest.mark.parametrize("seed", [0, 5])
@pytest.mark.parametrize("way", WAYS)
def test_by_the_coupled_rule_sampled_text_equals_the_text_without_pass(call, tiny_checkpoint, way, seed):
    settings = ["--checkpoint", tiny_checkpoint, "--prompt", "Hi", "--dtype", "float64", "--json", "--seed", seed]
    plain, other = (call(sample, *settings, *extra) for extra in ([], [*way.split(), "--rule", "coupled"]))
    assert json.loads(plain.out)["tokens"] == json.loads(other.out)["tokens"]


def test_the_rule_can_be_chosen(call, tiny_checkpoint):
    settings = ["--checkpoint", tiny_checkpoint, "--prompt", "Hi", "--dtype", "float64", "--json"]
    texts = {}
    for way in ("--pass", "--pass two-pass"):
        for rule in ("", " --rule coupled", " --rule rejection"):
            texts[way + rule] = json.loads(call(sample, *settings, *(way + rule).split()).out)["tokens"]
    assert texts["--pass"] == texts["--pass --rule coupled"] != texts["--pass --rule rejection"]
    assert texts["--pass two-pass"] == texts["--pass two-pass --rule rejection"]
    assert texts["--pass --rule coupled"] == texts["--pass two-pass --rule coupled"]


def test_a_trained_model_writes_the_same_text_in_fewer_passes_fused_in_the_fewest(call, tmp_path):
    training = "--steps 200 --batch-size 4 --groups 4 --block-size 64 --n-embd 32 --lr 0.02 --dtype float32".split()
    call(train_tiny, "--data", plain_text(tmp_path), "--out", tmp_path / "run", *SIZES, *training)
    settings = ["--checkpoint", tmp_path / "run/model.pt", "--prompt", "one line after", "--temperature", "0"]
    plain, fused, two_pass, tree = (
        json.loads(call(sample, *settings, "--dtype", "float32", "--json", *extra).out)
        for extra in ([], ["--pass"], ["--pass", "two-pass"], ["--pass", "tree"])
    )
    assert plain["text"] == fused["text"] == two_pass["text"] == tree["text"]
    assert "each of them a little longer" in plain["text"], "it has learned its corpus"
    assert tree["passes"] <= fused["passes"] < two_pass["passes"] < plain["passes"]
    auto = call(sample, *settings, "--pass", "--lookahead", "auto", "--dtype", "float32", "--json")
    assert json.loads(auto.out)["text"] == plain["text"]


def test_the_same_seed_gives_the_same_text_without_escape_codes_in_a_pipe(call, tiny_checkpoint):
    settings = ["--checkpoint", tiny_checkpoint, "--prompt", "Hi", "--pass", "--temperature", "1"]
    first, second, other = (call(sample, *settings, "--seed", seed) for seed in (1, 1, 2))
    assert first.out == second.out != other.out
    assert first.out.startswith(b"Hi")
    assert b"\033[" not in first.out  # the model may well write the escape character itself
    assert "tokens/pass" in first.err


def test_a_prompt_may_hold_any_bytes(call, tiny_checkpoint):
    result = call(sample, "--checkpoint", tiny_checkpoint, "--prompt", "-", stdin="\N{SNOWMAN}".encode() + b"\xff!")
    assert result.status == 0
    assert result.out.decode().startswith("\N{SNOWMAN}\N{REPLACEMENT CHARACTER}!")


def test_a_character_split_over_tokens_comes_out_whole(capsys):
    printer = sample.TextPrinter(build_encoding([]), coloured=False)
    for byte in "a\N{SNOWMAN}b".encode():
        printer.write([byte], ["sampled"])
    assert capsys.readouterr().out == "a\N{SNOWMAN}b"


@pytest.fixture
def compared(call, tiny_checkpoint):
    """compared("--flag", ...): what `sample.py --compare` makes of 20 tokens."""
    settings = ["--checkpoint", tiny_checkpoint, "--prompt", "Hi", "--max-new-tokens", "20", "--compare"]
    return lambda *arguments: call(sample, *settings, *arguments)


@pytest.mark.parametrize("way", ["", *WAYS])
def test_compare_finds_the_same_text_where_that_is_promised(compared, way):
    rule = ["--rule", "coupled"] if way else []
    for promised in (["--temperature", "0.8", *rule], ["--temperature", "0"]):
        result = compared("--dtype", "float64", "--seed", "3", *way.split(), *promised)
        assert result.status == 0
        first, plain, other, speed, last = result.out.decode().splitlines()
        assert plain.split()[0] == "plain"
        assert other.split()[0] == WAYS.get(way, "pass")
        assert "speed-up" in speed
        assert last == "same text"


def test_compare_lets_auto_begin_each_run_as_the_first(monkeypatch, capsys):
    """It learns from a text, and all runs are of the same one."""
    seen = []

    class Learning(AdaptiveTree):
        def add(self, turn):
            if turn.n_tested == [0]:  # the first turn of a text
                seen.append((self.n_turns, self.tested.tolist()))
            super().add(turn)

    model = random_model(seed=1, std=0.5)
    auto = Auto(Learning([[0.5, 0.2]], lambda tree: 1.0 + 0.01 * n_rows(tree)))
    engines = {"plain": Engine(model, sample.Plain()), "auto": Engine(model, auto)}
    sample.compare(engines, lambda engine: engine.stream([1, 2], 12), "")
    assert len(seen) == 6 and all(each == seen[0] for each in seen)


def with_another_seed(self, prompts, n, *, seed, stream=sample.Engine.stream, **settings):
    """A broken Engine.stream: whatever is not plain decoding draws another text."""
    return stream(self, prompts, n, seed=seed + (self.method != sample.Plain()), **settings)


def test_compare_fails_where_the_promised_text_does_not_come(compared, monkeypatch):
    monkeypatch.setattr(sample.Engine, "stream", with_another_seed)
    result = compared("--dtype", "float64")
    assert result.status not in (0, None)
    assert "differ after" in str(result.status)
    assert b"same text" not in result.out


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--dtype", "float64", "--rule", "rejection"], "by the rule rejection it is another draw"),
        (["--dtype", "float64", "--pass", "two-pass"], "by the rule rejection it is another draw"),
        (["--dtype", "float32"], "float32 rounds differently with another number of rows"),
        (["--dtype", "bfloat16", "--pass", "tree"], "bfloat16 rounds differently with another number of rows"),
    ],
)
def test_compare_says_why_another_text_may_come(compared, monkeypatch, arguments, reason):
    monkeypatch.setattr(sample.Engine, "stream", with_another_seed)
    result = compared(*arguments)
    assert result.status == 0
    assert result.out.decode().splitlines()[-1] == f"another text: {reason}"


def test_a_trace_is_written_beside_the_text(call, tiny_checkpoint, tmp_path):
    settings = ["--checkpoint", tiny_checkpoint, "--prompt", "Hi", "--trace", tmp_path / "trace.html"]
    for output in ([], ["--json"]):
        assert call(sample, *settings, "--pass", *output).status == 0
        assert "the coupled rule" in (tmp_path / "trace.html").read_text()
        (tmp_path / "trace.html").unlink()


def test_the_help_has_the_options_in_groups_and_no_old_names(call):
    words = call(sample, "--help").out.decode()
    groups = [line for line in words.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert groups == ["options:", "what to write:", "how to draft:", "how to sample:", "model:", "output:"]
    assert "--cuda-graphs" in words
    assert "--compile" not in words


@NO_CUDA
def test_the_old_name_of_cuda_graphs_is_still_understood(call, tiny_checkpoint):
    old, new = (call(sample, "--checkpoint", tiny_checkpoint, name) for name in ("--compile", "--cuda-graphs"))
    assert old.err == new.err != ""


def test_ctrl_c_while_sampling_has_exit_status_130_and_no_traceback(call, tiny_checkpoint, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(sample.Engine, "stream", interrupted)
    result = call(sample, "--checkpoint", tiny_checkpoint, "--prompt", "Hi")
    assert result.status == 130
    assert result.err.split() == ["interrupted"]


def start(*command, **pipes) -> subprocess.Popen:
    """A script in a process of its own, its output buffered as in a user's shell."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, *map(str, command)]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True, **pipes)


@pytest.mark.parametrize("output", ["--pass", "--help"])  # --json with a trace: see test_faults.py
def test_a_reader_who_goes_away_is_no_error(tiny_checkpoint, output):
    process = start("sample.py", "--checkpoint", tiny_checkpoint, "--prompt", "Hi\n", output, stdout=subprocess.PIPE)
    process.stdout.close()  # as `| head` does when it has read enough
    with process.stderr:
        assert process.stderr.read() == ""
    assert process.wait(60) == 0


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this machine has no /dev/full")
def test_a_full_disk_behind_the_output_is_one_sentence(tiny_checkpoint):
    with open("/dev/full", "w") as full:
        process = start("sample.py", "--checkpoint", tiny_checkpoint, "--prompt", "Hi\n", stdout=full)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert err == "sample.py: No space left on device\n"


def test_an_interrupted_training_run_saves_and_goes_on(call, tmp_path):
    log, last = tmp_path / "run/log.jsonl", tmp_path / "run/last.pt"
    run = ["--data", plain_text(tmp_path), "--out", tmp_path / "run", "--steps", "100000", "--batch-size", "2"]
    run += ["--groups", "2", *SIZES]
    process = start("train_tiny.py", *run, "--save-every", "1", stdout=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not (log.exists() and log.read_text()) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "--resume continues" in out
    assert "Traceback" not in err
    state = weights.load(last).training
    assert state["step"] == len(log.read_text().splitlines()) > 0
    minutes = state["seconds"] / 60 + 0.0005  # a few more steps, for the 100,000 would take too long
    assert call(train_tiny, *run, "--resume", "--minutes", minutes).status == 0
    assert weights.load(tmp_path / "run/model.pt").record["step"] > state["step"]
