"""emberkv's own trace format: JSONL of block hashes and lengths, never of text.

The first line is ``{"emberkv_trace": 1}``, with an optional ``note``. Every other line is a `TraceLine`, sorted by
arrival. ``blocks`` are chained, so that an id stands for its block and all before it; ids are equal across files where
the content is, and 8 bytes suffice to tell blocks apart.
"""

from array import array
from collections.abc import Iterable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Literal, Self, TextIO

from pydantic import BaseModel, ConfigDict, Field, model_validator

from emberkv.errors import WorkloadError
from emberkv.workload import bounds
from emberkv.workload.content import MAX_TOKEN, SCOPE_BYTES, Content, Tokens
from emberkv.workload.lines import NumberedLine, explain, numbered_lines, read_requests
from emberkv.workload.request import After, Request, content_hashes

BLOCK_SIZE = 16
"""Tokens of a block for content that no trace has cut into blocks yet."""

ID_BYTES = 8
ROOT = sha256(b"emberkv-trace-1").digest()
OWNER = bytes(SCOPE_BYTES)  # ids of every file name content, so all files share one scope

EXPECTED = (
    'a JSON object such as {"request": "a", "arrival": 0.5, "prompt_tokens": 20, "output_tokens": 4, "block_size": 16, '
    '"blocks": ["0f3a9c5e7b21d468"], "known_tokens": 16}'
)


