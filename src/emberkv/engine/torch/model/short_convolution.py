"""Short convolutions over past tokens (LFM2): each channel is a weighted sum over the latest few tokens.

What such a layer keeps of a sequence is its inputs of the tokens that the next one still sees: two columns, where the
convolution is over three tokens.
"""

from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True, slots=True)
class ConvolutionGeometry:
    """layer: its number among the model's layers. columns: of earlier tokens that a token sees. channels: of each."""

    layer: int
    columns: int
    channels: int

    @property
    def values(self) -> int:
        """Values of its state."""
        return self.columns * self.channels


def is_short_convolution(module: Any) -> bool:
    """Whether a layer is ``out_proj(C * conv(B * x))``, where ``B, C, x`` are the thirds of ``in_proj``.

    Known by its parts; that it computes nothing else is for the engine's comparison with the model's own logits.
    """
    conv = getattr(module, "conv", None)
    if type(conv) is not nn.Conv1d or "ShortConv" not in type(module).__name__:
        return False
    by_channel: bool = conv.groups == conv.in_channels == conv.out_channels and conv.stride == conv.dilation == (1,)
    parts = {name for name, _ in module.named_children()}
    return by_channel and conv.kernel_size[0] > 1 and parts == {"conv", "in_proj", "out_proj"}


def convolutions_of(model: nn.Module) -> tuple[ConvolutionGeometry, ...]:
    """All short convolutions of a model, in order."""
    modules: list[Any] = [module for module in model.modules() if is_short_convolution(module)]
    return tuple(
        ConvolutionGeometry(int(each.layer_idx), each.conv.kernel_size[0] - 1, each.conv.in_channels)
        for each in modules
    )
