"""The dashboard's page and its data, and who gets them."""

import re
from base64 import b64encode
from hashlib import sha256

import pytest

from tests.serving.api.test_cache_explain import ADMIN, HERE, LONG, Server, two_tenants


@pytest.fixture
def server() -> Server:
    return Server(bound_to_loopback=True)


def test_the_page_may_run_its_own_script_only(server: Server) -> None:
    response = server.client.get("/dashboard")
    policy, page = response.headers["content-security-policy"], response.text
    for tag in ("script", "style"):
        content = re.search(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        assert content is not None
        digest = b64encode(sha256(content[1].encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}';" in policy
    assert policy.startswith("default-src 'none';")
    assert not re.search("(src|href)=", page)  # nothing is fetched from elsewhere


def test_the_data_say_where_tokens_came_from(server: Server) -> None:
    for _ in range(2):
        server.complete(LONG, {"x-session-id": "s"})
    data = server.client.get("/v1/cache/dashboard", headers=HERE).json()
    first, second = data["sessions"][0]["turns"]
    assert list(first["tokens"]) == ["computed"]
    assert second["tokens"]["pool"] > second["tokens"]["computed"]
    assert data["tokens"] == {
        "pool": second["tokens"]["pool"],
        "computed": first["tokens"]["computed"] + second["tokens"]["computed"],
    }
    assert (data["kind"], data["status"], data["sources"]) == ("server", "ready", ["pool", "computed"])


def test_where_there_are_keys_the_data_need_the_operators() -> None:
    server = two_tenants()
    assert server.client.get("/dashboard").status_code == 200
    assert server.client.get("/v1/cache/dashboard").status_code in (401, 403)
    assert server.client.get("/v1/cache/dashboard", headers=ADMIN).status_code == 200
