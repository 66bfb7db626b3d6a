"""The forward pass: GPT-2 by the book, with a cache as without, whatever the pass and whatever is past the length."""

import copy
import itertools

import numpy as np
import pytest
import torch

from minipass.decode import Decoder
from minipass.errors import InputError
from minipass.layout import Layout, path, tree, with_groups
from minipass.model import GPT, GPTConfig, KVCache
from minipass.sampling import COUPLED, Sampling
from minipass.trees import DraftTree, Shape, chain

CPU = torch.device("cpu")
LENGTHS = [7, 3, 12]  # of the three texts of a batch
V, WINDOW = 11, 40  # of the tests' model
SHAPES = {
    "plain": Shape(),
    "verify": Shape(chain(3)),
    "draft": Shape(n_lookahead=3),
    "fused": Shape(chain(2), 3),
    "tree": Shape(DraftTree((0, 0, 1)), 2),
}


@pytest.fixture
def texts() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, V, (length,), generator=generator) for length in LENGTHS]


@torch.no_grad()
def cache_of(model: GPT, texts: list[torch.Tensor], garbage: float = 1e4) -> KVCache:
    """A cache that holds the ragged texts, with large values in every slot past each text's length."""
    cache = KVCache(model.config, len(texts), 60, dtype=torch.float64)
    model(torch.nn.utils.rnn.pad_sequence(texts, batch_first=True), cache=cache)
    cache.length = torch.tensor([len(text) for text in texts])
    for b, text in enumerate(texts):
        cache.pairs[:, b, len(text) :, 0] = garbage
        cache.pairs[:, b, len(text) :, 1] = -garbage
    return cache


def rows_of(shape: Shape, n_texts: int = len(LENGTHS)) -> tuple[torch.Tensor, Layout]:
    """The ids of the real rows, the same for each text, and the layout."""
    return torch.tensor([[5, 1, 2, 3][: len(shape.tree.depth)]] * n_texts), shape.on(CPU).layout


# GPT-2 by the book: one text, one position, one head at a time, in numpy.


def by_the_book(model: GPT, inputs: np.ndarray) -> np.ndarray:
    """Input embeddings (T, n_embd) of one text to logits (T, vocab_size)."""
    w = {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}
    n_layer, n_head, size = model.config.n_layer, model.config.n_head, model.config.n_embd // model.config.n_head

    def norm(x, name):
        return (x - x.mean()) / np.sqrt(x.var() + 1e-5) * w[name + ".weight"] + w[name + ".bias"]

    def linear(x, name):
        return w[name + ".weight"] @ x + w[name + ".bias"]

    stream = [inputs[t] + w["wpe.weight"][t] for t in range(len(inputs))]
    for layer in range(n_layer):
        h = f"h.{layer}."
        q, k, v = zip(*(np.split(linear(norm(x, h + "ln_1"), h + "attn.c_attn"), 3) for x in stream), strict=True)
        for t in range(len(stream)):
            heads = []
            for head in range(n_head):
                part = slice(head * size, (head + 1) * size)
                weights = np.exp([q[t][part] @ k[s][part] / np.sqrt(size) for s in range(t + 1)])
                heads.append(sum(weight * v[s][part] for s, weight in enumerate(weights)) / weights.sum())
            stream[t] = stream[t] + linear(np.concatenate(heads), h + "attn.c_proj")
        for t, x in enumerate(stream):
            inner = linear(norm(x, h + "ln_2"), h + "mlp.c_fc")
            inner = 0.5 * inner * (1 + np.tanh(np.sqrt(2 / np.pi) * (inner + 0.044715 * inner**3)))
            stream[t] = x + linear(inner, h + "mlp.c_proj")
    return np.array([w["wte.weight"] @ norm(x, "ln_f") for x in stream])


@pytest.fixture(scope="module")
def full_window(model) -> tuple[torch.Tensor, np.ndarray]:
    """A text that fills the window, and the reference's logits at each position."""
    text = torch.randint(0, V, (WINDOW,), generator=torch.Generator().manual_seed(3))
    return text, by_the_book(model, model.wte.weight.detach().numpy()[text])


