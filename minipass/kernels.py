"""Matrix products on a CPU in float32: a few rows at nearly the price of one.

PaSS pays where a pass over several rows takes hardly longer than over one. The BLAS behind F.linear often takes several
times as long for 2 to 32 rows. oneDNN, which comes with PyTorch, does not, once a weight is stored in oneDNN's own
order. It reads a large weight faster for one row, too.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch.utils.weak import WeakTensorKeyDictionary

LEAST_PRODUCTS = 2**19  # multiplications: with fewer, F.linear is done before oneDNN has begun
LEAST_SIZE, ROWS = 2**15, 8  # numbers in a weight that is worth a second copy; the rows that its order is chosen for
packed: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # weights to (state, sum, the weight in oneDNN's order)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """F.linear; without gradients, for a packed weight that has not changed since, oneDNN's."""
    if x.numel() * len(weight) >= LEAST_PRODUCTS and not torch.is_grad_enabled():
        state, _, in_order = packed.get(weight, (None, None, None))
        if state is not None and state == _state(weight):
            return torch.ops.mkldnn._linear_pointwise(x, in_order, bias, "none", [], "")
    return F.linear(x, weight, bias)


def available() -> bool:
    """Whether this PyTorch has what is needed."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def pack(weights: Iterable[torch.Tensor]) -> None:
    """Stores matrices (out, in) once more, in oneDNN's order, if they are float32, on a CPU that has oneDNN.

    A matrix that has changed since is stored anew. `linear` notices a change by itself, but for one through `.data`.
    """
    if not available():
        return
    for weight in weights:
        if weight.dtype == torch.float32 and weight.is_cpu and weight.numel() >= LEAST_SIZE:
            now = _state(weight), weight.sum().item()
            if packed.get(weight, (None, None, None))[:2] != now:
                packed[weight] = *now, torch.ops.mkldnn._reorder_linear_weight(weight.detach(), ROWS)


def _state(weight: torch.Tensor) -> tuple:
    """A value that changes with the weight, unless it is written through `.data`."""
    return 0 if weight.is_inference() else weight._version, weight.data_ptr(), weight.dtype
