"""Matrix products in oneDNN's order: the same numbers, and never those of a weight that has changed since."""

import gc

import pytest
import torch
import torch.nn.functional as F
from conftest import random_lively_model

from minipass import kernels
from minipass.decode import Fused, Plain
from minipass.engine import Engine
from minipass.model import Matrix

needs_onednn = pytest.mark.skipif(not kernels.available(), reason="PyTorch without oneDNN")
needs_bfloat16 = pytest.mark.skipif(not kernels.bfloat16_pays(), reason="a processor without bfloat16")


@pytest.fixture
def layer(monkeypatch) -> torch.nn.Linear:
    monkeypatch.setattr(kernels, "LEAST_PRODUCTS", 1)
    torch.manual_seed(0)
    return torch.nn.Linear(192, 320)


@needs_onednn
@pytest.mark.parametrize("shape", [(2, 192), (1, 9, 192), (3, 1, 192), (1, 0, 192)])
def test_a_packed_weight_gives_the_same_products(layer, shape):
    x = torch.randn(shape)
    kernels.pack([layer.weight])
    assert id(layer.weight) in kernels.packed
    with torch.inference_mode():
        torch.testing.assert_close(kernels.linear(x, layer.weight, layer.bias), layer(x), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(kernels.linear(x, layer.weight), F.linear(x, layer.weight), rtol=1e-4, atol=1e-4)


@needs_onednn
def test_small_products_are_left_to_the_blas(layer, monkeypatch):
    kernels.pack([layer.weight])
    monkeypatch.setattr(kernels, "LEAST_PRODUCTS", 3 * layer.weight.numel())
    stored = kernels.packed[id(layer.weight)]  # zeros in its place are seen where it is used
    kernels.packed[id(layer.weight)] = stored._replace(in_order=torch.zeros_like(layer.weight))
    with torch.inference_mode():
        assert [kernels.linear(torch.randn(n, 192), layer.weight).any().item() for n in (2, 3)] == [True, False]


@needs_onednn
@pytest.mark.parametrize("pays", [True, False])
def test_one_row_is_left_to_the_blas_where_that_is_faster(layer, monkeypatch, pays):
    kernels.pack([layer.weight])
    monkeypatch.setattr(kernels, "one_row_pays", lambda: pays)
    stored = kernels.packed[id(layer.weight)]  # zeros in its place are seen where it is used
    kernels.packed[id(layer.weight)] = stored._replace(in_order=torch.zeros_like(layer.weight))
    with torch.inference_mode():
        assert [kernels.linear(torch.randn(n, 192), layer.weight).any().item() for n in (1, 2)] == [not pays, False]


@needs_onednn
def test_which_product_is_faster_is_measured_once_whatever_the_default_dtype_and_device():
    kernels.one_row_pays.cache_clear()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            assert isinstance(kernels.one_row_pays(), bool)
    finally:
        torch.set_default_dtype(torch.float32)
    assert kernels.one_row_pays.cache_info().currsize == 1


@needs_onednn
def test_a_weight_that_changed_is_not_used_in_its_old_order(layer):
    kernels.pack([layer.weight])
    x = torch.randn(4, 192)
    with torch.no_grad():
        layer.weight.mul_(2)
        assert torch.equal(kernels.linear(x, layer.weight, layer.bias), layer(x))
        old = kernels.packed[id(layer.weight)].in_order
        kernels.pack([layer.weight])
        assert kernels.packed[id(layer.weight)].in_order is not old
        torch.testing.assert_close(kernels.linear(x, layer.weight, layer.bias), layer(x), rtol=1e-4, atol=1e-4)


@needs_onednn
def test_a_weight_written_through_data_is_packed_anew(layer):
    """PyTorch does not count such a write, as when averaged weights take the place of the trained ones."""
    kernels.pack([layer.weight])
    x = torch.randn(4, 192)
    layer.weight.data.mul_(2)
    kernels.pack([layer.weight])
    with torch.inference_mode():
        torch.testing.assert_close(kernels.linear(x, layer.weight, layer.bias), layer(x), rtol=1e-4, atol=1e-4)


@needs_bfloat16
def test_in_bfloat16_too_small_changes_through_data_are_noticed(layer):
    """Sums in bfloat16, even of single rows, would miss one in eight of these."""
    weight = layer.bfloat16().weight
    for row in range(100):
        kernels.pack([weight])
        old = kernels.packed[id(weight)].in_order
        weight.data[row, 7].mul_(1.5)
        kernels.pack([weight])
        assert kernels.packed[id(weight)].in_order is not old


@needs_onednn
def test_a_weight_that_left_for_another_dtype_is_dropped(layer):
    kernels.pack([layer.weight])
    kernels.pack([layer.double().weight])
    assert id(layer.weight) not in kernels.packed


@needs_onednn
def test_what_is_packed_goes_with_its_weight():
    """Another weight may get the number of one that is no more, and must not get its products."""
    weight = torch.randn(192, 320)
    kernels.pack([weight])
    kernels.pack([weight.mul_(2)])  # the entry that this replaces must not take the new one with it
    key = id(weight)
    assert key in kernels.packed
    del weight
    gc.collect()
    assert key not in kernels.packed


@needs_onednn
@pytest.mark.parametrize("tied", [False, True])
def test_what_is_packed_is_what_passes_multiply_by(tied, monkeypatch):
    monkeypatch.setattr(kernels, "LEAST_SIDE", 1)
    model = random_lively_model(seed=3, tied=tied, llama=True, lora_rank=2, n_draft=8).float()
    Engine(model, Fused(2))
    names = {name for name, weight in model.named_parameters() if id(weight) in kernels.packed}
    matrices = {name for name, weight in model.named_parameters() if weight.dim() == 2}
    assert names == matrices - {"lookahead"} - (set() if tied else {"wte.weight"})


@needs_onednn
def test_gradients_go_through_a_packed_weight(layer):
    kernels.pack([layer.weight])
    kernels.linear(torch.randn(4, 192), layer.weight, layer.bias).sum().backward()
    assert layer.weight.grad.abs().sum() > 0


@needs_onednn
@pytest.mark.parametrize("shape", [(16, 576), (3072, 16)])
def test_adapters_in_float32_are_left_to_the_blas(shape):
    weight = torch.randn(shape)
    kernels.pack([weight])
    assert id(weight) not in kernels.packed


def test_other_dtypes_are_not_packed(layer):
    for dtype in (torch.float64, torch.float16):
        other = layer.to(dtype)
        kernels.pack([other.weight])
        assert id(other.weight) not in kernels.packed


@needs_bfloat16
@pytest.mark.parametrize("shape", [(1, 1, 192), (2, 9, 192), (1, 0, 192)])
def test_in_bfloat16_products_of_any_size_are_the_same(layer, shape):
    layer, x = layer.bfloat16(), torch.randn(shape).bfloat16()
    kernels.pack([layer.weight])
    assert id(layer.weight) in kernels.packed
    with torch.inference_mode():
        torch.testing.assert_close(kernels.linear(x, layer.weight, layer.bias), layer(x))


@needs_onednn
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=needs_bfloat16)])
@pytest.mark.parametrize("n_rows", [1, 3])
def test_products_are_added_to_the_last_rows(layer, dtype, n_rows):
    """As an adapter does; for several texts the last rows do not lie side by side."""
    x, y = torch.randn(2, 5, 192).to(dtype), torch.randn(2, 5, 320).to(dtype)
    weight = layer.weight.detach().to(dtype)
    wanted = y.double()
    wanted[:, -n_rows:] += x[:, -n_rows:].double() @ weight.double().T
    with torch.inference_mode():
        for _ in range(2):
            made = y.clone()
            kernels.add_linear(made[:, -n_rows:], x[:, -n_rows:], weight)
            tolerance = 1e-4 if dtype == torch.float32 else 0.02
            torch.testing.assert_close(made.double(), wanted, rtol=tolerance, atol=tolerance)
            kernels.pack([weight])
    assert id(weight) in kernels.packed


