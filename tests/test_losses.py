"""Training's one forward: look-ahead rows behind random cuts see what a draft pass there would see. The losses
themselves are tested by the course's graders, exercise 11."""

import numpy as np
import pytest
import torch

from minipass.layout import path, with_groups
from minipass.losses import evaluate, next_token_loss, random_cuts, training_pass

B, T, G, L, V = 3, 20, 5, 4, 11


@pytest.fixture
def text() -> torch.Tensor:
    return torch.randint(0, V, (B, T + 1), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def cuts() -> np.ndarray:
    return random_cuts(B, T, G, L, np.random.default_rng(0))


def test_cuts_differ_within_a_text_and_leave_room_for_the_lookahead_positions():
    cuts = random_cuts(200, T, G, L, np.random.default_rng(1))
    assert cuts.shape == (200, G)
    assert cuts.min() == 0
    assert cuts.max() == T - 1 - L
    assert all(len(set(row)) == G for row in cuts.tolist())


@torch.no_grad()
def test_lookahead_rows_behind_a_cut_are_a_draft_pass_after_the_text_up_to_it(model, text, cuts):
    _, draft_logits = training_pass(model, text[:, :-1], cuts)
    assert draft_logits.shape == (B, G, L, V)
    for b in range(B):
        for g, cut in enumerate(cuts[b]):
            draft_pass = with_groups(path(cut + 1), [cut], L)
            torch.testing.assert_close(draft_logits[b, g], model(text[b, None, : cut + 1], draft_pass)[0, -L:])


@torch.no_grad()
def test_lookahead_rows_do_not_disturb_the_text(model, text, cuts):
    torch.testing.assert_close(training_pass(model, text[:, :-1], cuts)[0], model(text[:, :-1]))


@torch.no_grad()
def test_evaluation_reports_the_overlap_of_draft_and_target_distributions(model, text):
    cuts = random_cuts(B, T, G, L, np.random.default_rng(0))  # evaluate's own
    text_logits, draft_logits = training_pass(model, text[:, :-1], cuts)
    overlap, match = torch.zeros(L), torch.zeros(L)
    for b, g, i in np.ndindex(B, G, L):
        p, q = draft_logits[b, g, i].softmax(-1), text_logits[b, cuts[b, g] + i + 1].softmax(-1)
        overlap[i] += sum(min(pair) for pair in zip(p.tolist(), q.tolist(), strict=True)) / (B * G)
        match[i] += (p.argmax() == q.argmax()) / (B * G)
    figures = evaluate(model, text, n_groups=G)
    assert figures["acceptance"] == pytest.approx(overlap.tolist(), rel=1e-4)
    assert figures["match"] == pytest.approx(match.tolist(), rel=1e-4)
    assert figures["loss"] == pytest.approx(next_token_loss(text_logits, text[:, 1:]).item(), rel=1e-4)


@torch.no_grad()
def test_next_token_loss_of_an_even_guess_is_the_log_of_the_vocabulary(text):
    loss = next_token_loss(torch.zeros(B, T, V), text[:, 1:])
    torch.testing.assert_close(loss, torch.tensor(float(V)).log())


def test_evaluation_is_repeatable_and_its_figures_are_shares(model, text):
    figures = evaluate(model, text, n_groups=G)
    assert figures == evaluate(model, text, n_groups=G)
    assert len(figures["acceptance"]) == len(figures["match"]) == L
    assert all(0 <= value <= 1 for value in figures["acceptance"] + figures["match"])
