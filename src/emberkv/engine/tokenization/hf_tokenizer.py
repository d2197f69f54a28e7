"""The tokenizer of a transformers model: encodes at the cost of what is new, renders chats, detokenizes in steps."""

import json
import logging
import re
import sys
import tempfile
from array import array
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from copy import copy
from inspect import signature
from itertools import pairwise
from pathlib import Path
from threading import Event
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from emberkv.core.hashing import token_array
from emberkv.engine.tokenization.long_texts import PieceCache, TokenBound, cuts_at_gaps, parts
from emberkv.engine.tokenization.template_adaptation import TemplateAdapter
from emberkv.engine.tokenization.template_check import (
    NO_TEMPLATE,
    PROBE_TOOL,
    bound_template,
    template_deadline,
    template_variables,
)
from emberkv.engine.tokenization.tokenizer import IncrementalDetokenizer, KnownTokens
from emberkv.errors import PromptTooLongError, RequestError, reason_of

_log = logging.getLogger(__name__)

_RESERVED_VARIABLES = frozenset(signature(PreTrainedTokenizerFast.apply_chat_template).parameters) | {"messages"}

_BROKEN = "\ufffd"

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
"""How tokenizers with byte fallback write a byte that is no character."""

_PRINTED_BYTES = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
_OTHER_BYTES = [byte for byte in range(256) if byte not in _PRINTED_BYTES]
_BYTE_OF = {chr(byte): byte for byte in _PRINTED_BYTES} | {chr(256 + n): byte for n, byte in enumerate(_OTHER_BYTES)}
"""How byte-level tokenizers write each byte of a token: as the Latin-1 character, or from U+0100 on."""

COUNTED = 2
"""The tokens of a text that is too long are counted up to so many times what is accepted."""

DEFAULT_CACHE_BYTES = 64 << 20
_SHORT_TEXT = 4096
"""Characters that are encoded while other threads wait: for fewer than these, a batch call costs more than it gives."""


