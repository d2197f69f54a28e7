"""One answer: whole characters, stop strings across tokens, log-probabilities beside their text."""

from emberkv.core.sequence import FinishReason
from emberkv.engine.request import CacheUsage, TokenLogprobs, TokenOutput
from emberkv.serving.answers.answer import Answer
from tests.serving.fakes import ByteDetokenizer


def answer(*stops: str) -> Answer:
    return Answer(0, 3, ByteDetokenizer(), stops)


def output(text: bytes, finish: FinishReason | None = None, *, logprobs: bool = False) -> TokenOutput:
    tokens = tuple(text)
    entries = tuple(TokenLogprobs(token, -1.0, ()) for token in tokens) if logprobs else ()
    return TokenOutput("id", tokens, entries, CacheUsage(3, 2), finish)


def test_text_and_figures() -> None:
    one = answer()
    one.absorb(output(b"Hel"))
    one.absorb(output(b"lo"))
    delta = one.take()
    assert delta is not None
    assert (delta.text, delta.finish_reason) == ("Hello", None)
    assert one.take() is None
    one.absorb(output(b"!", FinishReason.LENGTH))
    last = one.take()
    assert last is not None
    assert (last.text, last.finish_reason) == ("!", FinishReason.LENGTH)
    assert (one.completion_tokens, one.usage.cached_tokens, one.stop_sequence) == (6, 2, None)


def test_a_character_comes_whole_or_not_at_all() -> None:
    one = answer()
    first, second = "é".encode()
    one.absorb(output(bytes([first])))
    assert one.take() is None
    one.absorb(output(bytes([second])))
    delta = one.take()
    assert delta is not None
    assert delta.text == "é"


def test_an_unfinished_character_ends_as_a_replacement_character() -> None:
    one = answer()
    one.absorb(output("é".encode()[:1], FinishReason.LENGTH))
    delta = one.take()
    assert delta is not None
    assert delta.text == "\ufffd"


def test_a_stop_string_across_tokens_is_never_given_out() -> None:
    one = answer("\n\nUser:")
    texts = []
    for byte in b"Yes.\n\nUser: no":
        one.absorb(output(bytes([byte])))
        delta = one.take()
        texts.append(delta.text if delta else "")
    assert "".join(texts) == "Yes."
    assert one.finish_reason is FinishReason.STOP
    assert one.stop_sequence == "\n\nUser:"
    assert one.completion_tokens == len(b"Yes.\n\nUser:")


def test_what_might_have_become_a_stop_string_is_given_out_at_the_end() -> None:
    one = answer("STOP")
    one.absorb(output(b"go ST"))
    held = one.take()
    assert held is not None
    assert held.text == "go "
    one.absorb(output(b"", FinishReason.STOP))
    last = one.take()
    assert last is not None
    assert (last.text, one.stop_sequence) == ("ST", None)


def test_logprobs_come_with_their_text_and_not_for_a_stop_string() -> None:
    one = answer("END")
    one.absorb(output(b"aE", logprobs=True))
    first = one.take()
    assert first is not None
    assert [(placed.start, placed.token.token_id) for placed in first.logprobs] == [(0, ord("a"))]
    one.absorb(output(b"bE", logprobs=True))
    second = one.take()
    assert second is not None
    assert [placed.token.token_id for placed in second.logprobs] == [ord("E"), ord("b")]
    one.absorb(output(b"ND", logprobs=True))
    last = one.take()
    assert last is not None
    assert (last.text, last.logprobs) == ("", ())


def test_outputs_after_a_stop_string_change_nothing() -> None:
    one = answer("!")
    one.absorb(output(b"a!b"))
    one.absorb(output(b"c", FinishReason.ERROR))
    assert (one.finish_reason, one.completion_tokens) == (FinishReason.STOP, 2)
