"""Layers of a model whose result for a row or an element does not depend on how many are computed with it.

Called the plain way, oneDNN rearranges a bf16 weight on every call, which for a few rows costs as much as the product
itself, and fp32 products go to a library that picks its kernel, and with it the order of summation, by the number of
rows. Elementwise functions compute in vectors, and by another routine, which rounds differently, what is left over of a
vector at the end of each thread's share. Where the shares end depends on the number of elements and threads.
"""

from collections.abc import Callable
from typing import Any, TypeGuard, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, softplus
from torch.overrides import TorchFunctionMode
from transformers.activations import ACT2CLS
from transformers.pytorch_utils import Conv1D


class PackedLinear(nn.Module):
    """A frozen linear layer for CPU whose weight is kept in oneDNN's own blocked layout.

    weight: ``[out_features, in_features]``; the plain copy is not kept.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight = stand_in(weight)
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous())
        self.bias = bias

    def forward(self, inputs: Tensor) -> Tensor:
        if inputs.numel() == 0:
            return inputs.new_empty(*inputs.shape[:-1], self.out_features)
        rows = inputs.reshape(-1, self.in_features)
        count = rows.shape[0]
        if count == 1:
            rows = rows.expand(2, -1)  # a single row takes another kernel, which sums in another order
        product: Tensor = torch.ops.mkldnn._linear_pointwise(rows, self.packed, self.bias, "none", [], "")
        return product[:count].view(*inputs.shape[:-1], -1)


def pack_linears(model: nn.Module) -> int:
    """Replace every linear layer that oneDNN takes. Returns the number of layers replaced.

    A tied output layer gets a copy of its own, as the embedding needs the plain layout: memory for one more embedding,
    against a product that is twice as fast for a few rows and whose rows are independent.
    """
    replaced = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            parts = linear_parts(child)
            if parts is not None and _can_pack(parts[0]):
                setattr(parent, name, PackedLinear(*parts))
                replaced += 1
    return replaced


def stand_in(weight: Tensor) -> Tensor:
    """What model code that asks a replaced layer's ``weight`` for its shape, dtype or device is given.

    Its values are NaN and take no memory: code that computes with them fails the engine's comparison with the model's
    own logits, instead of being wrong.
    """
    return torch.full((), torch.nan, dtype=weight.dtype, device=weight.device).expand(weight.shape)


EXPERT_WEIGHTS = ("gate_up_proj", "down_proj")
"""The stacked weights of a module of experts: to gate and up, and back."""


def linear_parts(module: object) -> tuple[Tensor, Tensor | None] | None:
    """Weight ``[out_features, in_features]`` and bias of a linear layer; None for anything else.

    A class derived from one may do something else with its weight.
    """
    if is_linear(module):
        return module.weight, module.bias
    if type(module) is Conv1D:
        return module.weight.t(), module.bias
    return None


def is_linear(module: object) -> TypeGuard[nn.Linear]:
    """Whether it is torch's linear layer, or Falcon's, which computes the same."""
    return type(module) is nn.Linear or (isinstance(module, nn.Linear) and type(module).__name__ == "FalconLinear")


_EXPERTS_LAYOUT = ("has_gate", "has_bias", "is_transposed", "is_concatenated")
"""What transformers' `use_experts_implementation` says of a module of experts."""


def is_experts(module: object) -> bool:
    """Whether it holds the experts of a mixture, their weights stacked, and takes each one by its number."""
    stacks = (getattr(module, name, None) for name in EXPERT_WEIGHTS)
    return all(hasattr(module, name) for name in _EXPERTS_LAYOUT) and all(
        each is not None and len(each.shape) == 3 for each in stacks
    )


def expert_shapes(module: Any) -> dict[str, tuple[int, int, int]]:
    """Of a module that `is_experts`: its weights' ``(experts, out, in)`` by name; {} for any other."""
    if not is_experts(module):
        return {}
    shapes = {name: tuple(getattr(module, name).shape) for name in EXPERT_WEIGHTS}
    if module.is_transposed:
        return {name: (experts, out, size) for name, (experts, size, out) in shapes.items()}
    return {name: (experts, out, size) for name, (experts, out, size) in shapes.items()}


def output_layer(model: nn.Module) -> nn.Module | None:
    """The layer of a model of transformers that makes the logits; None where it has none."""
    untyped: Any = model
    found: nn.Module | None = untyped.get_output_embeddings()
    return found


@torch.no_grad()
def release_checkpoint(model: nn.Module) -> None:
    """Copy what was not packed, so that nothing keeps the whole checkpoint file mapped into memory.

    A buffer that a forward pass has made (CTRL's, of positions in the activations' type) is an inference tensor, whose
    data cannot be exchanged: the module gets a copy instead.
    """
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_inference():
                module._buffers[name] = buffer.clone()
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()


def _can_pack(weight: Tensor) -> bool:
    """Whether oneDNN takes this weight here."""
    if weight.device.type != "cpu" or not torch._C._has_mkldnn:
        return False
    bf16 = weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return weight.dtype == torch.float32 or bool(bf16)


_TRIED_ROWS = (1, 2, 3, 5, 8, 9, 15, 16, 17, 24, 31, 32, 33, 48, 63, 64, 65, 96, 127, 128, 129, 160, 255, 256, 257, 400)


