"""What goes wrong for users: bad numbers in files, names that mean two things, odd streams and prompts.

Each test stands for a kind of fault. Command lines are tested in test_bad_input.py, whose fixtures serve here.
"""

import io
import json
import math
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import random_model
from safetensors.torch import load_file, save_file
from test_bad_input import ROOT, assert_one_sentence, call, start, tiny_checkpoint  # noqa: F401 - two are fixtures

import minipass
import sample
import train_tiny
from minipass import weights
from minipass.cli import run_script
from minipass.decode import Fused, Plain
from minipass.engine import Engine
from minipass.errors import InputError
from minipass.extras import export
from minipass.model import GPT, GPTConfig
from minipass.pretrained import CONFIG, WEIGHTS, is_pretrained
from minipass.sampling import Sampling
from minipass.texts import NOT_FINITE, Texts
from minipass.tokenizer import build_encoding
from minipass.trees import DraftTree, Shape

# Numbers in files.


@pytest.fixture
def kept(tmp_path):
    """Of each kind of file: how one tensor in it is replaced, and what reads it."""
    model = GPT(GPTConfig(257, 40, 1, 2, 16, 3))
    checkpoint, adapters, folder = tmp_path / "model.pt", tmp_path / "adapters.safetensors", tmp_path / "folder"
    weights.save(checkpoint, model, build_encoding([]), {})
    weights.save_adapters(model, adapters)
    weights.save_pretrained(model, folder)

    def in_checkpoint(name: str, value: torch.Tensor) -> None:
        content = torch.load(checkpoint, weights_only=True)
        content["weights"][name] = value
        torch.save(content, checkpoint)

    def in_tensors(file: Path, name: str, value: torch.Tensor) -> None:
        with minipass.pretrained._library("safetensors").safe_open(file, "pt") as opened:
            metadata = opened.metadata()
        save_file(load_file(file) | {name: value}, file, metadata)

    return {
        "checkpoint": (partial(in_checkpoint, "ln_f.bias"), lambda: weights.load(checkpoint)),
        "checkpoint to train on": (partial(in_checkpoint, "ln_f.bias"), lambda: weights.load_base(checkpoint)),
        "table": (partial(in_checkpoint, "lookahead"), lambda: weights.load(checkpoint)),
        "adapters": (partial(in_tensors, adapters, "lookahead"), lambda: weights.load_adapters(model, adapters)),
        "folder": (partial(in_tensors, folder / WEIGHTS, "transformer.ln_f.bias"),
                   lambda: minipass.from_pretrained(folder)),
    }  # fmt: skip


KINDS = ["checkpoint", "checkpoint to train on", "table", "adapters", "folder"]


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", KINDS)
def test_a_number_that_is_not_finite_is_refused_with_the_name_of_its_tensor(kept, kind, number):
    replace, read = kept[kind]
    name = "lookahead" if kind in ("table", "adapters") else "ln_f.bias"
    value = torch.zeros((3, 16) if name == "lookahead" else 16)
    replace(value)
    read()
    value.view(-1)[-1] = number
    replace(value)
    with pytest.raises(InputError, match=f"not finite, in .*{name}"):
        read()


@pytest.mark.parametrize("kind", KINDS)
def test_quantised_weights_are_refused_with_their_type(kept, kind):
    replace, read = kept[kind]
    replace(torch.ones((3, 16) if kind in ("table", "adapters") else 16, dtype=torch.int8))
    with pytest.raises(InputError, match="torch.int8"):
        read()


def test_weights_that_a_number_type_is_too_small_for_are_refused(tmp_path):
    model = GPT(GPTConfig(257, 40, 1, 2, 16, 3))
    model.ln_f.weight.data[3] = 1e6
    weights.save(tmp_path / "model.pt", model, build_encoding([]), {})
    weights.load(tmp_path / "model.pt", dtype=torch.bfloat16)
    with pytest.raises(InputError, match=r"torch.float16, holds numbers that are not finite, in ln_f.weight"):
        weights.load(tmp_path / "model.pt", dtype=torch.float16)


A_GPT2 = '{{"model_type": "gpt2", "vocab_size": 9, "n_positions": 9, "n_layer": 1, "n_head": 1, "n_embd": {}}}'


