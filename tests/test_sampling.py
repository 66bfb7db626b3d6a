"""Logits to probabilities against obvious references, and the acceptance rule against what it promises."""

import math

import pytest
import torch
from conftest import chi_square_p_value

from minipass.errors import InputError
from minipass.sampling import draw, probabilities, speculative_accept

V = 9


def random_probs(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(*shape, V, generator=generator, dtype=torch.float64)).softmax(-1)


def test_temperature_divides_the_logits():
    logits = torch.randn(3, V, dtype=torch.float64)
    torch.testing.assert_close(probabilities(logits, 0.7), (logits / 0.7).softmax(-1))


def test_temperature_zero_puts_everything_on_the_most_likely_token():
    logits = torch.tensor([[0.0, 3.0, 1.0], [5.0, 4.0, 4.9]])
    assert probabilities(logits, 0).tolist() == [[0, 1, 0], [1, 0, 0]]


@pytest.mark.parametrize("k", [1, 3, V, 100])
def test_top_k_keeps_the_k_likeliest_in_proportion(k):
    logits = torch.randn(4, V, dtype=torch.float64)
    probs, full = probabilities(logits, 0.9, top_k=k), (logits / 0.9).softmax(-1)
    for row in range(4):
        kept = sorted(range(V), key=lambda token: -full[row, token])[:k]  # noqa: B023
        expected = torch.zeros(V, dtype=torch.float64)
        expected[kept] = full[row, kept] / full[row, kept].sum()
        torch.testing.assert_close(probs[row], expected)


def test_top_k_keeps_exactly_k_when_there_are_ties():
    assert (probabilities(torch.zeros(2, V), 1.0, top_k=4) > 0).sum(-1).tolist() == [4, 4]


@pytest.mark.parametrize("top_p", [1e-9, 0.3, 0.8, 0.999, 1.0])
def test_top_p_keeps_the_fewest_likeliest_tokens_that_reach_it(top_p):
    logits = 2 * torch.randn(6, V, dtype=torch.float64)
    probs, full = probabilities(logits, top_p=top_p), logits.softmax(-1)
    for row in range(6):
        kept, mass = [], 0.0
        for token in sorted(range(V), key=lambda token: -full[row, token]):  # noqa: B023
            if mass >= top_p:
                break
            kept.append(token)
            mass += full[row, token].item()
        expected = torch.zeros(V, dtype=torch.float64)
        expected[kept] = full[row, kept] / full[row, kept].sum()
        torch.testing.assert_close(probs[row], expected)


def test_top_p_counts_what_top_k_left():
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64).log()
    # top-k 2 leaves 4/7 and 3/7. The first alone reaches 0.5, though it was 0.4 before; 0.6 takes both.
    assert (probabilities(logits, top_k=2, top_p=0.5) > 0).tolist() == [True, False, False, False]
    expected = torch.tensor([4 / 7, 3 / 7, 0, 0], dtype=torch.float64)
    torch.testing.assert_close(probabilities(logits, top_k=2, top_p=0.6), expected)


@pytest.mark.parametrize("temperature", [1e-30, 1e-40, 1e-50, 1e-300])
def test_a_tiny_temperature_is_greedy_and_not_nan(temperature):
    logits = torch.tensor([[100.0, 3.0, 99.0]])
    assert probabilities(logits, temperature).tolist() == [[1, 0, 0]]


def test_half_precision_logits_give_float32_probabilities():
    assert probabilities(torch.zeros(1, 4, dtype=torch.bfloat16)).dtype == torch.float32


@pytest.mark.parametrize(
    "settings",
    [{"temperature": value} for value in (-1.0, math.nan, math.inf)]
    + [{"top_k": value} for value in (0, -3)]
    + [{"top_p": value} for value in (0.0, -0.5, 1.01, math.nan)],
)
def test_settings_out_of_bounds_are_refused(settings):
    with pytest.raises(InputError):
        probabilities(torch.zeros(1, 4), **settings)


def test_draw_follows_the_distribution_and_never_takes_a_token_of_probability_zero():
    probs = torch.tensor([0.0, 0.2, 0.0, 0.5, 0.3, 0.0], dtype=torch.float64)
    tokens = draw((3 * probs).expand(20_000, -1), torch.Generator().manual_seed(0)).tolist()  # need not sum to 1
    expected = {(token,): p for token, p in enumerate(probs.tolist()) if p}
    assert chi_square_p_value([(token,) for token in tokens], expected) > 1e-3


def test_without_drafts_acceptance_is_plain_sampling():
    q = random_probs(1, 1).expand(20_000, -1, -1)
    n_accepted, tokens = speculative_accept(
        torch.empty(20_000, 0, dtype=torch.int64), q[:, :0], q, torch.Generator().manual_seed(0)
    )
    assert n_accepted.eq(0).all()
    expected = {(token,): p for token, p in enumerate(q[0, 0].tolist())}
    assert chi_square_p_value([(token,) for token in tokens.tolist()], expected) > 1e-3


