"""Linear recurrences of a model, computed by the compiled kernels."""

import torch
from torch import Tensor, nn

from emberkv.engine.torch.native.kernels import Kernels, RecurrenceCall, type_number
from emberkv.engine.torch.recurrence import Recurrence
from emberkv.engine.torch.state_step import current_state_step
from emberkv.errors import UnsupportedModelError

_PARAMETERS = ("taps", "bias", "log_decay", "step_bias", "skip", "scale")


class NativeRecurrence(nn.Module):
    """What `Recurrence` computes, with all of a row's bits depending on its own sequence alone."""

    def __init__(self, kernels: Kernels, plain: Recurrence) -> None:
        super().__init__()
        self._kernels = kernels
        self._state = plain.state
        self._inner = plain.state.heads * plain.state.width
        self._call = _prepared(plain)
        # No buffers, which may be moved, while the call has their addresses; and copies, which keep no file mapped.
        parameters = {name: tensor.clone() for name in _PARAMETERS if (tensor := getattr(plain, name)) is not None}
        self._kept = tuple(parameters.values())
        for name, tensor in parameters.items():
            setattr(self._call, name, tensor.data_ptr())

    def forward(self, mixed: Tensor, gate: Tensor, steps: Tensor, betas: Tensor | None) -> Tensor:
        """As `Recurrence.forward`. Raises UnsupportedModelError for types and strides that the kernels do not take."""
        step, state, call = current_state_step(), self._state, self._call
        runs, block_ids = step.arrays()
        rows = sum(run.count for run in step.runs)
        out = torch.empty((mixed.shape[0], self._inner), dtype=mixed.dtype)
        out[rows:] = 0
        scratch = [torch.empty((rows, size)) for size in (state.channels, 2 * state.heads, self._inner)]
        for name, tensor in {"mixed": mixed, "gate": gate, "steps": steps, "betas": betas}.items():
            if tensor is not None:
                if tensor.stride(1) != 1 and tensor.shape[1] != 1:
                    raise UnsupportedModelError(
                        f"the C++ kernels are given {name} whose values lie {tensor.stride(1)} apart, and take rows of "
                        "neighbouring values: serve with --kernels torch"
                    )
                setattr(call, name, tensor.data_ptr())
                setattr(call, f"{name}_row", tensor.stride(0))
        call.out, call.convolved, call.decays, call.results = out.data_ptr(), *(each.data_ptr() for each in scratch)
        convolved, matrices = step.pool.convolved[state.layer], step.pool.matrices[state.layer]
        call.type = type_number(mixed, gate, steps, convolved, *(() if betas is None else (betas,)))
        call.convolved_states, call.states = convolved.data_ptr(), matrices.data_ptr()
        call.block_bytes, call.block_size = step.pool.block_bytes, step.pool.block_size
        call.runs, call.num_runs, call.block_ids = runs.ctypes.data, len(runs), block_ids.ctypes.data
        call.rows = rows
        self._kernels.recurrence(call)
        return out


def replace_recurrences(model: nn.Module, kernels: Kernels) -> int:
    """Put the kernels in the place of every recurrence that they can compute. Returns the number of those replaced."""
    replaced = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Recurrence) and child.state.columns <= kernels.most_columns:
                setattr(parent, name, NativeRecurrence(kernels, child))
                replaced += 1
    return replaced


def _prepared(plain: Recurrence) -> RecurrenceCall:
    """All but what changes from pass to pass."""
    state, rule = plain.state, plain.rule
    keys = rule.key_heads * state.depth
    places = (0, keys, 2 * keys) if rule.delta else (state.channels - keys, state.channels - 2 * keys, 0)
    return RecurrenceCall(
        columns=state.columns,
        channels=state.channels,
        heads=state.heads,
        key_heads=rule.key_heads,
        depth=state.depth,
        width=state.width,
        queries_at=places[0],
        keys_at=places[1],
        values_at=places[2],
        delta=rule.delta,
        norm_size=rule.norm_size,
        gated_first=rule.gated_first,
        threads=torch.get_num_threads(),
        least_step=rule.least_step,
        most_step=rule.most_step,
        beta_factor=rule.beta_factor,
        epsilon=rule.epsilon,
    )
