"""Mooncake traces: JSONL with prefix-chained block ids, read and written.

``{"timestamp": 27000, "input_length": 6955, "output_length": 52, "hash_ids": [46, 47, ...]}``: milliseconds, tokens,
and one id per block of the prompt, the last block being partial. Variants: ``token_ids`` instead of ``hash_ids``;
``arrival_time_ns`` instead of ``timestamp``; a ``block_size`` in the line; no id for the partial block.
"""

import json
from array import array
from collections.abc import Iterable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Self, TextIO

from pydantic import BaseModel, ConfigDict, Field, model_validator

from emberkv.workload import bounds
from emberkv.workload.content import MAX_TOKEN, SCOPE_BYTES, Content, Tokens
from emberkv.workload.lines import numbered_lines, read_requests
from emberkv.workload.request import Request

BLOCK_SIZE = 512
"""Tokens of a block in the published Mooncake traces, whose lines do not say it."""

EXPECTED = (
    'a JSON object such as {"timestamp": 0, "input_length": 600, "output_length": 50, "hash_ids": [0, 1]}, with '
    "timestamp in ms (or arrival_time_ns) and hash_ids or token_ids"
)

BlockId = Annotated[int, Field(ge=0, lt=2**63)]
TokenId = Annotated[int, Field(ge=0, lt=MAX_TOKEN)]


class _Line(BaseModel):
    """Fields beyond these are other tools' and are passed over."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)

    timestamp: Annotated[float, Field(ge=0, le=1e3 * bounds.MOST_SECONDS)] | None = None
    arrival_time_ns: Annotated[int, Field(ge=0, le=round(1e9 * bounds.MOST_SECONDS))] | None = None
    input_length: bounds.Tokens
    output_length: bounds.Tokens
    hash_ids: list[BlockId] | None = None
    token_ids: list[TokenId] | None = None
    block_size: bounds.SomeTokens | None = None

    @model_validator(mode="after")
    def _one_of_each(self) -> Self:
        if (self.timestamp is None) == (self.arrival_time_ns is None):
            raise self._not_one_of("timestamp", "arrival_time_ns")
        if (self.hash_ids is None) == (self.token_ids is None):
            raise self._not_one_of("hash_ids", "token_ids")
        if self.token_ids is not None and len(self.token_ids) != self.input_length:
            raise ValueError(f"input_length is {self.input_length}, but there are {len(self.token_ids)} token_ids")
        return self

    def _not_one_of(self, *names: str) -> ValueError:
        given = [name for name in names if getattr(self, name) is not None]
        return ValueError(f"has {' and '.join(given) or 'none'} of {' and '.join(names)}; exactly one is needed")

    @property
    def arrival_time(self) -> float:
        return self.timestamp / 1e3 if self.timestamp is not None else (self.arrival_time_ns or 0) / 1e9

    def content(self, scope: bytes, block_size: int) -> Content:
        """Raises ValueError when the number of ids does not fit the length."""
        if self.token_ids is not None:
            return Content([Tokens(array("i", self.token_ids))])
        ids, length = self.hash_ids or [], self.input_length
        full, partial = divmod(length, block_size)
        if len(ids) not in {full, full + bool(partial)}:
            raise ValueError(
                f"an input_length of {length} takes {full + bool(partial)} blocks of {block_size} tokens, "
                f"but there are {len(ids)} hash_ids; is the block size another?"
            )
        keys = [scope + each.to_bytes(SCOPE_BYTES, "little") for each in ids]
        return Content.of_blocks(keys, block_size, min(length, len(keys) * block_size))


def read(path: Path, *, scope: str, block_size: int | None = None) -> Iterator[Request]:
    """The requests of a trace, in constant memory.

    scope: names the requests, and whose ids these are: equal ids of different scopes are different blocks.
    block_size: tokens of a block where the line does not say it; `BLOCK_SIZE` unless given.
    Raises WorkloadError naming file, line and what was expected.
    """
    owner = sha256(scope.encode()).digest()[:SCOPE_BYTES]

    def to_request(index: int, line: bytes) -> Request:
        read_line = _Line.model_validate_json(line)
        size = read_line.block_size or block_size or BLOCK_SIZE
        return Request(
            request_id=f"{scope}-{index}",
            arrival_time=read_line.arrival_time,
            prompt_tokens=read_line.input_length,
            output_tokens=read_line.output_length,
            max_output_tokens=read_line.output_length,
            content=read_line.content(owner, size),
            block_size=size if read_line.token_ids is None else None,
        )

    return read_requests(path, numbered_lines(path), to_request, EXPECTED)


def write(file: TextIO, requests: Iterable[Request], *, block_size: int | None = None) -> int:
    """Write requests with ids counted in the order of their first use; returns how many.

    block_size: tokens of a block; by default each request's own, or `BLOCK_SIZE`. Memory grows with the number of
    different blocks. What the format does not hold is lost: clients, sessions, limits and answers' hashes.
    """
    ids: dict[bytes, int] = {}
    count = 0
    for request in requests:
        size = block_size or request.block_size or BLOCK_SIZE
        blocks = request.block_references(b"", size)
        line = {
            "timestamp": round(request.arrival_time * 1e3, 3),
            "input_length": request.prompt_tokens,
            "output_length": request.output_tokens,
            "block_size": size,
            "hash_ids": [ids.setdefault(block, len(ids)) for block in blocks],
        }
        file.write(json.dumps(line) + "\n")
        count += 1
    return count