def accept_many(p: torch.Tensor, q: torch.Tensor, n: int = 20_000, seed: int = 0) -> tuple:
    """Drafts from p (L, V), tested against q (L + 1, V) that do not depend on the drafts, n times in one batch."""
    generator = torch.Generator().manual_seed(seed)
    p, q = p.expand(n, -1, -1), q.expand(n, -1, -1)
    drafts = draw(p, generator)
    return drafts, *speculative_accept(drafts, p, q, generator)


def test_what_comes_out_has_the_target_distribution_at_each_position():
    p, q = random_probs(2, seed=1), random_probs(3, seed=2)
    drafts, n_accepted, next_token = accept_many(p, q)
    text = torch.cat([drafts, torch.zeros_like(drafts[:, :1])], dim=1)
    text[torch.arange(len(text)), n_accepted] = next_token
    for position in range(3):  # given that the text got so far
        tokens = text[n_accepted >= position, position].tolist()
        expected = {(token,): value for token, value in enumerate(q[position].tolist())}
        assert chi_square_p_value([(token,) for token in tokens], expected) > 1e-3


def test_a_draft_is_kept_as_often_as_the_distributions_overlap_at_each_position():
    q = random_probs(4, seed=2)
    p = 0.5 * q[:3] + 0.5 * random_probs(3, seed=1)  # half alike, so that many texts get to the last position
    _, n_accepted, _ = accept_many(p, q)
    for position in range(3):
        reached = n_accepted[n_accepted >= position]
        assert len(reached) > 500
        kept = (reached > position).double().mean()
        overlap = torch.minimum(p[position], q[position]).sum()
        assert abs(kept - overlap) < 4 * math.sqrt(0.25 / len(reached))


def test_each_prompt_of_a_batch_has_its_own_distributions_and_its_own_count():
    p, q = random_probs(3, 1, seed=3), random_probs(3, 2, seed=4)  # of three prompts, repeated in turns
    many_p, many_q = p.repeat(8_000, 1, 1), q.repeat(8_000, 1, 1)
    generator = torch.Generator().manual_seed(0)
    drafts = draw(many_p, generator)
    n_accepted, next_token = speculative_accept(drafts, many_p, many_q, generator)
    first = torch.where(n_accepted > 0, drafts[:, 0], next_token)
    for prompt in range(3):
        expected = {(token,): value for token, value in enumerate(q[prompt, 0].tolist())}
        assert chi_square_p_value([(token,) for token in first[prompt::3].tolist()], expected) > 1e-3
        overlap = torch.minimum(p[prompt, 0], q[prompt, 0]).sum()
        assert abs(n_accepted[prompt::3].double().mean() - overlap) < 4 * math.sqrt(0.25 / 8_000)


def test_a_draft_that_was_not_drawn_at_random_leaves_the_target_distribution_as_it_is():
    p, q = torch.eye(V)[4:5].double(), random_probs(2, seed=2)
    drafts, n_accepted, next_token = accept_many(p, q)
    first = torch.where(n_accepted > 0, drafts[:, 0], next_token)
    expected = {(token,): value for token, value in enumerate(q[0].tolist())}
    assert chi_square_p_value([(token,) for token in first.tolist()], expected) > 1e-3


def test_float32_distributions_do_as_well():
    p, q = random_probs(1, seed=1).float(), random_probs(2, seed=2).float()
    drafts, n_accepted, next_token = accept_many(p, q)
    first = torch.where(n_accepted > 0, drafts[:, 0], next_token)
    expected = {(token,): value for token, value in enumerate(q[0].double().tolist())}
    assert chi_square_p_value([(token,) for token in first.tolist()], expected) > 1e-3


def test_equal_distributions_keep_every_draft():
    p = random_probs(3)
    _, n_accepted, _ = accept_many(p, torch.cat([p, p[:1]]))
    assert n_accepted.eq(3).all()


def test_disjoint_distributions_keep_none():
    p, q = torch.eye(V)[:1].double(), torch.eye(V)[1:3].double()
    drafts, n_accepted, next_token = accept_many(p, q, n=10)
    assert n_accepted.eq(0).all()
    assert next_token.eq(1).all()


def test_a_greedy_target_keeps_the_drafts_that_it_would_have_chosen():
    drafts, eye = torch.tensor([[4, 2], [4, 3], [1, 2]]), torch.eye(V).double()
    q = eye[torch.tensor([4, 2, 7])].expand(3, -1, -1)
    n_accepted, next_token = speculative_accept(drafts, eye[drafts], q)
    assert n_accepted.tolist() == [2, 1, 0]
    assert next_token.tolist() == [7, 2, 4]


def test_a_residual_that_rounding_made_zero_falls_back_to_the_target(monkeypatch):
    p = torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0]], dtype=torch.float64)
    monkeypatch.setattr(torch, "rand", lambda shape, **kw: torch.full(shape, 1.0, dtype=kw["dtype"]))
    n_accepted, next_token = speculative_accept(torch.tensor([[1]]), p[None], torch.cat([p, p])[None])
    assert n_accepted.tolist() == [0]
    assert next_token.tolist() == [3]  # q - p is zero everywhere; a token of q came all the same
