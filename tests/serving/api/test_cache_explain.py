"""/v1/cache/explain: of prompts and past responses, for tenants and for the operator."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import httpx
import pytest

from emberkv.serving.api.responses_schema import signed_reasoning
from emberkv.serving.app import ServingSettings, create_app
from emberkv.serving.canonical import CanonicalRules
from emberkv.serving.lifecycle import Lifecycle, ServedModel
from emberkv.serving.tenancy import Tenant, Tenants
from tests.core.lower import FakeTiers
from tests.serving.core_engine import CoreEngine
from tests.serving.fakes import ByteTokenizer
from tests.serving.harness import MODEL, Client

HERE = {"host": "127.0.0.1:8080"}
ANN = {"authorization": "Bearer ann-key"}
BOB = {"authorization": "Bearer bob-key"}
ADMIN = {"authorization": "Bearer admin-key"}
LONG = "The quick brown fox jumps over the lazy dog. "
PATH = "/v1/cache/explain"


class Server:
    """One model, its engine, and what a client may send."""

    def __init__(self, core: CoreEngine | None = None, tokenizer: ByteTokenizer | None = None, **settings: Any) -> None:
        self.core = core or CoreEngine()
        lifecycle = Lifecycle()
        tokenizer = tokenizer or ByteTokenizer()
        lifecycle.loaded(ServedModel((MODEL,), 0, self.core, tokenizer, cache=self.core.service))
        app = create_app(lifecycle, ServingSettings(**settings), wall_clock=lambda: self.core.now)
        self.client = Client(app)

    def complete(self, text: str, headers: dict[str, str] | None = None) -> httpx.Response:
        body = {"model": MODEL, "prompt": text, "max_tokens": 2}
        response = self.client.post("/v1/completions", body, headers=headers or {})
        assert response.status_code == 200, response.text
        return response

    def explain(self, headers: dict[str, str] | None = None, **question: Any) -> Any:
        response = self.client.post(PATH, question, headers={**HERE, **(headers or {})})
        assert response.status_code == 200, response.text
        return response.json()


def two_tenants(core: CoreEngine | None = None, tokenizer: ByteTokenizer | None = None) -> Server:
    tenants = Tenants(("ann-key", "bob-key"), secret=b"secret" * 6)
    return Server(core, tokenizer, tenants=tenants, admin_key="admin-key")


def tenant_ann() -> Tenant:
    """The tenant of `two_tenants` to whom ``ann-key`` belongs."""
    only = Tenants(("ann-key",), secret=b"secret" * 6)
    return only.named(only.names[0])


class ThinkingTokenizer(ByteTokenizer):
    """Its chat template shows what the assistant has thought."""

    def render_chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
        shown = [{**each, "content": each.get("reasoning_content", "") + each["content"]} for each in messages]
        return super().render_chat(shown, **options)


def thinking_request() -> dict[str, Any]:
    """A Responses request of ann's with a thought that the server has signed for her."""
    thought = signed_reasoning("The brown fox was the quick one. ", tenant_ann().salt)
    reasoning = {"type": "reasoning", "summary": [], "encrypted_content": thought}
    answer = {"role": "assistant", "content": "It is brown."}
    return {"input": [{"role": "user", "content": LONG}, reasoning, answer, {"role": "user", "content": "Sure?"}]}


@pytest.fixture
def server() -> Server:
    return Server(bound_to_loopback=True)


def reasons(answer: Any) -> list[tuple[str, int, int]]:
    return [(miss["reason"], miss["start"], miss["tokens"]) for miss in answer["misses"]]


def text(value: str) -> dict[str, Any]:
    return {"openai": {"prompt": value}}


def test_a_prompt_that_is_only_asked_about(server: Server) -> None:
    server.complete(LONG)
    answer = server.explain(**text(LONG.replace("fox", "fax")))
    assert answer["hit_tokens_by_tier"] == {"pool": 16}
    assert reasons(answer) == [("alignment", 16, 2), ("diverged", 18, 26), ("partial", 44, 2)]
    assert answer["divergence"] == {
        "token": 18,
        "still_cached": True,
        "before": "<begin>The quick brown f",
        "expected": "ox jumps over the lazy d",
        "found": "ax jumps over the lazy d",
    }
    assert len(server.core.submitted) == 1
    assert server.explain(**text(LONG.replace("fox", "fax"))) == answer, "asking changes nothing"


def test_asking_in_either_apis_form(server: Server) -> None:
    conversation = {"messages": [{"role": "user", "content": LONG}]}
    server.client.post("/v1/messages", {"model": MODEL, "max_tokens": 2, "system": "Be kind.", **conversation})
    with_system = server.explain(anthropic={"system": "Be kind.", **conversation})
    as_chat = server.explain(
        openai={"messages": [{"role": "system", "content": "Be kind."}, *conversation["messages"]]}
    )
    assert with_system == as_chat
    assert with_system["hit_tokens"] == 72
    assert server.explain(openai=conversation)["divergence"]["found"].startswith("user>The quick")


