"""The bench counts right, keeps what it has measured, and says what is wrong. How long anything takes is not tested."""

import importlib.util
import json
import math
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import random_model

from minipass import weights
from minipass.cli import run_script
from minipass.data import read_documents
from minipass.decode import Fused, Plain, TwoModels, TwoPass
from minipass.engine import Engine
from minipass.errors import InputError
from minipass.extras.benchmark import contenders, experiments, functions, subjects
from minipass.extras.benchmark.experiments import EXPERIMENTS, overview
from minipass.extras.benchmark.measuring import (
    Sample,
    figures,
    ours,
    quartiles,
    repeated_share,
    sample,
    seconds_in_turns,
    take_turns,
    wilson_interval,
)
from minipass.extras.benchmark.reporting import Report, picture
from minipass.model import GPT, GPTConfig
from minipass.sampling import Sampling
from minipass.texts import Turn
from minipass.tokenizer import build_encoding
from minipass.trees import Shape, chain

sys.path.insert(0, str(Path(__file__).parents[1]))
import bench  # noqa: E402

# Counting.


def test_quartiles_leave_out_what_could_not_be_measured():
    assert quartiles([4, 1, math.nan, 3, 2, 5]) == (2, 3, 4)
    assert quartiles([math.nan]) == (0, 0, 0)


def test_ratios_are_paired_before_their_median_is_taken():
    # The medians, 40 and 20, would say 2; but each prompt ran at 0.5, 4 and 1 times its own baseline.
    own, base = ([Sample([[1]], 1.0, rate) for rate in rates] for rates in ([5, 40, 100], [10, 10, 100]))
    assert figures(own, base)["speedup"] == pytest.approx((0.75, 1, 2.5))


def test_a_rate_leaves_out_what_came_with_the_first_turn():
    assert sample([[1, 2, 3], [4, 5, 6]], 2, began=10, first=11, ended=13) == Sample([[1, 2, 3], [4, 5, 6]], 1000, 2)
    assert math.isnan(sample([[1]], 1, 10, 11, 11).rate)


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [(0, 10, 0.0, 0.2775), (8, 10, 0.4902, 0.9433), (10, 10, 0.7225, 1.0), (50, 100, 0.4038, 0.5962)],
)
def test_wilson_intervals_are_those_of_the_tables(successes, trials, low, high):
    assert wilson_interval(successes, trials) == pytest.approx((low, successes / trials, high), abs=5e-5)


def test_repeated_share_counts_8_grams_that_were_there_before():
    assert repeated_share(range(20)) == 0
    assert repeated_share([7] * 17) == pytest.approx(9 / 10)  # ten 8-grams, one of them new
    assert repeated_share([1, 2, 3] * 5) == pytest.approx(5 / 8)
    assert repeated_share([1] * 7) == 0  # too short for one


def turn(tested: int, accepted: int) -> Turn:
    tokens = [[0] * (1 + accepted)]
    return Turn(tokens, [[]], [tested], [accepted], [True], Shape(chain(tested)), 0, [0])


def test_acceptance_and_tokens_of_a_pass_add_counts_of_all_prompts_not_shares():
    samples = [Sample([[0] * n], 1.0, 1.0, turns) for n, turns in ((5, [turn(2, 2), turn(1, 1)]), (1, [turn(1, 0)]))]
    found = figures(samples, samples)
    assert found["accepted_by_position"] == [2 / 3, 1]
    assert found["tokens_per_pass"] == 6 / 3


def fake(name: str, calls: list, rate: int = 1):
    """Continues the prompt n at rate x (n + 1) tokens a second."""

    def run(prompt: list[int], n_new: int, seed: int) -> Sample:
        calls.append((name, prompt[0], seed, n_new))
        return Sample([list(range(20))], 0.5, rate * (prompt[0] + 1))

    return run


def test_contenders_take_turns_within_each_prompt_and_the_warm_up_does_not_count():
    calls = []
    runs = [fake("plain", calls), fake("other", calls, rate=3)]
    samples = take_turns(runs, [[0], [1], [2]], 9, seed=5, title="test", warm_up=4)
    assert [len(own) for own in samples] == [3, 3]
    turns = [sorted(calls[i : i + 2]) for i in range(0, len(calls), 2)]
    expected = [(0, 5, 4), (0, 5, 9), (1, 6, 9), (2, 7, 9)]
    assert turns == [[("other", *each), ("plain", *each)] for each in expected]
    assert [calls[i][0] for i in (2, 4, 6)] == ["plain", "other", "plain"]  # not always the same one first
    found = figures(samples[1], samples[0])
    assert (found["speedup"], found["tokens_per_second"]) == ((3, 3, 3), (4.5, 6, 7.5))


