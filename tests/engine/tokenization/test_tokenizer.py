"""Encoding by cached pieces equals encoding the whole; chat templates give a prompt or a request error."""

import random
import re
import threading
from array import array

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from emberkv.engine.tokenization.hf_tokenizer import HFTokenizer, any_of
from emberkv.engine.tokenization.long_texts import PieceCache, TokenBound
from emberkv.errors import PromptTooLongError, RequestError
from tests.engine.tokenization.tokenizer_kinds import (
    BETWEEN_WORDS,
    KINDS,
    REFERENCES,
    TOKENIZERS,
    WHOLE_ONLY,
    byte_level,
    long_texts,
    special,
    texts,
    wrap,
)
from tests.models import TURN_END, USER_START, tiny_tokenizer


@settings(max_examples=400, deadline=None)
@given(kind=st.sampled_from(sorted(KINDS)), text=texts, add_special_tokens=st.booleans())
def test_encoding_pieces_equals_encoding_the_whole(kind: str, text: str, add_special_tokens: bool) -> None:
    expected = REFERENCES[kind].encode(text, add_special_tokens=add_special_tokens).ids
    bos = REFERENCES[kind].token_to_id("<s>")
    if add_special_tokens and "template" in kind and expected[:2] == [bos, bos]:
        del expected[0]
    assert TOKENIZERS[kind].encode(text, add_special_tokens=add_special_tokens).tolist() == expected
    assert TOKENIZERS[kind].encode(text, add_special_tokens=add_special_tokens).tolist() == expected  # from the cache


@settings(max_examples=150, deadline=None)
@given(kind=st.sampled_from(sorted(BETWEEN_WORDS)), text=long_texts, more=texts)
def test_encoding_long_texts_between_words_equals_encoding_the_whole(kind: str, text: str, more: str) -> None:
    for whole in (text, text + more):
        expected = REFERENCES[kind].encode(whole, add_special_tokens=False).ids
        assert TOKENIZERS[kind].encode(whole, add_special_tokens=False).tolist() == expected


