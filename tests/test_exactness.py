"""The promise: every method samples exactly what plain decoding would. Greedy equality, enumeration, planted bugs."""

import random

import pytest
import torch
from conftest import chi_square_p_value, random_model, sequence_probabilities

import minipass.generate
from minipass.errors import InputError
from minipass.generate import ACCEPTED, METHODS, generate, stream
from minipass.sampling import draw, speculative_accept

DRAFTING = [method for method in METHODS if method != "autoregressive"]
SAMPLING = [{"temperature": 1.0}, {"temperature": 0.8, "top_k": 3}, {"temperature": 1.3, "top_p": 0.8}]
N_SAMPLES = 12_000


def plain_greedy(model, prompt: list[int], max_new_tokens: int, stop_token: int | None) -> list[int]:
    """Decoding without cache, drafts or batches: the whole text again for each token."""
    text = list(prompt)
    while len(text) < min(len(prompt) + max_new_tokens, model.config.block_size):
        text.append(model(torch.tensor([text]))[0, -1].argmax().item())
        if text[-1] == stop_token:
            break
    return text[len(prompt) :]


# Greedy: the same text, token for token.


@pytest.mark.parametrize("method", METHODS)
def test_greedy_text_equals_plain_decoding_for_any_prompt_length_and_draft_length(method, model, draft_model):
    rng = random.Random(method)
    for _ in range(25):
        prompt = [rng.randrange(11) for _ in range(rng.randint(1, 39))]  # up to the window's edge
        n_new, stop = rng.randint(1, 45), rng.choice([None, 3])
        result = generate(
            model, prompt, n_new, method=method, lookahead=rng.randint(1, 4), stop_token=stop, draft_model=draft_model
        )
        assert result.tokens == [plain_greedy(model, prompt, n_new, stop)]


@pytest.mark.parametrize("method", METHODS)
def test_each_text_of_a_ragged_batch_equals_the_same_prompt_alone(method, model, draft_model):
    rng = random.Random(method)
    for _ in range(6):
        prompts = [[rng.randrange(11) for _ in range(rng.randint(1, 39))] for _ in range(4)]
        n_new, stop = rng.randint(1, 45), rng.choice([None, 3])
        settings = {"method": method, "lookahead": rng.randint(1, 4), "stop_token": stop, "draft_model": draft_model}
        batch = generate(model, prompts, n_new, **settings)
        assert batch.tokens == [plain_greedy(model, prompt, n_new, stop) for prompt in prompts]


@pytest.mark.parametrize("method", METHODS)
def test_text_ends_at_the_window_and_never_has_more_than_max_new_tokens(method, model, draft_model):
    for prompt_length in (1, 34, 38, 39):
        for n_new in (1, 2, 3, 100):
            prompt = [5] * prompt_length
            (tokens,) = generate(model, prompt, n_new, method=method, draft_model=draft_model).tokens
            assert len(tokens) == min(n_new, model.config.block_size - prompt_length)


@pytest.mark.parametrize("method", ["pass", "pass-two-pass", "fixed-token"])
def test_pass_never_needs_more_passes_than_plain_decoding(method, model):
    rng = random.Random(0)
    for _ in range(20):
        prompt = [rng.randrange(11) for _ in range(5)]
        result = generate(model, prompt, rng.randint(1, 35), method=method, lookahead=rng.randint(1, 4))
        assert result.passes <= len(result.tokens[0])


# Temperature above 0: the distribution of whole texts, against exact enumeration.


@pytest.fixture(scope="module")
def tiny():
    """A model of 5 tokens whose drafts are sometimes kept; the prompts of the tests below are its texts."""
    return random_model(seed=5, std=0.5, vocab_size=5, block_size=16, n_layer=1, n_lookahead=3)


@pytest.fixture(scope="module")
def tiny_draft():
    return random_model(seed=6, vocab_size=5, block_size=16, n_layer=1, n_lookahead=0)


