"""Requests to the engine: sampling parameters, limits, and the tokens that come back. Token ids only, never text."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, get_args

import numpy as np
from numpy.typing import NDArray

from emberkv.core.hashing import token_array
from emberkv.core.sequence import FinishReason
from emberkv.errors import EmberError, PromptTooLongError, RequestError
from emberkv.tiers.stats import StackStats, TierStats

MAX_TOP_LOGPROBS = 20
MAX_STOP_STRINGS = 16
REPETITION_PENALTIES = (0.01, 100.0)
"""Lowest and highest; beyond them, products with a model's scores would leave the range of float32."""
MAX_LOGIT_BIAS = 100.0
MAX_STOP_TOKENS = 256
MAX_CONSTRAINT_BYTES = 512 << 10


def _require(condition: bool, param: str, given: object, accepted: str) -> None:
    if not condition:
        raise RequestError(f"{param} is {given!r}; it must be {accepted}", param=param)


ConstraintKind = Literal["json_schema", "json_object", "regex", "lark"]


@dataclass(frozen=True, slots=True)
class Constraint:
    """Which texts an answer may be; `engine.constraints` compiles it to masks over the vocabulary.

    kind: what ``text`` is: a JSON schema, a regular expression (Rust's syntax, matched as a whole), or a grammar in
    llguidance's variant of Lark with the rule ``start``. "json_object" is any JSON object, and its text is empty.
    markers: texts in the grammar that the model may write as special tokens; all other special tokens are excluded.
    lenient: keywords of a JSON schema that are not implemented are passed over instead of refused.

    Raises RequestError for another kind, and for a text of more than `MAX_CONSTRAINT_BYTES`. ::

        Constraint("json_schema", '{"type": "object", "properties": {"age": {"type": "integer"}}}')
    """

    kind: ConstraintKind
    text: str = ""
    markers: tuple[str, ...] = ()
    lenient: bool = False

    def __post_init__(self) -> None:
        kinds = get_args(ConstraintKind)
        _require(self.kind in kinds, "constraint", self.kind, f"one of {', '.join(kinds)}")
        size = len(self.text.encode(errors="replace"))
        if size > MAX_CONSTRAINT_BYTES:
            raise RequestError(
                f"the constraint has {size} bytes; it must have at most {MAX_CONSTRAINT_BYTES}", param="constraint"
            )


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose tokens, and when to stop.

    temperature: 0 is greedy; the range is [0, 2].
    top_p: in (0, 1]; however small, it keeps the likeliest token.
    top_k: 0 keeps all tokens.
    logit_bias: what is added to the logits of tokens, by token id, after the penalties; each in [-100, 100].
    logprobs: None for none; otherwise how many alternatives to report beside each chosen token (0 to 20).
    prompt_logprobs: the same beside each of the prompt's tokens, which is then computed without reading the cache.
    stop_token_ids: tokens that end the answer beside the model's end of sequence, and are no part of it either.
    min_tokens: before so many, the answer cannot end, unless the constraint allows nothing else.
    seed: with one, the same prompt and parameters give the same tokens whatever else is being served.
    constraint: which texts the answer may be; it ends when the text is complete, even with ignore_eos. None: any.

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
    stop_token_ids: tuple[int, ...] = ()
    min_tokens: int = 0
    constraint: Constraint | None = None

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
        _require(
            len(self.stop_token_ids) <= MAX_STOP_TOKENS,
            "stop_token_ids", len(self.stop_token_ids), f"at most {MAX_STOP_TOKENS} token ids",
        )  # fmt: skip
        _require(min(self.stop_token_ids, default=0) >= 0, "stop_token_ids", self.stop_token_ids, "token ids from 0 on")
        _require(self.min_tokens >= 0, "min_tokens", self.min_tokens, "at least 0")

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def has_penalties(self) -> bool:
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)


