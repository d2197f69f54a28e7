"""Bad input: each API's own error shape, a message that helps, and nothing left in the engine."""

from typing import Any

import pytest

from tests.serving.fakes import FakeEngine, Script
from tests.serving.harness import MODEL, Client, anthropic_error, openai_error

USER = [{"role": "user", "content": "Hi"}]
CHAT = {"model": MODEL, "messages": USER}
COMPLETION = {"model": MODEL, "prompt": "Once"}
MESSAGE = {"model": MODEL, "messages": USER, "max_tokens": 10}
TOOL = [{"name": "add", "input_schema": {"type": "object"}}]
SCULPTURE = [{"role": "user", "content": [{"type": "sculpture"}]}]
LONG = [{"role": "user", "content": "x" * 991}]


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"messages": []}, "messages", "messages is empty; it must hold at least one message"),
        ({"messages": None}, "messages", "messages is None: input should be a valid"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages[0].role", "'king'; it must be one of 'system'"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "must be a string or a list of text parts"),
        ({"messages": SCULPTURE}, "messages[0].content[0]", "type 'sculpture'; this server reads text"),
        ({"messages": [{"role": "user", "content": "offend the template"}]}, "messages", "the chat template rejects"),
        (
            {"messages": LONG},
            None,
            "maximum context length is 990 tokens. However, your messages resulted in 1008 tokens",
        ),
        ({"max_tokens": -1}, "max_tokens", "max_tokens is -1; it must be at least 1"),
        ({"max_tokens": 0}, "max_tokens", "max_tokens is 0; it must be at least 1"),
        ({"max_tokens": "12"}, "max_tokens", "max_tokens is '12': input should be a valid integer"),
        ({"temperature": 2.5}, "temperature", "temperature is 2.5; it must be from 0 to 2"),
        ({"temperature": "hot"}, "temperature", "temperature is 'hot': input should be a valid number"),
        ({"top_p": 0}, "top_p", "top_p is 0.0; it must be above 0 and at most 1"),
        ({"top_k": -5}, "top_k", "top_k is -5; it must be 0 (all tokens) or more"),
        ({"min_p": 2}, "min_p", "min_p is 2.0; it must be from 0 to 1"),
        ({"repetition_penalty": 0}, "repetition_penalty", "it must be from 0.01 to 100"),
        ({"repetition_penalty": 1e-39}, "repetition_penalty", "is 1e-39; it must be from 0.01 to 100"),
        ({"repetition_penalty": 1e39}, "repetition_penalty", "is 1e+39; it must be from 0.01 to 100"),
        ({"presence_penalty": 3}, "presence_penalty", "it must be from -2 to 2"),
        ({"frequency_penalty": -3}, "frequency_penalty", "it must be from -2 to 2"),
        ({"seed": 2**64}, "seed", "it must be a 64-bit integer"),
        ({"seed": 2**63, "n": 2}, "seed", "seed is 9223372036854775808; it must be a 64-bit integer"),
        ({"stop": 5}, "stop", "input should be a valid string"),
        ({"n": 0}, "n", "n is 0; it must be from 1 to 64"),
        ({"n": 65}, "n", "n is 65; it must be from 1 to 64"),
        ({"best_of": 2}, "best_of", "best_of is 2; it is not supported"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "input should be less than or equal to 20"),
        ({"top_logprobs": 2}, "top_logprobs", "logprobs is not true"),
        (
            {"response_format": {"type": "xml"}},
            "response_format.type",
            "must be 'text', 'json_object' or 'json_schema'",
        ),
        ({"tool_choice": "required"}, "tool_choice", "is 'required', and there are no tools to call"),
        ({"tool_choice": "some"}, "tool_choice", "is 'some'; it must be 'none', 'auto', 'required'"),
        ({"tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice", "names 'x', which is not"),
        ({"tools": [{"type": "function"}]}, "tools[0]", "tools[0] must have function.name (string)"),
        ({"logit_bias": {"five": 100}}, "logit_bias", "logit_bias has 'five'; it must have token ids"),
        ({"logit_bias": {"5": 101}}, "logit_bias", "logit_bias is 101.0; it must be from -100 to 100"),
        ({"stop_token_ids": [-1]}, "stop_token_ids", "token ids from 0 on"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens", "min_tokens is 5; it must be at most max_tokens, 4"),
        (
            {"min_tokens": 5, "max_completion_tokens": 4},
            "min_tokens",
            "min_tokens is 5; it must be at most max_completion_tokens, 4",
        ),
        ({"max_tokens": 4.5}, "max_tokens", "max_tokens is 4.5: input should be a valid integer"),
        ({"modalities": ["text", "audio"]}, "modalities", "modalities has 'audio'"),
    ],
)
def test_chat_refuses(
    client: Client, engine: FakeEngine, fields: dict[str, Any], param: str | None, message: str
) -> None:
    response = client.post("/v1/chat/completions", {**CHAT, **fields})
    assert response.status_code == 400
    error = openai_error(response)
    assert message in error["message"]
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert engine.submitted == []


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"prompt": None}, "prompt", "prompt must be a string"),
        ({"prompt": [1, "a"]}, "prompt", "prompt must be a string"),
        ({"prompt": [-1]}, "prompt", "integers from 0"),
        ({"prompt": [True]}, "prompt", "integers from 0"),
        ({"prompt": []}, "prompt", "the prompt is empty"),
        ({"prompt": [[]]}, "prompt", "the prompt is empty"),
        ({"prompt": ["a"] * 33, "n": 2}, "prompt", "ask for 66 answers; at most 64 are accepted"),
        ({"prompt": [100_000]}, "prompt", "outside the vocabulary"),
        ({"suffix": "end"}, "suffix", "suffix is not supported"),
    ],
)
def test_completions_refuses(client: Client, fields: dict[str, Any], param: str, message: str) -> None:
    response = client.post("/v1/completions", {**COMPLETION, **fields})
    assert response.status_code == 400
    error = openai_error(response)
    assert message in error["message"]
    assert error["param"] == param