def sampled_p_value(model, prompts, n_new: int, which: int, *, draft_model=None, seed: int = 0, **settings) -> float:
    """Draws N_SAMPLES texts in one batch of the prompts repeated, and tests those of one prompt."""
    generator = torch.Generator().manual_seed(seed)
    batch = prompts * (N_SAMPLES // len(prompts))
    result = generate(model, batch, n_new, draft_model=draft_model, generator=generator, **settings)
    samples = [tuple(tokens) for tokens in result.tokens[which :: len(prompts)]]
    sampling = {name: settings[name] for name in ("temperature", "top_k", "top_p") if name in settings}
    return chi_square_p_value(samples, sequence_probabilities(model, prompts[which], n_new, **sampling))


@pytest.mark.parametrize("sampling", SAMPLING, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_texts_have_exactly_the_enumerated_distribution(method, sampling, tiny, tiny_draft):
    p_value = sampled_p_value(tiny, [[1, 2, 3]], 4, 0, method=method, lookahead=3, draft_model=tiny_draft, **sampling)
    assert p_value > 1e-3


@pytest.mark.parametrize("method", METHODS)
def test_texts_of_a_ragged_batch_have_exactly_the_enumerated_distribution(method, tiny, tiny_draft):
    prompts = [[4], [1, 2, 3], [0, 0, 2, 4, 1, 3]]
    for which in range(3):
        settings = {"method": method, "lookahead": 2, "draft_model": tiny_draft, "temperature": 0.9}
        assert sampled_p_value(tiny, prompts, 4, which, seed=which, **settings) > 1e-3


@pytest.mark.parametrize("method", DRAFTING)
def test_the_enumeration_sees_drafts_that_are_kept_and_drafts_that_are_not(method, tiny, tiny_draft):
    generator = torch.Generator().manual_seed(0)
    result = generate(
        tiny, [[1, 2, 3]] * 500, 4, method=method, temperature=1.0, draft_model=tiny_draft, generator=generator,
        lookahead=3,
    )  # fmt: skip
    assert 0.1 < result.acceptance[0] < 0.95


# Planted bugs: the same test must catch a sampler that is subtly wrong.


def without_residual(draft_tokens, draft_probs, target_probs, generator=None):
    """After a rejection draws from q, not from the residual."""
    n_accepted, _ = speculative_accept(draft_tokens, draft_probs, target_probs, generator)
    return n_accepted, draw(target_probs[torch.arange(len(n_accepted)), n_accepted], generator)


def without_bonus(draft_tokens, draft_probs, target_probs, generator=None):
    """When all drafts are kept, draws once more from the last draft's target instead of the one after it."""
    n_accepted, next_token = speculative_accept(draft_tokens, draft_probs, target_probs, generator)
    all_kept = n_accepted == draft_tokens.shape[1]
    if draft_tokens.shape[1]:
        next_token = torch.where(all_kept, draw(target_probs[:, -2], generator), next_token)
    return n_accepted, next_token


@pytest.mark.parametrize("bug", [without_residual, without_bonus])
@pytest.mark.parametrize("method", ["pass", "pass-two-pass", "speculative"])
def test_a_broken_acceptance_sampler_is_caught(method, bug, tiny, tiny_draft, monkeypatch):
    monkeypatch.setattr(minipass.generate, "speculative_accept", bug)
    settings = {"method": method, "lookahead": 1, "draft_model": tiny_draft, "temperature": 1.0}
    p_value = sampled_p_value(tiny, [[1, 2, 3]], 4, 0, **settings)
    assert p_value < 1e-6


@pytest.mark.parametrize("method", ["pass", "pass-two-pass"])
def test_top_k_on_one_side_only_is_caught(method, tiny, monkeypatch):
    def accept_with_untruncated_p(draft_tokens, draft_probs, target_probs, generator=None):
        """The ratio uses a draft distribution smeared as if top-k had not been applied to it."""
        untruncated = (draft_probs + 0.1) / (1 + 0.1 * draft_probs.shape[2])
        return speculative_accept(draft_tokens, untruncated, target_probs, generator)

    monkeypatch.setattr(minipass.generate, "speculative_accept", accept_with_untruncated_p)
    assert sampled_p_value(tiny, [[1, 2, 3]], 4, 0, method=method, lookahead=3, temperature=0.8, top_k=2) < 1e-6


# The records of a stream.


@pytest.mark.parametrize("method", METHODS)
def test_records_tell_what_was_drafted_and_what_became_of_it(method, model, draft_model):
    prompts, kept_counts = [[1, 2, 3], [4], [7, 8]], set()
    settings = {"method": method, "temperature": 1.0, "draft_model": draft_model, "lookahead": 3}
    texts = [[] for _ in prompts]
    for record in stream(model, prompts, 30, generator=torch.Generator().manual_seed(3), **settings):
        kept_counts.add(tuple(record.n_accepted))
        for b, tokens in enumerate(record.tokens):
            texts[b] += tokens
            assert len(tokens) == len(record.origins[b])
            kept = [token for token, origin in zip(tokens, record.origins[b], strict=True) if origin == ACCEPTED]
            assert len(kept) == record.n_accepted[b] <= record.n_tested[b]
            if record.drafts is not None:
                assert kept == record.drafts[b, : len(kept)].tolist()
        if record.drafts is not None:
            n_drafts = record.drafts.shape[1]
            assert record.draft_probs.shape == (3, n_drafts, 11)
            assert record.target_probs.shape == (3, n_drafts + 1, 11)
            assert (record.draft_probs.gather(2, record.drafts[..., None]) > 0).all()
    again = generate(model, prompts, 30, generator=torch.Generator().manual_seed(3), **settings)
    assert again.tokens == texts, "the same seed gives the same text, streamed or not"
    if method != "autoregressive":
        assert any(len(set(counts)) > 1 for counts in kept_counts), "each prompt keeps its own count"


def test_tokens_per_pass_follow_from_the_counts(model):
    plain = generate(model, [1, 2, 3], 20, method="autoregressive")
    assert (plain.passes, plain.tokens_per_pass, plain.acceptance) == (20, 1.0, [])
    records = list(stream(model, [1, 2, 3], 20, method="pass-two-pass", lookahead=2))
    assert all(record.passes == 2 for record in records[:-1])
    assert all(len(record.tokens[0]) == 2 + record.n_accepted[0] for record in records[:-1])
    records = list(stream(model, [1, 2, 3], 20, method="pass", lookahead=2))
    assert all(record.passes == 1 for record in records)
    assert all(len(record.tokens[0]) == 1 + record.n_accepted[0] for record in records[:-1])


@pytest.mark.parametrize(
    ("prompt", "settings"),
    [
        ([], {}),
        ([[1], []], {}),
        ([1] * 40, {}),
        ([11], {}),
        ([-1], {}),
        ([1], {"max_new_tokens": 0}),
        ([1], {"method": "magic"}),
        ([1], {"lookahead": 0}),
        ([1], {"lookahead": -2}),
        ([1], {"lookahead": 5}),
        ([1], {"temperature": -0.1}),
        ([1], {"temperature": float("nan")}),
        ([1], {"top_k": 0}),
        ([1], {"top_p": 0.0}),
        ([1], {"top_p": 1.1}),
        ([1], {"method": "speculative"}),
        ([1], {"method": "fixed-token", "fixed_token": 11}),
    ],
)
def test_bad_input_is_an_input_error(prompt, settings, model):
    with pytest.raises(InputError):
        generate(model, prompt, **({"max_new_tokens": 5} | settings))


def test_a_draft_model_with_another_vocabulary_is_an_input_error(model, tiny_draft):
    with pytest.raises(InputError):
        generate(model, [1], 5, method="speculative", draft_model=tiny_draft)
