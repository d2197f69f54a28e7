"""The measuring bench: how long this machine takes for matrix products, decode steps, prefills, and tiers' transfers.

Everything goes the way of a request, through the engine's own loop, so that scheduling and sampling are in the times.
"""

import itertools
import random
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import psutil
import torch
from torch import nn

from emberkv.core.sequence import FinishReason
from emberkv.engine.packed_linear import PackedLinear
from emberkv.engine.request import Engine, GenerationRequest, TokenOutput
from emberkv.engine.sampling_params import SamplingParams
from emberkv.errors import EmberError
from emberkv.tiers.base import Tier, TierEntry
from emberkv.tiers.codec import BlockRecord, decode_record, encode_record

Clock = Callable[[], float]
"""Monotonic seconds."""

_NAMESPACE = b"calibration"

LINEAR_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class LinearTime(NamedTuple):
    """Seconds of all linear layers of the model together, output layer included, for so many rows."""

    rows: int
    seconds: float


class DecodeTime(NamedTuple):
    """Seconds of a step that decodes ``sequences``, attending to ``context`` tokens in all."""

    sequences: int
    context: int
    seconds: float


class PrefillTime(NamedTuple):
    """Seconds from handing in a prompt to its first token, with all before ``start`` cached; there are ``stop``."""

    start: int
    stop: int
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
    layers = [each for each in model.modules() if isinstance(each, (PackedLinear, nn.Linear))]
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
    """Times of one request's tokens; written on the engine's thread, read once ``done`` is set."""

    def __init__(self, clock: Clock) -> None:
        self.times: list[float] = []
        self.done = threading.Event()
        self.reason: FinishReason | None = None
        self._clock = clock

    def __call__(self, output: TokenOutput) -> None:
        self.times.append(self._clock())
        if output.finish_reason is not None:
            self.reason = output.finish_reason
            self.done.set()


class StepBench:
    """Measures steps on a running engine that has nothing else to do. Prompts are made up, and all different.

    Raises EmberError when an answer fails.
    """

    def __init__(self, engine: Engine, vocab: int, *, seed: int = 0, clock: Clock = time.perf_counter) -> None:
        self._engine = engine
        self._vocab = vocab
        self._random = random.Random(seed)
        self._clock = clock
        self._ids = (f"calibration-{number}" for number in itertools.count())

    def decode(self, sequences: int, context: int, *, steps: int = 16) -> DecodeTime:
        """The median step while ``sequences`` prompts of ``context`` tokens are all being answered."""
        prompts = [self._tokens(context) for _ in range(sequences)]
        self._wait([self._submit(prompt, 1) for prompt in prompts])  # cached then, so that they begin almost together
        answers = [self._submit(prompt, steps + 2 * sequences) for prompt in prompts]
        self._wait(answers)
        all_run = max(answer.times[0] for answer in answers)
        longest = min(answer.times[-1] for answer in answers)
        first = answers[0].times
        inside = [at for at, when in enumerate(first) if all_run <= when <= longest]
        gaps = [first[at + 1] - first[at] for at in inside[:-1]]
        reached = context + statistics.fmean(inside[:-1]) + 1
        return DecodeTime(sequences, round(sequences * reached), statistics.median(gaps))

    def prefill(self, start: int, stop: int, *, repeats: int = 5) -> PrefillTime:
        """The median time to a first token with the first ``start`` tokens cached."""
        beginning = self._tokens(start)
        if start:
            self._wait([self._submit(beginning + self._tokens(1), 1)])
        times = []
        for _ in range(repeats):
            prompt = beginning + self._tokens(stop - start)
            began = self._clock()
            answer = self._submit(prompt, 1)
            self._wait([answer])
            times.append(answer.times[0] - began)
        return PrefillTime(start, stop, statistics.median(times))

    def _tokens(self, count: int) -> list[int]:
        return [self._random.randrange(self._vocab) for _ in range(count)]

    def _submit(self, prompt: Sequence[int], max_tokens: int) -> _Answer:
        answer = _Answer(self._clock)
        params = SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True)
        self._engine.submit(GenerationRequest(next(self._ids), prompt, params), answer)
        return answer

    @staticmethod
    def _wait(answers: Sequence[_Answer]) -> None:
        for answer in answers:
            answer.done.wait()
            if answer.reason is not FinishReason.LENGTH:
                raise EmberError(f"an answer to measure by ended with {answer.reason}; it must reach its length")


def decode_grid(context_length: int, max_running: int) -> Iterator[tuple[int, int]]:
    """(sequences, context) to measure, as far as they fit."""
    for sequences in (1, 2, 4, 8, 16):
        for context in (64, 512, 2048):
            if sequences <= max_running and context + 64 <= context_length and sequences * context <= 16_384:
                yield sequences, context


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
        for entry in tier.load([record.identity for record in records[:count]]):
            if entry is None:
                raise EmberError(f"the {tier.name} tier lost a block that it had just stored; is there no room?")
            place[:] = decode_record(entry.data, namespace=_NAMESPACE).payload

    began = clock()
    tier.store(
        [TierEntry(each.identity, "", encode_record(each, namespace=_NAMESPACE), each.exact) for each in records]
    )
    written = clock() - began
    read = _median_seconds(lambda: load(blocks), clock, 3)
    latency = _median_seconds(lambda: load(1), clock, 5)
    tier.remove([record.identity for record in records])
    return TransferTime(latency, blocks * block_bytes / read, blocks * block_bytes / written)
