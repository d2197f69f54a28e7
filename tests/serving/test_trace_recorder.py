"""A recording says when requests came and what they share, in order, and nothing of their text."""

import logging
from collections.abc import Callable, Iterable

import pytest

from emberkv.core.hashing import PublicPrefixes
from emberkv.core.sequence import FinishReason
from emberkv.engine.request import (
    EngineStats,
    GenerationRequest,
    OutputListener,
    PrefillProgress,
    SamplingParams,
    TokenOutput,
)
from emberkv.errors import EngineStoppedError
from emberkv.serving.background import BackgroundWork
from emberkv.serving.trace_recorder import KEY_BYTES, RecordedRequest, TraceRecorder

BLOCK = 4


class HandEngine:
    """An engine that answers when a test has it answer."""

    context_length = 1000
    max_prompt_tokens = 999

    def __init__(self) -> None:
        self.listeners: dict[str, OutputListener] = {}
        self.aborted: list[str] = []
        self.stopped = False

    def submit(self, request: GenerationRequest, listener: OutputListener) -> None:
        if self.stopped:
            raise EngineStoppedError("stopped")
        self.listeners[request.request_id] = listener

    def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)

    def progress(self, request_id: str) -> PrefillProgress | None:
        return PrefillProgress(1, 2) if request_id in self.listeners else None

    def stats(self) -> EngineStats:
        return EngineStats(running=7)

    def answer(self, name: str, tokens: Iterable[int] = (), reason: FinishReason | None = FinishReason.LENGTH) -> None:
        self.listeners[name](TokenOutput(name, tuple(tokens), finish_reason=reason))


class Desk:
    """A recorder over a `HandEngine`, on a clock set by hand."""

    def __init__(
        self,
        *,
        key: bytes = bytes(KEY_BYTES),
        sink: Callable[[RecordedRequest], None] | None = None,
        public: PublicPrefixes | None = None,
    ) -> None:
        self.now = 100.0
        self.found: list[RecordedRequest] = []
        self.engine = HandEngine()
        self.recorder = TraceRecorder(sink or self.found.append, block_size=BLOCK, key=key, clock=lambda: self.now)
        self.over = self.recorder.over(self.engine, public)

    def ask(
        self,
        name: str,
        prompt: Iterable[int],
        *,
        limit: int = 8,
        salt: bytes = b"",
        tenant: str = "",
        session: str = "",
    ) -> None:
        params = SamplingParams(max_tokens=limit)
        request = GenerationRequest(name, list(prompt), params, salt, tenant=tenant, session_id=session)
        self.over.submit(request, lambda output: None)

    def whole(
        self, name: str, prompt: Iterable[int], answer: Iterable[int], *, salt: bytes = b"", tenant: str = "",
        session: str = "",
    ) -> None:  # fmt: skip
        self.ask(name, prompt, salt=salt, tenant=tenant, session=session)
        self.engine.answer(name, answer)

    def close(self) -> list[RecordedRequest]:
        self.recorder.close()
        return self.found


def test_a_request_by_its_numbers() -> None:
    desk = Desk()
    desk.whole("a", range(10), [50, 51])
    desk.now = 103.5
    desk.whole("b", range(3), [52])
    first, second = desk.close()
    assert (first.request, first.arrival, first.prompt_tokens, first.output_tokens) == ("0", 0.0, 10, 2)
    assert (first.max_output_tokens, first.block_size, first.known_tokens, len(first.blocks)) == (8, 4, 12, 3)
    assert (second.request, second.arrival, second.known_tokens, len(second.blocks)) == ("1", 3.5, 4, 1)


def test_equal_beginnings_have_equal_ids_and_nothing_else_has() -> None:
    desk = Desk()
    desk.whole("a", range(10), [50, 51])
    desk.whole("b", [*range(8), 99], [50])
    one, other = (each.blocks for each in desk.close())
    assert one[:2] == other[:2]
    assert one[2] != other[2]


