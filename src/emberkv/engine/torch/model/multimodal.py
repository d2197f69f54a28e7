"""The text model inside a multimodal checkpoint, which is served alone: its config, and its weights' names."""

import copy
import re
from typing import Any

from transformers import PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

TEXT_WEIGHTS = {
    r"^model\.(visual|vision_tower|multi_modal_projector|audio_tower|embed_vision|embed_audio)\.": r"unused.\1.",
    r"^model\.language_model\.": "model.",
    r"^language_model\.": "",
}
"""Patterns of the names that weights have in multimodal checkpoints, and what stands for them in the text model's."""

_SAME_ON_TEXT = {
    "qwen2_vl_text": "qwen2",
    "qwen2_5_vl_text": "qwen2",
    "qwen3_vl_text": "qwen3",
    "qwen3_vl_moe_text": "qwen3_moe",
}
"""Text models without a class of their own, and the plain ones that compute the same. Their positions in a picture have
three axes; those of text are equal on all three, and rotate as plain ones do.
"""

_ALWAYS = {"qwen3_vl_moe_text": {"norm_topk_prob": True}}
"""What the plain model has a setting for, and these models always do."""


def text_name(name: str) -> str:
    """A weight's name in the text model, by its name in a checkpoint; the same where that is no multimodal one."""
    for pattern, replacement in TEXT_WEIGHTS.items():
        name = re.sub(pattern, replacement, name)
    return name


def text_config(config: PretrainedConfig) -> PretrainedConfig:
    """The config of the text model inside ``config``; ``config`` itself where there is none, or none that is known.

    >>> from transformers import Gemma3Config
    >>> text_config(Gemma3Config()).model_type
    'gemma3_text'
    """
    inner = config.get_text_config(decoder=True)
    if inner is config or config.is_encoder_decoder:
        return config
    kind = inner.model_type
    if kind in _SAME_ON_TEXT:
        given = {name: value for name, value in inner.to_dict().items() if name != "model_type"}
        plain: Any = CONFIG_MAPPING[_SAME_ON_TEXT[kind]]
        found: PretrainedConfig = plain(**given, **_ALWAYS.get(kind, {}))
    elif type(inner) in MODEL_FOR_CAUSAL_LM_MAPPING:
        found = copy.deepcopy(inner)
    else:
        return config
    # The output layer, and how the weights are stored, are the whole model's.
    for name in ("tie_word_embeddings", "quantization_config", "quantization"):
        if hasattr(config, name):
            setattr(found, name, getattr(config, name))
    return found
