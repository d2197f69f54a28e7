"""What workers and gateways send each other: msgpack, in one version that every request and response names.

A body is one message. A stream is a sequence of frames: four bytes of length, big-endian, and a message; a frame
without a message is a heartbeat. docs/cluster.md has the routes.

    frame(encode_outcomes([(0, encode_outcome(TokenOutput("a", token_ids=(7,))))]))   # bytes
    FrameReader().feed(data)   # the messages of the frames that are complete
"""

import sys
from array import array
from collections.abc import Sequence
from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta, Struct

from emberkv import event_wire
from emberkv.core.feed import FeedMessage
from emberkv.core.hashing import TOKEN_BYTES, encode_tokens, token_array
from emberkv.core.sequence import FinishReason
from emberkv.engine.request import (
    CacheUsage,
    GenerationRequest,
    PrefillProgress,
    SamplingParams,
    TokenLogprobs,
    TokenOutput,
)
from emberkv.errors import ConfigError, WireError, reason_of

VERSION = 2
MEDIA_TYPE = f"application/vnd.emberkv.v{VERSION}+msgpack"
PREFIX = "/internal/v1"
MAX_MESSAGE_BYTES = 128 << 20
HEARTBEAT = bytes(4)
"""A frame without a message: the sender is alive, and has nothing to say."""

HEARTBEAT_SECONDS = 0.5
"""A worker sends something on each stream at least this often, as far as its event loop is free."""

T = TypeVar("T")

Tokens = bytes
"""Token ids as `core.hashing.encode_tokens` writes them: four little-endian bytes each."""

Hash = Annotated[bytes, Meta(min_length=32, max_length=32)]
Count = Annotated[int, Meta(ge=0)]
Name = Annotated[str, Meta(max_length=256)]


class SharedTier(Struct, frozen=True):
    """A tier of a worker that others may have, too: those that give the same store_id. See `SharedStore`."""

    store_id: Annotated[bytes, Meta(min_length=16, max_length=64)]
    is_listed: bool
    is_scanned: bool = False


class StoredBlocks(Struct, frozen=True):
    """Some of the blocks in a tier that snapshots do not list. next_cursor: of those that follow; None: no more."""

    block_hashes: tuple[Hash, ...]
    next_cursor: int | None


class WorkerDescription(Struct, frozen=True, kw_only=True):
    """What a worker serves, and how.

    epoch: of its cache's events; another one after each start. sequence: of the last of these events. names,
    name_patterns: of the model, see `ServedModel`. fingerprint: of the model's weights and config. root: of its block
    hashes. namespace: of its blocks' bytes. context_length, max_prompt_tokens: see `engine.request.Engine`. hit_unit:
    hits are rounded down to a multiple of so many tokens. takes_borders: see `ServedModel`. exact: only blocks that are
    bit-equal to a cold prefill's are reused. public_prefixes: the token sequences that all tenants share. about: how
    the model is computed, in short words by name. created: when it was loaded, in seconds since 1970. tokenizer: the
    ETag of `TokenizerFiles`. shared_tiers: by name.
    """

    worker_id: Name
    epoch: bytes
    version: str
    names: Annotated[tuple[str, ...], Meta(min_length=1)]
    fingerprint: str
    root: Hash
    namespace: bytes
    block_size: Annotated[int, Meta(ge=1)]
    context_length: Annotated[int, Meta(ge=1)]
    max_prompt_tokens: Annotated[int, Meta(ge=1)]
    hit_unit: Annotated[int, Meta(ge=1)]
    exact: bool
    public_prefixes: tuple[Tokens, ...] = ()
    sampling_defaults: SamplingParams = SamplingParams()
    about: dict[str, str] = {}
    created: int = 0
    tokenizer: str = ""
    name_patterns: tuple[str, ...] = ()
    shared_tiers: dict[Name, SharedTier] = {}
    takes_borders: bool = False
    sequence: Count = 0


class TokenizerFiles(Struct, frozen=True, kw_only=True):
    """The files of a model's tokenizer and chat template, by name, as transformers loads them from a folder.

    etag: a hash of their content. chat_problem: why the chat template is not to be used; None: it is.
    """

    etag: str
    files: dict[str, bytes]
    chat_problem: str | None = None


