"""The forward pass: a slow reference's logits, with a cache as without, whatever the pass and whatever is past the
length. The cache itself is tested by the course's graders, exercise 3."""

import copy

import pytest
import torch
from conftest import slow_logits

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


# The slow reference: one whole text, one head at a time.


@pytest.fixture(scope="module")
def full_window(model) -> tuple[torch.Tensor, torch.Tensor]:
    """A text that fills the window, and the reference's logits at each position."""
    text = torch.randint(0, V, (WINDOW,), generator=torch.Generator().manual_seed(3))
    return text, slow_logits(model, [text.tolist()])[0]


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
    return (~torch.isclose(logits, expected, rtol=1e-9, atol=1e-9).all(-1)).nonzero()[:, 0].tolist()


@pytest.mark.parametrize("one_by_one", [False, True])
def test_every_position_of_the_window_gives_what_the_reference_gives(one_by_one, model, full_window):
    assert wrong_positions(model, full_window, one_by_one) == []


@torch.no_grad()
def test_lookahead_rows_are_the_references_with_their_embeddings_as_inputs(model):
    logits = model(torch.tensor([[5, 1, 2]]), with_groups(path(3), [2], 3))
    torch.testing.assert_close(logits, slow_logits(model, [[5, 1, 2]], 3), rtol=1e-9, atol=1e-9)


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


def test_select_continues_with_the_chosen_texts_in_their_order():
    cache = KVCache(GPTConfig(V, WINDOW, 2, 2, 16, 0), 4, 3)
    cache.pairs.copy_(torch.randn(cache.pairs.shape, generator=torch.Generator().manual_seed(0)))
    cache.length = torch.tensor([2, 0, 3, 1])
    before = cache.pairs.clone()
    cache.select(torch.tensor([3, 0]))
    assert torch.equal(cache.pairs, before[:, [3, 0]])
    assert cache.length.tolist() == [1, 2]
    assert cache.slots(1).tolist() == [[1], [2]]
    cache.gather(torch.tensor([[1], [0]]))
    assert torch.equal(cache.pairs[:, 0], before[:, 3, [0, 2, 2]])
    assert torch.equal(cache.pairs[:, 1], before[:, 0])


@torch.no_grad()
def test_texts_that_are_selected_continue_as_they_would_have(model, texts):
    ids, layout = rows_of(SHAPES["fused"])
    cache = cache_of(model, texts)
    expected = model(ids, layout, cache)
    cache.select(torch.tensor([2, 0]))
    torch.testing.assert_close(model(ids[:2], layout, cache), expected[[2, 0]])


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
