"""Each field of each request, with values that no client should send: never a 500, never a hang, errors in shape."""

import asyncio
import json
from collections.abc import Iterator, MutableMapping
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from emberkv.serving.api.anthropic_schema import MessagesRequest, PromptRequest
from emberkv.serving.api.cache_api import CacheQuestion
from emberkv.serving.api.openai_schema import ChatCompletionRequest, CompletionRequest
from emberkv.serving.api.tokenizer_api import DetokenizeRequest
from emberkv.serving.app import ServingSettings, create_app
from emberkv.serving.lifecycle import Lifecycle, ServedModel
from tests.serving.core_engine import CoreEngine
from tests.serving.fakes import ByteTokenizer
from tests.serving.harness import MODEL
from tests.waiting import DEADLINE

MESSAGES = [{"role": "user", "content": "Hi"}]
CHAT = {"model": MODEL, "messages": MESSAGES, "max_tokens": 2}
ASKED = {"openai": {"messages": MESSAGES}}

ROUTES: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "/v1/chat/completions": (ChatCompletionRequest, CHAT),
    "/v1/completions": (CompletionRequest, {"model": MODEL, "prompt": "a", "max_tokens": 2}),
    "/v1/messages": (MessagesRequest, CHAT),
    "/v1/messages/count_tokens": (PromptRequest, CHAT),
    "/tokenize": (CompletionRequest, {"prompt": "a"}),
    "/detokenize": (DetokenizeRequest, {"tokens": [1]}),
    **{f"/v1/cache/{name}": (CacheQuestion, ASKED) for name in ("explain", "warm", "pin", "unpin", "remove", "clear")},
}

DEEP = "[" * 50_000 + "]" * 50_000
EDGES = [
    "null", "true", "0", "-1", "1", "2147483648", "-9223372036854775809", "18446744073709551616", "1" + "0" * 400,
    "9" * 5000, "0.5", "-0.0", "5e-324", "1e308", "1e999", "-1e999", "NaN", "Infinity", '""', '"a"', '"\\u0000"',
    '"\\ud800"', '"\\ud83d\\ude00"', '"1"', "[]", "[[]]", "[null]", "[-1]", "[4294967296]", '["a"]', "[{}]", "{}",
    '{"a":1}', '{"type":"text"}', '[{"role":"user"}]', '[{"role":"user","content":"\\udfff"}]',
    '[{"role":"user","content":[{"type":"image"}]}]', '[{"type":"function","function":null}]', DEEP,
    '{"a":' * 900 + "1" + "}" * 900,
]  # fmt: skip
BODIES = ["", "null", "[]", '"a"', "1", "{", "{}", "\ufeff{}", DEEP, '{"model":"tiny","model":1}', "\ud800"]


@pytest.fixture(scope="module")
def app() -> FastAPI:
    core = CoreEngine()
    lifecycle = Lifecycle()
    lifecycle.loaded(ServedModel((MODEL,), 0, core, ByteTokenizer(), cache=core.service))
    return create_app(lifecycle, ServingSettings(bound_to_loopback=True))


async def answer_to(app: FastAPI, path: str, body: bytes) -> httpx.Response:
    """What the app answers to a POST of JSON. A client around it would take as long as the app itself."""
    headers = {"host": "127.0.0.1", "content-type": "application/json", "content-length": str(len(body))}
    scope = {
        "type": "http", "http_version": "1.1", "method": "POST", "scheme": "http", "path": path, "query_string": b"",
        "root_path": "", "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
        "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80),
    }  # fmt: skip
    received: list[MutableMapping[str, Any]] = [{"type": "http.request", "body": body, "more_body": False}]
    sent: list[MutableMapping[str, Any]] = []
    is_complete = asyncio.Event()

    async def receive() -> MutableMapping[str, Any]:
        if received:
            return received.pop()
        await is_complete.wait()
        return {"type": "http.disconnect"}

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            is_complete.set()

    await app(scope, receive, send)
    return httpx.Response(sent[0]["status"], content=b"".join(each.get("body", b"") for each in sent))


def ask_all(app: FastAPI, asked: Iterator[tuple[str, bytes]]) -> int:
    """Post each body; how many. Fails at the first answer that is no answer."""

    async def ask() -> int:
        count = 0
        for path, body in asked:
            check(path, body, await asyncio.wait_for(answer_to(app, path, body), DEADLINE))
            count += 1
        return count

    return asyncio.run(ask())


def check(path: str, body: bytes, response: httpx.Response) -> None:
    shown = f"{path} {body[:300]!r}: {response.status_code} {response.text[:300]}"
    assert response.status_code < 500, shown
    if response.status_code == 200:
        return
    error = response.json()
    error.pop("request_id")
    if path.startswith("/v1/messages"):
        assert (set(error), set(error["error"])) == ({"type", "error"}, {"type", "message"}), shown
    else:
        assert (set(error), set(error["error"])) == ({"error"}, {"message", "type", "param", "code"}), shown
    assert len(error["error"]["message"]) < 2000, shown


def with_field(base: dict[str, Any], name: str, value: str) -> bytes:
    rest = json.dumps({key: each for key, each in base.items() if key != name})[1:-1]
    return f'{{{rest}{", " if rest else ""}"{name}": {value}}}'.encode()


@pytest.mark.parametrize("path", ROUTES)
def test_every_field_at_every_edge(app: FastAPI, path: str) -> None:
    kind, base = ROUTES[path]
    names = [*kind.model_fields, *(name for name in base if name not in kind.model_fields)]
    asked = ((path, with_field(base, name, value)) for name in names for value in EDGES)
    assert ask_all(app, asked) == len(names) * len(EDGES)


@pytest.mark.parametrize("path", ROUTES)
def test_bodies_that_are_no_request(app: FastAPI, path: str) -> None:
    bodies = [body.encode("utf-8", "surrogatepass") for body in BODIES]
    assert ask_all(app, ((path, body) for body in [*bodies, b"\xff\xfe", b"\x00" * 100])) == len(bodies) + 2


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(exclude_categories=()), max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "type", "text", "name", "function", "id"]), inner, max_size=3
        )
    ),
    max_leaves=8,
)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(path=st.sampled_from(sorted(ROUTES)), values=st.lists(JSON, min_size=1, max_size=3), data=st.data())
def test_any_fields_together(app: FastAPI, path: str, values: list[Any], data: st.DataObject) -> None:
    kind, base = ROUTES[path]
    fields = {data.draw(st.sampled_from(sorted(kind.model_fields))): value for value in values}
    assert ask_all(app, iter([(path, json.dumps({**base, **fields}).encode())])) == 1


@pytest.mark.parametrize(
    "path", ["/v1/cache", "/v1/cache/sessions", "/v1/cache/prefixes", "/metrics/tenants", "/v1/models/x"]
)
@pytest.mark.parametrize("name", ["by", "limit", "authorization", "x-api-key", "origin", "x-session-id", "host"])
def test_query_parameters_and_headers(app: FastAPI, path: str, name: str) -> None:
    values = [
        b"",
        b"\xff\xfe",
        b"9" * 5000,
        b"-1",
        b"http://[",
        b"http://[::1",
        b"null",
        b"Bearer",
        b"Bearer ",
        b"a" * 9000,
        b"%00",
    ]

    async def ask() -> None:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            for value in values:
                parameters = {name: value.decode("latin-1")} if name in ("by", "limit") else None
                headers = {} if parameters else {name.encode(): value}
                check(path, value, await client.get(path, params=parameters, headers=headers))

    asyncio.run(ask())
