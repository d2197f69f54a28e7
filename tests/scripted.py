"""Answers that a test chooses, from the real API, scheduler and prefix cache; and an executor for long prompts."""

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from emberkv.core.sequence import Sequence as ScheduledSequence
from emberkv.core.sequence import StepPlan
from emberkv.engine.executor import Executor, SampledToken, SamplingState, StepOutput
from tests.engine.tiny_executor import TinyExecutor

Script = Callable[[Sequence[int]], Sequence[int]]
"""From a prompt's token ids to the token ids of its answer, with the token that ends it."""

_MULTIPLIER = 0x5851F42D4C957F2D
_WORD = 2**64 - 1


class ScriptedExecutor:
    """Computes what ``executor`` computes, and samples what ``script`` says. Past its end the last token is repeated.

    The script is asked once for each request. Log-probabilities are those of the token that ``executor`` sampled.
    """

    def __init__(self, executor: Executor, script: Script) -> None:
        self.backend = executor.backend
        self.description = f"{executor.description}, scripted"
        self.pool = executor.pool
        self.alignment = executor.alignment
        self.batch_invariant = executor.batch_invariant
        self.hits_within_blocks = executor.hits_within_blocks
        self._executor = executor
        self._script = script
        self._answers: WeakKeyDictionary[SamplingState, Sequence[int]] = WeakKeyDictionary()

    def execute(self, plan: StepPlan, sampling: Mapping[str, SamplingState]) -> StepOutput:
        output = self._executor.execute(plan, sampling)
        for request_id, token in output.tokens.items():
            output.tokens[request_id] = SampledToken(self._next(sampling[request_id]), token.logprobs)
        return output

    def _next(self, state: SamplingState) -> int:
        answer = self._answers.get(state)
        if answer is None:
            answer = self._answers[state] = self._script(state.prompt_token_ids)
        return answer[min(len(state.answer), len(answer) - 1)]


class ChainExecutor(TinyExecutor):
    """Prefills 100,000 tokens a second: a token's KV state is a number made of its id and of the state before it.

    Before it computes anything for a request it compares all KV state that the request got from the cache with what its
    tokens give, and fails the step where they differ. It does not sample: each token is 0 (see `ScriptedExecutor`).
    """

    def __init__(self, *, num_blocks: int, block_size: int, vocab: int) -> None:
        super().__init__(num_blocks=num_blocks, block_size=block_size, vocab=vocab)
        self._computed: dict[str, tuple[int, int]] = {}  # by request id: how many tokens, and the state of the last

    def compute(self, sequence: ScheduledSequence, start: int, stop: int) -> NDArray[np.float32]:
        blocks = np.array([block.block_id for block in sequence.held.blocks])
        computed, state = self._computed.get(sequence.request_id, (-1, 0))
        if computed != start:
            state = self._checked_state(sequence, blocks, start)
        states = list(accumulate(sequence.chain.slice(start, stop), _after, initial=state))
        at = np.arange(start, stop)
        self.pool.words[blocks[at // self.pool.block_size], at % self.pool.block_size, 0] = states[1:]
        self._computed[sequence.request_id] = (stop, states[-1])
        return np.broadcast_to(np.float32(0), (stop - start, self.vocab))

    def _sample(
        self,
        sequence: ScheduledSequence,
        logits: NDArray[np.float32],
        sampling: Mapping[str, SamplingState],
        output: StepOutput,
    ) -> None:
        output.tokens[sequence.request_id] = SampledToken(0, None)

    def _checked_state(self, sequence: ScheduledSequence, blocks: NDArray[np.int64], stop: int) -> int:
        """The state of the last of the first ``stop`` tokens, once those of all are what they must be."""
        states = list(accumulate(sequence.chain.slice(0, stop), _after, initial=0))
        found = self.pool.words[blocks[: -(-stop // self.pool.block_size)], :, 0].reshape(-1)[:stop]
        assert np.array_equal(found, np.array(states[1:], dtype=np.uint64)), "cached KV state is not that of its tokens"
        return states[-1]


def _after(state: int, token: int) -> int:
    return ((state ^ (token + 1)) * _MULTIPLIER + 1) & _WORD