@pytest.mark.parametrize("n", [500, 10_000, 200_000])
@pytest.mark.parametrize("content", ["{}", '{{"model_type": {}}}', A_GPT2])
def test_a_config_of_nested_lists_is_refused_in_one_short_line(tmp_path, content, n):
    (tmp_path / CONFIG).write_text(content.format("[" * n + "]" * n))
    with pytest.raises(InputError) as refusal:
        weights.load(tmp_path)
    assert len(str(refusal.value)) < 500


def test_a_nan_in_a_checkpoint_is_one_sentence_of_sample(call, tmp_path):  # noqa: F811
    model = GPT(GPTConfig(257, 40, 1, 2, 16, 3))
    model.wte.weight.data[0, 0] = math.nan
    weights.save(tmp_path / "model.pt", model, build_encoding([]), {})
    assert_one_sentence(call(sample, "--checkpoint", tmp_path / "model.pt"))


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: minipass.load(None),
        lambda: minipass.load(5),
        lambda: minipass.best_tree([["a"]], 3),
        lambda: minipass.best_tree([[]], 3),
        lambda: minipass.best_tree(5, 3),
        lambda: minipass.best_tree([[math.nan]], 3),
        lambda: minipass.best_tree([[0.5]], "3"),
        lambda: minipass.best_tree([[0.5, 0.2]] * 8, 10**12),
        lambda: minipass.AdaptiveTree([[0.5, 0.2]], lambda tree: 0),
        lambda: minipass.AdaptiveTree([[0.5, 0.2]], lambda tree: math.nan),
        lambda: minipass.AdaptiveTree([[0.5, 0.2], [0.3]], lambda tree: 1),
        lambda: minipass.AdaptiveTree([["a", 0.2]], lambda tree: 1),
    ],
)
def test_what_is_no_name_no_figure_or_no_time_is_an_input_error(wrong):
    with pytest.raises(InputError):
        wrong()


@pytest.mark.parametrize(
    "number",
    [-(10**5000), True, 1.0, "1", None, torch.tensor([1, 2])],
    ids=["too long to print", "True", "1.0", "text", "None", "two"],
)
def test_what_is_no_whole_number_or_out_of_bounds_is_refused_in_a_short_sentence(number):
    with pytest.raises(InputError, match="n_layer must be a whole number of at least 1, not") as refusal:
        GPTConfig(n_layer=number)
    assert len(str(refusal.value)) < 120


@pytest.mark.parametrize(
    "ask",
    [lambda: np.empty(2**50), lambda: torch.empty(2**50), lambda: torch.empty(2**40, 2**40)],
    ids=["numpy", "torch", "more than can be counted"],
)
def test_too_little_memory_is_one_sentence(ask, capsys):
    with pytest.raises(SystemExit, match="2"):
        run_script(ask)
    assert "there is not enough memory: " in capsys.readouterr().err


def test_a_mistake_of_ours_is_not_taken_for_too_little_memory():
    with pytest.raises(RuntimeError, match="size"):
        run_script(lambda: torch.ones(2) + torch.ones(3))