def test_an_answer_s_blocks_are_found_by_the_next_turn() -> None:
    desk = Desk()
    desk.whole("a", range(6), [50, 51, 52])
    desk.whole("b", [*range(6), 50, 51, 52, 60], [53])
    one, other = (each.blocks for each in desk.close())
    assert one[:2] == other[:2]


def test_ids_cannot_be_compared_between_recordings_or_salts() -> None:
    desks = [Desk(), Desk(key=b"k" * KEY_BYTES)]
    for desk in desks:
        desk.whole("a", range(8), [50])
        desk.whole("b", range(8), [50], salt=b"pepper")
    blocks = [block for desk in desks for each in desk.close() for block in each.blocks[:2]]
    assert len(set(blocks)) == 8


def test_public_blocks_are_shared_across_salts() -> None:
    desk = Desk(public=PublicPrefixes([list(range(4))], BLOCK))
    desk.whole("a", range(8), [50])
    desk.whole("b", range(8), [50], salt=b"pepper")
    one, other = (each.blocks for each in desk.close())
    assert (one[0] == other[0], one[1] == other[1]) == (True, False)


def test_public_blocks_are_the_server_s_and_not_the_trace_s() -> None:
    desk = Desk(public=PublicPrefixes([range(16)], 8))
    desk.whole("a", range(18), [50], salt=b"a")
    desk.whole("b", range(18), [50], salt=b"b")
    first, second = desk.close()
    assert first.blocks[:4] == second.blocks[:4]
    assert first.blocks[4] != second.blocks[4]


def test_requests_come_in_the_order_of_their_arrival() -> None:
    desk = Desk()
    for name in "abc":
        desk.ask(name, [1, 2])
        desk.now += 1
    for name in "cab":
        desk.engine.answer(name, [5])
    assert [each.arrival for each in desk.close()] == [0.0, 1.0, 2.0]


def test_a_named_session_counts_its_turns_and_the_time_between_them() -> None:
    desk = Desk()
    desk.whole("a", range(6), [50], session="mine", tenant="t")
    desk.now += 2.5
    desk.whole("b", [9], [50], session="mine", tenant="t")
    desk.whole("c", [9], [50], session="mine", tenant="other")
    first, second, third = desk.close()
    assert (first.turn, first.after, second.turn) == (0, None, 1)
    assert first.session == second.session != third.session
    assert second.after == ("0", 2.5)
    assert "mine" not in first.session
    assert first.client == second.client != third.client


def test_a_session_that_nobody_names_is_told_by_its_prompts() -> None:
    desk = Desk()
    desk.whole("a", range(10), [50, 51])
    desk.whole("b", range(10), [50, 51])  # the same question again: somebody else's, as far as one can tell
    desk.whole("c", [*range(10), 50, 51, 60, 61], [52])
    desk.whole("d", range(20, 30), [50])
    found = desk.close()
    assert [each.turn for each in found] == [0, 0, 1, 0]
    assert found[2].session == found[1].session
    assert len({each.session for each in found}) == 3
    assert found[2].after is not None


def test_a_turn_whose_answer_was_tokenized_anew_still_goes_on_from_its_prompt() -> None:
    desk = Desk()
    desk.whole("a", range(10), [50, 51, 52, 53])
    desk.whole("b", [*range(10), 70, 71, 72, 73, 74], [52])
    assert [each.turn for each in desk.close()] == [0, 1]


def test_an_answer_that_is_broken_off_is_recorded_as_far_as_it_got() -> None:
    desk = Desk()
    desk.ask("a", [1, 2])
    desk.engine.answer("a", [5, 6], reason=None)
    desk.engine.answer("a", reason=FinishReason.ABORT)
    (found,) = desk.close()
    assert (found.output_tokens, found.max_output_tokens) == (2, 2)


def test_a_stop_keeps_the_limit_that_was_asked_for() -> None:
    desk = Desk()
    desk.ask("a", [1, 2], limit=30)
    desk.engine.answer("a", [5, 6], reason=FinishReason.STOP)
    (found,) = desk.close()
    assert (found.output_tokens, found.max_output_tokens) == (2, 30)


