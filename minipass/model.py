"""The transformer, its key-value cache and the look-ahead table: GPT-2's layout plus L input embeddings.

One forward serves training, prefill, plain decoding, draft, verify and fused passes; what differs is the Layout
(layout.py) that says which rows see which. The L look-ahead embeddings are the only parameters that PaSS adds
(PaSS, section 3; arXiv 2311.13581).
"""

import math
from dataclasses import dataclass, fields, replace

import torch
import torch.nn as nn
import torch.nn.functional as F

from minipass.errors import InputError
from minipass.layout import Layout


@dataclass(frozen=True)
class GPTConfig:
    """Sizes of a model. The defaults are those of the shipped models.

    vocab_size: tokens; block_size: positions of the context window; n_lookahead: trained look-ahead tokens (may be 0).
    Raises InputError when a size is impossible.
    """

    vocab_size: int = 2048
    block_size: int = 256
    n_layer: int = 6
    n_head: int = 4
    n_embd: int = 256
    n_lookahead: int = 8

    def __post_init__(self) -> None:
        for field in fields(self):
            value, least = getattr(self, field.name), 0 if field.name == "n_lookahead" else 1
            if not isinstance(value, int) or value < least:
                raise InputError(f"{field.name} must be a whole number of at least {least}, not {value!r}")
        if self.n_embd % self.n_head:
            raise InputError(f"n_embd ({self.n_embd}) must be a multiple of n_head ({self.n_head})")


