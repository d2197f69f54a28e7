"""Constraints for structured output: their checks, and their token masks, compiled by llguidance and computed on other
threads than the engine's.
"""

import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Protocol

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
from numpy.typing import NDArray

from emberkv.engine.request import Constraint
from emberkv.errors import EngineStoppedError, RequestError, SamplingError, reason_of

GRAMMAR_LIMITS = LLParserLimits(
    initial_lexer_fuel=1_000_000,  # about 20 ms
    step_lexer_fuel=200_000,  # about 15 ms for one mask
    step_max_items=50_000,
    max_lexer_states=50_000,  # of 1 to 2 kB each
    max_grammar_size=500_000,
    verbose_errors=False,  # these texts may be logged, and the grammar is the client's
)
"""Bounds of a grammar's work, while it is compiled and for each mask, and of its memory."""

GUIDANCE_OPTIONS = "x-guidance"
"""The keyword by which llguidance takes options within a JSON schema. Requests may not set it."""

JSON_WHITESPACE = r" ?|\n[ \t]{0,32}"
"""Between two tokens of JSON: what compact and indented texts have. Without a bound, a weak model may fill its answer
with white space.
"""

_MAX_TRIES = 200
_SUBSCHEMA = frozenset({"items", "additionalProperties", "not", "if", "then", "else", "contains", "propertyNames"})
_DEFINITIONS = ("$defs", "definitions")
_SUBSCHEMA_MAPS = frozenset({"properties", "patternProperties", "dependentSchemas", *_DEFINITIONS})
_SUBSCHEMA_LISTS = frozenset({"anyOf", "oneOf", "allOf", "prefixItems"})


def check_constraint(constraint: Constraint, param: str = "constraint") -> Constraint:
    """Return the constraint if it can be compiled. This needs no tokenizer, so a process without a model can check.

    param: the request's field that the constraint comes from, for errors.

    Raises RequestError for a constraint that cannot be compiled, and names the place in the schema or the grammar.
    """
    fault = _fault(constraint)
    if fault is not None:
        raise RequestError(f"{param} cannot be compiled: {fault}", param=param)
    return constraint


@lru_cache(maxsize=64)
def _fault(constraint: Constraint) -> str | None:
    """Why the constraint cannot be compiled; None if it can."""
    schema: Any = None
    if constraint.kind == "json_schema":
        try:
            schema = json.loads(constraint.text)
        except (ValueError, RecursionError) as error:
            return f"it is not valid JSON: {reason_of(error)}"
        if not isinstance(schema, dict | bool):
            return f"it is {type(schema).__name__}; a JSON schema is an object"
        if isinstance(schema, dict) and GUIDANCE_OPTIONS in schema:
            return f"it has {GUIDANCE_OPTIONS}, which is not a keyword of JSON Schema; leave it out"
    message = _message_about(grammar_of(constraint))
    if message is None:
        return None
    place = f"{_place(schema, message, constraint.lenient)}: " if isinstance(schema, dict) else ""
    return reason_of(ValueError(f"{place}{_without_listing(message)}"))


def _message_about(grammar: str) -> str | None:
    """llguidance's error for a grammar; None for a valid one."""
    is_error, messages = LLMatcher.validate_grammar_with_warnings(grammar, limits=GRAMMAR_LIMITS)
    return messages[0] if is_error else None


def grammar_of(constraint: Constraint) -> str:
    """The constraint as a grammar for `LLMatcher`."""
    match constraint.kind:
        case "json_object":
            return _schema_grammar({"type": "object"}, lenient=False)
        case "json_schema":
            return _schema_grammar(json.loads(constraint.text), constraint.lenient)
        case "regex":
            return LLMatcher.grammar_from_regex(constraint.text)
        case "lark":
            return LLMatcher.grammar_from_lark(constraint.text)


def _schema_grammar(schema: object, lenient: bool) -> str:
    overrides: Any = {"whitespace_pattern": JSON_WHITESPACE, **({"lenient": True} if lenient else {})}
    return LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=overrides)


