"""The tokenizer that a GGUF file describes: the same tokens that llama.cpp makes of a text, or a refusal.

The file holds a vocabulary, what kind each token is, scores or merges, and some flags. How text becomes tokens is
named, not held: "gpt2" is byte-level BPE, with a name for how text is split into words, and "llama" is SentencePiece's
BPE.
"""

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from emberkv.errors import CorruptModelError, EmberError, UnsupportedModelError, reason_of

_PREFIX = "tokenizer.ggml."
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
_ADDED = (_UNKNOWN, _CONTROL, _USER_DEFINED)
"""Kinds of tokens that are found in a text before the rest of it is encoded."""
_TURN_ENDS = frozenset({"<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>"})
"""Tokens that end a turn. Many files name only the token that ends a text, and answers in a chat do not end in it."""
_HARMONY_ENDS = frozenset({"<|return|>", "<|call|>", "<|endoftext|>"})
"""The same of vocabularies for gpt-oss's Harmony format, in which ``<|end|>`` ends only one of an answer's messages."""
_CONTROL_TEXTS = _TURN_ENDS | {
    *("<|endoftext|>", "<|end_of_text|>", "<|eom_id|>", "<|return|>", "<|call|>", "<|calls|>", "<|flush|>", "</s>"),
    *("<EOT>", "_<EOT>", "[EOT]", "<eos>", "[EOS]", "<end_of_utterance>", "<｜end▁of▁sentence｜>"),
    *(f"<|fim_{name}|>" for name in ("prefix", "suffix", "middle", "pad", "repo", "sep")),
    *(f"<fim{joint}{name}>" for joint in "-_" for name in ("prefix", "suffix", "middle", "pad")),
    *("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>", "<|repo_name|>", "<|file_sep|>"),
}
"""Tokens that are control tokens whatever type the file gives them, as in llama.cpp: a chat template's marker that is
cut into letters is another prompt."""
_SPACE = "▁"
_FLAGS = frozenset({"add_bos_token", "add_eos_token", "add_sep_token", "add_space_prefix", "remove_extra_whitespaces"})
_READ = _FLAGS | {"model", "pre", "tokens", "token_type", "token_type_count", "scores", "merges"}
_UNREAD = frozenset(f"add_{name}_token" for name in ("unknown", "padding", "mask", "cls"))
"""Written by some converters; they change no text's tokens, and llama.cpp does not read them either."""
_NAMED = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
_USUAL_IDS = {"llama": {"bos": 1, "eos": 2, "unk": 0}, "gpt2": {}}
"""What llama.cpp takes where the metadata name none, or none in the vocabulary."""


@dataclass(frozen=True, slots=True)
class Split:
    """How byte-level BPE splits text into words.

    patterns: regular expressions, each of which sets apart what it finds in the pieces that the one before left.

    by_gpt2: whether GPT-2's own expression comes behind them. ignore_merges: a word that is a token is that token,
    whether merges lead to it or not. add_bos: a text gets the BOS token, unless the metadata say otherwise. composes:
    text is brought to NFC first, of which the metadata do not speak.
    """

    patterns: tuple[str, ...] = ()
    by_gpt2: bool = False
    ignore_merges: bool = False
    add_bos: bool = False
    composes: bool = False


_DIGIT = r"\p{N}"
_CODE = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"
_DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"[一-龥\u0800-一가-\ud7ff]+", _DIGIT)
_DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    r"[一-龥\u3040-\u309f\u30a0-\u30ff]+",
    _CODE + r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
_SEED_CODER = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_WITH_BOS = frozenset(
    {"llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano", "tekken"}
)

SPLITS: Mapping[str, Split] = {
    **{
        name: Split((pattern,), ignore_merges=name in _WITH_BOS, add_bos=name in _WITH_BOS, composes=name == "qwen2")
        for name, pattern in GGUF_PRE_TOKENIZER_SPLITS.items()
    },
    **{name: Split(by_gpt2=True) for name in ("gpt-2", "phi-2", "olmo", "jais", "mellum", "a.x-4.0", "trillion")},
    **{
        name: Split((_DIGIT,), by_gpt2=True)
        for name in ("smollm", "starcoder", "refact", "codeshell", "exaone", "minerva-7b")
    },
    "deepseek-coder": Split(_DEEPSEEK_CODER),
    "deepseek-v3": Split(_DEEPSEEK_V3),
    "seed-coder": Split((_SEED_CODER,)),
}
"""By the name that a GGUF file gives, ``tokenizer.ggml.pre``."""


