"""What makes long texts cheap: they are encoded in parts, whose token ids a cache keeps for all tenants, and a bound of
their tokens is found without encoding them.
"""

import itertools
import json
import re
import sys
import threading
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE
from transformers.convert_slow_tokenizer import bytes_to_unicode

SHORTEST = 512
"""Characters of a part, at least."""

_GAP = re.compile(r"[A-Za-z](?= [A-Za-z])")
_BEFORE = ("", "a", "Ab", "x1", "it's", "end.", "\n", "\t", "  ", "é", "你", "1 and", "(", "don't", "a\u0301", "👋")
_AFTER = ("", "b", "B2", "'s", "'LL", ".", "\n", "\n\n", " ", "  ", " \n", "é", "\u0301", "你", ")", "9", "👋")


def parts(text: str) -> Iterator[str]:
    """``text`` cut at gaps. Where depends only on what comes before, so that equal beginnings give equal parts."""
    start = 0
    while gap := _GAP.search(text, start + SHORTEST):
        yield text[start : gap.end()]
        start = gap.end()
    yield text[start:]


def cuts_at_gaps(backend: Backend, added: Sequence[AddedToken]) -> bool:
    """Whether this tokenizer encodes the parts of any text as it does the whole.

    It must be byte-level BPE, whose tokens never leave the words that a regular expression finds from left to right; no
    added token may reach over a space; and the words on both sides of a gap must be those of the whole, which is tried.
    """
    plain = isinstance(backend.model, BPE) and not backend.model.dropout
    if not plain or any(token.rstrip or re.search(r"\s", token.content) for token in added):
        return False
    if _described(backend.normalizer) not in (None, {"type": "NFC"}):
        return False
    return _is_byte_level(_described(backend.pre_tokenizer)) and all(
        _splits_alike(backend, *each) for each in _contexts()
    )


def _described(component: Any) -> Any:
    """As in a tokenizer file; None without it."""
    return None if component is None else json.loads(component.__getstate__())


def _is_byte_level(described: dict[str, Any] | None) -> bool:
    steps = [described] if described and described["type"] != "Sequence" else (described or {}).get("pretokenizers", [])
    if not steps or steps[-1]["type"] != "ByteLevel":
        return False
    if len(steps) == 1:
        return bool(steps[0]["use_regex"])
    split = steps[0]
    pattern = split.get("pattern", {}).get("Regex", "(?<")
    return (
        len(steps) == 2
        and split["type"] == "Split"
        and split["behavior"] == "Isolated"
        and not split["invert"]
        and "(?<" not in pattern  # a look at what lies behind a word
    )


def _contexts() -> Iterator[tuple[str, str]]:
    for before, after in itertools.product(_BEFORE, _AFTER):
        yield f"{before} {before}q", f" z{after} {after}"


def _splits_alike(backend: Backend, before: str, after: str) -> bool:
    words = backend.pre_tokenizer.pre_tokenize_str
    return [word for word, _ in words(before) + words(after)] == [word for word, _ in words(before + after)]