def test_what_never_began_is_left_out() -> None:
    desk = Desk()
    desk.ask("a", [1, 2])
    desk.engine.answer("a", reason=FinishReason.ABORT)
    desk.engine.stopped = True
    with pytest.raises(EngineStoppedError):
        desk.ask("b", [1, 2])
    desk.engine.stopped = False
    desk.whole("c", [1, 2], [5])
    assert [each.prompt_tokens for each in desk.close()] == [2]


def test_closing_writes_what_is_under_way() -> None:
    desk = Desk()
    desk.ask("a", [1, 2])
    desk.engine.answer("a", [5], reason=None)
    desk.whole("b", [1, 2], [5, 6])
    assert [each.output_tokens for each in desk.close()] == [1, 2]
    desk.recorder.close()


def test_a_trace_that_cannot_be_written_is_told_and_ends(caplog: pytest.LogCaptureFixture) -> None:
    def full(recorded: RecordedRequest) -> None:
        raise OSError("no space left")

    desk = Desk(sink=full)
    with caplog.at_level(logging.ERROR):
        desk.whole("a", [1, 2], [5])
        desk.whole("b", [1, 2], [5])
        desk.close()
    assert caplog.text.count("trace recorder has ended") == 1


def test_everything_else_is_the_engine_s() -> None:
    desk = Desk()
    desk.over.abort("x")
    assert (desk.engine.aborted, desk.over.stats().running) == (["x"], 7)
    assert (desk.over.context_length, desk.over.max_prompt_tokens) == (1000, 999)
    desk.close()


def test_a_request_that_no_model_can_have_is_left_out_and_no_failure() -> None:
    work = BackgroundWork("trace recorder")
    found: list[RecordedRequest] = []
    engine = HandEngine()
    recorder = TraceRecorder(found.append, block_size=BLOCK, key=bytes(KEY_BYTES), clock=lambda: 1.0, work=work)
    over = recorder.over(engine)
    for name, tokens in (("odd", [2**32]), ("good", [1, 2, 3])):
        over.submit(GenerationRequest(name, tokens, SamplingParams(max_tokens=2)), lambda _output: None)
        engine.answer(name, [7])
    recorder.close()
    assert [request.prompt_tokens for request in found] == [3]
    assert (work.failures, work.running) == (0, True)


def test_what_fails_in_one_request_is_counted_and_the_others_are_recorded() -> None:
    work = BackgroundWork("trace recorder")
    found: list[RecordedRequest] = []

    def sink(recorded: RecordedRequest) -> None:
        if recorded.prompt_tokens == 2:
            raise ValueError("a line that cannot be made")
        found.append(recorded)

    engine = HandEngine()
    recorder = TraceRecorder(sink, block_size=BLOCK, key=bytes(KEY_BYTES), clock=lambda: 1.0, work=work)
    over = recorder.over(engine)
    for count in (1, 2, 3):
        over.submit(GenerationRequest(str(count), [5] * count, SamplingParams(max_tokens=2)), lambda _output: None)
        engine.answer(str(count), [7])
    recorder.close()
    assert [request.prompt_tokens for request in found] == [1, 3]
    assert (work.failures, work.running) == (1, True)


def test_a_trace_that_cannot_be_written_is_seen_to_have_ended() -> None:
    work = BackgroundWork("trace recorder")

    def full(_recorded: RecordedRequest) -> None:
        raise OSError(28, "No space left on device")

    engine = HandEngine()
    recorder = TraceRecorder(full, block_size=BLOCK, key=bytes(KEY_BYTES), clock=lambda: 1.0, work=work)
    over = recorder.over(engine)
    over.submit(GenerationRequest("a", [1], SamplingParams(max_tokens=2)), lambda _output: None)
    engine.answer("a", [7])
    recorder.close()
    assert not work.running
