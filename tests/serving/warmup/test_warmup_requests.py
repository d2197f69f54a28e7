"""Requests that are warmed at the start: their prompts are those that the APIs make of the same bodies."""

import json
from pathlib import Path
from typing import Any

import pytest

from emberkv.core.hashing import PUBLIC_OWNER
from emberkv.errors import ConfigError
from emberkv.serving.api.warmup_requests import WarmupRequest, read_warmup_requests, request_prompts
from emberkv.serving.canonical import CanonicalRules
from tests.serving.fakes import ByteTokenizer, FakeEngine
from tests.serving.harness import MODEL, Client

TOOL = {"name": "read", "description": "Read a file.", "parameters": {"type": "object", "properties": {}}}
ANTHROPIC_TOOL = {"name": "read", "input_schema": {"type": "object", "properties": {}}}
USER = {"role": "user", "content": "Hi"}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {
        "messages": [{"role": "system", "content": "Be kind."}, USER],
        "tools": [{"type": "function", "function": TOOL}],
    },
    "/v1/messages": {"system": "Be kind.", "messages": [USER], "tools": [ANTHROPIC_TOOL], "max_tokens": 9},
    "/v1/responses": {"instructions": "Be kind.", "input": "Hi", "tools": [{"type": "function", **TOOL}]},
}


@pytest.mark.parametrize("path", BODIES)
def test_the_prompt_is_that_of_the_request(path: str, client: Client, engine: FakeEngine, tmp_path: Path) -> None:
    file = tmp_path / "request.json"
    file.write_text(json.dumps({"model": "claude-opus", "stream": True, **BODIES[path]}))
    (prompt,), problems = request_prompts(read_warmup_requests([file]), ByteTokenizer(), None)
    assert client.post(path, {"model": MODEL, **BODIES[path]}).is_success
    assert list(prompt.tokens) == list(engine.submitted[0].prompt_token_ids)
    assert b"<tool read>" in bytes(prompt.tokens)
    assert (prompt.tenant, problems) == (PUBLIC_OWNER, [])


def test_equal_prompts_count_once_and_rules_rewrite_them() -> None:
    rules = CanonicalRules.model_validate({"lines": [{"name": "date", "match": "Today is*", "action": "drop"}]})
    body = {"system": "Today is Monday\nBe kind.", "messages": [USER]}
    later = {**body, "system": "Today is Friday\nBe kind."}
    requests = [WarmupRequest(Path(name), each) for name, each in (("a", body), ("b", later))]
    prompts, _ = request_prompts(requests, ByteTokenizer(), rules)
    assert [bytes(prompt.tokens) for prompt in prompts] == [b"<system>Be kind.<user>Hi<assistant>"]


def test_what_the_template_or_the_api_refuses_is_a_problem() -> None:
    bodies = ({"messages": [{"role": "user", "content": "offend the template"}]}, {"input": [{"type": "x"}]})
    prompts, problems = request_prompts([WarmupRequest(Path("a.json"), each) for each in bodies], ByteTokenizer(), None)
    assert prompts == []
    assert problems[0] == "request a.json: the chat template rejects these messages"
    assert problems[1].startswith("request a.json: input")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "cannot be read"),
        ("", "is empty"),
        ("{", "is not valid JSON"),
        pytest.param('{"messages": ' + "[" * 100_000, "is not valid JSON", id="nested too deeply"),
        ("[]", "is no request"),
        ('{"prompt": "Hi"}', "is no request"),
    ],
)
def test_a_useless_file_is_refused(content: str | None, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "request.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=f"^--warmup-request {path} {problem}"):
        read_warmup_requests([path])
