"""Rewrites agents' conversations for chat templates that cannot render them as they are.

A template may reject a tool call's id, a second system message or two user messages in a row, or it may silently drop
tool calls. Whether a template needs a rewrite is found by rendering a small probe conversation, once for each template,
when the first conversation of that shape arrives. The result does not depend on later messages, so the rendered prefix
stays the same while a conversation grows.
"""

import hashlib
import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from emberkv.engine.tokenization.template_check import TemplateTimeoutError

Message = dict[str, Any]
Messages = list[Message]
Render = Callable[[Messages, bool], str]
"""Renders messages, with tools if the flag is set. Raises an exception of any type if the template rejects them."""

_log = logging.getLogger(__name__)

_SHORT_ID = re.compile(r"[A-Za-z0-9]{9}")
_IDS = ("lamp00001", "lamp00002")


@dataclass(frozen=True, slots=True)
class Adaptation:
    """A rewrite of messages that some templates cannot render.

    what: names the messages in the log. is_in: whether a conversation has such messages. probe: a conversation with
    such messages. words: parts of the probe's text, all of which a suitable template renders. adapt: returns the
    rewritten messages.
    """

    what: str
    is_in: Callable[[Messages], bool]
    probe: Messages
    words: tuple[str, ...]
    adapt: Callable[[Messages], Messages]


class TemplateAdapter:
    """Adapts conversations to one chat template."""

    def __init__(self, render: Render) -> None:
        self._render = render
        self._needed: dict[tuple[str, bool], bool] = {}

    def adapted(self, messages: Sequence[Mapping[str, Any]], *, has_tools: bool) -> Messages:
        """The messages, with the rewrites that the template needs.

        has_tools: whether the conversation is rendered with tools, for which a model may have a separate template.
        """
        result = [dict(message) for message in messages]
        for position, adaptation in enumerate(ADAPTATIONS):
            if adaptation.is_in(result) and self._needs(position, has_tools):
                result = adaptation.adapt(result)
        return result

    def _needs(self, position: int, has_tools: bool) -> bool:
        adaptation = ADAPTATIONS[position]
        key = (adaptation.what, has_tools)
        if key not in self._needed:
            probe = [dict(message) for message in adaptation.probe]
            for before in range(position):
                if ADAPTATIONS[before].is_in(probe) and self._needs(before, has_tools):
                    probe = ADAPTATIONS[before].adapt(probe)
            self._needed[key] = not self._takes(probe, adaptation.words, has_tools) and self._takes(
                adaptation.adapt(probe), adaptation.words, has_tools
            )
            if self._needed[key]:
                _log.info("the chat template cannot render %s; they are rewritten for it", adaptation.what)
        return self._needed[key]

    def _takes(self, messages: Messages, words: Sequence[str], has_tools: bool) -> bool:
        try:
            rendered = self._render(messages, has_tools)
        except TemplateTimeoutError:  # this shows a busy machine, not a limit of the template
            raise
        except Exception:  # noqa: BLE001 - a template's code may raise anything; each error rejects the messages
            return False
        return all(word in rendered for word in words)


def _called(*arguments: object, text: str = "", ids: Sequence[str] = _IDS) -> Message:
    calls = [
        {"id": call_id, "type": "function", "function": {"name": f"probe_lamp_{number}", "arguments": given}}
        for number, (call_id, given) in enumerate(zip(ids, arguments, strict=False), 1)
    ]
    return {"role": "assistant", "content": text, "tool_calls": calls}


def _result(text: str, call_id: str, number: int = 1) -> Message:
    return {"role": "tool", "content": text, "tool_call_id": call_id, "name": f"probe_lamp_{number}"}


_SYSTEM = {"role": "system", "content": "You count lamps."}
_USER = {"role": "user", "content": "Which lamps are lit?"}
_ANSWER = {"role": "assistant", "content": "Two of them."}
_ONE_CALL = [_USER, _called({"street": "Elmstreet"}), _result("litresult", _IDS[0])]


def _calls(messages: Messages) -> Messages:
    return [call for message in messages for call in message.get("tool_calls") or ()]


