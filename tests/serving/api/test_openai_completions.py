"""Plain completions: forms of prompts, values of answers."""

from typing import Any

import httpx
import pytest

from tests.serving.fakes import BOS, FakeEngine, Script
from tests.serving.harness import MODEL, Client, openai_events


def complete(client: Client, **fields: Any) -> httpx.Response:
    return client.post("/v1/completions", {"model": MODEL, "prompt": "Once", **fields})


def test_completion(client: Client, engine: FakeEngine) -> None:
    engine.script = Script("upon a time, long ago")
    body = complete(client).json()
    assert body["id"].startswith("cmpl-")
    assert body["object"] == "text_completion"
    assert body["choices"] == [{"index": 0, "text": "upon a time, lon", "logprobs": None, "finish_reason": "length"}]
    assert engine.submitted[0].prompt_token_ids == [BOS, *b"Once"]
    assert engine.submitted[0].params.max_tokens == 16


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        (["ab", "c"], [[BOS, *b"ab"], [BOS, *b"c"]]),
        ([1, 2, 3], [[1, 2, 3]]),
        ([[1, 2], [3]], [[1, 2], [3]]),
    ],
)
def test_prompt_forms(client: Client, engine: FakeEngine, prompt: Any, expected: list[list[int]]) -> None:
    body = complete(client, prompt=prompt, max_tokens=2).json()
    assert [request.prompt_token_ids for request in engine.submitted] == expected
    assert [choice["text"] for choice in body["choices"]] == ["He"] * len(expected)
    assert body["usage"]["prompt_tokens"] == sum(map(len, expected))


def test_completion_logprobs(client: Client, engine: FakeEngine) -> None:
    engine.script = Script("aé")
    assert complete(client, logprobs=1).json()["choices"][0]["logprobs"] == {
        "tokens": ["a", "\ufffd", "\ufffd"],
        "token_logprobs": [-0.5, -0.5, -0.5],
        "top_logprobs": [{"x": -0.25}] * 3,
        "text_offset": [0, 1, 1],
    }


def test_completion_stream(client: Client, engine: FakeEngine) -> None:
    engine.script = Script("abc")
    chunks = openai_events(complete(client, stream=True, max_tokens=2))
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "ab"
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks][-1] == "length"
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}
