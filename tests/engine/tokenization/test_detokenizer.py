"""Decoding piece by piece equals decoding the whole, and no piece holds half a character."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine.tokenization.tokenizer_kinds import KINDS, REFERENCES, TOKENIZERS, texts
from tests.models import USER_START

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


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
    spaced = [token_id for token_id in ids[1:] if backend.id_to_token(token_id)[0] in "▁Ġ"]
    assert [tokenizer.token_text(token_id)[0] for token_id in spaced] == [" "] * 2
    assert tokenizer.token_text(backend.token_to_id(USER_START)) == USER_START
    assert tokenizer.token_text(backend.encode("😀").ids[-1]) == REPLACEMENT
    assert tokenizer.token_text(10_000) == ""
