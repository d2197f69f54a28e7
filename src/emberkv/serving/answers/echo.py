"""A prompt given back before its answer: its text, and where in it each token begins."""

from collections.abc import Sequence
from dataclasses import dataclass

from emberkv.engine.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Echo:
    """starts: of each prompt token, where its text begins, in characters of ``text``."""

    text: str
    starts: tuple[int, ...]


def echo_of(prompt: str | Sequence[int], token_ids: Sequence[int], tokenizer: Tokenizer) -> Echo:
    """A prompt that came as text is given back as it came; one of token ids as an answer of these would read.

    A token whose text is not in the prompt, as one that begins every text, has no width. Where a tokenizer changes what
    it reads (to lower case, say), starts are as far as its own text reaches.
    """
    detokenizer = tokenizer.detokenizer()
    pieces = [detokenizer.push((token_id,)) for token_id in token_ids]
    text = prompt if isinstance(prompt, str) else "".join(pieces) + detokenizer.flush()
    starts: list[int] = []
    at = 0
    for token_id, piece in zip(token_ids, pieces, strict=True):
        starts.append(at)
        special = "" if piece or not isinstance(prompt, str) else tokenizer.token_text(token_id)
        if special and text.startswith(special, at):  # detokenizers leave special tokens out
            at += len(special)
        at = min(at + len(piece), len(text))
    return Echo(text, tuple(starts))
