"""The OpenAPI document and the page in docs/, held against the routes, their fields and their answers."""

import re
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI

from emberkv.serving.api import openai_schema
from emberkv.serving.openapi import ANSWERS, REQUESTS, AnthropicError, Error
from tests.serving.harness import MODEL, Client

PAGE = (Path(__file__).parents[2] / "docs" / "http-api.md").read_text(encoding="utf-8")
CONVERSATION = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}]}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {**CONVERSATION, "logprobs": True},
    "/v1/completions": {"model": MODEL, "prompt": "Hi", "echo": True, "logprobs": 2},
    "/v1/messages": {**CONVERSATION, "max_tokens": 3},
    "/v1/messages/count_tokens": CONVERSATION,
    "/tokenize": {"prompt": "Hi", "return_token_strs": True},
    "/detokenize": {"tokens": [72]},
}


@pytest.fixture
def document(client: Client) -> dict[str, Any]:
    body: dict[str, Any] = client.get("/openapi.json").json()
    return body


def test_every_route_is_on_both_pages(client: Client, document: dict[str, Any]) -> None:
    assert isinstance(client.app, FastAPI)
    in_document = {(method.upper(), path) for path, methods in document["paths"].items() for method in methods}
    in_page = set(re.findall(r"`(GET|POST|DELETE) (/[^`]*)`", PAGE))
    assert in_page == in_document
    reachable = {path for _, path in in_page if client.request("OPTIONS", path).status_code == 204}
    assert reachable == {path for _, path in in_page}


def test_the_page_has_every_route_and_field_and_loads_nothing(client: Client, document: dict[str, Any]) -> None:
    page = client.get("/docs")
    assert page.headers["content-type"].startswith("text/html")
    routes = {f">{method.upper()} {path}<" for path, methods in document["paths"].items() for method in methods}
    assert {route for route in routes if route not in page.text} == set()
    assert "<code>max_completion_tokens</code></td><td>integer or null</td><td></td>" in page.text
    assert "<code>messages</code></td><td>list of object</td><td>required</td>" in page.text
    assert "``" not in page.text
    assert not re.findall(r"<script|<link|src=|url\(|@import", page.text)


def test_every_reference_leads_somewhere(document: dict[str, Any]) -> None:
    wanted = set(re.findall(r"#/components/schemas/(\w+)", str(document)))
    assert wanted <= set(document["components"]["schemas"])
    assert {"ChatCompletionRequest", "Message", "Error"} <= wanted


@pytest.mark.parametrize("path", ANSWERS)
def test_answers_are_as_described(client: Client, path: str) -> None:
    answer = client.post(path, BODIES[path])
    assert answer.status_code == 200
    ANSWERS[path].model_validate_json(answer.content)


def test_errors_are_as_described(client: Client) -> None:
    Error.model_validate_json(client.post("/v1/completions", {}).content)
    AnthropicError.model_validate_json(client.post("/v1/messages", {}).content)


def test_every_field_is_on_the_page() -> None:
    fields = {name for path, model in REQUESTS.items() if "/cache/" not in path for name in model.model_fields}
    named = set(re.findall(r"`(\w+)`", PAGE))
    assert fields | set(openai_schema._UNSUPPORTED) <= named | {"max_tokens"}