def gguf_tokenizer(path: Path, fields: Mapping[str, Any]) -> PreTrainedTokenizerFast:
    """The tokenizer in the metadata of the GGUF file ``path``.

    Raises CorruptModelError for metadata that are not one, and UnsupportedModelError naming what cannot be followed
    token by token.
    """
    try:
        return _Described(fields).tokenizer()
    except UnsupportedModelError as error:
        raise UnsupportedModelError(
            f"{path} cannot be served: {error}; the model's safetensors folder would work, with --quantize int8 or int4"
        ) from error
    except EmberError as error:
        raise CorruptModelError(f"the tokenizer in {path} cannot be read: {error}") from error
    except Exception as error:  # the tokenizers library raises bare Exception, on unchecked values
        raise CorruptModelError(f"the tokenizer in {path} cannot be read: {reason_of(error)}") from error


def turn_ends(tokens: Collection[str]) -> frozenset[str]:
    """The tokens that end an answer where a vocabulary has them, whether the metadata name them or not."""
    return _HARMONY_ENDS if {"<|return|>", "<|call|>"}.issubset(tokens) else _TURN_ENDS


class _Described:
    """What the metadata say of a tokenizer, checked."""

    def __init__(self, fields: Mapping[str, Any]) -> None:
        own = {key.removeprefix(_PREFIX): value for key, value in fields.items() if key.startswith(_PREFIX)}
        self._own = own
        self._fields = fields
        self._model = str(own.get("model"))
        if self._model not in _USUAL_IDS:
            raise UnsupportedModelError(
                f"its tokenizer is of the kind {self._model!r}; {' and '.join(_USUAL_IDS)} are read from GGUF files"
            )
        self._split = self._find_split() if self._model == "gpt2" else None
        self._require_understood()
        self._tokens: list[str] = [token or f"[EMPTY_{number}]" for number, token in enumerate(own["tokens"])]
        self._kinds: list[int] = list(own.get("token_type") or [_NORMAL] * len(self._tokens))
        if len(self._kinds) != len(self._tokens):
            raise CorruptModelError(f"it has {len(self._tokens)} tokens, and the types of {len(self._kinds)}")
        self._kinds = [
            _CONTROL if self._is_control(number, token) else self._kinds[number]
            for number, token in enumerate(self._tokens)
        ]
        if self._model == "llama":
            self._tokens = [
                _spelt_with_spaces(token) if kind == _USER_DEFINED else token
                for token, kind in zip(self._tokens, self._kinds, strict=True)
            ]
            self._spell_needed_bytes()
        self._vocabulary = {token: number for number, token in enumerate(self._tokens)}
        if len(self._vocabulary) != len(self._tokens):
            twice = next(token for number, token in enumerate(self._tokens) if self._vocabulary[token] != number)
            raise CorruptModelError(f"it has the token {twice!r} twice")

    def _is_control(self, number: int, token: str) -> bool:
        ends = (self._own.get("eot_token_id"), self._own.get("eom_token_id"))
        return token in _CONTROL_TEXTS or (number in ends and self._kinds[number] != _BYTE)

    def _spell_needed_bytes(self) -> None:
        """Spell the tokens of those bytes as characters that pieces are made of and that are no tokens themselves.

        As tabs in Gemma 2's older files: SentencePiece joins such characters too, and one that is left alone is its
        byte's token.
        """
        pieces = (token for token, kind in zip(self._tokens, self._kinds, strict=True) if kind == _NORMAL)
        wanted = {character for piece in pieces for character in piece}.difference(self._tokens)
        spelt = {f"<0x{ord(character):02X}>": character for character in wanted if character.isascii()}
        for number, (token, kind) in enumerate(zip(self._tokens, self._kinds, strict=True)):
            if kind == _BYTE and token in spelt:
                self._tokens[number], self._kinds[number] = spelt[token], _NORMAL

    def _find_split(self) -> Split:
        name = self._own.get("pre")
        if name is None:
            raise UnsupportedModelError(
                "it does not name the way in which its tokenizer splits text (tokenizer.ggml.pre), as files written "
                "before May 2024 do not"
            )
        if name not in SPLITS:
            raise UnsupportedModelError(f"its tokenizer splits text as {name!r} does, which is not known")
        return SPLITS[name]

    def _require_understood(self) -> None:
        ids = ("_token_id", "_token_ids")
        unknown = sorted(key for key in self._own.keys() - _READ - _UNREAD if not key.endswith(ids))
        unknown = [key for key in unknown if self._own[key] is not False and self._own[key] not in (None, [], "")]
        if unknown:
            raise UnsupportedModelError(f"its tokenizer has {_PREFIX}{unknown[0]}, which is not understood")
        for flag in ("add_sep_token", "remove_extra_whitespaces"):
            if self._own.get(flag):
                raise UnsupportedModelError(f"its tokenizer has {_PREFIX}{flag}, which is not understood")
        if self._model == "gpt2" and self._own.get("add_space_prefix"):
            raise UnsupportedModelError(
                f"its tokenizer has {_PREFIX}add_space_prefix, which is not understood with byte-level BPE"
            )

    def tokenizer(self) -> PreTrainedTokenizerFast:
        backend = self._sentencepiece() if self._split is None else self._byte_level(self._split)
        backend.add_tokens(self._added())
        named = {name: self._named(name) for name in _NAMED}
        self._add_frame(backend, named)
        tokenizer_class: Any = PreTrainedTokenizerFast  # untyped
        tokenizer: PreTrainedTokenizerFast = tokenizer_class(
            tokenizer_object=backend,
            chat_template=self._templates(),
            clean_up_tokenization_spaces=False,
            **{f"{name}_token": self._as_added(token) for name, token in named.items() if token is not None},
        )
        return tokenizer

    def _byte_level(self, split: Split) -> Tokenizer:
        merges = []
        for merge in self._own["merges"]:
            left, _, right = merge[1:].partition(" ")  # a part is never empty, and may begin with a space
            merges.append((merge[0] + left, right))
        backend = Tokenizer(BPE(self._vocabulary, merges, ignore_merges=split.ignore_merges))
        if split.composes:
            backend.normalizer = normalizers.NFC()
        steps: list[Any] = [pre_tokenizers.Split(Regex(each), behavior="isolated") for each in split.patterns]
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split.by_gpt2))
        backend.pre_tokenizer = pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]
        backend.decoder = decoders.ByteLevel()
        return backend

    def _sentencepiece(self) -> Tokenizer:
        scores: list[float] = list(self._own.get("scores") or [0.0] * len(self._tokens))
        if len(scores) != len(self._tokens):
            raise CorruptModelError(f"it has {len(self._tokens)} tokens, and the scores of {len(scores)}")
        kinds = dict(zip(self._tokens, self._kinds, strict=True))
        merges = find_merges(
            {token: score for token, score in zip(self._tokens, scores, strict=True) if kinds[token] == _NORMAL},
            unused=[token for token, kind in kinds.items() if kind == _UNUSED],
            added=frozenset(token for token, kind in kinds.items() if kind in _ADDED),
        )
        unknown = self._named("unk")
        backend = Tokenizer(BPE(self._vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
        spaces = normalizers.Replace(" ", _SPACE)
        decoding: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
        if self._own.get("add_space_prefix", True):
            # Before the beginning and behind each added token, and beside a space that is there, as llama.cpp does.
            backend.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces])
            decoding.append(decoders.Strip(" ", 1, 0))
        else:
            backend.normalizer = spaces
        backend.decoder = decoders.Sequence(decoding)
        return backend

    def _added(self) -> list[AddedToken]:
        kinds = zip(self._tokens, self._kinds, strict=True)
        return [self._as_added(token) for token, kind in kinds if kind in _ADDED]

    def _as_added(self, token: str) -> AddedToken:
        """Found in a text as it is. Phi-3's take in the space behind them, which its files do not say."""
        phi3 = self._model == "llama" and self._fields.get("general.architecture") == "phi3"
        special = self._kinds[self._vocabulary[token]] != _USER_DEFINED
        rstrip = phi3 and token not in ("<unk>", "<s>", "<|endoftext|>")
        return AddedToken(token, normalized=False, special=special, rstrip=rstrip)

    def _named(self, name: str) -> str | None:
        """The token of that name. An id that is no token's, such as -1 in 32 bits, counts as none."""
        key = f"{_NAMED[name]}_token_id"
        ids = (self._own.get(key), _USUAL_IDS[self._model].get(name))
        wrong = next((each for each in ids if each is not None and not isinstance(each, int)), None)
        if wrong is not None:
            raise CorruptModelError(f"{_PREFIX}{key} is {wrong!r}; it must be a token id")
        found = (each for each in ids if isinstance(each, int) and 0 <= each < len(self._tokens))
        return next((self._tokens[each] for each in found), None)

    def _add_frame(self, backend: Tokenizer, named: Mapping[str, str | None]) -> None:
        """Have the tokenizer put around a text what the metadata say."""
        usual = self._split is None or self._split.add_bos
        flags = {"bos": self._own.get("add_bos_token", usual), "eos": self._own.get("add_eos_token", False)}
        wanted = {name: named[name] for name, flag in flags.items() if flag}
        missing = [name for name, token in wanted.items() if token is None]
        if missing:
            raise CorruptModelError(
                f"a text gets its {missing[0]} token, and {_PREFIX}{missing[0]}_token_id names none"
            )
        tokens = {name: token for name, token in wanted.items() if token is not None}
        if tokens:
            single = [tokens.get("bos"), "$A", tokens.get("eos")]
            backend.post_processor = processors.TemplateProcessing(
                single=[each for each in single if each is not None],
                special_tokens=[(token, self._vocabulary[token]) for token in set(tokens.values())],
            )

    def _templates(self) -> str | dict[str, str] | None:
        start = "tokenizer.chat_template"
        default = self._fields.get(start)
        others = {
            key.removeprefix(f"{start}."): text for key, text in self._fields.items() if key.startswith(f"{start}.")
        }
        if not others or default is None:
            return default
        return {"default": default, **others}


