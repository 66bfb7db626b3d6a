"""Matrix products on a CPU: a few rows at nearly the price of one.

PaSS pays where a pass over several rows takes hardly longer than over one. In float32 the BLAS behind F.linear often
takes several times as long for 2 to 32 rows. oneDNN, which comes with PyTorch, does not, once a weight is stored in
oneDNN's own order; for one row it is the faster one on some machines, and on others it is not. In bfloat16 F.linear is
oneDNN's product as well, but brings the weight into some order at each call.
"""

import timeit
import weakref
from collections.abc import Iterable
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F

LEAST_PRODUCTS = 2**19  # multiplications in float32: with fewer, F.linear is done before oneDNN has begun
LEAST_SIDE = 64  # of a float32 weight: narrower ones, as of adapters, the BLAS multiplies faster
ROWS = 8  # oneDNN's order is chosen for so many


class Packed(NamedTuple):
    """A weight in oneDNN's order, and the state and the sum that it had when it was stored."""

    in_order: torch.Tensor
    state: tuple
    total: float


packed: dict[int, Packed] = {}  # by the id of the weight, as long as it lives; PyTorch's weak dictionaries are slow


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """F.linear; without gradients or autocast, for a packed weight that has not changed since, by oneDNN if it pays."""
    in_order = _in_order(x, weight)
    return F.linear(x, weight, bias) if in_order is None else _product(x, in_order, bias)


def add_linear(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> None:
    """Adds linear(x, weight) to y (B, R, out), in place; in one operation, unless oneDNN has the product."""
    in_order = _in_order(x, weight)
    if in_order is None:
        y.baddbmm_(x, weight.T.to(x.dtype).expand(len(x), -1, -1))  # autocast has another dtype
    else:
        y += _product(x, in_order)


def available() -> bool:
    """Whether this PyTorch has what is needed."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def bfloat16_pays() -> bool:
    """Whether the processor multiplies bfloat16; where oneDNN only imitates that, its order gains nothing."""
    return available() and torch.cpu._is_avx512_bf16_supported() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def pack(weights: Iterable[torch.Tensor]) -> None:
    """Stores matrices (out, in) once more, in oneDNN's order: those on a CPU in float32 or bfloat16, if it pays.

    A matrix that has changed since is stored anew. `linear` notices a change by itself, but for one through `.data` or
    of an inference tensor.
    """
    if not available():
        return
    dtypes = [torch.float32] + [torch.bfloat16] * bfloat16_pays()
    for weight in weights:
        narrow = weight.dtype == torch.float32 and min(weight.shape) < LEAST_SIDE
        if narrow or not weight.is_cpu or weight.dtype not in dtypes:
            packed.pop(id(weight), None)
            continue
        rows = weight.sum(1, dtype=torch.float32)  # in bfloat16 they would hide most changes
        now = _state(weight), rows.sum(dtype=torch.float64).item()
        stored = packed.get(id(weight))
        if stored is None or (stored.state, stored.total) != now:
            packed[id(weight)] = Packed(torch.ops.mkldnn._reorder_linear_weight(weight.detach(), ROWS), *now)
        if stored is None:
            weakref.finalize(weight, packed.pop, id(weight), None)


@cache
def one_row_pays() -> bool:
    """Whether oneDNN is the faster one for a single row in float32 on this machine: measured once, in 25 ms."""
    weight = torch.ones(1024, 1024, dtype=torch.float32, device="cpu")
    x, in_order = weight[:1], torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)
    usual, ours = (
        min(timeit.repeat(product, number=10))
        for product in (lambda: F.linear(x, weight), lambda: _product(x, in_order))
    )
    return ours < usual


def _product(x: torch.Tensor, in_order: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, in_order, bias, "none", [], "")


def _in_order(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor | None:
    """The packed weight, if it is to be used for the product with x."""
    few = x.dtype == torch.float32 and x.numel() * len(weight) < LEAST_PRODUCTS
    if few or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return None
    stored = packed.get(id(weight))
    if stored is None or stored.state != _state(weight):
        return None
    one_row = x.dtype == torch.float32 and x.numel() == weight.shape[1]
    return None if one_row and not one_row_pays() else stored.in_order


def _state(weight: torch.Tensor) -> tuple:
    """A value that changes with the weight, unless it is written through `.data` or an inference tensor."""
    return 0 if weight.is_inference() else weight._version, weight.data_ptr(), weight.dtype
