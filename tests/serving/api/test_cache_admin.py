"""The operator's routes below /v1/cache: who may use them, and what they do to a real pool."""

import json
from collections import Counter
from typing import Any

import pytest

from emberkv.core.loading import LoadChoice
from emberkv.core.stats import SchedulerStats
from emberkv.errors import ConfigError
from emberkv.serving.app import ServingSettings, create_app
from emberkv.serving.cache.service import plain
from emberkv.serving.lifecycle import Lifecycle
from emberkv.serving.tenancy import DEFAULT_TENANT, Tenants
from emberkv.tiers.stats import BOUNDS, TierStats
from tests.serving.api.test_cache_explain import (
    ADMIN,
    ANN,
    HERE,
    LONG,
    Server,
    ThinkingTokenizer,
    tenant_ann,
    text,
    thinking_request,
    two_tenants,
)
from tests.serving.core_engine import CoreEngine
from tests.serving.fakes import ByteTokenizer
from tests.serving.harness import MODEL, Client

GETS = ("", "/sessions", "/prefixes")
POSTS = ("/warm", "/pin", "/unpin", "/remove", "/clear")


@pytest.fixture
def server() -> Server:
    return Server(bound_to_loopback=True)


def ask(server: Server, path: str, headers: dict[str, str] | None = None, **question: Any) -> Any:
    response = server.client.post(f"/v1/cache{path}", question, headers={**HERE, **(headers or {})})
    assert response.status_code == 200, response.text
    return response.json()


def look(server: Server, path: str = "") -> Any:
    response = server.client.get(f"/v1/cache{path}", headers=HERE)
    assert response.status_code == 200, response.text
    return response.json()


def statuses(server: Server, headers: dict[str, str]) -> set[int]:
    asked = {**text("a prompt of some length"), **({"tenant": "x"} if "authorization" in headers else {})}
    answers = [server.client.get(f"/v1/cache{path}", headers=headers) for path in GETS]
    answers += [server.client.post(f"/v1/cache{path}", asked, headers=headers) for path in POSTS]
    return {answer.status_code for answer in answers}


def test_without_a_key_only_this_machine_is_let_in() -> None:
    assert statuses(Server(bound_to_loopback=True), HERE) == {200}
    assert statuses(Server(bound_to_loopback=True), {"host": "[::1]:8080"}) == {200}
    assert statuses(Server(bound_to_loopback=False), HERE) == {403}
    another_users = Server(bound_to_loopback=True, is_own_user=lambda _connection: False)
    assert statuses(another_users, HERE) == {403}


FROM_ELSEWHERE = [
    {"host": "rebound.example"},
    {"host": "192.168.1.2"},
    {"host": "localhost.example"},
    {"host": "0.0.0.0:8080"},
    {**HERE, "origin": "https://a-page.example"},
    {**HERE, "origin": "null"},
    {**HERE, "origin": "http://[::1"},
    {**HERE, "x-forwarded-for": "10.0.0.1"},
    {**HERE, "forwarded": "for=10.0.0.1"},
    {**HERE, "via": "1.1 proxy"},
    {**HERE, "cf-connecting-ip": "10.0.0.1"},
    {**HERE, "true-client-ip": "10.0.0.1"},
    {**HERE, "x-client-ip": "10.0.0.1"},
    {**HERE, "x-forwarded-proto": "https"},
    {**HERE, "x-request-id": "1"},
]


@pytest.mark.parametrize("key", [{}, {"x-api-key": "x"}, {"authorization": "Bearer x"}])
@pytest.mark.parametrize("headers", FROM_ELSEWHERE)
def test_a_page_or_a_proxy_on_this_machine_is_not_the_operator(headers: dict[str, str], key: dict[str, str]) -> None:
    server = Server(bound_to_loopback=True)
    server.complete("My password is hunter2, tell nobody.")
    answers = [server.client.get("/v1/cache/prefixes", headers={**headers, **key})]
    answers += [
        server.client.post(f"/v1/cache/{route}", text("My password is"), headers={**headers, **key})
        for route in ("explain", "clear")
    ]
    assert [answer.status_code for answer in answers] == [403, 403, 403]
    assert not any("hunter" in answer.text for answer in answers)
    assert server.core.pool.num_cached > 0