@needs_onednn
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_packed_weights_are_not_used(layer, dtype):
    """Validation in training runs under autocast, on weights that an Engine may have packed when it wrote text."""
    x = torch.randn(2, 3, 192).to(dtype)
    kernels.pack([layer.weight])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        made = kernels.linear(x, layer.weight, layer.bias)
        assert made.dtype == torch.bfloat16
        assert torch.equal(made, layer(x))


@needs_onednn
def test_under_autocast_an_adapter_of_a_packed_base_can_be_validated(monkeypatch):
    monkeypatch.setattr(kernels, "LEAST_PRODUCTS", 1)
    matrix = Matrix(192, 320, bias=True)
    matrix.new_adapter(4)
    kernels.pack([matrix.weight])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert matrix(torch.randn(2, 5, 192), 3).dtype == torch.bfloat16


def test_without_onednn_nothing_is_packed(layer, monkeypatch):
    monkeypatch.setattr(kernels, "available", lambda: False)
    kernels.pack([layer.weight])
    assert id(layer.weight) not in kernels.packed


@needs_onednn
@pytest.mark.parametrize("llama", [False, True])
def test_a_packed_model_writes_the_same_text(llama, monkeypatch):
    monkeypatch.setattr(kernels, "LEAST_PRODUCTS", 1)
    model = random_lively_model(seed=3, vocab_size=300, n_embd=128, n_head=4, llama=llama).float()
    prompt = list(range(10, 20))
    before = Engine(model.double(), Plain()).generate(prompt, 25).tokens
    model = model.float()
    after = [Engine(model, method).generate(prompt, 25).tokens for method in (Plain(), Fused(3))]
    assert id(model.h[0].mlp.c_fc.weight) in kernels.packed
    assert after == [before, before]


@needs_onednn
def test_a_model_that_moved_to_another_dtype_is_not_used_in_its_old_order(layer):
    kernels.pack([layer.weight])
    moved = layer.double()
    with torch.no_grad():
        x = torch.randn(4, 192, dtype=torch.float64)
        assert torch.equal(kernels.linear(x, moved.weight, moved.bias), moved(x))
