"""A real server, asked by the official clients: the second time, most of a prompt comes from the cache."""

import random
import socket
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import openai
import pytest

from tests.conftest import CheckpointFactory
from tests.e2e.process import Server, serving
from tests.models import CONTEXT, VOCAB_SIZE
from tests.waiting import DEADLINE, eventually

SHARED_TOKENS = 16
"""More than all prompts here begin with: what the chat template puts first, and "Concerning"."""
HIT, QUERY = "emberkv_prefix_cache_hit_tokens_total", "emberkv_prefix_cache_query_tokens_total"


@pytest.fixture(scope="module")
def server(checkpoint: CheckpointFactory, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("server"), str(checkpoint("llama")), "--cache-ram", "24MiB") as server:
        yield server


@pytest.fixture(scope="module")
def model(checkpoint: CheckpointFactory) -> str:
    return checkpoint("llama").name


@pytest.fixture
def gpt(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def claude(server: Server) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as client:
        yield client


def long_text(about: str) -> str:
    return f"Concerning {about}: " + "the lamps along the street are lit at six and go out at dawn. " * 20


class Counters:
    """By how much the server's cache counters rise, once it is idle."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._before = self._read()

    def _read(self) -> tuple[int, int]:
        eventually(self._server.is_idle)
        return int(self._server.metric(QUERY)), int(self._server.metric(HIT))

    def rise(self) -> tuple[int, int]:
        """(tokens asked for, tokens found)"""
        query, hit = self._read()
        return query - self._before[0], hit - self._before[1]


def chat(about: str) -> list[Any]:
    return [{"role": "system", "content": long_text(about)}, {"role": "user", "content": "Why?"}]


def test_openai_chat(server: Server, gpt: openai.OpenAI, model: str) -> None:
    def ask() -> tuple[str | None, Any, tuple[int, int]]:
        counters = Counters(server)
        answer = gpt.chat.completions.create(model=model, messages=chat("chat"), max_tokens=12, temperature=0)
        return answer.choices[0].message.content, answer.usage, counters.rise()

    cold_text, cold, cold_rise = ask()
    warm_text, warm, warm_rise = ask()
    assert warm_text == cold_text
    assert cold.prompt_tokens == warm.prompt_tokens > 300
    assert cold.prompt_tokens_details.cached_tokens < SHARED_TOKENS
    assert warm.prompt_tokens_details.cached_tokens == warm.prompt_tokens - 1
    assert cold_rise == (cold.prompt_tokens, cold.prompt_tokens_details.cached_tokens)
    assert warm_rise == (warm.prompt_tokens, warm.prompt_tokens_details.cached_tokens)


def test_openai_stream(server: Server, gpt: openai.OpenAI, model: str) -> None:
    def ask() -> tuple[str, Any, tuple[int, int]]:
        counters = Counters(server)
        text, usage = "", None
        for chunk in gpt.chat.completions.create(
            model=model, messages=chat("stream"), max_tokens=12, temperature=0, stream=True,
            stream_options={"include_usage": True},
        ):  # fmt: skip
            usage = chunk.usage or usage
            text += chunk.choices[0].delta.content or "" if chunk.choices else ""
        return text, usage, counters.rise()

    cold_text, cold, _ = ask()
    warm_text, warm, rise = ask()
    assert warm_text == cold_text
    assert cold.prompt_tokens_details.cached_tokens < SHARED_TOKENS
    assert cold.completion_tokens == warm.completion_tokens
    assert rise == (warm.prompt_tokens, warm.prompt_tokens_details.cached_tokens)
    assert warm.prompt_tokens_details.cached_tokens == warm.prompt_tokens - 1


def test_openai_completions_of_token_ids(server: Server, gpt: openai.OpenAI, model: str) -> None:
    prompt = [random.Random(0).randrange(3, VOCAB_SIZE) for _ in range(600)]
    counters = Counters(server)
    cold = gpt.completions.create(model=model, prompt=prompt, max_tokens=8, temperature=0)
    warm = gpt.completions.create(model=model, prompt=prompt, max_tokens=8, temperature=0)
    assert cold.choices[0].text == warm.choices[0].text
    assert cold.usage is not None
    assert warm.usage is not None
    assert cold.usage.prompt_tokens == warm.usage.prompt_tokens == 600
    assert warm.usage.prompt_tokens_details is not None
    cached = warm.usage.prompt_tokens_details.cached_tokens
    assert cached
    assert counters.rise() == (1200, cached)


@pytest.mark.parametrize("answer", [1, 2, 4, 15, 40])
def test_a_short_prompt_is_reused_whatever_its_answers_length(
    server: Server, gpt: openai.OpenAI, model: str, answer: int
) -> None:
    prompt = f"{answer} futures of artificial intelligence"
    for attempt in range(3):
        got = gpt.completions.with_raw_response.create(model=model, prompt=prompt, max_tokens=answer, temperature=0)
        usage = got.parse().usage
        assert usage is not None
        if attempt:
            hit = usage.prompt_tokens - 1
            assert got.headers["x-emberkv-cache"] == f"hit={hit};pool={hit};miss=1;why=last-token@{hit}"


def test_anthropic_messages(server: Server, claude: anthropic.Anthropic, model: str) -> None:
    def ask() -> tuple[str, anthropic.types.Usage, tuple[int, int]]:
        counters = Counters(server)
        message = claude.messages.create(
            model=model, max_tokens=12, system=long_text("messages"),
            messages=[{"role": "user", "content": "Why?"}], extra_body={"temperature": 0},
        )  # fmt: skip
        assert message.content[0].type == "text"
        return message.content[0].text, message.usage, counters.rise()

    cold_text, cold, cold_rise = ask()
    warm_text, warm, warm_rise = ask()
    assert warm_text == cold_text
    assert (cold.cache_read_input_tokens or 0) < SHARED_TOKENS
    assert cold.cache_creation_input_tokens
    assert warm.cache_read_input_tokens
    for usage, rise in (cold, cold_rise), (warm, warm_rise):
        read, created = usage.cache_read_input_tokens, usage.cache_creation_input_tokens
        assert rise == (usage.input_tokens + (read or 0) + (created or 0), read)


def test_anthropic_stream(server: Server, claude: anthropic.Anthropic, model: str) -> None:
    def ask() -> anthropic.types.Message:
        with claude.messages.stream(
            model=model, max_tokens=12, system=long_text("message stream"),
            messages=[{"role": "user", "content": "Why?"}], extra_body={"temperature": 0},
        ) as stream:  # fmt: skip
            return stream.get_final_message()

    cold, counters = ask(), Counters(server)
    warm = ask()
    assert warm.content == cold.content
    assert warm.usage.cache_read_input_tokens == counters.rise()[1]
    assert warm.usage.cache_read_input_tokens


def test_anthropic_and_openai_share_what_they_have_in_common(
    server: Server, gpt: openai.OpenAI, claude: anthropic.Anthropic, model: str
) -> None:
    gpt.chat.completions.create(model=model, messages=chat("both"), max_tokens=1)
    question = claude.messages.create(
        model=model, max_tokens=1, system=long_text("both"), messages=[{"role": "user", "content": "Where?"}]
    )
    assert question.usage.cache_read_input_tokens


def test_health_is_answered_during_prefill_and_a_disconnect_frees_the_blocks(server: Server, model: str) -> None:
    rng = random.Random(1)
    address = httpx.URL(server.url)

    def aborted() -> float:
        return server.total("emberkv_requests_finished_total", api="completions", reason="abort")

    def is_left_during_prefill() -> bool:
        """False where this process was held up until half of the prompts were computed.

        While one sequence decodes, a step prefills 128 tokens: 155 steps are enough for all prompts behind the first
        one. So none of the answers, of 190 tokens each, ends before all prompts are computed.
        """
        prompts = [[rng.randrange(3, VOCAB_SIZE) for _ in range(CONTEXT - 200)] for _ in range(6)]
        eventually(server.is_idle)
        before, aborted_before = server.metric("emberkv_prefill_tokens_total"), aborted()
        body = {"model": model, "prompt": prompts, "max_tokens": 190, "ignore_eos": True, "stream": True}
        request = httpx.Request("POST", f"{server.url}/v1/completions", json=body)
        with socket.create_connection((address.host, address.port or 80), timeout=DEADLINE) as connection:
            head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(request.content)}\r\n\r\n"
            connection.sendall(head.encode() + request.content)
            eventually(lambda: server.metric("emberkv_prefill_tokens_total") > before)
            assert httpx.get(f"{server.url}/health", timeout=DEADLINE).json() == {"status": "alive"}
            computed = server.metric("emberkv_prefill_tokens_total") - before
        if computed > sum(map(len, prompts)) / 2:
            return False
        eventually(server.is_idle)
        assert aborted() - aborted_before == len(prompts)
        assert server.metric("emberkv_prefill_tokens_total") - before < sum(map(len, prompts))
        return True

    eventually(is_left_during_prefill)


def test_bad_requests_leave_nothing_behind(server: Server, gpt: openai.OpenAI, model: str) -> None:
    with pytest.raises(openai.BadRequestError, match=f"your messages resulted in {CONTEXT} tokens"):
        gpt.completions.create(model=model, prompt=[5] * CONTEXT, max_tokens=1)
    with pytest.raises(openai.BadRequestError, match=f"token id {VOCAB_SIZE} is not in the vocabulary"):
        gpt.completions.create(model=model, prompt=[VOCAB_SIZE], max_tokens=1)
    with pytest.raises(openai.NotFoundError, match="model is 'another'"):
        gpt.completions.create(model="another", prompt="Hi", max_tokens=1)
    assert server.is_idle()