def test_a_responses_request_is_explained_as_the_chat_with_its_prompt(server: Server) -> None:
    asked = {"instructions": "Be kind.", "input": LONG}
    server.client.post("/v1/responses", {"model": MODEL, "max_output_tokens": 2, **asked})
    explained = server.explain(openai=asked)
    chat = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": LONG}]
    assert explained == server.explain(openai={"messages": chat})
    assert explained["hit_tokens"] == 72


def test_what_was_evicted_is_told_with_place_and_time() -> None:
    server = Server(CoreEngine(blocks=14), bound_to_loopback=True)
    server.complete(LONG)
    server.core.now += 30
    server.complete(LONG.upper())
    server.core.now += 12
    (first, _) = server.explain(**text(LONG))["misses"][-2:]
    assert first["reason"] == "evicted"
    assert first["lost"] == {"tier": "pool", "how": "evicted", "at": 1030.0, "seconds_ago": 12.0}


def test_a_past_response(server: Server) -> None:
    first = server.complete(LONG).json()["id"]
    second = server.complete(LONG).json()["id"]
    assert reasons(server.explain(response_id=first)) == [("new", 0, 44), ("partial", 44, 2)]
    answer = server.explain(response_id=second)
    assert (answer["hit_tokens"], reasons(answer)) == (40, [("alignment", 40, 4), ("partial", 44, 2)])


def test_an_unknown_response(server: Server) -> None:
    response = server.client.post(PATH, {"response_id": "cmpl-0"}, headers=HERE)
    assert response.status_code == 404
    assert response.json()["error"]["message"] == (
        "response_id 'cmpl-0' is unknown; only the last responses are remembered"
    )


def test_canonical_rules_are_visible() -> None:
    rules = CanonicalRules.model_validate({"lines": [{"name": "date", "match": "date: *", "action": "drop"}]})
    server = Server(bound_to_loopback=True, canonical=rules)
    body = {"messages": [{"role": "system", "content": "date: 1\nBe kind."}, {"role": "user", "content": LONG}]}
    answer = server.client.post("/v1/chat/completions", {"model": MODEL, "max_tokens": 2, **body})
    body["messages"][0]["content"] = "date: 2\nBe kind."
    asked = server.explain(openai=body)
    assert (asked["hit_tokens"], asked["canonical"]) == (72, {"date": 1})
    assert server.explain(response_id=answer.json()["id"])["canonical"] == {"date": 1}
    metrics = server.client.get("/metrics", headers=HERE).text
    assert 'emberkv_canonical_changes_total{rule="date"} 1.0' in metrics


def test_a_lower_tier_that_would_be_loaded_or_not() -> None:
    lower = FakeTiers(block_seconds={"disk": 1.0}, token_seconds=10.0)
    server = Server(CoreEngine(lower=lower), bound_to_loopback=True)
    tokens = ByteTokenizer().encode(LONG, add_special_tokens=True)
    lower.put(server.core.chain(tokens, Tenants(secret=b"").named("")).block_hashes[:6])
    assert server.explain(**text(LONG))["hit_tokens_by_tier"] == {"disk": 24}
    lower.token_seconds = 0.1
    answer = server.explain(**text(LONG))
    assert reasons(answer) == [("recompute", 0, 24), ("new", 24, 20), ("partial", 44, 2)]


def test_another_model_has_it() -> None:
    server = Server(bound_to_loopback=True)
    server.core.service.other_models = lambda tokens, tenant: {"older": len(tokens) - 10}
    answer = server.explain(**text(LONG))
    assert reasons(answer) == [("other-model", 0, 36), ("new", 36, 8), ("partial", 44, 2)]
    assert answer["elsewhere"] == [{"model": "older", "tokens": 36}]


def test_a_tenant_hears_of_its_own_and_of_public_blocks_only() -> None:
    public = ByteTokenizer().encode("The quick brown ", add_special_tokens=True)
    server = two_tenants(CoreEngine(public=public[:16]))
    server.complete(LONG, ANN)
    own, others = server.explain(ANN, **text(LONG)), server.explain(BOB, **text(LONG))
    assert own["hit_tokens"] == 40
    assert (others["hit_tokens"], reasons(others)) == (16, [("new", 16, 28), ("partial", 44, 2)])
    assert others["elsewhere"] == []
    nobody = server.explain(BOB, **text("The quick brown " + "x" * 29))
    assert {**others, "divergence": None} == {**nobody, "divergence": None}, "as if ann had never asked"
    assert others["divergence"] == nobody["divergence"] is None


