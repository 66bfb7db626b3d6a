"""CUDA graphs: a turn is recorded once and then replayed, without Python and without a launch for each kernel.

A GPU computes a small model's pass faster than the host can launch it. This one class records plain decoding and every
method of PaSS, so comparisons stay fair.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

WARM_UPS = 2  # runs before a recording: libraries choose their kernels, and tables of indices are made


class Graph:
    """A function of tensors as a CUDA graph. Its results lie in the same memory, replay after replay.

    function: it must need no host sync, and no data from the host. state: tensors that it changes in place; the runs
    before the recording leave them as they were.
    """

    def __init__(self, function: Callable[..., Any], inputs: Sequence[torch.Tensor], state: Sequence[torch.Tensor]):
        self.inputs, before = [each.clone() for each in inputs], [each.clone() for each in state]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                function(*self.inputs)
                for each, value in zip(state, before, strict=True):
                    each.copy_(value)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.outputs = function(*self.inputs)

    def __call__(self, *inputs: torch.Tensor) -> Any:
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given)
        self.graph.replay()
        return self.outputs


def available(device: torch.device) -> bool:
    """Whether graphs can be recorded there."""
    return device.type == "cuda"
