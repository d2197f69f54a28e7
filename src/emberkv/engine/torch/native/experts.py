"""Mixtures of experts computed by the compiled kernels, in which no row influences another one's bits.

A router gives each row its few experts and their weights, and the row's outputs are added up in that order.
"""

import copy
import inspect
from collections.abc import Callable
from math import gcd
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad
from transformers.pytorch_utils import Conv1D

from emberkv.engine.torch.attention.paged_attention import active_rows
from emberkv.engine.torch.layers import (
    ALONE,
    EXPERT_WEIGHTS,
    VECTOR,
    BatchInvariantActivation,
    is_experts,
    stand_in,
)
from emberkv.engine.torch.native.kernels import ExpertsCall, Kernels, LinearCall, type_number
from emberkv.engine.torch.native.layers import ACTIVATIONS, LOOSE, NativeGatedPair, NativeLinear, Weight, alike, takes
from emberkv.engine.torch.quantization.layers import QuantizedExperts

_CLAMPED_SWIGLU = 3
"""Its number in linear.cpp."""

_EXPERT_BIASES = ("expert_bias", "e_score_correction_bias")
"""How routers name the values by expert that they add to scores before they choose."""

_COMPARED = 8
"""Experts of a mixture that are compared with its own code, which dequantises each one anew."""