def test_the_operator_hears_who_else_has_it() -> None:
    server = two_tenants()
    server.complete(LONG, ANN)
    (ann,) = {request.tenant for request in server.core.submitted}
    server.complete("x", BOB)
    bob = server.core.submitted[-1].tenant
    answer = server.explain(ADMIN, tenant=bob, **text(LONG))
    assert answer["elsewhere"] == [{"tenant": ann, "tokens": 44}]
    assert reasons(answer) == [("other-tenant", 0, 44), ("partial", 44, 2)]
    assert server.explain(ADMIN, tenant=ann, **text(LONG))["elsewhere"] == []
    assert server.explain(ADMIN, tenant=ann, **text("y" * 50))["elsewhere"] == []


@pytest.mark.parametrize("length", [2, 4, 21])
def test_the_operator_hears_who_has_the_beginning_of_a_prompts_first_block(length: int) -> None:
    """Whether or not the prompt fills that block, of four tokens."""
    server = two_tenants(CoreEngine(checkpoints=True))
    for prompt, headers in (("a", ANN), ("b", BOB)):
        body = {"model": MODEL, "prompt": prompt, "max_tokens": 1}
        assert server.client.post("/v1/completions", body, headers=headers).status_code == 200
    ann, bob = (request.tenant for request in server.core.submitted)
    assert server.explain(ADMIN, tenant=bob, **text("a".ljust(length, "!")))["elsewhere"] == [
        {"tenant": ann, "tokens": 2}
    ]
    assert server.explain(ADMIN, tenant=bob, **text("c".ljust(length, "!")))["elsewhere"] == []


def test_another_tenants_response_is_as_unknown_as_none() -> None:
    server = two_tenants()
    response_id = server.complete(LONG, ANN).json()["id"]
    assert server.explain(ANN, response_id=response_id)["prompt_tokens"] == 46
    assert server.explain(ADMIN, response_id=response_id)["prompt_tokens"] == 46
    refusals = [server.client.post(PATH, {"response_id": each}, headers=BOB) for each in (response_id, "cmpl-0")]
    assert [refusal.status_code for refusal in refusals] == [404, 404]
    mine, none = (refusal.json()["error"] for refusal in refusals)
    assert json.dumps(mine).replace(response_id, "cmpl-0") == json.dumps(none)


def test_the_operator_names_the_tenant() -> None:
    server = two_tenants()
    for question, message in (
        (text(LONG), "tenant is missing; this server has 'key-"),
        ({**text(LONG), "tenant": "eve"}, "tenant 'eve' is unknown"),
    ):
        response = server.client.post(PATH, question, headers=ADMIN)
        assert response.status_code == 400
        assert response.json()["error"]["message"].startswith(message)


@pytest.mark.parametrize(
    ("question", "message"),
    [
        ({}, "given: nothing; give exactly one of openai, anthropic, response_id"),
        ({"openai": {"prompt": "a"}, "response_id": "b"}, "given: openai, response_id; give exactly one of"),
        ({"prefix": "00"}, "given: prefix; give exactly one of openai, anthropic, response_id"),
        ({"openai": {"prompt": []}}, "the prompt is empty"),
        ({"openai": {"prompt": [2**40]}}, "prompt has a token id above 2147483647"),
        ({"openai": {"model": "gpt", "prompt": "a"}}, "model is 'gpt'; this server has 'tiny'"),
        ({"openai": []}, "openai is []: input should be an object"),
        ({"anthropic": {}}, "messages is missing; it is required"),
    ],
)
def test_questions_that_cannot_be_answered(server: Server, question: dict[str, Any], message: str) -> None:
    response = server.client.post(PATH, question, headers=HERE)
    assert response.status_code in (400, 404)
    assert response.json()["error"]["message"].startswith(message)


def test_only_json_is_read(server: Server) -> None:
    response = server.client.request("POST", PATH, content=b"{}", headers={**HERE, "content-type": "text/plain"})
    assert response.status_code == 415


@pytest.mark.parametrize("salt", [{}, {"cache_salt": "of one user"}])
def test_a_tenants_signed_reasoning_is_in_the_prompt_that_is_explained(salt: dict[str, str]) -> None:
    server = two_tenants(tokenizer=ThinkingTokenizer())
    asked = {**thinking_request(), **salt}
    server.client.post("/v1/responses", {"model": MODEL, "max_output_tokens": 2, **asked}, headers=ANN)
    (request,) = server.core.submitted
    tokens = len(request.prompt_token_ids)
    for headers, whose in ((ANN, {}), (ADMIN, {"tenant": tenant_ann().name})):
        answer = server.explain(headers, openai=asked, **whose)
        assert (answer["prompt_tokens"], answer["hit_tokens"]) == (tokens, (tokens - 1) // 4 * 4)
