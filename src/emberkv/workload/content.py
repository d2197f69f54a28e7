"""The tokens of a request, described by where they come from.

A generated or recorded workload never holds text. Its tokens are spans of endless streams (a system prompt, a message,
an answer, a block of a trace), each named by a key, or token ids where a trace has them. Two requests share a prefix
exactly as far as their contents are equal; different streams share nothing.
"""

from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache, partial
from hashlib import sha256, shake_128
from itertools import accumulate, repeat
from struct import Struct
from typing import NamedTuple

from emberkv.core.hashing import common_tokens, encode_tokens

KEY_BYTES = 16
SCOPE_BYTES = 8
MAX_TOKEN = 2**31


def _prefixed(*names: str | int) -> bytes:
    """The names, each behind its length, so that no two lists run together."""
    fields = [str(name).encode() for name in names]
    return b"".join([len(field).to_bytes(8, "little") + field for field in fields])


_prefixed_again = lru_cache(1024, typed=True)(_prefixed)
"""`_prefixed`, of names that many streams end with."""


class StreamKeys:
    """The keys of streams whose names begin alike; what they have in common is encoded once.

    >>> StreamKeys("chat", "s0").key(1, "answer") == stream_key("chat", "s0", 1, "answer")
    True
    """

    __slots__ = ("_beginning",)

    def __init__(self, *names: str | int) -> None:
        self._beginning = b"emberkv-stream-1" + _prefixed(*names)

    def key(self, *names: str | int) -> bytes:
        return sha256(self._beginning + _prefixed_again(*names)).digest()[:KEY_BYTES]


def stream_key(*names: str | int) -> bytes:
    """The key of the stream with these names."""
    return StreamKeys(*names).key()


_BOUNDS = Struct(">QQ")  # big-endian: encoded spans that go on longer together are nearer in the order of their bytes


class Span(NamedTuple):
    """Tokens ``[start, stop)`` of the stream ``key``, which is `KEY_BYTES` long.

    >>> span = Span(stream_key("a system prompt"), 0, 32)
    >>> span.size, span.cut(8, 24).start, span.encode(0, 16) == span.cut(0, 16).encode(0, 16)
    (32, 8, True)
    """

    key: bytes
    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start

    def cut(self, start: int, stop: int) -> "Span":
        """The part from ``start`` to ``stop``, counted within the span."""
        return Span(self.key, self.start + start, self.start + stop)

    def encode(self, start: int, stop: int) -> bytes:
        """Bytes that are equal for equal parts of equal streams only."""
        return self.key + _BOUNDS.pack(self.start + start, self.start + stop)

    def common(self, start: int, stop: int, encoded: bytes) -> tuple[int, int]:
        """How many tokens from ``start`` to ``stop`` ``encoded`` begins with, and how many bytes they take.

        The bytes are 0 if ``encoded`` continues differently after these tokens.
        """
        own = self.encode(start, stop)
        head = KEY_BYTES + _BOUNDS.size // 2
        if encoded[:head] != own[:head] or len(encoded) < len(own):
            return 0, 0
        _, end = _BOUNDS.unpack_from(encoded, KEY_BYTES)
        common = min(end - self.start, stop) - start
        return common, len(own) if end == self.start + stop else 0

    def token_ids(self) -> list[int]:
        """Ids made from the key and the position, so that equal spans have equal ids."""
        drawn = shake_128(self.key).digest(4 * self.stop)[4 * self.start :]
        return [int.from_bytes(drawn[at : at + 4], "little") % MAX_TOKEN for at in range(0, len(drawn), 4)]


class Tokens(NamedTuple):
    """Token ids as they are; a block of nothing else has the same block hash as in a `TokenChain`.

    >>> tokens = Tokens(array("i", [5, 6, 7, 8]))
    >>> tokens.size, tokens.cut(1, 3).token_ids()
    (4, [6, 7])
    """

    ids: "array[int]"

    @property
    def size(self) -> int:
        return len(self.ids)

    def cut(self, start: int, stop: int) -> "Tokens":
        return Tokens(self.ids[start:stop])

    def encode(self, start: int, stop: int) -> bytes:
        return encode_tokens(self.ids[start:stop])

    def common(self, start: int, stop: int, encoded: bytes) -> tuple[int, int]:
        """See `Span.common`."""
        own = self.encode(start, stop)
        common = common_tokens(own, encoded)
        return common, len(own) if common == stop - start else 0

    def token_ids(self) -> list[int]:
        return self.ids.tolist()


Piece = Span | Tokens

_new_span: Callable[[Iterable[object]], Span] = partial(tuple.__new__, Span)


