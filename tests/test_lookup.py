"""Prompt lookup: what followed the last tokens when they stood before."""

import random
from itertools import pairwise

import pytest

from minipass.generate import generate, stream
from minipass.lookup import NGRAMS, PromptLookup


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
        lookup = PromptLookup(text[:cut])
        lookup.extend(text[cut:])
        assert lookup.drafts(5) == by_search(text, 5)
        found += bool(lookup.drafts(5))
    assert 0 < found < 300


def test_the_longest_of_several_places_decides_and_of_equal_ones_the_last():
    assert PromptLookup([1, 2, 3, 4, 0, 9, 3, 5, 0, 1, 2, 3]).drafts(1) == [4]
    assert PromptLookup([3, 4, 0, 3, 5, 0, 3]).drafts(2) == [5, 0]


def test_a_copy_that_reaches_the_end_goes_on_with_its_own_beginning():
    assert PromptLookup([7, 1, 2, 1, 2]).drafts(5) == [1, 2, 1, 2, 1]
    assert PromptLookup([4]).drafts(5) == []


@pytest.mark.parametrize("method", ["prompt-lookup", "pass"])
def test_text_that_repeats_itself_takes_few_passes(method, lively_model):
    loop = generate(lively_model, [8, 8, 8], 30, method="autoregressive").tokens[0]
    n_changes = sum(a != b for a, b in pairwise(loop))
    result = generate(lively_model, [8, 8, 8], 30, method=method, prompt_lookup=6)
    assert result.tokens == [loop]
    if n_changes < 5:
        assert result.tokens_per_pass > 2


def test_copied_drafts_have_all_of_p_and_those_of_a_text_without_a_copy_come_from_look_ahead_tokens(lively_model):
    prompts, mixed = [[1, 2, 3, 1, 2], [4, 5, 6]], 0
    for record in stream(lively_model, prompts, 20, method="pass", lookahead=2, temperature=1.0, prompt_lookup=3):
        if record.drafts is not None:
            own = record.draft_probs.gather(2, record.drafts[..., None]).squeeze(2)
            copied = (own == 1).all(1)
            mixed += copied.any().item() and not copied.all().item()
            if copied.any():
                assert record.drafts.shape[1] <= 3
            else:
                assert record.drafts.shape[1] <= 2
    assert mixed, "in some round one text was copied and the other was not"