@torch.no_grad()
def wrong_positions(model: GPT, full_window, one_by_one: bool) -> list[int]:
    """Where the logits are not the reference's: in one pass, or in a pass for each position."""
    text, expected = full_window
    if one_by_one:
        cache, logits = KVCache(model.config, 1, WINDOW, dtype=torch.float64), []
        for token in text:
            logits.append(model(token.view(1, 1), Shape().on(CPU).layout, cache)[0])
            cache.length += 1
        logits = torch.cat(logits)
    else:
        logits = model(text[None])[0]
    return np.flatnonzero(~np.isclose(logits.numpy(), expected, rtol=1e-9, atol=1e-9).all(-1)).tolist()


@pytest.mark.parametrize("one_by_one", [False, True])
def test_every_position_of_the_window_gives_what_gpt_2_by_the_book_gives(one_by_one, model, full_window):
    assert wrong_positions(model, full_window, one_by_one) == []


def test_lookahead_rows_are_gpt_2_by_the_book_with_their_embeddings_as_inputs(model):
    ids = torch.tensor([[5, 1, 2]])
    inputs = torch.cat([model.wte(ids[0]), model.lookahead[:3]]).detach().numpy()
    logits = model(ids, with_groups(path(3), [2], 3)).detach().numpy()[0]
    np.testing.assert_allclose(logits, by_the_book(model, inputs), rtol=1e-9, atol=1e-9)


class ClampedOneShort(torch.nn.Module):
    """A position embedding that does not know the window's last place."""

    def __init__(self, wpe: torch.nn.Embedding) -> None:
        super().__init__()
        self.wpe = wpe

    def forward(self, position: torch.Tensor) -> torch.Tensor:
        return self.wpe(position.clamp(max=WINDOW - 2))


@pytest.mark.parametrize("one_by_one", [False, True])
def test_a_position_embedding_one_short_at_the_windows_last_place_is_caught(one_by_one, model, full_window):
    broken = copy.deepcopy(model)
    broken.wpe = ClampedOneShort(broken.wpe)
    assert wrong_positions(broken, full_window, one_by_one) == [WINDOW - 1]


@pytest.mark.parametrize("one_by_one", [False, True])
def test_positions_counted_from_one_are_caught(one_by_one, model, full_window):
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.wpe.weight.copy_(model.wpe.weight.roll(-1, 0))
    assert 0 in wrong_positions(broken, full_window, one_by_one)


def test_another_activation_is_caught(model, full_window, monkeypatch):
    gelu = torch.nn.functional.gelu
    monkeypatch.setattr(torch.nn.functional, "gelu", lambda x, approximate: gelu(x))
    assert wrong_positions(model, full_window, one_by_one=False)


# The cache.


@torch.no_grad()
@pytest.mark.parametrize("kind", SHAPES)
def test_a_pass_after_a_cache_gives_the_logits_of_the_whole_text_without_one(kind, model, texts):
    ids, layout = rows_of(SHAPES[kind])
    n_real = ids.shape[1]
    logits = model(ids, layout, cache_of(model, texts))
    assert logits.shape == (len(texts), SHAPES[kind].n_rows, V)
    for b, text in enumerate(texts):
        for row in range(SHAPES[kind].n_rows):  # the row's own text: everything before, and what it sees of this pass
            seen = layout.visible[0, row].nonzero().flatten()
            whole = torch.cat([text, ids[b, seen[seen < n_real]]])[None]
            group = layout.lookahead[seen[seen >= n_real] - n_real].tolist()
            assert group == list(range(len(group)))
            alone = model(whole, with_groups(path(whole.shape[1]), [whole.shape[1] - 1], len(group)))
            torch.testing.assert_close(logits[b, row], alone[0, -1])


def slow_mask(layout: Layout, length: int, max_len: int) -> torch.Tensor:
    """(R, max_len) bool: the slots that each row of a text sees."""
    n_rows = layout.visible.shape[1]
    seen = torch.zeros(n_rows, max_len, dtype=torch.bool)
    for row, slot in itertools.product(range(n_rows), range(max_len)):
        seen[row, slot] = slot < length or (slot < length + n_rows and bool(layout.visible[0, row, slot - length]))
    return seen


@pytest.mark.parametrize("kind", SHAPES)
def test_masks_are_windows_that_equal_the_slow_reference_for_ragged_lengths(kind, model):
    layout = SHAPES[kind].on(CPU).layout
    cache = KVCache(model.config, 5, 30, dtype=torch.float64)
    for lengths in ([7, 3, 12, 0, 30 - SHAPES[kind].n_rows], [0, 1, 2, 3, 4]):  # the second from the same table
        cache.length = torch.tensor(lengths)
        mask = cache.mask(layout)
        assert mask.shape == (5, SHAPES[kind].n_rows, 30)
        for b, length in enumerate(lengths):
            seen = slow_mask(layout, length, 30)
            assert torch.equal(mask[b] == 0, seen)
            assert torch.equal(mask[b] == -torch.inf, ~seen)


