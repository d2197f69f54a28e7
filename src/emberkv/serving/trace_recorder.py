"""Records a trace of requests: their times and lengths, and keyed block ids that show what they share but no text."""

import threading
from array import array
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from hashlib import blake2b
from itertools import count
from queue import SimpleQueue
from typing import NamedTuple

from emberkv.core.hashing import TOKEN_BYTES, PublicPrefixes, encode_tokens, token_array
from emberkv.core.sequence import FinishReason
from emberkv.engine.request import (
    Engine,
    EngineWrapper,
    GenerationRequest,
    OutputListener,
    TokenOutput,
)
from emberkv.serving.background import BackgroundWork

KEY_BYTES = 32
MAX_SESSIONS = 10_000

_LINK_BYTES = 16
_ID_BYTES = 8


class KeyedHashes:
    """Keyed hashes that show which contents of one recording are equal, and nothing else.

    key: `KEY_BYTES` random bytes, for this recording only.

    A guessed text cannot be looked up without the key, and equal content in two recordings has different names.
    """

    def __init__(self, key: bytes, block_size: int) -> None:
        self._key = key
        self._step = block_size * TOKEN_BYTES

    def links(self, salt: bytes, tokens: "array[int]", public_blocks: int = 0) -> list[bytes]:
        """Chained block hashes of the tokens' blocks, the partial last one included. From block ``public_blocks`` on,
        other salts have other block hashes.
        """
        encoded = encode_tokens(tokens)
        parent, found = b"", []
        for index, start in enumerate(range(0, len(encoded), self._step)):
            if index == public_blocks:
                parent = self._digest(parent, b"salt" + salt)
            parent = self._digest(parent, encoded[start : start + self._step])
            found.append(parent)
        return found

    def name(self, kind: str, text: str) -> str:
        """A pseudonym; "" stays so."""
        return self._digest(kind.encode(), text.encode()).hex()[: 2 * _ID_BYTES] if text else ""

    def _digest(self, context: bytes, content: bytes) -> bytes:
        return blake2b(
            len(context).to_bytes(1, "little") + context + content, key=self._key, digest_size=_LINK_BYTES
        ).digest()


def block_id(link: bytes) -> str:
    """The first bytes of a link in hexadecimal, as traces name blocks."""
    return link[:_ID_BYTES].hex()


@dataclass(slots=True)
class RecordedTurn:
    """A request as one turn of its session. tokens: of its prompt and, once it has ended, its answer. ended: a time."""

    request: str
    session: str
    number: int
    tokens: int
    ended: float | None = None


class SessionTurns:
    """The last `MAX_SESSIONS` sessions' last turns, by name and by where their content ends."""

    def __init__(self) -> None:
        self._last: OrderedDict[str | bytes, RecordedTurn] = OrderedDict()
        self._unnamed = 0

    def enter(
        self, request: str, session: str, tokens: int, links: list[bytes]
    ) -> tuple[RecordedTurn, RecordedTurn | None]:
        """The place of a request that arrives, and the turn before.

        session: as the client names it, or "": then it is the one whose last turn's blocks the prompt begins with and
        goes beyond. links: of the prompt's full blocks.
        """
        before = self._last.get(session) if session else self._by_content(tokens, links)
        if session:
            name = session
        elif before is not None:
            name = before.session
        else:
            self._unnamed += 1
            name = f"unnamed-{self._unnamed}"
        turn = RecordedTurn(request, name, before.number + 1 if before else 0, tokens)
        if session:
            self._put(session, turn)
        self.reached(turn, tokens, links)
        return turn, before

    def reached(self, turn: RecordedTurn, tokens: int, links: list[bytes]) -> None:
        """The turn's content is now so long. links: of its full blocks."""
        turn.tokens = tokens
        if links:
            self._put(links[-1], turn)

    def _by_content(self, tokens: int, links: list[bytes]) -> RecordedTurn | None:
        for link in reversed(links):
            turn = self._last.get(link)
            if turn is not None and turn.tokens < tokens:
                return turn
        return None

    def _put(self, key: str | bytes, turn: RecordedTurn) -> None:
        self._last[key] = turn
        self._last.move_to_end(key)
        if len(self._last) > 3 * MAX_SESSIONS:  # a name, a prompt's end and an answer's end each
            self._last.popitem(last=False)


