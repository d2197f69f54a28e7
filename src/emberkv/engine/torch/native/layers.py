"""A model's linear layers, gated pairs of them, RMS norms and latent projections, computed by the compiled kernels."""

import copy
import ctypes
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, silu

from emberkv.engine.torch.attention.paged_attention import active_rows
from emberkv.engine.torch.layers import linear_parts, stand_in
from emberkv.engine.torch.model.latent import TorchLatentProjection
from emberkv.engine.torch.native.kernels import TYPES, Kernels, LinearCall, NormCall, type_number
from emberkv.engine.torch.quantization.layers import QuantizedLinear
from emberkv.engine.torch.quantization.packing import pack
from emberkv.engine.torch.quantization.weight import QuantizedWeight, kernel_group

Weight = Tensor | QuantizedWeight

_LARGE_PAGE = 2 << 20
_MADV_HUGEPAGE, _MADV_COLLAPSE = 14, 25  # of Linux: for pages that are touched from now on, and for those that were

ACTIVATIONS: dict[int, Callable[[Tensor], Tensor]] = {1: silu, 2: partial(gelu, approximate="tanh")}
"""By their number in linear.cpp."""


class NativeLinear(nn.Module):
    """A frozen linear layer. weight: ``[out_features, in_features]``; the plain copy is not kept.

    dtype: of inputs and outputs, where the weight is quantised; else it is the weight's.
    """

    def __init__(self, kernels: Kernels, weight: Weight, bias: Tensor | None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight = _shape_of(weight, dtype)
        self.packed = in_large_pages(_packed(weight, kernels.columns))
        self.bias = None if bias is None else _padded(bias.detach().float(), kernels.columns)
        self._kernels = kernels
        self.call = _call(self, weight)
        if self.bias is not None:
            self.call.bias = self.bias.data_ptr()

    def forward(self, inputs: Tensor) -> Tensor:
        return _compute(self._kernels, self.call, self.packed, inputs)


class NativeGatedPair(nn.Module):
    """Two frozen linear layers of the same shape, as ``activation(gate(x)) * up(x)``.

    activation: its number in linear.cpp. biases: of both, or None.
    """

    def __init__(
        self,
        kernels: Kernels,
        gate: Weight,
        up: Weight,
        activation: int,
        biases: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = gate.shape
        self.packed = in_large_pages(torch.stack([_packed(gate, kernels.columns), _packed(up, kernels.columns)], dim=1))
        self._kernels = kernels
        self.call = _call(self, gate)
        self.call.activation = activation
        self.bias = None if biases is None else _side_by_side(biases, kernels.columns)
        if self.bias is not None:
            self.call.bias = self.bias.data_ptr()

    def forward(self, inputs: Tensor) -> Tensor:
        return _compute(self._kernels, self.call, self.packed, inputs)


class NativeRMSNorm(nn.Module):
    """scale: fp32 ``[size]``, what each normalized value is multiplied by."""

    def __init__(self, kernels: Kernels, scale: Tensor, epsilon: float) -> None:
        super().__init__()
        self.scale = scale.contiguous()
        self._kernels = kernels
        self.call = NormCall(
            scale=self.scale.data_ptr(), size=scale.numel(), epsilon=epsilon, threads=torch.get_num_threads()
        )

    def forward(self, inputs: Tensor) -> Tensor:
        call = self.call
        rows = inputs.reshape(-1, call.size).contiguous()
        out = torch.empty_like(rows)
        call.inputs, call.out, call.input_row = rows.data_ptr(), out.data_ptr(), call.size
        call.rows, call.type = rows.shape[0], type_number(rows)
        self._kernels.rms_norm(call)
        return out.view(inputs.shape)


class NativeLatentProjection(nn.Module):
    """The products of multi-head latent attention: a layer a head, all heads in one call. See `LatentProjection`."""

    def __init__(self, kernels: Kernels, plain: TorchLatentProjection) -> None:
        super().__init__()
        self.rank, self.nope = plain.rank, plain.nope
        to_keys = [NativeLinear(kernels, each.t(), None) for each in plain.to_keys]
        to_values = [NativeLinear(kernels, each, None) for each in plain.to_values]
        self._layers = to_keys, to_values  # not registered as modules: none of them is called by itself
        self._kernels = kernels
        self._to_keys, self._to_values = (
            (LinearCall * len(some))(*(each.call for each in some)) for some in self._layers
        )

    def queries(self, heads: Tensor) -> Tensor:
        return self._product(self._to_keys, heads)

    def outputs(self, latents: Tensor) -> Tensor:
        return self._product(self._to_values, latents[..., : self.rank].transpose(0, 1)).transpose(0, 1)

    def _product(self, calls: Any, inputs: Tensor) -> Tensor:
        """``[heads, tokens, inputs]``, whose last axis is dense, to ``[heads, tokens, outputs]``."""
        rows = inputs.shape[1]
        out = torch.empty(len(calls), rows, calls[0].out_features, dtype=inputs.dtype)
        kind, element = type_number(inputs), inputs.element_size()
        for head, call in enumerate(calls):
            call.inputs = inputs.data_ptr() + head * inputs.stride(0) * element
            call.out = out.data_ptr() + head * out.stride(0) * element
            call.input_row, call.rows, call.type = inputs.stride(1), rows, kind
        self._kernels.linears(calls)
        return out


def _call(layer: NativeLinear | NativeGatedPair, weight: Weight) -> LinearCall:
    call = LinearCall(
        weight=layer.packed.data_ptr(),
        in_features=layer.in_features,
        out_features=layer.out_features,
        threads=torch.get_num_threads(),
    )
    if isinstance(weight, QuantizedWeight):
        call.bits, call.group, call.offsets = weight.bits, kernel_group(weight.group), weight.offsets is not None
    return call


def _shape_of(weight: Weight, dtype: torch.dtype | None) -> Tensor:
    return stand_in(
        torch.empty((), dtype=dtype).expand(weight.shape) if isinstance(weight, QuantizedWeight) else weight
    )


def _compute(kernels: Kernels, call: LinearCall, weight: Tensor, inputs: Tensor) -> Tensor:
    """Of the rows that are left; zeros for others."""
    rows = inputs.reshape(-1, call.in_features)
    left = active_rows()
    if left is None or left.of != rows.shape[0]:
        out = _product(kernels, call, weight, rows.contiguous())
    else:
        out = rows.new_zeros(left.of, call.out_features)
        out[left.index] = _product(kernels, call, weight, rows[left.index])
    return out.view(*inputs.shape[:-1], call.out_features)


def _product(kernels: Kernels, call: LinearCall, weight: Tensor, rows: Tensor) -> Tensor:
    call.type = type_number(rows) if call.bits else type_number(rows, weight)
    out = torch.empty((rows.shape[0], call.out_features), dtype=rows.dtype)
    call.inputs, call.out, call.input_row, call.rows = rows.data_ptr(), out.data_ptr(), call.in_features, rows.shape[0]
    kernels.linear(call)
    return out


def _packed(weight: Weight, columns: int) -> Tensor:
    """``[groups, units, columns, values of a unit]``: side by side what is multiplied at the same time.

    Of a quantised one ``[groups, bytes]``, as in quantized.hpp.
    """
    if isinstance(weight, QuantizedWeight):
        return pack(weight, columns)
    values = 2 if weight.dtype is torch.bfloat16 else 1
    rows = _padded(weight.detach(), columns)
    return rows.view(-1, columns, rows.shape[1] // values, values).transpose(1, 2).contiguous()


def in_large_pages(weight: Tensor) -> Tensor:
    """The same tensor, whose memory the system is asked to hold in pages of 2 MiB, as far as it fills such pages.

    A decode step reads all weights once, and with pages of 4 KiB the processor translates an address for each of these.
    Systems that cannot do it leave the memory as it is.
    """
    advise = getattr(ctypes.CDLL(None), "madvise", None) if sys.platform == "linux" else None
    begin = -(-weight.data_ptr() // _LARGE_PAGE) * _LARGE_PAGE
    size = (weight.data_ptr() + weight.nbytes) // _LARGE_PAGE * _LARGE_PAGE - begin
    if advise is not None and size > 0:
        for advice in (_MADV_HUGEPAGE, _MADV_COLLAPSE):
            advise(ctypes.c_void_p(begin), ctypes.c_size_t(size), advice)
    return weight


def _side_by_side(biases: tuple[Tensor, Tensor], columns: int) -> Tensor:
    """``[groups, 2, columns]``, fp32."""
    return torch.stack([_padded(bias.detach().float(), columns).view(-1, columns) for bias in biases], dim=1)


def _padded(tensor: Tensor, multiple: int) -> Tensor:
    """Zeros added to the first axis, up to the next multiple."""
    missing = -tensor.shape[0] % multiple
    return torch.cat([tensor, tensor.new_zeros(missing, *tensor.shape[1:])]).contiguous()


@torch.inference_mode()
def replace_layers(model: nn.Module, kernels: Kernels) -> int:
    """Put the kernels in the place of every layer that they can compute. Returns the number of layers replaced.

    A layer is known by its parts, and by giving the same on random rows.
    """
    replaced = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            native = _gated(child, kernels) or _norm(child, kernels)
            if native is not None:
                setattr(parent, name, native)
                replaced += 1
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            parts = _weight_and_bias(child)
            if parts is not None and takes(parts[0]):
                dtype = child.dtype if isinstance(child, QuantizedLinear) else None
                setattr(parent, name, NativeLinear(kernels, *parts, dtype))
                replaced += 1
    return replaced


@torch.inference_mode()
def replace_latents(model: nn.Module, kernels: Kernels) -> int:
    """Put the kernels in the place of all projections from and to latents. Returns the number replaced."""
    replaced = 0
    for module in list(model.modules()):
        plain: Any = getattr(module, "latent", None)
        if isinstance(plain, TorchLatentProjection) and takes(plain.to_values) and plain.nope % 2 == 0:
            module.latent = NativeLatentProjection(kernels, plain)
            replaced += 1
    return replaced


def _weight_and_bias(module: object) -> tuple[Weight, Tensor | None] | None:
    """Of a linear layer, plain or quantised; None for anything else."""
    if isinstance(module, QuantizedLinear):
        return module.quantized, module.bias
    return linear_parts(module)


def takes(weight: Weight) -> bool:
    """Whether the kernels compute with such weights: quantised, fp32, or bf16 with an even number of inputs."""
    if isinstance(weight, QuantizedWeight):
        return True
    pairs = weight.dtype is torch.bfloat16 and weight.shape[-1] % 2 == 0
    return weight.dtype is torch.float32 or pairs


def _gated(module: Any, kernels: Kernels) -> nn.Module | None:
    """The module with its gate and its activation in one, if it is ``down(activation(gate(x)) * up(x))``."""
    down: Any = getattr(module, "down_proj", None)
    activation = getattr(module, "act_fn", getattr(module, "activation_fn", None))
    pair = _gate_and_up(module)
    if _weight_and_bias(down) is None or pair is None or activation is None:
        return None
    gate, up = pair
    if not (takes(gate) and _fit(gate, up)):
        return None
    points = torch.linspace(-9, 9, 97)
    same = [
        number for number, each in ACTIVATIONS.items() if torch.allclose(activation(points), each(points), atol=1e-5)
    ]
    if not same:
        return None
    native = nn.Sequential(NativeGatedPair(kernels, gate, up, same[0]), down)
    dtype = gate.dtype if isinstance(gate, Tensor) else down.weight.dtype
    return native if alike(native, module, gate.shape[1], dtype) else None


def _fit(gate: Weight, up: Weight) -> bool:
    """Whether they are of one shape and one form."""
    forms = [
        (each.bits, each.group, each.offsets is None) if isinstance(each, QuantizedWeight) else each.dtype
        for each in (gate, up)
    ]
    return gate.shape == up.shape and forms[0] == forms[1]


def _gate_and_up(module: Any) -> tuple[Weight, Weight] | None:
    both = _weight_without_bias(getattr(module, "gate_up_proj", None))
    if both is not None:
        half = both.shape[0] // 2
        if isinstance(both, QuantizedWeight):
            return both.rows(0, half), both.rows(half, 2 * half)
        return both[:half], both[half:]
    first = _weight_without_bias(getattr(module, "gate_proj", None))
    second = _weight_without_bias(getattr(module, "up_proj", None))
    return None if first is None or second is None else (first, second)


def _weight_without_bias(layer: Any) -> Weight | None:
    match _weight_and_bias(layer):
        case (weight, None):
            return weight
        case _:
            return None


def _norm(module: Any, kernels: Kernels) -> nn.Module | None:
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    weight = getattr(module, "weight", None)
    if "RMSNorm" not in type(module).__name__ or not isinstance(epsilon, float) or not isinstance(weight, nn.Parameter):
        return None
    if weight.ndim != 1 or weight.numel() % kernels.lanes or weight.dtype not in TYPES:
        return None
    # Gemma's weights are what is added to one. In bf16 that hardly shows where they are large.
    exact, size = copy.deepcopy(module).float(), weight.numel()
    tried = [NativeRMSNorm(kernels, weight.detach().float() + offset, epsilon) for offset in (0.0, 1.0)]
    same = (each for each in tried if alike(each, exact, size, torch.float32))
    found = next((native for native in same if alike(native, module, size, weight.dtype)), None)
    if found is not None:
        found.weight = stand_in(weight)  # Nemotron-H asks for its type
    return found


LOOSE = 3e-2
"""By how much, relative to its size, a result may differ whose values are rounded to bf16."""


def alike(
    ours: Callable[[Tensor], Tensor],
    theirs: Callable[[Tensor], Tensor],
    size: int,
    dtype: torch.dtype,
    *,
    tolerance: float | None = None,
) -> bool:
    """Whether both give the same, up to rounding, on ``[32, size]``.

    On rows of ordinary size and, as some layers clamp what is large, on large ones; by each column of the result."""
    if tolerance is None:
        tolerance = LOOSE if dtype is torch.bfloat16 else 1e-3
    rows = torch.randn(32, size, generator=torch.Generator().manual_seed(0)).to(dtype)
    for some in (rows, 1000 * rows):
        expected, got = theirs(some).float(), ours(some).float()
        if not bool(((got - expected).norm(dim=0) <= tolerance * expected.norm(dim=0)).all()):
            return False
    return True
