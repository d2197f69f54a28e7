"""A lower bound on the number of tokens of a text, found without encoding it."""

import json
from collections.abc import Callable
from typing import Any

from tokenizers import Tokenizer as Backend
from transformers.convert_slow_tokenizer import bytes_to_unicode

_USUAL_BYTES = 16
"""Tokens of up to so many bytes are not looked at one by one: every text is taken to consist of such."""

_NORMALIZERS = frozenset({"NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Prepend", "Replace", "Sequence"})
_PRE_TOKENIZERS = frozenset({"ByteLevel", "Split", "Digits", "Metaspace", "Sequence"})


class TokenBound:
    """Divides a text's bytes, as the tokenizer normalizes them, by the longest token that consists of such bytes.

    It bounds nothing (0) for tokenizers that may drop characters or take any number of them for one unknown token: all
    but BPE and Unigram models with a token for each byte, and normalizers that could remove more from a part of a text
    than from the whole.
    """

    def __init__(self, backend: Backend) -> None:
        self._normalizer = backend.normalizer
        vocabulary = backend.get_vocab(with_added_tokens=True)
        described = json.loads(backend.to_str())
        alphabet: Callable[[], dict[int, str]] = bytes_to_unicode  # GPT-2's letters for bytes; untyped
        self._letters = alphabet() if _is_byte_level(described) else None
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


def _is_byte_level(described: dict[str, Any]) -> bool:
    return "ByteLevel" in _types(described["pre_tokenizer"], "pretokenizers")


def _keeps_everything(described: dict[str, Any], vocabulary: dict[str, int], letters: dict[int, str] | None) -> bool:
    model = described["model"]
    if model["type"] not in ("BPE", "Unigram") or _types(described["normalizer"], "normalizers") - _NORMALIZERS:
        return False
    if _types(described["pre_tokenizer"], "pretokenizers") - _PRE_TOKENIZERS or _removes(described):
        return False
    if letters is not None:
        return all(letter in vocabulary for letter in letters.values())
    return bool(model.get("byte_fallback")) and all(f"<0x{byte:02X}>" in vocabulary for byte in range(256))


def _types(component: dict[str, Any] | None, parts: str) -> set[str]:
    if component is None:
        return set()
    return {component["type"]}.union(*(_types(part, parts) for part in component.get(parts, ())))


def _removes(described: dict[str, Any]) -> bool:
    """Whether a pre-tokenizer removes what it splits at, or a normalizer replaces a text by a shorter one."""
    text = json.dumps([described["pre_tokenizer"], described["normalizer"]])
    return '"behavior": "Removed"' in text or '"content": ""' in text
