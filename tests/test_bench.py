"""The bench counts right, keeps what it has measured, and says what is wrong. How long anything takes is not tested."""

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import random_model

from minipass import weights
from minipass.cli import run_script
from minipass.data import read_documents
from minipass.decode import Engine, Fused, Plain, TwoModels, TwoPass
from minipass.errors import InputError
from minipass.extras.benchmark import contenders, costs, experiments, peers, quality, trained
from minipass.extras.benchmark.measuring import (
    Contender,
    Sample,
    accepted_by_position,
    figures,
    ours,
    paired_quartiles,
    pass_seconds,
    predicted_speedup,
    prefill_seconds,
    quartiles,
    repeated_share,
    take_turns,
    wilson_interval,
)
from minipass.extras.benchmark.plots import Line, Panel, curves, intervals
from minipass.model import GPT, GPTConfig
from minipass.sampling import Sampling
from minipass.texts import Generation
from minipass.tokenizer import build_encoding

sys.path.insert(0, str(Path(__file__).parents[1]))
import bench  # noqa: E402

# Counting.


def test_quartiles_leave_out_what_could_not_be_measured():
    assert quartiles([4, 1, math.nan, 3, 2, 5]) == [2, 3, 4]
    assert quartiles([math.nan]) == [0, 0, 0]


def test_ratios_are_paired_before_their_median_is_taken():
    # The medians, 40 and 20, would say 2; but each prompt ran at 0.5, 4 and 1 times its own baseline.
    assert paired_quartiles([5, 40, 100], [10, 10, 100]) == pytest.approx([0.75, 1, 2.5])


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [(0, 10, 0.0, 0.2775), (8, 10, 0.4902, 0.9433), (10, 10, 0.7225, 1.0), (50, 100, 0.4038, 0.5962)],
)
def test_wilson_intervals_are_those_of_the_tables(successes, trials, low, high):
    assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=5e-5)


def test_repeated_share_counts_8_grams_that_were_there_before():
    assert repeated_share(range(20)) == 0
    assert repeated_share([7] * 17) == pytest.approx(9 / 10)  # ten 8-grams, one of them new
    assert repeated_share([1, 2, 3] * 5) == pytest.approx(5 / 8)
    assert repeated_share([1] * 7) == 0  # too short for one


def test_accepted_by_position_adds_counts_not_shares():
    first, second = Generation(tested=[10, 2], accepted=[5, 1]), Generation(tested=[30], accepted=[0])
    assert accepted_by_position([first, second]) == [5 / 40, 1 / 2]


def test_the_cost_model_is_tokens_over_the_cost_of_the_passes_made():
    # 12 tokens in 4 passes that cost 1.5 each: 3 tokens/pass x t(1) / t(rows) = 3 / 1.5.
    assert predicted_speedup(12, [(0, 9)] * 4, {(0, 9): 1.5}) == pytest.approx(2)
    # Two models: 2 passes of the draft model for each of the target.
    assert predicted_speedup(6, [(1, 2), (1, 1), (0, 3)] * 2, {(1, 2): 0.3, (1, 1): 0.2, (0, 3): 1}) == pytest.approx(2)


def fake(name: str, calls: list, n_prompts: int = 3, baseline: Contender | None = None, rate: int = 1) -> Contender:
    """A contender whose samples decode rate x (prompt + 1) tokens in a second."""

    def run(prompt: list[int], seed: int) -> Sample:
        calls.append((name, prompt[0], seed))
        return Sample(list(range(20)), 0.5, rate * (prompt[0] + 1), 1.0)

    return Contender(name, [[index] for index in range(n_prompts)], run, None, baseline)


def test_contenders_take_turns_within_each_prompt_and_the_warm_up_does_not_count():
    calls = []
    plain, other = fake("plain", calls), fake("other", calls)
    samples = take_turns([plain, other], seed=5, title="test")
    assert [len(own) for own in samples] == [3, 3]
    turns = [sorted(calls[i : i + 2]) for i in range(0, len(calls), 2)]
    assert turns == [[("other", p, 5 + p), ("plain", p, 5 + p)] for p in (0, 0, 1, 2)]
    assert [calls[i][0] for i in (2, 4, 6)] == ["plain", "other", "plain"]  # not always the same one first


def test_each_contender_is_compared_with_its_own_baseline():
    calls = []
    plain, frozen = fake("plain", calls), fake("frozen", calls, rate=2)
    rivals = [plain, fake("a", calls, baseline=plain, rate=3), frozen, fake("b", calls, baseline=frozen, rate=3)]
    rows = figures(rivals, take_turns(rivals, 0, "test"))
    assert [row["speedup"][1] for row in rows] == [1, 3, 1, 1.5]
    assert rows[1]["tokens_per_second"] == [4.5, 6, 7.5]
    assert [row["same_text"] for row in rows] == [1, 1, 1, 1]


