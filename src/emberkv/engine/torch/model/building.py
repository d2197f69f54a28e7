"""Builds a model from weights that come one at a time: what is quantised stays so, and nothing is held twice."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from emberkv.engine.torch.layers import is_linear
from emberkv.engine.torch.model.expert_weights import ExpertStacks, expert_part, has_experts
from emberkv.engine.torch.quantization.layers import (
    QuantizedEmbedding,
    QuantizedLinear,
    ReorderedLinear,
    put_experts,
    quantized_linears,
)
from emberkv.engine.torch.quantization.stored import StoredWeight
from emberkv.engine.torch.quantization.weight import QuantizedWeight
from emberkv.errors import CorruptModelError

Weight = Tensor | StoredWeight | list[QuantizedWeight]
"""A plain weight, one of a linear layer or an embedding, or those of all experts in a stack."""

NamedWeight = tuple[str, Weight]
"""A parameter's name, with or without the prefix of the model's base, and its value."""


def build_model(
    config: PretrainedConfig, weights: Iterable[NamedWeight], dtype: torch.dtype, attn_implementation: str
) -> PreTrainedModel:
    """A model in eval mode on the CPU with these weights.

    dtype: of what is not quantised. A quantised weight becomes a `QuantizedLinear` or a `QuantizedEmbedding`; one of
    any other layer is dequantised. A name that the model does not have is left out, as transformers does. Call it under
    the loader's lock: transformers sets torch's default type meanwhile.

    Raises CorruptModelError for a value of another shape than the parameter's, and for parameters that get none.
    """
    auto_class: Any = AutoModelForCausalLM  # untyped
    with _parameters_on_meta():
        model: PreTrainedModel = auto_class.from_config(config, dtype=dtype, attn_implementation=attn_implementation)
    experts = ExpertStacks(model, dtype)
    for name, value in weights:
        part = expert_part(name)
        if part is not None and has_experts(model, part):
            if not isinstance(value, list):
                experts.add(part, value)
        else:
            _place(model, name, value, dtype)
    _tie_output(model)
    missing = sorted(name for name, parameter in model.named_parameters() if parameter.is_meta)
    missing += [
        f"a bias of {each.out_features} values"
        for each in quantized_linears(model)
        if each.bias is not None and each.bias.is_meta
    ]
    if missing:
        named = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise CorruptModelError(f"the weights lack {named}; the config needs every tensor of the model")
    nn.Module.eval(model)
    return model


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Parameters made within, on this thread, have no values and take no memory; buffers have theirs."""
    here = get_ident()

    def without_values(_: nn.Module, __: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta or get_ident() != here:
            return None
        return nn.Parameter(parameter.to("meta"), requires_grad=False)

    register: Any = register_module_parameter_registration_hook  # typed as if the hook gave nothing
    handle = register(without_values)
    try:
        yield
    finally:
        handle.remove()


def _place(model: PreTrainedModel, name: str, value: Weight, dtype: torch.dtype) -> None:
    found = _owner(model, name) or _owner(model, f"{model.base_model_prefix}.{name}")
    if found is None:
        return
    parent_name, module, leaf = found
    if isinstance(module, QuantizedLinear) and isinstance(value, Tensor):
        module.bias = value.to(dtype).contiguous()
        return
    if isinstance(value, list):
        put_experts(module, leaf, value, dtype)
        return
    wanted = tuple(getattr(module, leaf).shape)
    shape = tuple(value.shape if isinstance(value, Tensor) else value.weight.shape)
    if shape != wanted:
        raise CorruptModelError(
            f"the weights do not fit config.json: {name} is stored as {list(shape)}, and the config makes it "
            f"{list(wanted)}"
        )
    if isinstance(value, StoredWeight):
        replacement = _quantised(module, value, dtype)
        if replacement is not None:
            model.set_submodule(parent_name, replacement)
            return
        value = value.dequantised(dtype)
    kept = value.to(getattr(module, leaf).dtype if leaf in module._buffers else dtype).contiguous()
    if leaf in module._buffers:
        module._buffers[leaf] = kept
    else:
        module._parameters[leaf] = nn.Parameter(kept, requires_grad=False)


def _owner(model: PreTrainedModel, name: str) -> tuple[str, nn.Module, str] | None:
    """The module that has a parameter or a buffer, with its name, and the parameter's name in it."""
    parent_name, _, leaf = name.rpartition(".")
    try:
        module = model.get_submodule(parent_name)
    except AttributeError:
        return None
    if isinstance(module, ReorderedLinear):
        parent_name, module = f"{parent_name}.layer", module.layer
    has_bias = isinstance(module, QuantizedLinear) and leaf == "bias" and module.bias is not None
    known = has_bias or leaf in module._parameters or leaf in module._buffers
    return (parent_name, module, leaf) if known else None


def _quantised(module: nn.Module, value: StoredWeight, dtype: torch.dtype) -> nn.Module | None:
    """What takes the module's place; None where its weight must be plain."""
    if is_linear(module):
        linear = QuantizedLinear(value.weight, module.bias, dtype)
        return linear if value.order is None else ReorderedLinear(linear, value.order)
    if isinstance(module, nn.Embedding) and value.order is None:
        scale = getattr(module, "embed_scale", None)
        if type(module) is nn.Embedding or isinstance(scale, Tensor):
            factor = 1.0 if scale is None else float(scale.to(dtype))
            return QuantizedEmbedding(value.weight, dtype, factor)
    return None


def _tie_output(model: PreTrainedModel) -> None:
    """Give an output layer without weights those of the embedding, where the config ties them."""
    untyped: Any = model
    output, embedding = untyped.get_output_embeddings(), untyped.get_input_embeddings()
    if not (isinstance(output, nn.Linear) and output.weight.is_meta and model.config.tie_word_embeddings):
        return
    if isinstance(embedding, QuantizedEmbedding):
        untyped.set_output_embeddings(QuantizedLinear(embedding.quantized, output.bias, embedding.dtype))
    elif isinstance(embedding, nn.Embedding):
        output.weight = embedding.weight