def _without_listing(message: str) -> str:
    """llguidance's message without the excerpt of the grammar below it."""
    return "\n".join(line for line in message.splitlines() if "|" not in line[:8] and line.strip(" ^"))


def _place(schema: dict[str, Any], message: str, lenient: bool) -> str:
    """The JSON pointer of the innermost subschema with the same error; "#" for the whole schema.

    llguidance reports the error without its place, so each subschema is validated on its own, with the definitions of
    the whole schema, in at most `_MAX_TRIES` tries.
    """
    definitions = {name: schema[name] for name in _DEFINITIONS if name in schema}
    tries, place = _MAX_TRIES, "#"
    parts = list(_parts(schema, place))
    while parts and tries:
        pointer, part = parts.pop(0)
        tries -= 1
        if isinstance(part, dict) and _message_about(_schema_grammar({**definitions, **part}, lenient)) == message:
            place, parts = pointer, list(_parts(part, pointer))
    return place


def _parts(schema: dict[str, Any], pointer: str) -> Iterator[tuple[str, Any]]:
    """The direct subschemas of a schema, each with its JSON pointer."""
    for key, value in sorted(schema.items(), key=lambda item: item[0] not in _DEFINITIONS):
        if key in _SUBSCHEMA and isinstance(value, dict):
            yield f"{pointer}/{key}", value
        elif key in _SUBSCHEMA_MAPS and isinstance(value, dict):
            yield from ((f"{pointer}/{key}/{name}", part) for name, part in value.items())
        elif key in _SUBSCHEMA_LISTS and isinstance(value, list):
            yield from ((f"{pointer}/{key}/{index}", part) for index, part in enumerate(value))


MAX_COMPILED = 64
"""Compiled constraints that are cached for later requests; the least recently used are evicted."""

_MAX_TOKENIZERS = 4
_COMPILE_THREADS = 2
_MASK_THREADS = 2


@dataclass(frozen=True, slots=True)
class _Vocabulary:
    """A tokenizer's vocabulary.

    tokens: the bytes of each token, by id. special: the ids of special tokens, by text. unused: ids without a token.
    eos: ids of the tokens that end an answer.
    """

    tokens: list[bytes]
    special: dict[str, int]
    unused: list[int]
    eos: list[int]


_Compiled = tuple[LLMatcher, frozenset[int]]
"""A matcher in its initial state, which is copied for each answer, and the ids of the tokens that end an answer."""


class GrammarTokenizer(Protocol):
    """The part of a tokenizer that grammars need."""

    def backend_json(self) -> str:
        """The JSON serialization of the tokenizers library."""
        ...

    def text_encoder(self, markers: Collection[str]) -> Callable[[str], Sequence[int]]:
        """A function that encodes text as part of a longer text. Of the special tokens, it recognizes ``markers``."""
        ...


class _Encoder(TokenizerWrapper):
    """The tokenizer interface that llguidance expects: bytes of tokens, ids of special tokens, and encoding.

    When llguidance reads a tokenizer itself, it treats all added tokens that look like tags as special.
    """

    def __init__(
        self, tokens: Sequence[bytes], special: Sequence[int], eos: int, encode: Callable[[str], Sequence[int]]
    ) -> None:
        self.tokens = tokens
        self.special_token_ids = special
        self.eos_token_id = eos
        self.bos_token_id = None
        self.is_tokenizer_wrapper = True
        self._encode = encode

    def __call__(self, text: str) -> list[int]:
        return list(self._encode(text))


@dataclass(slots=True)
class MaskCounts:
    """Counts since the engine's start.

    compiled: compiled constraints. ready: masks that were computed when the sampler needed them. waited: masks that the
    engine's thread had to wait for.
    """

    compiled: int = 0
    ready: int = 0
    waited: int = 0


@dataclass(frozen=True, slots=True)
class _Matched:
    """A matcher that has consumed the tokens of an answer so far.

    mask: bits of the allowed next tokens, uint8 ``[ceil(vocab / 8)]``. ends: ids of the tokens that end the answer.
    """

    matcher: LLMatcher
    mask: NDArray[np.uint8]
    ends: frozenset[int]


