"""The promise: every method writes what plain decoding writes. A slow reference, enumeration, planted bugs."""

import random
from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest
import torch
from conftest import (
    METHODS,
    WAYS,
    chi_square_p_value,
    chooser,
    noisy,
    plain_text,
    random_lively_model,
    random_model,
    random_prompts,
    sequence_probabilities,
    slow_logits,
    slow_race,
)  # fmt: skip

import minipass
from minipass import decode, trees
from minipass.auto import Auto
from minipass.decode import Decoder, Fused, Plain, TwoModels, TwoPass
from minipass.engine import GREEDY, Engine
from minipass.errors import InputError
from minipass.extras.course import test_exercises as graders
from minipass.extras.course.test_exercises import slow_probabilities
from minipass.model import GPT
from minipass.sampling import COUPLED, DRAFT, REJECTION, RULES, TARGET, Distribution, Sampling
from minipass.texts import ACCEPTED, BONUS, CORRECTED, SAMPLED, Generation
from minipass.trees import Drafts, DraftTree, chain

CHAINS = [way for way in WAYS if way[0] in ("two-pass", "fixed token", "fused", "two models")]
DRAFTING = [way for way in WAYS if way[0] != "plain"]
REJECTING = [way for way in WAYS if way[1] == REJECTION]
N_SAMPLES = 12_000
each_way = pytest.mark.parametrize("way", WAYS, ids=", ".join)


def engine(way, model, draft_model, sampling=GREEDY, n: int = 3) -> Engine:
    """Of a method and its rule, with chains of n drafts."""
    method, rule = way
    return Engine(model, METHODS[method](n, rule, draft_model), sampling)


def random_tree(rng: random.Random) -> DraftTree:
    """Up to 8 drafts, up to 3 deep, with complete or incomplete groups."""
    parents = graders.random_tree(rng.randrange(10**6)).cut(3).parents
    groups = [rng.randint(1, 3), *(rng.randint(0, 3) for _ in parents)]
    return DraftTree(parents, rng.choice([None, groups]))


@pytest.fixture(scope="module")
def lively():
    """A model with a small window and its draft model."""
    model = random_lively_model(seed=2, block_size=16)
    return model, noisy(model)


@pytest.fixture(scope="module")
def cases(lively):
    """Random calls and what the reference writes: (models, prompts, n_new, sampling, seed, stop, texts)."""
    rng, models = random.Random(0), [lively]
    for seed in (3, 5):
        model = random_lively_model(seed, block_size=16)
        models.append((model, noisy(model)))
    cases = []
    for _ in range(50):
        model, draft_model = rng.choice(models)
        prompts, n_new, stop = random_prompts(rng, rng.randint(1, 3)), rng.randint(1, 24), rng.choice([[], [3], [0, 7]])
        sampling = rng.choice([GREEDY, Sampling(rng.uniform(0.3, 1.5), rng.choice([None, 4]), rng.choice([None, 0.8]))])
        seed = rng.choice([rng.randrange(10**6), 2**63 - 3])
        texts = [plain_text(model, prompt, n_new, sampling, seed + b, stop) for b, prompt in enumerate(prompts)]
        cases.append(((model, draft_model), prompts, n_new, sampling, seed, stop, texts))
    return cases


# The same text, token for token.


@each_way
def test_greedy_and_coupled_texts_are_those_of_plain_decoding_with_the_same_seed(way, cases):
    method, rule = way
    rng = random.Random(method)
    for models, prompts, n_new, sampling, seed, stop, texts in rng.sample(cases, 25):
        if rule == COUPLED or sampling == GREEDY:
            result = engine(way, *models, sampling, rng.randint(1, 4)).generate(
                prompts, n_new, seed=seed, stop_token=stop
            )
            assert result.tokens == texts


