"""Prompt lookup: what followed the last tokens when they stood there before."""

import random

import pytest
from conftest import plain_text

from minipass.decode import Fused
from minipass.engine import Engine
from minipass.lookup import NGRAMS, PromptLookup, copied_drafts
from minipass.sampling import REJECTION, RULES, Sampling
from minipass.texts import Texts


def drafts(text: list[int], n_drafts: int) -> list[int]:
    """What a new index drafts after the text."""
    lookup = PromptLookup()
    lookup.extend(text)
    return lookup.drafts(n_drafts)


def by_search(text: list[int], n_drafts: int) -> list[int]:
    """The same without an index: the last place before the end at which the longest possible n-gram stands."""
    for n in NGRAMS:
        for start in range(len(text) - n - 1, -1, -1):
            if len(text) > n and text[start : start + n] == text[-n:]:
                copied = list(text)
                for i in range(n_drafts):
                    copied.append(copied[start + n + i])
                return copied[len(text) :]
    return []


def test_drafts_are_those_of_a_search_through_the_whole_text():
    rng, found = random.Random(0), 0
    for _ in range(300):
        text = [rng.randrange(6) for _ in range(rng.randint(1, 30))]
        cut = rng.randint(0, len(text))
        lookup = PromptLookup()
        lookup.extend(text[:cut])
        lookup.extend(text[cut:])
        assert lookup.drafts(5) == by_search(text, 5)
        found += bool(lookup.drafts(5))
    assert 0 < found < 300


def test_the_longest_of_several_places_decides_and_of_equal_ones_the_last():
    assert drafts([1, 2, 3, 4, 0, 9, 3, 5, 0, 1, 2, 3], 1) == [4]
    assert drafts([3, 4, 0, 3, 5, 0, 3], 2) == [5, 0]


def test_fewer_tokens_than_asked_for_lead_to_no_copy():
    lookup = PromptLookup()
    lookup.extend([1, 2, 3, 0, 2, 3])
    assert [lookup.drafts(1, shortest) for shortest in (1, 2, 3)] == [[0], [0], []]


def test_a_text_that_has_ended_neither_copies_nor_asks_for_look_ahead_tokens(model):
    texts = Texts([[1, 2, 1], [3, 4, 3], [5, 6]], 9, None, 0, model.config)
    texts.begin_window(with_ended=True)
    indices = [PromptLookup() for _ in texts.texts]
    assert copied_drafts(indices, texts, 2, 1) == [[2, 1], [4, 3], [-1, -1]]
    texts.wanted[1:] = 0, 0
    assert copied_drafts(indices, texts, 2, 1) == [[2, 1], [0, 0], [0, 0]]
    texts.wanted = [0, 0, 9]
    assert copied_drafts(indices, texts, 2, 1) is None


def test_a_copy_that_reaches_the_end_continues_with_its_own_beginning():
    assert drafts([7, 1, 2, 1, 2], 5) == [1, 2, 1, 2, 1]
    assert drafts([4], 5) == []


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("n", [0, 2])
def test_text_that_repeats_itself_takes_few_passes(n, rule, model):
    loop = plain_text(model, [8, 8, 8], 30)
    assert len(set(loop[10:])) == 1, "with random weights a model repeats one token"
    result = Engine(model, Fused(n, rule, lookup=6)).generate([8, 8, 8], 30)
    assert result.tokens == [loop]
    assert result.tokens_per_pass > 2


def test_under_rejection_copied_drafts_have_all_of_p_and_those_of_other_texts_have_a_look_ahead_tokens_p(lively_model):
    prompts, mixed = [[1, 2, 3, 1, 2], [4, 5, 6]], 0
    engine = Engine(lively_model, Fused(2, REJECTION, lookup=3), Sampling(1.0))
    for turn in engine.stream(prompts, 20):
        tokens, p = turn.result.drafts
        if tokens.shape[1]:
            copied = (p[:, :-1].gather(2, tokens[..., None]) == 1).squeeze(2).all(1)
            mixed += bool(copied.any() and not copied.all())
            assert tokens.shape[1] <= (3 if copied.any() else 2)
    assert mixed, "in some turn one text was copied and the other was not"
