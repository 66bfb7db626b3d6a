"""The transformer, its key-value cache, the look-ahead table and the draft head: GPT-2's layout and what PaSS adds.

One forward serves training, prefill, plain decoding, draft, verify and fused passes; what differs is the Layout
(layout.py) that says which rows see which. The L look-ahead embeddings are the only parameters that PaSS adds
(PaSS, section 3; arXiv 2311.13581).
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F

from minipass.errors import InputError, whole
from minipass.layout import Layout

DRAFTING = ("lookahead", "draft_head.")  # the parameters that only drafting reads: what is trained on a frozen base


@dataclass(frozen=True)
class GPTConfig:
    """Sizes of a model. The defaults are those of the shipped models.

    vocab_size: tokens; block_size: positions of the context window; n_lookahead: trained look-ahead tokens (may be 0);
    n_draft: hidden units of the draft head (0: without one).
    Raises InputError when a size is impossible.
    """

    vocab_size: int = 2048
    block_size: int = 256
    n_layer: int = 6
    n_head: int = 4
    n_embd: int = 256
    n_lookahead: int = 8
    n_draft: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            whole(getattr(self, field.name), field.name, 0 if field.name in ("n_lookahead", "n_draft") else 1)
        if self.n_embd % self.n_head:
            raise InputError(f"n_embd ({self.n_embd}) must be a multiple of n_head ({self.n_head})")


class KVCache:
    """Keys and values of the real tokens so far: preallocated, with a length for each text of the batch.

    pairs: (n_layer, B, max_len, 2, n_head, head_dim), keys and values side by side. length: (B,) int64. A pass writes
    its R rows into the slots after `length` and leaves `length` alone; the caller then counts in the first k of them by
    `cache.length += k`. Others (look-ahead rows, rejected drafts) are overwritten by the next pass; until then the mask
    hides them. Rolling back is setting `length`.
    """

    def __init__(
        self, config: GPTConfig, batch_size: int, max_len: int, *, device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:  # fmt: skip
        self.max_len = max_len
        shape = (config.n_layer, batch_size, max_len, 2, config.n_head, config.n_embd // config.n_head)
        self.pairs = torch.zeros(shape, device=device, dtype=dtype)
        self.length = torch.zeros(batch_size, device=device, dtype=torch.int64)
        self.batch = torch.arange(batch_size, device=device)[:, None]  # (B, 1), goes with slots (B, R)
        self.masks: dict[Layout, torch.Tensor] = {}

    def slots(self, n_rows: int) -> torch.Tensor:
        """Where a pass of n_rows writes: (B, n_rows) int64."""
        return self.length[:, None] + torch.arange(n_rows, device=self.length.device)

    def mask(self, layout: Layout) -> torch.Tensor:
        """What is added to the attention scores of a pass: (B, R, max_len), 0 where a row sees a slot, else -inf. The
        layout is one for all texts.

        All rows see the slots before `length`, then come the R rows as the layout says, and nobody sees what follows.
        Such a row [seen .. | visible | hidden ..] is made once for each layout; a text's mask is a window of it.
        """
        if layout not in self.masks:
            visible = F.pad(F.pad(layout.visible[0], (self.max_len, 0), value=True), (0, self.max_len))
            scores = torch.zeros(visible.shape, device=visible.device, dtype=self.pairs.dtype)
            scores.masked_fill_(~visible, -math.inf)
            self.masks[layout] = scores.unfold(1, self.max_len, 1)  # (R, windows, max_len), a view
        return self.masks[layout].index_select(1, self.max_len - self.length).transpose(0, 1)

    def store(self, layer: int, slots: torch.Tensor, pairs: torch.Tensor) -> torch.Tensor:
        """Writes pairs (B, R, 2, n_head, head_dim) into `slots` (B, R); returns all of that layer."""
        self.pairs[layer][self.batch, slots] = pairs
        return self.pairs[layer]

    def select(self, texts: torch.Tensor) -> None:
        """Continues with these texts of the batch alone: (B',) int64."""
        self.pairs, self.length, self.batch = self.pairs[:, texts], self.length[texts], self.batch[: len(texts)]

    def gather(self, rows: torch.Tensor) -> None:
        """Moves rows of the last pass to its front: (B, K) int64, numbers within the pass, in any order.

        This is how the accepted path of a draft tree becomes contiguous.
        """
        self.pairs[:, self.batch, self.slots(rows.shape[1])] = self.pairs[:, self.batch, self.length[:, None] + rows]


class Attention(nn.Module):
    """Multi-head attention over the rows of a pass and the cache."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None, store: Callable | None) -> torch.Tensor:
        """x: (B, R, n_embd); mask: (B or 1, 1, R, keys), None is causal. Returns (B, R, n_embd)."""
        qkv = self.c_attn(x).unflatten(2, (3, self.n_head, -1))  # (B, R, 3, H, hd)
        q, pairs = qkv[:, :, 0], qkv[:, :, 1:]
        if store is not None:
            cached = store(pairs)  # (B, max_len, 2, H, hd)
            pairs = pairs if mask is None else cached  # prefill: the rows are all that there is
        q, k, v = q.transpose(1, 2), pairs[:, :, 0].transpose(1, 2), pairs[:, :, 1].transpose(1, 2)  # (B, H, .., hd)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self.c_proj(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """The two-layer network of a block, four times as wide inside."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, R, n_embd) to (B, R, n_embd)."""
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    """Attention and MLP, each after a LayerNorm and added to the residual stream."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None, store: Callable | None) -> torch.Tensor:
        """(B, R, n_embd) to (B, R, n_embd); the arguments are Attention's."""
        x = x + self.attn(self.ln_1(x), mask, store)
        return x + self.mlp(self.ln_2(x))


class DraftHead(nn.Module):
    """Tells a look-ahead row, which was computed blindly, the token before the place that it predicts (not in the
    paper): that token is known when the draft is drawn. The last matrix is zero at first, which changes nothing."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(2 * config.n_embd, config.n_draft)
        self.c_proj = nn.Linear(config.n_draft, config.n_embd)
        nn.init.zeros_(self.c_proj.weight)
        nn.init.zeros_(self.c_proj.bias)

    def forward(self, hidden: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        """Hidden states past the final norm and embeddings of the tokens before, both (..., n_embd), to the former."""
        return hidden + self.c_proj(F.gelu(self.c_fc(torch.cat([hidden, before], dim=-1)), approximate="tanh"))


class GPT(nn.Module):
    """A GPT-2 with a table of look-ahead embeddings.

    Parameter names are GPT-2's (wte, wpe, h.N.attn.c_attn, ..., ln_f), so its weights fit by renaming (Hugging Face
    stores the four matrices of a block transposed); the output head is wte, tied. `lookahead` is (n_lookahead, n_embd).
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        self.lookahead = nn.Parameter(torch.empty(config.n_lookahead, config.n_embd))
        self.reset_parameters()
        self.new_draft_head(config.n_draft)

    def reset_parameters(self) -> None:
        """GPT-2's initialisation: normal with std 0.02, projections into the residual stream scaled by its depth."""
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                depth = math.sqrt(2 * self.config.n_layer) if name.endswith("c_proj.weight") else 1.0
                nn.init.normal_(parameter, std=0.02 / depth)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def set_lookahead(self, table: torch.Tensor) -> None:
        """Replaces the look-ahead table by a copy of `table` (L, n_embd), of any L.

        Raises InputError when its width is not the model's.
        """
        if table.dim() != 2 or table.shape[1] != self.config.n_embd:
            shape, n_embd = tuple(table.shape), self.config.n_embd
            raise InputError(f"a look-ahead table of shape {shape} does not fit a model with n_embd {n_embd}")
        self.config = replace(self.config, n_lookahead=len(table))
        self.lookahead = nn.Parameter(table.detach().to(self.wte.weight, copy=True))

    def new_draft_head(self, n_draft: int) -> None:
        """Replaces the draft head by a new one, which changes nothing yet; 0: by none. Raises InputError if < 0."""
        self.config = replace(self.config, n_draft=n_draft)
        self.draft_head = DraftHead(self.config).to(self.wte.weight) if n_draft else None

    def with_lookahead(self, table: torch.Tensor) -> "GPT":
        """This model, weights shared, with another look-ahead table. Raises InputError as set_lookahead."""
        other = copy.copy(self)
        other._parameters = dict(self._parameters)
        other.set_lookahead(table)
        return other

    def new_lookahead(self, n_lookahead: int) -> None:
        """Replaces the look-ahead table by a random one, N(0, 0.02). Raises InputError when n_lookahead < 0."""
        config = replace(self.config, n_lookahead=n_lookahead)
        self.set_lookahead(torch.randn(n_lookahead, config.n_embd) * 0.02)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.wte.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """What the weights, the logits and the cache are in."""
        return self.wte.weight.dtype

    def hidden(self, ids: torch.Tensor, layout: Layout | None = None, cache: KVCache | None = None) -> torch.Tensor:
        """One pass over R rows, up to the last block: hidden states (B, R, n_embd).

        ids: (B, P) int64, the real rows; the layout's Q look-ahead rows follow them, R = P + Q.
        layout: which rows see which, and positions; None is plain causal text from position 0, and an empty cache.
        cache: the rows follow what it holds, and are written after it; its length is left to the caller.

        A position past the window is clamped to its last: such rows (drafts past the window's edge) give nothing that
        is emitted, but may share a batch with rows that have room. Raises InputError when plain text is longer than the
        window, ValueError when the cache has no room.
        """
        n_rows, block_size = ids.shape[1] + (0 if layout is None else len(layout.lookahead)), self.config.block_size
        if cache is not None and n_rows > cache.max_len:
            raise ValueError(f"a pass of {n_rows} rows does not fit into a cache of {cache.max_len} slots")
        x = self.wte(ids)
        if layout is None:
            if n_rows > block_size:
                raise InputError(f"{n_rows} tokens do not fit into the context window of {block_size}")
            position, mask = torch.arange(n_rows, device=ids.device), None
        else:
            if len(layout.lookahead):
                x = torch.cat([x, self.lookahead[layout.lookahead].expand(len(x), -1, -1)], dim=1)
            position = layout.depth if cache is None else cache.length[:, None] + layout.depth
            mask = (layout.visible if cache is None else cache.mask(layout))[:, None]  # for all heads: (B, 1, R, keys)
        slots = None if cache is None else cache.slots(n_rows)
        x = x + self.wpe(position.clamp(max=block_size - 1))
        for layer, block in enumerate(self.h):
            x = block(x, mask, None if cache is None else partial(cache.store, layer, slots))
        return x

    def logits(
        self, hidden: torch.Tensor, before: torch.Tensor | None = None, tokens: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Hidden states (..., n_embd) to logits (..., vocab_size): the final norm and the tied output.

        before: (...) int64, for look-ahead rows the tokens before the places that they predict: read by a draft head.
        tokens: (..., K) int64, of which alone logits (..., K) are wanted.
        """
        hidden = self.ln_f(hidden)
        if before is not None and self.draft_head is not None:
            hidden = self.draft_head(hidden, self.wte(before))
        if tokens is not None:
            return (self.wte(tokens) @ hidden[..., None]).squeeze(-1)
        return F.linear(hidden, self.wte.weight)

    def forward(self, ids: torch.Tensor, layout: Layout | None = None, cache: KVCache | None = None) -> torch.Tensor:
        """One pass over R rows to logits (B, R, vocab_size), in the model's dtype; arguments and errors of `hidden`."""
        return self.logits(self.hidden(ids, layout, cache))
