"""The tokenizer in a GGUF file's metadata gives the tokens that its own rules give, or is refused by name."""

import random
from pathlib import Path
from typing import Any

import pytest
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from emberkv.engine.tokenization.gguf_tokenizer import SPLITS, gguf_tokenizer
from emberkv.engine.tokenization.hf_tokenizer import HFTokenizer
from emberkv.engine.tokenization.long_texts import TokenBound
from emberkv.errors import CorruptModelError, UnsupportedModelError
from tests.engine.tokenization.sentencepiece import (
    ADDED,
    BOS,
    BYTE,
    CONTROL,
    EOS,
    NORMAL,
    TURN,
    UNUSED,
    USER_DEFINED,
    metadata,
    reference,
)

PATH = Path("model.gguf")
LEARNED = (
    "The library opens at nine and closes when the last reader has gone home.",
    "She counted the lamps along the street: one, two, three, and then no more.",
    "def area(width, height):\n    return width * height\n",
    "aaaa aaa aa bananas ==== --- ... 2024 1234 Straße café 東京 東京都",
)
TEXTS = (
    "", " ", "  ", " The", "   the  lamps   ", "a\tb\t\tc", "\n\n x\n", "\r\n", "▁the▁▁lamps", "cafe\u0301 café",
    "東京は2024年。", "👩\u200d👩\u200d👧 🙂", "\x00\x7f\ufeff", "1234567 ³½", "bananas and aaaaaaa ===== ",
    "def area(x):\n\treturn x*2    # ok\n        next", "العربية हिन्दी", "<0x0A> <s <unk", "end" + " " * 41,
)  # fmt: skip


def built(fields: dict[str, Any]) -> PreTrainedTokenizerFast:
    return gguf_tokenizer(PATH, fields)