def test_a_sample_records_the_rows_of_each_pass_after_the_first_turn(model, draft_model):
    prompt, passes = [1, 2, 3], {}
    for method in (Plain(), TwoPass(2), Fused(2), TwoModels(draft_model, 2)):
        sample = ours("ours", Engine(model, method), [prompt], 10).run(prompt, 0)
        assert (len(sample.tokens), sample.n_decoded) == (10, 9), "the first turn emits one token"
        assert len([each for each in sample.passes if each[0] == 0]) == sample.counts.passes - 1
        passes[type(method)] = sample.passes
    assert passes[Plain] == [(0, 1)] * 9
    assert passes[TwoPass][:2] == [(0, 3), (0, 3)]  # verify, draft
    assert passes[Fused][0] == (0, 9)
    assert passes[TwoModels][:3] == [(1, 2), (1, 1), (0, 3)]


def test_passes_are_timed_in_turns_for_two_models(model, draft_model):
    seconds = pass_seconds([model, draft_model], [(0, 1), (0, 9), (1, 2)], context=5, repeats=4)
    assert seconds.shape == (4, 3)
    assert (seconds > 0).all()


def test_prefill_is_timed_for_each_prompt(model):
    assert all(seconds > 0 for seconds in prefill_seconds(model, [[1], [2, 3], [4] * 40]))


@torch.no_grad()
def test_a_constant_p_is_accepted_as_often_as_the_mean_distribution_meets_each(model):
    windows = torch.tensor([[1, 2, 3, 4, 5], [5, 4, 3, 2, 1]])
    q = model(windows).softmax(-1).flatten(0, 1)
    p = q.mean(0)
    expected = sum(min(p[token], each[token]).item() for each in q for token in range(11)) / 10
    assert trained.constant_acceptance(model, windows) == pytest.approx(expected, abs=1e-5)


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