class _Line(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class Header(_Line):
    """The first line. model: what served the requests: its folder, hub id or, of the bundled model, name; or empty.

    >>> Header(emberkv_trace=1, model="emberkv-demo").model_dump_json(exclude_defaults=True)
    '{"emberkv_trace":1,"model":"emberkv-demo"}'
    """

    emberkv_trace: Literal[1]
    note: str = ""
    model: str = ""


class AfterLine(_Line):
    """The request that this one followed, and the seconds between that one's completion and this arrival.

    >>> AfterLine(request="s0.0", think_time=4.0).think_time
    4.0
    """

    request: str
    think_time: bounds.Seconds


class TraceLine(_Line):
    """One request. arrival: seconds from the trace's start.

    What is known of prompt and answer together, from the first token on, is either ``blocks``, hexadecimal ids of
    blocks of ``block_size`` tokens that hold ``known_tokens`` tokens (the last block may be partial), or ``token_ids``,
    or nothing.

    >>> line = TraceLine(request="a", arrival=0.5, prompt_tokens=3, output_tokens=1, token_ids=[5, 6, 7])
    >>> len(line.content())
    3
    """

    request: str
    arrival: bounds.Seconds
    client: str = ""
    session: str = ""
    turn: Annotated[int, Field(ge=0, lt=2**63)] = 0
    prompt_tokens: bounds.Tokens
    output_tokens: bounds.Tokens
    max_output_tokens: bounds.Tokens | None = None
    block_size: bounds.SomeTokens | None = None
    blocks: list[Annotated[str, Field(pattern="^[0-9a-f]{16}$")]] | None = None
    known_tokens: Annotated[int, Field(ge=0, le=2 * bounds.MOST_TOKENS)] | None = None
    token_ids: list[Annotated[int, Field(ge=0, lt=MAX_TOKEN)]] | None = None
    after: AfterLine | None = None

    @model_validator(mode="after")
    def _fits(self) -> Self:
        fields = (self.block_size, self.blocks, self.known_tokens)
        if any(field is None for field in fields) and any(field is not None for field in fields):
            raise ValueError("block_size, blocks and known_tokens come together or not at all")
        if self.blocks is not None and self.token_ids is not None:
            raise ValueError("has both blocks and token_ids; one of them is accepted")
        known = self.known_tokens or len(self.token_ids or [])
        if known > self.prompt_tokens + self.output_tokens:
            raise ValueError(f"describes {known} tokens of {self.prompt_tokens} + {self.output_tokens}")
        if self.blocks is not None and self.block_size and len(self.blocks) != -(-known // self.block_size):
            raise ValueError(f"{known} known_tokens are not {len(self.blocks)} blocks of {self.block_size} tokens")
        return self

    def content(self) -> Content:
        if self.token_ids is not None:
            return Content([Tokens(array("i", self.token_ids))])
        if self.blocks is None or self.block_size is None or self.known_tokens is None:
            return Content()
        keys = [OWNER + bytes.fromhex(each) for each in self.blocks]
        return Content.of_blocks(keys, self.block_size, self.known_tokens)


def is_header(line: bytes) -> bool:
    return line.lstrip().startswith(b'{"emberkv_trace"')


def read(path: Path, *, scope: str = "") -> Iterator[Request]:
    """The requests of a trace, in constant memory, with the arrivals that were recorded.

    scope: put before request and session ids when several traces are merged. Block ids stay: they name content.
    Raises WorkloadError naming file, line and what was expected.
    """
    lines = numbered_lines(path)
    _header(path, lines)
    prefix = f"{scope}/" if scope else ""

    def to_request(index: int, line: bytes) -> Request:
        entry = TraceLine.model_validate_json(line)
        limit = entry.output_tokens if entry.max_output_tokens is None else entry.max_output_tokens
        return Request(
            request_id=prefix + entry.request,
            arrival_time=entry.arrival,
            prompt_tokens=entry.prompt_tokens,
            output_tokens=entry.output_tokens,
            max_output_tokens=limit,
            content=entry.content(),
            block_size=entry.block_size,
            client_id=entry.client,
            session_id=prefix + entry.session if entry.session else "",
            turn=entry.turn,
            after=After(prefix + entry.after.request, entry.after.think_time) if entry.after else None,
        )

    yield from read_requests(path, lines, to_request, EXPECTED)


def read_header(path: Path) -> Header:
    """Raises WorkloadError naming file and line if there is none."""
    return _header(path, numbered_lines(path))


def _header(path: Path, lines: Iterator[NumberedLine]) -> Header:
    number, first = next(lines, (1, b""))
    try:
        return Header.model_validate_json(first)
    except ValueError as error:
        raise WorkloadError(f'{path}:{number}: {explain(error)}; expected {{"emberkv_trace": 1}}') from error


def line_of(request: Request, block_size: int | None = None) -> TraceLine:
    """The line of a request: its token ids if it has them, else ids of its blocks.

    block_size: tokens of a block; by default the request's own, or `BLOCK_SIZE`.
    """
    content, size = request.content, block_size or request.block_size or BLOCK_SIZE
    known: dict[str, object] = {}
    if content.pieces and all(isinstance(piece, Tokens) for piece in content.pieces):
        known = {"token_ids": content.token_ids(0, len(content))}
    elif content.pieces:
        block_hashes = content_hashes(ROOT, content, 0, len(content), size)
        ids = [block_hash[:ID_BYTES].hex() for block_hash in block_hashes]
        known = {"block_size": size, "blocks": ids, "known_tokens": len(content)}
    after = request.after and {"request": request.after.request_id, "think_time": round(request.after.think_time, 6)}
    fields = {
        "request": request.request_id,
        "arrival": round(request.arrival_time, 6),
        "client": request.client_id,
        "session": request.session_id,
        "turn": request.turn,
        "prompt_tokens": request.prompt_tokens,
        "output_tokens": request.output_tokens,
        "max_output_tokens": request.max_output_tokens,
        "after": after,
        **known,
    }
    return TraceLine.model_validate(fields)


def write(file: TextIO, requests: Iterable[Request], *, block_size: int | None = None, note: str = "") -> int:
    """Write the header and a line for each request; returns how many requests there were."""
    file.write(Header(emberkv_trace=1, note=note).model_dump_json(exclude_defaults=True) + "\n")
    count = 0
    for request in requests:
        file.write(line_of(request, block_size).model_dump_json(exclude_defaults=True) + "\n")
        count += 1
    return count
