"""What training minimises: the next-token loss, and the look-ahead losses that teach the table to draft.

One layout serves training and fused decoding (layout.with_groups): the text's rows, then G groups of L look-ahead
rows, each hanging from a random row of the text, its cut. One forward trains G x L drafts (PaSS, section 3.2; the
losses kl and tv are ours).
"""

import numpy as np
import torch
import torch.nn.functional as F

from minipass.layout import Layout, path, with_groups
from minipass.model import GPT, KVCache

LOOKAHEAD_LOSSES = ("ce", "kl", "tv")
N_RANKS = 10  # likeliest drafts of a position, which are compared with the model's likeliest token
TV_SCALE = 4.0  # nats of KL that a total variation of 1 counts for, so that one weight suits all three losses


def random_cuts(batch_size: int, n_text: int, n_groups: int, n_lookahead: int, rng: np.random.Generator) -> np.ndarray:
    """Cuts, rows from which look-ahead groups hang: (batch_size, n_groups) int64, different ones within a text.

    For each cut c, c + L <= n_text - 1: so the target distribution after each look-ahead position is there.
    """
    choices = np.arange(n_text - n_lookahead)
    return np.stack([rng.choice(choices, n_groups, replace=False) for _ in range(batch_size)])


def training_pass(
    model: GPT, text: torch.Tensor, cuts: np.ndarray, n_lookahead: int | None = None, *, frozen: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """One forward over text (B, T) int64, with groups of L = n_lookahead (None: all) tokens hanging from cuts (B, G).

    Returns the text's logits (B, T, V) and the look-ahead logits (B, G, L, V). A draft head is told the text's token
    before each draft: a draft is only tested if all before it were accepted, so only that case counts.
    frozen: the base is not trained. Then the text's rows do not depend on what is trained, and the forward takes two
    steps: the text without gradients, then the look-ahead rows with gradients, which see its keys and values.
    """
    n_lookahead = model.config.n_lookahead if n_lookahead is None else n_lookahead
    if n_lookahead == 0 or cuts.shape[1] == 0:
        return model(text), text.new_zeros(len(text), 0, 0, model.config.vocab_size, dtype=torch.float32)
    n_text, layout = text.shape[1], with_groups(path(text.shape[1]), cuts, n_lookahead).to(text.device)
    if frozen:
        with torch.no_grad():
            cache = KVCache(model.config, len(text), n_text, device=model.device, dtype=model.dtype)
            text_logits = model(text, cache=cache)
        rows = Layout(layout.visible[:, n_text:], layout.depth[:, n_text:], layout.lookahead)
        drafting = model.hidden(text[:, :0], rows, BehindText(cache))
    else:
        hidden = model.hidden(text, layout)
        text_logits, drafting = model.logits(hidden[:, :n_text]), hidden[:, n_text:]
    drafting = drafting.unflatten(1, (-1, n_lookahead))  # (B, G, L, n_embd)
    return text_logits, model.logits(drafting, rows_after_cuts(text, cuts, n_lookahead))


class BehindText:
    """Stands in for a KVCache: rows see the text in one, and each other, with gradients to their own keys and values.

    Nothing is written. The layout of the rows counts positions from the text's beginning."""

    def __init__(self, text: KVCache) -> None:
        self.pairs, self.length = text.pairs, text.length

    def slots(self, n_rows: int) -> None:
        """Nothing is written."""

    def mask(self, layout: Layout) -> torch.Tensor:
        """(B, Q, T + Q) bool: the text's keys, then the rows' own."""
        return layout.visible

    def store(self, layer: int, slots: None, pairs: torch.Tensor) -> torch.Tensor:
        """That layer's keys and values of the text, then the rows' own, pairs (B, Q, 2, kv_heads, head_dim)."""
        return torch.cat([self.pairs[layer], pairs], dim=1)


def next_token_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy, in nats per token, of logits (B, T, V) with targets (B, T) int64."""
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def rows_after_cuts(per_row: torch.Tensor, cuts: np.ndarray, n_lookahead: int) -> torch.Tensor:
    """For each look-ahead row, the value of the text's row at its position: [LA]_i after cut c is at position c + i.

    per_row: (B, T, ...), a value for each text row; returns (B, G, L, ...).
    """
    index = torch.from_numpy(cuts)[..., None] + 1 + torch.arange(n_lookahead)  # (B, G, L)
    batch = torch.arange(len(cuts))[:, None, None]
    return per_row[batch.to(per_row.device), index.to(per_row.device)]


def lookahead_loss(
    kind: str, draft_logits: torch.Tensor, text_logits: torch.Tensor, targets: torch.Tensor, cuts: np.ndarray
) -> torch.Tensor:
    """Mean look-ahead loss by position, (L,), computed in float32. Raises ValueError for an unknown kind.

    draft_logits: (B, G, L, V). text_logits: (B, T, V), which give the target distributions; detached here. targets:
    (B, T) int64, the token after each text row. kind: `ce`, cross entropy with the text (the paper's); `kl`, KL(q || p)
    in nats; `tv`, TV_SCALE x the total variation, which is 1 - the expected acceptance sum(min(p, q)).
    """
    n_lookahead = draft_logits.shape[2]
    log_p = F.log_softmax(draft_logits.float(), dim=-1)  # (B, G, L, V)
    if kind == "ce":
        token = rows_after_cuts(targets, cuts, n_lookahead)
        return -log_p.gather(-1, token[..., None]).squeeze(-1).mean((0, 1))
    log_q = F.log_softmax(rows_after_cuts(text_logits.detach(), cuts, n_lookahead).float(), dim=-1)
    if kind == "kl":
        return (log_q.exp() * (log_q - log_p)).sum(-1).mean((0, 1))
    if kind == "tv":
        return TV_SCALE * 0.5 * (log_q.exp() - log_p.exp()).abs().sum(-1).mean((0, 1))
    raise ValueError(f"unknown look-ahead loss {kind!r}; there are {', '.join(LOOKAHEAD_LOSSES)}")


@torch.no_grad()
def evaluate(model: GPT, windows: torch.Tensor, *, n_groups: int = 8, batch_size: int = 16) -> dict:
    """Teacher-forced figures on windows (N, T + 1) int64 of held-out text, always from the same cuts.

    n_groups: for each window, fewer where it is too short. Returns a dict:
    `loss`: nats per token of plain next-token prediction.
    `acceptance`: (L,) by look-ahead position, the expected acceptance sum(min(p, q)) = 1 - TV(p, q) at temperature 1.
    `match`: (L,), how often the likeliest draft is the model's likeliest token.
    `rank_accuracy`: (L, N_RANKS), how often the draft of each rank is that token, counted only where one of the drafts
    was right at every position before, as on a path of a tree.
    `constant_acceptance`: the acceptance of the mean q as p, so of drafts that know nothing of the text.
    """
    n_lookahead, rng = model.config.n_lookahead, np.random.default_rng(0)
    n_groups = max(0, min(n_groups, windows.shape[1] - 1 - n_lookahead))
    losses, acceptance, right, first = [], [], [], []
    for batch in windows.split(batch_size):
        text, targets = batch[:, :-1].to(model.device), batch[:, 1:].to(model.device)
        cuts = random_cuts(len(text), text.shape[1], n_groups, n_lookahead, rng)
        text_logits, draft_logits = training_pass(model, text, cuts)
        losses += [next_token_loss(text_logits, targets)] * len(text)
        if n_groups and n_lookahead:
            q_logits = rows_after_cuts(text_logits, cuts, n_lookahead)
            p, q = draft_logits.float().softmax(-1), q_logits.float().softmax(-1)
            acceptance.append(torch.minimum(p, q).sum(-1).flatten(0, 1))
            first.append(q[:, :, 0].flatten(0, 1))  # (B * G, V): other positions have nearly the same mean
            ranked = draft_logits.topk(min(N_RANKS, p.shape[-1])).indices  # (B, G, L, N_RANKS)
            right.append((ranked == q_logits.argmax(-1, keepdim=True)).flatten(0, 1))  # (B * G, L, N_RANKS)
    figures = {"loss": torch.stack(losses).mean().item(), "acceptance": [], "match": [], "rank_accuracy": []}
    if right:
        right = torch.cat(right).double()  # (N, L, N_RANKS)
        reached = F.pad(right.sum(-1).cumprod(1), (1, -1), value=1.0)[..., None]  # (N, L, 1): all before were right
        figures["acceptance"] = torch.cat(acceptance).mean(0).tolist()
        q = torch.cat(first)
        figures["constant_acceptance"] = torch.minimum(q.mean(0), q).sum(-1).mean().item()
        figures["match"] = right[..., 0].mean(0).tolist()
        figures["rank_accuracy"] = ((right * reached).sum(0) / reached.sum(0).clamp(min=1)).tolist()
    return figures