class LoadReport(Struct, frozen=True, kw_only=True, tag="load"):
    """What a worker has to do, and how fast it does such work. Rates are None or missing until they are measured.
    Requests of `BACKGROUND_PRIORITY` are left out, as in `EngineLoad`.

    epoch, sequence: of the cache's last event. waiting, running: requests. waiting_tokens: of the waiting ones'
    prompts, as far as these are not known to be cached. prefill_tokens: of the running ones' prompts, not computed yet.
    decoding: requests of which each step computes one token. total_blocks, free_blocks, cached_blocks: of the pool; the
    cached ones are among the free. block_bytes: of KV state. hit_tokens: of prompts, found in the cache since the
    start. prefill_rate: prompt tokens a second. step_seconds: of a step that only decodes. load_rates: bytes a second,
    by tier. shared_tiers: which tiers it shares now, by name, as in `WorkerDescription`; None: as there.
    """

    worker_id: Name
    epoch: bytes
    sequence: Count
    waiting: Count = 0
    running: Count = 0
    waiting_tokens: Count = 0
    prefill_tokens: Count = 0
    decoding: Count = 0
    total_blocks: Count = 0
    free_blocks: Count = 0
    cached_blocks: Count = 0
    block_bytes: Count = 0
    hit_tokens: Count = 0
    prefill_rate: float | None = None
    step_seconds: float | None = None
    load_rates: dict[str, float] = {}
    shared_tiers: dict[Name, SharedTier] | None = None
    draining: bool = False


class CacheMessage(Struct, frozen=True, tag="cache"):
    """A message of the cache's event feed, as `event_wire.encode` writes it."""

    data: bytes


class Failure(Struct, frozen=True, array_like=True, tag="failure"):
    """An error: the name of its class, its message, and when the caller may try again, in seconds."""

    kind: Name
    message: str
    param: str | None = None
    retry_after: float | None = None


class Registration(Struct, frozen=True, kw_only=True):
    """A worker and where it listens; a gateway takes it in, and expects it again every few seconds."""

    worker_id: Annotated[str, Meta(min_length=1, max_length=256)]
    url: Annotated[str, Meta(min_length=1, max_length=2048)]


class _Generate(Struct, frozen=True, kw_only=True, omit_defaults=True):
    request_id: Name
    prompt: Tokens
    params: SamplingParams
    salt: bytes = b""
    tenant: str = ""
    session_id: str = ""
    priority: int = 0
    retain_tokens: Count = 0
    retain_seconds: float = 0.0
    answered: Count = 0
    seq_id: str = ""
    borders: tuple[Count, ...] = ()


class _Output(Struct, frozen=True, array_like=True, tag="output"):
    token_ids: tuple[int, ...] = ()
    finish_reason: FinishReason | None = None
    usage: CacheUsage | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()
    error: str | None = None
    queue_seconds: float | None = None
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    load_seconds: float | None = None


class Progress(Struct, frozen=True, array_like=True, tag="progress"):
    """How far a prompt is computed; see `PrefillProgress`. Sent in place of a heartbeat, before the first output."""

    computed_tokens: Count
    prompt_tokens: Count


class Submit(Struct, frozen=True, array_like=True, tag="submit"):
    """A request, as `encode_request` writes it, in a channel, whose outputs have this number."""

    number: Count
    request: bytes


class Abort(Struct, frozen=True, array_like=True, tag="abort"):
    """No more outputs of this number are wanted."""

    number: Count


