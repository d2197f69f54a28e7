"""Sessions of real coding agents, sent to the APIs again: what each request gets, and what it finds in the cache."""

import json
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from emberkv.serving.app import create_app
from emberkv.serving.parsing.events import ParsedMessage
from emberkv.serving.parsing.formats import parse_output
from tests.agents.replay import Replay, Reply, check_turns
from tests.agents.scenario import AGENTS, Agent
from tests.agents.server import FAMILY, KEEPS_THOUGHTS, agent_settings, scripted_lifecycle, scripted_model
from tests.agents.session_file import FOLDER, foreign_words, read_session
from tests.serving.harness import Client

STREAMS = {
    "/v1/messages": r"message_start (content_block_start (content_block_delta )+content_block_stop )+"
    r"message_delta message_stop ",
    "/v1/chat/completions": r"(delta )+finish (usage )?",
    "/v1/responses": r"response\.created response\.in_progress (response\.output_item\.added "
    r"(response\.[a-z_.]+ )+?response\.output_item\.done )+response\.completed ",
}


@pytest.fixture(scope="module", params=sorted(path.name for path in FOLDER.glob("*.xz")))
def replies(request: pytest.FixtureRequest) -> Iterator[list[Reply]]:
    """What all requests of a session get, one after the other."""
    answers = [""]
    with (
        tempfile.TemporaryDirectory() as folder,
        scripted_model(lambda prompt: answers[-1], Path(folder), KEEPS_THOUGHTS) as model,
    ):
        replay = Replay(Client(create_app(scripted_lifecycle(model), agent_settings())), answers.append)
        yield [replay.send(exchange) for exchange in read_session(FOLDER / request.param).exchanges]


@pytest.mark.parametrize("agent", AGENTS.values(), ids=lambda agent: agent.name)
def test_no_words_of_the_agent_s_own_prompts_are_in_its_session(agent: Agent) -> None:
    exchanges = read_session(FOLDER / f"{agent.name}.jsonl.xz").exchanges
    kept = [*agent.own_texts, *(each for exchange in exchanges for each in exchange.ids)]
    assert foreign_words([exchange.body for exchange in exchanges], kept) == set()


def test_every_request_is_answered_as_it_was(replies: list[Reply]) -> None:
    assert [reply.status for reply in replies] == [reply.exchange.status for reply in replies]
    assert all(reply.status in (200, 404) for reply in replies)


def test_streams_have_the_events_that_the_api_has_in_its_order(replies: list[Reply]) -> None:
    streams = [reply for reply in replies if reply.events]
    assert len(streams) >= 2
    for reply in streams:
        path = reply.exchange.path.partition("?")[0]
        assert re.fullmatch(STREAMS[path], " ".join([*reply.events, ""])), reply.events


def test_agents_get_the_thoughts_the_text_and_the_calls_that_the_model_wrote(replies: list[Reply]) -> None:
    for reply in _session(replies):
        meant = _meant(reply)
        assert (reply.reasoning, reply.text) == (meant.reasoning, meant.content)
        assert reply.calls == [(call.name, json.loads(call.arguments)) for call in meant.calls]


def test_a_turn_finds_all_of_the_turn_before_in_the_cache(replies: list[Reply]) -> None:
    check_turns(_session(replies))


def _session(replies: list[Reply]) -> list[Reply]:
    return [reply for reply in replies if reply.exchange.follows]


def _meant(reply: Reply) -> ParsedMessage:
    """What the model wrote."""
    answer = reply.exchange.answer or ""
    tools = [{"function": {"name": name}} for name in re.findall(r'"name": "([^"]+)"', answer)]
    return parse_output(FAMILY.format, answer, tools=tools)
