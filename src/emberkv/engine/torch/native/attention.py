"""A pass's attention by the compiled kernel: which rows attend over which spans of keys together."""

from collections import abc
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from emberkv.engine.torch.attention.kv_pool import KVPool
from emberkv.engine.torch.attention.paged_attention import (
    ActiveRows,
    AttentionStep,
    LayerCall,
    Run,
    shared_prefixes,
)
from emberkv.engine.torch.model.geometry import HeadShape, Window
from emberkv.engine.torch.native.kernels import TASK, AttentionCall, Kernels, type_number

ROWS_PER_TASK = 64, 512
"""Query rows of one KV head, at least and at most, that take their turns with a span of keys."""


class NativeAttention:
    """Makes the steps. Any cut of a prompt gives the same bits, so tiles can be as small as blocks are."""

    def __init__(self, pool: KVPool, kernels: Kernels) -> None:
        self._pool = pool
        self._kernels = kernels

    def step(self, runs: abc.Sequence[Run], wanted: abc.Sequence[int]) -> AttentionStep:
        return NativeStep(self._pool, self._kernels, runs, wanted)


class _Task(NamedTuple):
    """Rows of one sequence, or of several that are the same up to ``stop``, over a run of spans; as in TASK."""

    first_row: int
    rows: int
    block_table: int
    first_span: int
    last_span: int
    stop: int
    whole: bool

    def split(self, pieces: int) -> "Iterator[_Task]":
        """Into tasks of fewer spans each, none of which has all."""
        size = -(-(self.last_span - self.first_span) // pieces)
        for first in range(self.first_span, self.last_span, max(1, size)):
            yield self._replace(first_span=first, last_span=min(first + size, self.last_span), whole=False)


class _Part(NamedTuple):
    """Consecutive tokens of a sequence. first_row: of theirs in the pass. block_table: its begin in `block_ids`."""

    run: Run
    first_row: int
    block_table: int


@dataclass(frozen=True, slots=True)
class _Plan:
    """tasks: of dtype TASK. row_ids: what these point into. partial_of: each row's first partial result, or -1."""

    tasks: NDArray[np.void]
    row_ids: NDArray[np.int32]
    partial_of: NDArray[np.int64]
    num_partials: int


class NativeStep(AttentionStep):
    """All runs' rows, one after the other; rows after them are padding. wanted: rows whose logits are, ascending.

    Sequences with one new token share the computation over leading blocks that they have in common, span by span. The
    last layer attends for the wanted rows only.
    """

    def __init__(self, pool: KVPool, kernels: Kernels, runs: abc.Sequence[Run], wanted: abc.Sequence[int]) -> None:
        self._pool = pool
        self._kernels = kernels
        counts = [run.count for run in runs]
        tables = _offsets([len(run.block_ids) for run in runs])
        self._parts = [_Part(*each) for each in zip(runs, _offsets(counts), tables, strict=True)]
        self._wanted = wanted
        self._rows = sum(counts)
        self._block_ids = np.array([block_id for run in runs for block_id in run.block_ids], dtype=np.int64)
        self._block_tables = np.repeat(np.array(tables, dtype=np.int32), counts)
        self._positions = np.concatenate([np.arange(run.start, run.stop, dtype=np.int32) for run in runs])
        self._longest = max(run.stop for run in runs)
        self._plans: dict[tuple[Window | None, HeadShape, bool], _Plan] = {}
        self._shapes = pool.geometry.head_shapes()
        self._threads = torch.get_num_threads()
        self._call = self._prepared()

    def _prepared(self) -> AttentionCall:
        return AttentionCall(
            block_bytes=self._pool.block_bytes,
            rows=self._rows,
            block_size=self._pool.block_size,
            quantised=self._pool.dtype is torch.int8,
            threads=self._threads,
            block_ids=self._block_ids.ctypes.data,
            block_tables=self._block_tables.ctypes.data,
            positions=self._positions.ctypes.data,
        )

    @property
    def positions(self) -> NDArray[np.int32]:
        """``[rows]``"""
        return self._positions

    @property
    def wanted(self) -> abc.Sequence[int]:
        """Rows whose logits are, ascending."""
        return self._wanted

    def plans(self, windows: abc.Sequence[Window | None]) -> tuple[list[AttentionCall], list[int]]:
        """The attention of all layers, which have these windows and the same heads, but for what is a layer's own; and
        which of them each follows.

        They point into memory of this step and of the pool, which the next step overwrites.
        """
        last, shape = len(windows) - 1, self._shapes[0]
        keys = [(self._limited(window), layer == last and self._only_wanted) for layer, window in enumerate(windows)]
        calls: dict[tuple[Window | None, bool], AttentionCall] = {}
        for window, only_wanted in dict.fromkeys(keys):
            self._follow(self._plan(window, shape, only_wanted=only_wanted), window)
            self._set_layer(0)
            calls[window, only_wanted] = AttentionCall.from_buffer_copy(self._call)
        partials = self._partials(max(plan.num_partials for plan in self._plans.values()), shape).data_ptr()
        for call in calls.values():
            call.partials = partials
        places = {key: place for place, key in enumerate(calls)}
        return list(calls.values()), [places[key] for key in keys]

    @property
    def _only_wanted(self) -> bool:
        """Whether the last layer has rows that nothing is wanted of."""
        return len(self._wanted) < self._rows

    def _limited(self, window: Window | None) -> Window | None:
        """None for a window that none of the sequences has reached."""
        return window if window is not None and window.size < self._longest else None

    def _follow(self, plan: _Plan, window: Window | None) -> None:
        native = self._call
        size, chunked = (0, False) if window is None else window
        native.window, native.chunk = (0, size) if chunked else (size, 0)
        native.tasks, native.num_tasks = plan.tasks.ctypes.data, len(plan.tasks)
        native.row_ids, native.partial_of = plan.row_ids.ctypes.data, plan.partial_of.ctypes.data

    def attend(self, call: LayerCall, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        window = self._limited(call.window)
        geometry = self._pool.geometry
        is_last = geometry.ends_with_attention and call.layer == geometry.num_layers - 1
        only_wanted = is_last and self._only_wanted
        shape = self._shapes[call.layer]
        plan = self._plan(window, shape, only_wanted=only_wanted)
        if only_wanted:
            out = torch.zeros(queries.shape, dtype=queries.dtype)
            self.active_rows = ActiveRows(torch.tensor(self._wanted, dtype=torch.int64), queries.shape[0])
        else:
            out = torch.empty(queries.shape, dtype=queries.dtype)
            out[self._rows :] = 0
        queries, keys, values = (each if each.stride(2) == 1 else each.contiguous() for each in (queries, keys, values))
        native = self._call
        self._set_layer(call.layer)
        native.type = type_number(queries, keys, values, self._pool.activations)
        native.queries, native.keys, native.values = queries.data_ptr(), keys.data_ptr(), values.data_ptr()
        native.query_row, native.query_head, _ = queries.stride()
        native.key_row, native.key_head, _ = keys.stride()
        native.value_row, native.value_head, _ = values.stride()
        native.out = out.data_ptr()
        native.scale, native.softcap = call.scale, call.softcap or 0.0
        native.sinks = None if call.sinks is None else call.sinks.data_ptr()
        native.slopes = None if call.slopes is None else call.slopes.data_ptr()
        self._follow(plan, window)
        native.partials = self._partials(plan.num_partials, shape).data_ptr()
        self._kernels.attend(native)
        return out

    def _set_layer(self, layer: int) -> None:
        native, stored = self._call, self._pool.keys_and_values[self._pool.kv_layers[layer]]
        native.heads, native.kv_heads, native.dim = self._shapes[layer]
        native.pool, native.value_bytes = stored.data_ptr(), stored.stride(1) * stored.element_size()

    def _partials(self, count: int, shape: HeadShape) -> Tensor:
        """Memory for so many rows' results over one span: weighted values, and their weights' maximum and sum."""
        lanes = self._kernels.lanes
        width = -(-shape.dim // lanes) * lanes + lanes
        return self._pool.scores.take((count, shape.heads, width), torch.float32)

    def _plan(self, window: Window | None, shape: HeadShape, *, only_wanted: bool) -> _Plan:
        key = window, shape, only_wanted
        if key not in self._plans:
            parts = list(self._wanted_parts()) if only_wanted else self._parts
            self._plans[key] = self._make_plan(window, shape, parts)
        return self._plans[key]

    def _wanted_parts(self) -> "Iterator[_Part]":
        at = 0
        for row in self._wanted:
            while row >= self._parts[at].first_row + self._parts[at].run.count:
                at += 1
            part = self._parts[at]
            position = part.run.start + row - part.first_row
            yield _Part(replace(part.run, start=position, count=1), row, part.block_table)

    def _make_plan(self, window: Window | None, shape: HeadShape, parts: list[_Part]) -> _Plan:
        span = self._kernels.span
        tasks: list[_Task] = []
        row_ids = list(range(self._rows))
        partial: set[int] = set()  # rows whose spans are not all in one task
        shared_spans = [0] * len(parts)
        for members, spans in self._shared_spans(parts) if window is None else ():
            rows = [parts[member].first_row for member in members]
            tasks.append(_Task(len(row_ids), len(rows), parts[members[0]].block_table, 0, spans, spans * span, False))
            row_ids += rows
            partial.update(rows)
            for member in members:
                shared_spans[member] = spans
        tokens = self._tokens_per_task(shape)
        for (run, row, table), shared in zip(parts, shared_spans, strict=True):
            for first in range(0, run.count, tokens):
                count = min(tokens, run.count - first)
                stop = run.start + first + count
                begin = shared if window is None else window.first(run.start + first) // span
                tasks.append(_Task(row + first, count, table, begin, -(-stop // span), stop, not shared))
        pieces = self._threads // max(1, len(tasks) * shape.kv_heads)
        if pieces > 1 and window is None:
            partial.update(row + i for run, row, _ in parts for i in range(run.count))
            tasks = [part for task in tasks for part in task.split(pieces)]
        partial_of = np.full(self._rows, -1, dtype=np.int64)
        num_partials = 0
        for row in sorted(partial):
            partial_of[row] = num_partials
            num_partials += int(self._positions[row]) // span + 1
        return _Plan(np.array(tasks, dtype=TASK), np.array(row_ids, dtype=np.int32), partial_of, num_partials)

    def _tokens_per_task(self, shape: HeadShape) -> int:
        """As many as leave every thread something to do, within the limits."""
        least, most = ROWS_PER_TASK
        share = -(-self._rows * shape.heads // self._threads)
        rows: int = min(most, max(least, share)) * shape.kv_heads // shape.heads
        return max(1, rows)

    def _shared_spans(self, parts: list[_Part]) -> list[tuple[list[int], int]]:
        """Parts of one token each with so many whole leading spans in common."""
        single = [index for index, part in enumerate(parts) if part.run.count == 1]
        block_tables = [parts[index].run.block_ids for index in single]
        lengths = [parts[index].run.stop for index in single]
        groups = shared_prefixes(block_tables, lengths, self._pool.block_size, self._kernels.span)
        found = [([single[member] for member in members], blocks) for members, blocks in groups]
        return [(members, blocks * self._pool.block_size // self._kernels.span) for members, blocks in found]


def _offsets(lengths: list[int]) -> list[int]:
    """Where each of several runs laid end to end begins."""
    total, offsets = 0, []
    for length in lengths:
        offsets.append(total)
        total += length
    return offsets