class TenantPrompt(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The prompt that a question is about, and whose it is."""

    prompt: Tokens
    salt: bytes = b""
    tenant: str = ""


_encoder = msgspec.msgpack.Encoder()
_generates = msgspec.msgpack.Decoder(_Generate)
_channels: "msgspec.msgpack.Decoder[Submit | Abort]" = msgspec.msgpack.Decoder(Submit | Abort)
_outcomes: "msgspec.msgpack.Decoder[_Output | Failure | Progress]" = msgspec.msgpack.Decoder(
    _Output | Failure | Progress
)
_numbered = msgspec.msgpack.Decoder(list[tuple[Count, msgspec.Raw]])
_events = msgspec.msgpack.Decoder(CacheMessage | LoadReport)


def encode(message: object) -> bytes:
    """A message as bytes."""
    return _encoder.encode(message)


def decode(data: bytes, kind: type[T]) -> T:
    """The message of type ``kind`` in ``data``. Raises WireError for anything else."""
    return decode_with(msgspec.msgpack.Decoder(kind), data)


def decode_with(decoder: "msgspec.msgpack.Decoder[T]", data: bytes | msgspec.Raw) -> T:
    """As `decode`, by a decoder that is made once."""
    if len(data) > MAX_MESSAGE_BYTES:
        raise WireError(f"a message of {len(data)} bytes; at most {MAX_MESSAGE_BYTES} are accepted")
    try:
        return decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise WireError(f"these {len(data)} bytes are not the message expected: {reason_of(error)}") from error


def encode_request(request: GenerationRequest) -> bytes:
    """Raises ConfigError for one with `allowed_tokens`, a function of this process."""
    if request.allowed_tokens is not None:
        raise ConfigError(
            "allowed_tokens is a function of this process, which cannot be sent to a worker; leave it out"
        )
    return encode(
        _Generate(
            request_id=request.request_id,
            prompt=encode_prompt(request.prompt_token_ids),
            params=request.params,
            salt=request.salt,
            tenant=request.tenant,
            session_id=request.session_id,
            priority=request.priority,
            retain_tokens=request.retain_tokens,
            retain_seconds=request.retain_seconds,
            answered=request.answered,
            seq_id=request.seq_id,
            borders=request.borders,
        )
    )


def decode_request(data: bytes) -> GenerationRequest:
    """Raises WireError for bytes that are no request, RequestError for a parameter out of its range."""
    sent = decode_with(_generates, data)
    return GenerationRequest(
        sent.request_id,
        decode_prompt(sent.prompt),
        sent.params,
        sent.salt,
        sent.priority,
        sent.tenant,
        sent.session_id,
        sent.retain_tokens,
        sent.retain_seconds,
        answered=sent.answered,
        seq_id=sent.seq_id,
        borders=sent.borders,
    )


def encode_prompt(token_ids: Sequence[int]) -> Tokens:
    """Raises OverflowError for a token id that has not 32 bits."""
    return encode_tokens(token_array(token_ids))


def decode_prompt(tokens: Tokens) -> "array[int]":
    """Raises WireError for a number of bytes that is not a multiple of four."""
    if len(tokens) % TOKEN_BYTES:
        raise WireError(f"{len(tokens)} bytes of token ids; they take {TOKEN_BYTES} bytes each")
    token_ids = array("i", tokens)
    if sys.byteorder == "big":
        token_ids.byteswap()
    return token_ids


def decode_channel(data: bytes) -> Submit | Abort:
    """One message of a gateway's. Raises WireError."""
    return decode_with(_channels, data)


def encode_outcome(outcome: TokenOutput | Failure | Progress) -> bytes:
    """What came of one request, without its id, which the reader knows."""
    if not isinstance(outcome, TokenOutput):
        return encode(outcome)
    return encode(
        _Output(
            outcome.token_ids,
            outcome.finish_reason,
            outcome.usage,
            outcome.logprobs,
            outcome.error,
            outcome.queue_seconds,
            outcome.prompt_logprobs,
            outcome.load_seconds or None,
        )
    )


def decode_outcome(data: bytes | msgspec.Raw, request_id: str) -> TokenOutput | Failure | PrefillProgress:
    """Raises WireError."""
    return _received(decode_with(_outcomes, data), request_id)


def encode_outcomes(outcomes: Sequence[tuple[int, bytes]]) -> bytes:
    """A message of a worker's: what `encode_outcome` gave, each with its request's number in the channel."""
    return encode([(number, msgspec.Raw(data)) for number, data in outcomes])


def decode_outcomes(data: bytes) -> list[tuple[int, msgspec.Raw]]:
    """Numbers, and what `decode_outcome` reads. Raises WireError."""
    return decode_with(_numbered, data)


def _received(found: _Output | Failure | Progress, request_id: str) -> TokenOutput | Failure | PrefillProgress:
    if isinstance(found, Failure):
        return found
    if isinstance(found, Progress):
        return PrefillProgress(found.computed_tokens, found.prompt_tokens)
    return TokenOutput(
        request_id,
        found.token_ids,
        found.logprobs,
        found.usage,
        found.finish_reason,
        found.error,
        found.queue_seconds,
        found.prompt_logprobs,
        load_seconds=found.load_seconds or 0.0,
    )


def encode_cache_message(message: FeedMessage) -> bytes:
    """A message of the stream of events, without the tokens of stored blocks."""
    return encode(CacheMessage(event_wire.encode(message, tokens=False)))


def decode_event(data: bytes) -> FeedMessage | LoadReport:
    """One message of the stream of events. Raises WireError, EventWireError."""
    found = decode_with(_events, data)
    return event_wire.decode(found.data) if isinstance(found, CacheMessage) else found


def frame(message: bytes) -> bytes:
    """A message of a stream with its length."""
    return len(message).to_bytes(4, "big") + message


class FrameReader:
    """Cuts the bytes of a stream into messages, however they arrive. Heartbeats are left out."""

    def __init__(self) -> None:
        self._held = bytearray()

    @property
    def is_between_frames(self) -> bool:
        return not self._held

    def feed(self, data: bytes) -> list[bytes]:
        """The messages that are complete now. Raises WireError for a length beyond `MAX_MESSAGE_BYTES`."""
        self._held += data
        messages, start = [], 0
        while len(self._held) - start >= 4:
            length = int.from_bytes(self._held[start : start + 4], "big")
            if length > MAX_MESSAGE_BYTES:
                raise WireError(f"a frame of {length} bytes; at most {MAX_MESSAGE_BYTES} are accepted")
            if len(self._held) - start < 4 + length:
                break
            if length:
                messages.append(bytes(self._held[start + 4 : start + 4 + length]))
            start += 4 + length
        del self._held[:start]
        return messages
