"""Layers that keep a state of fixed size of all earlier tokens, beside or in place of keys and values.

- A short convolution (LFM2) keeps its inputs of the tokens that the next one still sees: two, where it is over three.
- Mamba-2 and the gated delta net keep that too, and a matrix a head, in fp32, which each token decays and adds to.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True, slots=True)
class StateGeometry:
    """The state of one layer.

    layer: its number among the model's layers. columns: earlier tokens that its convolution sees. channels: of each.
    heads: matrices, of shape ``[depth, width]`` and in fp32; 0 for a convolution alone.
    """

    layer: int
    columns: int
    channels: int
    heads: int = 0
    depth: int = 0
    width: int = 0

    @property
    def convolved(self) -> int:
        """Values of the convolution's state, which are of the activations' type."""
        return self.columns * self.channels

    @property
    def matrix_bytes(self) -> int:
        return self.heads * self.depth * self.width * torch.float32.itemsize


def is_short_convolution(module: Any) -> bool:
    """Whether a layer is ``out_proj(C * conv(B * x))``, where ``B, C, x`` are the thirds of ``in_proj``.

    Known by its parts; that it computes nothing else is for the engine's comparison with the model's own logits.
    """
    conv = getattr(module, "conv", None)
    if not _is_convolution_by_channel(conv) or "ShortConv" not in type(module).__name__:
        return False
    return {name for name, _ in module.named_children()} == {"conv", "in_proj", "out_proj"}


def is_mamba2(module: Any) -> bool:
    """Whether a layer is Mamba-2's mixer: one decay a head, and a product that gives gate, convolved part and steps."""
    if not (_has_silu_convolution(module) and _by_head(module, "A_log", "D", "dt_bias")):
        return False
    parts = {name for name, _ in module.named_children()}
    heads, width, depth = module.num_heads, module.head_dim, module.ssm_state_size
    inner, channels = heads * width, heads * width + 2 * module.n_groups * depth
    fits = module.conv1d.in_channels == channels and module.in_proj.out_features == inner + channels + heads
    return bool(fits) and parts == {"in_proj", "conv1d", "act", "norm", "out_proj"}


DELTA_PRODUCTS = (
    {"in_proj_qkvz", "in_proj_ba"},
    {"in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"},
    {"q_proj", "k_proj", "v_proj", "g_proj", "b_proj", "a_proj"},
)
"""How gated delta nets name what they compute of a token: of Qwen3-Next, Qwen3.5 and OLMo hybrid."""


def is_delta_net(module: Any) -> bool:
    """Whether a layer is a gated delta net: one decay a head, and a state that keys correct."""
    if not (_has_silu_convolution(module) and _by_head(module, "A_log", "dt_bias")):
        return False
    parts = {name for name, _ in module.named_children()}
    ends = ({"norm", "out_proj"}, {"o_norm", "o_proj"})
    return any(parts == {"conv1d"} | products | end for products in DELTA_PRODUCTS for end in ends)


def _is_convolution_by_channel(conv: Any) -> bool:
    if type(conv) is not nn.Conv1d:
        return False
    by_channel: bool = conv.groups == conv.in_channels == conv.out_channels and conv.stride == conv.dilation == (1,)
    return by_channel and conv.kernel_size[0] > 1


def _has_silu_convolution(module: Any) -> bool:
    if not _is_convolution_by_channel(getattr(module, "conv1d", None)):
        return False
    return getattr(module, "activation", None) in ("silu", "swish")


def _by_head(module: Any, *names: str) -> bool:
    """Whether it has these parameters, one value a head each."""
    found = [getattr(module, name, None) for name in names]
    return all(isinstance(each, nn.Parameter) and each.ndim == 1 for each in found)


def state_layers(model: nn.Module) -> tuple[StateGeometry, ...]:
    """The state of all such layers of a model, in order."""
    return tuple(found for module in model.modules() if (found := state_of(module)) is not None)


def state_of(module: Any) -> StateGeometry | None:
    """What a layer keeps; None for any layer that is not one of these."""
    if is_short_convolution(module):
        return StateGeometry(int(module.layer_idx), *_columns_and_channels(module.conv))
    if is_mamba2(module):
        heads = module.num_heads, module.ssm_state_size, module.head_dim
        return StateGeometry(int(module.layer_idx), *_columns_and_channels(module.conv1d), *heads)
    if is_delta_net(module):
        heads = module.num_v_heads, module.head_k_dim, module.head_v_dim
        return StateGeometry(int(module.layer_idx), *_columns_and_channels(module.conv1d), *heads)
    return None


def _columns_and_channels(conv: nn.Conv1d) -> tuple[int, int]:
    return conv.kernel_size[0] - 1, conv.in_channels