AllowedTokens = Callable[[Sequence[int]], NDArray[np.uint8] | None]
"""Restricts which token may come next, for example to those that continue a text by the rules of a grammar.

It is called on the engine's thread with the tokens of the answer so far, once for each token, and must be quick. It
gives uint8 ``[ceil(vocab / 8)]``, a set bit ``i % 8`` of byte ``i // 8`` allowing token ``i``, or None to allow all.
Tokens beyond the end of a shorter array are not allowed. The same answer must give the same bits. ::

    allowed = np.zeros(vocab, dtype=bool)
    allowed[[yes, no]] = True
    bits = np.packbits(allowed, bitorder="little")
    GenerationRequest("a", prompt, SamplingParams(max_tokens=1), allowed_tokens=lambda answer: bits)
"""


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One prompt to continue.

    salt: bytes mixed into the block hashes of the prompt's blocks from where its public beginning ends; only equal
    salts share these blocks. tenant: owns these blocks; the engine's time is shared fairly between tenants. session_id:
    groups requests in statistics. priority: lower is served sooner, whatever the tenant. retain_tokens: the number of
    leading prompt tokens whose blocks are retained: for ``retain_seconds`` the cache evicts other blocks first, while
    there are any. allowed_tokens: which tokens its answer may have; None: all. worker: of a cluster, the id of the one
    that is to compute it, while it can; "": any. seq_id: of a sequence whose keys and values are asked for later, by
    the tenant and this id; "": of none. borders: the numbers of tokens behind which other prompts are expected to part
    from this one, such as that of its system prompt. Engines whose hits end at checkpoints may leave one there.

    answered: how many of the last tokens of the prompt are the answer so far, which another engine has begun. The rest
    of it is what that engine would have given: penalties, the draws of a seed and ``max_tokens`` count these tokens.
    `CacheUsage` counts them as the prompt's, and prompt_logprobs are not reported again. ::

        GenerationRequest("a", [*prompt, *answer_so_far], params, answered=len(answer_so_far))
    """

    request_id: str
    prompt_token_ids: Sequence[int]
    params: SamplingParams
    salt: bytes = b""
    priority: int = 0
    tenant: str = ""
    session_id: str = ""
    retain_tokens: int = 0
    retain_seconds: float = 0.0
    allowed_tokens: AllowedTokens | None = None
    answered: int = 0
    worker: str = ""
    seq_id: str = ""
    borders: tuple[int, ...] = ()

    @property
    def checkpoints(self) -> tuple[int, ...]:
        """The numbers of tokens behind which a checkpoint is wanted: at the borders, and before the prompt's last
        token, which a repeat computes in any case. Not there for an answer of a single token: so ends a prompt that is
        computed for others to begin with, which leaves one behind its last token.
        """
        last = len(self.prompt_token_ids) - self.answered - 1
        return self.borders if self.params.max_tokens == 1 else (*self.borders, last)


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities of one token, sampled or a prompt's: natural log, of the distribution before temperature.

    logprob: None for a prompt's first token, before which there is nothing to predict it from.
    """

    token_id: int
    logprob: float | None
    top: tuple[tuple[int, float], ...]  # (token id, logprob), most likely first


@dataclass(frozen=True, slots=True)
class CacheUsage:
    """Where a prompt's tokens came from, read off the request's lease.

    tokens_by_tier: of the cached ones, those that a lower tier brought, by its name; all others were in the pool.
    """

    prompt_tokens: int
    cached_tokens: int  # reused from the prefix cache
    created_tokens: int = 0  # computed, in full blocks that later prompts can reuse
    tokens_by_tier: Mapping[str, int] = field(default_factory=dict, hash=False)

    @property
    def computed_tokens(self) -> int:
        return self.prompt_tokens - self.cached_tokens


@dataclass(frozen=True, slots=True)
class TokenOutput:
    """What one step brings for one request. ``usage`` is set from the first output on.

    The end-of-sequence token itself is not among ``token_ids``. Exactly one output has a ``finish_reason``:
    the last. ``queue_seconds`` is set on the first output only: from submit to the first step that worked on
    the request; so are ``prompt_logprobs``, of all prompt tokens, where they were asked for, ``load_seconds``: how much
    of that the loads from lower tiers took that it waited for, and ``route_seconds``: from submit at a gateway to the
    choice of a worker.

    ``refusal`` is set on an only output, with ERROR, by an engine that finds out after ``submit`` that a request cannot
    be accepted: the error that ``submit`` would have raised.
    """

    request_id: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    usage: CacheUsage | None = None
    finish_reason: FinishReason | None = None
    error: str | None = None
    queue_seconds: float | None = None
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    refusal: EmberError | None = None
    load_seconds: float = 0.0
    route_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class PrefillProgress:
    """How far the prompt of an admitted request is computed. computed_tokens: cached ones included, and those of the
    step that is being computed. prompt_tokens: all.
    """

    computed_tokens: int
    prompt_tokens: int


