"""Volatile lines: found in the misses of requests, apart from other differences, and what the suggested rule saves."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emberkv.core.explaining.explanation import Divergence, Explanation, Miss, MissReason
from emberkv.serving.cache.volatile_lines import MAX_LINES, MAX_LINES_OF_TENANT, VolatileLines
from emberkv.serving.canonical import CanonicalRules
from tests.serving.api.test_cache_explain import ADMIN, ANN, BOB, HERE, Server, two_tenants
from tests.serving.fakes import ByteTokenizer
from tests.serving.harness import MODEL

RULES = "\n".join(f"Rule {number}: be kind." for number in range(25))
TOKENIZER = ByteTokenizer()


def system(line: str) -> str:
    return f"You are an agent.\n{line}\n{RULES}"


def ask(server: Server, text: str, headers: dict[str, str] | None = None, **fields: Any) -> dict[str, Any]:
    body = {"model": MODEL, "max_tokens": 1, "system": text, "messages": [{"role": "user", "content": "Hi"}], **fields}
    response = server.client.post("/v1/messages", body, headers=headers or {})
    assert response.status_code == 200, response.text
    usage: dict[str, Any] = response.json()["usage"]
    return usage


def suggestions(server: Server, headers: dict[str, str] | None = None) -> list[dict[str, Any]]:
    response = server.client.get("/v1/cache/suggestions", headers={**HERE, **(headers or {})})
    assert response.status_code == 200, response.text
    data: list[dict[str, Any]] = response.json()["data"]
    return data


def test_a_line_that_changes_is_found_and_its_rule_makes_hits() -> None:
    server = Server(bound_to_loopback=True)
    for day in (1, 2, 3, 4):
        ask(server, system(f"Today's date: 2026-11-{day:02}"))
        server.core.now += 86_400
    (found,) = suggestions(server)
    assert found["rule"] == {"name": "today-s-date", "match": "Today's date: *", "action": "move"}
    assert found["requests"] == 3
    assert len(RULES) * 2 - 64 <= found["tokens"] <= len(RULES + "<user>Hi<assistant>") * 2
    assert found["tokens_a_day"] == found["tokens"] // 2
    assert server.client.get("/v1/cache/dashboard", headers=HERE).json()["suggestions"] == [found]
    rules = CanonicalRules.model_validate({"lines": [found["rule"]]})
    cured = Server(bound_to_loopback=True, canonical=rules)
    hits = [ask(cured, system(f"Today's date: 2026-11-{day:02}"))["cache_read_input_tokens"] for day in (1, 2)]
    assert hits[1] - hits[0] >= found["tokens"] / 2 - 64
    assert suggestions(cured) == []


def test_what_differs_but_is_no_line_of_the_system_prompt_is_not_suggested() -> None:
    server = Server(bound_to_loopback=True)
    for number in range(5):
        ask(server, "You are an agent.", messages=[{"role": "user", "content": f"Text: {number}\n{RULES}"}])
        ask(server, f"{number} is a number.\n{RULES}")
        ask(server, f"Rule {number + 30}: be kind.\n{RULES}")
    assert suggestions(server) == []


def test_a_tenant_sees_its_own_lines_only() -> None:
    server = two_tenants()
    for number in range(4):
        ask(server, system(f"Session: {number}"), ANN)
    ann = server.core.submitted[0].tenant
    assert [each["tenant"] for each in suggestions(server, ADMIN)] == [ann]
    assert [each["tenant"] for each in suggestions(server, ANN)] == [ann]
    assert suggestions(server, BOB) == []


def observe(lines: VolatileLines, line: str, tenant: str = "ann", now: float = 0.0) -> None:
    """A prompt whose first difference lies in a value behind the last ": " of a line."""
    text = system(line)
    prompt = list(text.encode())
    position = text.index(line) + line.rindex(": ") + 2
    misses = (Miss(MissReason.DIVERGED, position, len(prompt) - position),)
    explanation = Explanation(len(prompt), {}, misses, Divergence(position, (), (), (), cached=True))
    lines.observe(tenant, prompt, text, explanation, TOKENIZER, now)


@given(st.lists(st.sampled_from(["Date: Mon Nov 1", "Date: Mon Nov 2", "Date: Tue Nov 3"]), min_size=4, max_size=8))
def test_values_that_begin_alike_are_one_line(given_lines: list[str]) -> None:
    lines = VolatileLines()
    for line in given_lines:
        observe(lines, line)
    assert [(each.beginning, each.requests) for each in lines.suggestions()] == [("Date: ", len(given_lines))]


@pytest.mark.parametrize("tenants", [1, 1000])
def test_what_is_remembered_is_bounded(tenants: int) -> None:
    lines = VolatileLines()
    for number in range(2000):
        for _ in range(3):
            observe(lines, f"k{number}: 1", f"tenant {number % tenants}")
    most = MAX_LINES_OF_TENANT if tenants == 1 else MAX_LINES
    assert len(lines.suggestions()) == most


def test_a_pattern_means_the_text_that_it_is_made_of() -> None:
    lines = VolatileLines()
    for _ in range(3):
        observe(lines, r"**Date** \*: 1")
    (found,) = lines.suggestions()
    rules = CanonicalRules.model_validate({"lines": [found.rule()]})
    assert rules.of_system([system(r"**Date** \*: 5")]).counts == {"date": 1}
