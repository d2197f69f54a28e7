"""Rotary positions: up to which length a token's rotation stays what it was when its key was stored."""

import copy
from typing import Any

from transformers import PretrainedConfig

SERVED_ROPE_TYPES = frozenset({"default", "dynamic", "linear", "llama3", "longrope", "proportional", "yarn"})


def rope_types(config: PretrainedConfig) -> set[str]:
    """The types of RoPE that a model's layers have; none where positions are not rotary."""
    return {parameters["rope_type"] for parameters in _parameters(config)}


def rotation_limit(config: PretrainedConfig) -> int:
    """The most tokens, at most the model's context, for which a position's rotation depends on that position alone.

    "longrope" and "dynamic" take other frequencies, for every position, once the longest sequence in the batch
    outgrows the length that the model was first trained for. Keys stored before that would silently be wrong after
    it, for a longer prompt as well as for the neighbours in a batch; so such a model is served up to that length only.
    For "dynamic" it is the context that the config states.
    """
    changes = [
        parameters["original_max_position_embeddings"]
        for parameters in _parameters(config)
        if parameters["rope_type"] == "longrope"
    ]
    return int(min([config.max_position_embeddings, *changes]))


def with_fixed_rotation(config: PretrainedConfig) -> PretrainedConfig:
    """A copy in which "dynamic", which looks at the positions' values, is the "default" that it is up to the limit."""
    fixed = copy.deepcopy(config)
    for parameters in _parameters(fixed):
        if parameters["rope_type"] == "dynamic":
            parameters["rope_type"] = "default"
    return fixed


def _parameters(config: PretrainedConfig) -> list[dict[str, Any]]:
    """RoPE's parameters, defaults filled in: one set for all layers, or one for each type of layer."""
    given = getattr(config, "rope_parameters", None) or {}
    nested = [each for each in given.values() if isinstance(each, dict)]
    return [each for each in nested or [given] if each.get("rope_type")]
