"""The tokenizer's routes, in the shapes that vLLM's clients expect."""

from typing import Any

import pytest

from emberkv.serving.app import ServingSettings, create_app
from emberkv.serving.canonical import rules_in_force
from emberkv.serving.lifecycle import Lifecycle, ServedModel
from tests.serving.fakes import BOS, FakeEngine, Script
from tests.serving.family_tokenizer import FamilyTokenizer
from tests.serving.harness import MODEL, Client, openai_error
from tests.serving.parsing.families import FAMILIES, TOOLS


def test_a_prompt(client: Client) -> None:
    assert client.post("/tokenize", {"model": MODEL, "prompt": "Hi"}).json() == {
        "count": 3,
        "max_model_len": 1000,
        "tokens": [BOS, ord("H"), ord("i")],
        "token_strs": None,
    }
    body = {"prompt": "Hi", "add_special_tokens": False, "return_token_strs": True}
    assert client.post("/tokenize", body).json()["token_strs"] == ["H", "i"]


def test_a_conversation_is_counted_as_it_is_served(client: Client) -> None:
    conversation = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}]}
    served = client.post("/v1/chat/completions", {**conversation, "max_tokens": 1}).json()
    tokens = client.post("/tokenize", conversation).json()
    assert tokens["count"] == served["usage"]["prompt_tokens"]
    assert bytes(tokens["tokens"]) == b"<user>Hi<assistant>"
    unfinished = client.post("/tokenize", {**conversation, "add_generation_prompt": False}).json()
    assert bytes(unfinished["tokens"]) == b"<user>Hi"


def test_a_conversation_has_the_tokens_of_the_next_request(engine: FakeEngine) -> None:
    """An agent's volatile line is dropped from its prompt, and an answer is in it as it was sampled."""
    family = FAMILIES["Qwen2.5"]
    model = ServedModel((MODEL,), 0, engine, FamilyTokenizer(family), output_format=family.format)
    lifecycle = Lifecycle()
    lifecycle.loaded(model)
    rules = rules_in_force(None, for_agents=True)
    client = Client(create_app(lifecycle, ServingSettings(canonical=rules)))
    sampled = '<tool_call>\n{"name": "read",  "arguments": {"path": "a", "force": true}}\n</tool_call>'
    engine.script = Script(sampled)
    billing = "x-anthropic-billing-header: cc_version=2.1.197.123; cc_entrypoint=cli;"
    system, question = {"role": "system", "content": f"{billing}\nBe brief."}, {"role": "user", "content": "Hi"}
    body: dict[str, Any] = {"model": MODEL, "messages": [system, question], "tools": TOOLS, "max_tokens": 200}
    message = client.post("/v1/chat/completions", body).json()["choices"][0]["message"]
    (call,) = message["tool_calls"]
    call["function"]["arguments"] = '{"force": true, "path": "a"}'
    result = {"role": "tool", "tool_call_id": call["id"], "content": "empty"}
    body["messages"] = [system, question, message, result]
    tokens = client.post("/tokenize", body).json()["tokens"]
    client.post("/v1/chat/completions", body)
    assert tokens == list(engine.submitted[-1].prompt_token_ids)
    assert sampled.encode() in bytes(tokens)
    assert billing.encode() not in bytes(tokens)


def test_tokens_become_their_text_again(client: Client) -> None:
    tokens = list("Grüße".encode())
    assert client.post("/detokenize", {"model": MODEL, "tokens": tokens}).json() == {"prompt": "Grüße"}
    assert client.post("/detokenize", {"tokens": tokens[:3]}).json() == {"prompt": "Gr\ufffd"}


def test_tokenizer_info(client: Client) -> None:
    info = client.get("/tokenizer_info").json()
    assert (info["tokenizer_class"], info["chat_template"]) == ("ByteTokenizer", "roles in brackets")
    assert info["model_max_length"] == 1000


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {"model": MODEL}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": []}, "prompt"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"prompt": "a", "model": "other"}, "model"),
        ("/tokenize", {"messages": [{"role": "user", "content": "a"}], "tool_choice": "other"}, "tool_choice"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {}, "tokens"),
    ],
)
def test_what_cannot_be_used(client: Client, path: str, body: dict[str, object], param: str) -> None:
    assert openai_error(client.post(path, body))["param"] == param


def test_they_need_a_key_where_keys_are_set(lifecycle: Lifecycle) -> None:
    client = Client(create_app(lifecycle, ServingSettings(api_keys=("sesame",))))
    answers = [
        client.post("/tokenize", {"prompt": "a"}),
        client.post("/detokenize", {"tokens": []}),
        client.get("/tokenizer_info"),
        client.get("/version"),
    ]
    assert [answer.status_code for answer in answers] == [401] * 4
