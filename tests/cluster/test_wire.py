"""What is sent between workers and gateways comes back as it was, and anything else is one error of our own."""

from collections import Counter
from functools import partial

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from emberkv.cluster import wire, wire_commands
from emberkv.core.explaining.explanation import CacheOutcome, MissReason
from emberkv.core.feed import EventsLost
from emberkv.core.hashing import TokenChain
from emberkv.core.loading import LoadChoice
from emberkv.core.sequence import FinishReason
from emberkv.core.stats import SchedulerStats
from emberkv.engine.commands import ExportCheckpoint, ImportBlocks, LookedUp, LookUp, PoolStatistics, Statistics
from emberkv.engine.request import (
    CacheUsage,
    Constraint,
    GenerationRequest,
    PrefillProgress,
    SamplingParams,
    TokenLogprobs,
    TokenOutput,
)
from emberkv.errors import ConfigError, EventWireError, RequestError, WireError

LOGPROBS = (TokenLogprobs(7, -0.5, ((7, -0.5), (3, -1.5))),)
OUTPUTS = [
    TokenOutput("a", token_ids=(7,)),
    TokenOutput("a", (7, 8), LOGPROBS, CacheUsage(9, 4, 2, {"disk": 4}), queue_seconds=0.25),
    TokenOutput("a", prompt_logprobs=(TokenLogprobs(5, None, ()), *LOGPROBS)),
    TokenOutput("a", finish_reason=FinishReason.ERROR, error="the engine failed"),
]
SCHEMA = Constraint("json_schema", '{"type": "object"}', ("<tool_call>",), lenient=True)
LOAD = wire.LoadReport(worker_id="w", epoch=b"e", sequence=3, waiting=1, load_rates={"disk": 1e9}, prefill_rate=50.0)


def test_a_request_comes_back_as_it_was() -> None:
    params = SamplingParams(max_tokens=3, seed=-5, stop=("end",), logit_bias={3: 1.5}, logprobs=2, constraint=SCHEMA)
    request = GenerationRequest(
        "a", [1, 2, 2**31 - 1], params, b"salt", 2, "tenant", "session", 16, 60.0, answered=2, borders=(1, 2)
    )
    back = wire.decode_request(wire.encode_request(request))
    assert list(back.prompt_token_ids) == request.prompt_token_ids
    for name in ("request_id", "params", "salt", "priority", "tenant", "session_id", "retain_tokens",
                 "retain_seconds", "answered", "allowed_tokens", "borders"):  # fmt: skip
        assert getattr(back, name) == getattr(request, name)


@pytest.mark.parametrize("output", OUTPUTS)
def test_an_output_comes_back_as_it_was(output: TokenOutput) -> None:
    ((number, data),) = wire.decode_outcomes(wire.encode_outcomes([(3, wire.encode_outcome(output))]))
    assert (number, wire.decode_outcome(data, "a")) == (3, output)


def test_the_progress_of_a_prompt_comes_back_as_it_was() -> None:
    assert wire.decode_outcome(wire.encode_outcome(wire.Progress(4096, 18_827)), "a") == PrefillProgress(4096, 18_827)


def test_a_token_takes_few_bytes() -> None:
    output = wire.encode_outcome(TokenOutput("a-long-request-id", token_ids=(151_000,)))
    assert len(wire.frame(wire.encode_outcomes([(number, output) for number in range(1000, 1016)]))) <= 32 * 16


def test_the_stream_of_events_has_cache_messages_and_load_reports() -> None:
    lost = EventsLost(b"epoch", 3, 2)
    assert wire.decode_event(wire.encode_cache_message(lost)) == lost
    assert wire.decode_event(wire.encode(LOAD)) == LOAD


def test_a_field_of_a_later_version_is_passed_over() -> None:
    fields = msgspec.msgpack.decode(wire.encode(LOAD))
    assert wire.decode(msgspec.msgpack.encode({**fields, "news": 1}), wire.LoadReport) == LOAD


def test_a_function_cannot_be_sent() -> None:
    request = GenerationRequest("a", [1], SamplingParams(), allowed_tokens=lambda answer: None)
    with pytest.raises(ConfigError, match="allowed_tokens"):
        wire.encode_request(request)


def test_a_parameter_out_of_range_is_the_requests_error() -> None:
    data = wire.encode({"request_id": "a", "prompt": bytes(4), "params": {"temperature": 5.0}})
    with pytest.raises(RequestError, match=r"temperature is 5\.0"):
        wire.decode_request(data)