@pytest.mark.parametrize("lookup", [0, 4])
def test_greedy_and_coupled_texts_of_random_trees_are_those_of_plain_decoding(lookup, cases):
    rng = random.Random(lookup)
    for (model, _), prompts, n_new, sampling, seed, stop, texts in cases:
        rule = rng.choice(RULES) if sampling == GREEDY else COUPLED
        tree_engine = Engine(model, Fused(random_tree(rng), rule, lookup), sampling)
        assert tree_engine.generate(prompts, n_new, seed=seed, stop_token=stop).tokens == texts


@pytest.fixture(scope="module")
def edges(lively):
    """Prompts of lengths at the window's edge, each with its text: greedy and sampled."""
    prompts, sampled = [[5] * length for length in (1, 15, 16)], Sampling(1.0)
    return {
        sampling: [(each, plain_text(lively[0], each, 40, sampling)) for each in prompts]
        for sampling in (GREEDY, sampled)
    }


@each_way
def test_text_continues_past_the_window_and_never_has_more_than_max_new_tokens(way, lively, edges):
    sampling = Sampling(1.0) if way[1] == COUPLED else GREEDY
    any_length = engine(way, *lively, sampling)
    for prompt, text in edges[sampling]:
        for n_new in (1, 2, 40):
            assert any_length.generate(prompt, n_new).tokens == [text[:n_new]]


@each_way
def test_a_text_depends_on_its_seed_and_not_on_its_batch_or_its_length(way, lively):
    method, rule = way
    if rule == REJECTION and ("lookup" in method or "auto" in method):
        pytest.skip("their drafts depend on the other texts of the batch")
    rng, batches = random.Random(0), engine(way, *lively, Sampling(1.0))
    for _ in range(3):
        prompts, n_new, stop = random_prompts(rng, 3), rng.randint(1, 24), rng.choice([None, 3])
        seeds = [rng.randrange(1000) for _ in prompts]
        texts = batches.generate(prompts, n_new, seed=seeds, stop_token=stop).tokens
        for prompt, seed, text in zip(prompts, seeds, texts, strict=True):
            alone = batches.generate(prompt, n_new + 4, seed=seed, stop_token=stop).tokens[0]
            assert text == alone[:n_new]


@each_way
def test_the_same_seed_gives_the_same_text_and_another_seed_another_one(way, lively):
    prompts = [[1, 2, 3], [4], [7, 8]]
    texts = [
        engine(way, *lively, Sampling(1.0)).generate(prompts, 20, seed=seed).tokens
        for seed in (5, 5, [5, 6, 7], [5, 8, 7], 0)
    ]
    assert texts[0] == texts[1] == texts[2], "one number s gives text b the seed s + b"
    assert texts[3][1] != texts[0][1]
    assert all(a != b for a, b in zip(texts[0], texts[4], strict=True))


@each_way
def test_a_stop_token_ends_the_text_wherever_it_comes_from(way, lively):
    ended_by = set()
    for seed in range(3):
        settings, tokens, origins = {"prompts": [8, 8, 8], "max_new_tokens": 16, "seed": seed}, [], []
        for turn in engine(way, *lively, Sampling(0.5)).stream(**settings):
            tokens, origins = tokens + turn.tokens[0], origins + turn.origins[0]
        for token in set(tokens):  # each one once
            first = tokens.index(token)
            never = set(range(11)) - set(tokens)
            stop = (token, [token], {token, *never})[token % 3]
            assert engine(way, *lively, Sampling(0.5)).generate(**settings, stop_token=stop).tokens == [
                tokens[: first + 1]
            ]
            ended_by.add(origins[first])
    assert ACCEPTED in ended_by or way[0] in ("plain", "lookup alone")


@pytest.mark.parametrize("method", [method for method in METHODS if method != "plain"])
def test_greedy_both_rules_accept_the_same_drafts_in_the_same_passes(method, lively):
    rng = random.Random(0)
    for _ in range(5):
        prompts, n_new, n = random_prompts(rng, 3), rng.randint(1, 24), rng.randint(1, 4)
        assert len({repr(engine((method, rule), *lively, n=n).generate(prompts, n_new)) for rule in RULES}) == 1