def test_heads_of_functions_are_found_once_and_without_indentation():
    heads = quality.function_heads([SOURCE, "def broken(:\n    pass\n"])
    assert sorted(heads) == [
        "async def fill(\n    self,\n    n=3,  # so many\n):",
        "def inner(x):",
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
    assert quality.cut_function("def f(x):", completion) == "def f(x):" + kept


def test_a_head_of_several_lines_is_not_taken_for_the_functions_end():
    head = "def f(\n    x,\n):"
    assert quality.cut_function(head, "\n    pass\nend") == head + "\n    pass"
    assert quality.parses(head + "\n    pass")
    assert not quality.parses(head)
    assert not quality.parses("def f():\n    '\0'")


def test_log_likelihood_is_the_mean_over_each_texts_own_tokens(model):
    prompts, texts = [[1, 2], [3, 4, 5]], [[6, 7, 8], [9]]
    found = quality.log_likelihood(model, prompts, texts)
    for prompt, text, value in zip(prompts, texts, found, strict=True):
        log_p = model(torch.tensor([prompt + text]))[0].log_softmax(-1)
        expected = [log_p[len(prompt) + i - 1, token].item() for i, token in enumerate(text)]
        assert value == pytest.approx(sum(expected) / len(expected), abs=1e-5)


# Training runs, peers, pictures.


def test_a_training_curve_has_minutes_and_the_first_position(tmp_path):
    log = tmp_path / "log.jsonl"
    assert trained.training_curve(log, {}) == []
    log.write_text('{"step": 1}\n{"step": 5, "acceptance": [0.3, 0.1]}\n{"step": 10, "acceptance": []}\n')
    assert trained.training_curve(log, {"step": 10, "seconds": 120}) == [(1.0, 0.3)]
    log.write_text("no log\n")
    with pytest.raises(InputError, match="not the log"):
        trained.training_curve(log, {"step": 10, "seconds": 120})


@pytest.mark.skipif(not peers.installed(), reason="transformers is not installed")
def test_the_same_weights_in_transformers_write_the_same_text():
    model = random_model(seed=3, std=0.1).float()
    plain = ours("plain", Engine(model, Plain()), [[1, 2, 3]], 12)
    theirs, difference = peers.contenders(model, random_model(seed=3, std=0.1).float(), plain, 12, [2], Sampling())
    assert difference < 1e-4
    expected = plain.run([1, 2, 3], 0).tokens
    for contender in theirs:
        sample = contender.run([1, 2, 3], 0)
        assert sample.tokens == expected, contender.name
        assert 0 < sample.n_decoded < 12


def test_pictures_are_opaque_and_mark_the_best():
    figure = curves([Panel("x", "y", [Line("a", [1, 2], [3, 4], 0, best=1)], {"ylim": (0, 9)}), Panel("x", "y", [])])
    ringed = figure.axes[0].lines[1]
    assert (ringed.get_xdata()[0], ringed.get_ydata()[0]) == (2, 4)
    assert figure.get_facecolor() == (1, 1, 1, 1)
    assert len(intervals([("one", [("a", 1, 2, 3)]), ("two", [("b", 1, 2, 3)])], "x", 1.0).axes) == 2


# The script.


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Random models over bytes, with a window of 64, and two files of small functions, of which one is held out."""
    folder = tmp_path_factory.mktemp("bench")
    torch.manual_seed(0)
    for name, n_lookahead in {"tiny": 3, "frozen": 3, "draft": 0}.items():
        model = GPT(GPTConfig(257, 64, 1, 2, 16, n_lookahead))
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
    monkeypatch.setattr(contenders, "read_documents", lambda source: read_documents(
        folder / "code" if source == "docstrings" else source))  # fmt: skip
    monkeypatch.setattr(costs, "LARGER", ((1, 2, 32),))
    monkeypatch.setattr(costs, "PASS_REPEATS", 2)
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


def test_a_full_run_writes_tables_figures_and_pictures(run, folder, tmp_path):
    result = run("--full", "--json", tmp_path / "r.json", "--plots", tmp_path, "--compare", folder / "frozen.pt")
    assert result.status == 0, result.err
    found = json.loads((tmp_path / "r.json").read_text())["experiments"]
    assert list(found) == list(experiments.EXPERIMENTS)
    assert all("torch" in each["setting"] and "commit" in each["setting"] for each in found.values())
    greedy = {(row["method"], row["lookahead"]): row for row in found["headline"]["greedy"]}
    assert set(greedy) == {
        ("plain", None),
        ("two-pass", 2),
        ("fused", 2),
        ("fused + prompt lookup", 2),
        ("prompt lookup alone", None),
        ("tree of 4 L", 2),
        ("two models", 2),
    }
    sampled = {row["method"]: row for row in found["headline"]["T = 0.8, top-k 10"]}
    rejection = {"two-pass", "fused, rejection", "tree of 4 L, rejection"}
    assert set(sampled) == {name for name, _ in greedy} | rejection
    coupled = [row for name, row in sampled.items() if name not in rejection]
    assert all(row["same_text"] == 1 for row in [*greedy.values(), *coupled])  # in float32
    assert all(sampled[name]["same_text"] < 1 for name in rejection)
    assert greedy["plain", None]["tokens_per_pass"] == 1
    frozen = {row["method"] for row in found["methods"]["settings"][0]["rows"]}
    assert {"plain, frozen", "two-pass, fixed token", "two-pass, frozen"} <= frozen
    assert found["check"]["rows"][0]["predicted"] == pytest.approx(1)
    assert found["quality"]["rows"][0]["samples"] == 3
    assert [row["checkpoint"] for row in found["bases"]["rows"]] == [str(folder / "frozen.pt")]
    assert 0 < found["bases"]["rows"][0]["constant_acceptance"] < 1
    assert all(row["speedup"] > 0 for row in found["sizes"]["rows"])
    pictures = {"headline", "methods", "lookahead", "acceptance", "bases", "cost", "sizes", "quality"}
    assert pictures <= {path.stem for path in tmp_path.glob("*.png")}
    for line in result.out.splitlines():
        assert not line.startswith("|") or line.count("|") > 3


def test_by_default_the_headline_is_measured_and_a_draft_model_is_optional(run, monkeypatch, tmp_path):
    monkeypatch.setattr(weights, "SHIPPED", tmp_path)
    result = run("--lookahead", 1, 3)
    assert result.status == 0, result.err
    assert result.out.count("| fused | 3 |") == 2  # greedy and sampled
    assert "No row for two models" in result.out
    assert "| two models |" not in result.out


def test_an_interrupt_keeps_what_was_measured_and_other_parts_stay(run, monkeypatch, tmp_path):
    def interrupted(_):
        """Is interrupted."""
        raise KeyboardInterrupt

    path = tmp_path / "r.json"
    assert run("--only", "acceptance", "--json", path).status == 0
    monkeypatch.setitem(experiments.EXPERIMENTS, "cost", interrupted)
    assert run("--only", "check", "cost", "--json", path).status == 130
    found = json.loads(path.read_text())["experiments"]
    assert set(found) == {"acceptance", "check"}


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
    ["--frozen", "no-such-model"],
    ["--draft-model", "no-such-model"],
    ["--compare", "no-such-folder"],
    ["--compare", "x" * 300],
    ["--json", "/"],
    ["--plots", "/dev/null/folder"],
    ["--cuda-graphs", "--device", "cpu"],
    ["--compile", "--device", "cpu"],
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
    for arguments, words in {("--draft-model", path): "other tokens", ("--checkpoint", path): "no look-ahead"}.items():
        result = run(*arguments)
        assert (result.status, len(result.err.strip().splitlines())) == (2, 1)
        assert words in result.err
    (tmp_path / "r.json").write_text('{"something": "else"}')
    assert run("--json", tmp_path / "r.json").status == 2
    assert (tmp_path / "r.json").read_text() == '{"something": "else"}'


@pytest.mark.parametrize("arguments", [["--only", "everything"], ["--full", "--only", "cost"], ["--prompts", "many"]])
def test_an_unknown_word_is_refused_with_the_usage(run, arguments):
    result = run(*arguments)
    assert result.status == 2
    assert "usage: bench.py" in result.err
