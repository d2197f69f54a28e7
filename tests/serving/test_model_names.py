"""Names by which requests call the model: its own, patterns, those of coding agents, and with a provider before."""

import logging
from collections.abc import Callable
from dataclasses import replace

import pytest

from emberkv.serving.app import create_app
from emberkv.serving.lifecycle import Lifecycle, NamePatterns, ServedModel, model_names
from tests.serving.harness import Client

USER = [{"role": "user", "content": "Hi"}]

Served = Callable[..., Client]


@pytest.fixture
def served(model: ServedModel) -> Served:
    def serve(*given: str, strict: bool = False) -> Client:
        names, patterns = model_names(given, "tiny", strict=strict)
        lifecycle = Lifecycle()
        lifecycle.loaded(replace(model, names=names, name_patterns=patterns))
        return Client(create_app(lifecycle))

    return serve


def named(client: Client, name: str, path: str = "/v1/chat/completions") -> str | int:
    """The model's name in the answer, or the status of the refusal."""
    answer = client.post(path, {"model": name, "messages": USER, "max_tokens": 2})
    return answer.json()["model"] if answer.status_code == 200 else answer.status_code


def test_names_and_patterns_that_are_given(served: Served) -> None:
    client = served("coder", "mine-*", "fast", strict=True)
    assert [named(client, each) for each in ("coder", "fast", "tiny", "mine-7", "mine")] == [
        "coder", "fast", "tiny", "mine-7", 404,
    ]  # fmt: skip
    assert [each["id"] for each in client.get("/v1/models").json()["data"]] == ["coder", "fast", "tiny"]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages"])
@pytest.mark.parametrize("name", ["claude-haiku-4-5-20251001", "gpt-4o", "o3-mini", "codex-mini-latest"])
def test_agents_own_names_are_answered_unless_names_are_strict(served: Served, name: str, path: str) -> None:
    assert named(served(), name, path) == name
    assert named(served(strict=True), name, path) == 404


def test_a_pattern_may_have_a_provider(served: Served) -> None:
    client = served("openai/mine-*", strict=True)
    assert [named(client, each) for each in ("openai/mine-7", "mine-7")] == ["openai/mine-7", 404]


def test_any_name_is_a_pattern(served: Served) -> None:
    assert named(served("*", strict=True), "no such model") == "no such model"


@pytest.mark.parametrize("name", ["openai/tiny", "anthropic/tiny", "hosted_vllm/tiny", "anthropic/claude-x"])
def test_a_provider_may_stand_before_a_name(served: Served, name: str) -> None:
    assert named(served(), name) == name


@pytest.mark.parametrize("name", ["other/tiny", "openai/", "tiny/openai", "gpt2"])
def test_other_names_are_refused_with_those_that_are_served(served: Served, name: str) -> None:
    refused = served().post("/v1/chat/completions", {"model": name, "messages": USER})
    assert refused.status_code == 404
    assert refused.json()["error"]["message"] == f"model is {name!r}; this server has 'tiny'"


def test_a_card_of_an_agents_name(served: Served) -> None:
    card = served().get("/v1/models/claude-sonnet-4-5", headers={"anthropic-version": "2023-06-01"}).json()
    assert (card["id"], card["max_input_tokens"]) == ("claude-sonnet-4-5", 990)


def test_each_name_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="emberkv.serving.lifecycle")
    patterns = NamePatterns(["claude-*"])
    for name in ("claude-a", "claude-b", "claude-a", "other"):
        patterns.match(name)
    assert [record.getMessage() for record in caplog.records] == [
        f"requests for the model {name!r} are answered by the model served here" for name in ("claude-a", "claude-b")
    ]


@pytest.mark.parametrize(
    ("pattern", "name", "matches"),
    [
        ("a?-*", "a?-1", True),
        ("a?-*", "ab-1", False),
        ("a[bc]*", "a[bc]d", True),
        ("a[bc]*", "ab", False),
    ],
)
def test_only_the_star_is_a_wildcard(pattern: str, name: str, matches: bool) -> None:
    assert NamePatterns([pattern]).match(name) is matches


@pytest.mark.parametrize("name", ["gpt-oss-20b", "openai/gpt-oss-120b"])
def test_an_agents_pattern_does_not_answer_for_an_open_model(name: str) -> None:
    assert not NamePatterns(["gpt-*", "claude-*"]).match(name)
    assert NamePatterns(["gpt-*", "gpt-oss-*"]).match(name)
