"""Encoding by cached pieces equals encoding the whole; decoding by pieces equals decoding the whole."""

import json
import threading
from array import array
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from emberkv.engine.hf_tokenizer import HFTokenizer
from emberkv.engine.piece_cache import PieceCache
from emberkv.errors import RequestError
from tests.models import TURN_END, USER_START, byte_level_bpe, tiny_tokenizer

TEXT = ["a river carries what the rain gives it", "one, two, three, and no more lamps", "def area(w, h): return"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def special(content: str, **flags: bool) -> AddedToken:
    return AddedToken(content, special=True, normalized=False, **flags)


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
    "sentencepiece-first": lambda: sentencepiece_like("first"),
    "sentencepiece-always": lambda: sentencepiece_like("always"),
    "sentencepiece-never": lambda: sentencepiece_like("never"),
    "sentencepiece-normalizer": lambda: sentencepiece_like("normalizer"),
    "sentencepiece-template": lambda: with_template(sentencepiece_like("first")),
    "lowercase-unigram": lowercase_unigram,
}
WHOLE_ONLY = {"byte-level-lstrip", "byte-level-single-word"}
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


@settings(max_examples=400, deadline=None)
@given(kind=st.sampled_from(sorted(KINDS)), text=texts, add_special_tokens=st.booleans())
def test_encoding_pieces_equals_encoding_the_whole(kind: str, text: str, add_special_tokens: bool) -> None:
    expected = REFERENCES[kind].encode(text, add_special_tokens=add_special_tokens).ids
    assert TOKENIZERS[kind].encode(text, add_special_tokens=add_special_tokens) == expected
    assert TOKENIZERS[kind].encode(text, add_special_tokens=add_special_tokens) == expected  # from the cache


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_pieces_are_cached_where_the_tokenizer_lets_them(kind: str) -> None:
    tokenizer = wrap(kind)
    tokenizer.encode(f"a{USER_START}river{TURN_END}{USER_START}river", add_special_tokens=True)
    assert len(tokenizer.cache) == (0 if kind in WHOLE_ONLY else 3)


def test_written_out_special_tokens_can_be_plain_text() -> None:
    fast = PreTrainedTokenizerFast(tokenizer_object=byte_level(), split_special_tokens=True)
    text = f"{USER_START}user"
    assert fast.convert_tokens_to_ids(USER_START) not in HFTokenizer(fast).encode(text, add_special_tokens=False)


def test_truncation_of_the_tokenizer_file_is_switched_off() -> None:
    backend = byte_level()
    backend.enable_truncation(2)
    backend.enable_padding(length=50)
    tokenizer = HFTokenizer(PreTrainedTokenizerFast(tokenizer_object=backend))
    assert tokenizer.encode("zyxwv", add_special_tokens=True) == byte_level().encode("zyxwv").ids


def test_large_token_ids_survive_the_cache() -> None:
    big = 3_000_000_000
    backend = Tokenizer(models.WordLevel({"a": big, "b": 7}, unk_token="b"))
    backend.add_special_tokens([special("a")])
    tokenizer = HFTokenizer(PreTrainedTokenizerFast(tokenizer_object=backend))
    assert tokenizer.encode("aa", add_special_tokens=False) == [big, big]


def test_lone_surrogates_are_a_request_error() -> None:
    with pytest.raises(RequestError, match="character 2"):
        TOKENIZERS["byte-level"].encode("ab\ud800", add_special_tokens=False)