@pytest.mark.parametrize("kind", sorted(kind for kind in KINDS if "template" in kind))
def test_a_text_that_begins_with_bos_gets_no_second_one(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = wrap(kind)
    ids = tokenizer.encode("<s>river", add_special_tokens=False)
    assert tokenizer.encode("<s>river", add_special_tokens=True).tolist()[:-1] == ids.tolist()
    assert tokenizer.encode("<s>river", add_special_tokens=True, max_tokens=len(ids))
    with pytest.raises(PromptTooLongError):
        tokenizer.encode("<s>river", add_special_tokens=True, max_tokens=len(ids) - 1)
    tokenizer.remembering_for("tenant").encode("<s>rain", add_special_tokens=True)
    assert [record.getMessage()[:27] for record in caplog.records] == ["a prompt begins with <s>, w"]


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_what_is_added_to_a_text_does_not_have_it_encoded_anew(kind: str) -> None:
    tokenizer = wrap(kind)
    text = "it carries what the rain gives it, " * 100
    tokenizer.encode(text, add_special_tokens=False)
    before = len(tokenizer.cache)
    tokenizer.encode(f"{text} and more", add_special_tokens=False)
    assert len(tokenizer.cache) - before == (kind not in WHOLE_ONLY)
    assert (before > 4) is (kind in BETWEEN_WORDS)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_pieces_are_cached_where_the_tokenizer_lets_them(kind: str) -> None:
    tokenizer = wrap(kind)
    tokenizer.encode(f"a{USER_START}river{TURN_END}{USER_START}river", add_special_tokens=True)
    assert len(tokenizer.cache) == (0 if kind in WHOLE_ONLY else 3)


def test_added_tokens_grouped_by_their_first_character_match_as_the_plain_alternation() -> None:
    chooser = random.Random(0)
    runs = [character * length for character in " \n" for length in (1, 2, 3, 5, 8)]
    added = [*runs, *(f"<unused{number}>" for number in range(30)), "<", "<a", "<a>", "a|b", "a", ".", ". x", "東京"]
    chooser.shuffle(added)
    plain = re.compile("|".join(map(re.escape, sorted(added, key=len, reverse=True))))
    parts = [*added, "<unused", " x", "b>", "|", "東", "é"]
    for _ in range(300):
        text = "".join(chooser.choices(parts, k=chooser.randint(0, 25)))
        found = [match.span() for match in any_of(added).finditer(text)]
        assert found == [match.span() for match in plain.finditer(text)], text


def test_nobody_finds_the_pieces_that_another_has_sent() -> None:
    tokenizer = wrap(sorted(set(KINDS) - set(WHOLE_ONLY))[0])
    text = f"a{USER_START}river{TURN_END}{USER_START}river"
    ours, theirs = tokenizer.remembering_for("ours"), tokenizer.remembering_for("theirs")
    assert ours.encode(text, add_special_tokens=True) == tokenizer.encode(text, add_special_tokens=True)
    assert len(tokenizer.cache) == 6  # each has its own, in one budget
    assert theirs.cache is ours.cache is tokenizer.cache
    assert [tokenizer.cache.get(owner, "a") is None for owner in ("", "ours", "theirs")] == [False, False, True]
    assert tokenizer.remembering_for("ours") is ours
    assert tokenizer.remembering_for("") is tokenizer


def test_written_out_special_tokens_can_be_plain_text() -> None:
    fast = PreTrainedTokenizerFast(tokenizer_object=byte_level(), split_special_tokens=True)
    text = f"{USER_START}user"
    assert fast.convert_tokens_to_ids(USER_START) not in HFTokenizer(fast).encode(text, add_special_tokens=False)


def test_truncation_of_the_tokenizer_file_is_switched_off() -> None:
    backend = byte_level()
    backend.enable_truncation(2)
    backend.enable_padding(length=50)
    tokenizer = HFTokenizer(PreTrainedTokenizerFast(tokenizer_object=backend))
    assert tokenizer.encode("zyxwv", add_special_tokens=True).tolist() == byte_level().encode("zyxwv").ids


def test_large_token_ids_survive_the_cache() -> None:
    big = 300_000
    backend = Tokenizer(models.WordLevel({"a": big, "b": 7}, unk_token="b"))
    backend.add_special_tokens([special("a")])
    tokenizer = HFTokenizer(PreTrainedTokenizerFast(tokenizer_object=backend))
    assert tokenizer.encode("aa", add_special_tokens=False).tolist() == [big, big]


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
            if tokenizer.encode(turns[place], add_special_tokens=True).tolist() != expected[place]:
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
    cache.put("", {"a": one})
    assert (len(cache), cache.bytes_used) == (0, 0)  # larger than the cache
    sizing = PieceCache(max_bytes=1 << 20)
    sizing.put("", {"a": one})
    cache = PieceCache(max_bytes=2 * sizing.bytes_used)
    cache.put("ann", {"a": one})
    cache.put("bob", {"b": one})
    assert cache.get("ann", "a") == one
    cache.put("carl", {"c": one})
    assert (cache.get("ann", "a"), cache.get("bob", "b"), cache.get("carl", "c")) == (one, None, one)
    assert cache.get("bob", "a") is None
    assert cache.bytes_used == 2 * sizing.bytes_used


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


def test_the_bytes_of_every_token_of_a_text_are_the_texts() -> None:
    text = "Grüße, 世界 \U0001f600 <|"
    for tokenizer in TOKENIZERS.values():
        ids = tokenizer.encode(text, add_special_tokens=False)
        spelled = b"".join(map(tokenizer.token_bytes, ids)).decode()
        shown = "".join(map(tokenizer.token_text, ids))
        assert spelled == shown or "\ufffd" in shown
        assert "\ufffd" not in spelled


def test_a_template_takes_variables_but_not_the_renderers_own() -> None:
    fast = tiny_tokenizer()
    fast.chat_template = "{{ mood }};{{ messages[0].content }}{% if add_generation_prompt %}>{% endif %}"
    tokenizer = HFTokenizer(fast)
    assert tokenizer.render_chat(CONVERSATION, variables={"mood": "kind"}).startswith("kind;")
    assert not tokenizer.render_chat(CONVERSATION, add_generation_prompt=False).endswith(">")
    for name in ("tools", "tokenize", "chat_template", "messages"):
        with pytest.raises(RequestError, match=f"chat_template_kwargs has '{name}'"):
            tokenizer.render_chat(CONVERSATION, variables={name: 1})


def test_the_variables_are_known_that_any_of_the_templates_reads() -> None:
    fast = tiny_tokenizer()
    fast.chat_template = {
        "default": "{% set mood = mood | default('kind') %}{{ mood }}{{ messages[0].content }}",
        "tool_use": "{% for tool in tools %}{% if enable_thinking is defined %}*{% endif %}{% endfor %}",
    }
    tokenizer = HFTokenizer(fast)
    names = ("mood", "enable_thinking", "tool", "reasoning_effort")
    assert [tokenizer.template_reads(name) for name in names] == [True, True, False, False]


@settings(max_examples=300, deadline=None)
@given(kind=st.sampled_from(sorted(KINDS)), text=texts | long_texts)
def test_no_text_has_fewer_tokens_than_the_bound_says(kind: str, text: str) -> None:
    assert TokenBound(REFERENCES[kind]).least_tokens(text) <= len(
        REFERENCES[kind].encode(text, add_special_tokens=False).ids
    )


@pytest.mark.parametrize("text", ["a" * 100_000, " " * 100_000, "\n" * 100_000, "e\u0301" * 50_000])
def test_a_text_that_cannot_fit_is_refused_before_it_is_encoded(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = wrap("split-words")
    monkeypatch.setattr(HFTokenizer, "_encode_whole", None)  # calling it would fail
    with pytest.raises(PromptTooLongError, match=r"at least \d+ tokens; at most 1000 are accepted"):
        tokenizer.encode(text, add_special_tokens=False, max_tokens=1000)


def test_a_text_that_is_a_little_too_long_is_counted_to_its_end() -> None:
    tokenizer = wrap("split-words")
    text = "it carries what the rain gives it, " * 1000
    tokens = len(tokenizer.encode(text, add_special_tokens=False))
    with pytest.raises(PromptTooLongError, match=f"has {tokens} tokens; at most {tokens // 2 + 1}") as refused:
        tokenizer.encode(text, add_special_tokens=False, max_tokens=tokens // 2 + 1)
    assert (refused.value.prompt_tokens, refused.value.limit) == (tokens, tokens // 2 + 1)


def test_a_text_that_is_far_too_long_is_left_off_in_the_middle_and_not_remembered() -> None:
    tokenizer = wrap("split-words")
    text = "it carries what the rain gives it, " * 1000
    with pytest.raises(PromptTooLongError, match=r"at least \d+ tokens; at most 2500 are accepted") as refused:
        tokenizer.encode(text, add_special_tokens=False, max_tokens=2500)
    assert 5000 < int(str(refused.value).split()[5]) < 5600
    assert len(tokenizer.cache) == 0
    assert len(tokenizer.encode(text, add_special_tokens=False, max_tokens=10**6)) > 5000
    assert len(tokenizer.cache) > 4


def test_other_threads_run_while_a_long_text_is_encoded() -> None:
    """It has no place to be cut at. The thread that waits for `running` would get nowhere if the call kept the GIL."""
    tokenizer, ended = wrap("byte-level"), threading.Event()
    turns = 0

    def encode() -> None:
        tokenizer.encode("abcdefg" * 60_000, add_special_tokens=False)
        ended.set()

    worker = threading.Thread(target=encode)
    worker.start()
    while not ended.wait(0.001):
        turns += 1
    worker.join()
    assert turns > 3