def test_greedy_both_rules_accept_the_same_drafts_of_any_tree(lively):
    rng = random.Random(0)
    for _ in range(30):
        tree, prompts = random_tree(rng), random_prompts(rng, 2)
        assert len({repr(Engine(lively[0], Fused(tree, rule)).generate(prompts, 12)) for rule in RULES}) == 1


@each_way
def test_no_method_needs_more_passes_than_plain_decoding(way, lively):
    rng, sampling = random.Random(0), Sampling(1.0)
    for seed in range(8):
        result = engine(way, *lively, sampling, rng.randint(1, 4)).generate([1, 2, 3], 24, seed=seed, stop_token=3)
        assert result.passes <= len(result.tokens[0])


def test_greedy_texts_keep_changing_so_equality_means_something(lively):
    prompts = random_prompts(random.Random(0), 20, longest=10)
    texts = Engine(lively[0], Plain()).generate(prompts, 20).tokens
    changes = [before != after for text in texts for before, after in pairwise(text)]
    assert sum(changes) / len(changes) > 0.4
    assert len(set(map(tuple, texts))) == len(prompts)


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(1.0)], ids=["greedy", "sampled"])
@pytest.mark.parametrize("way", DRAFTING, ids=", ".join)
def test_texts_have_drafts_that_are_accepted_and_drafts_that_are_not(way, sampling, lively):
    prompts = random_prompts(random.Random(0), 20, longest=10)
    result = engine(way, *lively, sampling).generate(prompts, 20)
    assert 0.05 < sum(result.accepted) / sum(result.tested) < 0.9


# Temperature above 0: the distribution of whole texts, against exact enumeration. One batch of copies, each with a seed
# of its own. What the coupled rule writes is plain decoding's by the tests above; here are both, all the same.


@pytest.fixture(scope="module")
def tiny():
    """A model of 5 tokens whose drafts are sometimes accepted, and its draft model."""
    sizes = {"vocab_size": 5, "block_size": 8, "n_layer": 1, "n_embd": 8, "std": 0.7}
    return random_model(seed=9, n_lookahead=3, **sizes), random_model(seed=29, n_lookahead=0, **sizes)


COUNTED = [*REJECTING, *((method, COUPLED) for method in ("plain", "fused", "tree", "two-pass"))]
each_counted = pytest.mark.parametrize("way", COUNTED, ids=", ".join)


