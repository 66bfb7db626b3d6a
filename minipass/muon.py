"""Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon): gradient descent whose steps are orthogonal matrices.

PyTorch's own computes in bfloat16 alone. A processor that must emulate that takes four times as long for the update
as for the rest of a step. This one computes in the dtype of the parameters, matrices of one shape together.
"""

import math
from collections import defaultdict
from collections.abc import Iterable

import torch

MOMENTUM, WEIGHT_DECAY, RMS = 0.95, 0.01, 0.2  # RMS: of an update's numbers, about AdamW's, per learning rate of 1
ITERATION, N_ITERATIONS = (3.4445, -4.7750, 2.0315), 5  # of the polynomial that brings singular values close to 1


def orthogonal(matrices: torch.Tensor) -> torch.Tensor:
    """Matrices (N, m, n) with singular values of about 1 (0.7 to 1.2) in place of theirs (Newton-Schulz iteration)."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    a, b, c = ITERATION
    for _ in range(N_ITERATIONS):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """For parameters of two dimensions; params as for any optimiser of PyTorch."""

    def __init__(self, params: Iterable, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self) -> None:
        """One update of all parameters that have a gradient, with Nesterov momentum."""
        for group in self.param_groups:
            same_shape: dict[torch.Size, list[torch.Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    same_shape[parameter.shape].append(parameter)
            for shape, parameters in same_shape.items():
                for each in parameters:
                    if "average" not in self.state[each]:
                        self.state[each]["average"] = torch.zeros_like(each)
                averages = [self.state[each]["average"] for each in parameters]
                gradients = [each.grad for each in parameters]
                torch._foreach_lerp_(averages, gradients, 1 - MOMENTUM)
                updates = torch._foreach_lerp(gradients, averages, MOMENTUM)
                updates = orthogonal(torch.stack(updates)).unbind()
                torch._foreach_mul_(parameters, 1 - group["lr"] * WEIGHT_DECAY)
                torch._foreach_add_(parameters, updates, alpha=-group["lr"] * RMS * math.sqrt(max(shape)))