class Content:
    """Pieces one after the other. Neighbours that continue each other are joined, so that equal contents look equal.

    >>> prompt = Span(stream_key("a system prompt"), 0, 32)
    >>> content = Content([prompt.cut(0, 16), prompt.cut(16, 32), Span(stream_key("a question"), 0, 8)])
    >>> len(content), len(content.pieces), content.cut(0, 32) == Content([prompt])
    (40, 2, True)
    """

    __slots__ = ("_block_size", "_ends", "_keys", "_pieces")

    def __init__(self, pieces: Iterable[Piece] = ()) -> None:
        self._take(tuple(_joined(pieces)), None)

    @classmethod
    def of_blocks(cls, keys: Sequence[bytes], size: int, tokens: int) -> "Content":
        """``tokens`` tokens in blocks of ``size``, each the beginning of the stream with its key.

        Only the last block may be shorter.
        """
        content = Content.__new__(Content)
        content._pieces, content._keys, content._block_size = None, keys, size
        content._ends = [*range(size, tokens, size), tokens] if tokens else []
        return content

    @classmethod
    def _of(cls, joined: tuple[Piece, ...], ends: list[int] | None = None) -> "Content":
        """A content of pieces that are joined already, none of them empty. ends: where each ends, if that is known."""
        content = Content.__new__(Content)
        content._take(joined, ends)
        return content

    def _take(self, joined: tuple[Piece, ...], ends: list[int] | None) -> None:
        self._pieces: tuple[Piece, ...] | None = joined
        self._ends = list(accumulate([piece.size for piece in joined])) if ends is None else ends
        self._keys: Sequence[bytes] = ()
        self._block_size = 0  # set by of_blocks alone

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """Those of a content in blocks are made when they are first asked for: traces have millions of blocks, and
        most are only encoded.
        """
        if self._pieces is None:
            sizes = [end - start for start, end in zip([0, *self._ends], self._ends, strict=False)]
            self._pieces = tuple(map(_new_span, zip(self._keys, repeat(0), sizes, strict=False)))
        return self._pieces

    def __repr__(self) -> str:
        return f"Content({list(self.pieces)})"

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Content) and self.pieces == other.pieces

    def __hash__(self) -> int:
        return hash((len(self), len(self.pieces)))

    def __add__(self, other: "Content") -> "Content":
        """The contents one after the other."""
        return self.followed_by(other.pieces) if self._ends else other

    def followed_by(self, pieces: Iterable[Piece]) -> "Content":
        """The content with more behind it. Only the seam is joined: histories are long, and additions short."""
        own, ends = self.pieces, self._ends[:-1]
        added = _joined((*own[-1:], *pieces))
        end = ends[-1] if ends else 0
        for piece in added:
            end += piece.size
            ends.append(end)
        return Content._of((*own[:-1], *added), ends)

    def cut(self, start: int, stop: int) -> "Content":
        """Tokens ``[start, stop)``; less where the content ends sooner."""
        if start == 0 and stop >= len(self):
            return self
        return Content._of(tuple(piece.cut(first, last) for piece, first, last in self._parts(start, stop)))

    def encode(self, start: int, stop: int) -> bytes:
        """Bytes that stand for tokens ``[start, stop)``, which the content must have: equal for equal contents only."""
        pieces, ends, encoded = self.pieces, self._ends, b""
        index = bisect_right(ends, start)
        while start < stop:
            piece, end = pieces[index], ends[index]
            last = stop if stop < end else end
            before = end - piece.size
            encoded += piece.encode(start - before, last - before)
            start, index = last, index + 1
        return encoded

    def begins_like(self, other: "Content", stop: int) -> bool:
        """Whether the first ``stop`` tokens are those of ``other``; both have as many."""
        if not stop:
            return True
        start = 0
        for own, others in zip(self.pieces, other.pieces, strict=False):
            if own != others:
                rest = stop - start
                return min(own.size, others.size) >= rest and own.cut(0, rest) == others.cut(0, rest)
            start += own.size
            if start >= stop:
                break
        return True

    def common_tokens(self, start: int, stop: int, encoded: bytes) -> int:
        """How many leading tokens of ``[start, stop)`` the tokens begin with that `encode` gave ``encoded`` for."""
        total = at = 0
        for piece, first, last in self._parts(start, stop):
            common, read = piece.common(first, last, encoded[at:])
            total += common
            at += read
            if not read:
                break
        return total

    def encode_blocks(self, start: int, stop: int, size: int) -> list[bytes]:
        """`encode` of each ``size`` tokens of ``[start, stop)`` in turn; the last block may be shorter."""
        pack = _BOUNDS.pack
        whole = pack(0, size)
        if size == self._block_size and start < stop and start % size == 0:
            first, last = start // size, stop // size
            encoded = [key + whole for key in self._keys[first:last]]
            if stop > last * size:
                encoded.append(self._keys[last] + pack(0, stop - last * size))
            return encoded
        encoded = []
        pieces, ends = self.pieces, self._ends
        index = bisect_right(ends, start)
        while start < stop:
            piece, end = pieces[index], ends[index]
            last, limit = start + size, end if end < stop else stop
            if last <= limit and isinstance(piece, Span):  # and so may be the blocks that follow
                key, first = piece.key, piece.stop - end + start
                while last <= limit:
                    encoded.append(key + (pack(first, first + size) if first else whole))
                    first += size
                    start, last = last, last + size
            else:
                last = min(last, stop)
                encoded.append(self.encode(start, last))
                start = last
            if start == end:
                index += 1
            elif start > end:
                index = bisect_right(ends, start, index)
        return encoded

    def token_ids(self, start: int, stop: int) -> list[int]:
        """Token ids below `MAX_TOKEN`, made up where only the origin is known; equal contents give equal ids."""
        return [token for piece in self.cut(start, stop).pieces for token in piece.token_ids()]

    def _parts(self, start: int, stop: int) -> Iterator[tuple[Piece, int, int]]:
        """The pieces that ``[start, stop)`` touches, each with the part's bounds within the piece."""
        for index in range(bisect_right(self._ends, start), len(self.pieces)):
            if start >= stop:
                return
            piece, end = self.pieces[index], self._ends[index]
            before = end - piece.size
            yield piece, start - before, min(stop, end) - before
            start = end


def _joined(pieces: Iterable[Piece]) -> list[Piece]:
    joined: list[Piece] = []
    last: Piece | None = None
    for piece in pieces:
        if isinstance(piece, Span):
            key, start, stop = piece
            if start == stop:
                continue
            if start and isinstance(last, Span) and last.stop == start and last.key == key:
                joined[-1] = last = Span(key, last.start, stop)
                continue
        elif not piece.ids:
            continue
        elif isinstance(last, Tokens):
            joined[-1] = last = Tokens(last.ids + piece.ids)
            continue
        joined.append(piece)
        last = piece
    return joined