def ids_of(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    found: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return found


def of(fields: dict[str, Any], token: str) -> int:
    number: int = fields["tokenizer.ggml.tokens"].index(token)
    return number


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_joins_by_score_from_the_left(prefix: bool) -> None:
    fields = metadata(LEARNED, add_space_prefix=prefix)
    tokenizer, chooser = built(fields), random.Random(0)
    parts = [*fields["tokenizer.ggml.tokens"][261:], *TEXTS, " ", "  ", "     ", "a" * 9, "é", "都"]
    mixed = ("".join(chooser.choices(parts, k=chooser.randint(1, 12))).replace("▁", " ") for _ in range(200))
    for text in (*TEXTS, *mixed):
        found = ids_of(tokenizer, text)
        assert found == reference(fields, text, prefix=prefix), text
        assert tokenizer.decode(found) == text.replace("▁", " ")


@pytest.mark.parametrize("runs", [(2, 4, 8), (2, 3, 4, 5, 7), tuple(n for n in range(2, 17) if n != 15), (3,)])
def test_runs_of_spaces_of_any_length_are_made_from_left_to_right(runs: tuple[int, ...]) -> None:
    fields = metadata(LEARNED, runs=runs)
    tokenizer = built(fields)
    for length in range(60):
        for text in (" " * length, "x" + " " * length + "the"):
            assert ids_of(tokenizer, text) == reference(fields, text), text


def test_added_tokens_are_found_in_the_text_and_a_space_is_put_behind_each() -> None:
    fields = metadata(LEARNED)
    tokenizer = built(fields)
    expected = [
        *reference(fields, "The "), of(fields, TURN), *reference(fields, "\n the "), of(fields, ADDED),
        of(fields, ADDED), *reference(fields, "home"), of(fields, EOS),
    ]  # fmt: skip
    text = f"The {TURN}\n the {ADDED}{ADDED}home{EOS}"
    assert ids_of(tokenizer, text) == expected
    assert list(HFTokenizer(tokenizer).encode(text, add_special_tokens=False)) == expected
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
    assert {token.content for token in added.values() if token.special} == {"<unk>", BOS, EOS, TURN}


def test_phi_3s_tokens_take_in_the_space_behind_them() -> None:
    fields = {**metadata(LEARNED), "general.architecture": "phi3"}
    expected = [of(fields, TURN), *reference(fields, "the"), of(fields, BOS), *reference(fields, " the")]
    assert ids_of(built(fields), f"{TURN}\n the{BOS} the") == expected


@pytest.mark.parametrize("spelling", ["▁▁▁", "   "])
def test_a_run_of_spaces_may_be_an_added_token(spelling: str) -> None:
    """As in Gemma's files, the older of which write it as SentencePiece does."""
    fields = metadata(LEARNED, runs=(), add_space_prefix=False)
    fields["tokenizer.ggml.tokens"] += [spelling]
    fields["tokenizer.ggml.scores"] += [-1000.0]
    fields["tokenizer.ggml.token_type"] += [USER_DEFINED]
    number, tokenizer = len(fields["tokenizer.ggml.tokens"]) - 1, built(fields)
    expected = [*reference(fields, "x", prefix=False), number, *reference(fields, " the", prefix=False)]
    assert ids_of(tokenizer, "x    the") == expected
    assert tokenizer.decode(expected) == "x    the"


def test_a_byte_that_pieces_are_made_of_needs_no_token_of_its_own_character() -> None:
    """As tabs in Gemma 2's older files: their runs are pieces, and a tab is the token of its byte."""
    fields = metadata(LEARNED, add_space_prefix=False)
    runs = ["\t\t", "\t\t\t", "\t\t\t\t\t"]
    fields["tokenizer.ggml.tokens"] += runs
    fields["tokenizer.ggml.scores"] += [-1e9] * len(runs)
    fields["tokenizer.ggml.token_type"] += [NORMAL] * len(runs)
    tokenizer = built(fields)
    for length in range(12):
        text = "\t" * length + "the" + "\t" * length
        found = ids_of(tokenizer, text)
        assert found == reference(fields, text, prefix=False)
        assert tokenizer.decode(found) == text
    assert ids_of(tokenizer, "\t") == [of(fields, "<0x09>")]
    assert TokenBound(tokenizer.backend_tokenizer).is_sound


@pytest.mark.parametrize(
    ("flags", "before", "after"),
    [
        ({}, [BOS], []),
        ({"add_bos_token": False}, [], []),
        ({"add_eos_token": True}, [BOS], [EOS]),
        ({"bos_token_id": 3, "add_eos_token": True, "add_bos_token": True}, [TURN], [EOS]),
    ],
)
def test_what_is_put_around_a_text_is_the_metadatas(
    flags: dict[str, Any], before: list[str], after: list[str], tmp_path: Path
) -> None:
    fields = metadata(LEARNED, **flags)
    tokenizer, inner = HFTokenizer(built(fields)), reference(fields, "the lamps")
    expected = [*(of(fields, each) for each in before), *inner, *(of(fields, each) for each in after)]
    assert list(tokenizer.encode("the lamps", add_special_tokens=True)) == expected
    for name, content in tokenizer.files().items():
        (tmp_path / name).write_bytes(content)
    again: Any = AutoTokenizer.from_pretrained(tmp_path)
    assert again.encode("the lamps") == expected
    assert [ids_of(again, text) for text in TEXTS] == [reference(fields, text) for text in TEXTS]


def test_a_character_without_a_token_is_unknown_where_there_are_no_bytes() -> None:
    fields = metadata(LEARNED)
    kinds = fields["tokenizer.ggml.token_type"]
    kept = [number for number, kind in enumerate(kinds) if kind != BYTE]
    for name in ("tokens", "scores", "token_type"):
        values = fields[f"tokenizer.ggml.{name}"]
        fields[f"tokenizer.ggml.{name}"] = [values[number] for number in kept]
    expected = [*reference(fields, "the "), of(fields, "<unk>"), *reference(fields, " lamps", prefix=False)]
    assert ids_of(built(fields), "the ЖЖ lamps") == expected


def unigram(fields: dict[str, Any]) -> None:
    fields["tokenizer.ggml.scores"] = [score / 7 for score in fields["tokenizer.ggml.scores"]]


def placeholders(fields: dict[str, Any]) -> None:
    fields["tokenizer.ggml.scores"] = [-1000.0] * len(fields["tokenizer.ggml.tokens"])


def unused(fields: dict[str, Any]) -> None:
    fields["tokenizer.ggml.token_type"][of(fields, "▁the")] = UNUSED


def without_a_letter(fields: dict[str, Any]) -> None:
    fields["tokenizer.ggml.token_type"][of(fields, "b")] = CONTROL
    fields["tokenizer.ggml.tokens"][of(fields, "b")] = "<other>"
    fields["tokenizer.ggml.tokens"][of(fields, "<0x62>")] = "<byte>"


def twice(fields: dict[str, Any]) -> None:
    fields["tokenizer.ggml.tokens"][of(fields, "b")] = "a"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            unigram,
            r"has the score -[\d.]+, as pieces of a unigram model have; the model's safetensors folder would work",
        ),
        (placeholders, "gives '.+' and '.+' the same score, so that it depends on their place"),
        (unused, "marks '▁the' as unused, and other pieces make it"),
        (without_a_letter, "makes '.*b.*' of 'b', which it does not have as a piece"),
        (twice, "it has the token 'a' twice"),
    ],
)
def test_a_vocabulary_that_a_list_of_merges_does_not_follow_is_refused(change: Any, message: str) -> None:
    fields = metadata(LEARNED)
    change(fields)
    with pytest.raises((CorruptModelError, UnsupportedModelError), match=message):
        built(fields)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model": "t5"}, "its tokenizer is of the kind 't5'; llama and gpt2 are read from GGUF files"),
        ({"model": "bert"}, "of the kind 'bert'"),
        ({"model": "none"}, "of the kind 'none'"),
        ({"model": "gpt2"}, r"does not name the way in which its tokenizer splits text \(tokenizer.ggml.pre\)"),
        ({"model": "gpt2", "pre": "default"}, "splits text as 'default' does, which is not known"),
        ({"model": "gpt2", "pre": "gpt-2", "add_space_prefix": True}, "not understood with byte-level BPE"),
        ({"precompiled_charsmap": [1, 2]}, "has tokenizer.ggml.precompiled_charsmap, which is not understood"),
        ({"a_number_of_tomorrow": 0}, "has tokenizer.ggml.a_number_of_tomorrow, which is not understood"),
        ({"remove_extra_whitespaces": True}, "remove_extra_whitespaces, which is not understood"),
        ({"add_sep_token": True}, "add_sep_token, which is not understood"),
        ({"bos_token_id": "<s>"}, "tokenizer.ggml.bos_token_id is '<s>'; it must be a token id"),
        ({"scores": [0.0]}, "it has 456 tokens, and the scores of 1"),
        ({"token_type": [NORMAL]}, "it has 456 tokens, and the types of 1"),
    ],
)
def test_metadata_that_are_not_followed_are_refused_by_name(changed: dict[str, Any], message: str) -> None:
    fields = metadata(LEARNED, size=239)
    fields |= {f"tokenizer.ggml.{name}": value for name, value in changed.items()}
    with pytest.raises((CorruptModelError, UnsupportedModelError), match=message):
        built(fields)