def test_a_constraint_of_another_kind_is_refused() -> None:
    data = wire.encode({"request_id": "a", "prompt": bytes(4), "params": {"constraint": {"kind": "xml"}}})
    with pytest.raises(WireError, match="kind"):
        wire.decode_request(data)


@pytest.mark.parametrize("prompt", [bytes(3), "text", None])
def test_a_prompt_that_is_not_token_ids_is_refused(prompt: object) -> None:
    with pytest.raises(WireError):
        wire.decode_request(wire.encode({"request_id": "a", "prompt": prompt, "params": {}}))


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    outcome = partial(wire.decode_outcome, request_id="a")
    for read in (wire.decode_request, wire.decode_event, wire.decode_channel, wire.decode_outcomes, outcome):
        try:
            read(data)
        except (WireError, EventWireError, RequestError):
            continue


MESSAGES = st.lists(st.binary(max_size=40), max_size=8)


@given(MESSAGES, st.lists(st.integers(0, 400), max_size=8))
def test_frames_are_found_however_they_arrive(messages: list[bytes], cuts: list[int]) -> None:
    data = b"".join(wire.frame(message) for message in messages)
    ends = sorted(min(cut, len(data)) for cut in cuts)
    reader = wire.FrameReader()
    found = [
        message
        for start, end in zip([0, *ends], [*ends, len(data)], strict=True)
        for message in reader.feed(data[start:end])
    ]
    assert found == [message for message in messages if message]
    assert reader.is_between_frames


def test_a_frame_that_is_too_long_is_refused_by_its_length() -> None:
    with pytest.raises(WireError, match="at most"):
        wire.FrameReader().feed((wire.MAX_MESSAGE_BYTES + 1).to_bytes(4, "big"))


def test_the_export_of_a_checkpoint_comes_back_with_its_chain_and_its_answer() -> None:
    chain = TokenChain(bytes(32), range(9), 4, owner="ann", salt=b"salt", public_blocks=1)
    command = wire_commands.decode_command(wire_commands.encode_command(ExportCheckpoint(chain, 2)), bytes(32))
    assert isinstance(command, ExportCheckpoint)
    found = command.chain
    assert (command.position, found.slice(0, 9), found.parent(2)) == (2, [*range(9)], chain.parent(2))
    answers: tuple[bytes | None, ...] = (b"record", None)
    assert [wire_commands.decode_answer(wire_commands.encode_answer(each), command) for each in answers] == [*answers]


def test_blocks_that_are_too_large_for_a_message_are_refused_before_they_are_sent() -> None:
    command, answer = ImportBlocks(TokenChain(bytes(32), range(4), 4), [bytes(1000)]), [bytes(1000), None]
    assert len(wire_commands.encode_command(command, message_bytes=2000)) > 1000
    assert len(wire_commands.encode_answer(answer, message_bytes=2000)) > 1000
    refused = r"at most 1,000 are sent.* smaller --block-size"
    with pytest.raises(ConfigError, match=refused):
        wire_commands.encode_command(command, message_bytes=1000)
    with pytest.raises(ConfigError, match=refused):
        wire_commands.encode_answer(answer, message_bytes=1000)


def test_what_a_worker_has_found_and_counted_comes_back_as_it_was() -> None:
    chain = TokenChain(bytes(32), range(9), 4)
    outcome = CacheOutcome({"pool": 8}, {MissReason.LAST: 1}, MissReason.EVICTED)
    for found in (LookedUp(outcome, 4, checkpoints=True), LookedUp(CacheOutcome(), 1)):
        assert wire_commands.decode_answer(wire_commands.encode_answer(found), LookUp(chain)) == found
    counters = SchedulerStats(query_tokens=9, tier_hit_tokens=Counter(disk=4), load_choices=Counter([LoadChoice.LOAD]))
    statistics = PoolStatistics(counters, 10, 1, 2, 7, 16, {"ann": 64.0})
    sent = wire_commands.encode_answer(statistics)
    assert wire_commands.decode_answer(sent, Statistics()) == statistics
    fields = msgspec.msgpack.decode(sent)
    later = {**fields, "counters": {**fields["counters"], "news": 1, "load_choices": {"load": 1, "guess": 2}}}
    assert wire_commands.decode_answer(wire.encode(later), Statistics()) == statistics
    for name, wrong in (("query_tokens", {"a": 1}), ("tier_hit_tokens", 5)):
        with pytest.raises(WireError, match=f"the counter {name} is"):
            wire_commands.decode_answer(wire.encode({**fields, "counters": {name: wrong}}), Statistics())
