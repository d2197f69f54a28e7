"""Estimates a step's duration from its floating-point operations and bytes (roofline model).

A roofline (Williams, Waterman and Patterson, 2009) with measured efficiencies: each operation takes as long as its
arithmetic or its memory traffic, whichever is longer, at the share of the peak that kernels of its size reach.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from math import log, sqrt
from typing import NamedTuple

from emberkv.core.scheduler import PrefillChunk, StepPlan
from emberkv.errors import ConfigError
from emberkv.sim.hardware import GB, MICROSECOND, Curve, HardwareProfile
from emberkv.sim.model_spec import DTYPE_BITS, ModelSpec
from emberkv.sim.timing import ChunkWork, StepTerms, StepWork

MEGABYTE = 1e6

REMEMBERED = 4096
"""Times of attention of which the last ones are kept, as steps resemble one another."""


@dataclass(frozen=True, slots=True)
class Layout:
    """How the devices of a replica share a model beside tensor parallelism, which divides each matrix and the heads.

    expert_parallel: a device has whole experts instead of a part of each. data_parallel_attention: a device computes
    the attention of its own sequences with all heads, and keeps their KV cache alone. peer_access: whether devices
    reach each other's memory directly; None: as the profile says.

    >>> from emberkv.sim.model_spec import load_spec
    >>> Layout(expert_parallel=True).check(load_spec("mixtral-8x7b"), devices=4)
    """

    expert_parallel: bool = False
    data_parallel_attention: bool = False
    peer_access: bool | None = None

    def check(self, model: ModelSpec, devices: int) -> None:
        """Raises ConfigError if ``devices`` devices cannot share the model like this."""
        if self.expert_parallel and not 1 < devices <= model.experts:
            raise ConfigError(
                f"expert_parallel with {devices} devices; {model.name} has {model.experts} experts to divide, "
                "and --tensor-parallel says among how many devices (at least 2)"
            )
        if self.data_parallel_attention and devices < 2:
            raise ConfigError("data_parallel_attention needs at least 2 devices; --tensor-parallel says how many")
        if not self.data_parallel_attention and (devices < 1 or model.heads % devices):
            raise ConfigError(f"tensor_parallel is {devices}; {model.name} has {model.heads} heads to share")


TENSOR_PARALLEL = Layout()
"""Nothing beside it, and links as the profile says."""


class _RowTerms(NamedTuple):
    """Seconds of one forward pass that depend on its rows alone."""

    gemm: float
    elementwise: float
    all_reduce: float
    layer_overhead: float


class Roofline:
    """Step times of a model on a device, or on ``tensor_parallel`` of them that share each layer.

    layout: how they share it. Raises ConfigError if the devices have no link, or the model cannot be shared so.

    >>> from emberkv.sim.hardware import load_profile
    >>> from emberkv.sim.model_spec import load_spec
    >>> roofline = Roofline(load_spec("llama-3.1-8b"), load_profile("h100"))
    >>> one, many = (roofline.decode_seconds(sequences, context=1024) for sequences in (1, 64))
    >>> one < many < 2 * one  # the weights are read once a step, whatever the batch
    True
    """

    def __init__(
        self,
        model: ModelSpec,
        hardware: HardwareProfile,
        *,
        tensor_parallel: int = 1,
        layout: Layout = TENSOR_PARALLEL,
    ) -> None:
        layout.check(model, tensor_parallel)
        self._link = hardware.link(layout.peer_access) if tensor_parallel > 1 else 0.0
        self._layout = layout
        self._attention_devices = 1 if layout.data_parallel_attention else tensor_parallel
        self.model = model
        self.hardware = hardware
        self.tensor_parallel = tensor_parallel
        self._one_pass = hardware.passes == "one"
        self._last_wanted = hardware.last_layer == "wanted"
        self._overheads = overheads = hardware.overheads_us
        self._step_overhead = overheads.step * MICROSECOND
        self._sequence_overhead = overheads.sequence * MICROSECOND
        self._chunk_overhead = overheads.chunk * MICROSECOND
        self._token_overhead = overheads.token * MICROSECOND
        self._bandwidth = hardware.bytes_per_second
        self._flops = hardware.flops(model.weights_dtype if model.weights_dtype == "fp8" else model.base_dtype)
        self._attention_flops = hardware.flops(model.base_dtype)
        self._gemm_compute = Curve(hardware.gemm_compute)
        self._prefill_share = Curve(hardware.prefill_attention)
        self._decode_share = Curve(hardware.decode_attention)
        heads = -(-model.kv_heads // self._attention_devices)
        self._kv_bytes = model.kv_bytes_per_layer * heads / model.kv_heads
        self._score_flops = 4 * model.query_size / self._attention_devices
        self._element_bytes = DTYPE_BITS[model.base_dtype] / 8
        self._rows: dict[tuple[int, int, int], _RowTerms] = {}
        self._sampled: dict[int, float] = {}
        self._read_kv: Callable[[int], float] = lru_cache(REMEMBERED)(self._seconds_to_read_kv)
        self._prefill_attention: Callable[[int, int, bool], float] = lru_cache(REMEMBERED)(self._seconds_to_prefill)

    def step_seconds(self, plan: StepPlan) -> float:
        """Seconds of a step, which is not empty."""
        return self.terms(plan).total

    def decode_seconds(self, sequences: int, context: int) -> float:
        """Seconds of a step that decodes a token each for ``sequences``, attending to ``context`` tokens in all."""
        return self.terms_of(StepWork(sequences, context)).total

    def explain(self, plan: StepPlan) -> dict[str, float]:
        """Seconds of a step by term; their sum is what `step_seconds` says."""
        return self.terms(plan).as_dict()

    def terms(self, plan: StepPlan) -> StepTerms:
        return self.terms_of(self.work_of(plan))

    def work_of(self, plan: StepPlan) -> StepWork:
        """The step in numbers. Where a step is one pass, adjacent chunks of a sequence are one."""
        context = sum(len(sequence.chain) for sequence in plan.decodes)
        return StepWork(len(plan.decodes), context, _chunks_of(plan.prefills, joined=self._one_pass))

    def overhead_counts(self, work: StepWork) -> dict[str, float]:
        """How often a step pays each of the `Overheads`."""
        passes = 1 if self._one_pass else len(work.chunks) + (work.sequences > 0)
        layers = passes * self.model.layers
        return {
            "step": 1,
            "launch": passes,
            "layer": layers,
            "sequence": work.sequences,
            "chunk": len(work.chunks),
            "token": sum(chunk.stop - chunk.start for chunk in work.chunks),
            "all_reduce": self._exchanges * layers,
        }

    def terms_of(self, work: StepWork) -> StepTerms:
        sequences, context, chunks = work
        terms = StepTerms(self._step_overhead)
        terms.sequence_overhead = self._sequence_overhead * sequences
        groups = self._groups(sequences)
        terms.decode_attention = self._decode_attention(-(-sequences // groups), -(-context // groups))
        rows, sampled, attended = sequences, sequences, -(-sequences // groups)
        at_once = self._groups(len(chunks))
        for start, stop, samples in chunks:
            tokens = stop - start
            terms.prefill_attention += self._prefill_attention(start, stop, samples) / at_once
            attended += -(-tokens // at_once) if self._one_pass else 0
            terms.sequence_overhead += self._chunk_overhead
            terms.token_overhead += self._token_overhead * tokens
            if self._one_pass:
                rows += tokens
                sampled += samples
            else:
                self._add_pass(terms, tokens, int(samples), tokens)
        if rows:
            self._add_pass(terms, rows, sampled, attended)
        return terms

    def _groups(self, sequences: int) -> int:
        """Among how many devices ``sequences`` are divided for attention: each is on one if it is data-parallel."""
        return max(1, min(self.tensor_parallel, sequences)) if self._layout.data_parallel_attention else 1

    @property
    def _exchanges(self) -> int:
        """All-reduces of a layer, or what moves as much: after attention, unless it is data-parallel, and after the
        MLP or experts (data-parallel: gathered before and scattered after them).
        """
        if self.tensor_parallel == 1:
            return 0
        return 1 if self._layout.data_parallel_attention else 2

    def _add_pass(self, terms: StepTerms, rows: int, sampled: int, attended: int) -> None:
        """attended: rows of the device that has most of them in attention."""
        last = sampled if self._last_wanted else rows
        known = self._rows.get((rows, last, attended))
        if known is None:
            known = self._rows[rows, last, attended] = self._row_terms(rows, last, attended)
        if sampled not in self._sampled:
            self._sampled[sampled] = self._logits(sampled)
        terms.gemm += known.gemm
        terms.elementwise += known.elementwise
        terms.all_reduce += known.all_reduce
        terms.layer_overhead += known.layer_overhead
        terms.logits += self._sampled[sampled]

    def _row_terms(self, rows: int, last: int, attended: int) -> _RowTerms:
        """last: rows for which the last layer goes on after its keys and values. attended: see `_add_pass`."""
        model, devices = self.model, self.tensor_parallel
        mixtures = model.moe_layers * self._mixture(rows) if model.moe_layers else 0.0
        dense = (model.layers - model.moe_layers) * self._mlp(rows, model.intermediate)
        width = model.query_size + 2 * model.kv_size
        attention = self._linear(attended, model.hidden, width / self._attention_devices)
        attention += self._attention_out(attended)
        spared = self._after_attention(rows) - self._after_attention(last) if last < rows else 0.0
        # Two norms with their residuals read and write 8 vectors; rotation and the cache 2 of each head's; the MLP's
        # activation 3 of its width.
        mlp = max(model.intermediate, model.experts_per_token * model.expert_intermediate)
        vectors = 8 * model.hidden + (2 * width + 3 * mlp) / devices
        moved = rows * vectors * self._element_bytes / (self._bandwidth * self.hardware.gemm_bandwidth)
        overhead = self._overheads.layer * model.layers + self._overheads.launch
        return _RowTerms(
            gemm=mixtures + dense + model.layers * attention - spared,
            elementwise=model.layers * moved,
            all_reduce=self._exchanges * model.layers * self._all_reduce(rows),
            layer_overhead=overhead * MICROSECOND,
        )

    def _after_attention(self, rows: int) -> float:
        """Seconds of the last layer's products after attention; experts are left out, as they compute all rows."""
        if not rows:
            return 0.0
        mlp = 0.0 if self.model.moe_layers else self._mlp(rows, self.model.intermediate)
        return self._attention_out(rows) + mlp

    def _attention_out(self, rows: int) -> float:
        return self._linear(rows, self.model.query_size / self._attention_devices, self.model.hidden)

    def _all_reduce(self, rows: int) -> float:
        """A ring exchanges 2(n-1)/n of the data over each link."""
        devices = self.tensor_parallel
        exchanged = rows * self.model.hidden * self._element_bytes * 2 * (devices - 1) / devices
        return self._overheads.all_reduce * MICROSECOND + exchanged / (self._link * GB) if devices > 1 else 0.0

    def _linear(self, rows: float, inputs: float, outputs: float, copies: float = 1.0, bits: float = 0.0) -> float:
        """One product of ``rows`` by a matrix; with ``copies``, that many of them, each of other weights."""
        weights = inputs * outputs * (bits or self.model.linear_bits) / 8
        moved = copies * (weights + rows * (inputs + outputs) * self._element_bytes)
        computed = copies * 2 * rows * inputs * outputs / (self._flops * self._gemm_compute.at(rows))
        return max(moved / (self._bandwidth * self.hardware.gemm_bandwidth), computed)

    def _mlp(self, rows: float, width: int, copies: float = 1.0) -> float:
        hidden, width_here = self.model.hidden, width / self.tensor_parallel
        up = self._linear(rows, hidden, 2 * width_here, copies)
        return up + self._linear(rows, width_here, hidden, copies)

    def _mixture(self, rows: int) -> float:
        """Tokens choose experts at random: of E experts, rows times k choices touch E (1 - (1 - k/E)^rows).

        Tensor-parallel, each device has a part of every expert. Expert-parallel, it has some experts whole, and the
        step waits for the device on which most choices fall.
        """
        model = self.model
        touched = model.experts * (1 - (1 - model.experts_per_token / model.experts) ** rows)
        each = rows * model.experts_per_token / touched
        shared = self._mlp(rows, model.shared_intermediate) if model.shared_intermediate else 0.0
        if not self._layout.expert_parallel:
            return shared + self._mlp(each, model.expert_intermediate, touched)
        devices = self.tensor_parallel
        choices = rows * model.experts_per_token
        here = min(model.experts / devices, _busiest(touched, devices))
        busiest = min(float(choices), _busiest(choices, devices))
        return shared + self._mlp(busiest / here, model.expert_intermediate * devices, here)

    def _logits(self, sampled: int) -> float:
        if not sampled:
            return 0.0
        outputs = self.model.vocab / self.tensor_parallel
        return self._linear(sampled, self.model.hidden, outputs, bits=self.model.output_bits)

    def _decode_attention(self, sequences: int, context: int) -> float:
        if not sequences:
            return 0.0
        model = self.model
        seconds = (model.layers - model.window_layers) * self._read_kv(context)
        if model.window_layers:
            seconds += model.window_layers * self._read_kv(min(context, sequences * model.window))
        return seconds

    def _seconds_to_prefill(self, start: int, stop: int, samples: bool) -> float:
        """A chunk's attention in all layers."""
        windowed = self.model.window_layers
        full = self.model.layers - windowed
        if not self._last_wanted:
            return self._attention_of(full, windowed, start, stop)
        last = (1, 0) if full else (0, 1)
        seconds = self._attention_of(full - last[0], windowed - last[1], start, stop)
        return seconds + self._attention_of(*last, stop - 1, stop) if samples else seconds

    def _attention_of(self, full: int, windowed: int, start: int, stop: int) -> float:
        """Seconds of attention in ``full`` layers without a window and ``windowed`` layers with one."""
        seconds = full * self._attend(_pairs(stop) - _pairs(start), stop)
        if windowed:
            pairs = _pairs(stop, self.model.window) - _pairs(start, self.model.window)
            reach = min(stop, stop - start + self.model.window)
            seconds += windowed * self._attend(pairs, reach)
        return seconds

    def _attend(self, pairs: float, reach: int) -> float:
        """One layer's prefill attention: as efficient as a cold prompt's with as many pairs of query and key."""
        computed = self._score_flops * pairs / (self._attention_flops * self._prefill_share.at(sqrt(2 * pairs)))
        return max(computed, self._read_kv(reach))

    def _seconds_to_read_kv(self, tokens: int) -> float:
        """One layer's keys and values of ``tokens``."""
        read = tokens * self._kv_bytes
        seconds = read / (self._bandwidth * self._decode_share.at(read / MEGABYTE))
        return max(seconds, self.hardware.attention_floor_us * MICROSECOND)


def _busiest(count: float, devices: int) -> float:
    """About how many of ``count`` that are spread at random fall on the device that has most."""
    mean = count / devices
    return mean + sqrt(2 * mean * log(devices))


def _pairs(stop: int, window: int = 0) -> float:
    """Pairs of a query and a key it sees, for the queries before ``stop``."""
    if not window or stop <= window:
        return stop * (stop + 1) / 2
    return window * (window + 1) / 2 + (stop - window) * window


def _chunks_of(prefills: list[PrefillChunk], *, joined: bool) -> tuple[ChunkWork, ...]:
    chunks: list[ChunkWork] = []
    last = None
    for each in prefills:
        if joined and each.sequence is last and chunks[-1].stop == each.start:
            chunks[-1] = ChunkWork(chunks[-1].start, each.stop, each.samples)
        else:
            chunks.append(ChunkWork(each.start, each.stop, each.samples))
        last = each.sequence
    return tuple(chunks)
