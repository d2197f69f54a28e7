"""The official clients, against a real server."""

from collections.abc import Iterator

import anthropic
import openai
import pytest

from emberkv.serving.app import ServingSettings
from emberkv.serving.lifecycle import Lifecycle
from emberkv.serving.server import HttpServer
from tests.serving.fakes import FakeEngine, Script
from tests.serving.harness import MODEL, serving
from tests.waiting import DEADLINE, eventually

PROMPT_TOKENS = len("<user>Hi<assistant>")


@pytest.fixture
def guarded(lifecycle: Lifecycle) -> Iterator[HttpServer]:
    with serving(lifecycle, ServingSettings(api_keys=("sesame",), max_body_bytes=100_000)) as server:
        yield server


@pytest.fixture
def gpt(guarded: HttpServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{guarded.url}/v1", api_key="sesame", max_retries=0, timeout=DEADLINE) as client:
        yield client


@pytest.fixture
def claude(guarded: HttpServer) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=guarded.url, api_key="sesame", max_retries=0, timeout=DEADLINE) as client:
        yield client


def test_openai_chat(gpt: openai.OpenAI, engine: FakeEngine) -> None:
    engine.script = Script("Hello", cached=8)
    answer = gpt.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "Hi"}])
    assert answer.choices[0].message.content == "Hello"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == PROMPT_TOKENS
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 8


def test_openai_stream(gpt: openai.OpenAI) -> None:
    chunks = list(
        gpt.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "Hi"}],
            stream=True,
            stream_options={"include_usage": True},
            logprobs=True,
            top_logprobs=1,
            extra_body={"top_k": 5},
        )
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "Hello there"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 11
    logprobs = chunks[1].choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert logprobs.content[0].top_logprobs[0].token == "x"


def test_openai_completions_and_models(gpt: openai.OpenAI) -> None:
    answer = gpt.completions.create(model=MODEL, prompt=["a", "b"], max_tokens=2, n=2)
    assert [choice.text for choice in answer.choices] == ["He"] * 4
    assert [model.id for model in gpt.models.list()] == [MODEL, "alias"]
    assert gpt.models.retrieve(MODEL).owned_by == "emberkv"


def test_openai_errors(gpt: openai.OpenAI, guarded: HttpServer) -> None:
    with pytest.raises(openai.BadRequestError, match="max_tokens is -1") as bad:
        gpt.completions.create(model=MODEL, prompt="a", max_tokens=-1)
    assert bad.value.param == "max_tokens"
    with pytest.raises(openai.BadRequestError) as long:
        gpt.completions.create(model=MODEL, prompt="a" * 1000)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError):
        gpt.completions.create(model="gpt-9", prompt="a")
    with pytest.raises(openai.AuthenticationError):
        gpt.with_options(api_key="wrong").models.list()
    with pytest.raises(openai.APIStatusError) as large:
        gpt.completions.create(model=MODEL, prompt="a" * 200_000)
    assert large.value.status_code == 413


def test_openai_stream_closed_early(gpt: openai.OpenAI, engine: FakeEngine) -> None:
    engine.script = Script("Hello", pause_after=2)
    with gpt.completions.create(model=MODEL, prompt="a", stream=True) as stream:
        assert next(iter(stream)).choices[0].text in ("H", "He")
    eventually(lambda: engine.running == 0)
    assert engine.aborted == [engine.submitted[0].request_id]


def test_anthropic_message(claude: anthropic.Anthropic, engine: FakeEngine) -> None:
    engine.script = Script("Hello", cached=8, created=6)
    message = claude.messages.create(
        model=MODEL,
        max_tokens=20,
        system="Be brief",
        messages=[{"role": "user", "content": "Hi"}],
        stop_sequences=["lo"],
    )
    assert message.content[0].type == "text"
    assert message.content[0].text == "Hel"
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", "lo")
    assert message.usage.cache_read_input_tokens == 8
    assert message.usage.cache_creation_input_tokens == 6
    assert message.usage.input_tokens == len("<system>Be brief") + PROMPT_TOKENS - 14


