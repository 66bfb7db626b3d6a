"""The one-liner and the package's public names."""

import inspect
import shlex
import sys

import numpy as np
import pytest
import torch
from conftest import random_model

import minipass
import sample
from minipass.api import MAKERS, METHODS, make_method


def test_the_package_exports_what_its_list_says_and_the_list_is_sorted():
    assert all(hasattr(minipass, name) for name in minipass.__all__)
    assert sorted(minipass.__all__) == sorted(set(minipass.__all__))
    for name in (
        "GPT",
        "GPTConfig",
        "Engine",
        "Sampling",
        "load",
        "generate",
        "Plain",
        "TwoPass",
        "Fused",
        "TwoModels",
    ):
        assert name in minipass.__all__


def test_the_help_of_generate_names_every_method_and_every_argument():
    text = inspect.getdoc(minipass.generate)
    assert all(f'"{name}"' in text for name in METHODS)
    taken = [name for each in (minipass.generate, *MAKERS.values()) for name in inspect.signature(each).parameters]
    assert all(name in text for name in taken if name != "model")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_every_method_writes_the_text_of_plain_decoding_for_the_same_seed(method, temperature, model, draft_model):
    sampling = {"temperature": temperature, "top_k": 4, "seed": 3, "stop_token": [2, 7]}
    drafting = {"draft_model": draft_model} if method == "two-models" else {}
    drafting |= {} if method == "plain" else {"rule": "coupled"}
    plain = minipass.generate(model, [1, 2, 3], 30, "plain", **sampling)
    assert minipass.generate(model, [1, 2, 3], 30, method, **sampling, **drafting).tokens == plain.tokens


def test_the_lists_of_parents_and_a_tree_are_the_same_method():
    assert make_method("tree", tree=[0, 0, 1]) == make_method("tree", tree=minipass.DraftTree((0, 0, 1)))
    assert make_method("pass", lookahead=3, lookup=5) == minipass.Fused(3, lookup=5)
    assert make_method("two-pass", fixed_token=4) == minipass.TwoPass(fixed_token=4)
    assert make_method("prompt-lookup") == minipass.Fused(0, lookup=10)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("magic", {}),
        ("plain", {"lookahead": 2}),
        ("plain", {"rule": "coupled"}),
        ("plain", {"lookup": 2}),
        ("pass", {"lookahead": 0}),
        ("pass", {"tree": [0, 0]}),
        ("pass", {"rule": "magic"}),
        ("pass", {"lookahead": 2.0}),
        ("pass", {"lookup": -1}),
        ("tree", {"lookahead": 3}),
        ("tree", {"tree": [1]}),
        ("two-pass", {"lookup": 3}),
        ("two-pass", {"draft_model": "a name"}),
        ("two-models", {}),
        ("two-models", {"fixed_token": 3}),
    ],
)
def test_arguments_that_a_method_does_not_use_are_an_input_error(name, arguments):
    with pytest.raises(minipass.InputError):
        make_method(name, **arguments)


def test_each_example_in_the_help_of_sample_py_is_accepted(monkeypatch):
    examples = [line.split("   ")[0] for line in sample.EXAMPLES.replace("  python ", "").splitlines() if ".py" in line]
    assert len(examples) == 5
    for example in examples:
        monkeypatch.setattr(sys, "argv", shlex.split(example))
        assert sample.parse_arguments().variant


# What newcomers tried. Each is one sentence, or works.


