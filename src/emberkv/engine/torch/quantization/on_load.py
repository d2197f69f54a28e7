"""Rounds a plain checkpoint's linear layers and experts to 8 or 4 bits while transformers loads it, a tensor at a time.

It is a quantizer of transformers' own interface, so that the names and conversions of every architecture are its.
"""

from collections.abc import Callable, Mapping
from math import prod
from typing import Any, Literal

from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from emberkv.engine.torch.layers import expert_shapes, is_linear, linear_parts, output_layer
from emberkv.engine.torch.quantization.layers import put_experts, replace_linears
from emberkv.engine.torch.quantization.stored import affine_bytes
from emberkv.engine.torch.quantization.weight import (
    DEFAULT_GROUP,
    Bits,
    Fit,
    QuantizedWeight,
    can_quantise,
    quantise,
)
from emberkv.errors import ConfigError

QuantizeName = Literal["none", "int8", "int4"]

_METHOD = "emberkv"
_BITS: dict[str, Bits] = {"int8": 8, "int4": 4}
_OUTPUT_BITS: Bits = 8
"""Of the output layer, whose errors are those of the scores."""

IDENTITY = "groups of 32, output layer of 8 bits, 3"
"""What, beside the number of bits, says which values a checkpoint is rounded to. It enters the block hashes."""


@register_quantization_config(_METHOD)
class RoundingConfig(QuantizationConfigMixin):
    """The ``quantization_config`` that `from_pretrained` takes.

    on_weight: called with each plain weight and its name before it is rounded. fit: see `quantise`. problem: what was
    wrong with a weight; transformers itself says only that something was.
    """

    def __init__(
        self, quantize: str, on_weight: Callable[[str, Tensor], None] = lambda *_: None, fit: Fit | None = None
    ) -> None:
        self.quant_method: Any = _METHOD
        self.bits = _BITS[quantize]
        self.on_weight = on_weight
        self.fit = fit
        self.problem = ""


@register_quantizer(_METHOD)
class RoundingQuantizer(HfQuantizer):
    """Keeps each rounded weight beside the model, whose own stays on the meta device until all are there."""

    requires_calibration = False

    def __init__(self, quantization_config: RoundingConfig, **options: Any) -> None:
        super().__init__(quantization_config, **options)
        self.config = quantization_config
        self.rounded: dict[str, QuantizedWeight] = {}
        self.experts: dict[str, list[QuantizedWeight]] = {}

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **_: object) -> bool:
        """Whether it is the weight of a linear layer, or of experts, that can be cut into groups."""
        layer, _dot, own = param_name.rpartition(".")
        module = model.get_submodule(layer)
        parts = linear_parts(module) if own == "weight" else None
        shape = expert_shapes(module).get(own, ())[1:] if parts is None else tuple(parts[0].shape)
        return can_quantise(shape)

    def get_quantize_ops(self) -> ConversionOps:
        return _Round(self)

    def bits_of(self, model: PreTrainedModel, layer: str) -> Bits:
        return _OUTPUT_BITS if model.get_submodule(layer) is output_layer(model) else self.config.bits

    def round(self, model: PreTrainedModel, name: str, weight: Tensor) -> None:
        """Round the weight of that name. Raises ConfigError for values that are not finite."""
        parent = name.rpartition(".")[0]
        module: Any = model.get_submodule(parent)
        if weight.ndim == 3:
            experts = (each.t() if module.is_transposed else each for each in weight)
            self.experts[name] = [quantise(each, self.config.bits, fit=self.config.fit) for each in experts]
            return
        turned = not is_linear(module)  # GPT-2's are [in, out]
        self.rounded[parent] = quantise(
            weight.t() if turned else weight, self.bits_of(model, parent), fit=self.config.fit
        )

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: object) -> PreTrainedModel:
        """Put the rounded weights in. An output layer that shares the embedding's gets a rounded copy of its own."""
        self._share_tied(model)
        output = output_layer(model)
        parts = None if output is None else linear_parts(output)
        name = next((name for name, module in model.named_modules() if module is output), None)
        if parts is not None and name is not None and name not in self.rounded and can_quantise(tuple(parts[0].shape)):
            self.rounded[name] = quantise(parts[0], _OUTPUT_BITS)
        replace_linears(model, self.rounded, model.dtype)
        for stack, weights in self.experts.items():
            parent, _dot, own = stack.rpartition(".")
            put_experts(model.get_submodule(parent), own, weights, model.dtype)
        self.rounded, self.experts = {}, {}
        forget: Any = self.remove_quantization_config  # untyped
        forget(model)
        return model

    def _share_tied(self, model: PreTrainedModel) -> None:
        """Give each linear layer whose weight is another's what that was rounded to.

        Zamba2 stores the attention that its layers share once, and transformers has tied their weights by now.
        """
        tied = {id(model.get_parameter(f"{name}.weight")): rounded for name, rounded in self.rounded.items()}
        for name, module in model.named_modules():
            if name not in self.rounded and linear_parts(module) is not None and id(module.weight) in tied:
                self.rounded[name] = tied[id(module.weight)]

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return False


class _Round(ConversionOps):
    """What transformers calls with each weight that `RoundingQuantizer.param_needs_quantization` names."""

    def __init__(self, quantizer: RoundingQuantizer) -> None:
        self.quantizer = quantizer

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **given: Any
    ) -> dict[str, list[Tensor]]:
        """Nothing for transformers to put into the model: what was rounded is put in when all weights are there."""
        model: PreTrainedModel = given["model"]
        missing_keys: set[str] | None = given.get("missing_keys")
        for name, found in input_dict.items():
            weight: Tensor = found[0] if isinstance(found, list) else found
            self.quantizer.config.on_weight(name, weight)
            try:
                self.quantizer.round(model, name, weight)
            except ConfigError as error:
                self.quantizer.config.problem = f"{name}: {error}"
                raise
            if missing_keys is not None:
                missing_keys.discard(name)
        return {}


def rounded_bytes(
    linears: Mapping[str, tuple[int, ...]],
    experts: Mapping[str, tuple[int, int, int]],
    output: str | None,
    quantize: str,
    *,
    packed: bool = False,
) -> dict[str, int]:
    """What the weights that are rounded take, by name. In 4 bits a group has an offset, as most layers' have.

    linears: ``(out, in)`` of all linear layers' weights. experts: ``(experts, out, in)`` of all stacked ones. output:
    the name of the output layer's. packed: see `affine_bytes`.
    """
    found: dict[str, int] = {}
    for name, (*stacked, out_features, in_features) in {**linears, **experts}.items():
        if can_quantise((out_features, in_features)):
            bits = _OUTPUT_BITS if name == output else _BITS[quantize]
            each = affine_bytes(
                out_features, in_features, bits=bits, group=DEFAULT_GROUP, has_offsets=bits == 4, packed=packed
            )
            found[name] = prod(stacked) * each
    return found