@pytest.mark.parametrize(
    "changed",
    [
        {"add_padding_token": False, "add_unknown_token": True, "add_mask_token": True, "add_cls_token": True},
        {"eos_token_ids": [2, 3], "padding_token_ids": [0]},
        {"precompiled_charsmap": False, "a_flag_of_tomorrow": False},
    ],
)
def test_metadata_that_change_no_texts_tokens_are_not_refused(changed: dict[str, Any]) -> None:
    plain, tokenizer = built(metadata(LEARNED)), built(metadata(LEARNED, **changed))
    assert tokenizer.backend_tokenizer.to_str() == plain.backend_tokenizer.to_str()


@pytest.mark.parametrize("kind", [NORMAL, UNUSED, USER_DEFINED])
@pytest.mark.parametrize("text", ["<end_of_turn>", "<|im_end|>", "<|endoftext|>", "<|fim_prefix|>", "<fim_middle>"])
def test_a_marker_is_a_control_token_whatever_its_type(text: str, kind: int) -> None:
    fields = byte_level("gpt-2", words=(text, "other"))
    fields["tokenizer.ggml.token_type"][of(fields, text)] = kind
    tokenizer = built(fields)
    assert ids_of(tokenizer, f"a{text}b") == [of(fields, "a"), of(fields, text), of(fields, "b")]
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
    assert added[of(fields, text)].special


@pytest.mark.parametrize("name", ["eot", "eom"])
def test_the_end_of_a_turn_that_the_metadata_name_is_a_control_token(name: str) -> None:
    fields = metadata(LEARNED)
    end = len(fields["tokenizer.ggml.tokens"])
    fields["tokenizer.ggml.tokens"] += ["<turn end>"]
    fields["tokenizer.ggml.scores"] += [0.0]
    fields["tokenizer.ggml.token_type"] += [NORMAL]
    assert end not in ids_of(built(fields), "the<turn end>")
    fields[f"tokenizer.ggml.{name}_token_id"] = end
    assert ids_of(built(fields), "the<turn end>") == [*reference(fields, "the"), end]


