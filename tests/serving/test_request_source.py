"""Host and Origin headers: which are malformed, which pages may use a server that asks for no key."""

import socket
from contextlib import closing
from pathlib import Path

import pytest
from starlette.datastructures import Headers
from starlette.requests import HTTPConnection

from emberkv.serving.app import ServingSettings, create_app
from emberkv.serving.auth import host_name, is_from_this_machine, is_own_user, user_of
from emberkv.serving.lifecycle import Lifecycle
from tests.serving.fakes import FakeEngine
from tests.serving.harness import MODEL, Client, anthropic_error, openai_error

BODY = b'{"model":"tiny","prompt":"a","max_tokens":2}'

MALFORMED = ["", "evil.example:", "evil.example:99999", "user@evil.example", "evil.example/", "[::1", "\u00e9.example",
             "a b", "a,b", "[localhost]", "http://a", "x" * 254, "a:" + "0" * 5000 + "1"]  # fmt: skip


@pytest.mark.parametrize(
    ("host", "name"),
    [
        ("localhost", "localhost"),
        ("LocalHost:8080", "localhost"),
        ("[::1]:80", "::1"),
        ("127.0.0.1:65535", "127.0.0.1"),
        ("my_service:80", "my_service"),
        *((malformed, None) for malformed in MALFORMED),
    ],
)
def test_the_host_header(host: str, name: str | None) -> None:
    assert host_name(Headers(raw=[(b"host", host.encode("latin-1"))])) == name


def test_two_host_headers_are_none() -> None:
    assert host_name(Headers(raw=[(b"host", b"localhost"), (b"host", b"localhost")])) is None


@pytest.mark.parametrize("host", MALFORMED)
@pytest.mark.parametrize("path", ["/health", "/v1/models", "/v1/cache/prefixes", "/nowhere"])
def test_a_malformed_host_is_refused_everywhere(client: Client, path: str, host: str) -> None:
    response = client.get(path, headers={"host": host.encode("latin-1")})
    assert response.status_code == 400
    assert openai_error(response)["message"].startswith("the Host header is missing, doubled or malformed")


def ask(lifecycle: Lifecycle, origin: str, host: str, settings: ServingSettings | None = None) -> int:
    client = Client(create_app(lifecycle, settings))
    headers = {"origin": origin, "host": host, "content-type": "text/plain"}
    return client.post("/v1/completions", content=BODY, headers=headers).status_code


@pytest.mark.parametrize(
    ("origin", "host"),
    [
        ("https://evil.example", "localhost:8080"),
        ("http://evil.example:8080", "evil.example:8080"),  # a name that was made to point here
        ("null", "localhost:8080"),
        ("chrome-extension://abc", "localhost:8080"),
        ("http://[::1", "localhost:8080"),
        ("http://192.168.1.9", "192.168.1.5:8080"),
        ("http://localhost.evil.example", "localhost:8080"),
    ],
)
def test_a_foreign_page_cannot_make_a_keyless_server_compute(
    lifecycle: Lifecycle, engine: FakeEngine, origin: str, host: str
) -> None:
    assert ask(lifecycle, origin, host) == 403
    assert engine.submitted == []
    assert ask(lifecycle, origin, host, ServingSettings(allowed_origins=(origin,))) == 200
    assert ask(lifecycle, origin, host, ServingSettings(allowed_origins=("*",))) == 200
    assert ask(lifecycle, origin, host, ServingSettings(api_keys=("k",))) == 401, "a key is what keeps pages out there"


@pytest.mark.parametrize(
    ("origin", "host"),
    [
        ("http://localhost:3000", "localhost:8080"),
        ("http://127.0.0.1:3000", "localhost:8080"),
        ("http://192.168.1.5:3000", "192.168.1.5:8080"),
        ("https://gpu-box", "gpu-box:8080"),
        ("https://gpu.local", "gpu.local"),
    ],
)
def test_a_page_of_the_same_machine_may(lifecycle: Lifecycle, origin: str, host: str) -> None:
    assert ask(lifecycle, origin, host) == 200


def test_the_refusal_has_each_apis_shape(client: Client) -> None:
    headers = {"origin": "https://evil.example", "host": "localhost"}
    refusal = client.post("/v1/messages", {"model": MODEL}, headers=headers)
    assert (refusal.status_code, anthropic_error(refusal)["type"]) == (403, "permission_error")
    assert openai_error(client.post("/v1/completions", {}, headers=headers))["code"] == "forbidden"


def test_a_proxys_default_request_is_not_from_this_machine() -> None:
    """What nginx sends for ``proxy_pass http://127.0.0.1:8080`` alone: HTTP/1.0, its own Host, no header of its own."""
    scope = {"type": "http", "headers": [(b"host", b"127.0.0.1:8080"), (b"connection", b"close")]}
    assert not is_from_this_machine(HTTPConnection({**scope, "http_version": "1.0"}))
    assert is_from_this_machine(HTTPConnection({**scope, "http_version": "1.1"}))


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "::"])
def test_the_user_behind_a_connection_over_loopback(host: str) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with closing(socket.create_server((host, 0), family=family, dualstack_ipv6=host == "::")) as listener:
        port = listener.getsockname()[1]
        with closing(socket.create_connection(("127.0.0.1" if host == "::" else host, port))) as client:
            accepted, peer = listener.accept()
            with closing(accepted):
                server = accepted.getsockname()
                user = Path("/proc/self").stat().st_uid
                assert user_of(peer[:2], server[:2]) == user_of(client.getsockname()[:2], server[:2]) == user
                assert user_of((peer[0], peer[1] ^ 1), server[:2]) is None


def test_a_connection_of_another_user(tmp_path: Path) -> None:
    """A table as Linux writes it, in which 127.0.0.1:40000 belongs to user 12345."""
    row = (
        "   0: 0100007F:9C40 0100007F:1F90 01 00000000:00000000 00:00000000 00000000 12345        0 1 1 0 20 4 30 10 -1"
    )
    (tmp_path / "tcp").write_text(f"  sl  local_address rem_address ...\n{row}\n")
    scope = {"type": "http", "client": ("127.0.0.1", 40000), "server": ("127.0.0.1", 8080)}
    assert user_of(("127.0.0.1", 40000), ("127.0.0.1", 8080), tmp_path) == 12345
    assert not is_own_user(HTTPConnection(scope), tmp_path)
    (tmp_path / "tcp").write_text(f"header\n{row.replace('12345', '0')}\n")
    assert is_own_user(HTTPConnection(scope), tmp_path), "root may do all"
    assert not is_own_user(HTTPConnection({**scope, "client": ("127.0.0.1", 40001)}), tmp_path)
    assert is_own_user(HTTPConnection(scope), tmp_path / "no-such-system")
