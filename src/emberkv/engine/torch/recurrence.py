"""Linear recurrences with a matrix a head as their state (Mamba-2, gated delta nets), token by token in torch.

With a state ``S [depth, width]``, key and query ``[depth]``, value ``[width]`` and a decay ``g`` between 0 and 1, a
token of Mamba-2 computes ``S = g S + key value^T`` and one of a gated delta net ``S = g S + key (b (value - (g S)^T
key))^T``; its output is ``S^T query``. Chunked forms of these sum in an order that depends on where the chunks begin;
this one is the same however a prompt is cut.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm

from emberkv.engine.torch.attention.paged_attention import Run
from emberkv.engine.torch.layers import BatchInvariantActivation
from emberkv.engine.torch.model.state_layers import StateGeometry
from emberkv.engine.torch.state_step import current_state_step

_NORM_EPSILON = 1e-6  # of a delta net's keys and queries


@dataclass(frozen=True, slots=True)
class Rule:
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
        rule: Rule,
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
        given = {"taps": taps, "bias": conv.bias, "log_decay": log_decay, "step_bias": step_bias, "skip": skip}
        for name, tensor in (given | {"scale": scale}).items():
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
