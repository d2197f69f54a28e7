"""Where a chat's prompt says that others will part from it, so that a hybrid leaves checkpoints there."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from emberkv.errors import RequestError
from emberkv.serving.api.anthropic_api import count_tokens, prepare_messages
from emberkv.serving.api.openai_api import prepare_chat
from emberkv.serving.app import create_app
from emberkv.serving.lifecycle import Lifecycle, ServedModel
from emberkv.serving.parsing.events import ParsedMessage
from tests.serving.core_engine import CoreEngine
from tests.serving.family_tokenizer import FamilyTokenizer
from tests.serving.harness import Client
from tests.serving.parsing.families import FAMILIES, TOOLS, Family

Message = dict[str, Any]

SYSTEM: Message = {"role": "system", "content": "You help with files."}
QUESTION: Message = {"role": "user", "content": "Which lamps are lit?"}
CALL = {"id": "call00001", "type": "function", "function": {"name": "read", "arguments": '{"path": "a.txt"}'}}
STEP: Message = {"role": "assistant", "content": "See.", "reasoning_content": "A file may say.", "tool_calls": [CALL]}
RESULT: Message = {"role": "tool", "tool_call_id": "call00001", "content": "All of them."}


class Refusing(FamilyTokenizer):
    """Of a template that takes no conversation with a text for private use."""

    def render_chat(self, messages: Sequence[Mapping[str, Any]], **more: Any) -> str:
        if any("\ue000" in message["content"] for message in messages):
            raise RequestError("the template refuses this")
        return super().render_chat(messages, **more)


class Engine(CoreEngine):
    context_length = 10_000
    max_prompt_tokens = 9_000


def model(
    *, tokenizer: type[FamilyTokenizer] = FamilyTokenizer, rewrites: bool = False, keeps: bool = True
) -> ServedModel:
    family = FAMILIES["Qwen3.5"]
    return ServedModel(
        ("tiny",),
        0,
        Engine(),
        tokenizer(family),
        output_format=family.format,
        rewrites_turns=rewrites,
        takes_borders=keeps,
    )


def beginnings(served: ServedModel, *messages: Message, **fields: Any) -> list[str]:
    """What of the prompt lies before each border."""
    body = json.dumps({"model": "tiny", "messages": messages, **fields}).encode()
    _, (prompt,), _ = prepare_chat(body, served, None)
    return [bytes(prompt.token_ids[:border]).decode() for border in prompt.borders]


def test_other_conversations_part_behind_the_system_prompt() -> None:
    (beginning,) = beginnings(model(), SYSTEM, QUESTION)
    assert beginning.endswith("You help with files.<|im_end|>\n<|im_start|>user\n")
    assert beginnings(model(), SYSTEM, QUESTION, STEP, RESULT) == [beginning]


def test_the_next_question_parts_where_the_template_drops_the_thoughts() -> None:
    """In a loop of tool calls that is before the first of these, not at the prompt's end."""
    first, at_the_end = beginnings(model(rewrites=True), SYSTEM, QUESTION)
    assert at_the_end.endswith("Which lamps are lit?<|im_end|>\n<|im_start|>assistant\n")
    assert beginnings(model(rewrites=True), SYSTEM, QUESTION, STEP, RESULT) == [first, at_the_end]


def test_the_next_questions_prompt_begins_with_what_lies_before_the_border() -> None:
    served = model(rewrites=True)
    body = json.dumps({"model": "tiny", "messages": [SYSTEM, QUESTION], "tools": list(TOOLS)}).encode()
    _, (prompt,), rendered = prepare_chat(body, served, None)
    assert rendered.next_prompt is not None
    following = rendered.next_prompt.tokens(ParsedMessage("A file may say.", "All of them."))
    border = prompt.borders[-1]
    assert list(following[:border]) == list(prompt.token_ids[:border])
    assert following[border] != prompt.token_ids[border]


def test_anthropic_requests_have_the_same_borders() -> None:
    body = {"model": "tiny", "max_tokens": 5, "system": SYSTEM["content"], "messages": [QUESTION]}
    _, prompt, _ = prepare_messages(json.dumps(body).encode(), model(rewrites=True), None)
    found = [bytes(prompt.token_ids[:border]).decode() for border in prompt.borders]
    assert found == beginnings(model(rewrites=True), SYSTEM, QUESTION)


def test_the_engine_gets_them_from_either_api() -> None:
    served, lifecycle, engine = model(), Lifecycle(), Engine()
    lifecycle.loaded(replace(served, engine=engine))
    client = Client(create_app(lifecycle))
    body = {"model": "tiny", "max_tokens": 2, "messages": [QUESTION]}
    assert client.post("/v1/messages", {**body, "system": SYSTEM["content"]}).is_success
    assert client.post("/v1/chat/completions", {**body, "messages": [SYSTEM, QUESTION]}).is_success
    (beginning,) = beginnings(served, SYSTEM, QUESTION)
    assert [request.borders for request in engine.submitted] == [(len(beginning),)] * 2


def test_a_conversation_with_nothing_to_part_from_has_none() -> None:
    assert beginnings(model(), QUESTION) == []


def test_without_checkpoints_none_is_looked_for() -> None:
    assert beginnings(model(tokenizer=Refusing, rewrites=True, keeps=False), SYSTEM, QUESTION) == []


def test_what_the_template_refuses_to_show_is_no_border() -> None:
    assert beginnings(model(tokenizer=Refusing, rewrites=True), SYSTEM, QUESTION) == []


class Counting(FamilyTokenizer):
    """Notes the texts that are encoded, and counts the prompts that are rendered."""

    def __init__(self, family: Family) -> None:
        super().__init__(family)
        self.encoded: list[str] = []
        self.rendered = 0

    def encode(self, text: str, **options: Any) -> list[int]:
        self.encoded.append(text)
        return super().encode(text, **options)

    def render_chat(self, messages: Sequence[Mapping[str, Any]], **more: Any) -> str:
        self.rendered += 1
        return super().render_chat(messages, **more)


def test_of_a_long_prompt_only_what_lies_near_a_border_is_encoded_again() -> None:
    served = model(tokenizer=Counting, rewrites=True)
    assert isinstance(served.tokenizer, Counting)
    answered = [message for _ in range(80) for message in (QUESTION, {"role": "assistant", "content": "All of them."})]
    first, last = beginnings(served, SYSTEM, *answered, QUESTION)
    assert last.startswith(first)
    assert last.endswith("Which lamps are lit?<|im_end|>\n<|im_start|>assistant\n")
    prompt, *again = served.tokenizer.encoded
    assert len(prompt) > 7000
    assert sum(map(len, again)) < 1000
    assert served.tokenizer.rendered == 3


def test_a_prompt_that_is_only_counted_is_rendered_once() -> None:
    served = model(tokenizer=Counting, rewrites=True)
    assert isinstance(served.tokenizer, Counting)
    body = {"model": "tiny", "max_tokens": 5, "system": SYSTEM["content"], "messages": [QUESTION]}
    assert count_tokens(json.dumps(body).encode(), served, None) > 0
    assert served.tokenizer.rendered == 1