def test_where_api_keys_are_set_an_admin_key_is_needed_even_here() -> None:
    server = Server(bound_to_loopback=True, tenants=Tenants(("ann-key",), secret=b"secret" * 6))
    server.complete("Ann's secret: the river is for sale.", ANN)
    for headers in (HERE, {**HERE, **ANN}):
        assert statuses(server, headers) == {403}
    refusal = server.client.get("/v1/cache/prefixes", headers=HERE).json()["error"]
    assert refusal["message"] == "this needs an admin key, and the server has none; start it with --admin-key-file"
    assert server.client.post("/v1/cache/explain", text("Ann's secret"), headers=HERE).status_code == 401
    assert server.client.post("/v1/cache/explain", text("Ann's secret"), headers=ANN).status_code == 200


def test_a_keyless_server_on_the_network_explains_nothing() -> None:
    server = Server(bound_to_loopback=False)
    server.complete("My password is hunter2, tell nobody.")
    for headers in (HERE, {**HERE, "x-api-key": "x"}, {"host": "gpu-box:8080"}):
        response = server.client.post("/v1/cache/explain", text("My password is"), headers=headers)
        assert (response.status_code, "hunter" in response.text) == (403, False)


def test_with_a_key_it_is_asked_for_even_here() -> None:
    server = Server(bound_to_loopback=True, admin_key="admin-key")
    assert statuses(server, HERE) == {401}
    assert statuses(server, {**HERE, "authorization": "Bearer other"}) == {401}
    assert 401 not in statuses(server, ADMIN)
    assert server.client.get("/v1/cache", headers={"x-api-key": "admin-key"}).status_code == 200


def test_a_tenants_key_opens_nothing_but_explain() -> None:
    server = two_tenants()
    assert statuses(server, ANN) == {401}
    assert server.client.post("/v1/cache/explain", text("a"), headers=ANN).status_code == 200
    assert server.client.post("/v1/cache/explain", text("a"), headers={}).status_code == 401