def test_a_sample_keeps_its_turns_without_their_tensors(model, draft_model):
    for method in (Plain(), TwoPass(2), Fused(2), TwoModels(draft_model, 2)):
        found = ours(Engine(model, method))([1, 2, 3], 10, 0)
        assert len(found.texts[0]) == 10
        assert sum(len(turn.tokens[0]) for turn in found.turns) == 10
        assert all(turn.result is None for turn in found.turns)
    batch = ours(Engine(model, Fused(2)))([[1, 2, 3], [4]], 10, 0)
    assert [len(text) for text in batch.texts] == [10, 10]


def test_actions_are_timed_in_turns_after_a_warm_up():
    calls = []
    seconds = seconds_in_turns([lambda: calls.append(0), lambda: calls.append(1)], 4)
    assert seconds.shape == (4, 2)
    assert calls == [0, 1] * 7


# Quality.

SOURCE = '''
import os

def short(a): return a

class Box:
    @property
    def size(self) -> int:
        # a remark
        return 1

    async def fill(
        self,
        n=3,  # so many
    ):
        """Docstring."""
        def inner(x):

            return x
        return inner

def size(self) -> int:
    pass
'''


def test_heads_of_functions_are_found_once_and_without_decorators():
    heads = functions.function_heads([SOURCE, "def broken(:\n    pass\n", "def f():\n    '\0'"])
    assert sorted(heads) == [
        "async def fill(self, n=3):",
        "def inner(x):",
        "def short(a):",
        "def size(self) -> int:",
    ]


@pytest.mark.parametrize(
    ("completion", "kept"),
    [
        ("\n    return x\n\ny = 1\n", "\n    return x\n"),
        ("\n    if x:\n        return 1\n    retu", "\n    if x:\n        return 1"),
        (" return x\ndef g", " return x"),
        ("\n", ""),
    ],
)
def test_a_completion_is_cut_at_the_end_of_its_function(completion, kept):
    encoding, end = build_encoding([]), 256

    def complete(tokens: list[int]) -> list[str]:
        engine = SimpleNamespace(generate=lambda *_, **__: SimpleNamespace(tokens=[tokens]))
        return functions.complete(engine, encoding, ["def f(x):"], 9, 0)

    assert complete(encoding.encode(completion)) == ["def f(x):" + kept]
    assert complete([*encoding.encode(" return x\n  # half"), end]) == ["def f(x): return x\n  # half"]


# Peers, pictures.


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed")
def test_the_same_weights_in_transformers_write_the_same_text():
    model = random_model(seed=3, std=0.1).float()
    expected = ours(Engine(model, Plain()))([1, 2, 3], 12, 0)
    for name, form in contenders.forms(random_model(seed=3, std=0.1).float()).items():
        found = contenders.theirs(model, form, Sampling(), ())([1, 2, 3], 12, 0)
        assert found.texts == expected.texts, name
        assert found.rate > 0
        stopped = contenders.theirs(model, form, Sampling(), (expected.texts[0][3],))([1, 2, 3], 12, 0)
        assert stopped.texts[0] == expected.texts[0][: 1 + expected.texts[0].index(expected.texts[0][3])]


def test_a_table_says_the_middle_of_three_numbers_first_and_a_dash_for_nothing():
    report = Report()
    report.add(
        "rows", "Found:", [{"one_per_two": (1.0, 2.0, 30.0), "b": [], "c": None, "d": [0.5, 1.0]}], "one_per_two b c d"
    )
    assert report.parts[1].splitlines()[::2] == ["| one/two | b | c | d |", "| 2.00 (1.00 to 30) | - | - | 0.50 1.00 |"]


def test_pictures_are_opaque_and_have_a_panel_for_each_field():
    rows = [{"method": name, "text": "code", "a": (1.0, 2.0, 4.0), "b": None} for name in ("one", "two")]
    figure = picture(rows, ["text"], "method", "a", "b")
    assert [axes.get_ylabel() for axes in figure.axes] == ["a", "b"]
    assert figure.get_facecolor() == (1, 1, 1, 1)
    assert figure.axes[0].lines[0].get_ydata().tolist() == [2, 2]


def test_the_overview_needs_both_models_in_both_decodings_and_shows_auto():
    def rows(speedups: list[float]) -> dict:
        decodings = (contenders.GREEDY, contenders.SAMPLED)
        return {"rows": [
            {"method": method, "decoding": decoding, "speedup": [1, speedup, 9]}
            for decoding, speedup in zip(decodings, speedups, strict=False) for method in ("plain", "auto")
        ]}  # fmt: skip

    figure = overview({"headline": rows([1.5, 1.2]), "pretrained": rows([1.4, 1.1])})
    assert [bar.get_width() for bar in figure.axes[0].containers[1]] == [1.5, 1.2, 1.4, 1.1]
    for missing in ({}, {"headline": {"greedy": []}}, {"headline": rows([1.5, 1.2]), "pretrained": rows([1.4])}):
        assert overview(missing) is None


