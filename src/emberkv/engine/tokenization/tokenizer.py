"""The interface of a tokenizer, and the tokens that all requests with one system prompt begin with."""

from array import array
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Protocol

from emberkv.errors import RequestError


class IncrementalDetokenizer(Protocol):
    """Turns a growing answer into text pieces that are always whole characters."""

    def push(self, token_ids: Sequence[int]) -> str:
        """Text that is now certain, possibly empty; never half a character."""
        ...

    def flush(self) -> str:
        """What was held back; an unfinished character becomes U+FFFD."""
        ...


@dataclass(frozen=True, slots=True)
class KnownTokens:
    """The token ids of a part of a text, ``[start, end)`` in characters: not always those that encoding it gives."""

    start: int
    end: int
    token_ids: "array[int]"


class Tokenizer(Protocol):
    """What serving needs of a tokenizer."""

    @property
    def cache_bytes(self) -> int:
        """Memory that remembered encodings take, of all owners together."""
        ...

    def encode(
        self,
        text: str,
        *,
        add_special_tokens: bool,
        max_tokens: int | None = None,
        known: Sequence[KnownTokens] = (),
    ) -> "array[int]":
        """The text's token ids, as the core takes them (`token_array`).

        known: parts that have these ids, in order; each ends at one of `cuts`.

        Raises PromptTooLongError for a text that is found to have more than ``max_tokens``.
        """
        ...

    def cuts(self, text: str, start: int) -> Iterator[int]:
        """Positions of ``text`` from ``start`` on, in order, before which any other text leaves the ids behind it the
        same: where special tokens begin.
        """
        ...

    def template_reads(self, variable: str) -> bool:
        """Whether the chat template has a variable of that name, so that setting it may change a prompt."""
        ...

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt text of a conversation, by the model's chat template.

        It ends where the answer begins; without ``add_generation_prompt`` behind the last message, and with
        ``continue_final_message`` within that, to be continued. variables: further ones for the template.

        Raises RequestError when the model has no template or the template rejects the messages.
        """
        ...

    def token_text(self, token_id: int) -> str:
        """One token's own text, for logprobs; bytes that are no whole character show as U+FFFD."""
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """One token's own bytes, which need not be whole characters."""
        ...

    def detokenizer(self, keep: Collection[str] = ()) -> IncrementalDetokenizer:
        """A fresh one, for one answer. It leaves special tokens out, except those whose text is in ``keep``."""
        ...

    chat_problem: str | None
    """Why the chat template is not to be used; None: it is."""

    def files(self) -> dict[str, bytes]:
        """The tokenizer and its chat template as files, by name."""
        ...

    @property
    def description(self) -> Mapping[str, Any]:
        """Its class, its special tokens by name ("eos_token"), and its ``chat_template``."""
        ...

    def remembering_for(self, owner: str) -> "Tokenizer":
        """The same tokenizer, without what it remembers of texts that other owners have encoded."""
        ...


OPENINGS = (
    "Hello", "\nleading line", " leading space", "1 and 2", "what is it?", "\tleading tab", "(aside)", '"quoted"',
    "<b>", "# heading", "- item", "/path", "{}", "Ärger", "你好", "👋", "def f():", "...",
)  # fmt: skip
"""User messages whose beginnings differ in kind, because a first character may merge with the token before it. The
kinds that differ most come first.
"""


def shared_prefix(tokenizer: Tokenizer, system_prompt: str) -> list[int]:
    """The longest run of token ids that all requests with ``system_prompt`` and without tools begin with.

    It is found by rendering conversations with the model's chat template and comparing their tokens. A model without
    a usable template gets plain text, and so does its prompt here. Raises RequestError when the template takes
    conversations but no system prompt, or the prompt is no valid Unicode.
    """
    if _takes_chats(tokenizer):
        texts = [tokenizer.render_chat(_conversation(system_prompt, opening)) for opening in OPENINGS]
        sequences = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    else:
        texts = [system_prompt + opening for opening in OPENINGS]
        sequences = [tokenizer.encode(text, add_special_tokens=True) for text in texts]
    return common_prefix(sequences)


def _takes_chats(tokenizer: Tokenizer) -> bool:
    try:
        tokenizer.render_chat([{"role": "user", "content": OPENINGS[0]}])
    except RequestError:  # no template, which serves completions only
        return False
    return True


def _conversation(system_prompt: str, opening: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": system_prompt}, {"role": "user", "content": opening}]


def common_prefix(sequences: Sequence["array[int]"]) -> list[int]:
    """The longest run of token ids that all of the sequences begin with."""
    first, last = min(sequences), max(sequences)  # all others lie between them, and so begin with what both do
    pairs = takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))
    return [token for token, _ in pairs]
