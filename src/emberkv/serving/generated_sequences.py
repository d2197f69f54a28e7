"""The sequences that ``/generate`` has made on this server's engine, by which their keys and values are found."""

import asyncio
import threading
from array import array
from collections import OrderedDict
from dataclasses import dataclass, replace

from emberkv.core.hashing import token_array
from emberkv.core.sequence import FinishReason
from emberkv.engine.assembly import AssembledEngine
from emberkv.engine.commands import ReadRows
from emberkv.engine.request import (
    Engine,
    EngineStats,
    GenerationRequest,
    OutputListener,
    PrefillProgress,
    TokenOutput,
)
from emberkv.errors import RequestError
from emberkv.serving.kv_tensors import Sequence, StoredLayer
from emberkv.tensors import TensorBytes

MAX_TOKENS = 2**22
"""Of all sequences that are remembered, at 4 bytes each."""


@dataclass(slots=True)
class _Generated:
    """tokens: of the prompt and of the answer so far. is_whole: whether the last one has keys and values, as all others
    have.
    """

    request: GenerationRequest
    tokens: "array[int]"
    is_whole: bool = True


class GeneratedSequences:
    """The tokens of generated sequences. Their keys and values are in the prefix cache, as every request's are, and are
    read there while it has them. Beyond ``max_tokens`` the sequences that were used least recently are forgotten.

    All methods may be called from any thread; `read` belongs to an event loop.
    """

    def __init__(self, max_tokens: int = MAX_TOKENS) -> None:
        self._max_tokens = max_tokens
        self._lock = threading.Lock()
        self._sequences: OrderedDict[Sequence, _Generated] = OrderedDict()
        self._tokens = 0

    def over(self, engine: Engine) -> Engine:
        """The same engine, whose requests with a ``seq_id`` are remembered."""
        return _RememberingEngine(engine, self)

    def begin(self, request: GenerationRequest) -> None:
        """A sequence is generated, or goes on; its prompt replaces what was known under its id."""
        named = request.tenant, request.seq_id
        tokens = token_array(request.prompt_token_ids)
        with self._lock:
            self._forget(named)
            self._sequences[named] = _Generated(replace(request, prompt_token_ids=()), tokens)
            self._tokens += len(tokens)
            while self._tokens > self._max_tokens and len(self._sequences) > 1:
                self._forget(next(iter(self._sequences)))

    def extend(self, request: GenerationRequest, output: TokenOutput) -> None:
        with self._lock:
            found = self._sequences.get((request.tenant, request.seq_id))
            if found is None or found.request.request_id != request.request_id:
                return
            found.tokens.extend(output.token_ids)
            self._tokens += len(output.token_ids)
            if output.token_ids:
                found.is_whole = False
            if output.finish_reason is FinishReason.STOP:  # by a token of its own, behind these
                found.is_whole = True

    def forget(self, sequence: Sequence) -> None:
        """A sequence is not found any more. Its blocks stay in the prefix cache, which other sequences share."""
        with self._lock:
            self._forget(sequence)

    def clear(self) -> None:
        with self._lock:
            self._sequences.clear()
            self._tokens = 0

    async def read(self, sequence: Sequence, layer: int, engine: AssembledEngine) -> StoredLayer | None:
        """A layer's keys and values of the prompt and of all tokens but the last, as far as the pool has them without a
        gap. None for a sequence, or a layer, that there is not, and where its first tokens have left the pool.

        Raises EngineStoppedError.
        """
        asked = self._known(sequence)
        if asked is None:
            return None
        chain = await asyncio.to_thread(engine.loop.chain, asked)
        pages, end = [], 0
        while True:
            try:
                page = await asyncio.wrap_future(engine.loop.execute(ReadRows(chain, layer, end)))
            except RequestError:
                return None
            if not page.keys.shape[0]:
                break
            pages.append(page)
            end += page.keys.shape[0]
        if not pages:
            return None
        return StoredLayer(_joined([page.keys for page in pages]), _joined([page.values for page in pages]))

    def _known(self, sequence: Sequence) -> GenerationRequest | None:
        """The request whose prompt is all tokens of a sequence that have keys and values."""
        with self._lock:
            found = self._sequences.get(sequence)
            if found is None:
                return None
            self._sequences.move_to_end(sequence)
            tokens = found.tokens[:] if found.is_whole else found.tokens[:-1]
            return replace(found.request, prompt_token_ids=tokens)

    def _forget(self, sequence: Sequence) -> None:
        found = self._sequences.pop(sequence, None)
        if found is not None:
            self._tokens -= len(found.tokens)


def _joined(pages: list[TensorBytes]) -> TensorBytes:
    shape = sum(page.shape[0] for page in pages), *pages[0].shape[1:]
    return TensorBytes(pages[0].dtype, shape, b"".join(page.data for page in pages))


class _RememberingEngine:
    """An `Engine` whose requests with a ``seq_id`` are remembered."""

    def __init__(self, engine: Engine, generated: GeneratedSequences) -> None:
        self._engine = engine
        self._generated = generated

    @property
    def context_length(self) -> int:
        return self._engine.context_length

    @property
    def max_prompt_tokens(self) -> int:
        return self._engine.max_prompt_tokens

    def submit(self, request: GenerationRequest, listener: OutputListener) -> None:
        if not request.seq_id:
            self._engine.submit(request, listener)
            return

        def listen(output: TokenOutput) -> None:
            self._generated.extend(request, output)
            listener(output)

        self._generated.begin(request)
        try:
            self._engine.submit(request, listen)
        except BaseException:
            self._generated.forget((request.tenant, request.seq_id))
            raise

    def abort(self, request_id: str) -> None:
        self._engine.abort(request_id)

    def progress(self, request_id: str) -> PrefillProgress | None:
        return self._engine.progress(request_id)

    def stats(self) -> EngineStats:
        return self._engine.stats()