def advance(matcher: LLMatcher, token_ids: Sequence[int]) -> NDArray[np.uint8]:
    """Consume the tokens and return the mask of the next token, uint8 ``[ceil(vocab / 8)]``.

    Raises SamplingError for tokens that the grammar does not allow, and for a mask that takes more work than
    `GRAMMAR_LIMITS` allows.
    """
    if token_ids:
        matcher.consume_tokens(list(token_ids))
    mask = matcher.compute_bitmask() if not matcher.is_error() else b""
    if matcher.is_error():
        raise SamplingError(f"the constraint cannot be followed further: {reason_of(ValueError(matcher.get_error()))}")
    return np.frombuffer(mask, dtype=np.uint8)


def _advanced(matcher: LLMatcher, ends: frozenset[int], token_ids: Sequence[int]) -> _Matched:
    return _Matched(matcher, advance(matcher, token_ids), ends)


class AnswerMasks:
    """The masks of one answer, token by token. All methods are called from the engine's thread.

    When a token has been sampled, a worker thread computes the next mask without the GIL, while the model computes the
    next logits.
    """

    def __init__(self, begun: "Future[_Matched]", workers: ThreadPoolExecutor, counts: MaskCounts) -> None:
        self._next = begun
        self._workers = workers
        self._counts = counts

    @property
    def is_ready(self) -> bool:
        """Whether the next mask is computed. Before the first token: whether compilation has succeeded or failed."""
        return self._next.done()

    @property
    def refusal(self) -> RequestError | None:
        """The error of compilation, or of the answer's first tokens; None if there is none. Blocks until `is_ready`."""
        error = self._next.exception()
        return None if error is None else RequestError(str(error), param="constraint")

    def on_ready(self, call: Callable[[], None]) -> None:
        """Call ``call`` once `is_ready`, on a worker thread, or at once if it is."""
        self._next.add_done_callback(lambda _: call())

    def allowed(self) -> NDArray[np.uint8]:
        """The mask of the next token, uint8 ``[ceil(vocab / 8)]``. Blocks until it is computed.

        Raises SamplingError if the mask takes more work than `GRAMMAR_LIMITS` allows.
        """
        if self._next.done():
            self._counts.ready += 1
        else:
            self._counts.waited += 1
        return self._next.result().mask

    def append(self, token_id: int) -> None:
        """Add an allowed token to the answer, and start computing the next mask. Returns at once."""
        before = self._next.result()
        if token_id not in before.ends:
            self._next = self._workers.submit(_advanced, before.matcher, before.ends, (token_id,))

    def ends_with(self, token_id: int) -> bool:
        """Whether an allowed token ends the answer."""
        return token_id in self._next.result().ends


