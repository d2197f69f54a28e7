"""What goes into the engine loop and what comes out of it: token ids only, never text."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from emberkv.core.sequence import FinishReason
from emberkv.engine.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One prompt to continue.

    salt: bytes mixed into the identities of the prompt's blocks from where its public beginning ends; only equal salts
    share these blocks. tenant: on whose books they are.
    priority: lower is served sooner; equal priorities are first come, first served.
    """

    request_id: str
    prompt_token_ids: Sequence[int]
    params: SamplingParams
    salt: bytes = b""
    priority: int = 0
    tenant: str = ""


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities of one sampled token: natural log, of the distribution before temperature."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]  # (token id, logprob), most likely first


@dataclass(frozen=True, slots=True)
class CacheUsage:
    """Where a prompt's tokens came from, read off the request's lease."""

    prompt_tokens: int
    cached_tokens: int  # reused from the prefix cache
    created_tokens: int = 0  # computed, in full blocks that later prompts can reuse

    @property
    def computed_tokens(self) -> int:
        return self.prompt_tokens - self.cached_tokens


@dataclass(frozen=True, slots=True)
class TokenOutput:
    """One step's news of one request. ``usage`` is set from the first output on.

    The end-of-sequence token itself is not among ``token_ids``. Exactly one output has a ``finish_reason``:
    the last. ``queue_seconds`` is set on the first output only: from submit to the first step that worked on
    the request.
    """

    request_id: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    usage: CacheUsage | None = None
    finish_reason: FinishReason | None = None
    error: str | None = None
    queue_seconds: float | None = None


OutputListener = Callable[[TokenOutput], None]
"""Called on the engine's thread for each output of one request; it must return at once."""


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot for metrics. Everything after ``cached_blocks`` counts up from the engine's start."""

    running: int = 0  # requests that hold blocks
    waiting: int = 0  # requests that hold none yet, or lost theirs to a preemption
    total_blocks: int = 0
    free_blocks: int = 0  # nobody holds them; the cached ones are among them
    cached_blocks: int = 0  # of the free ones, those that still hold a reusable prefix
    prefix_query_tokens: int = 0
    prefix_hit_tokens: int = 0
    evictions: int = 0  # blocks
    preemptions: int = 0
    prefill_tokens: int = 0
    decode_tokens: int = 0


class Engine(Protocol):
    """What computes. All methods may be called from any thread and return at once."""

    @property
    def context_length(self) -> int:
        """The most tokens one request may hold, prompt and answer: the model's context, or the pool's size."""
        ...

    @property
    def max_prompt_tokens(self) -> int:
        """The longest prompt that is accepted; it leaves room for at least one token of answer."""
        ...

    def submit(self, request: GenerationRequest, listener: OutputListener) -> None:
        """Queue a request.

        Raises PromptTooLongError when it can never fit, RequestError when a token id is not in the
        vocabulary, EngineStoppedError after the engine has stopped. No output follows a raise.
        """
        ...

    def abort(self, request_id: str) -> None:
        """End a request; its listener gets FinishReason.ABORT. Unknown and finished ids are ignored."""
        ...

    def stats(self) -> EngineStats: ...
