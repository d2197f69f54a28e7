"""Conversations of agents, rendered by templates of the shapes that do not take them as they are."""

from typing import Any

import pytest
from jinja2 import Environment
from jinja2.exceptions import TemplateError

from emberkv.engine.tokenization.template_adaptation import TemplateAdapter
from emberkv.engine.tokenization.template_check import TemplateTimeoutError

SYSTEM = {"role": "system", "content": "Be kind."}
LATE = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Hello"}
LONG_ID = "call_0123456789abcdef01234567"

EVERYTHING = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% for c in m.tool_calls %}[{{ c.function.name }} {{ c.function.arguments }} {{ c.id }}]{% endfor %}{% endfor %}"
)
ALTERNATING = (
    "{% for m in messages %}{% if not loop.first and loop.previtem.role == m.role %}{{ refuse('no') }}{% endif %}"
    "{% endfor %}"
)


def refusing(condition: str) -> str:
    """A template that refuses conversations with a message of which the condition holds."""
    return (
        f"{{% for m in messages %}}{{% if {condition} %}}{{{{ refuse('no') }}}}{{% endif %}}{{% endfor %}}" + EVERYTHING
    )


class Template:
    """renders: how many conversations the template was given."""

    def __init__(self, text: str) -> None:
        def refuse(message: str) -> None:
            raise TemplateError(message)

        self.renders = 0
        self._template = Environment(autoescape=False).from_string(text, {"refuse": refuse})  # noqa: S701 - no HTML
        self.adapter = TemplateAdapter(self._probe)

    def _probe(self, messages: list[dict[str, Any]], has_tools: bool) -> str:
        self.renders += 1
        return self._template.render(messages=messages)

    def rendered(self, *messages: dict[str, Any]) -> str:
        return self._template.render(messages=self.adapter.adapted(messages, has_tools=True))


def called(*arguments: object, text: str = "") -> dict[str, Any]:
    calls = [
        {"id": f"{LONG_ID}{number}", "type": "function", "function": {"name": f"f{number}", "arguments": given}}
        for number, given in enumerate(arguments)
    ]
    return {"role": "assistant", "content": text, "tool_calls": calls}


def result(text: str, number: int = 0) -> dict[str, Any]:
    return {"role": "tool", "content": text, "tool_call_id": f"{LONG_ID}{number}"}


LOOP = (SYSTEM, USER, called({"x": 1}, {"y": 2}, text="Look."), result("one"), result("two", 1), USER, USER, LATE)


def test_a_template_that_takes_everything_gets_it_as_it_is() -> None:
    template = Template(EVERYTHING)
    adapted = template.adapter.adapted([*LOOP, LATE], has_tools=True)
    assert adapted == [*LOOP, LATE]