def test_many_threads_share_a_small_cache() -> None:
    fast = PreTrainedTokenizerFast(tokenizer_object=REFERENCES["byte-level"])
    tokenizer = HFTokenizer(fast, cache_bytes=600)
    turns = [f"{USER_START}turn {number}{TURN_END}" for number in range(40)]
    expected = [REFERENCES["byte-level"].encode(turn).ids for turn in turns]
    wrong: list[str] = []

    def work(offset: int) -> None:
        for step in range(200):
            place = (step * 7 + offset) % len(turns)
            if tokenizer.encode(turns[place], add_special_tokens=True) != expected[place]:
                wrong.append(turns[place])

    threads = [threading.Thread(target=work, args=(offset,)) for offset in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert tokenizer.cache.bytes_used <= 600


def test_piece_cache_forgets_the_least_recently_read() -> None:
    one = array("I", range(10))
    cache = PieceCache(max_bytes=1)
    cache.put("a", one)
    assert (len(cache), cache.bytes_used) == (0, 0)  # larger than the cache
    sizing = PieceCache(max_bytes=1 << 20)
    sizing.put("a", one)
    cache = PieceCache(max_bytes=2 * sizing.bytes_used)
    cache.put("a", one)
    cache.put("b", one)
    assert cache.get("a") == one
    cache.put("c", one)
    assert (cache.get("a"), cache.get("b"), cache.get("c")) == (one, None, one)
    assert cache.bytes_used == 2 * sizing.bytes_used


def pieces(kind: str, ids: list[int], splits: list[int]) -> list[str]:
    """The texts of pushing ``ids`` in chunks of the sizes ``splits``, the rest at once, and the flush."""
    detokenizer, parts, start = TOKENIZERS[kind].detokenizer(), [], 0
    for size in splits:
        parts.append(detokenizer.push(ids[start : start + size]))
        start += size
    return [*parts, detokenizer.push(ids[start:]), detokenizer.flush()]


splits = st.lists(st.integers(1, 3), max_size=120)


@settings(max_examples=300, deadline=None)
@given(kind=st.sampled_from(sorted(KINDS)), text=texts, splits=splits)
def test_pieces_of_an_encoded_text_join_to_its_decoding(kind: str, text: str, splits: list[int]) -> None:
    ids = REFERENCES[kind].encode(text * 3).ids
    assert "".join(pieces(kind, ids, splits)) == REFERENCES[kind].decode(ids, skip_special_tokens=True)


@settings(max_examples=300, deadline=None)
@given(kind=st.sampled_from(sorted(KINDS)), data=st.data(), splits=splits)
def test_pieces_of_random_tokens_join_to_their_decoding(kind: str, data: st.DataObject, splits: list[int]) -> None:
    ids = data.draw(st.lists(st.integers(0, REFERENCES[kind].get_vocab_size() + 5), max_size=150))
    assert "".join(pieces(kind, ids, splits)) == REFERENCES[kind].decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece-first"])
def test_a_character_comes_out_only_when_it_is_whole(kind: str) -> None:
    ids = REFERENCES[kind].encode("x👩\u200d👧é!").ids
    given_out = pieces(kind, ids, [1] * len(ids))
    assert "".join(given_out) == "x👩\u200d👧é!"
    assert all(REPLACEMENT not in piece for piece in given_out)


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece-first"])
def test_an_unfinished_character_is_flushed_as_a_replacement(kind: str) -> None:
    ids = REFERENCES[kind].encode("x😀").ids[:-1]
    detokenizer = TOKENIZERS[kind].detokenizer()
    assert detokenizer.push(ids).strip(REPLACEMENT) in ("", "x")
    assert REPLACEMENT in detokenizer.flush()
    assert detokenizer.flush() == ""


def test_words_come_out_at_once_with_their_spaces() -> None:
    ids = REFERENCES["sentencepiece-first"].encode("the river").ids
    given_out = pieces("sentencepiece-first", ids, [1] * len(ids))
    tokens = [REFERENCES["sentencepiece-first"].id_to_token(token_id).replace("▁", " ") for token_id in ids]
    assert given_out == [tokens[0].lstrip(), *tokens[1:], "", ""]


def test_endless_invalid_bytes_are_not_held_back() -> None:
    backend = REFERENCES["byte-level"]
    stray = next(
        i for i in range(384) if backend.decode([i]) == REPLACEMENT and backend.decode([i, i]) == REPLACEMENT * 2
    )
    detokenizer = TOKENIZERS["byte-level"].detokenizer()
    assert len(detokenizer.push([stray] * 500)) == 499


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece-first", "sentencepiece-normalizer"])
def test_token_text_keeps_spaces_and_shows_special_tokens(kind: str) -> None:
    tokenizer, backend = TOKENIZERS[kind], REFERENCES[kind]
    ids = backend.encode("the river rain").ids
    assert "".join(tokenizer.token_text(token_id) for token_id in ids).strip() == "the river rain"
    assert tokenizer.token_text(ids[-1]).lstrip() != tokenizer.token_text(ids[-1]) or len(ids) > 3
    assert tokenizer.token_text(backend.token_to_id(USER_START)) == USER_START
    assert tokenizer.token_text(backend.encode("😀").ids[-1]) == REPLACEMENT
    assert tokenizer.token_text(10_000) == ""


CONVERSATION = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]


def test_render_chat_ends_where_the_answer_begins() -> None:
    assert HFTokenizer(tiny_tokenizer()).render_chat(CONVERSATION) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_template_gets_the_tools() -> None:
    fast = tiny_tokenizer()
    fast.chat_template = "{% for tool in tools %}{{ tool['function']['name'] }};{% endfor %}"
    tools = [{"type": "function", "function": {"name": "look_up", "parameters": {}}}]
    assert HFTokenizer(fast).render_chat(CONVERSATION, tools=tools) == "look_up;"


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "empty"),
        ([{"role": "wizard", "content": "x"}], "unknown role wizard"),
        ([{"role": ["a"], "content": "x"}], "rejects"),
    ],
)
def test_messages_that_the_template_rejects_are_a_request_error(
    messages: list[dict[str, object]], message: str
) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        HFTokenizer(tiny_tokenizer()).render_chat(messages)
    assert caught.value.param == "messages"


def test_a_model_without_a_template_cannot_chat() -> None:
    with pytest.raises(RequestError, match="no chat template") as caught:
        TOKENIZERS["byte-level"].render_chat(CONVERSATION)
    assert caught.value.param == "messages"
