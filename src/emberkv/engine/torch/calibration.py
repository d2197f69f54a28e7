"""Measures a machine: how long matrix products, prefills, decode steps and transfers between tiers take on it."""

import itertools
import random
import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import NamedTuple

import psutil
import torch
from torch import nn

from emberkv.core.sequence import FinishReason
from emberkv.engine.assembly import EngineConfig
from emberkv.engine.request import Engine, GenerationRequest, SamplingParams, TokenOutput
from emberkv.engine.torch.assembly import CacheSizes, ModelOptions, ProgressCallback, assemble, load_configured
from emberkv.engine.torch.engine import TorchEngine
from emberkv.engine.torch.layers import PackedLinear
from emberkv.engine.torch.native.layers import NativeGatedPair, NativeLinear
from emberkv.engine.torch.quantization.layers import QuantizedLinear
from emberkv.errors import EmberError
from emberkv.tiers.base import Tier, TierEntry
from emberkv.tiers.codec import BlockRecord, decode_record, encode_record

Clock = Callable[[], float]
"""Monotonic seconds."""

_NAMESPACE = b"calibration"

_LINEARS = (NativeLinear, NativeGatedPair, PackedLinear, QuantizedLinear, nn.Linear)

LINEAR_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class LinearTime(NamedTuple):
    """Seconds of all linear layers of the model together, output layer included, for so many rows."""

    rows: int
    seconds: float


class TransferTime(NamedTuple):
    """A tier's: seconds of a batch of one block, and bytes a second of larger ones."""

    latency: float
    read_rate: float
    write_rate: float


def device_memory(device: torch.device) -> int:
    """Bytes of memory where ``device`` computes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return int(psutil.virtual_memory().total)


@torch.inference_mode()
def time_linears(model: nn.Module, *, clock: Clock = time.perf_counter, repeats: int = 7) -> list[LinearTime]:
    """The model's linear layers as they are served, each with inputs of its own width."""
    layers = [each for each in model.modules() if isinstance(each, _LINEARS)]
    kind = next(model.parameters())
    found = []
    for rows in LINEAR_ROWS:
        widths = {each.in_features for each in layers}
        inputs = {width: torch.randn(rows, width, device=kind.device).to(kind.dtype) for width in widths}

        def run(inputs: dict[int, torch.Tensor] = inputs) -> None:
            for layer in layers:
                layer(inputs[layer.in_features])
            if kind.device.type == "cuda":
                torch.cuda.synchronize(kind.device)

        found.append(LinearTime(rows, _median_seconds(run, clock, repeats)))
    return found


def _median_seconds(run: Callable[[], object], clock: Clock, repeats: int) -> float:
    run()
    times = []
    for _ in range(repeats):
        began = clock()
        run()
        times.append(clock() - began)
    return statistics.median(times)


class _Answer:
    """When one request's first token came. ``ended`` is set on the engine's thread, after all else."""

    def __init__(self, clock: Clock) -> None:
        self.first = 0.0
        self.reason: FinishReason | None = None
        self.ended = threading.Event()
        self._clock = clock

    def __call__(self, output: TokenOutput) -> None:
        self.first = self.first or self._clock()
        if output.finish_reason is not None:
            self.reason = output.finish_reason
            self.ended.set()


class PrefillBench:
    """Measures first tokens of a running engine that has nothing else to do. Prompts are made up, all different.

    Scheduling and sampling are in the times. Raises EmberError when an answer fails.
    """

    def __init__(self, engine: Engine, vocab: int, *, seed: int = 0, clock: Clock = time.perf_counter) -> None:
        self._engine = engine
        self._vocab = vocab
        self._random = random.Random(seed)
        self._clock = clock
        self._ids = (f"calibration-{number}" for number in itertools.count())

    def prefill(self, start: int, stop: int, *, repeats: int = 5) -> float:
        """The mean of seconds from handing in a prompt of ``stop`` tokens to its first token, ``start`` of them
        being cached. The first of a shape takes longer, and is not counted.
        """
        beginning = self._tokens(start)
        if start:
            self._first_token(beginning + self._tokens(1))
        _, *seconds = [self._first_token(beginning + self._tokens(stop - start)) for _ in range(1 + repeats)]
        return statistics.fmean(seconds)

    def _tokens(self, count: int) -> list[int]:
        return [self._random.randrange(self._vocab) for _ in range(count)]

    def _first_token(self, prompt: list[int]) -> float:
        answer = _Answer(self._clock)
        params = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True)
        began = self._clock()
        self._engine.submit(GenerationRequest(next(self._ids), prompt, params), answer)
        answer.ended.wait()
        if answer.reason is not FinishReason.LENGTH:
            raise EmberError(f"an answer to measure by ended with {answer.reason}; it must reach its length")
        return answer.first - began


