"""What holds for every route: request ids, HEAD and OPTIONS, trailing slashes, encodings of bodies, CORS, sub-paths."""

import gzip
import json
import zlib
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from emberkv import __version__
from emberkv.serving.app import ServingSettings, create_app
from emberkv.serving.lifecycle import Lifecycle
from tests.serving.harness import MODEL, Client, anthropic_error, openai_error, serving
from tests.waiting import DEADLINE

COMPLETION = {"model": MODEL, "prompt": "Hi", "max_tokens": 3}
PAGE = "https://chat.example"


def compressed(body: object) -> bytes:
    return gzip.compress(json.dumps(body).encode())


def send(client: Client, content: bytes, encoding: str = "gzip") -> httpx.Response:
    headers = {"content-encoding": encoding, "content-type": "application/json"}
    return client.request("POST", "/v1/completions", content=content, headers=headers)


def samples(client: Client, name: str) -> dict[tuple[str, ...], float]:
    """A metric's values by its labels' values, in the order of the labels' names."""
    families = text_string_to_metric_families(client.get("/metrics").text)
    found = [sample for family in families for sample in family.samples if sample.name == name]
    return {tuple(value for _, value in sorted(sample.labels.items())): sample.value for sample in found}


def test_a_clients_request_id_comes_back(client: Client) -> None:
    response = client.post("/v1/completions", COMPLETION, headers={"x-request-id": "trace:7/a.b"})
    assert response.headers["x-request-id"] == response.headers["request-id"] == "trace:7/a.b"


@pytest.mark.parametrize("given", ["", "two words", "x" * 129, "a\tb", "caf\u00e9".encode("latin-1")])
def test_an_invalid_request_id_is_replaced(client: Client, given: str | bytes) -> None:
    headers = {"x-request-id": given}
    made = {client.request("GET", "/health", headers=headers).headers["x-request-id"] for _ in range(2)}
    assert len(made) == 2
    assert all(each.startswith("req_") for each in made)


def test_errors_of_both_apis_bear_the_request_id(client: Client) -> None:
    for path in ("/v1/completions", "/v1/messages"):
        refused = client.post(path, {}, headers={"x-request-id": "mine"})
        assert (refused.status_code, refused.json()["request_id"]) == (400, "mine")


@pytest.mark.parametrize(
    "path", ["/", "/health", "/ready", "/metrics", "/v1/models", f"/v1/models/{MODEL}", "/version"]
)
def test_every_get_route_answers_head_and_options(client: Client, path: str) -> None:
    got, head, options = (client.request(method, path) for method in ("GET", "HEAD", "OPTIONS"))
    assert (got.status_code, head.status_code, options.status_code) == (200, 200, 204)
    assert (head.content, head.headers["content-type"]) == (b"", got.headers["content-type"])
    assert options.headers["allow"] == "GET, HEAD, OPTIONS"


def test_methods_of_a_post_route(client: Client) -> None:
    assert client.request("OPTIONS", "/v1/messages").headers["allow"] == "POST, OPTIONS"
    refused = client.request("HEAD", "/v1/messages")
    assert (refused.status_code, refused.content) == (405, b"")
    wrong = client.request("DELETE", "/v1/messages")
    assert anthropic_error(wrong)["message"] == "DELETE cannot be used on /v1/messages; use POST"


@pytest.mark.parametrize("method", ["HEAD", "OPTIONS"])
def test_unknown_paths_stay_unknown(client: Client, method: str) -> None:
    assert client.request(method, "/nothing").status_code == 404


@pytest.mark.parametrize("path", ["/v1/models/", "/health/", "/v1/models//"])
def test_a_trailing_slash_changes_nothing(client: Client, path: str) -> None:
    assert client.get(path).json() == client.get(path.rstrip("/")).json()


def test_a_trailing_slash_of_a_post_route(client: Client) -> None:
    assert client.post("/v1/completions/", COMPLETION).json()["choices"][0]["text"] == "Hel"


def test_what_the_root_says(client: Client) -> None:
    body = client.get("/").json()
    assert (body["name"], body["status"]) == ("emberkv", "ready")
    assert client.get("/version").json() == {"version": __version__}


def test_gzip_bodies(client: Client) -> None:
    assert send(client, compressed(COMPLETION)).json()["choices"][0]["text"] == "Hel"
    half = len(json.dumps(COMPLETION)) // 2
    text = json.dumps(COMPLETION).encode()
    two_members = gzip.compress(text[:half]) + gzip.compress(text[half:])
    assert send(client, two_members, "x-gzip").status_code == 200


def test_a_gzip_body_cannot_expand_without_bound(lifecycle: Lifecycle) -> None:
    client = Client(create_app(lifecycle, ServingSettings(max_body_bytes=100_000)))
    bomb = gzip.compress(b"[" * 50_000_000, 1)
    refused = send(client, bomb[:90_000])
    assert refused.status_code == 413
    assert "more than 100000 bytes once it is expanded" in openai_error(refused)["message"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not gzip at all", "it is no gzip"),
        (compressed(COMPLETION)[:-3], "cut short"),
        (zlib.compress(b"{}"), "it is no gzip"),
        (b"", "cut short"),
    ],
    ids=["no gzip", "without its end", "zlib", "nothing"],
)
def test_a_broken_gzip_body(client: Client, content: bytes, message: str) -> None:
    refused = send(client, content)
    assert refused.status_code == 400
    assert message in openai_error(refused)["message"]


