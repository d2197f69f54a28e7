"""The sequences that ``/generate`` has made on this server's engine, by which their keys and values are found."""

import asyncio
import threading
from array import array
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from emberkv.core.hashing import token_array
from emberkv.core.sequence import FinishReason
from emberkv.engine.assembly import AssembledEngine
from emberkv.engine.block_transfer import CachedRows
from emberkv.engine.commands import Command, CountRows, ReadRows
from emberkv.engine.request import (
    Engine,
    EngineWrapper,
    GenerationRequest,
    OutputListener,
    SamplingParams,
    TokenOutput,
)
from emberkv.errors import UnknownLayerError
from emberkv.serving.kv_tensors import Sequence, StoredLayer
from emberkv.tensors import TensorBytes

MAX_TOKENS = 2**22
"""Of all sequences that are remembered, at 4 bytes each."""

MAX_SEQUENCES = 2**16
"""That are remembered, at some hundred bytes each beside their tokens."""

R = TypeVar("R")

_ANY_ANSWER = SamplingParams(max_tokens=1)


@dataclass(slots=True)
class _Generated:
    """request_id: of the engine. salt: of the prompt's block hashes. tokens: of the prompt and of the answer so far.
    is_whole: whether the last one has keys and values, as all others have.
    """

    request_id: str
    salt: bytes
    tokens: "array[int]"
    is_whole: bool = True


class GeneratedSequences:
    """The tokens of generated sequences. Their keys and values are in the prefix cache, as every request's are, and are
    read there while it has them. Beyond ``max_tokens`` and ``max_sequences`` those that were used least recently are
    forgotten.

    All methods may be called from any thread; `read` and `length` belong to an event loop. on_begin: is called with
    each sequence that is generated, or goes on, and the id of its request, once the engine has accepted that.
    """

    def __init__(self, max_tokens: int = MAX_TOKENS, max_sequences: int = MAX_SEQUENCES) -> None:
        self.on_begin: list[Callable[[Sequence, str], None]] = []
        self._max_tokens = max_tokens
        self._max_sequences = max_sequences
        self._lock = threading.Lock()
        self._sequences: OrderedDict[Sequence, _Generated] = OrderedDict()
        self._tokens = 0

    def over(self, engine: Engine) -> Engine:
        """The same engine, whose requests with a ``seq_id`` are remembered."""
        return _RememberingEngine(engine, self)

    def begin(self, sequence: Sequence, generated: _Generated) -> None:
        """A sequence is generated, or goes on, as the engine has accepted; it replaces what was known under its id."""
        with self._lock:
            self._forget(sequence)
            self._sequences[sequence] = generated
            self._tokens += len(generated.tokens)
            self._forget_oldest()

    def extend(self, sequence: Sequence, generated: _Generated, output: TokenOutput) -> None:
        """The answer of a request has gained tokens, maybe before `begin`. The sequence counts as used, unless it has
        been forgotten or begun anew since.
        """
        with self._lock:
            generated.tokens.extend(output.token_ids)
            if output.token_ids:
                generated.is_whole = False
            if output.finish_reason is FinishReason.STOP:  # by a token of its own, behind these
                generated.is_whole = True
            if self._sequences.get(sequence) is generated:
                self._tokens += len(output.token_ids)
                self._sequences.move_to_end(sequence)
                self._forget_oldest()

    def forget(self, sequence: Sequence) -> None:
        """A sequence is not found any more. Its blocks stay in the prefix cache, which other sequences share."""
        with self._lock:
            self._forget(sequence)

    def clear(self) -> None:
        with self._lock:
            self._sequences.clear()
            self._tokens = 0

    def request_id(self, sequence: Sequence) -> str:
        """Of the request that has generated a sequence, or does; "" for one that is not remembered."""
        with self._lock:
            found = self._sequences.get(sequence)
            return "" if found is None else found.request_id

    async def read(self, sequence: Sequence, layer: int, engine: AssembledEngine) -> StoredLayer | None:
        """A layer's keys and values of the prompt and of all tokens but the last, as far as the pool has them without a
        gap. None for a sequence, or a layer, that there is not, and where its first tokens have left the pool.

        layer: its number in the model. Raises EngineStoppedError, RequestError for a layer without attention.
        """
        asked = self._known(sequence)
        if asked is None:
            return None
        chain = await asyncio.to_thread(engine.loop.chain, asked)
        pages: list[CachedRows] = []
        end = 0
        while True:
            page = await _answer(engine, ReadRows(chain, layer, end))
            if page is None:
                return None
            if not page.keys.shape[0]:
                break
            pages.append(page)
            end += page.keys.shape[0]
        if not pages:
            return None
        return await asyncio.to_thread(_layer_of, pages, asked.request_id)

    async def length(self, sequence: Sequence, layer: int, engine: AssembledEngine) -> int:
        """How many rows `read` would give; 0 where it would give None. Raises as it does."""
        asked = self._known(sequence)
        if asked is None:
            return 0
        chain = await asyncio.to_thread(engine.loop.chain, asked)
        return await _answer(engine, CountRows(chain, layer)) or 0

    def _known(self, sequence: Sequence) -> GenerationRequest | None:
        """A request whose prompt is all tokens of a sequence that have keys and values."""
        with self._lock:
            found = self._sequences.get(sequence)
            if found is None:
                return None
            self._sequences.move_to_end(sequence)
            tokens = found.tokens[:] if found.is_whole else found.tokens[:-1]
            request_id, salt = found.request_id, found.salt
        return GenerationRequest(request_id, tokens, _ANY_ANSWER, salt, tenant=sequence[0])

    def _forget_oldest(self) -> None:
        """Down to the bounds, but not the sequence that was used last."""
        while len(self._sequences) > 1 and (
            self._tokens > self._max_tokens or len(self._sequences) > self._max_sequences
        ):
            self._forget(next(iter(self._sequences)))

    def _forget(self, sequence: Sequence) -> None:
        found = self._sequences.pop(sequence, None)
        if found is not None:
            self._tokens -= len(found.tokens)


async def _answer(engine: AssembledEngine, command: Command[R]) -> R | None:
    """None for a layer that the model has not."""
    try:
        return await asyncio.wrap_future(engine.loop.execute(command))
    except UnknownLayerError:
        return None


def _layer_of(pages: list[CachedRows], request_id: str) -> StoredLayer:
    keys, values = _joined([page.keys for page in pages]), _joined([page.values for page in pages])
    return StoredLayer(keys, values, copy_of=request_id)


def _joined(pages: list[TensorBytes]) -> TensorBytes:
    if len(pages) == 1:
        return pages[0]
    shape = sum(page.shape[0] for page in pages), *pages[0].shape[1:]
    return TensorBytes(pages[0].dtype, shape, b"".join(page.data for page in pages))


class _RememberingEngine(EngineWrapper):
    """An `Engine` whose requests with a ``seq_id`` are remembered."""

    def __init__(self, engine: Engine, generated: GeneratedSequences) -> None:
        super().__init__(engine)
        self._generated = generated

    def submit(self, request: GenerationRequest, listener: OutputListener) -> None:
        if not request.seq_id:
            super().submit(request, listener)
            return

        sequence = request.tenant, request.seq_id
        generated = _Generated(request.request_id, request.salt, token_array(request.prompt_token_ids))

        def listen(output: TokenOutput) -> None:
            self._generated.extend(sequence, generated, output)
            listener(output)

        super().submit(request, listen)
        self._generated.begin(sequence, generated)
        for observer in self._generated.on_begin:
            observer(sequence, request.request_id)
