"""The contract between the engine and what computes: a step's plan in, its sampled tokens out, all plain data.

`emberkv.engine.torch.engine.TorchEngine` implements it with PyTorch. The engine's loop and what connects the tiers to
the pool know this module alone, and import no torch, as this module does not.

An executor owns the bytes of the KV pool, the sampler, and the check for logits that are not finite. The scheduler owns
which block holds what, and the loop owns the requests. All calls come from one thread at a time, the engine's.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from emberkv.core.sequence import StepPlan
from emberkv.engine.request import AllowedTokens, SamplingParams, TokenLogprobs
from emberkv.errors import SamplingError
from emberkv.tensors import TensorBytes

NOT_NUMBERS = "the model's scores for the next token are not numbers"
"""The reason for which a request fails whose logits hold a NaN, or are not finite at their maximum."""


class TokenMasks(Protocol):
    """Which tokens may follow an answer by its constraint; `emberkv.engine.constraints` has them."""

    def allowed(self) -> NDArray[np.uint8]:
        """As `AllowedTokens` gives them, for the token behind those of the answer so far. Raises SamplingError."""
        ...

    def append(self, token_id: int) -> None:
        """The answer has got this token, which was allowed. Returns at once."""
        ...

    def ends_with(self, token_id: int) -> bool:
        """Whether an allowed token says that the answer is complete."""
        ...


class SamplingState:
    """What an executor needs to sample one request's tokens, and the tokens of the answer so far.

    An executor changes a row of logits in this order: penalties, ``params.logit_bias``, `allowed_tokens`, temperature,
    top_k, top_p, min_p. Reported log-probabilities are of the logits before any change.

    The loop makes one for each request, calls `append` for each token that becomes part of the answer, and keeps the
    state when the request is preempted. Executors may keep memory of their own for a state, by weak reference.

    rng: draws for requests without a seed, and may be shared; a seed gives the request a generator of its own.
    masks: of the request's constraint; `allowed` is None then.
    prompt_token_ids: without the ``answer``, which are the tokens that another engine has chosen already; the draws for
    these are passed over.

    end_token_ids: the tokens that end the answer; none is allowed within its first ``params.min_tokens``, unless
    ``allowed`` leaves no other.

    answer: the tokens so far, not to be changed by executors. changes_logits: whether the request has penalties, a
    bias or a restriction to some tokens. is_plain_greedy: whether the most likely token is all that it asks for.
    """

    __slots__ = (
        "__weakref__",
        "_allowed",
        "_masks",
        "_rng",
        "answer",
        "changes_logits",
        "end_token_ids",
        "is_plain_greedy",
        "params",
        "prompt_token_ids",
    )

    def __init__(
        self,
        params: SamplingParams,
        prompt_token_ids: Sequence[int],
        rng: random.Random,
        allowed: AllowedTokens | None = None,
        *,
        answer: Sequence[int] = (),
        end_token_ids: frozenset[int] = frozenset(),
        masks: TokenMasks | None = None,
    ) -> None:
        self.params = params
        self.prompt_token_ids = prompt_token_ids
        self.answer = list(answer)
        self.end_token_ids = end_token_ids
        is_restricted = allowed is not None or masks is not None or len(self.answer) < params.min_tokens
        self.changes_logits = params.has_penalties or bool(params.logit_bias) or is_restricted
        self.is_plain_greedy = params.is_greedy and params.logprobs is None and not self.changes_logits
        self._allowed = allowed
        self._masks = masks
        self._rng = rng if params.seed is None else random.Random(params.seed % 2**64)
        if params.seed is not None and not params.is_greedy:
            for _ in self.answer:
                self.draw()

    def append(self, token_id: int) -> None:
        """Record a token of the answer, once it is chosen."""
        self.answer.append(token_id)
        if self._masks is not None:
            self._masks.append(token_id)

    def ends_with(self, token_id: int) -> bool:
        """Whether this token, which was chosen, ends the answer: for any request, or because it completes a text that
        the request's constraint asks for.
        """
        return token_id in self.end_token_ids or (self._masks is not None and self._masks.ends_with(token_id))

    def allowed_tokens(self, vocab: int) -> NDArray[np.bool_] | None:
        """``[vocab]``: whether each token may come next; None where all may. Raises SamplingError where none may."""
        if self._masks is not None:
            bits: NDArray[np.uint8] | None = self._masks.allowed()
        else:
            bits = self._allowed(self.answer) if self._allowed is not None else None
        must_go_on = len(self.answer) < self.params.min_tokens
        if bits is None and not must_go_on:
            return None
        allowed = np.ones(vocab, np.bool_)
        if bits is not None:
            allowed = np.unpackbits(bits, count=vocab, bitorder="little").view(np.bool_)
            if not allowed.any():
                raise SamplingError("the request allows no token next; it must allow at least one")
        return self._without_ends(allowed) if must_go_on else allowed

    def _without_ends(self, allowed: NDArray[np.bool_]) -> NDArray[np.bool_]:
        rest = allowed.copy()
        rest[[token for token in self.end_token_ids if token < len(rest)]] = False
        return rest if rest.any() else allowed

    def draw(self) -> float:
        """The request's next random number, in [0, 1). An executor takes one for each token it does not take greedily,
        so that a seed gives the same tokens whatever else the step computes.
        """
        return self._rng.random()


@dataclass(frozen=True, slots=True)
class SampledToken:
    """A chosen token, with its log-probabilities where the request asked for them."""

    token_id: int
    logprobs: TokenLogprobs | None


@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """Log-probabilities of a prompt's tokens at positions ``[start, start + len(tokens))``.

    start: at least 1, as nothing predicts the first token.
    """

    request_id: str
    start: int
    tokens: Sequence[TokenLogprobs]


@dataclass(frozen=True, slots=True)
class StepOutput:
    """The results of a step.

    tokens: by request id, the next token of each sequence whose tokens are all computed now: of each of the plan's
    decodes, and of each chunk with `PrefillChunk.samples`, unless the request failed.
    failed: by request id, why a request cannot go on (logits that are not numbers, an error in sampling). The step's
    other requests are not affected. What the step computed of a failed request must not be committed.
    prompt_logprobs: for each chunk of a request with ``params.prompt_logprobs``, those of the tokens that its positions
    predict, as far as these are the prompt's; in the plan's order. A sequence computed again after a preemption gets
    them again.
    """

    tokens: dict[str, SampledToken] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    prompt_logprobs: list[PromptLogprobs] = field(default_factory=list)


class KVStorage(Protocol):
    """The bytes of the KV pool, block by block. Blocks are equally large, and their layout is the executor's own."""

    @property
    def num_blocks(self) -> int: ...

    @property
    def block_size(self) -> int:
        """Tokens of a block."""
        ...

    @property
    def block_bytes(self) -> int: ...

    @property
    def layer_bytes(self) -> int:
        """Of what `read_layer` gives of one block."""
        ...

    def read_blocks(self, block_ids: Sequence[int], /) -> list[memoryview]:
        """Copies of the contents of blocks, ``block_bytes`` each; later steps do not change them.

        Raises MemoryError when there is no memory for the copies.
        """
        ...

    def read_beginning(self, block_id: int, num_tokens: int, /) -> memoryview:
        """As `read_blocks`, of a block of which only the first tokens are computed: the copy's other keys and values
        are zero, whatever lies there of former sequences. A state is the one after the last of these tokens. Raises
        as `read_blocks` does.
        """
        ...

    def read_layer(self, block_ids: Sequence[int], layer: int, /) -> tuple[TensorBytes, TensorBytes]:
        """Copies of the keys and the values that blocks hold of the model's layer of that number, each
        ``[len(block_ids) * block_size, kv_heads, head_dim]``.

        Raises UnknownLayerError for a layer that there is not, RequestError for one without attention, MemoryError when
        there is no memory for the copies.
        """
        ...

    def write_block(self, block_id: int, content: bytes | memoryview, /) -> None:
        """Put back into any block what `read_blocks` gave, in this process or in one of the same namespace.

        Raises ConfigError for any other number of bytes, MemoryError when there is no memory for the copy.
        """
        ...


