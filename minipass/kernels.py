"""Matrix products on a CPU: a few rows at nearly the price of one.

PaSS pays where a pass over several rows takes hardly longer than over one. In float32 the BLAS behind F.linear often
takes several times as long for 2 to 32 rows. oneDNN, which comes with PyTorch, does not, once a weight is stored in
oneDNN's own order; for one row it is the faster one on some machines, and on others it is not. In bfloat16 F.linear is
oneDNN's product as well, but brings the weight into some order at each call.
"""

import timeit
from collections.abc import Iterable
from functools import cache

import torch
import torch.nn.functional as F
from torch.utils.weak import WeakTensorKeyDictionary

LEAST_PRODUCTS = 2**19  # multiplications in float32: with fewer, F.linear is done before oneDNN has begun
ROWS = 8  # oneDNN's order is chosen for so many
packed: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # weights to (state, sum, the weight in oneDNN's order)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """F.linear; without gradients, for a packed weight that has not changed since, oneDNN's."""
    in_order = _in_order(x, weight)
    if in_order is None:
        return F.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, in_order, bias, "none", [], "")


def add_linear(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> None:
    """Adds linear(x, weight) to y (B, R, out), in place; where weight is not packed, in one operation."""
    if _in_order(x, weight) is None:
        y.baddbmm_(x, weight.T.to(x.dtype).expand(len(x), -1, -1))  # autocast has another dtype
    else:
        y += linear(x, weight)


def available() -> bool:
    """Whether this PyTorch has what is needed."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def pack(weights: Iterable[torch.Tensor]) -> None:
    """Stores matrices (out, in) once more, in oneDNN's order: those on a CPU in float32 or bfloat16.

    A matrix that has changed since is stored anew. `linear` notices a change by itself, but for one through `.data`.
    """
    if not available():
        return
    dtypes = [torch.float32] + [torch.bfloat16] * torch.ops.mkldnn._is_mkldnn_bf16_supported()
    for weight in weights:
        if weight.is_cpu and weight.dtype in dtypes:
            now = _state(weight), weight.sum().item()
            if packed.get(weight, (None, None, None))[:2] != now:
                packed[weight] = *now, torch.ops.mkldnn._reorder_linear_weight(weight.detach(), ROWS)


@cache
def one_row_pays() -> bool:
    """Whether oneDNN is the faster one for a single row in float32 on this machine. Measured once, in milliseconds."""
    weight, x = torch.ones(1024, 1024), torch.ones(1, 1024)
    in_order = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)
    with torch.no_grad():
        ours = timeit.repeat(lambda: torch.ops.mkldnn._linear_pointwise(x, in_order, None, "none", [], ""), number=10)
        usual = timeit.repeat(lambda: F.linear(x, weight), number=10)
    return min(ours) < min(usual)


def _in_order(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor | None:
    """The packed weight, if it is to be used for the product with x."""
    few = x.dtype == torch.float32 and x.numel() * len(weight) < LEAST_PRODUCTS
    if few or torch.is_grad_enabled() or x.dtype != weight.dtype:  # as under autocast
        return None
    state, _, in_order = packed.get(weight, (None, None, None))
    one_row = x.dtype == torch.float32 and x.numel() == weight.shape[1]
    return in_order if state == _state(weight) and (not one_row or one_row_pays()) else None


def _state(weight: torch.Tensor) -> tuple:
    """A value that changes with the weight, unless it is written through `.data`."""
    return 0 if weight.is_inference() else weight._version, weight.data_ptr(), weight.dtype
