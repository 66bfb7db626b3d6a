"""The promise: every method samples exactly what plain decoding would. Greedy equality, enumeration, planted bugs."""

import random
from itertools import pairwise

import pytest
import torch
from conftest import chi_square_p_value, random_model, sequence_probabilities

import minipass.decoder
from minipass.decoder import TARGET
from minipass.errors import InputError
from minipass.generate import ACCEPTED, BONUS, CORRECTED, FREE, METHODS, RULES, generate, stream
from minipass.layout import DraftTree
from minipass.sampling import draw, probabilities, speculative_accept

TREE = DraftTree((0, 0, 0, 1, 1, 2, 4))  # three drafts for the next token, two and one behind, one more behind one
WAYS = {method: {"method": method} for method in METHODS if method != "pass-tree"} | {
    f"pass-tree {rule}": {"method": "pass-tree", "tree": TREE, "rule": rule} for rule in RULES
}
WAYS |= {f"{method} copying": {"method": method, "prompt_lookup": 3} for method in ("pass", "pass-tree")}
CHAINS = [method for method in METHODS if method != "pass-tree"]  # the records of trees: test_tree.py
DRAFTING = [way for way in WAYS if way != "autoregressive"]
SAMPLING = [{"temperature": 1.0}, {"temperature": 0.8, "top_k": 3}, {"temperature": 1.3, "top_p": 0.8}]
N_SAMPLES = 12_000


def n_passes(record) -> int:
    """Of the target."""
    return [which for which, _ in record.passes].count(TARGET)


