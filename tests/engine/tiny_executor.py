"""An executor in NumPy: real KV bytes in a pool of arrays, and tokens that depend on every byte that it reads."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from emberkv.core.sequence import Sequence as ScheduledSequence
from emberkv.core.sequence import StepPlan
from emberkv.engine.executor import NOT_NUMBERS, PromptLogprobs, SampledToken, SamplingState, StepOutput
from emberkv.engine.request import SamplingParams, TokenLogprobs
from emberkv.errors import ConfigError, SamplingError, UnknownLayerError
from emberkv.tensors import TensorBytes

WORDS = 4
"""64-bit words of KV state for each token."""


class ArrayPool:
    """KV state ``[blocks, block_size, WORDS]``, uint64. At first it holds garbage, so that it shows where a block is
    read before it is written.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.words = np.random.default_rng(0).integers(2**64, size=(num_blocks, block_size, WORDS), dtype=np.uint64)

    @property
    def num_blocks(self) -> int:
        return self.words.shape[0]

    @property
    def block_size(self) -> int:
        return self.words.shape[1]

    @property
    def block_bytes(self) -> int:
        return self.words[0].nbytes

    @property
    def layer_bytes(self) -> int:
        return 2 * self.block_bytes

    @property
    def num_bytes(self) -> int:
        return self.words.nbytes

    def read_blocks(self, block_ids: Sequence[int]) -> list[memoryview]:
        return [memoryview(self.words[block_id].tobytes()) for block_id in block_ids]

    def read_beginning(self, block_id: int, num_tokens: int) -> memoryview:
        words = self.words[block_id].copy()
        words[num_tokens:] = 0
        return memoryview(words.tobytes())

    def read_layer(self, block_ids: Sequence[int], layer: int) -> tuple[TensorBytes, TensorBytes]:
        """The one layer's keys and values are the KV words, ``[tokens, WORDS, 1]``."""
        if layer:
            raise UnknownLayerError(f"layer is {layer}; the model has 1", param="layer")
        words = self.words[list(block_ids)].astype(np.int64)
        rows = TensorBytes("int64", (words.shape[0] * words.shape[1], WORDS, 1), words.tobytes())
        return rows, rows

    def write_block(self, block_id: int, content: bytes | memoryview) -> None:
        if len(content) != self.block_bytes:
            raise ConfigError(f"{len(content)} bytes for a block; one of this pool has {self.block_bytes}")
        self.words[block_id] = np.frombuffer(content, dtype=np.uint64).reshape(self.words[block_id].shape)