@torch.no_grad()
@pytest.mark.parametrize("kind", SHAPES)
def test_what_is_past_the_length_reaches_no_row(kind, model, texts):
    ids, layout = rows_of(SHAPES[kind])
    clean = model(ids, layout, cache_of(model, texts, garbage=0.0))
    for garbage in (1.0, -1e4, 1e300):
        assert torch.equal(model(ids, layout, cache_of(model, texts, garbage)), clean)


@torch.no_grad()
def test_a_mask_one_slot_too_wide_is_caught(model, texts, monkeypatch):
    ids, layout = rows_of(SHAPES["plain"])
    clean, mask = model(ids, layout, cache_of(model, texts, garbage=0.0)), KVCache.mask

    def one_too_wide(cache, layout):
        wide = mask(cache, layout).clone()
        for b, length in enumerate(cache.length.tolist()):
            wide[b, :, length + wide.shape[1]] = 0
        return wide

    monkeypatch.setattr(KVCache, "mask", one_too_wide)
    assert not torch.allclose(model(ids, layout, cache_of(model, texts, garbage=1.0)), clean)


def numbered_cache(n_texts: int, max_len: int) -> KVCache:
    """A cache whose keys are their slot plus 100 times their text, and whose values are minus that."""
    cache = KVCache(GPTConfig(V, WINDOW, 2, 2, 16, 0), n_texts, max_len)
    cache.pairs[:, :, :, 0] = (torch.arange(float(max_len)) + 100 * torch.arange(float(n_texts))[:, None])[
        ..., None, None
    ]
    cache.pairs[:, :, :, 1] = -cache.pairs[:, :, :, 0]
    return cache


def numbers(cache: KVCache) -> list[list[int]]:
    """The keys of a numbered cache; checks that all layers and heads, and the values, agree with them."""
    keys = cache.pairs[0, :, :, 0, 0, 0]
    assert torch.equal(cache.pairs[..., 0, :, :], keys[None, :, :, None, None].expand_as(cache.pairs[..., 0, :, :]))
    assert torch.equal(cache.pairs[..., 1, :, :], -cache.pairs[..., 0, :, :])
    return keys.int().tolist()


def test_store_writes_each_texts_rows_after_its_length_and_into_one_layer():
    cache = numbered_cache(2, 6)
    cache.length = torch.tensor([1, 3])
    before, rows = cache.pairs.clone(), torch.randn(2, 2, 2, 2, 8)
    assert cache.slots(2).tolist() == [[1, 2], [3, 4]]
    stored = cache.store(1, cache.slots(2), rows)
    before[1, 0, 1:3], before[1, 1, 3:5] = rows[0], rows[1]
    assert torch.equal(cache.pairs, before)
    assert torch.equal(stored, before[1])
    assert cache.length.tolist() == [1, 3], "what a pass keeps is the caller's to say"


def test_gather_moves_the_accepted_rows_to_the_front_of_the_pass():
    cache = numbered_cache(2, 10)
    cache.length = torch.tensor([2, 4])
    cache.gather(torch.tensor([[0, 3, 5], [2, 1, 0]]))
    expected = [[0, 1, 2, 5, 7, 5, 6, 7, 8, 9], [100, 101, 102, 103, 106, 105, 104, 107, 108, 109]]
    assert numbers(cache) == expected
    assert cache.length.tolist() == [2, 4]


def test_select_continues_with_the_chosen_texts_in_their_order():
    cache = numbered_cache(4, 3)
    cache.length = torch.tensor([2, 0, 3, 1])
    cache.select(torch.tensor([3, 0]))
    assert numbers(cache) == [[300, 301, 302], [0, 1, 2]]
    assert cache.length.tolist() == [1, 2]
    assert cache.slots(1).tolist() == [[1], [2]]
    cache.gather(torch.tensor([[1], [0]]))
    assert numbers(cache) == [[300, 302, 302], [0, 1, 2]]