class ConstraintCompiler:
    """Compiles constraints for one model. Methods may be called from any thread; `begin` and `close` do not block.

    tokenizer: read when the first constraint is compiled. vocab_size: of the model's logits. eos_token_ids: tokens that
    end an answer; if empty, the tokenizer's own end token does.
    """

    def __init__(
        self, tokenizer: GrammarTokenizer, *, vocab_size: int, eos_token_ids: frozenset[int] = frozenset()
    ) -> None:
        self.counts = MaskCounts()
        self._source = tokenizer
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._compiling = ThreadPoolExecutor(_COMPILE_THREADS, "emberkv-compile")
        self._workers = ThreadPoolExecutor(_MASK_THREADS, "emberkv-masks")
        self._one_at_a_time = threading.Lock()  # guards compilation and _tokenizers
        self._tokenizers: OrderedDict[frozenset[str], LLTokenizer] = OrderedDict()
        self._lock = threading.Lock()  # guards _compiled and _is_closed; never held during compilation
        self._compiled: OrderedDict[Constraint, _Compiled] = OrderedDict()
        self._is_closed = False

    def begin(self, constraint: Constraint, answer: Sequence[int] = ()) -> AnswerMasks:
        """The masks of an answer, compiled on another thread. answer: tokens that the answer has already.

        Raises EngineStoppedError after `close`.
        """
        with self._lock:
            if self._is_closed:
                raise EngineStoppedError("the engine has stopped; no constraint can be compiled")
            begun = self._compiling.submit(self._begin, constraint, answer)
        return AnswerMasks(begun, self._workers, self.counts)

    def close(self) -> None:
        """Stop compiling constraints and computing masks. Idempotent."""
        with self._lock:
            self._is_closed = True
        self._compiling.shutdown(wait=False, cancel_futures=True)
        self._workers.shutdown(wait=False)

    def matcher(self, constraint: Constraint) -> LLMatcher:
        """A matcher in its initial state, compiled on the calling thread. Raises RequestError if compilation fails."""
        return self._compiled_once(constraint)[0].deep_copy()

    def _begin(self, constraint: Constraint, answer: Sequence[int]) -> _Matched:
        matcher, ends = self._compiled_once(constraint)
        return _advanced(matcher.deep_copy(), ends, answer)

    def _compiled_once(self, constraint: Constraint) -> _Compiled:
        """The compiled constraint, from the cache or compiled now. Raises RequestError if compilation fails."""
        if (known := self._known(constraint)) is not None:
            return known
        with self._one_at_a_time:
            if (known := self._known(constraint)) is not None:
                return known  # another thread has compiled it meanwhile
            compiled = self._compile(constraint)
            with self._lock:
                self.counts.compiled += 1
                self._compiled[constraint] = compiled
                if len(self._compiled) > MAX_COMPILED:
                    self._compiled.popitem(last=False)
            return compiled

    def _known(self, constraint: Constraint) -> _Compiled | None:
        with self._lock:
            if constraint in self._compiled:
                self._compiled.move_to_end(constraint)
            return self._compiled.get(constraint)

    def _compile(self, constraint: Constraint) -> _Compiled:
        tokenizer = self._tokenizer(constraint.markers)
        matcher = LLMatcher(tokenizer, grammar_of(constraint), log_level=0, limits=GRAMMAR_LIMITS)
        if matcher.is_error():
            raise RequestError(f"the constraint cannot be compiled: {reason_of(ValueError(matcher.get_error()))}")
        return matcher, frozenset(tokenizer.eos_tokens)

    def _tokenizer(self, markers: Sequence[str]) -> LLTokenizer:
        """A tokenizer for llguidance in which the special tokens ``markers`` are text that a grammar can match.

        Raises RequestError for a type of tokenizer that llguidance does not support.
        """
        vocabulary = self._vocabulary
        special, ends = vocabulary.special, vocabulary.eos
        shown = frozenset(text for text in markers if special.get(text, ends[0]) not in ends)
        if shown not in self._tokenizers:
            hidden = [*vocabulary.unused, *(each for text, each in special.items() if text not in shown)]
            encoder = _Encoder(vocabulary.tokens, hidden, ends[0], self._source.text_encoder(shown))
            self._tokenizers[shown] = LLTokenizer(encoder, n_vocab=len(vocabulary.tokens), eos_token=vocabulary.eos)
            if len(self._tokenizers) > _MAX_TOKENIZERS:
                self._tokenizers.popitem(last=False)
        self._tokenizers.move_to_end(shown)
        return self._tokenizers[shown]

    @cached_property
    def _vocabulary(self) -> _Vocabulary:
        described = json.loads(self._source.backend_json())
        added = {token["id"]: token for token in described["added_tokens"]}
        known = len(described["model"]["vocab"])
        size = max(self._vocab_size, known, max(added, default=0) + 1)
        try:
            read = LLTokenizer(json.dumps(described), n_vocab=size, eos_token=sorted(self._eos_token_ids) or None)
        except (ValueError, RuntimeError) as error:
            raise RequestError(f"answers of this model cannot be constrained: {reason_of(error)}") from error
        return _Vocabulary(
            [read.decode_bytes([token_id]) for token_id in range(size)],
            {token["content"]: token_id for token_id, token in added.items() if token["special"]},
            [token_id for token_id in range(known, size) if token_id not in added],
            read.eos_tokens,
        )