class TinyExecutor:
    """A token's KV words mix its id, its position and the KV words of all tokens before it, read from the pool.

    The mix is a sum modulo 2**64, which is the same in any order, so every result is batch-invariant. The logits,
    ``[vocab]`` float32 from 0 to 8, follow from the last token's KV words. nan_token: the logits after it are NaN, and
    its own logit is the lowest.
    """

    backend = "tiny"
    description = "NumPy"

    def __init__(
        self, *, num_blocks: int = 64, block_size: int = 4, vocab: int = 50, nan_token: int | None = None
    ) -> None:
        self.pool = ArrayPool(num_blocks, block_size)
        self.vocab = vocab
        self.alignment = block_size
        self.batch_invariant = True
        self.hits_within_blocks = True
        self._nan_token = nan_token

    def execute(self, plan: StepPlan, sampling: Mapping[str, SamplingState]) -> StepOutput:
        for copy in plan.copies:
            self.pool.words[copy.target.block_id] = self.pool.words[copy.source.block_id]
        output = StepOutput()
        for sequence in plan.decodes:
            end = len(sequence.chain)
            self._sample(sequence, self.compute(sequence, end - 1, end)[-1], sampling, output)
        for chunk in plan.prefills:
            sequence = chunk.sequence
            logits = self.compute(sequence, chunk.start, chunk.stop)
            if chunk.samples:
                self._sample(sequence, logits[-1], sampling, output)
            if sequence.wants_prompt_logits:
                alternatives = sampling[sequence.request_id].params.prompt_logprobs or 0
                self._score_prompt(sequence, chunk.start, logits, alternatives, output)
        for request_id in output.failed:
            output.tokens.pop(request_id, None)
        return output

    def compute(self, sequence: ScheduledSequence, start: int, stop: int) -> NDArray[np.float32]:
        """Write the KV words of tokens ``[start, stop)``; their logits, ``[stop - start, vocab]``."""
        table = np.array([block.block_id for block in sequence.held.blocks])
        size = self.pool.block_size
        rows = []
        for position in range(start, stop):
            token = sequence.chain[position]
            before = self.pool.words[table[: -(-position // size)]].reshape(-1, WORDS)[:position]
            weights = _mixed(np.arange(position, dtype=np.uint64)) | np.uint64(1)
            context = (before * weights[:, None]).sum(axis=0, dtype=np.uint64)
            words = _mixed(context + _mixed(np.array([token, position, 7, 9], dtype=np.uint64)).cumsum(dtype=np.uint64))
            self.pool.words[table[position // size], position % size] = words
            rows.append(self._logits(words, token))
        return np.stack(rows)

    def _logits(self, words: NDArray[np.uint64], token: int) -> NDArray[np.float32]:
        if token == self._nan_token:
            return np.full(self.vocab, np.nan, dtype=np.float32)
        mixed = _mixed(words.sum(dtype=np.uint64) + np.arange(self.vocab, dtype=np.uint64))
        logits = (mixed >> np.uint64(40)).astype(np.float32) / np.float32(2**21)
        if self._nan_token is not None:
            logits[self._nan_token] = -100
        return logits

    def _sample(
        self,
        sequence: ScheduledSequence,
        logits: NDArray[np.float32],
        sampling: Mapping[str, SamplingState],
        output: StepOutput,
    ) -> None:
        try:
            output.tokens[sequence.request_id] = sampled(logits, sampling[sequence.request_id])
        except SamplingError as error:
            output.failed[sequence.request_id] = str(error)

    def _score_prompt(
        self,
        sequence: ScheduledSequence,
        start: int,
        logits: NDArray[np.float32],
        alternatives: int,
        output: StepOutput,
    ) -> None:
        if not np.isfinite(logits).all():
            output.failed[sequence.request_id] = NOT_NUMBERS
            return
        tokens = sequence.chain.slice(start + 1, max(start + 1, min(start + 1 + len(logits), sequence.prompt_tokens)))
        scored = [logprobs(row, token, alternatives) for row, token in zip(logits, tokens, strict=False)]
        output.prompt_logprobs.append(PromptLogprobs(sequence.request_id, start + 1, scored))


def sampled(logits: NDArray[np.float32], state: SamplingState) -> SampledToken:
    """Raises SamplingError."""
    if not np.isfinite(logits.max()):
        raise SamplingError(NOT_NUMBERS)
    params = state.params
    changed = _changed(logits, state)
    if not np.isfinite(changed.max()):
        raise SamplingError("the penalties make the scores for the next token overflow; use weaker ones")
    token_id = int(changed.argmax()) if params.is_greedy else _drawn(changed, params, state.draw())
    return SampledToken(token_id, None if params.logprobs is None else logprobs(logits, token_id, params.logprobs))


def logprobs(logits: NDArray[np.float32], token_id: int, alternatives: int) -> TokenLogprobs:
    scores = logits.astype(np.float64)
    values = scores - scores.max() - np.log(np.exp(scores - scores.max()).sum())
    top = np.argsort(-values, kind="stable")[:alternatives]
    return TokenLogprobs(token_id, float(values[token_id]), tuple((int(each), float(values[each])) for each in top))


def _changed(logits: NDArray[np.float32], state: SamplingState) -> NDArray[np.float32]:
    params = state.params
    counts = np.bincount(np.array(state.answer, dtype=np.int64), minlength=len(logits))
    seen = counts > 0
    seen[list(state.prompt_token_ids)] = True
    factor = np.float32(params.repetition_penalty)
    with np.errstate(over="ignore"):
        changed = np.where(seen, np.where(logits > 0, logits / factor, logits * factor), logits)
        changed = changed - params.frequency_penalty * counts - params.presence_penalty * (counts > 0)
    changed = changed.astype(np.float32)
    for token_id, bias in params.logit_bias.items():
        changed[token_id] += np.float32(bias)
    allowed = state.allowed_tokens(len(logits))
    return changed if allowed is None else np.where(allowed, changed, np.float32(-np.inf))


def _drawn(logits: NDArray[np.float32], params: SamplingParams, uniform: float) -> int:
    scores = logits.astype(np.float64)
    weights = np.exp((scores - scores.max()) / params.temperature)
    weights /= weights.sum()
    order = np.argsort(-weights, kind="stable")[: params.top_k or None]
    kept = weights[order]
    kept = kept[kept.cumsum() - kept < params.top_p * kept.sum()]
    kept = kept[kept >= params.min_p * kept[0]]
    cumulative = kept.cumsum()
    return int(order[min(np.searchsorted(cumulative, uniform * cumulative[-1], side="right"), len(kept) - 1)])


def _mixed(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finalizer of splitmix64, which lets every bit change every other."""
    words = words + np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
