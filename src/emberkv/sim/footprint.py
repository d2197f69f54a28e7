"""Memory on a device: what a model takes of it, and how many KV blocks fit in the rest."""

from emberkv.errors import ConfigError
from emberkv.sim.hardware import GIB, HardwareProfile
from emberkv.sim.model_spec import DTYPE_BITS, ModelSpec

UTILISATION = 0.9
"""Share of a device's memory that a server takes by default, as vLLM does."""

SAMPLED_BYTES = 12
"""Bytes of a logit while it is sampled from: fp32 logits, a copy and the probabilities."""


def weight_bytes(model: ModelSpec, tensor_parallel: int = 1, *, whole_attention: bool = False) -> int:
    """Bytes of weights on each device of a group. whole_attention: each has all of the attention's, if it is
    data-parallel.
    """
    if not whole_attention:
        return -(-model.weight_bytes // tensor_parallel)
    attention = round(model.layers * model.attention_parameters * DTYPE_BITS[model.weights_dtype] / 8)
    return attention + -(-(model.weight_bytes - attention) // tensor_parallel)


def activation_bytes(model: ModelSpec, step_tokens: int, sequences: int, tensor_parallel: int = 1) -> int:
    """Bytes that a step of ``step_tokens`` needs at its peak on each device, ``sequences`` of them sampling.

    The widest moment of a layer: its input, the residual and the normed copy, and the MLP's two halves and their
    product; besides, the logits that are sampled from.
    """
    width = max(
        model.intermediate * (model.moe_layers < model.layers), model.experts_per_token * model.expert_intermediate
    )
    layer = step_tokens * (3 * model.hidden + 3 * -(-width // tensor_parallel)) * 2
    return layer + sequences * model.vocab * SAMPLED_BYTES


def kv_block_bytes(model: ModelSpec, block_size: int, tensor_parallel: int = 1) -> int:
    """Bytes of one block on each device; KV heads are split among the devices, and copied when there are too few."""
    heads = -(-model.kv_heads // tensor_parallel)
    return block_size * model.kv_bytes_per_token * heads // model.kv_heads


def kv_blocks(
    model: ModelSpec,
    hardware: HardwareProfile,
    *,
    block_size: int = 16,
    utilisation: float = UTILISATION,
    tensor_parallel: int = 1,
    step_tokens: int = 2048,
    sequences: int = 256,
    data_parallel_attention: bool = False,
) -> int:
    """KV blocks of all devices together that fit beside weights, activations and the runtime.

    A block is divided among the devices, or, if attention is data-parallel, whole on one of them.
    Raises ConfigError if not one fits.
    """
    budget = int(hardware.memory_bytes * utilisation)
    weights = weight_bytes(model, tensor_parallel, whole_attention=data_parallel_attention)
    reserve = activation_bytes(model, step_tokens, sequences, tensor_parallel) + round(hardware.runtime_gib * GIB)
    sharing = 1 if data_parallel_attention else tensor_parallel
    blocks = (budget - weights - reserve) // kv_block_bytes(model, block_size, sharing)
    if blocks < 1:
        raise ConfigError(
            f"{model.name} does not fit {hardware.name}: of {budget / GIB:.1f} GiB, {weights / GIB:.1f} GiB of weights "
            f"and {reserve / GIB:.1f} GiB to compute leave nothing for the KV cache; use more devices, another dtype "
            "or smaller steps"
        )
    return blocks * tensor_parallel // sharing