class HFTokenizer:
    """A Tokenizer over ``tokenizer``, which it takes over: its truncation and padding are switched off.

    A chat server encodes the same growing conversation again at every turn. Tokenizers cut a text at special
    tokens before anything else, so the text from one special token to the next always encodes alike, and a
    cache of such pieces leaves only the new ones to encode. The result equals encoding the whole text; where a
    tokenizer has features that let pieces influence one another, the whole text is encoded. Where words do not, either,
    long pieces are cut again between words, so that a text that grows at its end is not encoded anew.

    chat_problem: why its chat template is not to be used, the template being then never run; None: it is.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        *,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
        chat_problem: str | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._adapter = TemplateAdapter(self._render_probe)
        self.chat_problem = chat_problem if chat_problem or tokenizer.chat_template else NO_TEMPLATE
        self._template_variables: set[str] = set()
        if self.chat_problem is None:
            given = tokenizer.chat_template
            for text in given.values() if isinstance(given, dict) else (given,):
                bound_template(text)
                self._template_variables |= template_variables(text)
        self._backend: Backend = tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = tokenizer.split_special_tokens
        added = self._backend.get_added_tokens_decoder()
        self._special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self._cut = _cut_pattern(self._backend, list(added.values()))
        self._frame = _template_frame(self._backend)
        self._cuts_at_gaps = self._cut is not None and cuts_at_gaps(self._backend, list(added.values()))
        self._bound = TokenBound(self._backend)
        self._cache = PieceCache(cache_bytes)
        self._repeated_start = Event()
        self._owner = ""
        self._by_owner: dict[str, HFTokenizer] = {"": self}
        self._anchor: list[int] = self._backend.encode("a", add_special_tokens=False).ids[-1:]

    @property
    def cache(self) -> PieceCache:
        """The pieces that need no encoding."""
        return self._cache

    @property
    def cache_bytes(self) -> int:
        return self._cache.bytes_used

    @property
    def eos_token_id(self) -> int | None:
        token_id: int | None = self._tokenizer.eos_token_id
        return token_id

    def encode(
        self,
        text: str,
        *,
        add_special_tokens: bool,
        max_tokens: int | None = None,
        known: Sequence[KnownTokens] = (),
    ) -> "array[int]":
        """The ids of ``text``, in which special tokens written out count as such.

        add_special_tokens: put the tokens around it that the tokenizer's post-processor adds, such as BOS. A text that
        begins with those of its start gets no second ones; the first such text is logged.

        max_tokens: a text with more is refused, and nothing of it is remembered. The error has the number of its
        tokens, by which clients shorten a conversation. Of more than `COUNTED` times ``max_tokens`` it has a lower
        bound: such a text is not encoded to its end, or not at all where its length is enough to know. known: see
        `Tokenizer.encode`; a tokenizer without `cuts` encodes the whole text.

        Raises PromptTooLongError for such a text, RequestError for one that is no valid Unicode (a lone surrogate).
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(f"the text is not valid Unicode at character {error.start}; send valid UTF-8") from error
        most = sys.maxsize if max_tokens is None else max_tokens
        if len(text) > COUNTED * most and (least := self._bound.least_tokens(text)) > COUNTED * most:
            raise _too_long(least, most, is_whole=False)
        if self._cut is None or (add_special_tokens and self._frame is None):
            return self._without_repeated_start(self._encode_whole(text, add_special_tokens), add_special_tokens)
        before, after = self._frame if add_special_tokens and self._frame is not None else ([], [])
        ids = token_array(before)
        new: dict[str, array[int]] = {}
        for part in self._parts(self._cut, text, known):
            ids.extend(self._encode_piece(part, new) if isinstance(part, str) else part.token_ids)
            if len(ids) - len(before) > COUNTED * most:
                raise _too_long(len(ids) - len(before), most, is_whole=False)
        ids = self._without_repeated_start(ids, add_special_tokens)
        if len(ids) > most:
            raise _too_long(len(ids), most, is_whole=True)
        ids.extend(token_array(after))
        self._cache.put(self._owner, new)
        return ids

    def template_reads(self, variable: str) -> bool:
        """See `Tokenizer.template_reads`."""
        return variable in self._template_variables

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """See `Tokenizer.render_chat`.

        Messages that the template does not take are rewritten for it (`TemplateAdapter`).

        Raises RequestError when the model has no template, the template rejects the messages or runs longer than
        `TEMPLATE_SECONDS`, or a variable has a name that is not the caller's to set.
        """
        variables = variables or {}
        reserved = sorted(variables.keys() & _RESERVED_VARIABLES)
        if reserved:
            raise RequestError(
                f"chat_template_kwargs has {reserved[0]!r}, which cannot be set there", param="chat_template_kwargs"
            )
        if self.chat_problem is not None:
            raise RequestError(f"{self.chat_problem}; use /v1/completions", param="messages")
        if not messages:
            raise RequestError("messages is empty; it must hold at least one message", param="messages")
        try:
            with template_deadline():
                rendered = self._tokenizer.apply_chat_template(
                    self._adapter.adapted(messages, has_tools=bool(tools)),
                    tools=[dict(tool) for tool in tools] if tools else None,
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                    continue_final_message=continue_final_message,
                    **variables,
                )
        except Exception as error:  # whatever the template's program does wrong
            raise RequestError(
                f"the model's chat template rejects these messages: {reason_of(error)}", param="messages"
            ) from error
        return str(rendered)

    def _render_probe(self, messages: list[dict[str, Any]], has_tools: bool) -> str:
        return str(
            self._tokenizer.apply_chat_template(
                messages,
                tools=[dict(PROBE_TOOL)] if has_tools else None,
                tokenize=False,
                add_generation_prompt=True,
            )
        )

    def token_text(self, token_id: int) -> str:
        """One token's own text, special tokens too; bytes that are no whole character show as U+FFFD.

        An id without a token is an empty text.
        """
        # Behind another token, because decoders strip the space that a text's first token begins with.
        before = self._backend.decode(self._anchor, skip_special_tokens=False)
        text: str = self._backend.decode([*self._anchor, token_id], skip_special_tokens=False)
        return text[len(before) :]

    def token_bytes(self, token_id: int) -> bytes:
        text = self.token_text(token_id)
        if _BROKEN not in text:
            return text.encode()
        piece = self._backend.id_to_token(token_id) or ""
        if found := _BYTE_TOKEN.fullmatch(piece):
            return bytes.fromhex(found[1])
        if all(char in _BYTE_OF for char in piece):
            return bytes(_BYTE_OF[char] for char in piece)
        return text.encode()

    @property
    def description(self) -> dict[str, Any]:
        """What a client needs to render and count as this tokenizer does: its class, special tokens and template."""
        special = {name: str(token) for name, token in self._tokenizer.special_tokens_map.items() if token}
        return {
            "tokenizer_class": type(self._tokenizer).__name__,
            "vocab_size": self._backend.get_vocab_size(with_added_tokens=True),
            "bos_token": None,
            "eos_token": None,
            "pad_token": None,
            "unk_token": None,
            **{name: token for name, token in special.items() if name != "additional_special_tokens"},
            "chat_template": self._tokenizer.chat_template,
        }

    def files(self) -> dict[str, bytes]:
        """The tokenizer and its chat template as files, by name, from which transformers makes the same tokenizer."""
        with tempfile.TemporaryDirectory(prefix="emberkv-tokenizer-") as folder:
            self._tokenizer.save_pretrained(folder)
            return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir()) if path.is_file()}

    def backend_json(self) -> str:
        """The tokenizer as the tokenizers library writes it, added tokens included."""
        return self._backend.to_str()

    def text_encoder(self, markers: Collection[str]) -> Callable[[str], Sequence[int]]:
        """Encodes text of which nothing is a special token but ``markers``, as it is encoded within a longer text."""
        described = json.loads(self._backend.to_str())
        for token in described["added_tokens"]:
            token["special"] = token["special"] and token["content"] not in markers
        backend = Backend.from_str(json.dumps(described))
        backend.encode_special_tokens = True
        before = "\x02"  # because some tokenizers treat the beginning of a text differently
        skipped = len(backend.encode(before, add_special_tokens=False).ids)

        def encode(text: str) -> Sequence[int]:
            ids: list[int] = backend.encode(before + text, add_special_tokens=False).ids
            return ids[skipped:]

        return encode

    def remembering_for(self, owner: str) -> "HFTokenizer":
        """The same tokenizer, which finds in the cache what the owner has encoded and nothing else: finding others'
        pieces would tell, by the time that encoding takes, what they have sent.
        """
        if owner not in self._by_owner:
            own = copy(self)
            own._owner = owner
            self._by_owner.setdefault(owner, own)
        return self._by_owner[owner]

    def detokenizer(self, keep: Collection[str] = ()) -> IncrementalDetokenizer:
        """A fresh one, for one answer. It leaves special tokens out, except those whose text is in ``keep``."""
        kept = {self._backend.token_to_id(text) for text in keep}
        return WindowDetokenizer(self._backend, self._special_ids - kept)

    def _without_repeated_start(self, ids: "array[int]", added: bool) -> "array[int]":
        """``ids`` without the tokens that the post-processor has put before a text that begins with the same ones."""
        start = token_array(self._frame[0]) if added and self._frame is not None else token_array([])
        if not start or ids[: 2 * len(start)] != start + start:
            return ids
        if not self._repeated_start.is_set():
            self._repeated_start.set()
            _log.warning(
                "a prompt begins with %s, which the tokenizer adds itself; it is not added a second time. This is "
                "logged once: send prompts without it, or as token ids",
                " ".join(self._backend.id_to_token(token_id) or str(token_id) for token_id in start),
            )
        return ids[len(start) :]

    def _encode_whole(self, text: str, add_special_tokens: bool) -> "array[int]":
        if len(text) <= _SHORT_TEXT:
            return token_array(self._backend.encode(text, add_special_tokens=add_special_tokens).ids)
        # `encode` keeps other threads from running, which takes seconds for a long text; the batch call does not.
        (encoding,) = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return token_array(encoding.ids)

    def _encode_piece(self, piece: str, new: "dict[str, array[int]]") -> "array[int]":
        """The piece's ids, from the cache or ``new``, to which it is added if it is in neither."""
        ids = new.get(piece)
        if ids is None:
            ids = self._cache.get(self._owner, piece)
        if ids is None:
            ids = new[piece] = self._encode_whole(piece, add_special_tokens=False)
        return ids

    def cuts(self, text: str, start: int) -> Iterator[int]:
        """See `Tokenizer.cuts`; none where cutting could change ids."""
        return iter(()) if self._cut is None else (match.start() for match in self._cut.finditer(text, start))

    def _parts(self, cut: re.Pattern[str], text: str, known: Sequence[KnownTokens]) -> Iterator[str | KnownTokens]:
        """``text`` in parts that are encoded one by one, and those whose ids are known."""
        done = 0
        for each in (*known, None):
            for piece in self._pieces(cut, text[done : None if each is None else each.start]):
                yield from parts(piece) if self._cuts_at_gaps else (piece,)
            if each is not None:
                yield each
                done = each.end

    @staticmethod
    def _pieces(cut: re.Pattern[str], text: str) -> list[str]:
        """``text`` cut before each special token.

        The special token stays with the text behind it: some tokenizers treat the beginning of a text
        differently (a leading space), and so a piece begins a text in its encoding only if it does in the whole.
        """
        starts = [match.start() for match in cut.finditer(text)]
        bounds = [*dict.fromkeys([0, *starts]), len(text)]
        return [text[start:end] for start, end in pairwise(bounds)]