def p_values(drawing: Engine, prompts=((1, 2, 3),), n_new: int = 4, stop: int | None = None, sampling=None):
    """Draws N_SAMPLES texts in one batch of the prompts repeated; for each prompt, how likely its texts are.

    sampling: of the enumeration, where it is not the engine's.
    """
    batch, sampling = [list(prompt) for prompt in prompts] * (N_SAMPLES // len(prompts)), sampling or drawing.sampling
    texts = [tuple(tokens) for tokens in drawing.generate(batch, n_new, stop_token=stop).tokens]
    for b, prompt in enumerate(prompts):
        expected = sequence_probabilities(drawing.models[0], list(prompt), n_new, stop, **vars(sampling))
        yield chi_square_p_value(texts[b :: len(prompts)], expected)


@each_counted
def test_texts_have_exactly_the_enumerated_distribution_with_top_k_and_top_p(way, tiny):
    assert min(p_values(engine(way, *tiny, Sampling(1.3, top_k=4, top_p=0.9)), n_new=3)) > 1e-4


@each_counted
def test_ragged_texts_past_the_window_or_up_to_a_stop_token_have_exactly_the_enumerated_distribution(way, tiny):
    prompts = [[4], [1, 2, 3], [1, 2, 0, 4, 4, 0]]  # the last has room for 3 more tokens
    assert min(p_values(engine(way, *tiny, Sampling(1.0)), prompts, stop=3)) > 1e-4


@pytest.mark.parametrize("way", [way for way in COUNTED if way[0] != "plain"], ids=", ".join)
def test_the_enumeration_sees_drafts_that_are_accepted_and_drafts_that_are_not(way, tiny):
    result = engine(way, *tiny, Sampling(1.0)).generate([[1, 2, 3]] * 500, 4)
    assert 0.1 < sum(result.accepted) / sum(result.tested) < 1


# Planted bugs: the same tests must catch an engine that is subtly wrong.


def without_residual(original, draft, p, q, u):
    """After a rejection draws from q, not from the residual."""
    accepted, _, p = original(draft, p, q, u)
    return accepted, q.probs, p


def bonus_from_the_wrong_place(original, nodes, drafts, q, sampling, keys):
    """When all drafts of a chain are accepted, the token after them comes from the last draft's target distribution."""
    last, next_token = original(nodes, drafts, q, sampling, keys)
    if drafts.tokens.shape[1]:
        earlier = sampling.draw(Distribution(q.tokens[:, -2], q.probs[:, -2]), keys[TARGET][:, -1])
        next_token = torch.where(last == drafts.tokens.shape[1], earlier, next_token)
    return last, next_token


def top_k_in_the_drafts_alone(original, decoder, *arguments):
    """Draws drafts with top-k and tells the rule a p without it."""
    (nodes, drafts), truncated = original(decoder, *arguments), decoder.sampling
    decoder.sampling = replace(truncated, top_k=None)
    p, decoder.sampling = original(decoder, *arguments)[1].p, truncated
    return nodes, Drafts(drafts.tokens, p)


def p_of_another_place(original, *arguments):
    """All p are that of the first draft."""
    nodes, drafts = original(*arguments)
    return nodes, drafts if drafts.p is None else Drafts(drafts.tokens, drafts.p[:, :1].expand(drafts.p.shape))


BUGS = {
    "residual omitted": lambda patch: patch(trees, "reject", without_residual),
    "bonus from the wrong place": lambda patch: patch(decode, "accept", bonus_from_the_wrong_place),
    "same stream for draft and acceptance": lambda patch: patch(trees, "ACCEPTANCE", DRAFT),
    "same stream for draft and target": lambda patch: patch(decode, "DRAFT", TARGET),
    "p of another place": lambda patch: patch(Decoder, "draft", p_of_another_place),
}


@pytest.fixture
def patch(monkeypatch):
    """Plants a bug: another value, or a function that is given the original first."""

    def plant(where, name, value):
        original = getattr(where, name)
        if callable(value):
            monkeypatch.setattr(where, name, lambda *arguments: value(original, *arguments))
        else:
            monkeypatch.setattr(where, name, value)

    return plant


@pytest.fixture(scope="module")
def rejected():
    """A model whose drafts are rejected more often than tiny's, with more tokens in the residual."""
    sizes = {"vocab_size": 5, "block_size": 16, "n_layer": 1, "std": 0.9}
    return random_model(seed=5, n_lookahead=3, **sizes), random_model(seed=26, n_lookahead=0, **sizes)


@pytest.mark.parametrize("bug", BUGS)
@pytest.mark.parametrize("method", ["two-pass", "fused", "two models"])
def test_a_broken_rejection_is_caught_by_the_enumeration(method, bug, rejected, patch):
    BUGS[bug](patch)
    n_new = 4 if "bonus" in bug else 3
    assert min(p_values(engine((method, REJECTION), *rejected, Sampling(2.0), n=2), n_new=n_new)) < 1e-6


@pytest.mark.parametrize("method", ["two-pass", "fused", "two models"])
def test_without_a_bug_the_enumeration_finds_none(method, rejected):
    assert min(p_values(engine((method, REJECTION), *rejected, Sampling(2.0), n=2))) > 1e-4


@pytest.mark.parametrize("method", ["fused", "two models"])
def test_top_k_in_the_drafts_alone_is_caught_by_the_enumeration(method, tiny, patch):
    patch(Decoder, "draft", top_k_in_the_drafts_alone)
    assert min(p_values(engine((method, REJECTION), *tiny, Sampling(0.8, top_k=2)))) < 1e-6


@pytest.mark.parametrize("method", ["fused", "two models"])
def test_top_k_in_the_target_alone_leaves_the_distribution_and_none_in_it_is_caught(method, tiny, patch):
    """Drafts may come from any p that the rule is told; the target's own settings decide."""
    truncated = Sampling(0.8, top_k=2)

    def draft_with(sampling, original, decoder, *arguments):
        own, decoder.sampling = decoder.sampling, sampling
        made, decoder.sampling = original(decoder, *arguments), own
        return made

    patch(Decoder, "draft", partial(draft_with, Sampling(0.8)))
    assert min(p_values(engine((method, REJECTION), *tiny, truncated))) > 1e-4
    patch(Decoder, "draft", partial(draft_with, truncated))
    assert min(p_values(engine((method, REJECTION), *tiny, Sampling(0.8)), sampling=truncated)) < 1e-6


def differs(way, model, draft_model, sampling) -> bool:
    """Whether some text, well past the window, differs from plain decoding's."""
    drawing, prompts = engine(way, model, draft_model, sampling), [[1, 2, 3], [4], [7] * 13]
    expected = [plain_text(model, prompt, 30, sampling, seed) for seed, prompt in enumerate(prompts)]
    return drawing.generate(prompts, 30).tokens != expected


def begin_with(change):
    """A prefill after which the decoder is changed."""

    def begin(original, decoder, *arguments):
        handed = original(decoder, *arguments)
        change(decoder)
        return handed

    return begin


TEXT_BUGS = {
    "bonus from the wrong place": lambda patch: patch(decode, "accept", bonus_from_the_wrong_place),
    "noise by the place in the cache": lambda patch: patch(Decoder, "begin", begin_with(lambda d: d.start.zero_())),
    "cache one short": lambda patch: patch(
        Decoder, "begin", begin_with(lambda d: d.cache.length.sub_(1).clamp_(min=0))
    ),
    "cache one too long": lambda patch: patch(Decoder, "begin", begin_with(lambda d: d.cache.length.add_(1))),
    "target noise of another stream": lambda patch: patch(trees, "TARGET", DRAFT),
    "noise of another text": lambda patch: patch(
        Decoder, "begin", begin_with(lambda d: d.keys.copy_(d.keys.roll(1, 1)))
    ),
}


@pytest.mark.parametrize("bug", TEXT_BUGS)
@pytest.mark.parametrize("method", ["two-pass", "fused", "two models"])
def test_a_broken_engine_is_caught_by_the_reference(method, bug, lively, patch):
    assert not differs((method, COUPLED), *lively, Sampling(0.7))
    TEXT_BUGS[bug](patch)
    assert differs((method, COUPLED), *lively, Sampling(0.7))


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(0.7)], ids=["greedy", "sampled"])
def test_a_position_one_short_at_the_windows_last_place_is_caught_by_the_reference(sampling, lively):
    hook = lively[0].wpe.register_forward_pre_hook(lambda wpe, inputs: (inputs[0].clamp(max=14),))
    try:
        assert differs(("plain", COUPLED), *lively, sampling)
        assert differs(("fused", COUPLED), *lively, sampling)
    finally:
        hook.remove()


