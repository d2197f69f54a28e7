"""API keys: what is open, what is guarded, and each API's way of saying no."""

from collections.abc import Callable
from typing import Any

import pytest

from emberkv.serving.app import ServingSettings, create_app
from emberkv.serving.auth import ApiKeys
from emberkv.serving.lifecycle import Lifecycle
from emberkv.serving.tenancy import Tenants
from tests.serving.fakes import FakeEngine
from tests.serving.harness import MODEL, Client

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}]}
MESSAGE = {**CHAT, "max_tokens": 5}


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def x_api_key(key: str) -> dict[str, str]:
    return {"x-api-key": key}


@pytest.fixture
def guarded(lifecycle: Lifecycle) -> Client:
    return Client(create_app(lifecycle, ServingSettings(api_keys=("sesame", "mellon"))))


@pytest.mark.parametrize("header", [bearer, x_api_key])
@pytest.mark.parametrize(("path", "body"), [("/v1/chat/completions", CHAT), ("/v1/messages", MESSAGE)])
def test_a_right_key_is_let_in(
    guarded: Client, header: Callable[[str], dict[str, str]], path: str, body: dict[str, Any]
) -> None:
    assert guarded.post(path, body, headers=header("sesame")).status_code == 200
    assert guarded.post(path, body, headers=header("mellon")).status_code == 200


@pytest.mark.parametrize("headers", [bearer("wrong"), x_api_key("sesam"), x_api_key("sesame2"), bearer("s\u00e9same")])
def test_a_wrong_key(guarded: Client, engine: FakeEngine, headers: dict[str, str]) -> None:
    encoded = {name: value.encode() for name, value in headers.items()}
    response = guarded.post("/v1/chat/completions", CHAT, headers=encoded)
    assert response.status_code == 401
    assert response.json()["error"] == {
        "message": "the API key given is not one of this server's keys",
        "type": "invalid_request_error",
        "param": None,
        "code": "invalid_api_key",
    }
    response = guarded.post("/v1/messages", MESSAGE, headers=encoded)
    assert response.status_code == 401
    assert response.json()["error"]["type"] == "authentication_error"
    assert engine.submitted == []


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Basic sesame"}, {"Authorization": "Bearer "}])
@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/tiny"])
def test_a_missing_key(guarded: Client, headers: dict[str, str], path: str) -> None:
    response = guarded.get(path, headers=headers)
    assert response.status_code == 401
    assert response.json()["error"]["message"] == (
        "no API key was given; send one as 'Authorization: Bearer KEY' or 'x-api-key: KEY'"
    )


def test_the_shape_follows_the_client(guarded: Client) -> None:
    response = guarded.get("/v1/models", headers={"anthropic-version": "2023-06-01"})
    assert response.json()["error"]["type"] == "authentication_error"
    assert guarded.post("/v1/messages/count_tokens", MESSAGE).json()["error"]["type"] == "authentication_error"


@pytest.mark.parametrize("path", ["/health", "/ready"])
def test_probes_are_open(guarded: Client, path: str) -> None:
    assert guarded.get(path).status_code == 200


def test_the_metrics_are_the_operators_where_keys_are_set(lifecycle: Lifecycle) -> None:
    def status(headers: dict[str, str], admin_key: str | None = None, metrics_key: str | None = None) -> int:
        settings = ServingSettings(api_keys=("sesame",), admin_key=admin_key, metrics_key=metrics_key)
        return Client(create_app(lifecycle, settings)).get("/metrics", headers=headers).status_code

    assert [status(headers) for headers in ({}, bearer("sesame"))] == [403, 403]
    given = ({}, bearer("sesame"), bearer("root"), bearer("scrape"), x_api_key("scrape"))
    assert [status(headers, "root", "scrape") for headers in given] == [401, 401, 200, 200, 200]
    assert [status(headers, "root") for headers in given] == [401, 401, 200, 401, 401]


def test_the_metrics_key_opens_nothing_else_and_works_without_api_keys(lifecycle: Lifecycle) -> None:
    scraped = Client(create_app(lifecycle, ServingSettings(metrics_key="scrape", bound_to_loopback=False)))
    statuses = [scraped.get(path, headers=bearer("scrape")).status_code for path in ("/metrics", "/metrics/tenants")]
    assert statuses == [200, 403]
    assert scraped.get("/metrics").status_code == 401
    assert scraped.get("/v1/models").status_code == 200


def test_each_key_has_its_own_salt_and_no_keys_have_none(guarded: Client, client: Client, engine: FakeEngine) -> None:
    for headers in (bearer("sesame"), x_api_key("sesame"), bearer("mellon")):
        guarded.post("/v1/chat/completions", CHAT, headers=headers)
    client.post("/v1/chat/completions", CHAT, headers=bearer("anything"))
    first, again, other, none = (request.salt for request in engine.submitted)
    names = [request.tenant for request in engine.submitted]
    assert names == ["key-d0c04f4b1951", "key-d0c04f4b1951", "key-83006a438f94", ""]  # of the keys' SHA-256
    assert first == again
    assert len({first, other, none}) == 3
    assert none == b""
    assert b"sesame" not in first


def test_a_key_may_have_any_letters() -> None:
    # as a server hands over the bytes of a header
    keys = ApiKeys(Tenants(["schlüssel"], secret=b"server"))
    assert keys.tenant_of({"x-api-key": "schlüssel".encode().decode("latin-1")}).name.startswith("key-")


def test_nothing_but_its_own_cache_salt_changes_a_requests_salt(guarded: Client, engine: FakeEngine) -> None:
    guarded.post("/v1/chat/completions", CHAT, headers=bearer("sesame"))
    asked = {**CHAT, "user": "mallory", "metadata": {"tenant": "mellon"}}
    headers = {**bearer("sesame"), "x-tenant": "mellon", "x-session-id": "mellon", "openai-organization": "mellon"}
    guarded.post("/v1/chat/completions", asked, headers=headers)
    guarded.post("/v1/messages", {**MESSAGE, "metadata": {"user_id": "mellon"}}, headers=headers)
    assert len(engine.submitted) == 3
    assert len({(request.salt, request.tenant) for request in engine.submitted}) == 1
