"""Stop strings end an answer where they begin, whatever the pieces."""

from hypothesis import given
from hypothesis import strategies as st

from emberkv.serving.answers.answer import StopScanner

letters = st.text(alphabet="abc", max_size=4)


def by_the_letter(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The definition: read letter by letter until a stop string is complete; of several, take the longest."""
    for end in range(len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            longest = max(ending, key=len)
            return text[: end - len(longest)], longest
    return text, None


@given(pieces=st.lists(letters, max_size=12), stops=st.lists(letters.filter(bool), max_size=3))
def test_pieces_do_not_change_where_a_text_ends(pieces: list[str], stops: list[str]) -> None:
    expected, stop = by_the_letter("".join(pieces), stops)
    scanner = StopScanner(stops)
    passed = ""
    for piece in pieces:
        passed += scanner.push(piece)
        assert expected.startswith(passed)  # nothing is ever taken back
    assert passed + scanner.flush() == expected
    assert scanner.matched == stop


@given(pieces=st.lists(letters, max_size=12), stops=st.lists(letters.filter(bool), min_size=1, max_size=3))
def test_no_more_is_held_back_than_needed(pieces: list[str], stops: list[str]) -> None:
    scanner = StopScanner(stops)
    seen = passed = ""
    for piece in pieces:
        seen += piece
        passed += scanner.push(piece)
        if scanner.matched is None:
            held = seen[len(passed) :]
            assert held == "" or any(stop.startswith(held) for stop in stops)


def test_without_stop_strings_text_passes_at_once() -> None:
    scanner = StopScanner(())
    assert scanner.push("anything") == "anything"
    assert scanner.flush() == ""


def test_nothing_passes_after_a_match() -> None:
    scanner = StopScanner(("END",))
    assert scanner.push("before ENDafter") == "before "
    assert scanner.push("more") == ""
    assert scanner.flush() == ""
    assert scanner.matched == "END"


def test_a_stop_string_that_almost_matches_is_looked_at_once_for_each_letter() -> None:
    """Beginnings that are ever held back again: each letter moves the matcher on by one, and back no further."""
    stop, steps = "ab" * 2000 + "c", 0

    class Counted(str):
        def __getitem__(self, index: object) -> str:
            nonlocal steps
            steps += 1
            return str.__getitem__(self, index)  # type: ignore[index]  # as given

    scanner = StopScanner((Counted(stop),))
    assert "".join(scanner.push("ab") for _ in range(6000)) + scanner.flush() == "ab" * 6000
    assert steps < 8 * 12_000