@pytest.mark.parametrize("method", ["two-pass", "fused", "tree", "two models"])
def test_drafts_with_noise_of_their_own_leave_the_coupled_text_and_are_accepted_less_often(method, lively, patch):
    way, sampling, prompts = (method, COUPLED), Sampling(1.0), [[token] for token in range(11)]
    shared = engine(way, *lively, sampling).generate(prompts, 40)
    patch(decode, "TARGET", DRAFT)
    own = engine(way, *lively, sampling).generate(prompts, 40)
    assert own.tokens == shared.tokens
    assert own.tokens_per_pass < 0.9 * shared.tokens_per_pass


# The records of a stream.


@each_way
def test_records_tell_what_was_drafted_and_what_became_of_it(way, lively):
    model, draft_model = lively
    streaming, prompts, counts = engine(way, model, draft_model, Sampling(1.0)), [[1, 2, 3], [4], [7, 8]], set()
    for turn in streaming.stream(prompts, 30, seed=3):
        counts.add(tuple(turn.n_accepted))
        drafts, tree = turn.result.drafts, turn.shape.tree
        assert drafts.tokens.shape[1] == len(tree.parents)
        assert turn.result.q.dense(11).shape[1:] == (len(tree.depth), 11)
        for b, row in enumerate(turn.rows):
            assert len(turn.tokens[b]) == len(turn.origins[b])
            assert bool(turn.tokens[b]) == turn.active[b]
            pairs = zip(turn.tokens[b], turn.origins[b], strict=True)
            accepted = [token for token, origin in pairs if origin == ACCEPTED]
            assert len(accepted) == turn.n_accepted[b] <= turn.n_tested[b] <= tree.depth[-1]
            if turn.active[b]:
                node, path = turn.result.last[row].item(), []
                assert node == turn.last[b]
                while node:
                    path.insert(0, drafts.tokens[row, node - 1].item())
                    node = tree.parents[node - 1]
                assert accepted == path[: len(accepted)]
    if way[0] != "plain":
        assert any(len(set(numbers)) > 1 for numbers in counts), "each text has its own count"