class Executor(Protocol):
    """Computes planned steps over a KV pool of its own.

    alignment: prefill gives tokens ``[k * alignment, (k + 1) * alignment)`` the same KV bits in whatever chunks, steps
    and batches it computes them; a multiple of the block size. batch_invariant: decode steps, and chunks that begin at
    any token, give them the same bits as well. hits_within_blocks: a sequence can be continued from the beginning of a
    block that another one filled; False where a block holds some state after its last computed token alone, so that a
    copy of it can be continued from there only.

    ::

        state = SamplingState(SamplingParams(temperature=0.0), prompt, random.Random())
        scheduler.add(Sequence("a", TokenChain(root, prompt, executor.pool.block_size), 16))
        plan = scheduler.schedule()
        output = executor.execute(plan, {"a": state})
        scheduler.complete(plan, {name: token.token_id for name, token in output.tokens.items()})
    """

    @property
    def backend(self) -> str:
        """What computes, as a label: "torch", "native"."""
        ...

    @property
    def description(self) -> str:
        """What computes, in a few words for people."""
        ...

    @property
    def pool(self) -> KVStorage: ...

    @property
    def alignment(self) -> int: ...

    @property
    def batch_invariant(self) -> bool: ...

    @property
    def hits_within_blocks(self) -> bool: ...

    def execute(self, plan: StepPlan, sampling: Mapping[str, SamplingState], /) -> StepOutput:
        """Make the plan's block copies, compute its tokens into the pool, and sample.

        sampling: by request id, of at least the plan's requests; states are read, and draws are taken from them.

        Raises any exception when the step as a whole fails; then all of its requests end, and the engine goes on.
        """
        ...