class NativeExperts(nn.Module):
    """Frozen experts, of each of which ``down(activation(gate(x)) * up(x))`` is computed.

    pairs, downs: of each expert, gate and up, and down; all of the same shape.
    """

    def __init__(self, kernels: Kernels, pairs: list[NativeGatedPair], downs: list[NativeLinear]) -> None:
        super().__init__()
        self.size, self.inner = pairs[0].in_features, pairs[0].out_features
        # Not registered as modules: there may be thousands, and none of them is called by itself.
        self.layers = pairs, downs
        self._kernels = kernels
        self._first, self._second = ((LinearCall * len(some))(*(each.call for each in some)) for some in self.layers)
        self._call = ExpertsCall(
            first=self._first, second=self._second, experts=len(pairs), size=self.size, inner=self.inner,
            threads=torch.get_num_threads(),
        )  # fmt: skip

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """``[rows, size]`` of such, with ``[rows, top_k]`` experts and weights. Rows that are not wanted are zeros."""
        left = active_rows()
        if left is None or left.of != hidden_states.shape[0]:
            return self._product(hidden_states, top_k_index, top_k_weights)
        out = hidden_states.new_zeros(left.of, self.size)
        some = (each[left.index] for each in (hidden_states, top_k_index, top_k_weights))
        out[left.index] = self._product(*some)
        return out

    def _product(self, rows: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        call = self._call
        rows, chosen, weights = rows.contiguous(), chosen.long().contiguous(), weights.float().contiguous()
        out = torch.empty_like(rows)
        call.inputs, call.chosen, call.weights, call.out = (each.data_ptr() for each in (rows, chosen, weights, out))
        call.input_row, call.rows, call.top_k, call.type = self.size, rows.shape[0], chosen.shape[1], type_number(rows)
        self._kernels.experts(call)
        return out


class RowwiseWeight(Tensor):
    """Stands in for a weight that a module's own code hands to `torch.nn.functional.linear`.

    The kernels compute that product, each row by itself. A conversion to fp32, as some routers make it, keeps that.
    """

    layers: dict[torch.dtype, NativeLinear]

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is linear and isinstance(args[1], cls):
            inputs, weight = args[:2]
            return weight.layers[inputs.dtype](inputs)
        plain: Callable[..., Any] = super().__torch_function__  # untyped
        result = plain(func, types, args, kwargs or {})
        if isinstance(result, cls) and isinstance(args[0], cls):
            result.layers = args[0].layers
        return result


class NativeRouter(nn.Module):
    """A module that gives each row its experts, with its product by the kernels.

    Its elementwise functions are called on whole vectors by one thread: what is left over of a vector at the end of a
    thread's share is rounded differently, and where that is depends on the number of rows.
    """

    def __init__(self, kernels: Kernels, router: nn.Module, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        experts, self.size = weight.shape
        self.router = copy.copy(router)
        self.router._parameters = {name: each for name, each in router._parameters.items() if each is not weight}
        stands = stand_in(weight).as_subclass(RowwiseWeight)
        stands.layers = {dtype: _linear(kernels, weight, bias, dtype) for dtype in {weight.dtype, torch.float32}}
        self.router.__dict__["weight"] = stands
        self._multiple = VECTOR // gcd(VECTOR, experts)
        self._most = max(self._multiple, ALONE // experts // self._multiple * self._multiple)

    def forward(self, hidden_states: Tensor, expert_bias: Tensor | None = None) -> tuple[Tensor, ...]:
        """expert_bias: of mixtures whose layers give it to the router (LFM2, Hunyuan 3)."""
        rows = hidden_states.reshape(-1, self.size)
        others = () if expert_bias is None else (expert_bias,)
        count = rows.shape[0]
        missing = -count % self._multiple
        if not missing and count <= self._most:
            whole: tuple[Tensor, ...] = self.router(rows, *others)
            return whole
        parts = [self.router(part, *others) for part in torch.split(pad(rows, (0, 0, 0, missing)), self._most)]
        return tuple(torch.cat(each)[:count] for each in zip(*parts, strict=True))


class GatedSharedExpert(nn.Module):
    """A mixture in which one expert takes every row, weighted by a sigmoid, computed batch-invariantly (Qwen2-MoE).

    block: of which the parts are taken over.
    """

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.gate, self.experts = block.gate, block.experts
        self.shared_expert, self.shared_expert_gate = block.shared_expert, block.shared_expert_gate
        self._sigmoid = BatchInvariantActivation(nn.Sigmoid())

    def forward(self, hidden_states: Tensor) -> Tensor:
        rows = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, weights, chosen = self.gate(rows)
        shared = self._sigmoid(self.shared_expert_gate(rows)) * self.shared_expert(rows)
        out: Tensor = self.experts(rows, chosen, weights) + shared
        return out.view(hidden_states.shape)


class ScaledInputs(nn.Module):
    """A mixture whose router's scores multiply what goes into its experts, beside one that takes every row (Llama 4).

    block: of which router and shared expert are taken over. experts: the block's own ones.
    """

    def __init__(self, block: Any, experts: NativeExperts) -> None:
        super().__init__()
        self.router, self.shared_expert, self.experts = block.router, block.shared_expert, experts
        self.top_k = int(block.top_k)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """``[rows, size]``, and the router's logits ``[rows, experts]``."""
        rows = hidden_states.reshape(-1, hidden_states.shape[-1])
        scores, logits = self.router(rows)  # 0 for each expert that is not chosen
        out: Tensor = self.shared_expert(rows)
        best, chosen = scores.topk(self.top_k, dim=-1)
        for score, expert in zip(best.split(1, dim=-1), chosen.split(1, dim=-1), strict=True):
            out = out + self.experts(rows * score, expert, torch.ones_like(score))
        return out, logits


def _linear(kernels: Kernels, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> NativeLinear:
    return NativeLinear(kernels, weight.to(dtype), None if bias is None else bias.to(dtype))


@torch.inference_mode()
def replace_experts(model: nn.Module, kernels: Kernels) -> int:
    """Put the kernels in the place of experts and routers that they can compute. Returns the number replaced.

    Both are known by their parts, and by giving the same on random rows.
    """
    replaced = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            block = _gated_shared_expert(child) or _scaled_inputs(child, kernels)
            if block is not None:
                setattr(parent, name, block)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            native = _experts(child, kernels) or _router(child, kernels)
            if native is not None:
                setattr(parent, name, native)
                replaced += 1
    return replaced


def _gated_shared_expert(module: Any) -> GatedSharedExpert | None:
    parts = ("gate", "experts", "shared_expert", "shared_expert_gate")
    if not all(isinstance(getattr(module, name, None), nn.Module) for name in parts):
        return None
    ours, gate = GatedSharedExpert(module), module.shared_expert_gate.weight
    same = alike(ours, lambda rows: module(rows.unsqueeze(0)).squeeze(0), gate.shape[1], gate.dtype)
    return ours if same else None


def _scaled_inputs(module: Any, kernels: Kernels) -> ScaledInputs | None:
    parts = ("router", "experts", "shared_expert")
    if not all(isinstance(getattr(module, name, None), nn.Module) for name in parts) or not hasattr(module, "top_k"):
        return None
    weights, activation = _stacked(module.experts), getattr(module.experts, "act_fn", None)
    if weights is None or activation is None:
        return None

    def apply_gate(both: Tensor) -> Tensor:
        gate, up = both.chunk(2, dim=-1)
        out: Tensor = up * activation(gate)
        return out

    layout = SimpleNamespace(has_bias=False, is_transposed=True, is_concatenated=True, _apply_gate=apply_gate)
    experts = _native_experts(layout, *weights, kernels)
    if experts is None:
        return None
    ours = ScaledInputs(module, experts)
    same = alike(lambda rows: ours(rows)[0], lambda rows: module(rows)[0], experts.size, weights[0].dtype)
    return ours if same else None


def _experts(module: Any, kernels: Kernels) -> NativeExperts | None:
    weights = _stacked(module)
    if weights is None or not is_experts(module) or not module.has_gate:
        return None
    native = _native_experts(module, *weights, kernels)
    if native is None:
        return None
    # A clamped activation leaves of large inputs only what is small, and the rounding of inputs shows in it.
    tolerance = LOOSE if isinstance(weights[0], QuantizedExperts) else None
    return native if _same_experts(native, module, weights[0].shape[0], weights[0].dtype, tolerance) else None


_Stack = Tensor | QuantizedExperts
"""The weights of all experts, ``[experts, ...]``."""


def _stacked(module: nn.Module) -> tuple[_Stack, _Stack] | None:
    """All experts' weights to gate and up, and down; None where a module has none."""
    gate_up, down = (getattr(module, name, None) for name in EXPERT_WEIGHTS)
    if not (isinstance(gate_up, Tensor | QuantizedExperts) and isinstance(down, Tensor | QuantizedExperts)):
        return None
    return (gate_up, down) if len(gate_up.shape) == len(down.shape) == 3 else None


def _of_expert(stack: _Stack, number: int, *, transposed: bool) -> Weight:
    """``[out, in]``"""
    if isinstance(stack, QuantizedExperts):
        return stack.quantized[number]
    return stack[number].t() if transposed else stack[number]


def _native_experts(module: Any, gate_up: _Stack, down: _Stack, kernels: Kernels) -> NativeExperts | None:
    """module: says how the weights are laid out; see `is_experts`."""
    activation = _activation(module)
    if activation is None:
        return None
    pairs, downs = [], []
    for expert in range(gate_up.shape[0]):
        both, back = (_of_expert(stack, expert, transposed=module.is_transposed) for stack in (gate_up, down))
        gate, up = _split(module, both)
        if not (takes(gate) and takes(back)):
            return None
        biases = _halves(module, module.gate_up_proj_bias[expert]) if module.has_bias else None
        pairs.append(NativeGatedPair(kernels, gate, up, activation, biases))
        if activation == _CLAMPED_SWIGLU:
            pairs[-1].call.slope, pairs[-1].call.limit = module.alpha, module.limit
        downs.append(
            NativeLinear(kernels, back, module.down_proj_bias[expert] if module.has_bias else None, down.dtype)
        )
    return NativeExperts(kernels, pairs, downs)


def _split(module: Any, both: Weight) -> tuple[Weight, Weight]:
    """Gate and up, by their outputs: one after the other, or in turns."""
    if isinstance(both, Tensor):
        gate, up = _halves(module, both)
        return gate.contiguous(), up.contiguous()
    size = both.out_features
    if module.is_concatenated:
        return both.rows(0, size // 2), both.rows(size // 2, size)
    return both.rows(0, size, 2), both.rows(1, size, 2)


def _halves(module: Any, both: Tensor) -> tuple[Tensor, Tensor]:
    if module.is_concatenated:
        gate, up = both.chunk(2)
        return gate, up
    return both[::2], both[1::2]


def _activation(module: Any) -> int | None:
    """The number in linear.cpp of what the module does to gate and up; None for what the kernels do not compute."""
    points = torch.linspace(-9, 9, 49)
    gate, up = (each.reshape(-1) for each in torch.meshgrid(points, points, indexing="ij"))
    both = torch.cat([gate, up]) if module.is_concatenated else torch.stack([gate, up], dim=-1).reshape(-1)
    known = {number: each(gate) * up for number, each in ACTIVATIONS.items()}
    if hasattr(module, "alpha") and hasattr(module, "limit"):
        clamped = gate.clamp(max=module.limit)
        swish = clamped * torch.sigmoid(module.alpha * clamped)
        known[_CLAMPED_SWIGLU] = swish * (up.clamp(-module.limit, module.limit) + 1)
    expected = module._apply_gate(both)
    return next((number for number, each in known.items() if torch.allclose(expected, each, atol=1e-4)), None)


def _same_experts(
    ours: NativeExperts, theirs: nn.Module, experts: int, dtype: torch.dtype, tolerance: float | None
) -> bool:
    some = min(_COMPARED, experts)
    top_k = min(2, some)
    generator = torch.Generator().manual_seed(1)
    chosen = torch.stack([torch.randperm(some, generator=generator)[:top_k] for _ in range(32)])
    weights = torch.rand(32, top_k, generator=generator).to(dtype)
    return alike(
        lambda rows: ours(rows, chosen, weights),
        lambda rows: theirs(rows, chosen, weights),
        ours.size,
        dtype,
        tolerance=tolerance,
    )


def _router(module: Any, kernels: Kernels) -> NativeRouter | None:
    weight, bias = (module._parameters.get(name) for name in ("weight", "bias"))
    kind = type(module)
    if not (kind.__name__.endswith(("Router", "Gate")) and kind not in (nn.Linear, Conv1D)):
        return None
    others = list(inspect.signature(module.forward).parameters)[1:]
    if others not in ([], *([name] for name in _EXPERT_BIASES)):
        return None
    if weight is None or weight.ndim != 2 or not takes(weight):
        return None
    native = NativeRouter(kernels, module, weight, bias)
    given = [torch.linspace(-0.5, 0.5, weight.shape[0])] if others else []
    return native if _same_router(native, module, weight, given) else None


def _same_router(ours: NativeRouter, theirs: nn.Module, weight: Tensor, given: list[Tensor]) -> bool:
    """Whether both give random rows, and what is ``given`` beside them, the same experts with about the same weights,
    where the choice is clear.
    """
    rows = torch.randn(64, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight.dtype)
    expected, got = theirs(rows, *given), ours(rows, *given)
    if not isinstance(expected, tuple) or [each.shape for each in got] != [each.shape for each in expected]:
        return False
    same = [_same_rows(*each) for each in zip(got, expected, strict=True)]
    return bool(torch.stack(same).all(dim=0).float().mean() > 0.8)


def _same_rows(ours: Tensor, theirs: Tensor) -> Tensor:
    """Of each row, whether it is the same: up to rounding, unless it holds experts."""
    if not theirs.is_floating_point():
        return (ours == theirs).all(dim=-1)
    return torch.isclose(ours.float(), theirs.float(), rtol=3e-2, atol=3e-2).all(dim=-1)