def _too_long(tokens: int, most: int, *, is_whole: bool) -> PromptTooLongError:
    """is_whole: whether ``tokens`` are all of the text's."""
    counted = f"{tokens} tokens" if is_whole else f"at least {tokens} tokens"
    text = f"the prompt has {counted}; at most {most} are accepted"
    return PromptTooLongError(text, prompt_tokens=tokens, limit=most)


def _cut_pattern(backend: Backend, added: list[AddedToken]) -> re.Pattern[str] | None:
    """Finds the added tokens that the backend splits a raw text at; None when cutting there could show.

    The backend takes the leftmost and of those the longest match. A token that takes in the space to its left, or
    looks at its neighbours (single_word), is influenced by what another piece would hold; one that takes in the
    space to its right is not, unless a token itself begins with space.
    """
    splitting = [token for token in added if not token.normalized and token.content]
    if not splitting or backend.encode_special_tokens:
        return None
    if any(token.lstrip or token.single_word for token in splitting):
        return None
    if any(token.rstrip for token in splitting) and any(token.content[0].isspace() for token in splitting):
        return None
    return any_of(token.content for token in splitting)


def any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """Finds any of ``texts``, none of which is empty: the leftmost, and of those the longest.

    Grouped by their first character, because `re` tries all alternatives wherever one of them could begin: thousands of
    added tokens, some of which begin with a space, would all be tried at each space of a text.
    """
    by_first: dict[str, list[str]] = defaultdict(list)
    for text in sorted(texts, key=len, reverse=True):
        by_first[text[0]].append(re.escape(text[1:]))
    return re.compile("|".join(f"{re.escape(first)}(?:{'|'.join(rests)})" for first, rests in by_first.items()))


