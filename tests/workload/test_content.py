"""Contents are equal exactly when they stand for the same tokens."""

from array import array
from bisect import bisect_left

from hypothesis import given
from hypothesis import strategies as st

from emberkv.workload.content import MAX_TOKEN, Content, Piece, Span, Tokens, stream_key
from tests.workload.build import span

A, B = stream_key("a"), stream_key("b")


def test_neighbours_that_continue_each_other_are_joined() -> None:
    parts = Content([Span(A, 0, 5), Span(A, 5, 9), Span(B, 0, 0), Span(B, 3, 4)])
    assert parts.pieces == (Span(A, 0, 9), Span(B, 3, 4))
    assert len(parts) == 10


def test_a_gap_in_a_stream_is_kept() -> None:
    assert len(Content([Span(A, 0, 5), Span(A, 6, 9)]).pieces) == 2


def test_token_ids_next_to_each_other_are_joined() -> None:
    assert Content([Tokens(array("i", [1, 2])), Tokens(array("i", [3]))]) == Content([Tokens(array("i", [1, 2, 3]))])


def test_cut_takes_parts_of_pieces() -> None:
    content = Content([Span(A, 0, 5), Tokens(array("i", [7, 8, 9])), Span(B, 0, 4)])
    assert content.cut(3, 9).pieces == (Span(A, 3, 5), Tokens(array("i", [7, 8, 9])), Span(B, 0, 1))
    assert content.cut(12, 20).pieces == ()


def test_the_same_names_make_the_same_key_and_run_not_together() -> None:
    assert stream_key("a", 1) == stream_key("a", 1)
    assert stream_key("ab") != stream_key("a", "b")


def test_token_ids_are_the_same_wherever_they_are_asked_for() -> None:
    content = Content([span("a", 50), span("b", 50)])
    everything = content.token_ids(0, 100)
    assert content.token_ids(40, 60) == everything[40:60]
    assert all(0 <= token < MAX_TOKEN for token in everything)
    assert len(set(everything)) == 100


pieces = st.lists(
    st.builds(lambda key, start, size: Span(key, start, start + size), st.sampled_from([A, B]), st.integers(0, 3),
              st.integers(0, 6)),
    max_size=6,
)  # fmt: skip


@given(pieces, pieces)
def test_a_sum_is_the_pieces_in_turn(left: list[Span], right: list[Span]) -> None:
    total = Content(left) + Content(right)
    assert total == Content(left).followed_by(right) == Content([*left, *right])
    assert len(total) == len(Content([*left, *right]))
    assert total.token_ids(0, 99) == Content(left).token_ids(0, 99) + Content(right).token_ids(0, 99)


any_pieces = st.lists(
    st.builds(lambda key, start, size: Span(key, start, start + size), st.sampled_from([A, B]), st.integers(0, 3),
              st.integers(0, 20))
    | st.builds(lambda ids: Tokens(array("i", ids)), st.lists(st.integers(0, 9), max_size=20)),
    max_size=6,
)  # fmt: skip


@given(any_pieces, st.integers(0, 40), st.integers(0, 120), st.integers(1, 7))
def test_blocks_are_encoded_as_they_are_one_by_one(pieces: list[Span], start: int, stop: int, size: int) -> None:
    content = Content(pieces)
    stop = min(stop, len(content))
    expected = [content.encode(first, min(first + size, stop)) for first in range(start, stop, size)]
    assert list(content.encode_blocks(start, stop, size)) == expected


@given(st.integers(0, 30), st.integers(1, 7), st.integers(0, 5), st.integers(0, 40), st.integers(1, 7))
def test_a_content_in_blocks_is_one_of_spans(tokens: int, size: int, block: int, stop: int, other_size: int) -> None:
    keys = [stream_key(number) for number in range(-(-tokens // size))]
    in_blocks = Content.of_blocks(keys, size, tokens)
    spans = Content(Span(key, 0, min(size, tokens - at * size)) for at, key in enumerate(keys))
    stop = min(stop, tokens)
    for each in (size, other_size):
        assert in_blocks.encode_blocks(block * each, stop, each) == spans.encode_blocks(block * each, stop, each)
    assert len(in_blocks) == tokens
    assert in_blocks == spans


@given(pieces, pieces, st.integers(0, 20))
def test_contents_begin_alike_as_far_as_their_cuts_are_equal(left: list[Span], right: list[Span], stop: int) -> None:
    one, other = Content(left), Content(right)
    stop = min(stop, len(one), len(other))
    assert one.begins_like(other, stop) == (stop == 0 or one.cut(0, stop) == other.cut(0, stop))


@given(pieces, pieces, st.integers(0, 10), st.integers(1, 10))
def test_encodings_are_equal_exactly_when_the_tokens_are(
    left: list[Span], right: list[Span], start: int, size: int
) -> None:
    one, other = Content(left), Content(right)
    stop = start + size
    if min(len(one), len(other)) < stop:
        return
    assert (one.encode(start, stop) == other.encode(start, stop)) == (
        one.token_ids(start, stop) == other.token_ids(start, stop)
    )


PIECES = st.lists(
    st.one_of(
        st.builds(Span, st.sampled_from([A, B]), st.just(0), st.integers(0, 6)),
        st.builds(lambda ids: Tokens(array("i", ids)), st.lists(st.integers(0, 2), max_size=4)),
    ),
    max_size=4,
)


@given(PIECES, PIECES, st.integers(0, 8))
def test_common_tokens_are_counted_without_the_tokens(ours: list[Piece], theirs: list[Piece], start: int) -> None:
    """As many as the token ids have in common that stand for both, from a place on."""
    lead = span("lead", start)
    one, other = Content([lead, *ours]), Content([lead, *theirs])
    if len(one) == start or len(other) == start:
        return
    ids, others = one.token_ids(start, len(one)), other.token_ids(start, len(other))
    expected = next(
        (at for at, (x, y) in enumerate(zip(ids, others, strict=False)) if x != y), min(len(ids), len(others))
    )
    assert one.common_tokens(start, len(one), other.encode(start, len(other))) == expected


@given(st.lists(PIECES, min_size=1, max_size=8), PIECES)
def test_a_neighbour_in_the_order_of_bytes_has_most_in_common(others: list[list[Piece]], ours: list[Piece]) -> None:
    content = Content(ours)
    encoded = [Content(pieces).encode(0, len(Content(pieces))) for pieces in others if len(Content(pieces))]
    if not len(content) or not encoded:
        return
    in_order = sorted(encoded)
    at = bisect_left(in_order, content.encode(0, len(content)))
    common = {each: content.common_tokens(0, len(content), each) for each in encoded}
    assert max(common[each] for each in in_order[max(0, at - 1) : at + 1]) == max(common.values())