def _with_arguments(convert: Callable[[Any], Any]) -> Callable[[Messages], Messages]:
    def rewrite(message: Message) -> Message:
        calls = [
            {**call, "function": {**call["function"], "arguments": convert(call["function"]["arguments"])}}
            for call in message.get("tool_calls") or ()
        ]
        return {**message, "tool_calls": calls} if calls else message

    return lambda messages: [rewrite(message) for message in messages]


def _json(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _calls_as_text(messages: Messages) -> Messages:
    def rewrite(message: Message) -> Message:
        if message["role"] == "tool":
            return {"role": "user", "content": f"<tool_response>\n{message['content']}\n</tool_response>"}
        calls = [{key: call["function"][key] for key in ("name", "arguments")} for call in _calls([message])]
        texts = [f"<tool_call>\n{json.dumps(call, ensure_ascii=False)}\n</tool_call>" for call in calls]
        rest = {key: value for key, value in message.items() if key != "tool_calls"}
        return {**rest, "content": "\n".join(filter(None, (message["content"], *texts)))}

    return [rewrite(message) for message in messages]


def _short_id(call_id: object) -> str:
    """The id itself if it is nine letters and digits, else the first nine hex digits of its SHA-256."""
    text = str(call_id)
    return text if _SHORT_ID.fullmatch(text) else hashlib.sha256(text.encode(errors="replace")).hexdigest()[:9]


def _ids(messages: Messages) -> list[object]:
    results = [message.get("tool_call_id") for message in messages if message["role"] == "tool"]
    return [call.get("id") for call in _calls(messages)] + results


def _with_short_ids(messages: Messages) -> Messages:
    def rewrite(message: Message) -> Message:
        if message["role"] == "tool":
            return {**message, "tool_call_id": _short_id(message.get("tool_call_id"))}
        calls = [{**call, "id": _short_id(call.get("id"))} for call in _calls([message])]
        return {**message, "tool_calls": calls} if calls else message

    return [rewrite(message) for message in messages]


def _one_call_each(messages: Messages) -> Messages:
    """Split messages with several calls: each call gets a message of its own, followed by its result."""
    result: Messages = []
    at = 0
    while at < len(messages):
        message, at = messages[at], at + 1
        if len(_calls([message])) < 2:
            result.append(message)
            continue
        end = next((end for end in range(at, len(messages)) if messages[end]["role"] != "tool"), len(messages))
        result += _split(message, messages[at:end])
        at = end
    return result


def _split(message: Message, results: Messages) -> Messages:
    split: Messages = []
    for call in _calls([message]):
        alone = {"role": "assistant", "content": ""} if split else message
        own = [each for each in results if each.get("tool_call_id") == call.get("id")]
        split += [{**alone, "tool_calls": [call]}, *own]
        results = [each for each in results if each not in own]
    return split + results


def _has_text_beside_call(messages: Messages) -> bool:
    return any(_calls([message]) and message["content"].strip() for message in messages)


def _text_before_calls(messages: Messages) -> Messages:
    result: Messages = []
    for message in messages:
        if _has_text_beside_call([message]):
            result.append({key: value for key, value in message.items() if key != "tool_calls"})
            result.append({"role": "assistant", "content": "", "tool_calls": message["tool_calls"]})
        else:
            result.append(message)
    return result


def _leading_systems(messages: Messages) -> int:
    return next((at for at, message in enumerate(messages) if message["role"] != "system"), len(messages))


def _one_leading_system(messages: Messages) -> Messages:
    count = _leading_systems(messages)
    return [_merged(messages[:count]), *messages[count:]]


def _system_as_user(messages: Messages) -> Messages:
    """Turn system messages into user messages. Leading ones are merged with the user message that follows them."""
    count = _leading_systems(messages)
    behind = messages[count : count + 1] if messages[count : count + 1] and messages[count]["role"] == "user" else []
    beginning = {**_merged([*messages[:count], *behind]), "role": "user"}
    return [beginning, *_late_systems_as_users(messages[count + len(behind) :])]


def _late_systems_as_users(messages: Messages) -> Messages:
    count = _leading_systems(messages)
    rest = [{**message, "role": "user"} if message["role"] == "system" else message for message in messages[count:]]
    return messages[:count] + rest


def _are_neighbours(one: Message, other: Message) -> bool:
    return bool(one["role"] == other["role"] and one["role"] in ("user", "assistant"))


def _neighbours_merged(messages: Messages) -> Messages:
    result: Messages = []
    for message in messages:
        if result and _are_neighbours(result[-1], message):
            result[-1] = _merged([result[-1], message])
        else:
            result.append(message)
    return result


def _merged(messages: Messages) -> Message:
    """The messages as one: the fields of the first, with the contents and the tool calls of all."""
    merged = {**messages[0], "content": "\n\n".join(filter(None, (each["content"] for each in messages)))}
    calls = _calls(messages)
    return {**merged, "tool_calls": calls} if calls else merged


ADAPTATIONS = (
    Adaptation(
        "arguments of calls as objects",
        lambda messages: any(isinstance(call["function"]["arguments"], dict) for call in _calls(messages)),
        _ONE_CALL,
        ("Elmstreet",),
        _with_arguments(_json),
    ),
    Adaptation(
        "arguments of calls as text",
        lambda messages: any(isinstance(call["function"]["arguments"], str) for call in _calls(messages)),
        [_USER, _called("Elmstreet{"), _result("litresult", _IDS[0])],
        ("Elmstreet",),
        _with_arguments(lambda given: {"arguments": given} if isinstance(given, str) else given),
    ),
    Adaptation(
        "tool calls and their results",
        lambda messages: bool(_calls(messages)) or any(message["role"] == "tool" for message in messages),
        _ONE_CALL,
        ("probe_lamp_1", "Elmstreet", "litresult"),
        _calls_as_text,
    ),
    Adaptation(
        "ids of calls that are not nine letters and digits",
        lambda messages: any(not _SHORT_ID.fullmatch(str(call_id)) for call_id in _ids(messages)),
        [
            _USER,
            _called({"street": "Elmstreet"}, ids=["call_0123456789abcdef01234567"]),
            _result("litresult", "call_0123456789abcdef01234567"),
        ],
        ("Elmstreet", "litresult"),
        _with_short_ids,
    ),
    Adaptation(
        "several calls in one message",
        lambda messages: any(len(_calls([message])) > 1 for message in messages),
        [
            _USER,
            _called({"street": "Elmstreet"}, {"street": "Oakstreet"}),
            _result("litresult", _IDS[0]),
            _result("darkresult", _IDS[1], 2),
        ],
        ("Elmstreet", "Oakstreet", "litresult", "darkresult"),
        _one_call_each,
    ),
    Adaptation(
        "text beside calls",
        _has_text_beside_call,
        [_USER, _called({"street": "Elmstreet"}, text="Lookingfirst."), _result("litresult", _IDS[0])],
        ("Lookingfirst.", "Elmstreet", "litresult"),
        _text_before_calls,
    ),
    Adaptation(
        "two system messages at the beginning",
        lambda messages: _leading_systems(messages) > 1,
        [_SYSTEM, {"role": "system", "content": "Countagain."}, _USER],
        ("You count lamps.", "Countagain.", "Which lamps are lit?"),
        _one_leading_system,
    ),
    Adaptation(
        "system messages",
        lambda messages: any(message["role"] == "system" for message in messages),
        [_SYSTEM, _USER],
        ("You count lamps.", "Which lamps are lit?"),
        _system_as_user,
    ),
    Adaptation(
        "system messages behind the first message",
        lambda messages: any(message["role"] == "system" for message in messages[_leading_systems(messages) :]),
        [_SYSTEM, _USER, _ANSWER, {"role": "system", "content": "Countagain."}],
        ("You count lamps.", "Two of them.", "Countagain."),
        _late_systems_as_users,
    ),
    Adaptation(
        "two messages in a row of one role",
        lambda messages: any(map(_are_neighbours, messages, messages[1:])),
        [_USER, {"role": "user", "content": "Countagain."}],
        ("Which lamps are lit?", "Countagain."),
        _neighbours_merged,
    ),
)
"""In the order in which they are applied. Each probe is first rewritten by the earlier adaptations that apply."""