def _template_frame(backend: Backend) -> tuple[list[int], list[int]] | None:
    """The ids that the post-processor puts before and after every text; None when it is not that simple."""
    probe = backend.encode("a", add_special_tokens=False).ids
    framed = backend.encode("a", add_special_tokens=True)
    mask = framed.special_tokens_mask
    if not probe or 0 not in mask:
        return None
    start, end = mask.index(0), len(mask) - mask[::-1].index(0)
    if framed.ids[start:end] != probe:
        return None
    return framed.ids[:start], framed.ids[end:]


_CONTEXT = 8  # ids kept from what is already out: more than the bytes of one character
_WINDOW = 32  # ids after which the window is cut back to the context
_ANY_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")


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
        self._falls_back_to_bytes = _has_byte_fallback(backend)
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
        if self._falls_back_to_bytes and _ANY_BYTE_TOKEN.fullmatch(token):
            return ""  # one bad byte turns the whole run into U+FFFD, so that nothing of it is certain yet
        text = self._decode(self._ids)
        certain = len(text) - text.endswith(_BROKEN)
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


def _has_byte_fallback(backend: Backend) -> bool:
    """Whether tokens named like ``<0x41>`` stand for bytes."""
    return backend.decoder is not None and backend.decoder.decode(["<0x41>"]).strip() == "A"