@pytest.mark.parametrize("way", CHAINS, ids=", ".join)
def test_recorded_distributions_are_what_the_models_say_of_the_text_so_far(way, lively):
    """Exactness holds for any p, so only this test sees drafts that come from the wrong look-ahead rows."""
    (model, draft_model), (method, rule), sampling = lively, way, Sampling(0.9, top_k=6)
    prompts, seeds, n_compared = [[1, 2, 3], [4], [7, 8, 9, 1, 2]], [5, 6, 7], 0
    texts = [list(prompt) for prompt in prompts]

    def last(model, text: list[int], n: int, n_lookahead: int = 0) -> list[list[float]]:
        logits = slow_logits(model, [text], n_lookahead)[0, -n:].tolist()
        return [slow_probabilities(each, **vars(sampling)) for each in logits]

    for turn in engine(way, model, draft_model, sampling).stream(prompts, 9, seed=seeds):
        drafts = turn.result.drafts
        for b, (text, row) in enumerate(zip(texts, turn.rows, strict=True)):
            n = len(turn.shape.tree.parents)
            if turn.active[b] and n:
                tokens = drafts.tokens[row].tolist()
                if method == "two models":
                    p = last(draft_model, text + tokens[:-1], n)
                elif method == "fixed token":
                    p = last(model, text[:-1] + [2] * n, n)
                else:  # the look-ahead rows follow the token before the root
                    p = last(model, text[:-1], n, n)
                if rule == COUPLED:  # the drafts that win the target's race
                    assert tokens == [slow_race(each, seeds[b], len(text) + i)[0] for i, each in enumerate(p)]
                else:
                    torch.testing.assert_close(drafts.p[row, :n], torch.tensor(p, dtype=torch.float64))
                q = torch.tensor(last(model, text + tokens, n + 1), dtype=torch.float64)
                torch.testing.assert_close(turn.result.q.dense(11)[row], q)
                n_compared += 1
            text += turn.tokens[b]
    assert n_compared > 6