class PieceCache:
    """Maps an owner's piece of text to its token ids, in at most ``max_bytes`` of memory. Thread-safe.

    An owner never gets what another one put. The least recently used pieces go first, whosever they are.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._bytes = 0
        self._entries: OrderedDict[tuple[str, str], array[int]] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def bytes_used(self) -> int:
        """Bytes of all texts and ids, never above the limit."""
        return self._bytes

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, owner: str, piece: str) -> "array[int] | None":
        """The ids of ``piece``, to be read only; None when it is not here."""
        key = (owner, piece)
        with self._lock:
            ids = self._entries.get(key)
            if ids is not None:
                self._entries.move_to_end(key)
            return ids

    def put(self, owner: str, pieces: "Mapping[str, array[int]]") -> None:
        """Remember the ids of pieces, forgetting older ones for them; one larger than the cache is not remembered."""
        with self._lock:
            for piece, ids in pieces.items():
                size = _size(piece, ids)
                if size > self.max_bytes or (owner, piece) in self._entries:
                    continue
                self._entries[owner, piece] = ids
                self._bytes += size
                while self._bytes > self.max_bytes:
                    (_, oldest), forgotten = self._entries.popitem(last=False)
                    self._bytes -= _size(oldest, forgotten)


def _size(piece: str, ids: "array[int]") -> int:
    return sys.getsizeof(piece) + sys.getsizeof(ids)


_USUAL_BYTES = 16
"""Tokens of up to so many bytes are not looked at one by one: every text is taken to consist of such."""

_NORMALIZERS = frozenset({"NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Prepend", "Replace", "Sequence"})
_PRE_TOKENIZERS = frozenset({"ByteLevel", "Split", "Digits", "Metaspace", "Sequence"})


class TokenBound:
    """A lower bound on the number of tokens of a text, found without encoding it.

    Divides a text's bytes, as the tokenizer normalizes them, by the longest token that consists of such bytes.

    It bounds nothing (0) for tokenizers that may drop characters or take any number of them for one unknown token: all
    but BPE and Unigram models with a token for each byte, and normalizers that could remove more from a part of a text
    than from the whole.
    """

    def __init__(self, backend: Backend) -> None:
        self._normalizer = backend.normalizer
        vocabulary = backend.get_vocab(with_added_tokens=True)
        described = json.loads(backend.to_str())
        alphabet: Callable[[], dict[int, str]] = bytes_to_unicode  # GPT-2's letters for bytes; untyped
        self._letters = alphabet() if _has_byte_level_step(described) else None
        self.is_sound = _keeps_everything(described, vocabulary, self._letters)
        added = backend.get_added_tokens_decoder().values()
        self._counts_space = not any(token.lstrip or token.rstrip for token in added)
        # An added token's text is matched as it is, and an ordinary one's in the letters that stand for bytes.
        texts = {token.content for token in added}
        units = [
            set(token if self._letters is not None and token not in texts else token.encode()) for token in vocabulary
        ]
        sizes = [len(token) if self._letters is not None else len(token.encode()) for token in vocabulary]
        by_size = sorted(zip(sizes, units, strict=True), key=lambda each: each[0], reverse=True)
        self._long: list[tuple[int, set[Any]]] = [each for each in by_size if each[0] > _USUAL_BYTES]

    def least_tokens(self, text: str) -> int:
        """At most as many as ``text`` has; 0 where nothing is known."""
        if not self.is_sound:
            return 0
        if self._normalizer is not None:
            text = self._normalizer.normalize_str(text)
        encoded = text.encode()
        present = set(encoded)
        size = len(encoded) if self._counts_space else sum(map(len, encoded.split()))
        units = present if self._letters is None else {self._letters[byte] for byte in present} | present
        longest = next((length for length, token in self._long if token <= units), _USUAL_BYTES)
        return -(-size // longest)


def _has_byte_level_step(described: dict[str, Any]) -> bool:
    return "ByteLevel" in _types(described["pre_tokenizer"], "pretokenizers")


def _keeps_everything(described: dict[str, Any], vocabulary: dict[str, int], letters: dict[int, str] | None) -> bool:
    model = described["model"]
    if model["type"] not in ("BPE", "Unigram") or _types(described["normalizer"], "normalizers") - _NORMALIZERS:
        return False
    if _types(described["pre_tokenizer"], "pretokenizers") - _PRE_TOKENIZERS or _removes(described):
        return False
    if letters is not None:
        return all(letter in vocabulary for letter in letters.values())
    spelt = (byte for byte in range(256) if byte >= 0x80 or chr(byte) not in vocabulary)
    return bool(model.get("byte_fallback")) and all(f"<0x{byte:02X}>" in vocabulary for byte in spelt)


def _types(component: dict[str, Any] | None, parts: str) -> set[str]:
    if component is None:
        return set()
    return {component["type"]}.union(*(_types(part, parts) for part in component.get(parts, ())))


def _removes(described: dict[str, Any]) -> bool:
    """Whether a pre-tokenizer removes what it splits at, or a normalizer replaces a text by a shorter one."""
    text = json.dumps([described["pre_tokenizer"], described["normalizer"]])
    return '"behavior": "Removed"' in text or '"content": ""' in text
