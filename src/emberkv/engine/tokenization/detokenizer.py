"""Turns sampled token ids into text step by step, at a constant cost for each token."""

import re
from collections.abc import Sequence

from tokenizers import Tokenizer as Backend

_CONTEXT = 8  # ids kept from what is already out: more than the bytes of one character
_WINDOW = 32  # ids after which the window is cut back to the context
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")


class WindowDetokenizer:
    """An IncrementalDetokenizer over a backend tokenizer.

    The pieces of an answer, joined, are exactly what decoding the whole answer gives. Two facts make that possible
    at a constant cost for each token. What decoding adds for a token depends on few tokens before it, so that a short
    window of ids is decoded, not the answer. And only the end of a text can still change: a sequence of bytes that is
    no character yet shows as one U+FFFD, and a run of byte-fallback tokens is decided when it ends.

    skipped_ids: those that are left out.
    """

    def __init__(self, backend: Backend, skipped_ids: frozenset[int]) -> None:
        self._backend = backend
        self._skipped_ids = skipped_ids
        self._falls_back_to_bytes = has_byte_fallback(backend)
        self._ids: list[int] = []
        self._emitted = 0  # characters of the window's text that are out

    def push(self, token_ids: Sequence[int]) -> str:
        """Text that is now certain, possibly empty; never half a character."""
        return "".join(self._push_one(token_id) for token_id in token_ids)

    def flush(self) -> str:
        """What was held back; an unfinished character becomes U+FFFD."""
        text = self._decode(self._ids)
        piece, self._emitted = text[self._emitted :], len(text)
        return piece

    def _push_one(self, token_id: int) -> str:
        token = None if token_id in self._skipped_ids else self._backend.id_to_token(token_id)
        if token is None:
            return ""
        self._ids.append(token_id)
        if self._falls_back_to_bytes and _BYTE_TOKEN.fullmatch(token):
            return ""  # one bad byte turns the whole run into U+FFFD, so that nothing of it is certain yet
        text = self._decode(self._ids)
        certain = len(text) - text.endswith(_REPLACEMENT)
        piece = text[self._emitted : certain]
        self._emitted = max(self._emitted, certain)
        if len(self._ids) > _WINDOW:
            self._cut_window(uncertain=len(text) - self._emitted)
        return piece

    def _cut_window(self, uncertain: int) -> None:
        """Forget all but the last ids. The text of fewer ids may begin differently but ends the same."""
        del self._ids[:-_CONTEXT]
        self._emitted = len(self._decode(self._ids)) - uncertain

    def _decode(self, ids: list[int]) -> str:
        text: str = self._backend.decode(ids, skip_special_tokens=False)  # those to be skipped are not in the window
        return text


def has_byte_fallback(backend: Backend) -> bool:
    """Whether tokens named like ``<0x41>`` stand for bytes."""
    return backend.decoder is not None and backend.decoder.decode(["<0x41>"]).strip() == "A"