@pytest.mark.parametrize("kind", [NORMAL, UNUSED])
def test_a_piece_longer_than_any_tokenizers_is_refused(kind: int) -> None:
    fields = metadata(LEARNED)
    fields["tokenizer.ggml.tokens"] += ["xy" * 512]
    fields["tokenizer.ggml.scores"] += [-1e9]
    fields["tokenizer.ggml.token_type"] += [kind]
    assert ids_of(built(fields), "the") == reference(fields, "the")
    fields["tokenizer.ggml.tokens"][-1] += "x"
    with pytest.raises(CorruptModelError, match="a piece of 1025 characters, which begins with 'xyxyxyxyxyxyxyxy'"):
        built(fields)


@pytest.mark.parametrize("number", [2**32 - 1, -1, 456])
def test_an_id_that_is_no_tokens_counts_as_none(number: int) -> None:
    named = {f"{name}_token_id": number for name in ("bos", "eos", "unknown", "padding")}
    tokenizer = built(metadata(LEARNED, size=239, **named))
    assert len(tokenizer) == 456
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token) == (BOS, EOS, "<unk>")
    assert tokenizer.pad_token is None
    assert tokenizer.encode("the")[0] == 1


def test_a_usual_id_that_is_no_tokens_is_none() -> None:
    own = {"model": "llama", "tokens": ["a", "b"], "bos_token_id": 0, "eos_token_id": 2}
    fields = {f"tokenizer.ggml.{name}": value for name, value in own.items()}
    assert built(fields).eos_token is None


def test_empty_tokens_are_named_by_their_ids() -> None:
    fields = byte_level("gpt-2", words=("", ""))
    tokenizer = built(fields)
    assert len(tokenizer) == 258
    assert tokenizer.convert_ids_to_tokens([256, 257]) == ["[EMPTY_256]", "[EMPTY_257]"]


def test_tokens_without_types_are_normal() -> None:
    fields = byte_level("gpt-2", added=("<think>",))
    of_normal = fields | {"tokenizer.ggml.token_type": [NORMAL] * 257}
    del fields["tokenizer.ggml.token_type"]
    assert built(fields).backend_tokenizer.to_str() == built(of_normal).backend_tokenizer.to_str()


def test_pieces_without_scores_have_all_the_same() -> None:
    fields = metadata(LEARNED, size=0)
    del fields["tokenizer.ggml.scores"]
    assert ids_of(built(fields), "a      b") == reference(metadata(LEARNED, size=0), "a      b")
    fields = metadata(LEARNED)
    del fields["tokenizer.ggml.scores"]
    with pytest.raises(UnsupportedModelError, match="the same score, so that it depends on their place"):
        built(fields)


def byte_level(pre: str, words: tuple[str, ...] = (), added: tuple[str, ...] = ()) -> dict[str, Any]:
    """Of a vocabulary of all bytes and of the words, to which no merges lead."""
    tokens = [*sorted(ByteLevel.alphabet()), *words, *added]
    own = {
        "model": "gpt2", "pre": pre, "tokens": tokens, "merges": [], "bos_token_id": 0, "eos_token_id": 0,
        "token_type": [NORMAL] * (len(tokens) - len(added)) + [CONTROL] * len(added),
    }  # fmt: skip
    return {f"tokenizer.ggml.{name}": value for name, value in own.items()}


TEXT = "She'd x2024 = a.b。東京は12345\n\n  Don'T"


