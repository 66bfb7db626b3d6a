"""The transformer in GPT-2's or Llama's layout, its key-value cache, and what PaSS adds to it.

One forward serves training, prefill, plain decoding, draft, verify and fused passes; what differs is the Layout
(layout.py) that says which rows see which. The L look-ahead embeddings are the only parameters that PaSS adds
(PaSS, section 3; arXiv 2311.13581). The draft head and the gated adapters improve drafts; they are not in the paper.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from numbers import Real
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn as nn
import torch.nn.functional as F

from minipass.errors import InputError, whole
from minipass.kernels import add_linear, linear
from minipass.layout import Layout

MAY_BE_0 = ("n_lookahead", "n_draft", "lora_rank", "n_kv_head", "head_dim", "n_inner")  # of a config's sizes


def is_drafting(name: str) -> bool:
    """Whether only drafting reads the parameter with this name. Such parameters can be trained for a frozen base."""
    return name.startswith(("lookahead", "draft_head.")) or name.endswith((".down", ".up"))


@dataclass(frozen=True)
class GPTConfig:
    """Sizes of a model. The defaults are those of the shipped models.

    vocab_size: tokens; block_size: positions of the context window; n_lookahead: trained look-ahead tokens (may be 0);
    n_draft: hidden units of the draft head (0: without one); lora_rank: of the gated adapters (0: without).
    llama: Llama's layout (RMSNorm, rotary positions, SwiGLU, no biases), not GPT-2's (LayerNorm, learned positions,
    GELU, biases). n_kv_head: key-value heads (0: n_head); head_dim: width of a head (0: n_embd / n_head); n_inner:
    width inside an MLP (0: 4 n_embd; for SwiGLU, which has a matrix more, 8/3 n_embd); rope_theta: base of the rotary
    angles; norm_eps: added to variances; tied: whether the output head is the token embedding.
    Raises InputError when a size is impossible.
    """

    vocab_size: int = 2048
    block_size: int = 256
    n_layer: int = 6
    n_head: int = 4
    n_embd: int = 256
    n_lookahead: int = 8
    n_draft: int = 0
    lora_rank: int = 0
    llama: bool = False
    n_kv_head: int = 0
    head_dim: int = 0
    n_inner: int = 0
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    tied: bool = True

    def __post_init__(self) -> None:
        for field in fields(self):
            if field.type is int:
                size = whole(getattr(self, field.name), field.name, 0 if field.name in MAY_BE_0 else 1)
                object.__setattr__(self, field.name, size)  # a plain int, which JSON and torch.load take
        for name in ("rope_theta", "norm_eps"):
            value = getattr(self, name)
            if not isinstance(value, Real) or not 0 < value < math.inf:
                raise InputError(f"{name} must be a number greater than 0, not {value!r:.60}")
        if not self.head_dim and self.n_embd % self.n_head:
            raise InputError(f"n_embd ({self.n_embd}) must be a multiple of n_head ({self.n_head})")
        if self.n_head % self.kv_heads:
            raise InputError(f"n_head ({self.n_head}) must be a multiple of n_kv_head ({self.n_kv_head})")
        if self.llama and self.head_width % 2:
            raise InputError(f"rotary positions need heads of an even width, not {self.head_width}")

    @property
    def kv_heads(self) -> int:
        """Key-value heads; each serves n_head / kv_heads query heads."""
        return self.n_kv_head or self.n_head

    @property
    def head_width(self) -> int:
        """Width of a head."""
        return self.head_dim or self.n_embd // self.n_head

    @property
    def inner_width(self) -> int:
        """Width inside an MLP."""
        return self.n_inner or (32 * math.ceil(self.n_embd / 12) if self.llama else 4 * self.n_embd)


class KVCache:
    """Keys and values of the real tokens so far: preallocated, with a length for each text of the batch.

    pairs: (n_layer, B, max_len, 2, kv_heads, head_dim), keys and values side by side. length: (B,) int64. A pass writes
    its R rows into the slots after `length` and leaves `length` alone; the caller then keeps the first k of them by
    `cache.length += k`. The next pass overwrites the others (look-ahead rows, rejected drafts); until then the mask
    hides them. To roll back, set `length`.
    """

    def __init__(
        self, config: GPTConfig, batch_size: int, max_len: int, *, device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:  # fmt: skip
        self.max_len = max_len
        shape = (config.n_layer, batch_size, max_len, 2, config.kv_heads, config.head_width)
        self.pairs = torch.zeros(shape, device=device, dtype=dtype)
        self.length = torch.zeros(batch_size, device=device, dtype=torch.int64)
        self.batch = torch.arange(batch_size, device=device)[:, None]  # (B, 1), goes with slots (B, R)
        self.columns = torch.arange(max_len, device=device)
        self.masks: WeakKeyDictionary[Layout, torch.Tensor] = WeakKeyDictionary()

    def slots(self, n_rows: int) -> torch.Tensor:
        """Where a pass of n_rows writes: (B, n_rows) int64. Raises ValueError when it has more rows than the cache."""
        if n_rows > self.max_len:
            raise ValueError(f"a pass of {n_rows} rows does not fit into a cache of {self.max_len} slots")
        return self.length[:, None] + torch.arange(n_rows, device=self.length.device)

    def mask(self, layout: Layout) -> torch.Tensor:
        """What a pass adds to its attention scores: (B, R, max_len) in the dtype of `pairs`, 0 where a row sees a slot,
        else -inf.

        A row sees all slots before `length`, of the pass's R rows those that the layout says, and nothing after them.
        Such rows [seen .. | visible | hidden ..] are made once for each layout; a text's mask is a window of them.
        """
        if layout not in self.masks:
            visible = F.pad(F.pad(layout.visible, (self.max_len, 0), value=True), (0, self.max_len))
            scores = torch.zeros(visible.shape, device=visible.device, dtype=self.pairs.dtype)
            scores.masked_fill_(~visible, -math.inf)
            self.masks[layout] = scores
        scores = self.masks[layout].expand(len(self.length), -1, -1)
        window = (self.max_len - self.length)[:, None] + self.columns  # (B, max_len)
        return scores.gather(2, window[:, None].expand(-1, scores.shape[1], -1))

    def store(self, layer: int, slots: torch.Tensor, pairs: torch.Tensor) -> torch.Tensor:
        """Writes pairs (B, R, 2, kv_heads, head_dim) into `slots` (B, R); returns all of that layer.

        A hidden value is multiplied by 0, but 0 times infinity is NaN and would reach every row. Look-ahead rows in
        float16 can overflow to infinity, so such values are written as 0.
        """
        self.pairs[layer][self.batch, slots] = pairs.nan_to_num(0, 0, 0).to(self.pairs.dtype)  # autocast has another
        return self.pairs[layer]

    def select(self, texts: torch.Tensor) -> None:
        """Keeps only these texts of the batch: (B',) int64."""
        self.pairs, self.length, self.batch = self.pairs[:, texts], self.length[texts], self.batch[: len(texts)]

    def gather(self, rows: torch.Tensor) -> None:
        """Moves rows of the last pass to its front: (B, K) int64, numbers within the pass, in any order.

        This is how the accepted path of a draft tree becomes contiguous.
        """
        self.pairs[:, self.batch, self.slots(rows.shape[1])] = self.pairs[:, self.batch, self.length[:, None] + rows]


class Pass(NamedTuple):
    """What every block of a pass needs to know.

    mask: (B or 1, 1, R x H / H', keys), each row once for each of the query heads that share keys, True or 0 where it
    sees a key; None is causal, over the rows alone.
    rotary: cosines and sines (B or 1, R, H + 2 H', head_dim) of the rows' positions (without B where all texts are
    plain), or None where these are learned.
    n_lookahead: how many of the rows, the last ones, are look-ahead rows.
    """

    mask: torch.Tensor | None
    rotary: tuple[torch.Tensor, torch.Tensor] | None
    n_lookahead: int


class Linear(nn.Linear):
    """nn.Linear, on a CPU with the products of kernels.py."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, self.bias)


class Matrix(Linear):
    """A linear layer that can have a gated adapter (LoRA, arXiv 2106.09685), which acts on look-ahead rows alone (as in
    arXiv 2507.11851). Real rows never see look-ahead rows, so the target distribution stays the same, bit for bit."""

    def __init__(self, in_features: int, out_features: int, bias: bool) -> None:
        super().__init__(in_features, out_features, bias)
        self.new_adapter(0)

    def forward(self, x: torch.Tensor, n_lookahead: int = 0) -> torch.Tensor:
        """(B, R, in_features) to (B, R, out_features); the last n_lookahead rows are look-ahead rows."""
        y = super().forward(x)
        if n_lookahead and self.down is not None:
            add_linear(y[:, -n_lookahead:], linear(x[:, -n_lookahead:], self.down), self.up)
        return y

    def new_adapter(self, rank: int) -> None:
        """Replaces the adapter by a new one, which changes nothing yet, or with rank 0 by none."""
        self.down = self.up = None
        if rank:
            down = torch.randn(rank, self.in_features) / math.sqrt(self.in_features)
            self.down = nn.Parameter(down.to(self.weight))
            self.up = nn.Parameter(self.weight.new_zeros(self.out_features, rank))


class Attention(nn.Module):
    """Multi-head attention over the rows of a pass and the cache; groups of query heads may share keys and values."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_head, self.kv_heads, self.head_dim = config.n_head, config.kv_heads, config.head_width
        n_heads = config.n_head + 2 * config.kv_heads
        self.c_attn = Matrix(config.n_embd, n_heads * self.head_dim, bias=not config.llama)
        self.c_proj = Linear(config.n_head * self.head_dim, config.n_embd, bias=not config.llama)

    def forward(self, x: torch.Tensor, this: Pass, store: Callable | None) -> torch.Tensor:
        """x: (B, R, n_embd). store: writes the rows' keys and values and returns all. Returns (B, R, n_embd)."""
        heads = self.c_attn(x, this.n_lookahead).view(*x.shape[:2], -1, self.head_dim)  # (B, R, H + 2 H', hd)
        if this.rotary is not None:
            heads = rotated(heads, *this.rotary)
        q, pairs = heads[:, :, : self.n_head], heads[:, :, self.n_head :].unflatten(2, (2, -1))
        if store is not None:
            cached = store(pairs)  # (B, max_len, 2, H', hd)
            pairs = pairs if this.mask is None else cached  # prefill: the rows are all that there is
        k, v = pairs.permute(2, 0, 3, 1, 4).unbind()  # (B, H', keys, hd)
        if this.mask is None:
            sharing = self.kv_heads < self.n_head
            y = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, is_causal=True, enable_gqa=sharing)
        else:  # heads that share keys and values become more rows of one head: the keys are read once
            rows = q.unflatten(2, (self.kv_heads, -1)).transpose(1, 2).flatten(2, 3)  # (B, H', R x H / H', hd)
            y = F.scaled_dot_product_attention(rows, k, v, attn_mask=this.mask)
            y = y.unflatten(2, (x.shape[1], -1)).flatten(3)
        return self.c_proj(y.transpose(1, 2).flatten(2))