@pytest.mark.parametrize(("key", "message"), [("", "key is empty"), ("ann-key", "is also an API key")])
@pytest.mark.parametrize("setting", ["admin_key", "metrics_key"])
def test_an_admin_key_that_is_none(setting: str, key: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^--{setting.replace('_', '-')} ?.*{message.removeprefix('key ')}"):
        create_app(Lifecycle(), ServingSettings(api_keys=("ann-key",), **{setting: key}))


def test_a_model_whose_cache_nobody_may_see(lifecycle: Lifecycle) -> None:
    client = Client(create_app(lifecycle, ServingSettings(bound_to_loopback=True)))
    assert client.get("/v1/cache", headers=HERE).status_code == 404


def test_statistics(server: Server) -> None:
    server.complete(LONG)
    server.complete(LONG)
    answer = look(server)
    counters = answer["counters"]
    assert (counters["query_tokens"], counters["hit_tokens"]) == (92, 40)
    pool = answer["tiers"]["pool"]
    assert pool["blocks"] == {"total": 200, "in_use": 0, "cached": 11, "empty": 189}
    assert answer["sessions"] == 0


def test_counters_become_plain_figures() -> None:
    stats = SchedulerStats(load_choices=Counter({LoadChoice.LOAD: 2}), tier_hit_tokens=Counter(disk=16))
    figures = json.loads(json.dumps(plain(stats)))
    assert (figures["load_choices"], figures["tier_hit_tokens"]) == ({"load": 2}, {"disk": 16})
    tier = json.loads(json.dumps(plain(TierStats(skipped=Counter(queue=1)))))
    assert tier["skipped"] == {"queue": 1}
    latency = tier["load_latency"]
    assert (latency["counts"], latency["seconds"]) == ([0] * 16, 0.0)
    assert latency["upper_bounds"] == [*BOUNDS, None]


def test_sessions_are_grouped(server: Server) -> None:
    for session in ("one", "one", "two"):
        server.complete(LONG, {"x-session-id": session})
    server.complete(LONG)
    assert look(server)["sessions"] == 2
    two, one = look(server, "/sessions")["data"]
    assert two == {
        "tenant": "",
        "session": "two",
        "requests": 1,
        "prompt_tokens": 46,
        "hit_tokens": 40,
        "last_seen": 1000.0,
    }
    assert (one["session"], one["requests"], one["prompt_tokens"], one["hit_tokens"]) == ("one", 2, 92, 40)
    assert {request.session_id for request in server.core.submitted} == {"", "one", "two"}


def test_a_conversation_without_a_name_is_a_session_from_its_first_answer_or_tools_on(server: Server) -> None:
    question, other = {"role": "user", "content": "Where?"}, {"role": "user", "content": "Who?"}
    answer = {"role": "assistant", "content": "There."}
    tools = [{"type": "function", "function": {"name": "look"}}]
    for messages in ([question], [question, answer, other], [other, answer, other], [other]):
        body = {"model": MODEL, "messages": messages, "tools": tools if messages == [question] else None}
        assert server.client.post("/v1/chat/completions", body).status_code == 200
    second, first = look(server, "/sessions")["data"]
    assert (first["requests"], second["requests"]) == (2, 1)
    assert first["session"].startswith("inferred-")
    assert first["session"] != second["session"]
    assert {request.session_id for request in server.core.submitted} == {""}


def test_a_session_id_that_is_too_long(server: Server) -> None:
    body = {"model": MODEL, "prompt": "a"}
    response = server.client.post("/v1/completions", body, headers={"x-session-id": "x" * 129})
    assert response.status_code == 400
    assert response.json()["error"]["message"] == "x-session-id has 129 characters; at most 128 are accepted"


def test_the_largest_and_the_hottest_prefixes(server: Server) -> None:
    server.complete(LONG)
    server.complete(LONG)
    server.complete("x" * 100)
    largest = look(server, "/prefixes?by=largest")["data"]
    assert [each["tokens"] for each in largest] == [100, 44]
    assert largest[1]["begins"] == "<begin>The quick brown fox jum"
    (hottest,) = look(server, "/prefixes?limit=1")["data"]
    assert (hottest["tokens"], hottest["hits"], hottest["tiers"]) == (40, 1, ["pool"])
    for query in ("by=coldest", "limit=0", "limit=201", "limit=many"):
        assert server.client.get(f"/v1/cache/prefixes?{query}", headers=HERE).status_code == 400


def test_a_warmed_prompt_hits(server: Server) -> None:
    body = {"messages": [{"role": "user", "content": LONG}]}
    answer = ask(server, "/warm", anthropic=body)
    assert answer == {"object": "cache.warmed", "prompt_tokens": 62, "cached_tokens": 0, "computed_tokens": 62}
    assert server.explain(openai=body)["hit_tokens"] == 56
    assert ask(server, "/warm", anthropic=body)["cached_tokens"] == 56


def test_a_pinned_prefix_is_evicted_last() -> None:
    server = Server(CoreEngine(blocks=30), bound_to_loopback=True)
    server.complete(LONG)
    assert ask(server, "/pin", **text(LONG))["retained_blocks"] == 11
    for number in range(4):
        server.complete(str(number) * 60)
    assert server.explain(**text(LONG))["hit_tokens"] == 40
    prefix = ask(server, "/unpin", **text(LONG))["prefix"]
    assert (
        prefix
        == server.core.chain(ByteTokenizer().encode(LONG, add_special_tokens=True), DEFAULT_TENANT)
        .block_hashes[-1]
        .hex()
    )
    for number in range(4, 8):
        server.complete(str(number) * 60)
    assert server.explain(**text(LONG))["hit_tokens"] == 0


def test_a_pin_for_a_while_ends(server: Server) -> None:
    server.complete(LONG)
    (largest,) = look(server, "/prefixes?by=largest")["data"]
    assert ask(server, "/pin", block_hash=largest["block_hash"], seconds=60)["blocks"] == 11
    assert ask(server, "/pin", block_hash=largest["block_hash"], seconds=60)["blocks"] == 11
    server.core.policy.expire(1059.0)
    assert server.core.policy.retained_bytes == 11
    server.core.policy.expire(1060.0)
    assert server.core.policy.retained_bytes == 0


def test_a_removed_prefix_takes_along_what_goes_on_from_it_but_not_what_others_share(server: Server) -> None:
    server.complete(LONG)
    server.complete(LONG + "More of it.")
    server.complete(LONG[:24] + "something else entirely")
    assert ask(server, "/remove", **text(LONG))["blocks"] == {"pool": 8}
    answer = server.explain(**text(LONG))
    assert answer["hit_tokens"] == 24
    assert answer["misses"][0]["reason"] == answer["misses"][0]["lost"]["how"] == "removed"
    assert server.explain(**text(LONG[:24] + "something else entirely"))["hit_tokens"] == 40


def test_a_prompt_that_fills_no_block_is_removed_with_what_goes_on_from_it(server: Server) -> None:
    server.complete("ab" + LONG)
    server.complete("ac" + LONG)
    assert server.explain(**text("ab" + LONG + "?"))["hit_tokens"] == 48
    assert ask(server, "/remove", **text("ab"))["blocks"] == {"pool": 12}
    assert server.explain(**text("ab" + LONG + "?"))["hit_tokens"] == 0
    assert server.explain(**text("ac" + LONG + "?"))["hit_tokens"] == 48


def test_a_checkpoint_is_removed_with_the_prompt_that_ends_there_or_before() -> None:
    """Also beside a block that is not cached."""
    server = Server(CoreEngine(checkpoints=True), bound_to_loopback=True)
    server.complete("a")
    assert server.explain(**text("ao?"))["hit_tokens"] == 3
    assert ask(server, "/remove", **text("a"))["blocks"] == {"pool": 0}
    assert server.explain(**text("ao?"))["hit_tokens"] == 0
    server.complete("abcde")
    server.complete("abcvwxyz")
    assert server.explain(**text("abcdeo?"))["hit_tokens"] == 7
    assert ask(server, "/remove", **text("abcdeXYZ"))["blocks"] == {"pool": 0}
    assert server.explain(**text("abcdeo?"))["hit_tokens"] == 4


def test_no_prompt_is_too_short_for_a_checkpoint() -> None:
    """Two tokens: in whole blocks nothing of them could be found."""
    for checkpoints, reason in ((False, "too-short"), (True, "partial")):
        server = Server(CoreEngine(checkpoints=checkpoints), bound_to_loopback=True)
        (miss,) = server.explain(**text("a"))["misses"]
        assert (miss["reason"], miss["tokens"]) == (reason, 2)


def test_a_cleared_cache_has_nothing(server: Server) -> None:
    server.complete(LONG)
    answer = {"object": "cache.cleared", "blocks": {"pool": 11}, "learned_prompts": 0, "kept": {}}
    assert ask(server, "/clear") == answer
    (lost, _) = server.explain(**text(LONG))["misses"]
    assert lost["reason"] == lost["lost"]["how"] == "cleared"
    assert look(server, "/prefixes?by=largest")["data"] == []


def test_prefixes_that_are_not_known(server: Server) -> None:
    for prefix, status in (("00ff", 404), ("no hex", 400)):
        answer = server.client.post("/v1/cache/pin", {"prefix": prefix}, headers=HERE)
        assert answer.status_code == status
    short = server.client.post("/v1/cache/pin", text("a"), headers=HERE)
    assert short.json()["error"]["message"] == "the prompt has 2 tokens; it must fill a block of 4"


def test_what_a_request_marks_is_retained(server: Server) -> None:
    blocks = [{"type": "text", "text": LONG, "cache_control": {"type": "ephemeral", "ttl": "1h"}}]
    body = {"model": MODEL, "max_tokens": 2, "system": blocks, "messages": [{"role": "user", "content": "Hi"}]}
    assert server.client.post("/v1/messages", body).status_code == 200
    (request,) = server.core.submitted
    assert (request.retain_tokens, request.retain_seconds) == (len("<system>" + LONG + "<user>"), 3600.0)


@pytest.mark.parametrize("limit", ["9" * 5000, "0", "0" * 5000, "-1", "\u0663", "1e2", "", "201"])
def test_a_limit_that_is_none(server: Server, limit: str) -> None:
    response = server.client.get("/v1/cache/prefixes", params={"limit": limit}, headers=HERE)
    assert response.status_code == 400
    assert response.json()["error"]["message"].startswith("limit is ")
    assert server.client.get("/v1/cache/prefixes", params={"limit": "0020"}, headers=HERE).status_code == 200


def test_removing_a_tenants_response_with_signed_reasoning_leaves_nothing_of_it() -> None:
    server = two_tenants(tokenizer=ThinkingTokenizer())
    asked = thinking_request()
    server.client.post("/v1/responses", {"model": MODEL, "max_output_tokens": 2, **asked}, headers=ANN)
    assert server.core.pool.num_cached > 0
    ask(server, "/remove", ADMIN, tenant=tenant_ann().name, openai=asked)
    assert server.core.pool.num_cached == 0
