"""The graders of the exercises, easy to hard. Each message says what is wrong and what to look at, not how to do it."""

from functools import lru_cache

import numpy as np
import pytest
import torch

from minipass.generate import ACCEPTED, BONUS, CORRECTED, FREE, generate, stream
from minipass.layout import CACHE_END, Layout, lookahead_ids, path, tree, with_groups
from minipass.losses import TV_SCALE, lookahead_loss, rows_after_cuts, training_pass
from minipass.model import GPT, GPTConfig, KVCache
from minipass.sampling import probabilities, speculative_accept

exercise_1, exercise_2, exercise_3, exercise_4, exercise_5, exercise_6, exercise_7, exercise_8 = (
    getattr(pytest.mark, f"exercise_{number}") for number in range(1, 9)
)


@lru_cache
def tiny_model(vocab_size: int = 7) -> GPT:
    """A random float64 model with weights so large that its drafts are often kept and often not."""
    model = GPT(GPTConfig(vocab_size, block_size=48, n_layer=2, n_head=2, n_embd=8, n_lookahead=3)).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=generator)
    return model.eval()


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-6) -> bool:
    return a.shape == b.shape and torch.allclose(a.double(), b.double(), rtol=0, atol=tolerance)


def like(counts: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether counts of outcomes fit their probabilities: none is more than 5 standard deviations off."""
    n = counts.sum()
    return bool(((counts - n * expected).abs() <= 5 * (n * expected * (1 - expected)).sqrt() + 1e-6).all())


# 1. Probabilities


@exercise_1(1)
def test_temperature_divides_the_logits():
    logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    for temperature in (0.5, 1.0, 2.0):
        expected = (logits / temperature).softmax(-1)
        assert close(probabilities(logits, temperature), expected), "not softmax(logits / temperature), last dimension"
    assert probabilities(logits.bfloat16()).dtype == torch.float32, "bfloat16 logits should give float32 probabilities"
    assert probabilities(logits.double()).dtype == torch.float64, "float64 logits should stay float64"


@exercise_1(1)
def test_temperature_0_is_greedy():
    probs = probabilities(torch.tensor([[1.0, 3.0, 2.0], [5.0, 5.0, 0.0]]), temperature=0)
    assert probs[0].tolist() == [0, 1, 0], "at temperature 0 the most likely token should have probability 1"
    assert sorted(probs[1].tolist()) == [0, 0, 1], "at temperature 0 a tie should go to one token, not be shared"


@exercise_1(1)
def test_a_tiny_temperature_gives_no_nan():
    probs = probabilities(torch.tensor([1.0, 3.0, 2.0]), temperature=1e-39)
    assert probs.tolist() == [0, 1, 0], "logits / 1e-39 overflows: inf - inf is NaN. Make the largest logit 0 first"


@exercise_1(2)
def test_top_k_leaves_exactly_k_tokens():
    logits = torch.tensor([[0.0, 4.0, 1.0, 3.0], [1.0, 2.0, 4.0, 3.0]])
    expected = torch.zeros(2, 4).scatter(1, torch.tensor([[1, 3], [2, 3]]), torch.tensor([[4.0, 3.0]] * 2).softmax(1))
    assert close(probabilities(logits, top_k=2), expected), "top-k: the k likeliest of each row, made to sum to 1"
    tied = probabilities(torch.zeros(5), top_k=3)
    assert (tied > 0).sum() == 3, "top-k with ties should leave exactly k tokens: select by index, not by threshold"
    assert close(probabilities(logits, top_k=9), logits.softmax(-1)), "a top-k beyond the vocabulary changes nothing"


@exercise_1(2)
def test_top_p_leaves_the_fewest_tokens_that_reach_p():
    probs = torch.tensor([0.15, 0.5, 0.05, 0.3])
    for top_p, n_left in ((0.1, 1), (0.45, 1), (0.55, 2), (0.75, 2), (0.85, 3), (1.0, 4)):
        result = probabilities(probs.log(), top_p=top_p)
        assert (result > 0).sum() == n_left, f"top-p {top_p} of {probs.tolist()} should leave {n_left} tokens"
        expected = torch.where(result > 0, probs, 0)
        assert close(result, expected / expected.sum()), "after top-p the tokens left should sum to 1 in proportion"


@exercise_1(1)
def test_top_p_comes_after_temperature_and_top_k():
    probs = torch.tensor([0.4, 0.3, 0.2, 0.1])
    # Of the top two, 4/7 and 3/7, one reaches 0.55; of all four it takes two.
    both = probabilities(probs.log(), top_k=2, top_p=0.55)
    assert (both > 0).sum() == 1, "top-p should count the probabilities as top-k left them"
    cold = probabilities(probs.log(), temperature=0.25, top_p=0.7)
    assert (cold > 0).sum() == 1, "top-p should count the probabilities as the temperature left them"


# 2. Mask and positions

PARENTS = [-1, 0, 1, 1, 3, 0, 5, -1, 7, 2, 4]


def ancestors(parents: list[int], row: int) -> list[int]:
    """The row, its parent, its parent's parent and so on."""
    return [] if row == CACHE_END else [*ancestors(parents, parents[row]), row]


@exercise_2(1)
def test_a_path_is_the_causal_mask():
    visible = tree(np.arange(5) - 1).visible
    assert visible.dtype == torch.bool, "visible should be a bool tensor"
    assert visible.shape == (1, 5, 5), "for parents (R,), visible should have the shape (1, R, R)"
    assert visible[0].tolist() == torch.ones(5, 5).tril().bool().tolist(), "a path should be the causal lower triangle"


@exercise_2(3)
def test_a_row_sees_its_ancestors_and_itself():
    visible = tree(np.array(PARENTS)).visible[0]
    for row in range(len(PARENTS)):
        seen = visible[row].nonzero().flatten().tolist()
        assert seen == ancestors(PARENTS, row), f"parents {PARENTS}: row {row} should see its ancestors and itself only"


@exercise_2(2)
def test_a_row_stands_one_behind_its_parent():
    depth = tree(np.array(PARENTS)).depth
    assert depth.dtype == torch.int64, "depth should be an int64 tensor"
    expected = [len(ancestors(PARENTS, row)) - 1 for row in range(len(PARENTS))]
    assert depth.tolist() == [expected], "a row stands one behind its parent, and at 0 where that is CACHE_END"


@exercise_2(1)
def test_each_batch_row_has_its_own_tree():
    parents = np.array([[-1, 0, 1, 2], [-1, 0, 0, -1]])
    both = tree(parents)
    for b in range(2):
        alone = tree(parents[b])
        same = torch.equal(both.visible[b], alone.visible[0]) and torch.equal(both.depth[b], alone.depth[0])
        assert same, "parents (B, R) should give each batch row the tree that it has alone"


@exercise_2(1)
def test_a_parent_must_stand_before_its_row():
    for parents in ([0], [-1, 2, 0], [-2]):
        try:
            tree(np.array(parents))
        except ValueError:
            continue
        raise AssertionError(f"parents {parents}: a parent that is no earlier row should be a ValueError")


# 3. The cache


def causal(n_rows: int) -> Layout:
    """A path, without the help of exercise 2."""
    return Layout(torch.ones(1, n_rows, n_rows).tril().bool(), torch.arange(n_rows)[None])


def ragged_cache() -> KVCache:
    cache = KVCache(GPTConfig(5, 16, 2, 2, 8, 0), batch_size=3, max_len=9)
    cache.length = torch.tensor([4, 0, 2])
    return cache


@exercise_3(2)
def test_every_row_sees_what_is_in_the_cache():
    cache = ragged_cache()
    mask = cache.mask(causal(3).visible)
    assert mask.shape == (3, 3, 9), "the mask should have the shape (B, R, max_len)"
    for b, length in enumerate(cache.length.tolist()):
        assert mask[b, :, :length].all(), "all rows should see all slots before `length`, each batch row its own"


@exercise_3(2)
def test_rows_see_each_other_as_the_layout_says_and_nothing_behind():
    cache = ragged_cache()
    for visible in (causal(3).visible, torch.rand(3, 3, 3, generator=torch.Generator().manual_seed(0)) < 0.5):
        mask = cache.mask(visible)
        for b, length in enumerate(cache.length.tolist()):
            own = mask[b, :, length : length + 3]
            assert torch.equal(own, visible.expand(3, -1, -1)[b]), "this pass's slots should be seen as `visible` says"
            assert not mask[b, :, length + 3 :].any(), "slots behind this pass hold garbage: no row should see them"


@exercise_3(2)
def test_keys_and_values_go_into_their_slots_and_nowhere_else():
    cache = ragged_cache()
    k, v = torch.randn(2, 3, 2, 3, 4, generator=torch.Generator().manual_seed(0))  # (B, H, R, head_dim)
    expected_k, expected_v = cache.keys.clone(), cache.values.clone()
    for b, length in enumerate(cache.length.tolist()):
        expected_k[1, b, :, length : length + 3], expected_v[1, b, :, length : length + 3] = k[b], v[b]
    keys, values = cache.store(1, k, v, cache.slots(3))
    stored = torch.equal(cache.keys, expected_k) and torch.equal(cache.values, expected_v)
    assert stored, "k and v should go into `slots` of that layer, each batch row its own, and change nothing else"
    assert torch.equal(keys, expected_k[1]), "store should return all keys and values of the layer, old ones too"
    assert torch.equal(values, expected_v[1]), "store should return all keys and values of the layer, old ones too"
    assert cache.length.tolist() == [4, 0, 2], "`length` is for the caller to move"


@exercise_3(2)
@torch.no_grad()
def test_rolling_back_is_setting_the_length():
    model = tiny_model()
    cache = KVCache(model.config, 1, 20, dtype=torch.float64)
    cache.keys.fill_(1e3), cache.values.fill_(1e3)
    for rows, n_kept in (([1, 2, 3, 4], 2), ([5, 6, 0, 1, 2], 1), ([3], 1)):
        logits = model(torch.tensor([rows]), causal(len(rows)), cache)
        cache.length += n_kept
    expected = model(torch.tensor([[1, 2, 5, 3]]))[:, -1:]
    assert close(logits, expected), "rows dropped by setting `length` still change what later passes compute"


# 4. Look-ahead rows


def fused_rows(n_path: int, n_lookahead: int) -> list[tuple[int, int]]:
    """(row of the path, 0) for real rows, (j, i) for LA_i of the group that hangs from row j."""
    groups = [(j, i) for j in range(n_path) for i in range(1, n_lookahead + 1)]
    return [(j, 0) for j in range(n_path)] + groups


@exercise_4(2)
def test_ids_of_lookahead_tokens():
    assert lookahead_ids(10, 3).tolist() == [10, 11, 12], "[LA]_1 has the input id vocab_size"
    ids = lookahead_ids(10, 2, 2, 2)
    assert ids.tolist() == [10, 11] * 3, "each group should begin again with [LA]_1"
    assert ids.dtype == torch.int64, "ids should be int64"


@exercise_4(2)
def test_a_draft_pass_is_a_path_and_a_verify_pass_has_no_groups():
    draft, plain = with_groups(path(1), np.zeros(1), 3), with_groups(path(4), np.zeros(0), 0)
    for layout in (draft, plain):
        assert layout.visible.shape == (1, 4, 4), "there should be n_path + G * n_lookahead rows"
        assert torch.equal(layout.visible, causal(4).visible), "[root, LA_1, LA_2, LA_3] should be one causal path"
        assert layout.depth.tolist() == [[0, 1, 2, 3]], "[root, LA_1, LA_2, LA_3] stand at 0, 1, 2, 3 from the cache"


@exercise_4(3)
def test_lookahead_tokens_stand_behind_their_anchor():
    rows = fused_rows(4, 2)
    depth = with_groups(path(4), np.arange(4), 2).depth[0].tolist()
    assert depth == [j + i for j, i in rows], "LA_i of the group hanging from row j should stand at j + i"


@exercise_4(2)
def test_lookahead_tokens_see_the_text_before_them_and_their_own_group():
    rows = fused_rows(4, 2)
    visible = with_groups(path(4), np.arange(4), 2).visible[0]
    for row, (j, i) in enumerate(rows):
        for column, (other_j, other_i) in enumerate(rows):
            expected = other_j <= j if other_i == 0 else other_j == j and 0 < other_i <= i
            names = [f"LA_{n} of group {m}" if n else f"path row {m}" for m, n in ((j, i), (other_j, other_i))]
            assert visible[row, column] == expected, f"{names[0]} should {'' if expected else 'not '}see {names[1]}"


@exercise_4(1)
def test_each_batch_row_has_its_own_anchors():
    anchors = np.array([[0, 3], [2, 2]])
    both = with_groups(path(4), anchors, 2)
    for b in range(2):
        alone = with_groups(path(4), anchors[b], 2)
        same = torch.equal(both.visible[b], alone.visible[0]) and torch.equal(both.depth[b], alone.depth[0])
        assert same, "anchors (B, G) should give each batch row the layout that it has alone"


# 5. Acceptance

N = 60_000
P = torch.tensor([[0.5, 0.2, 0.2, 0.1], [0.1, 0.1, 0.4, 0.4]], dtype=torch.float64)  # p_1, p_2
FIRST = torch.tensor([0.2, 0.3, 0.1, 0.4], dtype=torch.float64)  # q_1
AFTER = torch.tensor(  # AFTER[t], the target after token t
    [[0.1, 0.2, 0.3, 0.4], [0.7, 0.1, 0.1, 0.1], [0.25, 0.25, 0.25, 0.25], [0.0, 0.5, 0.5, 0.0]], dtype=torch.float64
)


def multinomial(probs: torch.Tensor, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.multinomial(probs.flatten(0, -2), 1, generator=generator).view(probs.shape[:-1])


def many_rounds() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """N rounds of two drafts: drafts (N, 2), n_accepted (N,), next_token (N,)."""
    draft_probs = P.expand(N, -1, -1)
    drafts = multinomial(draft_probs, seed=0)
    target_probs = torch.cat([FIRST.expand(N, 1, -1), AFTER[drafts]], dim=1)
    return drafts, *speculative_accept(drafts, draft_probs, target_probs, torch.Generator().manual_seed(1))


@exercise_5(2)
def test_when_all_drafts_are_kept_the_bonus_comes_from_the_last_target():
    eye = torch.eye(4)
    drafts = torch.tensor([[1, 2], [0, 3]])
    target_probs = torch.cat([eye[drafts], eye[torch.tensor([[3], [1]])]], dim=1)
    n_accepted, next_token = speculative_accept(drafts, eye[drafts], target_probs)
    assert n_accepted.tolist() == [2, 2], "where p = q all drafts should be kept"
    assert next_token.tolist() == [3, 1], "all drafts kept: one more token, the bonus, should come from q_{L+1}"


@exercise_5(2)
def test_greedy_keeps_drafts_up_to_the_first_that_the_target_would_not_choose():
    drafts = torch.tensor([[1, 2, 0], [1, 3, 0], [0, 2, 0]])
    target_probs = torch.eye(4)[torch.tensor([1, 2, 0, 3]).expand(3, -1)]
    n_accepted, next_token = speculative_accept(drafts, torch.full((3, 3, 4), 0.25), target_probs)
    assert n_accepted.tolist() == [3, 1, 0], "nothing behind the first rejection may be kept, even if it fits"
    assert next_token.tolist() == [3, 2, 1], "the correction should come from the target at the first rejected draft"


@exercise_5(2)
def test_a_draft_is_kept_with_the_expected_probability():
    _, n_accepted, _ = many_rounds()
    first = torch.minimum(P[0], FIRST)
    second = (first[:, None] * torch.minimum(P[1], AFTER)).sum()
    expected = torch.stack([1 - first.sum(), first.sum() - second, second])
    counts = torch.bincount(n_accepted, minlength=3)
    assert like(counts, expected), "draft d_i should be kept with probability min(1, q_i(d_i) / p_i(d_i))"


@exercise_5(3)
def test_the_correction_comes_from_the_residual():
    _, n_accepted, next_token = many_rounds()
    residual = (FIRST - P[0]).clamp(min=0)
    counts = torch.bincount(next_token[n_accepted == 0], minlength=4)
    assert like(counts, residual / residual.sum()), "after a rejection: draw from normalize(max(0, q - p)), not from q"


@exercise_5(2)
def test_what_comes_out_has_the_targets_distribution():
    drafts, n_accepted, next_token = many_rounds()
    texts = torch.zeros(N, 3, dtype=torch.int64)
    for i in range(3):  # what was kept, then the next token, then as plain decoding goes on
        going_on = multinomial(AFTER[texts[:, i - 1]], seed=2 + i)
        made = torch.where(n_accepted == i, next_token, drafts[:, i] if i < 2 else 0)
        texts[:, i] = torch.where(i <= n_accepted, made, going_on)
    counts = torch.bincount(texts[:, 0] * 16 + texts[:, 1] * 4 + texts[:, 2], minlength=64)
    expected = FIRST[:, None, None] * AFTER[:, :, None] * AFTER[None]
    assert like(counts, expected.flatten()), "what was kept and the next token do not have the target's distribution"


@exercise_5(1)
def test_a_residual_of_zeros_falls_back_to_the_target():
    p = torch.tensor([0.0, 0.5, 0.5, 0.0]).expand(200, 1, -1)
    target_probs = torch.cat([p / 2, p], dim=1)  # as if rounding had made q a little smaller than p, but more so
    drafts = torch.ones(200, 1, dtype=torch.int64)
    _, next_token = speculative_accept(drafts, p, target_probs, torch.Generator().manual_seed(0))
    assert ((next_token == 1) | (next_token == 2)).all(), "where q - p leaves nothing (rounding), draw from q"


# 6 and 7. Decoding


@torch.no_grad()
def plain_greedy(model: GPT, prompt: list[int], n_new: int) -> list[int]:
    text = list(prompt)
    for _ in range(n_new):
        text.append(model(torch.tensor([text]))[0, -1].argmax().item())
    return text[len(prompt) :]


def grade_greedy(method: str) -> None:
    prompts = [[1, 2, 3], [4], [6, 5, 0, 2, 2, 1]]
    for lookahead in (1, 3):
        for n_new in (1, 2, 17):
            expected = [plain_greedy(tiny_model(), prompt, n_new) for prompt in prompts]
            for prompt, text in zip(prompts, expected, strict=True):
                alone = generate(tiny_model(), prompt, n_new, method=method, lookahead=lookahead).tokens[0]
                assert len(alone) == n_new, f"{n_new} new tokens asked for, {len(alone)} emitted: when does it stop?"
                assert alone == text, "the greedy text should equal plain decoding's: what is kept in the cache?"
            together = generate(tiny_model(), prompts, n_new, method=method, lookahead=lookahead).tokens
            assert together == expected, "right alone, wrong in a batch: each prompt keeps its own number of rows"


def grade_counts(method: str, passes_each: int, n_free: int) -> None:
    """Each round but the last of a long text: passes_each passes, n_free tokens, those kept, and one more."""
    calls = []
    hook = tiny_model().register_forward_hook(lambda *_: calls.append(1))
    try:
        rounds = list(stream(tiny_model(), [1, 2, 3], 24, method=method, lookahead=3))
    finally:
        hook.remove()
    assert len(calls) <= passes_each * len(rounds), f"a round should need {passes_each} pass(es) of the model"
    assert sum(len(record.passes) for record in rounds) == len(calls), "each pass should go through decoder.forward"
    for record in [record for record in rounds if record.drafts is not None][:-1]:
        n_drafts, n_accepted = record.drafts.shape[1], record.n_accepted[0]
        last = BONUS if n_accepted == n_drafts else CORRECTED
        assert record.origins[0] == [FREE] * n_free + [ACCEPTED] * n_accepted + [last], (
            f"a round should emit {n_free} free tokens, those kept, and one more: what was kept, and what is emitted?"
        )
    kept = {record.n_accepted[0] for record in rounds if record.drafts is not None}
    assert len(kept) > 1, "of these drafts some should be kept and some not"


@torch.no_grad()
def grade_distributions(method: str, n_free: int) -> None:
    """Each round's p and q against plain passes over the whole text."""
    model, text = tiny_model(), [1, 2, 3]
    settings = {"method": method, "lookahead": 3, "temperature": 0.7, "generator": torch.Generator().manual_seed(0)}
    for record in stream(model, text, 24, **settings):
        if record.drafts is not None:
            context, drafts = text + record.tokens[0][:n_free], record.drafts[0].tolist()
            logits = model(torch.tensor([context + drafts]))[:, len(context) - 1 :]
            assert close(record.target_probs, (logits / 0.7).softmax(-1)), (
                "the target probabilities are not the model's: are all kept rows in the cache, and no others?"
            )
            ids = [model.config.vocab_size + i for i in range(len(drafts))]
            logits = model(torch.tensor([context[:-1] + ids]))[:, len(context) - 1 :]
            assert close(record.draft_probs, (logits / 0.7).softmax(-1)), (
                "draft_probs are not what the look-ahead rows behind the kept text give: which rows did you read?"
            )
        text = text + record.tokens[0]


@torch.no_grad()
def grade_sampling(method: str) -> None:
    model, n_texts = tiny_model(4), 8000
    expected = torch.ones(1, dtype=torch.float64)
    texts = torch.tensor([[1, 2]])
    for _ in range(4):
        expected = (expected[:, None] * model(texts)[:, -1].softmax(-1)).flatten()
        texts = torch.cat([texts.repeat_interleave(4, 0), torch.arange(4).repeat(len(texts))[:, None]], dim=1)
    generator = torch.Generator().manual_seed(0)
    settings = {"method": method, "lookahead": 2, "temperature": 1.0, "generator": generator}
    tokens = torch.tensor(generate(model, [[1, 2]] * n_texts, 4, **settings).tokens)
    for i in range(3):  # the joint distribution of each two neighbours, summed over the others
        others = [axis for axis in range(4) if axis not in (i, i + 1)]
        counts = torch.bincount(tokens[:, i] * 4 + tokens[:, i + 1], minlength=16)
        assert like(counts, expected.view(4, 4, 4, 4).sum(others).flatten()), (
            "sampled texts do not have the target's distribution: are drafts drawn from the very p that is tested?"
        )


@exercise_6(4)
def test_two_pass_greedy_text_equals_plain_decoding():
    grade_greedy("pass-two-pass")


@exercise_6(3)
def test_a_two_pass_round_emits_two_more_tokens_than_it_keeps():
    grade_counts("pass-two-pass", passes_each=2, n_free=1)


@exercise_6(4)
def test_two_pass_drafts_and_targets_come_from_the_right_rows():
    grade_distributions("pass-two-pass", n_free=1)


@exercise_6(3)
def test_two_pass_texts_have_the_targets_distribution():
    grade_sampling("pass-two-pass")


@exercise_7(4)
def test_fused_greedy_text_equals_plain_decoding():
    grade_greedy("pass")


@exercise_7(4)
def test_a_fused_round_is_one_pass_and_emits_one_more_token_than_it_keeps():
    grade_counts("pass", passes_each=1, n_free=0)


@exercise_7(5)
def test_fused_drafts_come_from_the_group_behind_what_was_kept():
    grade_distributions("pass", n_free=0)


@exercise_7(3)
def test_fused_texts_have_the_targets_distribution():
    grade_sampling("pass")


# 8. The look-ahead loss

CUTS = np.array([[0, 3], [2, 1]])


def random_logits() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draft logits (2, 2, 3, 5), text logits (2, 8, 5), targets (2, 8)."""
    generator = torch.Generator().manual_seed(0)
    sizes = (2, 2, 3, 5), (2, 8, 5)
    return *(torch.randn(size, generator=generator) for size in sizes), torch.arange(16).view(2, 8) % 5


def places() -> list[tuple[int, int, int, int]]:
    """(b, g, i, text row) of every look-ahead row."""
    return [(b, g, i, int(CUTS[b, g]) + 1 + i) for b in range(2) for g in range(2) for i in range(3)]


def grade_loss(kind: str, of_one, message: str) -> None:
    drafts, texts, targets = random_logits()
    expected = torch.zeros(3)
    for b, g, i, row in places():
        log_p, log_q = drafts[b, g, i].log_softmax(-1), texts[b, row].log_softmax(-1)
        expected[i] += of_one(log_p, log_q, targets[b, row]) / 4
    result = lookahead_loss(kind, drafts, texts, targets, CUTS)
    assert result.shape == (3,), "the loss should be a mean for each look-ahead position, (L,)"
    assert close(result, expected, 1e-5), message


@exercise_8(3)
def test_lookahead_row_i_belongs_to_the_text_row_i_behind_its_cut():
    per_row = torch.arange(32).view(2, 8, 2)
    picked = rows_after_cuts(per_row, CUTS, 3)
    assert picked.shape == (2, 2, 3, 2), "(B, T, ...) should give (B, G, L, ...)"
    for b, g, i, row in places():
        assert picked[b, g, i].tolist() == per_row[b, row].tolist(), "[LA]_i behind cut c stands at c + i, i from 1"
    assert rows_after_cuts(per_row[..., 0], CUTS, 3).shape == (2, 2, 3), "(B, T) should give (B, G, L)"


@exercise_8(2)
def test_cross_entropy_with_the_text():
    grade_loss("ce", lambda log_p, log_q, token: -log_p[token], "ce: -log p of the text's token at the same place")


@exercise_8(2)
def test_kl_against_the_models_own_distribution():
    message = "kl: KL(q || p) = sum q (log q - log p), q being the model's own distribution at the same place"
    grade_loss("kl", lambda log_p, log_q, token: (log_q.exp() * (log_q - log_p)).sum(), message)


@exercise_8(1)
def test_total_variation_is_what_is_not_accepted():
    message = "tv: TV_SCALE x (1 - sum(min(p, q)))"
    grade_loss("tv", lambda log_p, log_q, _: TV_SCALE * (1 - torch.minimum(log_p.exp(), log_q.exp()).sum()), message)


@exercise_8(1)
def test_the_target_gets_no_gradient():
    drafts, texts, targets = random_logits()
    for kind in ("kl", "tv"):
        draft_leaf, text_leaf = drafts.clone().requires_grad_(), texts.clone().requires_grad_()
        lookahead_loss(kind, draft_leaf, text_leaf, targets, CUTS).sum().backward()
        assert draft_leaf.grad.abs().sum() > 0, f"{kind}: the drafts should get a gradient"
        assert text_leaf.grad is None, f"{kind}: the model should not move towards its drafts: detach the target"


@exercise_8(1)
def test_training_the_table_alone_lowers_the_loss():
    model = GPT(tiny_model().config).double()
    model.load_state_dict(tiny_model().state_dict())
    text = torch.randint(7, (4, 17), generator=torch.Generator().manual_seed(0))
    cuts, losses = np.tile([2, 5, 9], (4, 1)), []
    for _ in range(20):
        text_logits, draft_logits = training_pass(model, text[:, :-1], cuts)
        loss = lookahead_loss("kl", draft_logits, text_logits, text[:, 1:], cuts).mean()
        (gradient,) = torch.autograd.grad(loss, model.lookahead)
        with torch.no_grad():
            model.lookahead -= 0.5 * gradient
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0], "20 steps on the look-ahead table should lower the loss by a tenth or more"