# The script.


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Random models over bytes, with a window of 64, and two files of small functions, of which one is held out."""
    folder = tmp_path_factory.mktemp("bench")
    torch.manual_seed(0)
    for name, n_lookahead in {"tiny": 3, "frozen": 3, "draft": 0}.items():
        model = GPT(GPTConfig(257, 64, 1, 2, 16, n_lookahead, n_draft=8 if name == "tiny" else 0))
        weights.save(folder / f"{name}.pt", model, build_encoding([]), {"stage": "joint", "loss": "kl"})
    (folder / "code").mkdir()
    for name in "ab":
        code = "".join(f"def {name}{i}(x):\n    return x + {i}\n\n" for i in range(50))
        (folder / f"code/{name}.py").write_text(code)
    return folder


@pytest.fixture
def run(folder, monkeypatch, capsys):
    """run("--flag", ...): exit status, output and errors of the script on the tiny model, with few and short texts."""
    monkeypatch.setattr(weights, "SHIPPED", folder)
    monkeypatch.setattr(subjects, "read_documents", lambda source: read_documents(
        folder / "code" if source == "docstrings" else source))  # fmt: skip
    monkeypatch.setattr(contenders, "LARGER", {"cpu": [(1, 2, 32), (1, 2, 32, 1, 48)]})
    monkeypatch.setattr(contenders, "REPEATS", 2)
    monkeypatch.setattr(contenders, "READ", 2**10)
    monkeypatch.setattr(experiments, "SMOLLM2", "no-such-model")
    few = "--prompts 2 --prompt-tokens 20 --new-tokens 16 --samples 3 --dtype float32 --device cpu".split()

    def run(*arguments) -> SimpleNamespace:
        files = ["--checkpoint", folder / "tiny.pt", "--data", folder / "code"]
        monkeypatch.setattr(sys, "argv", ["bench.py", *map(str, [*files, *few, *arguments])])
        status = 0
        try:
            run_script(bench.main)
        except SystemExit as stop:
            status = stop.code
        out, err = capsys.readouterr()
        return SimpleNamespace(status=status, out=out, err=err)

    return run


def test_a_full_run_writes_tables_figures_and_pictures_of_all_that_can_be_measured(run, folder, tmp_path):
    result = run("--full", "--json", tmp_path / "r.json", "--plots", tmp_path, "--compare", folder / "frozen.pt")
    assert result.status == 0, result.err
    found = json.loads((tmp_path / "r.json").read_text())["experiments"]
    left_out = {name for name in EXPERIMENTS if f"**{name}** is left out" in result.out}
    assert {"pretrained", "uses"} <= left_out <= {"pretrained", "uses", "peers"}
    assert set(found) == set(EXPERIMENTS) - left_out == {path.stem for path in tmp_path.glob("*.png")}
    assert all("torch" in each["setting"] and "commit" in each["setting"] for each in found.values())
    rows = {(row["decoding"], row["method"]): row for row in found["headline"]["rows"]}
    greedy = {"plain", "two-pass, L = 2", "fused, L = 2", "tree of 4 L, L = 2", "prompt lookup alone", "auto"}
    sampled = greedy | {"fused, rejection, L = 2"}
    assert set(rows) == {("greedy", name) for name in greedy} | {("T = 0.8, top-k 10", name) for name in sampled}
    for (decoding, name), row in rows.items():  # in float32
        coupled = decoding == "greedy" or not ("rejection" in name or name.startswith("two-pass"))
        assert (row["same_text"] == 1) == coupled, (decoding, name)
    assert rows["greedy", "plain"]["tokens_per_pass"] == 1
    assert {"two models, L = 2", "fused, no head, L = 2"} <= {row["method"] for row in found["methods"]["rows"]}
    assert len(found["batches"]["rows"]) == 8
    assert found["check"]["rows"][0]["predicted"] == 1
    assert found["quality"]["rows"][0]["as_plain"] == found["quality"]["rows"][1]["samples"] == 3
    assert [row["checkpoint"] for row in found["bases"]["rows"]] == [str(folder / "frozen.pt")]
    assert 0 < found["bases"]["rows"][0]["constant_acceptance"] < 1
    assert {row["model"] for row in found["cost"]["rows"]} == {
        "1 layers, width 16", "1 layers, width 32", "1 layers, width 32, Llama"
    }  # fmt: skip
    assert all(row["predicted"] > 0 for row in found["sizes"]["rows"])
    for line in result.out.splitlines():
        assert not line.startswith("|") or line.count("|") > 3


def test_by_default_the_headline_is_measured(run):
    result = run("--lookahead", 1, 3)
    assert result.status == 0, result.err
    assert result.out.count("| fused, L = 3 |") == 2  # greedy and sampled
    assert result.out.count("**headline**") == result.out.count("**") / 2 == 1


def test_where_there_is_little_text_the_batches_are_small(run, tmp_path):
    (tmp_path / "little.txt").write_text("four words, no more " * 60)
    for length in (1, 20):
        result = run("--only", "batches", "--prompt-tokens", length, "--data", tmp_path / "little.txt")
        assert result.status == 0, result.err


def test_a_checkpoint_without_look_ahead_tokens_has_no_curve(run, folder, tmp_path):
    result = run("--only", "acceptance", "bases", "--compare", folder / "draft.pt", "--plots", tmp_path)
    assert result.status == 0, result.err


def test_an_interrupt_keeps_what_was_measured_and_other_parts_stay(run, monkeypatch, tmp_path):
    def interrupted(_):
        """Is interrupted."""
        raise KeyboardInterrupt

    path = tmp_path / "r.json"
    assert run("--only", "acceptance", "--json", path).status == 0
    monkeypatch.setitem(EXPERIMENTS, "cost", interrupted)
    assert run("--only", "bases", "cost", "--json", path).status == 130
    found = json.loads(path.read_text())["experiments"]
    assert set(found) == {"acceptance", "bases"}


@pytest.mark.parametrize("fault", [KeyboardInterrupt, partial(InputError, "jinja2 is missing")], ids=repr)
def test_a_whole_result_stays_until_it_was_measured_anew_as_a_whole(fault, run, monkeypatch, tmp_path):
    def half(_):
        """Ends in the middle."""
        yield Report(["a table"], {"tables": 1})
        if len(results) != 1:
            raise fault()
        yield Report(["a table", "another"], {"tables": 2})

    path, results = tmp_path / "r.json", []
    for name in list(EXPERIMENTS):
        monkeypatch.delitem(EXPERIMENTS, name)
    monkeypatch.setitem(EXPERIMENTS, "half", half)
    for _ in range(3):  # the second run goes to its end
        run("--full", "--json", path)
        results.append(json.loads(path.read_text())["experiments"].get("half", {}).get("tables"))
    assert results == [1 if fault is KeyboardInterrupt else None, 2, 2]


MISTAKES = [
    ["--prompts", "0"],
    ["--prompt-tokens", "0"],
    ["--samples", "0"],
    ["--new-tokens", "1"],
    ["--new-tokens", "45"],  # 20 + 45 > 64
    ["--lookahead", "4"],
    ["--lookahead", "0"],
    ["--seed", "-1"],
    ["--dtype", "int4"],
    ["--device", "abacus"],
    ["--data", "/no/such/place"],
    ["--checkpoint", "no-such-model"],
    ["--draft-model", "no-such-model"],
    ["--compare", "no-such-folder"],
    ["--compare", "x" * 300],
    ["--json", "/"],
    ["--json", "/dev/zero"],
    ["--plots", "/dev/null/folder"],
    ["--cuda-graphs", "--device", "cpu"],
    ["--full", "--data", "/no/such/place"],
    ["--only", "quality", "--prompt-tokens", "3"],  # no head is so short
]


@pytest.mark.parametrize("arguments", MISTAKES, ids=lambda arguments: " ".join(arguments)[:40])
def test_a_mistake_is_one_sentence(run, arguments):
    result = run(*arguments)
    assert result.status == 2
    assert result.out == ""
    assert len(result.err.strip().splitlines()) == 1, result.err


def test_models_that_do_not_fit_are_one_sentence(run, folder, tmp_path):
    path = tmp_path / "other.pt"
    encoding = build_encoding([(97, 98)])
    weights.save(path, GPT(GPTConfig(258, 64, 1, 2, 16, 0)), encoding, {})
    for arguments, words in {("--draft-model", path): "other tokens", ("--checkpoint", path): "1..0"}.items():
        result = run(*arguments)
        assert (result.status, len(result.err.strip().splitlines())) == (2, 1)
        assert words in result.err
    for content in ('{"something": "else"}', '{"experiments": []}', "[]", "1", "[" * 100_000, "\xff"):
        (tmp_path / "r.json").write_text(content)
        assert run("--json", tmp_path / "r.json").status == 2
        assert (tmp_path / "r.json").read_text() == content


@pytest.mark.parametrize("arguments", [["--only", "everything"], ["--full", "--only", "cost"], ["--prompts", "many"]])
def test_an_unknown_word_is_refused_with_the_usage(run, arguments):
    result = run(*arguments)
    assert result.status == 2
    assert "usage: bench.py" in result.err