def rotary(position: torch.Tensor, config: GPTConfig, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines (.., heads, head_dim) for `rotated`, of positions (..) (RoPE, arXiv 2104.09864, section 3.2).

    The heads are those of q, k and v side by side; those of v are turned by no angle.
    """
    precise = torch.promote_types(dtype, torch.float32)
    exponent = torch.arange(0, config.head_width, 2, device=position.device, dtype=precise) / config.head_width
    angle = position[..., None, None] / config.rope_theta**exponent  # (.., 1, head_dim / 2)
    angle = F.pad(angle.expand(*position.shape, config.n_head + config.kv_heads, -1), (0, 0, 0, config.kv_heads))
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def rotated(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turns the pairs (i, i + head_dim / 2) of each head (.., head_dim) by their angles."""
    return torch.addcmul(heads * cos, heads.roll(heads.shape[-1] // 2, -1), sin)


class MLP(nn.Module):
    """The two-layer network of a block: GELU, or SwiGLU, whose first matrix gives gates and values side by side."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.llama, n_inner = config.llama, config.inner_width
        self.c_fc = Matrix(config.n_embd, 2 * n_inner if config.llama else n_inner, bias=not config.llama)
        self.c_proj = Linear(n_inner, config.n_embd, bias=not config.llama)

    def forward(self, x: torch.Tensor, n_lookahead: int) -> torch.Tensor:
        """(B, R, n_embd) to (B, R, n_embd)."""
        x = self.c_fc(x, n_lookahead)
        if self.llama:
            gate, value = x.chunk(2, dim=-1)
            x = F.silu(gate) * value
        else:
            x = F.gelu(x, approximate="tanh")
        return self.c_proj(x)


def make_norm(config: GPTConfig) -> nn.Module:
    """The norm before each part of a block, and after the last block."""
    return (nn.RMSNorm if config.llama else nn.LayerNorm)(config.n_embd, eps=config.norm_eps)


class Block(nn.Module):
    """Attention and MLP, each after a norm and added to the residual stream."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.ln_1 = make_norm(config)
        self.attn = Attention(config)
        self.ln_2 = make_norm(config)
        self.mlp = MLP(config)

    def forward(self, x: torch.Tensor, this: Pass, store: Callable | None) -> torch.Tensor:
        """(B, R, n_embd) to (B, R, n_embd); the arguments are Attention's."""
        x = x + self.attn(self.ln_1(x), this, store)
        return x + self.mlp(self.ln_2(x), this.n_lookahead)


class DraftHead(nn.Module):
    """Tells a look-ahead row the token before the one that it predicts (not in the paper). The row was computed without
    it, but the token is known when the draft is drawn. The last matrix begins as zero: a new head changes nothing."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = Linear(2 * config.n_embd, config.n_draft)
        self.c_proj = Linear(config.n_draft, config.n_embd)
        nn.init.zeros_(self.c_proj.weight)
        nn.init.zeros_(self.c_proj.bias)

    def forward(self, hidden: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        """Hidden states after the final norm and embeddings of the tokens before, (..., n_embd), to hidden states."""
        inner = self.c_fc(torch.cat([hidden, before], dim=-1))
        return hidden + self.c_proj(F.gelu(inner, approximate="tanh"))


class GPT(nn.Module):
    """A GPT-2 or a Llama with a table of look-ahead embeddings.

    Parameter names are GPT-2's (wte, wpe, h.N.attn.c_attn, ..., ln_f), so its weights fit by renaming (Hugging Face
    stores the four matrices of a block transposed). In a Llama, c_attn holds the rows of q, k and v, mlp.c_fc those of
    gate and up. The output head is wte, or lm_head where it is not tied. `lookahead` is (n_lookahead, n_embd).
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = None if config.llama else nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = make_norm(config)
        self.lm_head = None if config.tied else nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lookahead = nn.Parameter(torch.empty(config.n_lookahead, config.n_embd))
        self.reset_parameters()
        self.new_draft_head(config.n_draft)
        self.new_adapters(config.lora_rank)

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

    def new_adapters(self, rank: int) -> None:
        """Gives the first matrix of each attention and MLP a new adapter, which changes nothing yet; rank 0: none.

        Adapters on the second ones, too, accept little more (docs/own-model.md) and take as much time again.

        Raises InputError if rank < 0.
        """
        self.config = replace(self.config, lora_rank=rank)
        for matrix in self.h.modules():
            if isinstance(matrix, Matrix):
                matrix.new_adapter(rank)

    def with_lookahead(self, table: torch.Tensor) -> "GPT":
        """This model, weights shared, with another look-ahead table. Raises InputError as set_lookahead."""
        other = copy.copy(self)
        other._parameters = dict(self._parameters)
        other.set_lookahead(table)
        return other

    def new_lookahead(self, n_lookahead: int) -> None:
        """Replaces the look-ahead table by a new one, the mean embedding and N(0, 0.02). Raises InputError if < 0."""
        config, mean = replace(self.config, n_lookahead=n_lookahead), self.wte.weight.detach().mean(0)
        self.set_lookahead(mean + 0.02 * torch.randn(n_lookahead, config.n_embd).to(mean))

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.wte.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """What the weights, the logits and the cache are in."""
        return self.wte.weight.dtype

    @property
    def head(self) -> torch.Tensor:
        """The output matrix (vocab_size, n_embd)."""
        return self.wte.weight if self.lm_head is None else self.lm_head.weight

    def matrices(self) -> list[torch.Tensor]:
        """What kernels.py multiplies by: the output matrix, those of the blocks, the draft head's."""
        inside = [*self.h.parameters(), *(self.draft_head.parameters() if self.draft_head else ())]
        return [self.head, *(parameter for parameter in inside if parameter.dim() == 2)]

    def hidden(self, ids: torch.Tensor, layout: Layout | None = None, cache: KVCache | None = None) -> torch.Tensor:
        """One pass over R rows, up to the last block: hidden states (B, R, n_embd).

        ids: (B, P) int64, the real rows; the layout's Q look-ahead rows follow them, R = P + Q.
        layout: which rows see which, and positions; None is plain causal text from position 0, and an empty cache.
        cache: the rows follow what it holds, and are written after it; its length is left to the caller.

        A position past the window is clamped to the last one. Such rows, drafts past the window's edge, give no token
        that is emitted, but may share a batch with texts that have room. Raises InputError when plain text is longer
        than the window, ValueError when the pass has more rows than the cache has slots; that they fit behind what it
        holds is the caller's care.
        """
        ahead, block_size = () if layout is None else layout.lookahead, self.config.block_size
        n_rows = ids.shape[1] + len(ahead)
        slots = None if cache is None else cache.slots(n_rows)
        x = self.wte(ids)
        if len(ahead):
            x = torch.cat([x, self.lookahead[ahead].expand(len(x), -1, -1)], dim=1)
        if layout is None:
            if n_rows > block_size:
                raise InputError(f"{n_rows} tokens do not fit into the context window of {block_size}")
            position, mask = torch.arange(n_rows, device=ids.device), None
        else:
            position = layout.depth if cache is None else cache.length[:, None] + layout.depth
            mask = layout.visible if cache is None else cache.mask(layout)  # (B or 1, R, keys), for all heads
            n_sharing = self.config.n_head // self.config.kv_heads  # heads with the same keys: see Attention
            mask = mask[:, None, :, None].expand(-1, -1, -1, n_sharing, -1).flatten(2, 3)
        position = position.clamp(max=block_size - 1)
        if self.wpe is not None:
            x = x + self.wpe(position)
        this = Pass(mask, rotary(position, self.config, x.dtype) if self.config.llama else None, len(ahead))
        for layer, block in enumerate(self.h):
            x = block(x, this, None if cache is None else partial(cache.store, layer, slots))
        return x

    def logits(
        self, hidden: torch.Tensor, before: torch.Tensor | None = None, tokens: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Hidden states (..., n_embd) to logits (..., vocab_size): the final norm and the output head.

        before: (...) int64, for look-ahead rows the tokens before the places that they predict: read by a draft head.
        tokens: (..., K) int64, of which alone logits (..., K) are wanted.
        """
        hidden = self.ln_f(hidden)
        if before is not None and self.draft_head is not None:
            hidden = self.draft_head(hidden, self.wte(before))
        if tokens is not None:
            return (F.embedding(tokens, self.head) @ hidden[..., None]).squeeze(-1)
        return linear(hidden, self.head)

    def forward(self, ids: torch.Tensor, layout: Layout | None = None, cache: KVCache | None = None) -> torch.Tensor:
        """One pass over R rows to logits (B, R, vocab_size), in the model's dtype; arguments and errors of `hidden`."""
        return self.logits(self.hidden(ids, layout, cache))