def test_anthropic_stream(claude: anthropic.Anthropic, engine: FakeEngine) -> None:
    engine.script = Script("Hello", cached=8)
    with claude.messages.stream(model=MODEL, max_tokens=20, messages=[{"role": "user", "content": "Hi"}]) as stream:
        assert "".join(stream.text_stream) == "Hello"
        final = stream.get_final_message()
    assert final.stop_reason == "end_turn"
    assert (final.usage.input_tokens, final.usage.cache_read_input_tokens) == (PROMPT_TOKENS - 8, 8)
    assert final.usage.output_tokens == 5


def test_anthropic_count_tokens(claude: anthropic.Anthropic) -> None:
    count = claude.messages.count_tokens(model=MODEL, messages=[{"role": "user", "content": "Hi"}])
    assert count.input_tokens == PROMPT_TOKENS


def test_anthropic_errors(claude: anthropic.Anthropic) -> None:
    def ask(client: anthropic.Anthropic, model: str = MODEL, content: str = "Hi", max_tokens: int = 5) -> None:
        client.messages.create(model=model, max_tokens=max_tokens, messages=[{"role": "user", "content": content}])

    with pytest.raises(anthropic.BadRequestError, match="prompt is too long: 1017 tokens > 990 maximum"):
        ask(claude, content="a" * 1000)
    with pytest.raises(anthropic.NotFoundError, match="not_found_error"):
        ask(claude, model="claude")
    with pytest.raises(anthropic.AuthenticationError, match="authentication_error"):
        ask(claude.with_options(api_key="wrong"))
    with pytest.raises(anthropic.APIStatusError, match="request_too_large"):
        ask(claude, content="a" * 200_000)


def test_request_ids_reach_both_clients(gpt: openai.OpenAI, claude: anthropic.Anthropic) -> None:
    listed = gpt.models.with_raw_response.list(extra_headers={"x-request-id": "mine"})
    assert listed.headers["x-request-id"] == "mine"
    answer = gpt.completions.create(model=MODEL, prompt="a", max_tokens=1)
    assert answer._request_id is not None
    message = claude.messages.create(model=MODEL, max_tokens=1, messages=[{"role": "user", "content": "Hi"}])
    assert message._request_id is not None
    with pytest.raises(anthropic.NotFoundError) as unknown:
        claude.messages.create(model="claude", max_tokens=1, messages=[{"role": "user", "content": "Hi"}])
    assert unknown.value.request_id is not None


def test_anthropic_models(claude: anthropic.Anthropic) -> None:
    assert [(model.type, model.id, model.display_name) for model in claude.models.list()] == [
        ("model", MODEL, MODEL),
        ("model", "alias", "alias"),
    ]
    card = claude.models.retrieve("alias")
    assert card.created_at.timestamp() == 1_700_000_000
    assert card.max_input_tokens == 990


def test_anthropic_cache_warming(claude: anthropic.Anthropic, engine: FakeEngine) -> None:
    message = claude.messages.create(
        model=MODEL,
        max_tokens=0,
        cache_control={"type": "ephemeral", "ttl": "1h"},
        messages=[{"role": "user", "content": "Hi"}],
    )
    assert (message.content, message.stop_reason, message.usage.output_tokens) == ([], "max_tokens", 0)
    assert engine.submitted[0].retain_tokens == PROMPT_TOKENS


def test_openai_template_options(gpt: openai.OpenAI, engine: FakeEngine) -> None:
    gpt.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Hi"}],
        reasoning_effort="low",
        extra_body={"chat_template_kwargs": {"enable_thinking": False}, "cache_salt": "mine"},
    )
    shown = bytes(engine.submitted[0].prompt_token_ids).decode()
    assert shown == "{reasoning_effort=low}{enable_thinking=False}<user>Hi<assistant>"


def test_openai_echo(gpt: openai.OpenAI) -> None:
    answer = gpt.completions.create(model=MODEL, prompt="ab", max_tokens=0, echo=True, logprobs=1)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert answer.choices[0].text == "ab"
    assert (logprobs.tokens, logprobs.token_logprobs) == (["<begin>", "a", "b"], [None, -2.0, -2.0])
    assert logprobs.text_offset == [0, 0, 1]