OutputListener = Callable[[TokenOutput], None]
"""Called on the engine's thread for each output of one request; it must return at once. One that raises is logged, its
request ends, and it is called no more.
"""


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot for metrics. What follows ``loads`` counts up from the engine's start.

    load_choices: admissions that looked below the pool, by what was decided (`LoadChoice`). transfer_errors: blocks
    lost between the pool and the tiers, by kind (`TierLink`). tiers: by name, fastest first, and stack: what they
    share; empty and None without any. pool_bytes_by_owner: of cached blocks; empty without tenants. masks_ready,
    masks_waited: of constrained answers, whether they were there when the sampler asked, or the engine's thread had to
    wait.
    """

    running: int = 0  # requests that hold blocks
    waiting: int = 0  # requests that hold none yet, or lost theirs to a preemption
    block_size: int = 0  # tokens
    block_bytes: int = 0  # of the pool, a block's
    total_blocks: int = 0
    free_blocks: int = 0  # no sequence holds them; the cached ones are among them
    cached_blocks: int = 0  # of the free ones, those that still hold a reusable prefix
    loads: int = 0  # from lower tiers, in flight
    prefix_query_tokens: int = 0
    prefix_bypass_tokens: int = 0  # not looked up, because their log-probabilities were asked for
    prefix_hit_tokens: int = 0
    evictions: int = 0  # blocks
    preemptions: int = 0
    compiled_constraints: int = 0
    masks_ready: int = 0
    masks_waited: int = 0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    checkpoints: Mapping[str, int] = field(default_factory=dict)  # by what became of them; empty where none are kept
    tier_hit_tokens: Mapping[str, int] = field(default_factory=dict)  # of the hits, brought up by a load, by tier
    load_choices: Mapping[str, int] = field(default_factory=dict)
    loaded_blocks: int = 0
    unloaded_blocks: int = 0  # a load was to bring them, and did not
    exported_blocks: int = 0
    imported_blocks: int = 0
    refused_imports: Mapping[str, int] = field(default_factory=dict)  # records, by what was wrong with them
    transfer_errors: Mapping[str, int] = field(default_factory=dict)
    pool_bytes_by_owner: Mapping[str, int] = field(default_factory=dict)
    tiers: Mapping[str, TierStats] = field(default_factory=dict)
    stack: StackStats | None = None


class Engine(Protocol):
    """What computes. All methods may be called from any thread and return at once."""

    @property
    def context_length(self) -> int:
        """The most tokens one request may hold, prompt and answer: the model's context, or the pool's size."""
        ...

    @property
    def max_prompt_tokens(self) -> int:
        """The longest prompt that is accepted; with it, the context holds at least one token of answer."""
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

    def progress(self, request_id: str) -> PrefillProgress | None:
        """How far a request's prompt is computed; None before it is admitted, and for an id that is not in flight."""
        ...

    def stats(self) -> EngineStats: ...


class EngineWrapper:
    """An `Engine` that passes all calls on to another one. Subclasses override what they change, such as `submit`."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    @property
    def context_length(self) -> int:
        return self._engine.context_length

    @property
    def max_prompt_tokens(self) -> int:
        return self._engine.max_prompt_tokens

    def submit(self, request: GenerationRequest, listener: OutputListener) -> None:
        self._engine.submit(request, listener)

    def abort(self, request_id: str) -> None:
        self._engine.abort(request_id)

    def progress(self, request_id: str) -> PrefillProgress | None:
        return self._engine.progress(request_id)

    def stats(self) -> EngineStats:
        return self._engine.stats()


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """context_length: most tokens of prompt and answer. vocab_size: token ids are below it."""

    context_length: int
    vocab_size: int
    eos_token_ids: frozenset[int]

    def end_token_ids(self, params: SamplingParams) -> frozenset[int]:
        """The tokens that end an answer with ``params``."""
        return frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self.eos_token_ids)

    def check(self, request: GenerationRequest, pool_tokens: int) -> None:
        """Raises RequestError, or PromptTooLongError when neither context nor pool could ever hold the request.

        pool_tokens: what the KV pool holds.
        """
        prompt = request.prompt_token_ids
        if not prompt:
            raise RequestError("the prompt is empty; it must have at least one token", param="prompt")
        if not self._in_vocabulary(prompt):
            wrong = next(token for token in prompt if not 0 <= token < self.vocab_size)
            raise RequestError(f"token id {wrong} is not in the vocabulary of {self.vocab_size}", param="prompt")
        for field_name in ("logit_bias", "stop_token_ids"):
            named: Iterable[int] = getattr(request.params, field_name)
            unknown = next((token for token in named if token >= self.vocab_size), None)
            if unknown is not None:
                raise RequestError(
                    f"{field_name} names token id {unknown}; the vocabulary has {self.vocab_size}", param=field_name
                )
        if not 0 <= request.answered < min(len(prompt), request.params.max_tokens):
            raise RequestError(
                f"answered is {request.answered}; it must be at least 0, and less than the {len(prompt)} tokens given "
                f"and max_tokens, {request.params.max_tokens}",
                param="answered",
            )
        limit = min(self.context_length, pool_tokens)
        given = len(prompt) - request.answered
        total = given + request.params.max_tokens
        if total > limit:
            source = "the model's context" if limit == self.context_length else "the KV pool"
            raise PromptTooLongError(
                f"{given} prompt tokens and {request.params.max_tokens} to generate are {total}; "
                f"{source} holds {limit}",
                param="prompt" if given >= limit else "max_tokens",
                prompt_tokens=given,
                wanted=None if given >= limit else request.params.max_tokens,
                limit=limit,
            )

    def _in_vocabulary(self, prompt: Sequence[int]) -> bool:
        try:
            tokens = np.frombuffer(token_array(prompt), dtype=np.int32)
        except OverflowError:
            return False
        return bool(tokens.min() >= 0 and tokens.max() < self.vocab_size)