def prefill_grid(context_length: int, unit: int, budget: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of prefills to measure that one step does, in multiples of ``unit``, as far as they fit."""
    for start in (0, 512, 2048):
        for length in (32, 64, 128, 256):
            begin, tokens = -(-start // unit) * unit, -(-length // unit) * unit
            if tokens <= budget and begin + tokens < context_length:
                yield begin, begin + tokens


def time_tier(
    tier: Tier, block_bytes: int, block_size: int, *, blocks: int = 256, clock: Clock = time.perf_counter
) -> TransferTime:
    """Encode and store made-up blocks, then load, verify and copy them as a promotion does; they are removed again."""
    payload = random.Random(0).randbytes(block_bytes)
    records = [
        BlockRecord(number.to_bytes(32, "big"), bytes(32), bytes(4 * block_size), number, True, payload)
        for number in range(blocks)
    ]
    place = bytearray(block_bytes)

    def load(count: int) -> None:
        for entry in tier.load([record.block_hash for record in records[:count]]):
            if entry is None:
                raise EmberError(f"the {tier.name} tier lost a block that it had just stored; is there no room?")
            place[:] = decode_record(entry.data, namespace=_NAMESPACE).payload

    began = clock()
    tier.store(
        [TierEntry(each.block_hash, "", encode_record(each, namespace=_NAMESPACE), each.exact) for each in records]
    )
    written = clock() - began
    read = _median_seconds(lambda: load(blocks), clock, 3)
    latency = _median_seconds(lambda: load(1), clock, 5)
    tier.remove([record.block_hash for record in records])
    return TransferTime(latency, blocks * block_bytes / read, blocks * block_bytes / written)


DEFAULT_CACHE_BYTES = 256 * 2**20
"""Of the KV pool while times are measured, where its size is not given."""


class EngineBench:
    """Loads the model of ``options`` and times its linear layers at once, as ``linears``.

    config: the engine's settings.

    On CPU, make it on a thread that ends: as long as the thread of an OpenMP team lives, the team counts, and with more
    of them than cores, those of other threads sleep between operations. The engine's steps then take twice as long.
    """

    def __init__(self, options: ModelOptions, config: EngineConfig, on_progress: ProgressCallback) -> None:
        self.loaded, kernels = load_configured(options, CacheSizes(config.cache_bytes), on_progress)
        self._config = config
        self._engine = assemble(self.loaded, config, kernels=kernels)
        assert isinstance(self._engine.executor, TorchEngine)
        self._executor = self._engine.executor
        on_progress("matrix products")
        self.linears: list[LinearTime] = time_linears(self.loaded.model)

    @property
    def device(self) -> torch.device:
        return self.loaded.device

    @property
    def memory(self) -> int:
        """Bytes of it where the model is."""
        return device_memory(self.device)

    @property
    def alignment(self) -> int:
        """Tokens of the unit in which state can be reused."""
        return self._executor.alignment

    @property
    def one_pass(self) -> bool:
        """Whether a step is one forward pass."""
        return self._executor.one_pass

    @property
    def backend(self) -> str:
        """ "native" or "torch": what computes attention and most layers."""
        return self._executor.backend

    @property
    def last_layer_spares(self) -> bool:
        """Whether the last layer attends, and goes on, only for rows whose logits are wanted."""
        return self._executor.kernels is not None

    def prefills(self, rounds: int, on_progress: ProgressCallback) -> dict[tuple[int, int], float]:
        """Seconds of prefills of the tokens ``[start, stop)``, those before being cached; the engine runs meanwhile.

        The mean of rounds over all: a machine's pace changes, for seconds at a time. Means, because they add up to the
        mean that a simulation is to predict; times that vary have many short ones and few long ones, and a smaller
        median.
        """
        config, loop = self._config, self._engine.loop
        budget = config.max_step_tokens if self.one_pass else config.prefill_chunk
        grid = list(prefill_grid(loop.context_length, self.alignment, budget))
        bench = PrefillBench(loop, self.loaded.geometry.vocab_size)
        found: defaultdict[tuple[int, int], list[float]] = defaultdict(list)
        loop.start()
        try:
            for number in range(1, rounds + 1):
                on_progress(f"first tokens, round {number} of {rounds}")
                for start, stop in grid:
                    found[start, stop].append(bench.prefill(start, stop))
        finally:
            loop.stop()
        return {prefill: statistics.fmean(seconds) for prefill, seconds in found.items()}

    def tier(self, tier: Tier) -> TransferTime:
        """The transfers of blocks of this engine's size to and from ``tier``."""
        return time_tier(tier, self._executor.pool.block_bytes, self._config.block_size)