class Follows(NamedTuple):
    """The request before in the same session, and the seconds between its end and this arrival."""

    request: str
    think_time: float


@dataclass(frozen=True, slots=True)
class RecordedRequest:
    """arrival: seconds after the first request's. client, session: pseudonyms. output_tokens: without a token that ends
    the sequence. max_output_tokens: the limit, or where the client broke off, the tokens that it got. blocks: chained
    ids of the blocks of prompt and answer, the partial last one included; they hold known_tokens.
    """

    request: str
    arrival: float
    client: str
    session: str
    turn: int
    prompt_tokens: int
    output_tokens: int
    max_output_tokens: int
    block_size: int
    blocks: Sequence[str]
    known_tokens: int
    after: Follows | None


@dataclass(slots=True, eq=False)
class TakenRequest:
    """A request that was taken in. reason: how it ended; None while it is under way. unknown: tokens of the answer of
    which no more is known than that they are.
    """

    request: GenerationRequest
    arrival: float
    answer: "array[int]" = field(default_factory=lambda: token_array(()))
    reason: FinishReason | None = None
    unknown: int = 0
    links: list[bytes] = field(default_factory=list)
    turn: RecordedTurn | None = None
    after: Follows | None = None


class _SinkError(Exception):
    """The sink cannot be written to."""


