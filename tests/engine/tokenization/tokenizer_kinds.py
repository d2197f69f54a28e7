"""Small tokenizers of every kind that models come with, and texts that are hard on them."""

import json
from collections.abc import Callable

from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from emberkv.engine.tokenization.hf_tokenizer import HFTokenizer
from tests.models import TURN_END, USER_START, byte_level_bpe

TEXT = ["a river carries what the rain gives it", "one, two, three, and no more lamps", "def area(w, h): return"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def special(content: str, **flags: bool) -> AddedToken:
    return AddedToken(content, special=True, normalized=False, **flags)


def cut_between_words(pre_tokenizer: pre_tokenizers.PreTokenizer) -> Tokenizer:
    """Without added tokens that reach over spaces, so that its texts can be cut between words."""
    tokenizer = byte_level_bpe()
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.add_special_tokens([special("<s>"), special(USER_START), special(TURN_END)])
    return tokenizer


def like_qwen() -> pre_tokenizers.PreTokenizer:
    words = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    split = pre_tokenizers.Split(Regex(words), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def with_specials(tokenizer: Tokenizer, **flags: bool) -> Tokenizer:
    tokenizer.add_special_tokens([special("<s>"), special(USER_START), special(TURN_END, **flags)])
    tokenizer.add_tokens([AddedToken("rain gauge"), AddedToken("<tool>", normalized=False)])
    return tokenizer


def byte_level(*, prefix_space: bool = False, **flags: bool) -> Tokenizer:
    tokenizer = byte_level_bpe()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    return with_specials(tokenizer, **flags)


def sentencepiece_like(prepend: str) -> Tokenizer:
    """Like Llama 2's: spaces as a visible mark, rare characters as byte tokens."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    trained.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=80, show_progress=False))
    learned = json.loads(trained.to_str())["model"]
    vocab = {token: number for number, token in enumerate(["<unk>", *BYTES, *learned["vocab"]])}
    merges = [tuple(pair) for pair in learned["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    if prepend == "normalizer":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend, split=False)
    return with_specials(tokenizer)


def with_template(tokenizer: Tokenizer) -> Tokenizer:
    bos, eos = ("<s>", tokenizer.token_to_id("<s>")), (TURN_END, tokenizer.token_to_id(TURN_END))
    tokenizer.post_processor = processors.TemplateProcessing(single=f"<s> $A {TURN_END}", special_tokens=[bos, eos])
    return tokenizer


def lowercase_unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.UnigramTrainer(vocab_size=80, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(TEXT, trainer)
    return with_specials(tokenizer)


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte-level": byte_level,
    "byte-level-prefix-space": lambda: byte_level(prefix_space=True),
    "byte-level-template": lambda: with_template(byte_level()),
    "byte-level-rstrip": lambda: byte_level(rstrip=True),
    "byte-level-lstrip": lambda: byte_level(lstrip=True),
    "byte-level-single-word": lambda: byte_level(single_word=True),
    "byte-level-words": lambda: cut_between_words(pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "split-words": lambda: cut_between_words(like_qwen()),
    "sentencepiece-first": lambda: sentencepiece_like("first"),
    "sentencepiece-always": lambda: sentencepiece_like("always"),
    "sentencepiece-never": lambda: sentencepiece_like("never"),
    "sentencepiece-normalizer": lambda: sentencepiece_like("normalizer"),
    "sentencepiece-template": lambda: with_template(sentencepiece_like("first")),
    "lowercase-unigram": lowercase_unigram,
}
BETWEEN_WORDS = {"byte-level-words", "split-words"}
"""Kinds whose texts can be cut between words, too."""
WHOLE_ONLY = {"byte-level-lstrip", "byte-level-single-word"}
"""Kinds whose special tokens reach into the text around them."""

REFERENCES = {kind: make() for kind, make in KINDS.items()}


def wrap(kind: str) -> HFTokenizer:
    """Over a copy of the reference of this kind."""
    return HFTokenizer(PreTrainedTokenizerFast(tokenizer_object=REFERENCES[kind]))


TOKENIZERS = {kind: wrap(kind) for kind in KINDS}

fragments = st.one_of(
    st.sampled_from(["<s>", USER_START, TURN_END, "<tool>", "<", "<|im_", "s>", "rain gauge", "Rain", "area"]),
    st.sampled_from([" ", "  ", "\n", "▁", "é", "e\u0301", "ﬁ", "你好", "👩\u200d👧", "\0"]),
    st.text(max_size=8),
)
texts = st.lists(fragments, max_size=14).map("".join)

words = st.lists(
    st.one_of(st.sampled_from(["river", "a", "rain,", "It's", "(two", "I", "12", " ", "\n"]), fragments), max_size=60
)
long_texts = st.builds(lambda some, times: " ".join(some * times), words, st.integers(1, 12))