@pytest.mark.parametrize("way", [("plain", COUPLED), *CHAINS], ids=", ".join)
def test_origins_and_counts_of_a_record_follow_from_each_other(way, lively):
    seen, streaming, block_size = set(), engine(way, *lively, Sampling(1.0)), lively[0].config.block_size
    for seed in range(6):
        left, context = [20, 20, 20], [3, 1, 2]
        for turn in streaming.stream([[1, 2, 3], [4], [7, 8]], 20, seed=seed, stop_token=3):
            n_drafts = len(turn.shape.tree.parents)
            for b, (tokens, origins) in enumerate(zip(turn.tokens, turn.origins, strict=True)):
                seen |= set(origins)
                n_accepted, row = turn.n_accepted[b], turn.rows[b]
                drawn = SAMPLED if not n_drafts else BONUS if n_accepted == n_drafts else CORRECTED
                assert origins == [*[ACCEPTED] * n_accepted, drawn][: len(origins)]
                complete = bool(origins) and origins[-1] != ACCEPTED  # not cut off by the text's end
                context[b] = block_size // 2 if tokens and context[b] > block_size else context[b]
                could_be_emitted = min(n_drafts, left[b], block_size + 1 - context[b])
                assert turn.n_tested[b] == (could_be_emitted if complete else n_accepted)
                left[b], context[b] = left[b] - len(tokens), context[b] + len(tokens)
                if complete:
                    q = turn.result.q.dense(11)[row, n_accepted]
                    assert q[tokens[-1]] > 0
                    if drawn == CORRECTED and way[1] == REJECTION:
                        assert q[tokens[-1]] > turn.result.drafts.p[row, n_accepted, tokens[-1]]
                    if drawn == CORRECTED and way[1] == COUPLED:
                        assert tokens[-1] != turn.result.drafts.tokens[row, n_accepted]
    assert seen == ({SAMPLED} if way[0] == "plain" else {SAMPLED, ACCEPTED, CORRECTED, BONUS})


@each_way
def test_a_generation_is_the_sum_of_its_records(way, lively):
    prompts = [[1, 2, 3], [4], [7, 8]]
    turns = list(engine(way, *lively, Sampling(1.0)).stream(prompts, 20, seed=1, stop_token=3))
    result = engine(way, *lively, Sampling(1.0)).generate(prompts, 20, seed=1, stop_token=3)
    assert result == Generation(
        tokens=[[token for turn in turns for token in turn.tokens[b]] for b in range(3)],
        passes=len(turns),
        draft_passes=sum(turn.draft_passes for turn in turns),
        prompt_passes=sum(sum(turn.active) for turn in turns),
        tested=result.tested,
        accepted=result.accepted,
    )
    n_drafts = sum(len(turn.shape.tree.parents) for turn in turns)
    assert result.draft_passes == (n_drafts if way[0] == "two models" else 0)
    for counts, name in ((result.tested, "n_tested"), (result.accepted, "n_accepted")):
        numbers = [number for turn in turns for number in getattr(turn, name)]
        assert counts == [sum(number > position for number in numbers) for position in range(len(counts))]
        assert sum(counts) == sum(numbers)


def test_tokens_per_pass_follow_from_the_counts(lively):
    model, _ = lively
    plain = Engine(model, Plain()).generate([1, 2, 3], 20)
    assert (plain.passes, plain.tokens_per_pass, plain.acceptance) == (20, 1.0, [])
    two_pass, fused = (list(Engine(model, method).stream([1, 2, 3], 13)) for method in (TwoPass(2), Fused(2)))
    assert [len(turn.shape.tree.parents) for turn in two_pass[:4]] == [0, 2, 0, 2], "draft, verify, draft, verify"
    for turns in (two_pass, fused):
        assert all(len(turn.tokens[0]) == 1 + turn.n_accepted[0] for turn in turns[:-1])


