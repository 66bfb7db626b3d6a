"""Matrix products on a CPU in float32: a few rows at nearly the price of one.

PaSS pays where a pass over several rows takes hardly longer than over one. The BLAS behind F.linear often takes several
times as long for 2 to 32 rows. oneDNN, which comes with PyTorch, does not, once a weight is stored in oneDNN's own
order. It reads a large weight faster for one row, too.
"""

import torch
import torch.nn.functional as F
from torch.utils.weak import WeakTensorKeyDictionary

LEAST_PRODUCTS = 2**19  # multiplications: with fewer, F.linear is done before oneDNN has begun
LEAST_SIZE, ROWS = 2**15, 8  # numbers in a weight that is worth a second copy; the rows that its order is chosen for
packed: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # weights to (their state, the weight in oneDNN's order)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """F.linear; without gradients, for a packed weight that has not changed since, oneDNN's."""
    if x.numel() * len(weight) >= LEAST_PRODUCTS and not torch.is_grad_enabled():
        state, in_order = packed.get(weight, (None, None))
        if state is not None and state == _state(weight):
            return torch.ops.mkldnn._linear_pointwise(x, in_order, bias, "none", [], "")
    return F.linear(x, weight, bias)


def available() -> bool:
    """Whether this PyTorch has what is needed."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def pack(model: torch.nn.Module) -> None:
    """Stores the model's matrices once more, in oneDNN's order, if they are float32, on a CPU that has oneDNN."""
    if not available():
        return
    for weight in model.parameters():
        fits = weight.dim() == 2 and weight.dtype == torch.float32 and weight.is_cpu and weight.numel() >= LEAST_SIZE
        if fits and packed.get(weight, (None, None))[0] != _state(weight):
            packed[weight] = _state(weight), torch.ops.mkldnn._reorder_linear_weight(weight.detach(), ROWS)


def _state(weight: torch.Tensor) -> tuple:
    """A value that changes whenever the weight does."""
    return 0 if weight.is_inference() else weight._version, weight.data_ptr(), weight.dtype
