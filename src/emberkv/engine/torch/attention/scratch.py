"""Memory that a step borrows and the next one overwrites, so that large temporaries are not mapped anew each time."""

from math import prod

import torch
from torch import Tensor


class Scratch:
    """One growing buffer. What `take` returned before is overwritten by the next `take`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffer = torch.empty(0, dtype=torch.uint8, device=device)

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An uninitialised contiguous tensor."""
        needed = prod(shape) * dtype.itemsize
        if self._buffer.numel() < needed:
            self._buffer = torch.empty(needed, dtype=torch.uint8, device=self._device)
        return self._buffer[:needed].view(dtype).view(shape)
