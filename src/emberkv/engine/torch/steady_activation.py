"""Activation functions whose result for an element does not depend on how many elements there are.

torch computes elements in vectors, and by another routine, which rounds differently, what is left over of a vector at
the end of each thread's share. Where the shares end depends on the number of elements and threads.
"""

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers.activations import ACT2CLS

VECTOR = 64
"""A multiple of the elements that any vectorized loop takes at a time."""

ALONE = 16_384
"""Up to so many elements, one thread computes them all."""

TOGETHER = 32_768
"""For each started run of so many elements, one more thread takes part."""

_CLASSES = cast(
    tuple[type[nn.Module], ...], tuple({each[0] if isinstance(each, tuple) else each for each in ACT2CLS.values()})
)


class SteadyActivation(nn.Module):
    """An elementwise function on CPU, called so that every share is whole vectors."""

    def __init__(self, function: nn.Module) -> None:
        super().__init__()
        self.function = function

    def forward(self, inputs: Tensor) -> Tensor:
        count = inputs.numel()
        if _has_whole_shares(count):
            result: Tensor = self.function(inputs)
            return result
        flat = pad(inputs.reshape(-1), (0, -count % VECTOR))
        return torch.cat([self.function(part) for part in torch.split(flat, ALONE)])[:count].view_as(inputs)


def _has_whole_shares(count: int) -> bool:
    """Whether one thread computes them all, or every thread an equal number of vectors."""
    threads = torch.get_num_threads()
    if threads == 1 or count <= ALONE:
        return count % VECTOR == 0
    return count > TOGETHER * (threads - 1) and count % (VECTOR * threads) == 0


def steady_activations(model: nn.Module) -> int:
    """Wrap every activation function of transformers that has no parameters. Returns the number of wrapped ones."""
    wrapped = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            elementwise = isinstance(child, _CLASSES) and not list(child.parameters())
            if elementwise and not isinstance(parent, SteadyActivation):
                setattr(parent, name, SteadyActivation(child))
                wrapped += 1
    return wrapped