class KVCache:
    """Keys and values of the real tokens so far: preallocated, with a length per batch row.

    keys, values: (n_layer, B, n_head, max_len, head_dim). length: (B,) int64. A pass writes its R rows into the slots
    behind `length` and leaves `length` alone; the caller then keeps the first k of them with `cache.length += k`.
    Rows that are not kept (look-ahead rows, rejected drafts) are overwritten by the next pass; until then the mask
    hides them. Rolling back is setting `length`.
    """

    def __init__(
        self,
        config: GPTConfig,
        batch_size: int,
        max_len: int,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ):
        shape = (config.n_layer, batch_size, config.n_head, max_len, config.n_embd // config.n_head)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.length = torch.zeros(batch_size, device=device, dtype=torch.int64)
        self.batch = torch.arange(batch_size, device=device)[:, None]  # (B, 1), goes with slots (B, R)

    @property
    def max_len(self) -> int:
        """Slots of each row."""
        return self.keys.shape[3]

    def slots(self, n_rows: int) -> torch.Tensor:
        """Where a pass of n_rows writes: (B, n_rows) int64."""
        return self.length[:, None] + torch.arange(n_rows, device=self.length.device)

    def mask(self, visible: torch.Tensor) -> torch.Tensor:
        """Extends (B or 1, R, R) `visible` over the cache: (B, R, max_len) bool, True where a row sees a slot.

        Slots before `length` are seen by all rows, the next R as `visible` says, and what lies behind by none.
        """
        n_rows = visible.shape[1]
        relative = torch.arange(self.max_len, device=self.length.device) - self.length[:, None]  # (B, max_len)
        padded = F.pad(F.pad(visible, (1, 0), value=True), (0, 1), value=False)  # (.., R, 1 + R + 1)
        index = relative.clamp(-1, n_rows) + 1  # 0: in the cache, 1..R: this pass, R + 1: garbage
        index = index[:, None, :].expand(-1, n_rows, -1)
        return padded.expand(len(index), -1, -1).gather(2, index)

    def store(self, layer: int, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor) -> tuple:
        """Writes k, v (B, n_head, R, head_dim) into `slots` (B, R); returns all keys and values of that layer."""
        keys, values = self.keys[layer], self.values[layer]
        keys[self.batch, :, slots] = k.transpose(1, 2)  # indexed assignment: 4x faster than scatter_ on a CPU
        values[self.batch, :, slots] = v.transpose(1, 2)
        return keys, values

    def select(self, texts: torch.Tensor) -> None:
        """Goes on with these rows of the batch alone: texts (B',) int64."""
        self.keys, self.values, self.length = self.keys[:, texts], self.values[:, texts], self.length[texts]
        self.batch = self.batch[: len(texts)]

    def gather(self, rows: torch.Tensor) -> None:
        """Moves rows of the last pass to its front: rows (B, K) int64, numbers within the pass, any order.

        What lay there is overwritten. This is how a kept path of a tree of drafts becomes contiguous.
        """
        source, target = self.length[:, None] + rows, self.slots(rows.shape[1])
        self.keys[:, self.batch, :, target] = self.keys[:, self.batch, :, source]
        self.values[:, self.batch, :, target] = self.values[:, self.batch, :, source]


class Attention(nn.Module):
    """Multi-head attention over the rows of a pass and the cache."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(
        self,
        x: torch.Tensor,
        mask: torch.Tensor | None,
        cache: KVCache | None,
        layer: int,
        slots: torch.Tensor | None,
    ) -> torch.Tensor:
        """x: (B, R, n_embd); mask: (B or 1, 1, R, keys) bool, None is causal. Returns (B, R, n_embd)."""
        q, k, v = self.c_attn(x).unflatten(2, (3, self.n_head, -1)).permute(2, 0, 3, 1, 4)  # 3 x (B, H, R, hd)
        if cache is not None:
            k, v = cache.store(layer, k, v, slots)
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
    """Attention and MLP, each behind a LayerNorm and added to the residual stream."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(
        self,
        x: torch.Tensor,
        mask: torch.Tensor | None,
        cache: KVCache | None,
        layer: int,
        slots: torch.Tensor | None,
    ) -> torch.Tensor:
        """(B, R, n_embd) to (B, R, n_embd); the arguments are Attention's."""
        x = x + self.attn(self.ln_1(x), mask, cache, layer, slots)
        return x + self.mlp(self.ln_2(x))


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

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Input embeddings (B, R, n_embd) of ids (B, R): ordinary tokens, from vocab_size on the look-ahead table."""
        vocab_size = self.config.vocab_size
        if self.config.n_lookahead == 0:
            return self.wte(ids)
        lookahead = F.embedding((ids - vocab_size).clamp(min=0), self.lookahead)
        return torch.where((ids < vocab_size)[..., None], self.wte(ids.clamp(max=vocab_size - 1)), lookahead)

    def forward(
        self,
        ids: torch.Tensor,
        layout: Layout | None = None,
        cache: KVCache | None = None,
        rows: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """One pass over R rows.

        ids: (B, R) int64; an id of vocab_size + i - 1 stands for the look-ahead token [LA]_i.
        layout: which rows see which, and positions; None is plain causal text from position 0 (no cache then).
        cache: the rows follow what it holds, and are written behind it; its length is left to the caller.
        rows: (B, K) int64, the rows whose logits are wanted; None is all.
        Returns logits (B, R or K, vocab_size) in the model's dtype.

        A position past the window is clamped to its last: such rows (drafts behind the window's edge) yield nothing
        that is kept, but may stand in a batch with rows that have room. Raises InputError when plain text is longer
        than the window, ValueError when a cache comes without a layout or has no room.
        """
        n_rows, block_size = ids.shape[1], self.config.block_size
        if layout is None:
            if cache is not None:
                raise ValueError("a pass with a cache needs a layout")
            if n_rows > block_size:
                raise InputError(f"{n_rows} tokens do not fit into the context window of {block_size}")
            position, mask, slots = torch.arange(n_rows, device=ids.device)[None], None, None
        elif cache is None:
            position, mask, slots = layout.depth, layout.visible, None
        else:
            if n_rows > cache.max_len:
                raise ValueError(f"a pass of {n_rows} rows does not fit into a cache of {cache.max_len} slots")
            position, mask = cache.length[:, None] + layout.depth, cache.mask(layout.visible)
            slots = cache.slots(n_rows)
        if mask is not None:
            mask = mask[:, None]  # the same for every head: (B, 1, R, keys)
        x = self.embed(ids) + self.wpe(position.clamp(max=block_size - 1))
        for layer, block in enumerate(self.h):
            x = block(x, mask, cache, layer, slots)
        if rows is not None:
            x = x.gather(1, rows[..., None].expand(-1, -1, x.shape[2]))
        return F.linear(self.ln_f(x), self.wte.weight)
