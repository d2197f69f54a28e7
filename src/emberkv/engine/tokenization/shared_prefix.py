"""What every request with a certain system prompt begins with, in tokens."""

from array import array
from collections.abc import Sequence
from itertools import takewhile

from emberkv.engine.tokenization.tokenizer import Tokenizer
from emberkv.errors import RequestError

_OPENINGS = (
    "Hello", "what is it?", "1 and 2", " leading space", "\nleading line", "\tleading tab", "(aside)", '"quoted"',
    "<b>", "# heading", "- item", "/path", "{}", "Ärger", "你好", "👋", "def f():", "...",
)  # fmt: skip
"""User messages whose beginnings differ in kind, because a first character may melt into the token before it."""


def shared_prefix(tokenizer: Tokenizer, system_prompt: str) -> list[int]:
    """The longest run of token ids that all requests with ``system_prompt`` and without tools begin with.

    It is found by rendering conversations with the model's chat template and comparing their tokens. A model without
    a usable template gets plain text, and so does its prompt here. Raises RequestError when the template takes
    conversations but no system prompt, or the prompt is no valid Unicode.
    """
    if _takes_chats(tokenizer):
        texts = [tokenizer.render_chat(_conversation(system_prompt, opening)) for opening in _OPENINGS]
        sequences = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    else:
        texts = [system_prompt + opening for opening in _OPENINGS]
        sequences = [tokenizer.encode(text, add_special_tokens=True) for text in texts]
    return _common(sequences)


def _takes_chats(tokenizer: Tokenizer) -> bool:
    try:
        tokenizer.render_chat([{"role": "user", "content": _OPENINGS[0]}])
    except RequestError:  # no template, which serves completions only
        return False
    return True


def _conversation(system_prompt: str, opening: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": system_prompt}, {"role": "user", "content": opening}]


def _common(sequences: Sequence["array[int]"]) -> list[int]:
    first, last = min(sequences), max(sequences)  # all others lie between them, and so begin with what both do
    pairs = takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))
    return [token for token, _ in pairs]