class TraceRecorder:
    """Gives each request to ``sink``, in the order of their arrival, once it and all before it have ended.

    key: see `KeyedHashes`. clock: monotonic seconds. Hashing and the sink's writing happen on a thread of the
    recorder's own. Requests that end before their first token are left out, and so is one that cannot be recorded,
    which ``work`` counts. When the sink raises OSError, nothing more is recorded, which ``work`` shows, and serving
    goes on.
    """

    def __init__(
        self,
        sink: Callable[[RecordedRequest], None],
        *,
        block_size: int,
        key: bytes,
        clock: Callable[[], float],
        work: BackgroundWork | None = None,
    ) -> None:
        self._work = work or BackgroundWork("trace recorder")
        self._sink = sink
        self._block_size = block_size
        self._block_hashes = KeyedHashes(key, block_size)
        self._clock = clock
        self._lock = threading.Lock()
        self._messages: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._numbers = count()
        self._began: float | None = None
        self._taken: OrderedDict[TakenRequest, None] = OrderedDict()
        self._book = SessionTurns()
        self._public: PublicPrefixes | None = None
        self._thread = threading.Thread(target=self._run, name="emberkv-trace", daemon=True)
        self._thread.start()

    def over(self, engine: Engine, public: PublicPrefixes | None = None) -> Engine:
        """The same engine, whose requests are recorded. public: the prefixes that its tenants share."""
        self._public = public
        return _RecordingEngine(engine, self)

    def close(self) -> None:
        """Write what there is; answers under way as far as they got. Nothing may be submitted any more. Idempotent."""
        self._messages.put(None)
        self._thread.join()

    def arrived(self, request: GenerationRequest) -> TakenRequest:
        with self._lock:  # so that times and messages are in the same order
            taken = TakenRequest(request, self._clock())
            self._messages.put(lambda: self._take_in(taken))
        return taken

    def ended(self, taken: TakenRequest, reason: FinishReason) -> None:
        with self._lock:
            at = self._clock()
            self._messages.put(lambda: self._finish(taken, at, reason))

    def ended_elsewhere(self, taken: TakenRequest, reason: FinishReason, output_tokens: int) -> None:
        """As `ended`, of an answer whose tokens are not known here."""
        taken.unknown = output_tokens
        self.ended(taken, reason)

    def refused(self, taken: TakenRequest) -> None:
        self._messages.put(lambda: self._forget(taken))

    def _run(self) -> None:
        try:
            while (message := self._messages.get()) is not None:
                self._do(message)
            for taken in [each for each in self._taken if each.reason is None]:
                self._do(partial(self._finish, taken, self._clock(), FinishReason.ABORT))
        except _SinkError as error:
            self._work.ended(f"the trace cannot be written ({error})")
            while self._messages.get() is not None:
                pass

    def _do(self, message: Callable[[], None]) -> None:
        """What fails in one request must not end the recording of others. Raises _SinkError."""
        ended: _SinkError | None = None
        with self._work.attempt():
            try:
                message()
            except _SinkError as error:
                ended = error
        if ended is not None:
            raise ended

    def _take_in(self, taken: TakenRequest) -> None:
        request = taken.request
        try:
            tokens = token_array(request.prompt_token_ids)
        except OverflowError:  # no model has such a token, so that the engine refuses the request
            return
        if self._began is None:
            self._began = taken.arrival
        taken.links = self._links(request, tokens)
        session = self._block_hashes.name(
            "session", f"{request.tenant}/{request.session_id}" if request.session_id else ""
        )
        full = len(tokens) // self._block_size
        number = str(next(self._numbers))
        taken.turn, before = self._book.enter(number, session, len(tokens), taken.links[:full])
        if before is not None and before.ended is not None:
            taken.after = Follows(before.request, taken.arrival - before.ended)
        self._taken[taken] = None

    def _links(self, request: GenerationRequest, tokens: "array[int]") -> list[bytes]:
        public = 0
        if self._public is not None:
            shared = self._public.blocks_of(token_array(request.prompt_token_ids)) * self._public.block_size
            public = shared // self._block_size
        return self._block_hashes.links(request.salt, tokens, public)

    def _finish(self, taken: TakenRequest, at: float, reason: FinishReason) -> None:
        taken.reason = reason
        try:
            self._extend(taken, at)
        finally:
            self._write_ended()

    def _extend(self, taken: TakenRequest, at: float) -> None:
        """The turn goes on to the end of its answer."""
        if taken.turn is not None and (taken.answer or taken.unknown):
            taken.turn.ended = at
            tokens = token_array(taken.request.prompt_token_ids) + taken.answer
            taken.links = self._links(taken.request, tokens)
            self._book.reached(taken.turn, len(tokens), taken.links[: len(tokens) // self._block_size])

    def _forget(self, taken: TakenRequest) -> None:
        self._taken.pop(taken, None)  # it is not there if it could not be taken in
        self._write_ended()

    def _write_ended(self) -> None:
        while self._taken:
            first = next(iter(self._taken))
            if first.reason is None:
                return
            del self._taken[first]
            if (first.answer or first.unknown) and first.turn is not None:
                recorded = self._recorded(first, first.turn)
                try:
                    self._sink(recorded)
                except OSError as error:
                    raise _SinkError(error.strerror or type(error).__name__) from error

    def _recorded(self, taken: TakenRequest, turn: RecordedTurn) -> RecordedRequest:
        prompt, known = len(taken.request.prompt_token_ids), len(taken.answer)
        answer = known + taken.unknown
        whole = taken.reason in (FinishReason.STOP, FinishReason.LENGTH)
        return RecordedRequest(
            request=turn.request,
            arrival=taken.arrival - (self._began or 0.0),
            client=self._block_hashes.name("client", taken.request.tenant),
            session=turn.session,
            turn=turn.number,
            prompt_tokens=prompt,
            output_tokens=answer,
            max_output_tokens=taken.request.params.max_tokens if whole else answer,
            block_size=self._block_size,
            blocks=[block_id(link) for link in taken.links],
            known_tokens=prompt + known,
            after=taken.after,
        )


class _RecordingEngine(EngineWrapper):
    """An `Engine` that records the requests to another one."""

    def __init__(self, engine: Engine, recorder: TraceRecorder) -> None:
        super().__init__(engine)
        self._recorder = recorder

    def submit(self, request: GenerationRequest, listener: OutputListener) -> None:
        taken = self._recorder.arrived(request)

        def listen(output: TokenOutput) -> None:
            taken.answer.extend(output.token_ids)
            if output.finish_reason is not None:
                self._recorder.ended(taken, output.finish_reason)
            listener(output)

        try:
            super().submit(request, listen)
        except BaseException:
            self._recorder.refused(taken)
            raise