def _spelt_with_spaces(token: str) -> str:
    """A run of spaces as it stands in a text: older files write it as SentencePiece does."""
    return " " * len(token) if token and not token.strip(_SPACE) else token


_LONGEST = 1024
"""Characters of a piece. SentencePiece learns pieces of at most 16 unless it is set otherwise; the time that a piece
takes here grows with the square of its length."""


def find_merges(scores: Mapping[str, float], unused: Collection[str], added: Collection[str]) -> list[tuple[str, str]]:
    """SentencePiece's BPE as a list of merges, which is what the tokenizers library follows: all merges to the pieces
    in ``scores``, in the order in which they are to be done.

    SentencePiece joins those two neighbours in a text whose joint piece has the highest score, the leftmost of equal
    ones, until no two make a piece. The library joins those that come first in a list. Both give the same tokens where
    pieces are made of pieces, and where no two that could compete have the same score. The usual ones that do, runs of
    spaces, are made from left to right, each as long as it gets: the merge with the longer left half comes first.

    unused: pieces that text is not made of, though they have ids. added: tokens that are found in a text before it is
    cut into pieces.

    Raises UnsupportedModelError where a list of merges would not give SentencePiece's tokens, and CorruptModelError for
    a piece that is longer than any tokenizer's.
    """
    long = next((piece for piece in (*scores, *unused) if len(piece) > _LONGEST), None)
    if long is not None:
        raise CorruptModelError(
            f"it has a piece of {len(long)} characters, which begins with {long[:16]!r}; at most {_LONGEST} are read"
        )
    made = next((piece for piece in unused if any(True for _ in _halves(piece, scores, added))), None)
    if made is not None:
        raise UnsupportedModelError(f"its tokenizer marks {made!r} as unused, and other pieces make it")
    merges: list[tuple[float, str, str]] = []
    by_score: dict[float, list[str]] = defaultdict(list)
    for piece, score in scores.items():
        found = list(_halves(piece, scores, added))
        if not found:
            continue
        if score != int(score):
            raise UnsupportedModelError(
                f"its tokenizer says that it is SentencePiece's BPE, and {piece!r} has the score {score}, as pieces of "
                "a unigram model have"
            )
        merges.extend((-score, left, right) for left, right in found)
        by_score[score].append(piece)
    for equal in by_score.values():
        _require_no_competition(equal, scores)
    merges.sort(key=lambda merge: (merge[0], -len(merge[1])))
    return [(left, right) for _, left, right in merges]