def test_a_refused_prompt_takes_its_companions_with_it(client: Client, engine: FakeEngine) -> None:
    engine.script = Script(pause_after=0)
    response = client.post("/v1/completions", {**COMPLETION, "prompt": [[1], [2], [100_000]]})
    assert response.status_code == 400
    assert len(engine.submitted) == 2
    assert engine.aborted == [request.request_id for request in engine.submitted]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"messages": []}, "messages is empty; it must hold at least one message"),
        ({"messages": [{"role": "user", "content": [{"type": "sculpture"}]}]}, "messages.0.content.0 has type 'sculp"),
        ({"messages": [{"role": "user", "content": ["text"]}]}, "messages.0.content.0 has type 'str'; it must be an"),
        ({"messages": [{"role": "king", "content": "x"}]}, "role is 'king'; it must be one of user, assistant, system"),
        ({"messages": LONG}, "prompt is too long: 1008 tokens > 990 maximum"),
        ({"max_tokens": -1}, "max_tokens is -1: input should be greater than or equal to 0"),
        ({"max_tokens": None}, "max_tokens is None: input should be a valid integer"),
        ({"temperature": 1.5}, "temperature is 1.5: input should be less than or equal to 1"),
        ({"top_p": 2}, "top_p is 2.0; it must be above 0 and at most 1"),
        ({"top_k": -2}, "top_k is -2; it must be 0 (all tokens) or more"),
        ({"stop_sequences": ["a"] * 17}, "at most 16 items"),
        ({"stop_sequences": [""]}, "at least 1 character"),
        ({"tool_choice": {"type": "any"}, "tools": []}, "tool_choice.type is 'any', and there are no tools to call"),
        ({"tool_choice": {"type": []}}, "tool_choice.type is []; it must be one of auto, any, tool, none"),
        ({"tool_choice": {"type": "tool", "name": "x"}, "tools": TOOL}, "tool_choice.name is 'x'; it must be the name"),
        ({"tools": [{"type": "custom"}]}, "tools.0 must have a name (string) and an input_schema"),
        ({"tool_choice": {"type": "any"}, "tools": TOOL}, "has no known format of tool calls"),
        ({"thinking": {"type": "deep"}}, "thinking.type is 'deep'; it must be one of enabled, adaptive, disabled"),
        ({"mcp_servers": [{"name": "files"}]}, "mcp_servers is not supported; leave it out"),
        ({"container": "c_1"}, "container is not supported; leave it out"),
        ({"output_config": {"format": {"type": "json_schema"}}}, "output_config.format.schema is missing"),
        ({"output_format": {"type": "prose"}}, "output_format.type is 'prose'"),
        ({"system": 5}, "system"),
    ],
)
def test_messages_refuses(client: Client, engine: FakeEngine, fields: dict[str, Any], message: str) -> None:
    response = client.post("/v1/messages", {**MESSAGE, **fields})
    assert response.status_code == 400
    error = anthropic_error(response)
    assert message in error["message"]
    assert error["type"] == "invalid_request_error"
    assert engine.submitted == []


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"model": ', "the body is not valid JSON: EOF while parsing"),
        (b"", "the body is not valid JSON"),
        (b'{"model": "\xff"}', "the body is not valid JSON"),
        (b"[1]", "the body is [1]: input should be an object"),
        (b"[" * 5000, "the body is not valid JSON: recursion limit exceeded"),
        (b"{}", "model is missing; it is required"),
    ],
)
def test_malformed_bodies_openai(client: Client, path: str, body: bytes, message: str) -> None:
    response = client.post(path, content=body)
    assert response.status_code == 400
    assert message in openai_error(response)["message"]


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages/count_tokens"])
@pytest.mark.parametrize(
    ("body", "message"),
    [(b"{", "the body is not valid JSON"), (b'{"model": "tiny"}', "messages is missing; it is required")],
)
def test_malformed_bodies_anthropic(client: Client, path: str, body: bytes, message: str) -> None:
    response = client.post(path, content=body)
    assert response.status_code == 400
    assert message in anthropic_error(response)["message"]


