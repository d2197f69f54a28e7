"""How byte-level BPE splits text into words, by the name that a GGUF file gives (``tokenizer.ggml.pre``)."""

from collections.abc import Mapping
from dataclasses import dataclass

from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS


@dataclass(frozen=True, slots=True)
class Split:
    """patterns: regular expressions, each of which sets apart what it finds in the pieces that the one before left.

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