def _halves(piece: str, known: Collection[str], added: Collection[str]) -> Iterator[tuple[str, str]]:
    """The pairs of pieces that make ``piece``.

    Raises UnsupportedModelError for a half of one character that is no piece: SentencePiece would join it all the same.
    """
    for cut in range(1, len(piece)):
        left, right = piece[:cut], piece[cut:]
        if left in known and right in known:
            yield left, right
        elif all(half in known or (len(half) == 1 and half not in added) for half in (left, right)):
            lone = left if left not in known else right
            raise UnsupportedModelError(f"its tokenizer makes {piece!r} of {lone!r}, which it does not have as a piece")


def _require_no_competition(equal: list[str], known: Collection[str]) -> None:
    """Of pieces with the same score, none may end in a piece that another begins with, unless both are runs of one
    character: the leftmost would be made first, and a list of merges says nothing of the place."""
    if len(equal) == 1:
        return
    begun: dict[str, dict[str, str]] = defaultdict(dict)  # by a beginning, two pieces of different kinds at most
    for piece in equal:
        for start in (piece[:cut] for cut in range(1, len(piece))):
            if start in known and len(begun[start]) < 2:
                begun[start].setdefault(_kind(piece), piece)
    for piece in equal:
        for end in (piece[cut:] for cut in range(1, len(piece))):
            other = next((each for kind, each in begun.get(end, {}).items() if kind != _kind(piece)), None)
            if other is not None:
                raise UnsupportedModelError(
                    f"its tokenizer gives {piece!r} and {other!r} the same score, so that it depends on their place "
                    "which of them is made of a text"
                )


def _kind(piece: str) -> str:
    """The same for all runs of one character; of other pieces, each its own."""
    return piece[0] if piece == piece[0] * len(piece) else piece