@each_way
def test_texts_that_have_ended_leave_the_batch_once_they_are_half_of_it(way, lively, monkeypatch):
    sizes, hidden = [], GPT.hidden

    def counted(model, ids, *arguments, **more):
        sizes.append(len(ids))
        return hidden(model, ids, *arguments, **more)

    monkeypatch.setattr(GPT, "hidden", counted)
    prompts, stop = [[token, 3, 8] for token in range(8)], [0, 5, 8]
    texts = engine(way, *lively).generate(prompts, 13, stop_token=stop).tokens
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] == 8 > sizes[-1]
    past_the_window = engine(way, *lively).generate(prompts, 30, stop_token=stop).tokens
    expected = [plain_text(lively[0], prompt, 30, stop=stop) for prompt in prompts]
    assert past_the_window == expected
    assert texts == [text[:13] for text in expected]


# Bad input.


@pytest.mark.parametrize(
    ("prompt", "settings"),
    [
        ([], {}),
        ([[1], []], {}),
        ([1] * 41, {}),
        ([11], {}),
        ([-1], {}),
        ([1.9], {}),
        ([1], {"max_new_tokens": 0}),
        ([1], {"max_new_tokens": -1}),
        ([1], {"max_new_tokens": 2.5}),
        ([1], {"stop_token": 11}),
        ([1], {"stop_token": -1}),
        ([1], {"stop_token": [3, 11]}),
        ([1], {"seed": [1, 2]}),
        ([1], {"seed": -1}),
        ([1], {"seed": 2**63}),
        ([1], {"seed": [0.5]}),
        ([[1], [2]], {"seed": [1]}),
        ([1], {"method": "magic"}),
        ([1], {"rule": "magic"}),
        ([1], {"method": "tree", "rule": "magic"}),
        ([1], {"method": "two-pass", "rule": "magic"}),
        ([1], {"lookahead": 0}),
        ([1], {"lookahead": -2}),
        ([1], {"lookahead": 5}),
        ([1], {"method": "two-pass", "lookahead": 0}),
        ([1], {"method": "tree", "tree": (0, 1, 2, 3, 4)}),
        ([1], {"method": "tree", "tree": (0,) * 12}),
        ([1], {"temperature": -0.1}),
        ([1], {"temperature": float("nan")}),
        ([1], {"temperature": float("inf")}),
        ([1], {"top_k": 0}),
        ([1], {"top_p": 0.0}),
        ([1], {"top_p": 1.1}),
        ([1], {"top_p": float("nan")}),
        ([1], {"method": "two-models"}),
        ([1], {"method": "two-pass", "fixed_token": 11}),
        ([1], {"method": "two-pass", "fixed_token": -1}),
        ([1], {"lookup": -1}),
        ([1], {"method": "two-pass", "lookup": 3}),
        ([1], {"use_graphs": True}),  # on a CPU
    ],
)
def test_bad_input_is_an_input_error(prompt, settings, model):
    with pytest.raises(InputError):
        minipass.generate(model, prompt, **({"max_new_tokens": 5} | settings))


@pytest.mark.parametrize(
    "make",
    [
        lambda draft_model: TwoModels(draft_model, rule="magic"),
        lambda draft_model: Auto(chooser(), "magic"),
        lambda draft_model: Fused(2, lookup=-1),
        lambda draft_model: Fused(2.5),
    ],
)
def test_a_method_out_of_bounds_is_an_input_error(make, draft_model):
    with pytest.raises(InputError):
        make(draft_model)


def test_a_draft_model_with_another_vocabulary_is_an_input_error(model, tiny):
    with pytest.raises(InputError):
        Engine(model, TwoModels(tiny[1]))


@pytest.mark.parametrize("method", [Fused(2), TwoPass(2), Fused(chain(1))], ids=repr)
def test_a_model_without_a_table_cannot_draft_with_it(method, draft_model):
    with pytest.raises(InputError):
        Engine(draft_model, method)
    fixed = Engine(draft_model, TwoPass(2, fixed_token=7))
    assert fixed.generate([1], 5).tokens == [plain_text(draft_model, [1], 5)]


def test_bad_input_is_refused_before_the_first_pass(model, monkeypatch):
    monkeypatch.setattr(GPT, "hidden", None)
    with pytest.raises(InputError):
        Engine(model, Plain()).stream([1], 0)
