"""Experts of quantised checkpoints, stored one by one: of which stacked weight of the model each is a part."""

import re
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from emberkv.engine.torch.layers import expert_shapes, is_experts
from emberkv.engine.torch.quantization.layers import put_experts
from emberkv.engine.torch.quantization.stored import StoredWeight
from emberkv.engine.torch.quantization.weight import QuantizedWeight
from emberkv.errors import CorruptModelError, UnsupportedModelError

_PLACES = {
    "gate_proj": ("gate_up_proj", 0),
    "w1": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1),
    "w3": ("gate_up_proj", 1),
    "down_proj": ("down_proj", 0),
    "w2": ("down_proj", 0),
}
"""The stacked weight that a stored one is part of, and which half of its outputs."""

_NAME = re.compile(rf"(.+)\.(?:experts\.(\d{{1,5}})|switch_mlp)\.({'|'.join(_PLACES)})\.(weight|bias)")
"""MLX stacks all experts' gates, and so on, as ``switch_mlp``."""


_PAIRS = ("gate_up_proj", "gate_up_proj_bias")


class ExpertPart(NamedTuple):
    """parameter: the stack's name. number: of the expert; None: all of them. half: of the outputs, 0 or 1."""

    parameter: str
    number: int | None
    half: int

    def shape(self, stack: tuple[int, ...]) -> tuple[int, ...]:
        """Of what is stored, of a stack of that shape, ``[experts, out, in]``, or ``[experts, out]`` of biases."""
        experts, rows, *columns = stack
        one = (rows // 2 if self.parameter.endswith(_PAIRS) else rows, *columns)
        return one if self.number is not None else (experts, *one)


def expert_part(name: str) -> ExpertPart | None:
    """What the stored weight or bias of that name is; None where it is no expert's.

    >>> expert_part("model.layers.0.mlp.experts.7.up_proj.weight")
    ExpertPart(parameter='model.layers.0.mlp.experts.gate_up_proj', number=7, half=1)
    """
    found = _NAME.fullmatch(name)
    if found is None:
        return None
    block, number, part, kind = found.groups()
    stack, half = _PLACES[part]
    own = stack if kind == "weight" else f"{stack}_bias"
    return ExpertPart(f"{block}.experts.{own}", None if number is None else int(number), half)


def expert_name(name: str, number: int) -> str:
    """The name of one expert's weight, of that of all experts' together."""
    return name.replace(".switch_mlp.", f".experts.{number}.")


_GGUF_PARTS = {"gate_up_proj": ("gate", "up"), "down_proj": ("down",)}


def gguf_expert_names(parameter: str) -> dict[str, str]:
    """The tensors of a GGUF file that make up a stack of experts' weights or biases, each with the name by which
    `expert_part` knows it.

    >>> gguf_expert_names("model.layers.7.mlp.experts.down_proj")
    {'blk.7.ffn_down_exps.weight': 'model.layers.7.mlp.switch_mlp.down_proj.weight'}
    """
    block, _, own = parameter.rpartition(".experts.")
    layer = block.partition(".layers.")[2].partition(".")[0]
    stack = own.removesuffix("_bias")
    kind = "weight" if stack == own else "bias"
    return {
        f"blk.{layer}.ffn_{part}_exps.{kind}": f"{block}.switch_mlp.{part}_proj.{kind}" for part in _GGUF_PARTS[stack]
    }


class ExpertStacks:
    """Collects the weights of one model's experts, and puts a stack into the model once it is whole."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self._model, self._dtype = model, dtype
        self._parts: dict[str, dict[tuple[int, int], QuantizedWeight | Tensor]] = {}

    def add(self, part: ExpertPart, value: Tensor | StoredWeight) -> None:
        """Raises CorruptModelError for an expert that the model does not have, or a weight of another shape."""
        parent, _, own = part.parameter.rpartition(".")
        module: Any = self._model.get_submodule(parent)
        stack = expert_shapes(module).get(own) or tuple(getattr(module, own).shape)
        number = -1 if part.number is None else part.number
        shape = tuple(value.shape if isinstance(value, Tensor) else value.weight.shape)
        if not 0 <= number < stack[0] or shape != part.shape(stack):
            raise CorruptModelError(
                f"the weights do not fit config.json: expert {number} of {parent} is stored as {list(shape)}, and the "
                f"config makes {stack[0]} experts of {list(part.shape(stack))}"
            )
        parts = self._parts.setdefault(part.parameter, {})
        parts[number, part.half] = self._held(value)
        if len(parts) == stack[0] * (stack[1] // shape[0]):
            self._put(module, own, self._parts.pop(part.parameter))

    def _held(self, value: Tensor | StoredWeight) -> QuantizedWeight | Tensor:
        """Inputs in an order of their own (act-order) are what no kernel for experts takes: those become plain."""
        if isinstance(value, Tensor):
            return value.to(self._dtype)
        return value.weight if value.order is None else value.dequantised(self._dtype)

    def _put(self, module: Any, own: str, parts: dict[tuple[int, int], QuantizedWeight | Tensor]) -> None:
        quantised: list[QuantizedWeight] = []
        plain: list[Tensor] = []
        for number in range(1 + max(number for number, _ in parts)):
            halves = [parts.pop((number, half)) for half in (0, 1) if (number, half) in parts]
            whole = [each for each in halves if isinstance(each, QuantizedWeight)]
            if len(whole) == len(halves):
                quantised.append(_joined(whole, in_turns=not module.is_concatenated))
            else:
                values = torch.cat([_values(each, self._dtype) for each in halves])
                values = values if len(halves) == 1 or module.is_concatenated else values[_in_turns(len(values))]
                plain.append(values.t() if module.is_transposed and values.ndim == 2 else values)
        if plain and quantised:
            raise UnsupportedModelError(
                f"some experts of {type(module).__name__} are quantised and others are plain; accepted are experts "
                "that are stored alike"
            )
        if plain:
            module._parameters[own] = nn.Parameter(torch.stack(plain), requires_grad=False)
        else:
            put_experts(module, own, quantised, self._dtype)


def _joined(halves: list[QuantizedWeight], *, in_turns: bool) -> QuantizedWeight:
    """The outputs of both halves in one weight, or the only one. in_turns: one output of each, and so on."""
    if len(halves) == 1:
        return halves[0]
    if len({each.bits for each in halves}) > 1:
        halves = [each.in_8_bits() for each in halves]
    both = halves[0].above(halves[1])
    return both.reordered(_in_turns(both.out_features)) if in_turns else both


def _in_turns(count: int) -> Tensor:
    """int64 ``[count]``: first the first of each half, then the second of each, and so on."""
    return torch.arange(count).view(2, -1).t().reshape(-1)


def _values(weight: QuantizedWeight | Tensor, dtype: torch.dtype) -> Tensor:
    return weight if isinstance(weight, Tensor) else weight.dequantised(dtype)


def has_experts(model: nn.Module, part: ExpertPart) -> bool:
    """Whether the model keeps that part in a stack of experts."""
    try:
        parent, _, own = part.parameter.rpartition(".")
        module = model.get_submodule(parent)
    except AttributeError:
        return False
    return is_experts(module) and hasattr(module, own)
