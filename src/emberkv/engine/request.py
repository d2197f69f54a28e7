"""What goes into the engine loop and what comes out of it: token ids only, never text."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from emberkv.core.sequence import FinishReason
from emberkv.engine.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One prompt to continue.

    salt: bytes mixed into the root of the prompt's block identities; only equal salts share blocks.
    priority: lower is served sooner; equal priorities are first come, first served.
    """

    request_id: str
    prompt_token_ids: Sequence[int]
    params: SamplingParams
    salt: bytes = b""
    priority: int = 0


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

    @property
    def computed_tokens(self) -> int:
        return self.prompt_tokens - self.cached_tokens


@dataclass(frozen=True, slots=True)
class TokenOutput:
    """One step's news of one request. ``usage`` is set from the first output on.

    The end-of-sequence token itself is not among ``token_ids``. Exactly one output has a ``finish_reason``:
    the last.
    """

    request_id: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    usage: CacheUsage | None = None
    finish_reason: FinishReason | None = None
    error: str | None = None


OutputListener = Callable[[TokenOutput], None]
"""Called on the engine's thread for each output of one request; it must return at once."""
