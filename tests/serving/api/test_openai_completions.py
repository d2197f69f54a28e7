"""Plain completions: forms of prompts, values of answers."""

from typing import Any

import httpx
import pytest

from emberkv.engine.request import TokenLogprobs
from emberkv.serving.answers.answer import Answer, PlacedLogprobs
from emberkv.serving.answers.answer_stream import WholeAnswer
from emberkv.serving.api.openai_api import CompletionWriter
from tests.serving.fakes import BOS, ByteDetokenizer, FakeEngine, Script
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
        "tokens": ["a", "bytes:\\xc3", "bytes:\\xa9"],
        "token_logprobs": [-0.5, -0.5, -0.5],
        "top_logprobs": [{"x": -0.25, name: -0.5} for name in ("a", "bytes:\\xc3", "bytes:\\xa9")],
        "text_offset": [0, 1, 1],
    }


def test_completion_stream(client: Client, engine: FakeEngine) -> None:
    engine.script = Script("abc")
    chunks = openai_events(complete(client, stream=True, max_tokens=2))
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "ab"
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks][-1] == "length"
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}


class SameTexts:
    """Tokens 1 and 2 have the same text; 3 and 4 are halves of a character."""

    def token_text(self, token_id: int) -> str:
        return {1: "a", 2: "a", 3: "\ufffd", 4: "\ufffd"}[token_id]

    def token_bytes(self, token_id: int) -> bytes:
        return {1: b"a", 2: b"a", 3: b"\xc3", 4: b"\xbc"}[token_id]


@pytest.mark.parametrize(
    ("chosen", "name", "expected"),
    [
        (2, "a", {"token_id:1": -0.1, "a": -0.5, "bytes:\\xc3": -2.0, "bytes:\\xbc": -3.0}),
        (3, "bytes:\\xc3", {"a": -0.1, "token_id:2": -0.5, "bytes:\\xc3": -2.0, "bytes:\\xbc": -3.0}),
    ],
)
def test_tokens_of_the_same_text_keep_their_own_logprobs(chosen: int, name: str, expected: dict[str, float]) -> None:
    form = CompletionWriter("cmpl-1", MODEL, 0, SameTexts())
    top = ((1, -0.1), (2, -0.5), (3, -2.0), (4, -3.0))
    token = TokenLogprobs(chosen, dict(top)[chosen], top)
    answer = Answer(0, 1, ByteDetokenizer(), ())
    whole = WholeAnswer(answer, "x", (PlacedLogprobs(0, 1, token),))
    logprobs = form.whole([whole])["choices"][0]["logprobs"]
    assert logprobs["tokens"] == [name]
    assert logprobs["top_logprobs"] == [expected]


def test_the_chosen_token_is_among_its_alternatives(client: Client) -> None:
    body = {"model": MODEL, "prompt": "a", "max_tokens": 1, "logprobs": 1}
    logprobs = client.post("/v1/completions", body).json()["choices"][0]["logprobs"]
    assert logprobs["top_logprobs"] == [{"x": -0.25, "H": -0.5}]


@pytest.mark.parametrize("stream", [False, True])
def test_no_tokens_asked_for(client: Client, stream: bool) -> None:
    body = {"model": MODEL, "prompt": "abc", "max_tokens": 0, "stream": stream}
    answer = client.post("/v1/completions", {**body, "stream_options": {"include_usage": True} if stream else None})
    if stream:
        last, usage = openai_events(answer)
        choice, used = last["choices"][0], usage["usage"]
    else:
        choice, used = answer.json()["choices"][0], answer.json()["usage"]
    assert (choice["text"], choice["finish_reason"], choice["logprobs"]) == ("", "length", None)
    assert (used["prompt_tokens"], used["completion_tokens"]) == (4, 0)


def test_an_echo_is_the_prompt_and_the_answer(client: Client, engine: FakeEngine) -> None:
    assert complete(client, echo=True, max_tokens=3).json()["choices"][0]["text"] == "OnceHel"
    assert engine.submitted[0].params.prompt_logprobs is None
    assert complete(client, echo=True, stop=["nc"]).json()["choices"][0]["text"] == "OnceHello there"
    ids = complete(client, echo=True, prompt=[[BOS, *b"ab"], [*b"cd"]], max_tokens=1).json()["choices"]
    assert [choice["text"] for choice in ids] == ["abH", "cdH"]


@pytest.mark.parametrize("stream", [False, True])
def test_an_echo_with_logprobs(client: Client, stream: bool) -> None:
    answer = complete(client, echo=True, logprobs=1, max_tokens=1, prompt="aé", stream=stream)
    choices = [chunk["choices"][0] for chunk in openai_events(answer)] if stream else answer.json()["choices"]
    assert "".join(choice["text"] for choice in choices) == "aéH"
    names = ["<begin>", "a", "bytes:\\xc3", "bytes:\\xa9", "H"]
    expected = {
        "tokens": names,
        "token_logprobs": [None, -2.0, -2.0, -2.0, -0.5],
        "top_logprobs": [None, *({"x": -0.25, name: -2.0} for name in names[1:4]), {"x": -0.25, "H": -0.5}],
        "text_offset": [0, 0, 1, 1, 2],
    }
    found = [choice["logprobs"] for choice in choices if choice["logprobs"]]
    assert {name: [each for part in found for each in part[name]] for name in expected} == expected


def test_an_evaluation_harness_asks_for_log_likelihoods(client: Client) -> None:
    """The shape of lm-eval's local-completions: batches of token ids, one new token, which it drops again."""
    contexts = [[*b"The sky is", *b" blue"], [*b"Two and two are", *b" four"]]
    body = {"prompt": contexts, "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}
    choices = complete(client, **body).json()["choices"]
    assert [choice["index"] for choice in choices] == [0, 1]
    for choice, tokens in zip(choices, contexts, strict=True):
        logprobs = choice["logprobs"]
        assert len(logprobs["token_logprobs"]) == len(tokens) + 1
        assert sum(logprobs["token_logprobs"][-6:-1]) == -2.0 * 5
        likeliest = [max(top, key=top.get) for top in logprobs["top_logprobs"][-6:-1]]
        assert likeliest == ["x"] * 5


def test_the_prompt_alone(client: Client) -> None:
    body = complete(client, echo=True, logprobs=0, max_tokens=0, prompt="ab").json()
    choice = body["choices"][0]
    assert (choice["text"], choice["logprobs"]["token_logprobs"]) == ("ab", [None, -2.0, -2.0])
    assert choice["logprobs"]["top_logprobs"] == [None, {}, {}]
    assert body["usage"]["completion_tokens"] == 0


def test_an_echo_of_too_many_logprobs_is_refused(client: Client, engine: FakeEngine) -> None:
    refused = complete(client, echo=True, logprobs=20, prompt=["a" * 900] * 20)
    assert refused.status_code == 400
    assert "at most 262144 are given at once" in refused.json()["error"]["message"]
    assert not engine.submitted