@pytest.mark.parametrize(
    ("pre", "words"),
    [
        ("gpt-2", "She|'d| x|2024| =| a|.|b|。|東京は|12345|\n\n | Don|'|T"),
        ("smollm", "She|'d| x|2|0|2|4| =| a|.|b|。|東京は|1|2|3|4|5|\n\n | Don|'|T"),
        ("llama-bpe", "She|'d| x|202|4| =| a|.b|。東京は|123|45|\n\n| | Don|'T"),
        ("qwen2", "She|'d| x|2|0|2|4| =| a|.b|。東京は|1|2|3|4|5|\n\n| | Don|'T"),
        ("seed-coder", "She|'d| x|2|0|2|4| =| a|.b|。東京は|1|2|3|4|5|\n\n| | Don|'T"),
        ("tekken", "She|'d| x|2|0|2|4| =| a|.b|。東京は|1|2|3|4|5|\n\n| | Don|'T"),
        ("gpt-4o", "She'd| x|202|4| =| a|.b|。東京は|123|45|\n\n| | Don'T"),
        ("deepseek-coder", "She|'|d| x|2|0|2|4| =| a|.|b|。|東京は|1|2|3|4|5|\n|\n| | Don|'|T"),
        ("deepseek-v3", "She|'d| x|202|4| =| a|.b|。|東京は|123|45|\n\n| | Don|'T"),
    ],
)
def test_text_is_split_into_words_as_the_name_says(pre: str, words: str) -> None:
    split = built(byte_level(pre)).backend_tokenizer.pre_tokenizer.pre_tokenize_str(TEXT)
    letters = ByteLevel(add_prefix_space=False, use_regex=False)
    assert [word for word, _ in split] == [letters.pre_tokenize_str(word)[0][0] for word in words.split("|")]


@pytest.mark.parametrize(
    "words",
    [
        "Hello|World| XMLHttp|Request's| i|OS| Ph|D'LL|s",
        "ÉCOLE| École| ÉCOLE| straße|İstanbul| ǅ| ʰa| हिन्दी| café| 東京Tower| 東京|TOWER",
        "a|//\n\n| //\n\r/|b| =|1|\ttab|\t\t| x|_name| |12|  \r\n|   | y|…\u2019|s",
    ],
)
def test_words_of_o200k_are_cut_where_a_capital_letter_follows_a_small_one(words: str) -> None:
    """As tiktoken's expression for it cuts them, and not llama.cpp's, which knows letters of ASCII alone as small or
    capital."""
    text, letters = words.replace("|", ""), ByteLevel(add_prefix_space=False, use_regex=False)
    split = built(byte_level("gpt-4o")).backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
    assert [word for word, _ in split] == [letters.pre_tokenize_str(word)[0][0] for word in words.split("|")]


def test_the_names_of_splits_are_these() -> None:
    """A name that a new version of transformers adds has flags of its own in llama.cpp, which are to be looked up."""
    assert set(SPLITS) == {
        "dbrx", "deepseek-r1-qwen", "f2llmv2", "falcon-h1", "falcon3", "gpt-4o", "jina-v5-nano", "kanana2",
        "kormo", "lfm2", "llama-bpe", "llama-v3", "llama3", "llama4", "megrez", "midm-2.0", "minimax-m2",
        "pixtral", "qwen2", "qwen35", "smaug-bpe", "talkie", "tekken", "gpt-2", "phi-2", "olmo", "jais",
        "mellum", "a.x-4.0", "trillion", "smollm", "starcoder", "refact", "codeshell", "exaone", "minerva-7b",
        "deepseek-coder", "deepseek-v3", "seed-coder",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("pre", "whole", "bos"), [("llama-bpe", True, True), ("tekken", True, True), ("qwen2", False, False)]
)
def test_a_word_that_is_a_token_is_that_token_where_the_split_says_so(pre: str, whole: bool, bos: bool) -> None:
    fields = byte_level(pre, words=("Ġlamps",))
    tokenizer = built(fields)
    spelt = [of(fields, letter) for letter in "Ġlamps"]
    assert ids_of(tokenizer, " lamps") == ([of(fields, "Ġlamps")] if whole else spelt)
    assert (tokenizer.encode("x")[0] == 0 and len(tokenizer.encode("x")) == 2) is bos


def test_added_tokens_may_have_letters_that_stand_for_no_byte() -> None:
    """As DeepSeek's do, with a full-width bar."""
    user = "<｜User｜>"
    fields = byte_level("deepseek-r1-qwen", added=(user,))
    tokenizer = built(fields)
    assert ids_of(tokenizer, f"a{user}b") == [of(fields, "a"), of(fields, user), of(fields, "b")]
    assert tokenizer.decode([of(fields, user)]) == user
    assert len(tokenizer) == len(fields["tokenizer.ggml.tokens"])


def test_named_templates_are_kept() -> None:
    fields = byte_level("qwen2") | {"tokenizer.chat_template": "plain", "tokenizer.chat_template.tool_use": "tools"}
    assert built(fields).chat_template == {"default": "plain", "tool_use": "tools"}
