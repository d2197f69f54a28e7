"""The masks of constrained answers: compiled off the engine's thread, and computed while the model computes."""

import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper
from numpy.typing import NDArray

from emberkv.engine.constraints import GRAMMAR_LIMITS, grammar_of
from emberkv.engine.request import Constraint
from emberkv.errors import EngineStoppedError, RequestError, SamplingError, reason_of

MAX_COMPILED = 64
"""Compiled constraints that are kept for further requests; of more, the ones used least recently are dropped."""

_MAX_TOKENIZERS = 4
_COMPILE_THREADS = 2
_MASK_THREADS = 2


@dataclass(frozen=True, slots=True)
class _Vocabulary:
    """tokens: the bytes of each. special: the ids of special tokens by text. unused: ids without a token.

    eos: the tokens that complete an answer.
    """

    tokens: list[bytes]
    special: dict[str, int]
    unused: list[int]
    eos: list[int]


_Compiled = tuple[LLMatcher, frozenset[int]]
"""A matcher at the beginning of an answer, to be copied, and the tokens that complete an answer."""


class GrammarTokenizer(Protocol):
    """What of a tokenizer is needed to follow grammars."""

    def backend_json(self) -> str:
        """The tokenizer as the tokenizers library writes it."""
        ...

    def text_encoder(self, markers: Collection[str]) -> Callable[[str], Sequence[int]]:
        """Encodes text of which nothing is a special token but ``markers``, as it is encoded within a longer text."""
        ...


class _Encoder(TokenizerWrapper):
    """A tokenizer as llguidance takes it: what bytes each token is, which are special, and how text is encoded.

    llguidance takes all added tokens that look like tags for special ones if it reads them from the tokenizer itself.
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
    """What has been counted since the engine's start.

    compiled: constraints. ready, waited: masks, by whether they were there when the sampler asked, or the engine's
    thread had to wait.
    """

    compiled: int = 0
    ready: int = 0
    waited: int = 0


@dataclass(frozen=True, slots=True)
class _Matched:
    """A matcher behind the tokens of an answer.

    mask: which tokens may follow, uint8 ``[ceil(vocab / 8)]``. ends: those of them that complete the answer.
    """

    matcher: LLMatcher
    mask: NDArray[np.uint8]
    ends: frozenset[int]


def advance(matcher: LLMatcher, token_ids: Sequence[int]) -> NDArray[np.uint8]:
    """Take the tokens in; the mask behind them. Raises SamplingError where they do not follow, or where the mask takes
    more work than `GRAMMAR_LIMITS` allows.
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
    """Which tokens may follow an answer, asked for token by token. It belongs to the engine's thread.

    As soon as a token is chosen, another thread computes the mask for the one behind it, without holding Python's lock,
    while the model computes the logits for it.
    """

    def __init__(self, begun: "Future[_Matched]", workers: ThreadPoolExecutor, counts: MaskCounts) -> None:
        self._next = begun
        self._workers = workers
        self._counts = counts

    @property
    def is_ready(self) -> bool:
        """Whether the next mask is there; at first, whether the constraint is compiled, or could not be."""
        return self._next.done()

    @property
    def refusal(self) -> RequestError | None:
        """Why the constraint could not be compiled, or does not fit an answer that has begun; once `is_ready`."""
        error = self._next.exception()
        return None if error is None else RequestError(str(error), param="constraint")

    def on_ready(self, call: Callable[[], None]) -> None:
        """Have ``call`` called, on another thread, when `is_ready`."""
        self._next.add_done_callback(lambda _: call())

    def allowed(self) -> NDArray[np.uint8]:
        """As `AllowedTokens` gives them, for the token behind those of the answer so far.

        Raises SamplingError where a mask takes more work than is allowed.
        """
        if self._next.done():
            self._counts.ready += 1
        else:
            self._counts.waited += 1
        return self._next.result().mask

    def append(self, token_id: int) -> None:
        """The answer has got a token that was allowed. Returns at once."""
        before = self._next.result()
        if token_id not in before.ends:
            self._next = self._workers.submit(_advanced, before.matcher, before.ends, (token_id,))

    def ends_with(self, token_id: int) -> bool:
        """Whether an allowed token says that the answer is complete."""
        return token_id in self._next.result().ends


class ConstraintCompiler:
    """Makes the masks of answers for one model. All methods may be called from any thread and return at once.

    tokenizer: read once there is a constraint. vocab_size: of the model's logits. eos_token_ids: end an answer whose
    text is complete; without any, a token that the tokenizer names does.
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
        self._one_at_a_time = threading.Lock()  # compiles, and has the tokenizers
        self._tokenizers: OrderedDict[frozenset[str], LLTokenizer] = OrderedDict()
        self._lock = threading.Lock()  # of what follows, and never held for long
        self._compiled: OrderedDict[Constraint, _Compiled] = OrderedDict()
        self._is_closed = False

    def begin(self, constraint: Constraint, answer: Sequence[int] = ()) -> AnswerMasks:
        """The masks of an answer that has begun with the tokens ``answer``; it is compiled on another thread.

        Raises EngineStoppedError after `close`.
        """
        with self._lock:
            if self._is_closed:
                raise EngineStoppedError("the engine has stopped; no constraint can be compiled")
            begun = self._compiling.submit(self._begin, constraint, answer)
        return AnswerMasks(begun, self._workers, self.counts)

    def close(self) -> None:
        """Compile no more; answers that have begun get no further masks. Idempotent."""
        with self._lock:
            self._is_closed = True
        self._compiling.shutdown(wait=False, cancel_futures=True)
        self._workers.shutdown(wait=False)

    def matcher(self, constraint: Constraint) -> LLMatcher:
        """One at the beginning of an answer, compiled on this thread. Raises RequestError where that cannot be."""
        return self._compiled_once(constraint)[0].deep_copy()

    def _begin(self, constraint: Constraint, answer: Sequence[int]) -> _Matched:
        matcher, ends = self._compiled_once(constraint)
        return _advanced(matcher.deep_copy(), ends, answer)

    def _compiled_once(self, constraint: Constraint) -> _Compiled:
        """Raises RequestError for what cannot be compiled."""
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
        """In which the special tokens that are ``markers`` are text, which the texts of a grammar match.

        Raises RequestError for a tokenizer of a kind that llguidance does not know.
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