def test_other_encodings_are_refused(client: Client) -> None:
    refused = send(client, b"...", "br")
    assert (refused.status_code, refused.headers["accept-encoding"]) == (415, "gzip")
    assert openai_error(refused)["message"] == "content-encoding is 'br'; use gzip, or none"
    assert send(client, json.dumps(COMPLETION).encode(), "identity").status_code == 200


def test_a_body_with_a_byte_order_mark(client: Client) -> None:
    body = b"\xef\xbb\xbf" + json.dumps(COMPLETION).encode()
    assert client.request("POST", "/v1/completions", content=body).status_code == 200


def preflight(client: Client, origin: str, path: str) -> httpx.Response:
    headers = {
        "origin": origin,
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type,x-api-key,anthropic-version",
    }
    return client.request("OPTIONS", path, headers=headers)


def test_cors_is_off_by_default(client: Client) -> None:
    answered = [preflight(client, PAGE, "/v1/messages"), client.get("/v1/models", headers={"origin": PAGE})]
    assert not [name for each in answered for name in each.headers if name.startswith("access-control")]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages"])
def test_cors_for_a_named_origin(lifecycle: Lifecycle, path: str) -> None:
    client = Client(create_app(lifecycle, ServingSettings(allowed_origins=(PAGE,), api_keys=("sesame",))))
    allowed = preflight(client, PAGE, path)
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == PAGE
    assert "POST" in allowed.headers["access-control-allow-methods"]
    for header in ("authorization", "content-type", "x-api-key", "anthropic-version"):
        assert header in allowed.headers["access-control-allow-headers"]
    refused = client.post(path, {}, headers={"origin": PAGE})
    assert refused.status_code == 401
    assert refused.headers["access-control-allow-origin"] == PAGE
    exposed = refused.headers["access-control-expose-headers"].split(", ")
    assert {f"x-emberkv-{name}" for name in ("cache", "max-tokens", "left-out", "history", "route")} <= set(exposed)
    assert preflight(client, "https://other.example", path).status_code == 400


def test_behind_a_proxy_under_a_path(lifecycle: Lifecycle) -> None:
    """Whether or not the proxy takes the path off."""
    client = Client(create_app(lifecycle, ServingSettings(root_path="/llm")))
    for path in ("/health", "/llm/health", "/llm/health/", "/llm", "/llm/"):
        assert client.get(path).status_code == 200, path
    assert client.post("/llm/v1/messages", {}).json()["type"] == "error"
    assert client.get("/llmx/health").status_code == 404
    assert client.get("/llm/openapi.json").json()["servers"] == [{"url": "/llm"}]


def test_requests_are_counted_by_route(client: Client) -> None:
    client.post("/v1/completions", COMPLETION)
    client.post("/v1/completions/", {})
    client.get(f"/v1/models/{MODEL}")
    client.get("/v1/models/other")
    client.request("HEAD", "/health")
    client.request("BREW", "/tea/1")
    client.get("/tea/2")
    assert samples(client, "emberkv_http_requests_total") == {
        ("POST", "/v1/completions", "200"): 1,
        ("POST", "/v1/completions", "400"): 1,
        ("GET", "/v1/models/{name:path}", "200"): 1,
        ("GET", "/v1/models/{name:path}", "404"): 1,
        ("HEAD", "/health", "200"): 1,
        ("other", "unmatched", "404"): 1,
        ("GET", "unmatched", "404"): 1,
    }
    assert samples(client, "emberkv_http_request_seconds_count")["POST", "/v1/completions"] == 2
    assert samples(client, "emberkv_prompt_tokens_sum") == {("completions",): 3}


def test_an_unforeseen_exception_is_counted_and_has_its_id(lifecycle: Lifecycle) -> None:
    # the fake template looks for an argument that this call does not have
    body: dict[str, Any] = {
        "model": MODEL,
        "messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}],
    }
    with serving(lifecycle) as server:
        answer = httpx.post(
            f"{server.url}/v1/chat/completions", json=body, headers={"x-request-id": "mine"}, timeout=DEADLINE
        )
        metrics = httpx.get(f"{server.url}/metrics", timeout=DEADLINE).text
    assert (answer.status_code, answer.json()["request_id"], answer.headers["x-request-id"]) == (500, "mine", "mine")
    assert 'route="/v1/chat/completions",status="500"' in metrics


def test_process_and_build_metrics(client: Client) -> None:
    names = {family.name for family in text_string_to_metric_families(client.get("/metrics").text)}
    assert {"process_cpu_seconds", "process_resident_memory_bytes", "python_info", "python_gc_collections"} <= names
    assert samples(client, "emberkv_build_info") == {(MODEL, __version__): 1}
