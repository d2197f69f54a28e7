"""SentencePiece's BPE, step by step, as a reference for what is made of a GGUF file's vocabulary and scores."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.trainers import BpeTrainer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
BOS, EOS, TURN, ADDED = "<s>", "</s>", "<|user|>", "<think>"
_NEVER = -1e9
"""The score that Llama's and Mistral's vocabularies give to runs of spaces."""


def metadata(
    texts: Sequence[str], *, size: int = 500, runs: Sequence[int] = (2, 3, 4, 8), **changed: Any
) -> dict[str, Any]:
    """Of a vocabulary trained on ``texts``, with runs of so many spaces. changed: of ``tokenizer.ggml``, or added."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trained.train_from_iterator(texts, BpeTrainer(vocab_size=size, show_progress=False))
    vocabulary = trained.get_vocab()
    pieces = [piece for piece in sorted(vocabulary, key=vocabulary.__getitem__) if set(piece) != {"▁"}]
    tokens = [
        ("<unk>", 0.0, UNKNOWN), (BOS, 0.0, CONTROL), (EOS, 0.0, CONTROL), (TURN, 0.0, CONTROL),
        (ADDED, 0.0, USER_DEFINED), *((f"<0x{byte:02X}>", 0.0, BYTE) for byte in range(256)), ("▁", _NEVER, NORMAL),
        *(("▁" * run, _NEVER, NORMAL) for run in runs),
        *((piece, -float(number), NORMAL) for number, piece in enumerate(pieces)),
    ]  # fmt: skip
    own = {
        "model": "llama",
        "tokens": [token for token, _, _ in tokens],
        "scores": [score for _, score, _ in tokens],
        "token_type": [kind for _, _, kind in tokens],
        **changed,
    }
    return {f"tokenizer.ggml.{name}": value for name, value in own.items()}


def reference(fields: Mapping[str, Any], segment: str, *, prefix: bool = True) -> list[int]:
    """The ids of text without added tokens: the two neighbours with the highest joint score, of equal ones the first,
    are joined, until no two make a piece; what is no piece then is its bytes."""
    ids = {token: number for number, token in enumerate(fields["tokenizer.ggml.tokens"])}
    normal = {
        token: score
        for token, score, kind in zip(
            *(fields[f"tokenizer.ggml.{name}"] for name in ("tokens", "scores", "token_type")), strict=True
        )
        if kind == NORMAL
    }
    symbols = list((("▁" if prefix and segment else "") + segment).replace(" ", "▁"))
    while True:
        joint = [(normal[a + b], -place) for place, (a, b) in enumerate(pairwise(symbols)) if a + b in normal]
        if not joint:
            break
        place = -max(joint)[1]
        symbols[place : place + 2] = [symbols[place] + symbols[place + 1]]
    return [number for symbol in symbols for number in _numbers(symbol, ids)]


def _numbers(symbol: str, ids: Mapping[str, int]) -> Iterator[int]:
    if symbol in ids:
        yield ids[symbol]
    else:
        yield from (ids[f"<0x{byte:02X}>"] for byte in symbol.encode())