@pytest.mark.parametrize(
    ("text", "messages", "expected"),
    [
        pytest.param(
            refusing("m.role == 'system' and not loop.first"),
            (SYSTEM, LATE, USER, ANSWER, LATE),
            "<system>Be kind.\n\nBe brief.<user>Hi<assistant>Hello<user>Be brief.",
            id="one-system",
        ),
        pytest.param(
            refusing("m.role == 'system'"),
            (SYSTEM, USER, ANSWER, USER),
            "<user>Be kind.\n\nHi<assistant>Hello<user>Hi",
            id="no-system",
        ),
        pytest.param(
            ALTERNATING + EVERYTHING,
            (USER, USER, ANSWER, ANSWER),
            "<user>Hi\n\nHi<assistant>Hello\n\nHello",
            id="alternating",
        ),
        pytest.param(
            refusing("m.role == 'system' and not loop.first") + ALTERNATING,
            (SYSTEM, USER, LATE),
            "<system>Be kind.<user>Hi\n\nBe brief.",
            id="late-system-alternating",
        ),
        pytest.param(
            refusing("m.tool_calls and m.tool_calls[0].function.arguments is not string"),
            (USER, called({"x": "ä"})),
            f'<user>Hi<assistant>[f0 {{"x": "ä"}} {LONG_ID}0]',
            id="arguments-as-text",
        ),
        pytest.param(
            refusing("m.tool_calls and m.tool_calls[0].function.arguments is string"),
            (USER, called("{broken")),
            f"<user>Hi<assistant>[f0 {{'arguments': '{{broken'}} {LONG_ID}0]",
            id="arguments-as-object",
        ),
        pytest.param(
            refusing("m.role == 'tool'"),
            (USER, called({"x": 1}, text="Look."), result("one")),
            '<user>Hi<assistant>Look.\n<tool_call>\n{"name": "f0", "arguments": {"x": 1}}\n</tool_call>'
            "<user><tool_response>\none\n</tool_response>",
            id="no-tools",
        ),
        pytest.param(
            refusing("m.tool_calls and m.tool_calls | length > 1"),
            (USER, called({"x": 1}, {"y": 2}), result("two", 1), result("one"), USER),
            f"<user>Hi<assistant>[f0 {{'x': 1}} {LONG_ID}0]<tool>one"
            f"<assistant>[f1 {{'y': 2}} {LONG_ID}1]<tool>two<user>Hi",
            id="single-calls",
        ),
        pytest.param(
            EVERYTHING.replace("{{ m.content }}", "{% if not m.tool_calls %}{{ m.content }}{% endif %}"),
            (USER, called({"x": 1}, text="Look.")),
            f"<user>Hi<assistant>Look.<assistant>[f0 {{'x': 1}} {LONG_ID}0]",
            id="text-beside-calls-is-dropped",
        ),
    ],
)
def test_what_a_template_does_not_take_is_rewritten(
    text: str, messages: tuple[dict[str, Any], ...], expected: str
) -> None:
    assert Template(text).rendered(*messages) == expected


def test_ids_become_nine_letters_and_digits_alike_in_calls_and_results() -> None:
    template = Template(refusing("m.tool_calls and m.tool_calls[0].id | length != 9"))
    adapted = template.adapter.adapted([USER, called({"x": 1}, {}), result("one"), result("two", 1)], has_tools=True)
    calls = [call["id"] for call in adapted[1]["tool_calls"]]
    assert calls == [message["tool_call_id"] for message in adapted[2:]]
    assert len(set(calls)) == 2
    assert all(len(call_id) == 9 and call_id.isalnum() for call_id in calls)


@pytest.mark.parametrize(
    "text",
    [
        EVERYTHING,
        refusing("m.role == 'system' and not loop.first"),
        refusing("m.role == 'tool'"),
        refusing("m.tool_calls and m.tool_calls | length > 1"),
        refusing("m.tool_calls and m.tool_calls[0].id | length != 9"),
    ],
)
def test_the_prefix_stays_the_same_as_a_conversation_grows(text: str) -> None:
    template = Template(text)
    conversation = [*LOOP, ANSWER, USER, called({"z": 3}), result("three"), LATE]
    ends = [at for at in range(1, len(conversation) + 1) if conversation[at - 1]["role"] != "assistant"]
    ends = [at for at in ends if at == len(conversation) or conversation[at]["role"] != "tool"]
    whole = template.rendered(*conversation)
    for end in ends:
        assert whole.startswith(template.rendered(*conversation[:end]))


def test_a_template_that_took_too_long_is_tried_again() -> None:
    class SlowAtFirst(Template):
        def _probe(self, messages: list[dict[str, Any]], has_tools: bool) -> str:
            if not self.renders:
                self.renders += 1
                raise TemplateTimeoutError("it does not end within 10 s")
            return super()._probe(messages, has_tools)

    adapter = SlowAtFirst(refusing("m.role == 'tool'")).adapter
    with pytest.raises(TemplateTimeoutError):
        adapter.adapted(LOOP, has_tools=False)
    assert "tool" not in {message["role"] for message in adapter.adapted(LOOP, has_tools=False)}


def test_a_template_is_tried_once_for_each_shape() -> None:
    template = Template(refusing("m.role == 'tool'"))
    template.rendered(*LOOP)
    renders = template.renders
    assert renders > 0
    template.rendered(*LOOP, *LOOP)
    assert template.renders == renders