def plain_greedy(model, prompt: list[int], max_new_tokens: int, stop_token: int | None) -> list[int]:
    """Decoding without cache, drafts or batches: the whole context again for each token."""
    context, new = list(prompt), []
    while len(new) < max_new_tokens and (not new or new[-1] != stop_token):
        if len(context) == model.config.block_size:
            context = context[model.config.block_size - model.config.block_size // 2 :]
        new.append(model(torch.tensor([context]))[0, -1].argmax().item())
        context.append(new[-1])
    return new


# Greedy: the same text, token for token.


@pytest.mark.parametrize("method", WAYS)
def test_greedy_text_equals_plain_decoding_for_any_prompt_length_and_draft_length(method, lively_model, lively_draft):
    rng = random.Random(method)
    for _ in range(25):
        prompt = [rng.randrange(11) for _ in range(rng.randint(1, 39))]  # up to the window's edge
        n_new, stop = rng.randint(1, 45), rng.choice([None, 3])
        result = generate(
            lively_model,
            prompt,
            n_new,
            **WAYS[method],
            lookahead=rng.randint(1, 4),
            stop_token=stop,
            draft_model=lively_draft,
        )
        assert result.tokens == [plain_greedy(lively_model, prompt, n_new, stop)]


@pytest.mark.parametrize("method", WAYS)
def test_each_text_of_a_ragged_batch_equals_the_same_prompt_alone(method, lively_model, lively_draft):
    rng = random.Random(method)
    for _ in range(6):
        prompts = [[rng.randrange(11) for _ in range(rng.randint(1, 39))] for _ in range(4)]
        n_new, stop = rng.randint(1, 45), rng.choice([None, 3])
        settings = {**WAYS[method], "lookahead": rng.randint(1, 4), "stop_token": stop, "draft_model": lively_draft}
        batch = generate(lively_model, prompts, n_new, **settings)
        assert batch.tokens == [plain_greedy(lively_model, prompt, n_new, stop) for prompt in prompts]


@pytest.mark.parametrize("method", WAYS)
def test_text_goes_on_past_the_window_and_never_has_more_than_max_new_tokens(method, lively_model, lively_draft):
    for prompt_length in (1, 34, 38, 39):
        for n_new in (1, 2, 3, 100):
            prompt = [5] * prompt_length
            (tokens,) = generate(lively_model, prompt, n_new, **WAYS[method], draft_model=lively_draft).tokens
            assert len(tokens) == n_new
            assert tokens == plain_greedy(lively_model, prompt, n_new, None)


@pytest.mark.parametrize(
    "method",
    [way for way in WAYS if not way.startswith("speculative")],
)
def test_pass_never_needs_more_passes_than_plain_decoding(method, lively_model):
    rng = random.Random(0)
    for _ in range(20):
        prompt = [rng.randrange(11) for _ in range(5)]
        n_new, stop = rng.randint(1, 35), rng.choice([None, 3])
        result = generate(lively_model, prompt, n_new, **WAYS[method], lookahead=rng.randint(1, 4), stop_token=stop)
        assert result.passes <= len(result.tokens[0])


def test_greedy_texts_go_on_changing_so_that_equality_means_something(lively_model):
    rng = random.Random(0)
    prompts = [[rng.randrange(11) for _ in range(rng.randint(1, 10))] for _ in range(20)]
    texts = generate(lively_model, prompts, 20, method="autoregressive").tokens
    changes = [before != after for text in texts for before, after in pairwise(text)]
    assert sum(changes) / len(changes) > 0.4
    assert len(set(map(tuple, texts))) == len(prompts)


@pytest.mark.parametrize("method", [way for way in DRAFTING if way != "fixed-token"])
def test_greedy_texts_have_drafts_that_are_kept_and_drafts_that_are_not(method, lively_model, lively_draft):
    rng = random.Random(0)
    prompts = [[rng.randrange(11) for _ in range(rng.randint(1, 10))] for _ in range(20)]
    result = generate(lively_model, prompts, 20, **WAYS[method], draft_model=lively_draft)
    assert 0.05 < sum(result.accepted) / sum(result.tested) < 0.9


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
    sampling = {name: settings[name] for name in ("temperature", "top_k", "top_p", "stop_token") if name in settings}
    return chi_square_p_value(samples, sequence_probabilities(model, prompts[which], n_new, **sampling))


@pytest.mark.parametrize("sampling", SAMPLING, ids=str)
@pytest.mark.parametrize("method", WAYS)
def test_texts_have_exactly_the_enumerated_distribution(method, sampling, tiny, tiny_draft):
    p_value = sampled_p_value(tiny, [[1, 2, 3]], 4, 0, **WAYS[method], lookahead=3, draft_model=tiny_draft, **sampling)
    assert p_value > 1e-3


@pytest.mark.parametrize("method", WAYS)
def test_texts_of_a_ragged_batch_have_exactly_the_enumerated_distribution(method, tiny, tiny_draft):
    prompts = [[4], [1, 2, 3], [0, 0, 2, 4, 1, 3]]
    for which in range(3):
        settings = {**WAYS[method], "lookahead": 2, "draft_model": tiny_draft, "temperature": 0.9}
        assert sampled_p_value(tiny, prompts, 4, which, seed=which, **settings) > 1e-3


@pytest.mark.parametrize("method", WAYS)
def test_texts_that_a_stop_token_ends_have_exactly_the_enumerated_distribution(method, tiny, tiny_draft):
    settings = {**WAYS[method], "lookahead": 3, "draft_model": tiny_draft, "temperature": 1.0, "stop_token": 3}
    assert sampled_p_value(tiny, [[1, 2, 3]], 4, 0, **settings) > 1e-3


@pytest.mark.parametrize("method", WAYS)
def test_texts_that_go_past_the_window_have_exactly_the_enumerated_distribution(method, tiny, tiny_draft):
    prompts = [[1, 2, 0, 4, 4, 0, 3, 2, 1, 1, 0, 2, 3], [4]]  # room for 3 more tokens, and for many
    for which in range(2):
        settings = {**WAYS[method], "lookahead": 3, "draft_model": tiny_draft, "temperature": 1.0}
        assert sampled_p_value(tiny, prompts, 4, which, seed=which, **settings) > 1e-3


@pytest.mark.parametrize("method", DRAFTING)
def test_the_enumeration_sees_drafts_that_are_kept_and_drafts_that_are_not(method, tiny, tiny_draft):
    generator = torch.Generator().manual_seed(0)
    result = generate(
        tiny, [[1, 2, 3]] * 500, 4, **WAYS[method], temperature=1.0, draft_model=tiny_draft, generator=generator,
        lookahead=3,
    )  # fmt: skip
    assert 0.1 < result.acceptance[0] < 0.99


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
    monkeypatch.setattr(minipass.decoder, "speculative_accept", bug)
    settings = {**WAYS[method], "lookahead": 1, "draft_model": tiny_draft, "temperature": 1.0}
    p_value = sampled_p_value(tiny, [[1, 2, 3]], 4, 0, **settings)
    assert p_value < 1e-6


@pytest.mark.parametrize("side", ["draft", "target"])
@pytest.mark.parametrize("method", ["pass", "pass-two-pass"])
def test_top_k_on_one_side_of_the_ratio_only_is_caught(method, side, tiny, monkeypatch):
    without_top_k = {}  # by the memory of the truncated distributions: the same ones before truncation

    def probabilities_twice(logits, temperature, top_k, top_p):
        probs = probabilities(logits, temperature, top_k, top_p)
        without_top_k[probs.data_ptr()] = probabilities(logits, temperature)
        return probs

    def accept_with_one_side_untruncated(draft_tokens, draft_probs, target_probs, generator=None):
        if draft_tokens.shape[1] and side == "draft":
            draft_probs = without_top_k[draft_probs.data_ptr()][:, : draft_probs.shape[1]]
        if side == "target":
            target_probs = without_top_k[target_probs.data_ptr()]
        return speculative_accept(draft_tokens, draft_probs, target_probs, generator)

    monkeypatch.setattr(minipass.decoder, "probabilities", probabilities_twice)
    monkeypatch.setattr(minipass.decoder, "speculative_accept", accept_with_one_side_untruncated)
    assert sampled_p_value(tiny, [[1, 2, 3]], 4, 0, **WAYS[method], lookahead=3, temperature=0.8, top_k=2) < 1e-6


# The records of a stream.


@pytest.mark.parametrize("method", CHAINS)
def test_records_tell_what_was_drafted_and_what_became_of_it(method, model, draft_model):
    prompts, kept_counts = [[1, 2, 3], [4], [7, 8]], set()
    settings = {**WAYS[method], "temperature": 1.0, "draft_model": draft_model, "lookahead": 3}
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
            assert (record.draft_probs.gather(2, record.drafts[..., None]) > 0)[record.active].all()
    again = generate(model, prompts, 30, generator=torch.Generator().manual_seed(3), **settings)
    assert again.tokens == texts, "the same seed gives the same text, streamed or not"
    if method != "autoregressive":
        assert any(len(set(counts)) > 1 for counts in kept_counts), "each prompt keeps its own count"


@torch.no_grad()
@pytest.mark.parametrize("method", [method for method in CHAINS[1:] if method != "prompt-lookup"])
def test_recorded_distributions_are_what_the_models_say_of_the_text_so_far(method, lively_model, lively_draft):
    """Exactness holds for any p, so only this test sees drafts that come from the wrong look-ahead rows."""
    sampling = {"temperature": 0.9, "top_k": 6}
    stand_ins = [7] * 3 if method == "fixed-token" else [11, 12, 13]  # [LA]_1, [LA]_2, [LA]_3
    texts, n_compared = [[1, 2, 3], [4], [7, 8, 9, 1, 2]], 0

    def last_distributions(model, text: list[int], n: int) -> torch.Tensor:
        return probabilities(model(torch.tensor([text]))[0, -n:], **sampling)

    records = stream(lively_model, [list(text) for text in texts], 30, **WAYS[method], lookahead=3, fixed_token=7,
                     draft_model=lively_draft, generator=torch.Generator().manual_seed(3), **sampling)  # fmt: skip
    for record in records:
        for b, text in enumerate(texts):
            if record.drafts is not None and record.active[b]:
                drafts = record.drafts[b].tolist()
                n, rooted = len(drafts), text + record.tokens[b][: record.origins[b][:1].count(FREE)]
                if method == "speculative":
                    p = last_distributions(lively_draft, rooted + drafts[:-1], n)
                else:  # the look-ahead rows follow the token before the root
                    p = last_distributions(lively_model, rooted[:-1] + stand_ins[:n], n)
                torch.testing.assert_close(record.draft_probs[b], p)
                q = last_distributions(lively_model, rooted + drafts, n + 1)
                torch.testing.assert_close(record.target_probs[b], q)
                n_compared += 1
            text += record.tokens[b]
    assert n_compared > 20


@pytest.mark.parametrize("method", CHAINS)
def test_origins_and_counts_of_a_record_follow_from_each_other(method, lively_model, lively_draft):
    settings = {**WAYS[method], "temperature": 1.0, "lookahead": 3, "draft_model": lively_draft, "stop_token": 3}
    seen = set()
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        for record in stream(lively_model, [[1, 2, 3], [4], [7, 8]], 20, generator=generator, **settings):
            for b, (tokens, origins) in enumerate(zip(record.tokens, record.origins, strict=True)):
                seen |= set(origins)
                n_drafts = 0 if record.drafts is None else record.drafts.shape[1]
                kept = record.n_accepted[b]
                free = [FREE] if method in ("pass-two-pass", "fixed-token") or not n_drafts else []
                last = FREE if not n_drafts else BONUS if kept == n_drafts else CORRECTED
                assert origins == [*free, *[ACCEPTED] * kept, last][: len(origins)]
                assert bool(tokens) == record.active[b]
                complete = origins[-1:] in ([BONUS], [CORRECTED])  # not cut off by the text's end
                assert record.n_tested[b] == (n_drafts if complete else kept)
                if complete:
                    q, p = record.target_probs[b, kept], torch.zeros(11, dtype=torch.float64)
                    if origins[-1] == CORRECTED:
                        p = record.draft_probs[b, kept]
                    assert q[tokens[-1]] > p[tokens[-1]]
    assert seen == ({FREE} if method == "autoregressive" else {FREE, ACCEPTED, CORRECTED, BONUS})


@pytest.mark.parametrize("method", WAYS)
def test_a_generation_is_the_sum_of_its_records(method, lively_model, lively_draft):
    settings = {**WAYS[method], "temperature": 1.0, "lookahead": 3, "draft_model": lively_draft, "stop_token": 3}
    prompts = [[1, 2, 3], [4], [7, 8]]
    records = list(stream(lively_model, prompts, 20, generator=torch.Generator().manual_seed(1), **settings))
    result = generate(lively_model, prompts, 20, generator=torch.Generator().manual_seed(1), **settings)
    assert result.tokens == [[token for record in records for token in record.tokens[b]] for b in range(3)]
    assert result.rounds == len(records)
    assert result.passes == sum(map(n_passes, records))
    assert result.prompt_passes == sum(n_passes(record) * sum(record.active) for record in records)
    n_drafts = sum(record.drafts.shape[1] for record in records if record.drafts is not None)
    assert result.draft_passes == (n_drafts if method == "speculative" else 0)
    for counts, name in ((result.tested, "n_tested"), (result.accepted, "n_accepted")):
        numbers = [number for record in records for number in getattr(record, name)]
        assert counts == [sum(number > position for number in numbers) for position in range(len(counts))]
        assert sum(counts) == sum(numbers)


@pytest.mark.parametrize("method", WAYS)
def test_texts_that_have_ended_leave_the_batch_once_they_are_half_of_it(
    method, lively_model, lively_draft, monkeypatch
):
    sizes, forward = [], type(lively_model).forward

    def counted(model, ids, *arguments, **more):
        sizes.append(len(ids))
        return forward(model, ids, *arguments, **more)

    monkeypatch.setattr(type(lively_model), "forward", counted)
    prompts = [[token, 3, 8] for token in range(8)]
    settings = {**WAYS[method], "draft_model": lively_draft, "stop_token": 8}
    result = generate(lively_model, prompts, 60, **settings)  # past the window
    batch_sizes = set(sizes)
    assert max(batch_sizes) == 8 > min(batch_sizes)
    assert sizes == sorted(sizes, reverse=True)
    monkeypatch.undo()
    assert result.tokens == [plain_greedy(lively_model, prompt, 60, 8) for prompt in prompts]


def test_another_seed_gives_another_text(lively_model):
    texts = [
        generate(lively_model, [1, 2, 3], 20, temperature=1.0, generator=torch.Generator().manual_seed(seed)).tokens
        for seed in (0, 0, 1)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_tokens_per_pass_follow_from_the_counts(model):
    plain = generate(model, [1, 2, 3], 20, method="autoregressive")
    assert (plain.passes, plain.tokens_per_pass, plain.acceptance) == (20, 1.0, [])
    records = list(stream(model, [1, 2, 3], 20, method="pass-two-pass", lookahead=2))
    assert all(n_passes(record) == 2 for record in records[:-1])
    assert all(len(record.tokens[0]) == 2 + record.n_accepted[0] for record in records[:-1])
    records = list(stream(model, [1, 2, 3], 20, method="pass", lookahead=2))
    assert all(n_passes(record) == 1 for record in records)
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
        ([1], {"max_new_tokens": -1}),
        ([1], {"method": "magic"}),
        ([1], {"lookahead": 0}),
        ([1], {"lookahead": -2}),
        ([1], {"lookahead": 5}),
        ([1], {"temperature": -0.1}),
        ([1], {"temperature": float("nan")}),
        ([1], {"temperature": float("inf")}),
        ([1], {"top_k": 0}),
        ([1], {"top_p": 0.0}),
        ([1], {"top_p": 1.1}),
        ([1], {"top_p": float("nan")}),
        ([1], {"method": "speculative"}),
        ([1], {"method": "fixed-token", "fixed_token": 11}),
        ([1], {"prompt_lookup": -1}),
        ([1], {"method": "pass-two-pass", "prompt_lookup": 3}),
        ([1], {"captures": {}}),  # on a CPU
    ],
)
def test_bad_input_is_an_input_error(prompt, settings, model):
    with pytest.raises(InputError):
        generate(model, prompt, **({"max_new_tokens": 5} | settings))


def test_a_draft_model_with_another_vocabulary_is_an_input_error(model, tiny_draft):
    with pytest.raises(InputError):
        generate(model, [1], 5, method="speculative", draft_model=tiny_draft)


@pytest.mark.parametrize("method", ["pass", "pass-two-pass"])
def test_a_model_without_a_table_cannot_draft_with_it(method, draft_model):
    with pytest.raises(InputError):
        generate(draft_model, [1], 5, **WAYS[method])
    assert generate(draft_model, [1], 5, method="fixed-token").tokens == [plain_greedy(draft_model, [1], 5, None)]


def test_bad_input_is_refused_before_the_first_pass(model, monkeypatch):
    monkeypatch.setattr(model, "forward", None)
    with pytest.raises(InputError):
        next(stream(model, [1], 5, method="speculative"))