@pytest.mark.parametrize(
    ("prompt", "settings"),
    [
        (5, {}),
        (None, {}),
        ("abc", {}),
        (["abc"], {}),
        ([[1], 2], {}),
        ([[[1, 2]]], {}),
        ([float("nan")], {}),
        ([float("inf")], {}),
        ([None], {}),
        ([1.5], {}),
        ([1], {"stop_token": "a"}),
        ([1], {"stop_token": [None]}),
        ([1], {"stop_token": 3.0}),
        ([1], {"stop_token": 99}),
        ([1], {"stop_token": [2, 99]}),
        ([1], {"method": "prompt-lookup", "lookup": 10**12}),
        ([1], {"lookahead": 10**12}),
        ([1], {"seed": 1.5}),
        ([1], {"seed": None}),
        ([1], {"seed": [1, 2]}),
        ([1], {"seed": -1}),
        ([1], {"temperature": "1"}),
        ([1], {"temperature": None}),
        ([1], {"top_k": 2.5}),
        ([1], {"temperature": 1, "top_p": "0.5"}),
        ([1], {"method": ["pass"]}),
        ([1], {"lookahead": [2]}),
        ([1], {"lookup": 2.0}),
        ([1], {"method": "tree", "tree": 5}),
        ([1], {"method": "tree", "tree": ("a",)}),
        ([1], {"method": "tree", "tree": (0, 0.0)}),
        ([1], {"method": "two-models", "draft_model": "small"}),
        ([1], {"method": "two-pass", "fixed_token": "a"}),
    ],
)
def test_odd_arguments_are_an_input_error(prompt, settings, model):
    with pytest.raises(minipass.InputError):
        minipass.generate(model, prompt, 5, **settings)


def test_numbers_of_numpy_and_torch_are_as_good_as_pythons(model):
    plain = minipass.generate(model, [1, 2, 3], 5, temperature=1.0, top_k=3, seed=4, stop_token=2)
    for prompt in (np.array([1, 2, 3]), torch.tensor([[1, 2, 3]]), (1, 2, 3), [np.int64(1), 2, torch.tensor(3)]):
        odd = {"top_k": np.int64(3), "seed": np.int64(4), "stop_token": torch.tensor(2), "lookahead": np.int32(2)}
        assert minipass.generate(model, prompt, np.int64(5), temperature=np.float32(1), **odd).tokens == plain.tokens


@pytest.mark.parametrize(
    "arguments",
    [
        lambda model: (model, "pass"),
        lambda model: (model, None),
        lambda model: (model, minipass.Fused),
        lambda model: (minipass.load("joint"),),
        lambda model: (model, minipass.Fused(2), 0.8),
    ],
)
def test_an_engine_says_what_it_needs(arguments, model):
    with pytest.raises(minipass.InputError, match="an Engine needs a"):
        minipass.Engine(*arguments(model))


def test_two_models_need_a_second_one_that_fits(model):
    with pytest.raises((minipass.InputError, TypeError)):
        minipass.TwoModels()
    with pytest.raises(minipass.InputError):
        minipass.TwoModels(None)
    small = random_model(seed=5, block_size=20, n_layer=1, n_lookahead=0)
    with pytest.raises(minipass.InputError, match="window"):
        minipass.generate(model, [1] * 30, 5, "two-models", draft_model=small)


def test_a_large_vocabulary_with_a_head_and_a_draft_model_works():
    sizes = {"vocab_size": 20_000, "n_layer": 1, "n_embd": 4, "n_head": 1}
    model, draft_model = random_model(seed=3, n_draft=8, **sizes), random_model(seed=4, n_lookahead=0, **sizes)
    plain = minipass.generate(model, [1, 2], 6, "plain").tokens
    assert minipass.generate(model, [1, 2], 6, "two-models", draft_model=draft_model).tokens == plain
    assert minipass.generate(model, [1, 2], 6, "tree").tokens == plain


@pytest.mark.parametrize("rule", ["coupled", "rejection"])
def test_a_text_that_ends_far_past_its_limit_stays_in_its_cache(rule):
    """It overshoots by copied drafts, and stays in the batch while a wide tree writes its rows."""
    model = random_model(seed=1, n_lookahead=4)
    with torch.no_grad():
        model.wte.weight[2] *= 30  # a token that repeats for ever
    tree = minipass.DraftTree((0, 0, 0, 1, 1, 2, 4))
    engine = minipass.Engine(model, minipass.Fused(tree, rule, lookup=10), minipass.Sampling(1.0))
    texts = engine.generate([[2] * 20, [5], [7], [9], [11 % 11]], 23, seed=1).tokens
    assert [len(text) for text in texts] == [23] * 5
