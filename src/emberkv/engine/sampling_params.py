"""What a request asks of the sampler. Free of torch, so that API modules can build it."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from emberkv.errors import RequestError

MAX_TOP_LOGPROBS = 20
MAX_STOP_STRINGS = 16
REPETITION_PENALTIES = (0.01, 100.0)
"""Lowest and highest; beyond them, products with a model's scores would leave the range of float32."""
MAX_LOGIT_BIAS = 100.0


def _require(condition: bool, param: str, given: object, accepted: str) -> None:
    if not condition:
        raise RequestError(f"{param} is {given!r}; it must be {accepted}", param=param)


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose tokens, and when to stop.

    temperature: 0 is greedy; the range is [0, 2].
    top_p: in (0, 1]; however small, it keeps the likeliest token.
    top_k: 0 keeps all tokens.
    logit_bias: what is added to the logits of tokens, by token id, after the penalties; each in [-100, 100].
    logprobs: None for none; otherwise how many alternatives to report beside each chosen token (0 to 20).
    prompt_logprobs: the same beside each of the prompt's tokens, which is then computed without reading the cache.
    seed: with one, the same prompt and parameters give the same tokens whatever else is being served.

    Raises RequestError naming the field when a value is out of range.
    """

    max_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        _require(self.max_tokens >= 1, "max_tokens", self.max_tokens, "at least 1")
        _require(0.0 <= self.temperature <= 2.0, "temperature", self.temperature, "from 0 to 2")
        _require(0.0 < self.top_p <= 1.0, "top_p", self.top_p, "above 0 and at most 1")
        _require(self.top_k >= 0, "top_k", self.top_k, "0 (all tokens) or more")
        _require(0.0 <= self.min_p <= 1.0, "min_p", self.min_p, "from 0 to 1")
        lowest, highest = REPETITION_PENALTIES
        _require(
            lowest <= self.repetition_penalty <= highest,
            "repetition_penalty", self.repetition_penalty, f"from {lowest:g} to {highest:g}",
        )  # fmt: skip
        _require(-2.0 <= self.presence_penalty <= 2.0, "presence_penalty", self.presence_penalty, "from -2 to 2")
        _require(-2.0 <= self.frequency_penalty <= 2.0, "frequency_penalty", self.frequency_penalty, "from -2 to 2")
        for token_id, bias in self.logit_bias.items():
            _require(token_id >= 0, "logit_bias", token_id, "for token ids from 0 on")
            _require(abs(bias) <= MAX_LOGIT_BIAS, "logit_bias", bias, f"from -{MAX_LOGIT_BIAS:g} to {MAX_LOGIT_BIAS:g}")
        _require(
            self.logprobs is None or 0 <= self.logprobs <= MAX_TOP_LOGPROBS,
            "logprobs", self.logprobs, f"from 0 to {MAX_TOP_LOGPROBS}",
        )  # fmt: skip
        _require(
            self.prompt_logprobs is None or 0 <= self.prompt_logprobs <= MAX_TOP_LOGPROBS,
            "logprobs", self.prompt_logprobs, f"from 0 to {MAX_TOP_LOGPROBS}",
        )  # fmt: skip
        _require(self.seed is None or -(2**63) <= self.seed < 2**63, "seed", self.seed, "a 64-bit integer")
        _require(len(self.stop) <= MAX_STOP_STRINGS, "stop", len(self.stop), f"at most {MAX_STOP_STRINGS} strings")
        _require(all(self.stop), "stop", self.stop, "made of non-empty strings")

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def has_penalties(self) -> bool:
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)