@torch.inference_mode()
def rows_are_independent(model: nn.Module) -> bool:
    """Whether a row's product has the same bits however many rows come with it, in each of the model's linear layers.

    Tries one layer of each shape, with numbers of rows around those at which kernels change. False as soon as a layer
    is not packed, or a module has a weight of its own to multiply by, as routers and experts have.
    """
    if any(_multiplies(module) for module in model.modules()):
        return False
    shapes = {(m.in_features, m.out_features): m for m in model.modules() if isinstance(m, PackedLinear)}
    return all(_independent(layer) for layer in shapes.values())


def _multiplies(module: nn.Module) -> bool:
    """Whether a module, that is not packed, may compute a product.

    Norms of several heads have a scale by head (Cohere), and a bias is added whatever its shape (Ernie 4.5).
    """
    if isinstance(module, nn.Embedding) or type(module).__name__.endswith("Norm"):
        return False
    own = module.named_parameters(recurse=False)
    return any(parameter.ndim > 1 and not name.endswith("bias") for name, parameter in own)


def _independent(layer: PackedLinear) -> bool:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(max(_TRIED_ROWS), layer.in_features, generator=generator).to(layer.packed.dtype)
    expected = layer(inputs)
    return all(torch.equal(layer(inputs[:rows]), expected[:rows]) for rows in _TRIED_ROWS)


VECTOR = 64
"""A multiple of the elements that any vectorized loop takes at a time."""

ALONE = 16_384
"""Up to so many elements, one thread computes them all."""

TOGETHER = 32_768
"""For each started run of so many elements, one more thread takes part."""

_CLASSES = cast(
    tuple[type[nn.Module], ...], tuple({each[0] if isinstance(each, tuple) else each for each in ACT2CLS.values()})
)

_OTHER_ACTIVATIONS = frozenset({"BloomGelu", "GELU"})
"""Names of classes that some models use without transformers' registry."""


class BatchInvariantActivation(nn.Module):
    """An elementwise function on CPU, called so that every share is whole vectors.

    Half of each row, as some models give it, is computed row by row where it lies, and so is laid end to end before.
    """

    def __init__(self, function: nn.Module) -> None:
        super().__init__()
        self.function = function

    def forward(self, inputs: Tensor) -> Tensor:
        count = inputs.numel()
        if _has_whole_shares(count) and inputs.is_contiguous():
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


def wrap_activations(model: nn.Module) -> int:
    """Wrap every activation function of transformers that has no parameters. Returns the number of wrapped ones."""
    wrapped = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            elementwise = (isinstance(child, _CLASSES) or type(child).__name__ in _OTHER_ACTIVATIONS) and not list(
                child.parameters()
            )
            if elementwise and not isinstance(parent, BatchInvariantActivation):
                setattr(parent, name, BatchInvariantActivation(child))
                wrapped += 1
    return wrapped


class BatchInvariantGates(TorchFunctionMode):
    """Within this context, `torch.sigmoid` and `softplus`, which some attention calls, take whole vectors."""

    def __init__(self) -> None:
        super().__init__()
        self._functions = {
            torch.sigmoid: BatchInvariantActivation(nn.Sigmoid()),
            softplus: BatchInvariantActivation(nn.Softplus()),
        }

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        own = self._functions.get(func) if len(args) == 1 and not kwargs else None
        return func(*args, **(kwargs or {})) if own is None else own(*args)

    @staticmethod
    def wanted_by(model: nn.Module) -> bool:
        """Whether attention multiplies its output by a gate."""
        return any(_has_gate(module) for module in model.modules())


def _has_gate(module: nn.Module) -> bool:
    """Whether a gate comes with the queries (Qwen3-Next, Qwen3.5) or by a layer of its own (AFMoE, Laguna, LFM3)."""
    queries, out = getattr(module, "q_proj", None), getattr(module, "o_proj", None)
    if queries is None or out is None:
        return False
    doubled = getattr(queries, "out_features", 0) == 2 * getattr(out, "in_features", -1)
    return doubled or any(getattr(module, name, None) is not None for name in ("g_proj", "gate_proj"))


class ComplexRotation(Tensor):
    """Rotations as complex numbers, by which queries and keys are multiplied (DeepSeek V2, Llama 4).

    torch rounds a complex product differently in what is left over of a vector; products and sums of real numbers are
    the same everywhere.
    """

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (torch.mul, Tensor.mul, Tensor.__mul__):
            with torch._C.DisableTorchFunctionSubclass():
                real, imaginary = torch.view_as_real(args[0]).unbind(-1)
                cos, sin = torch.view_as_real(args[1].as_subclass(Tensor)).unbind(-1)
                return torch.complex(real * cos - imaginary * sin, real * sin + imaginary * cos)
        plain: Callable[..., Any] = super().__torch_function__  # untyped
        return plain(func, types, args, kwargs or {})


def wrap_rotations(model: nn.Module) -> int:
    """Have rotary embeddings give a `ComplexRotation` where they give complex numbers. Returns how many there are."""
    found = [module for name, module in model.named_modules() if name.rpartition(".")[2] == "rotary_emb"]
    for module in found:
        module.register_forward_hook(_as_rotation)
    return len(found)


def _as_rotation(_module: nn.Module, _inputs: object, out: object) -> Tensor | None:
    return out.as_subclass(ComplexRotation) if isinstance(out, Tensor) and out.is_complex() else None
