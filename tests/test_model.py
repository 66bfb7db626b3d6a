"""The forward pass: with a cache as without, whatever the kind of pass and whatever garbage lies behind the length."""

import numpy as np
import pytest
import torch

from minipass.decoder import prefill
from minipass.errors import InputError
from minipass.layout import chain, draft_layout, fused_layout, lookahead_ids, path, path_layout, with_groups
from minipass.model import GPT, GPTConfig, KVCache

CPU = torch.device("cpu")
LENGTHS = [7, 3, 12]  # of three texts that stand in one batch
V = 11  # vocabulary of the tests' model


@pytest.fixture
def texts() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, V, (length,), generator=generator) for length in LENGTHS]


def cache_of(model: GPT, texts: list[torch.Tensor], garbage: float = 1e4) -> KVCache:
    """A cache that holds the ragged texts, with large values in every slot behind each text's length."""
    cache = KVCache(model.config, len(texts), 60, dtype=torch.float64)
    padded = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
    with torch.no_grad():
        model(padded, path_layout(padded.shape[1], CPU), cache)
    cache.length = torch.tensor([len(text) for text in texts])
    for b, text in enumerate(texts):
        cache.keys[:, b, :, len(text) :] = garbage
        cache.values[:, b, :, len(text) :] = -garbage
    return cache


def rows_for(kind: str) -> tuple[list[int], object]:
    """Input ids and layout of one kind of pass behind the cache."""
    la = lookahead_ids(V, 4).tolist()
    return {
        "plain": ([5], path_layout(1, CPU)),
        "verify": ([5, 1, 2, 3], path_layout(4, CPU)),
        "draft": ([5, *la[:3]], draft_layout(3, CPU)),
        "fused": ([5, 1, 2, *la[:3] * 3], fused_layout(chain(2), 3, CPU)),
    }[kind]


@torch.no_grad()
@pytest.mark.parametrize("kind", ["plain", "verify", "draft", "fused"])
def test_a_pass_behind_a_cache_gives_the_logits_of_the_whole_text_without_one(kind, model, texts):
    ids, layout = rows_for(kind)
    logits = model(torch.tensor([ids] * len(texts)), layout, cache_of(model, texts))
    for b, text in enumerate(texts):
        for row in range(len(ids)):  # the row's own text: everything before, and what it sees of this pass
            seen = layout.visible[0, row].nonzero().flatten()
            whole = torch.cat([text, torch.tensor(ids)[seen]])[None]
            torch.testing.assert_close(logits[b, row], model(whole)[0, -1])


@torch.no_grad()
def test_ragged_prefill_gives_each_prompt_what_it_gets_alone_and_plain_decoding_goes_on_from_there(model, texts):
    la = lookahead_ids(V, 3)
    cache = KVCache(model.config, len(texts), 60, dtype=torch.float64)
    cache.keys.fill_(1e4)
    cache.values.fill_(-1e4)
    logits = prefill(model, cache, [text.tolist() for text in texts], la)
    assert cache.length.tolist() == LENGTHS, "neither padding nor look-ahead rows are kept"
    after = model(torch.tensor([[5]] * len(texts)), path_layout(1, CPU), cache)
    for b, text in enumerate(texts):
        alone = model(torch.cat([text, la])[None])[0]
        torch.testing.assert_close(logits[b], alone[len(text) - 1 :])
        torch.testing.assert_close(after[b, 0], model(torch.cat([text, torch.tensor([5])])[None])[0, -1])


@torch.no_grad()
def test_rows_behind_the_windows_edge_leave_the_rows_before_it_untouched(model):
    text = torch.randint(0, V, (38,), generator=torch.Generator().manual_seed(0))
    rows = torch.tensor([[5, 1, 2, 3]])  # positions 38 to 41 in a window of 40
    logits = model(rows, path_layout(4, CPU), cache_of(model, [text]))
    whole = model(torch.cat([text, rows[0, :2]])[None])
    torch.testing.assert_close(logits[:, :2], whole[:, -2:])
    assert logits.isfinite().all()


@torch.no_grad()
def test_a_model_without_a_table_is_a_plain_gpt(draft_model):
    assert draft_model.lookahead.shape == (0, 16)
    ids = torch.arange(8)[None]
    torch.testing.assert_close(draft_model.embed(ids), draft_model.wte(ids))