def test_a_bad_value_is_not_repeated_at_length(client: Client) -> None:
    response = client.post("/v1/chat/completions", {**CHAT, "max_tokens": "9" * 10_000})
    assert response.status_code == 400
    assert len(openai_error(response)["message"]) < 200


@pytest.mark.parametrize("digits", [100, 4000, 5000])
@pytest.mark.parametrize("field", ["seed", "temperature", "n"])
def test_numbers_of_many_digits(client: Client, field: str, digits: int) -> None:
    body = b'{"model":"tiny","messages":[{"role":"user","content":"Hi"}],"%s":%s}' % (field.encode(), b"9" * digits)
    response = client.post("/v1/chat/completions", content=body)
    assert response.status_code == 400
    assert openai_error(response)["type"] == "invalid_request_error"


def test_unknown_models(client: Client) -> None:
    for path, body in (("/v1/chat/completions", CHAT), ("/v1/completions", COMPLETION)):
        response = client.post(path, {**body, "model": "gpt-9"})
        assert response.status_code == 404
        assert openai_error(response) == {
            "message": "model is 'gpt-9'; this server has 'tiny', 'alias'",
            "type": "invalid_request_error",
            "param": "model",
            "code": "model_not_found",
        }
    response = client.post("/v1/messages", {**MESSAGE, "model": "claude"})
    assert response.status_code == 404
    assert anthropic_error(response)["type"] == "not_found_error"


def test_unknown_routes_and_methods(client: Client) -> None:
    missing = client.get("/v2/nothing")
    assert missing.status_code == 404
    assert openai_error(missing)["message"] == "there is no /v2/nothing here"
    wrong = client.get("/v1/chat/completions")
    assert wrong.status_code == 405
    assert wrong.headers["allow"] == "POST, OPTIONS"
    assert openai_error(wrong)["message"] == "GET cannot be used on /v1/chat/completions; use POST"
    assert client.get("/v1/messages").status_code == 405
    assert anthropic_error(client.get("/v1/messages"))["type"] == "invalid_request_error"