@torch.no_grad()
def test_texts_that_are_selected_continue_as_they_would_have(model, texts):
    ids, layout = rows_of(SHAPES["fused"])
    cache = cache_of(model, texts)
    expected = model(ids, layout, cache)
    cache.select(torch.tensor([2, 0]))
    torch.testing.assert_close(model(ids[:2], layout, cache), expected[[2, 0]])


@torch.no_grad()
def test_setting_the_length_back_undoes_what_was_accepted(model, texts):
    cache, layout = cache_of(model, texts), Shape(chain(1)).on(CPU).layout
    ids = torch.tensor([[5, 6]] * len(texts))
    before = model(ids, layout, cache)
    cache.length += 2
    model(ids + 1, layout, cache)
    cache.length -= 2
    torch.testing.assert_close(model(ids, layout, cache), before)


# Prefill.


def prefilled(model: GPT, texts: list[torch.Tensor]) -> tuple[KVCache, torch.Tensor]:
    """The cache, full of garbage before, and the roots after the prefill of a decoder."""
    decoder = Decoder([model], Sampling(), COUPLED, len(texts), 60)
    decoder.cache.pairs.fill_(1e4)
    with torch.inference_mode():
        handed = decoder.begin([text.tolist() for text in texts], [0] * len(texts), range(len(texts)))
    return decoder.cache, handed.root


def wrong_after_prefill(model: GPT, texts: list[torch.Tensor]) -> list[int]:
    """Texts for which the first pass after the prefill does not give what they get alone."""
    cache, root = prefilled(model, texts)
    with torch.inference_mode():
        logits = model(root[:, None], SHAPES["draft"].on(CPU).layout, cache)
        alone = [model(text[None], with_groups(path(len(text)), [len(text) - 1], 3))[0, -4:] for text in texts]
    return [b for b, expected in enumerate(alone) if not torch.allclose(logits[b], expected)]


def test_ragged_prefill_holds_all_but_each_last_token_and_each_text_continues_as_alone(model, texts):
    texts = [*texts, torch.tensor([4])]  # a text of one token has an empty cache
    cache, root = prefilled(model, texts)
    assert cache.length.tolist() == [len(text) - 1 for text in texts], "padding is not kept"
    assert root.tolist() == [text[-1].item() for text in texts]
    assert wrong_after_prefill(model, texts) == []
    assert wrong_after_prefill(model, texts[-1:]) == []


def test_a_prefill_that_keeps_the_padding_is_caught(model, texts, monkeypatch):
    begin = Decoder.begin

    def padded(decoder, *args):
        handed = begin(decoder, *args)
        decoder.cache.length.fill_(max(LENGTHS) - 1)
        return handed

    monkeypatch.setattr(Decoder, "begin", padded)
    assert wrong_after_prefill(model, texts) == [0, 1]


# Look-ahead rows, and the window's edge.


@torch.no_grad()
@pytest.mark.parametrize("kind", ["draft", "fused", "tree"])
def test_real_rows_never_see_lookahead_rows(kind, model, texts):
    ids, layout = rows_of(SHAPES[kind])
    n_real = ids.shape[1]
    logits = model(ids, layout, cache_of(model, texts))
    without = model(ids, Shape(SHAPES[kind].tree).on(CPU).layout, cache_of(model, texts))
    torch.testing.assert_close(logits[:, :n_real], without)
    other = model.with_lookahead(-model.lookahead)
    changed = other(ids, layout, cache_of(model, texts))
    assert torch.equal(changed[:, :n_real], logits[:, :n_real])
    assert not torch.isclose(changed[:, n_real:], logits[:, n_real:]).all(-1).any(), "and they are what was changed"


@torch.no_grad()
def test_group_j_of_a_fused_pass_gives_what_a_draft_pass_gives_after_j_accepted_drafts(model, texts):
    ids, layout = rows_of(SHAPES["fused"])
    fused = model(ids, layout, cache_of(model, texts))
    for j in range(3):
        grown = [torch.cat([text, ids[0, :j]]) for text in texts]  # root.. d_{j-1} are in the cache
        separate = model(ids[:, j : j + 1], SHAPES["draft"].on(CPU).layout, cache_of(model, grown))
        torch.testing.assert_close(fused[:, 3 + 3 * j : 6 + 3 * j], separate[:, 1:])