@pytest.mark.parametrize("number", [math.nan, math.inf, -65504.0])
@pytest.mark.parametrize("method", ["pass", "two-pass", "tree"])
def test_what_look_ahead_rows_leave_in_the_cache_never_reaches_a_real_row(method, number):
    """-65504, the last number of float16, overflows within the model."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(257, 40, 2, 2, 16, 3)).to(torch.float16).eval()
    model.wte.weight.data.mul_(20)
    model.wpe.weight.data.sub_(40)
    expected = minipass.generate(model, [5, 6, 7], 12, "plain").tokens
    broken = model.with_lookahead(torch.full((3, 16), number))
    hidden = broken.hidden(torch.tensor([[5]]), minipass.layout.with_groups([-1], [0], 3))
    assert not hidden.isfinite().all()
    tree = {"tree": (0, 0, 1)} if method == "tree" else {"lookahead": 3}
    assert minipass.generate(broken, [5, 6, 7], 12, method, rule="coupled", **tree).tokens == expected


@pytest.mark.parametrize("name", ["rope_theta", "norm_eps"])
@pytest.mark.parametrize("number", [math.nan, math.inf, 0, -1, "1e-5", None])
def test_a_config_with_a_number_that_is_none_is_refused(name, number):
    with pytest.raises(InputError, match=name):
        GPTConfig(llama=True, **{name: number})


# Names that mean two things.


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("what", ["file", "folder", "model of others"])
def test_a_shipped_name_wins_over_what_is_here_and_a_slash_reaches_that(here, what):
    small = GPT(GPTConfig(257, 40, 1, 2, 16, 3))
    if what == "file":
        weights.save("draft", small, build_encoding([]), {})
    elif what == "folder":
        (here / "draft").mkdir()
    else:
        weights.save_pretrained(small, here / "draft")
    assert weights.load("draft").record["stage"] == "base"
    assert not is_pretrained("draft")
    if what == "file":
        assert weights.load("./draft").model.config == small.config
    else:
        assert is_pretrained("./draft") == (what == "model of others")
        with pytest.raises(InputError, match=r"\./draft|vocabulary"):
            weights.load("./draft")


def test_the_name_of_a_model_in_a_package_wins_over_a_file_here(here):
    (here / "smollm2").write_text("not a model\n")
    assert is_pretrained("smollm2")


def test_a_runs_folder_stands_for_its_model(call, tiny_checkpoint, tmp_path):  # noqa: F811
    run = tmp_path / "run"
    run.mkdir()
    with pytest.raises(InputError, match="no checkpoint in the folder .*model.pt"):
        weights.load(run)
    (run / "model.pt").write_bytes(tiny_checkpoint.read_bytes())
    assert not is_pretrained(run)
    for loaded in (weights.load(run), weights.load_base(str(run))):
        assert loaded.record == weights.load(tiny_checkpoint).record
    by_file, by_folder = (call(sample, "--checkpoint", name, "Hi") for name in (run / "model.pt", run))
    assert by_folder.out == by_file.out != b""
    assert call(export, run, tmp_path / "exported").status == 0
    assert is_pretrained(tmp_path / "exported")


def test_an_export_does_not_overwrite_another_model(call, tiny_checkpoint, tmp_path):  # noqa: F811
    folder = tmp_path / "folder"
    weights.save_pretrained(GPT(GPTConfig(257, 40, 1, 2, 16, 3)), folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    refused = call(export, tiny_checkpoint, folder)
    assert_one_sentence(refused)
    assert "already holds a model" in refused.err
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


# Streams.


def closed(monkeypatch, *names: str) -> None:
    """As Python finds them when the shell was told `>&-` or the like."""
    for name in names:
        monkeypatch.setattr(sys, name, None)


@pytest.mark.parametrize("names", [["stdin"], ["stdout"], ["stderr"], ["stdin", "stdout", "stderr"]], ids=" ".join)
@pytest.mark.parametrize(
    ("arguments", "status"),
    [(["Hi"], 0), (["Hi", "--json"], 0), (["-"], 2), (["--help"], 0), (["--lookahead", "0"], 2)],
)
def test_a_closed_stream_is_as_good_as_an_empty_one(tiny_checkpoint, monkeypatch, capsys, names, arguments, status):  # noqa: F811
    monkeypatch.setattr(sys, "argv", ["sample.py", "--checkpoint", str(tiny_checkpoint), "--max-new-tokens", "2",
                                      *arguments])  # fmt: skip
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    closed(monkeypatch, *names)
    try:
        run_script(sample.main)
        ended = 0
    except SystemExit as stop:
        ended = stop.code or 0
    assert ended == status
    out, err = capsys.readouterr()
    assert "tokens/pass" not in out or "--json" in arguments, "statistics are no part of the text"
    assert "Traceback" not in err


def test_a_script_whose_streams_are_all_closed_does_its_work(tiny_checkpoint, tmp_path):  # noqa: F811
    words = [sys.executable, ROOT / "sample.py", "--checkpoint", tiny_checkpoint, "Hi", "--trace", tmp_path / "t.html"]
    done = subprocess.run(["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *map(str, words)], cwd=ROOT, timeout=120)
    assert done.returncode == 0
    assert "<h1>" in (tmp_path / "t.html").read_text()


@pytest.mark.parametrize("text", ["wrote runs/größe/model.pt", "wrote runs/\udcff/model.pt"])
def test_what_an_output_cannot_show_is_printed_as_escapes(monkeypatch, text):
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    run_script(lambda: print(text))
    assert out.buffer.getvalue().decode() == text.encode("ascii", "backslashreplace").decode() + "\n"


def test_a_reader_who_goes_away_does_not_cost_the_trace(tiny_checkpoint, tmp_path):  # noqa: F811
    arguments = ["--checkpoint", tiny_checkpoint, "Hi", "--max-new-tokens", "20", "--trace", tmp_path / "trace.html"]
    process = start("sample.py", *arguments, "--json", stdout=subprocess.PIPE)
    process.stdout.close()
    with process.stderr:
        assert process.stderr.read() == ""
    assert process.wait(60) == 0
    assert "20 tokens in" in (tmp_path / "trace.html").read_text()


def test_what_was_written_until_ctrl_c_is_in_the_trace(call, tiny_checkpoint, tmp_path, monkeypatch):  # noqa: F811
    def interrupted(*arguments, stream=sample.Engine.stream, **settings):
        yield next(stream(*arguments, **settings))
        raise KeyboardInterrupt

    monkeypatch.setattr(sample.Engine, "stream", interrupted)
    trace = tmp_path / "trace.html"
    assert call(sample, "--checkpoint", tiny_checkpoint, "Hi", "--trace", trace).status == 130
    assert "1 tokens in 1 passes" in trace.read_text()


# Prompts.


@pytest.fixture
def tokens_of(call, tiny_checkpoint):  # noqa: F811
    """tokens_of("argument", ..., stdin=b""): the new tokens, and what was said on standard error."""

    def run(*arguments, stdin: bytes = b"") -> tuple[list[int], str]:
        # float64: else another split of a prompt may round differently
        settings = ["--checkpoint", tiny_checkpoint, "--json", "--dtype", "float64", "--max-new-tokens", "9"]
        result = call(sample, *settings, *arguments, stdin=stdin)
        assert result.status == 0, result.err
        return json.loads(result.out)["tokens"], result.err

    return run


def test_a_prompt_needs_no_option(tokens_of):
    assert tokens_of("Hi there") == tokens_of("--prompt", "Hi there")
    assert tokens_of("-", stdin=b"Hi there") == tokens_of("Hi there")


def test_one_line_end_of_standard_input_is_no_part_of_the_prompt_unless_it_is_wanted(tokens_of):
    plain, with_end, with_two = (tokens_of(prompt) for prompt in ("Hi", "Hi\n", "Hi\n\n"))
    assert len({str(each) for each in (plain, with_end, with_two)}) == 3
    for name in (["-"], ["--prompt", "-"]):
        assert tokens_of(*name, stdin=b"Hi\n") == tokens_of(*name, stdin=b"Hi\r\n") == plain
        assert tokens_of(*name, stdin=b"Hi\n\n") == tokens_of(*name, "--keep-newline", stdin=b"Hi\n") == with_end
    assert tokens_of("-", "--keep-newline", stdin=b"Hi\n\n") == with_two


@pytest.mark.parametrize("n", [40, 41, 2534])
def test_of_a_prompt_longer_than_the_window_the_last_half_window_is_read_with_a_note(tokens_of, n):
    prompt = os.urandom(n // 2 + 1).hex()[:n].encode()
    tokens, note = tokens_of("-", stdin=prompt)
    assert tokens == tokens_of("-", stdin=prompt[-20:] if n > 40 else prompt)[0]
    assert note == (
        "" if n == 40 else f"sample.py: the prompt has {n} tokens, the window 40: the model reads the last 20\n"
    )


def test_the_text_begins_with_the_whole_prompt_however_long(call, tiny_checkpoint):  # noqa: F811
    result = call(sample, "--checkpoint", tiny_checkpoint, "-", stdin=b"0123456789" * 20 + b"\n")
    assert result.status == 0
    assert result.out.startswith(b"0123456789" * 20)


def test_a_message_that_is_no_text_is_one_sentence(call, tiny_checkpoint):  # noqa: F811
    assert_one_sentence(call(sample, "--checkpoint", tiny_checkpoint, "--chat", stdin=b"a\xff\n"))


@pytest.mark.parametrize("method", [Plain(), Fused(2), Fused(DraftTree((0, 0, 1), keep=2))], ids=repr)
@pytest.mark.parametrize("prompt", [[5], [1, 2, 3]], ids=["in the first turn", "in the prefill"])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.8, top_k=3)], ids=["greedy", "sampled"])
def test_a_model_that_computes_numbers_that_are_not_finite_writes_no_text(method, prompt, sampling):
    """Its weights are finite: the product of two matrices is not."""
    model = random_model(seed=0)
    with torch.no_grad():
        model.h[0].mlp.c_fc.weight.mul_(1e200)
        model.h[0].mlp.c_proj.weight.mul_(1e200)
    with pytest.raises(InputError, match="numbers that are not finite: take another dtype"):
        Engine(model, method, sampling).generate([prompt, prompt], 5)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.8, top_k=3)], ids=["greedy", "sampled"])
def test_an_output_matrix_whose_logits_are_not_finite_writes_no_text(sampling):
    model = random_model(seed=0, tied=False)
    with torch.no_grad():
        model.ln_f.weight.mul_(1e200)
        model.lm_head.weight.mul_(1e200)
    with pytest.raises(InputError, match="not finite"):
        Engine(model, Fused(2), sampling).generate([1, 2, 3], 5)


def test_numbers_past_a_shorter_prompt_of_a_batch_may_be_anything():
    """Shorter prompts are padded with token 0, which would overflow here."""
    model = random_model(seed=0, tied=False)
    with torch.no_grad():
        model.wte.weight[0] = 1e308
        model.lm_head.weight[0] = 0  # others are likelier
    engine = Engine(model, Fused(2))
    prompts = [[1, 2, 3], [4]]
    alone = [engine.generate(prompt, 3).tokens[0] for prompt in prompts]
    assert 0 not in sum(alone, [])
    assert engine.generate(prompts, 3).tokens == alone
    with pytest.raises(InputError, match="not finite"):
        engine.generate([[1, 0, 3], [4]], 3)


def test_a_text_that_has_ended_may_be_anything():
    """What is computed for it is not written."""
    texts = Texts([[1], [2]], 3, None, 0, random_model(seed=0).config)
    texts.begin_window(with_ended=True)
    texts.wanted[1] = 0
    turn = texts.emit(Shape(), [[0, 0, 4], [0, 0, NOT_FINITE]])
    assert turn.tokens == [[4], []]
    with pytest.raises(InputError, match="not finite"):
        texts.emit(Shape(), [[0, 0, NOT_FINITE], [0, 0, 1]])


# Files that are there already.


def test_a_trace_takes_no_other_files_place_and_says_so_before_the_text(call, tiny_checkpoint, tmp_path):  # noqa: F811
    diary, before = tmp_path / "diary.html", tiny_checkpoint.read_bytes()
    diary.write_text("<title>My diary</title>")
    for place in (diary, tiny_checkpoint, tmp_path):
        refused = call(sample, "--checkpoint", tiny_checkpoint, "Hi", "--trace", place)
        assert_one_sentence(refused)
    assert (diary.read_text(), tiny_checkpoint.read_bytes()) == ("<title>My diary</title>", before)
    for _ in range(2):  # an earlier trace is replaced
        assert call(sample, "--checkpoint", tiny_checkpoint, "Hi", "--trace", tmp_path / "trace.html").status == 0


def test_a_checkpoint_that_could_not_be_read_again_does_not_replace_one(tiny_checkpoint):  # noqa: F811
    loaded, before = weights.load(tiny_checkpoint), tiny_checkpoint.read_bytes()
    for record in ({"loss": np.float64(2.0)}, {"loss": lambda: 2.0}):
        with pytest.raises(InputError, match="could not be read again"):
            weights.save(tiny_checkpoint, loaded.model, loaded.encoding, record)
        assert tiny_checkpoint.read_bytes() == before
    assert [path.name for path in tiny_checkpoint.parent.iterdir()] == [tiny_checkpoint.name]


@pytest.mark.parametrize("script", [sample, train_tiny])
def test_an_empty_name_of_adapters_is_refused(call, script, tiny_checkpoint, tmp_path):  # noqa: F811
    where = ("--out", tmp_path / "run", "--init") if script is train_tiny else ("--checkpoint",)
    assert_one_sentence(call(script, *where, tiny_checkpoint, "--adapters", ""))
