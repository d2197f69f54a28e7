"""Requests that exceed the context: each API's clients find the words that they search for, or get what fits."""

import re
from dataclasses import replace
from typing import Any

import pytest

from emberkv.errors import PromptTooLongError
from emberkv.serving.answer_service import MAX_TOKENS_HEADER
from emberkv.serving.app import create_app
from emberkv.serving.errors import TooManyRequestsError, anthropic_error, anthropic_status, failure_of, openai_error
from emberkv.serving.lifecycle import Lifecycle, ServedModel
from tests.serving.fakes import FakeEngine, Script
from tests.serving.harness import MODEL, Client
from tests.serving.harness import anthropic_error as anthropic_error_of
from tests.serving.harness import openai_error as openai_error_of

USER = [{"role": "user", "content": "Hi"}]
CHAT, MESSAGES, COMPLETIONS = "/v1/chat/completions", "/v1/messages", "/v1/completions"

QWEN_CODE = re.compile(r"maximum context length is (\d+) tokens.*?(?:resulted in|requested) (\d+) tokens", re.DOTALL)
CLAUDE_CODE_PROMPT = re.compile(r"prompt is too long: (\d+) tokens > (\d+) maximum")
CLAUDE_CODE_ANSWER = re.compile(r"input length and `max_tokens` exceed context limit: (\d+) \+ (\d+) > (\d+)")


def body(path: str, **fields: Any) -> dict[str, Any]:
    prompt = {"prompt": "Once"} if path == COMPLETIONS else {"messages": USER}
    return {"model": MODEL, **prompt, **fields}


@pytest.fixture
def strict(model: ServedModel) -> Client:
    lifecycle = Lifecycle()
    lifecycle.loaded(replace(model, on_overflow="refuse"))
    return Client(create_app(lifecycle))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "field", "prompt_tokens"),
    [
        (CHAT, "max_tokens", 19),
        (CHAT, "max_completion_tokens", 19),
        (MESSAGES, "max_tokens", 19),
        (COMPLETIONS, "max_tokens", 5),
    ],
)
def test_an_answer_gets_what_the_context_has_room_for(
    client: Client, engine: FakeEngine, path: str, field: str, prompt_tokens: int, stream: bool
) -> None:
    engine.script = Script("Hello")
    answer = client.post(path, body(path, **{field: 10**12}, stream=stream))
    assert answer.status_code == 200
    assert engine.submitted[0].params.max_tokens == 1000 - prompt_tokens
    assert answer.headers[MAX_TOKENS_HEADER] == str(1000 - prompt_tokens)


def test_an_answer_that_fits_is_not_called_clipped(client: Client) -> None:
    assert MAX_TOKENS_HEADER not in client.post(CHAT, body(CHAT, max_tokens=981)).headers


def test_openai_refuses_in_openais_words(strict: Client, engine: FakeEngine) -> None:
    error = openai_error_of(strict.post(CHAT, body(CHAT, max_completion_tokens=982)))
    assert (error["code"], error["param"]) == ("context_length_exceeded", "max_completion_tokens")
    found = QWEN_CODE.search(error["message"])
    assert found is not None
    assert found.groups() == ("1000", "1001")
    assert "(19 in the messages, 982 in the completion)" in error["message"]
    assert engine.submitted == []


def test_anthropic_refuses_in_anthropics_words(strict: Client, engine: FakeEngine) -> None:
    error = anthropic_error_of(strict.post(MESSAGES, body(MESSAGES, max_tokens=32_000)))
    found = CLAUDE_CODE_ANSWER.search(error["message"])
    assert found is not None
    assert found.groups() == ("19", "32000", "1000")
    assert engine.submitted == []


def test_a_prompt_that_is_too_long_is_refused_in_each_apis_words(client: Client) -> None:
    long = [{"role": "user", "content": "x" * 2000}]
    openai = QWEN_CODE.search(openai_error_of(client.post(CHAT, body(CHAT, messages=long)))["message"])
    claude = CLAUDE_CODE_PROMPT.search(
        anthropic_error_of(client.post(MESSAGES, body(MESSAGES, messages=long, max_tokens=1)))["message"]
    )
    assert openai is not None
    assert openai.groups() == ("990", "2017")
    assert claude is not None
    assert claude.groups() == ("2017", "990")


def test_without_numbers_the_message_stays() -> None:
    failure = failure_of(PromptTooLongError("it is too long"))
    assert openai_error(failure)["error"]["message"] == "it is too long"
    assert anthropic_error(failure)["error"]["message"] == "it is too long"


def test_anthropic_calls_an_overload_529() -> None:
    failure = failure_of(TooManyRequestsError("full", retry_after=2.3))
    assert (failure.status, anthropic_status(failure), failure.headers["retry-after"]) == (429, 529, "3")
    assert anthropic_error(failure)["error"]["type"] == "overloaded_error"