@torch.no_grad()
def test_rows_past_the_windows_edge_are_clamped_and_leave_the_rows_before_it_untouched(model):
    text = torch.randint(0, V, (38,), generator=torch.Generator().manual_seed(0))
    rows = torch.tensor([[5, 1, 2, 3]])  # positions 38 to 41 in a window of 40
    logits = model(rows, Shape(chain(3), 2).on(CPU).layout, cache_of(model, [text]))
    whole = model(torch.cat([text, rows[0, :2]])[None])
    torch.testing.assert_close(logits[:, :2], whole[:, -2:])
    assert logits.isfinite().all()


# The model's parts.


@torch.no_grad()
def test_forward_is_hidden_and_then_logits(model, texts):
    ids, layout = rows_of(SHAPES["fused"])
    hidden = model.hidden(ids, layout, cache_of(model, texts))
    assert hidden.shape == (3, SHAPES["fused"].n_rows, 16)
    logits = model(ids, layout, cache_of(model, texts))
    assert torch.equal(model.logits(hidden), logits)
    torch.testing.assert_close(model.logits(hidden[:, [4, 1]]), logits[:, [4, 1]])  # of any rows


@torch.no_grad()
def test_plain_text_needs_no_layout(model):
    ids = torch.arange(8)[None]
    assert model(ids).shape == (1, 8, V)
    torch.testing.assert_close(model(ids), model(ids, tree(path(8))))


def test_with_lookahead_shares_the_weights_and_leaves_the_model_as_it_is(model):
    before, table = model.lookahead.clone(), torch.randn(6, 16)
    other = model.with_lookahead(table)
    assert torch.equal(model.lookahead, before)
    assert (model.config.n_lookahead, other.config.n_lookahead) == (4, 6)
    assert torch.equal(other.lookahead, table.double())
    own = dict(model.named_parameters())
    for name, parameter in other.named_parameters():
        assert (parameter is own[name]) == (name != "lookahead")
    table.zero_()
    assert other.lookahead.abs().min() > 0, "the table is a copy"


def test_a_table_of_another_width_is_refused(model):
    with pytest.raises(InputError, match=r"a look-ahead table of shape \(3, 8\) does not fit .* n_embd 16"):
        model.with_lookahead(torch.zeros(3, 8))


def test_a_new_table_has_the_asked_length_and_is_the_mean_embedding_with_a_little_noise(model):
    fresh = copy.deepcopy(model)
    fresh.new_lookahead(7)
    assert fresh.lookahead.shape == (7, 16)
    assert fresh.config.n_lookahead == 7
    assert 0.01 < (fresh.lookahead - fresh.wte.weight.mean(0)).std() < 0.03
    with pytest.raises(InputError):
        fresh.new_lookahead(-1)


def test_a_model_without_a_table_is_a_plain_gpt(model):
    plain = model.with_lookahead(torch.zeros(0, 16))
    assert plain.lookahead.shape == (0, 16)
    assert torch.equal(plain(torch.arange(8)[None]), model(torch.arange(8)[None]))


def test_parameters_are_gpt2s_and_the_table():
    names = {name for name, _ in GPT(GPTConfig(V, 8, 1, 2, 16, 3)).named_parameters()}
    block = {"ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"}
    expected = {f"h.0.{part}.{kind}" for part in block for kind in ("weight", "bias")}
    assert names == expected | {"wte.weight", "wpe.weight", "ln_f.weight", "ln_f.bias", "lookahead"}


def test_text_longer_than_the_window_is_refused(model):
    with pytest.raises(InputError, match="41 tokens do not fit"):
        model(torch.zeros(1, 41, dtype=torch.int64))


def test_a_pass_of_more_rows_than_the_cache_has_slots_is_refused(model):
    cache = KVCache(model.config, 1, 2, dtype=torch.float64)
    for shape in (Shape(chain(2)), Shape(n_lookahead=2)):
        ids, layout = rows_of(shape, 1)
        with pytest.raises(ValueError, match="3 rows does not fit"):
            model(ids, layout, cache)


@pytest.mark.parametrize(
    "sizes", [{"n_layer": 0}, {"n_embd": 10, "n_head": 4}, {"n_lookahead": -1}, {"block_size": 1.5}]
)
def test_impossible_sizes_are_refused(sizes):
    with pytest.raises(InputError):
        GPTConfig(**sizes)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_logits_of_the_cpu(model):
    ids = torch.arange(8)[None]
    on_gpu = copy.deepcopy(model).cuda()
    torch.testing.assert_close(on_gpu(ids.cuda()).cpu(), model(ids))
