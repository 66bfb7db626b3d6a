"""The one-liner and the package's public names."""

import inspect

import pytest

import minipass
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
