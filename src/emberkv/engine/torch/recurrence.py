"""A model's layers with a state of fixed size, over the blocks of the pool: LFM2's short convolutions, Mamba-2's mixers
and gated delta nets. They take the place of the model's own, whose products they keep.

The recurrences of the latter two are computed token by token in torch. With a matrix a head as state, ``S [depth,
width]``, key and query ``[depth]``, value ``[width]`` and a decay ``g`` between 0 and 1, a token of Mamba-2 computes
``S = g S + key value^T`` and one of a gated delta net ``S = g S + key (b (value - (g S)^T key))^T``; its output is
``S^T query``. Chunked forms of these sum in an order that depends on where the chunks begin; this one is the same
however a prompt is cut.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm

from emberkv.engine.torch.attention.kv_pool import KVPool
from emberkv.engine.torch.attention.paged_attention import Run, place_attention
from emberkv.engine.torch.layers import BatchInvariantActivation
from emberkv.engine.torch.model.state_layers import StateGeometry, is_mamba2, is_short_convolution, state_of
from emberkv.engine.torch.state_step import current_state_step

_NORM_EPSILON = 1e-6  # of a delta net's keys and queries


@dataclass(frozen=True, slots=True)
class UpdateRule:
    """What kinds of recurrence differ in.

    delta: whether it is a gated delta net's. key_heads: of keys and queries, each for an equal number of heads.
    least_step, most_step: bounds of Mamba-2's steps. beta_factor: of a delta net's ``b``.
    norm_size: outputs that are normalised together; 0: none are. gated_first: the gate comes before the norm.
    """

    delta: bool
    key_heads: int
    least_step: float = 0.0
    most_step: float = float("inf")
    beta_factor: float = 1.0
    norm_size: int = 0
    epsilon: float = 0.0
    gated_first: bool = True


class _Exp(nn.Module):
    def forward(self, inputs: Tensor) -> Tensor:
        return inputs.exp()


class Recurrence(nn.Module):
    """A convolution, the recurrence over what it gives, and a gated norm. All is computed in fp32.

    taps ``[columns + 1, channels]``, bias ``[channels]``; log_decay, step_bias and, in Mamba-2, skip ``[heads]``; scale
    of the norm ``[heads * width]``.
    """

    taps: Tensor
    bias: Tensor | None
    log_decay: Tensor
    step_bias: Tensor
    skip: Tensor | None
    scale: Tensor | None

    def __init__(
        self,
        state: StateGeometry,
        rule: UpdateRule,
        conv: nn.Conv1d,
        *,
        log_decay: Tensor,
        step_bias: Tensor,
        skip: Tensor | None,
        scale: Tensor | None,
    ) -> None:
        super().__init__()
        self.state, self.rule = state, rule
        taps = conv.weight.detach().squeeze(1).t()
        parameters = {"taps": taps, "bias": conv.bias, "log_decay": log_decay, "step_bias": step_bias, "skip": skip}
        for name, tensor in (parameters | {"scale": scale}).items():
            self.register_buffer(name, None if tensor is None else tensor.detach().float().contiguous())
        self._silu, self._exp = BatchInvariantActivation(nn.SiLU()), BatchInvariantActivation(_Exp())
        self._softplus, self._sigmoid = BatchInvariantActivation(nn.Softplus()), BatchInvariantActivation(nn.Sigmoid())

    def forward(self, mixed: Tensor, gate: Tensor, steps: Tensor, betas: Tensor | None) -> Tensor:
        """``[rows, heads * width]``, zero for padding.

        mixed: ``[rows, channels]``; Mamba-2's are values, keys, queries, and a delta net's queries, keys, values. gate:
        ``[rows, heads * width]``. steps, and a delta net's betas: ``[rows, heads]``.
        """
        state, rule = self.state, self.rule
        step = current_state_step()
        convolved = step.convolution(state.columns).convolve(state.layer, mixed, self.taps, self.bias)
        queries, keys, values = self._parts(self._silu(convolved.float()))
        widths = self._softplus(steps.float() + self.step_bias).clamp(rule.least_step, rule.most_step)
        decays = self._exp(-self._exp(self.log_decay) * widths)
        if rule.delta:
            assert betas is not None
            factors = self._sigmoid(betas.float()) * rule.beta_factor
            queries = _unit(queries) * state.depth**-0.5
            keys = _unit(keys)
        else:
            factors = widths
        out = torch.zeros_like(values)
        first = 0
        for run in step.runs:
            rows = slice(first, first + run.count)
            out[rows] = self._run(run, queries[rows], keys[rows], values[rows], decays[rows], factors[rows])
            first += run.count
        if self.skip is not None:
            out[:first] += self.skip.unsqueeze(-1) * values[:first]
        return self._gated(out.flatten(1), gate.float()).to(mixed.dtype)

    def _parts(self, mixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys ``[rows, heads, depth]``, values ``[rows, heads, width]``."""
        state, rule = self.state, self.rule
        keys, values = rule.key_heads * state.depth, state.heads * state.width
        if rule.delta:
            query, key, value = torch.split(mixed, [keys, keys, values], dim=-1)
        else:
            value, key, query = torch.split(mixed, [values, keys, keys], dim=-1)
        each = state.heads // rule.key_heads
        rows = len(mixed)
        by_head = [part.reshape(rows, rule.key_heads, -1).repeat_interleave(each, dim=1) for part in (query, key)]
        return by_head[0], by_head[1], value.reshape(rows, state.heads, -1)

    def _run(self, run: Run, queries: Tensor, keys: Tensor, values: Tensor, decays: Tensor, factors: Tensor) -> Tensor:
        pool = current_state_step().pool
        states, size = pool.matrices[self.state.layer], pool.block_size
        before = run.block_ids[max(0, run.start - 1) // size]
        matrix = states[before].clone() if run.start else torch.zeros_like(states[before])
        out = torch.empty_like(values)
        for row, position in enumerate(range(run.start, run.stop)):
            matrix = matrix * decays[row, :, None, None]
            key, value = keys[row].unsqueeze(-1), values[row]
            if self.rule.delta:
                value = value - (matrix * key).sum(1)
            matrix = matrix + key * (value * factors[row].unsqueeze(-1)).unsqueeze(1)
            out[row] = (matrix * queries[row].unsqueeze(-1)).sum(1)
            if (position + 1) % size == 0 or position + 1 == run.stop:
                states[run.block_ids[position // size]] = matrix
        return out

    def _gated(self, out: Tensor, gate: Tensor) -> Tensor:
        gate = self._silu(gate)
        if self.rule.gated_first:
            out = out * gate
        if self.scale is not None:
            size = self.rule.norm_size
            out = rms_norm(out.view(out.shape[0], -1, size), (size,), None, self.rule.epsilon).flatten(1) * self.scale
        return out if self.rule.gated_first else out * gate


def _unit(vectors: Tensor) -> Tensor:
    return vectors * (vectors.square().sum(-1, keepdim=True) + _NORM_EPSILON).rsqrt()


class ShortConvolution(nn.Module):
    """A short convolution of a model, over the blocks of the pool."""

    taps: Tensor
    bias: Tensor | None

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = int(layer.layer_idx)
        self.in_proj, self.out_proj = layer.in_proj, layer.out_proj
        conv: nn.Conv1d = layer.conv
        self.register_buffer("taps", conv.weight.detach().squeeze(1).t().float().contiguous())
        self.register_buffer("bias", None if conv.bias is None else conv.bias.detach().float())

    def forward(self, hidden_states: Tensor, **_: object) -> Tensor:
        """hidden_states: ``[1, rows, channels]``."""
        scale, gate, inputs = self.in_proj(hidden_states).chunk(3, dim=-1)
        step = current_state_step().convolution(self.taps.shape[0] - 1)
        convolved = step.convolve(self.layer, (scale * inputs)[0], self.taps, self.bias)
        out: Tensor = self.out_proj(gate * convolved)
        return out


class Mamba2Mixer(nn.Module):
    """Mamba-2's mixer of a model, over the blocks of the pool.

    Falcon-H1's multiplies its inputs and what it computes of them by constants, and may go without a norm.
    """

    multipliers: Tensor | None

    def __init__(self, layer: Any, state: StateGeometry) -> None:
        super().__init__()
        self.in_proj, self.out_proj = layer.in_proj, layer.out_proj
        inner = state.heads * state.width
        self._parts = [inner, state.channels, state.heads]
        self._input_multiplier = getattr(layer, "ssm_in_multiplier", None)
        vector = getattr(layer, "mup_vector", None)
        self.register_buffer(
            "multipliers", None if vector is None else vector.detach().to(layer.conv1d.weight.dtype, copy=True)
        )
        normed = not isinstance(layer.norm, nn.Identity)
        least, most = layer.time_step_limit
        rule = UpdateRule(
            delta=False,
            key_heads=layer.n_groups,
            least_step=float(least),
            most_step=float(most),
            norm_size=inner // layer.n_groups if normed else 0,
            epsilon=float(layer.norm.variance_epsilon) if normed else 0.0,
            gated_first=not getattr(layer.norm, "norm_before_gate", False),
        )
        self.recurrence = Recurrence(
            state,
            rule,
            layer.conv1d,
            log_decay=layer.A_log,
            step_bias=layer.dt_bias,
            skip=layer.D,
            scale=layer.norm.weight if normed else None,
        )

    def forward(self, hidden_states: Tensor, **_: object) -> Tensor:
        """hidden_states: ``[1, rows, channels]``."""
        if self._input_multiplier is not None:
            hidden_states = hidden_states * self._input_multiplier
        projected = self.in_proj(hidden_states)
        if self.multipliers is not None:
            projected = projected * self.multipliers
        gate, mixed, steps = projected[0].split(self._parts, dim=-1)
        out: Tensor = self.out_proj(self.recurrence(mixed, gate, steps, None).unsqueeze(0))
        return out


class GatedDeltaNet(nn.Module):
    """A gated delta net of a model, over the blocks of the pool."""

    def __init__(self, layer: Any, state: StateGeometry) -> None:
        super().__init__()
        named: dict[str, Any] = dict(layer.named_children())
        norm, self.out_proj = (
            (named["norm"], named["out_proj"]) if "norm" in named else (named["o_norm"], named["o_proj"])
        )
        self.products = nn.ModuleDict(
            {name: child for name, child in named.items() if "proj" in name and child is not self.out_proj}
        )
        self._key_heads = layer.num_k_heads
        self._state = state
        rule = UpdateRule(
            delta=True,
            key_heads=layer.num_k_heads,
            beta_factor=2.0 if getattr(layer, "allow_neg_eigval", False) else 1.0,
            norm_size=state.width,
            epsilon=float(norm.variance_epsilon),
            gated_first=False,
        )
        self.recurrence = Recurrence(
            state,
            rule,
            layer.conv1d,
            log_decay=layer.A_log,
            step_bias=layer.dt_bias,
            skip=None,
            scale=norm.weight.repeat(state.heads),
        )

    def forward(self, hidden_states: Tensor, **_: object) -> Tensor:
        """hidden_states: ``[1, rows, channels]``."""
        out: Tensor = self.out_proj(self.recurrence(*self._products(hidden_states[0])).unsqueeze(0))
        return out

    def _products(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What the recurrence takes: ``mixed, gate, steps, betas``."""
        by_name: dict[str, Tensor] = {name: product(rows) for name, product in self.products.items()}
        match sorted(by_name):
            case ["in_proj_ba", "in_proj_qkvz"]:
                return self._by_key_head(by_name["in_proj_qkvz"], by_name["in_proj_ba"])
            case ["in_proj_a", "in_proj_b", "in_proj_qkv", "in_proj_z"]:
                mixed, gate = by_name["in_proj_qkv"], by_name["in_proj_z"]
                return mixed, gate, by_name["in_proj_a"], by_name["in_proj_b"]
        mixed = torch.cat([by_name[name] for name in ("q_proj", "k_proj", "v_proj")], dim=-1)
        return mixed, by_name["g_proj"], by_name["a_proj"], by_name["b_proj"]

    def _by_key_head(self, mixed: Tensor, small: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of products whose parts lie together by key head, as Qwen3-Next's do."""
        each, state = self._state.heads // self._key_heads, self._state
        parts = [state.depth, state.depth, each * state.width, each * state.width]
        query, key, value, gate = torch.split(mixed.view(len(mixed), self._key_heads, -1), parts, dim=-1)
        betas, steps = torch.split(small.view(len(small), self._key_heads, -1), [each, each], dim=-1)
        together = torch.cat([part.flatten(1) for part in (query, key, value)], dim=-1)
        # With one value head for each key head, the last two are views whose values lie apart.
        return together, gate.flatten(1), steps.flatten(1).contiguous(), betas.flatten(1).contiguous()


class GatedFeedForward(nn.Module):
    """``down(silu(gate(x)) * up(x))``, by the names under which the kernels look for the parts."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = layer.w1, layer.w3, layer.w2
        self.act_fn = nn.SiLU()

    def forward(self, inputs: Tensor) -> Tensor:
        out: Tensor = self.down_proj(self.act_fn(self.gate_proj(inputs)) * self.up_proj(inputs))
        return out


def use_recurrent_state(model: nn.Module, pool: KVPool) -> int:
    """Put layers that keep their state in the pool in the place of a model's own. Returns the number of such layers."""
    if not pool.geometry.states:
        return 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            ours = _over_blocks(child)
            if ours is not None:
                setattr(parent, name, ours)
    place_attention(model, list(pool.geometry.attention_layers))
    return len(pool.geometry.states)


def _over_blocks(module: nn.Module) -> nn.Module | None:
    state = state_of(module)
    if state is None:
        return GatedFeedForward(module) if type(module).__name__ in _FEED_FORWARDS else None
    if is_short_convolution(module):
        return ShortConvolution(module)
    return Mamba2Mixer(module, state) if is_mamba2(module) else GatedDeltaNet(module, state)


_FEED_FORWARDS = ("Lfm2MLP", "Lfm2MoeMLP")
"""Classes that call the activation as a function, not as a module that can be replaced."""