@torch.no_grad()
def test_group_j_of_a_fused_pass_gives_what_a_draft_pass_gives_after_j_kept_drafts(model, texts):
    ids, layout = rows_for("fused")
    fused = model(torch.tensor([ids] * len(texts)), layout, cache_of(model, texts))
    for j in range(3):
        grown = [
            torch.cat([text, torch.tensor(ids[:j], dtype=torch.int64)]) for text in texts
        ]  # root.. d_{j-1} are in the cache
        rows = torch.tensor([[ids[j], *ids[3:6]]] * len(texts))
        separate = model(rows, draft_layout(3, CPU), cache_of(model, grown))
        torch.testing.assert_close(fused[:, 3 + 3 * j : 6 + 3 * j], separate[:, 1:])


@torch.no_grad()
def test_lookahead_rows_leave_the_rows_that_verify_untouched(model, texts):
    ids, layout = rows_for("fused")
    fused = model(torch.tensor([ids] * len(texts)), layout, cache_of(model, texts))
    verify = model(torch.tensor([ids[:3]] * len(texts)), path_layout(3, CPU), cache_of(model, texts))
    torch.testing.assert_close(fused[:, :3], verify)


@torch.no_grad()
def test_setting_the_length_back_undoes_what_was_kept(model, texts):
    cache = cache_of(model, texts)
    ids = torch.tensor([[5, 6]] * len(texts))
    before = model(ids, path_layout(2, CPU), cache)
    cache.length += 2
    model(ids + 1, path_layout(2, CPU), cache)
    cache.length -= 2
    torch.testing.assert_close(model(ids, path_layout(2, CPU), cache), before)


@torch.no_grad()
def test_plain_text_needs_no_layout(model):
    ids = torch.arange(8)[None]
    assert model(ids).shape == (1, 8, V)
    torch.testing.assert_close(model(ids), model(ids, with_groups(path(8), np.zeros(0), 0)))


@torch.no_grad()
def test_rows_picks_the_rows_whose_logits_are_computed(model):
    ids, rows = torch.arange(8).view(2, 4), torch.tensor([[3], [1]])
    torch.testing.assert_close(model(ids, rows=rows)[:, 0], model(ids)[torch.arange(2), rows[:, 0]])


@torch.no_grad()
def test_ids_behind_the_vocabulary_take_the_lookahead_table(model):
    embedded = model.embed(torch.tensor([[3, V, V + 2]]))
    assert torch.equal(embedded[0, 0], model.wte.weight[3])
    assert torch.equal(embedded[0, 1:], model.lookahead[[0, 2]])


def test_parameters_are_gpt2s_and_the_table():
    names = {name for name, _ in GPT(GPTConfig(V, 8, 1, 2, 16, 3)).named_parameters()}
    block = {"ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"}
    expected = {f"h.0.{part}.{kind}" for part in block for kind in ("weight", "bias")}
    assert names == expected | {"wte.weight", "wpe.weight", "ln_f.weight", "ln_f.bias", "lookahead"}


def test_text_longer_than_the_window_is_refused(model):
    with pytest.raises(InputError, match="41 tokens do not fit"):
        model(torch.zeros(1, 41, dtype=torch.int64))


def test_a_cache_without_room_or_without_a_layout_is_refused(model):
    cache = KVCache(model.config, 1, 2, dtype=torch.float64)
    with pytest.raises(ValueError, match="does not fit"):
        model(torch.zeros(1, 3, dtype=torch.int64), path_layout(3, CPU), cache)
    with pytest.raises(ValueError, match="layout"):
        model(torch.zeros(1, 1, dtype=torch.int64), cache=cache)


@pytest.mark.parametrize(
    "sizes", [{"n_layer": 0}, {"n_embd": 10, "n_head": 4}, {"n_lookahead": -1}, {"block_size": 1.5}]
)
def test_impossible_sizes_are_refused(sizes):
    with pytest.raises(InputError):
        GPTConfig(**sizes)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_logits_of_the_cpu(model):
    import copy

    ids = torch.arange(8)[None]
    on_gpu = copy.deepcopy(model).cuda()
    torch.testing.assert_close(on_gpu(ids.cuda()).cpu(), model(ids))
