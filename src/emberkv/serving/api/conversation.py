"""What the requests of every API are turned into: a conversation in the form of chat templates, and the constraint of
its answer.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Any, Literal

from llguidance.gbnf_to_lark import any_to_lark

from emberkv.engine.constraints import check_constraint
from emberkv.engine.request import Constraint
from emberkv.engine.tokenization.tokenizer import Tokenizer
from emberkv.errors import RequestError, reason_of
from emberkv.serving.answers.answer import OutputParsing, openai_call_id
from emberkv.serving.parsing.call_grammar import behind_reasoning, call_constraint, either
from emberkv.serving.parsing.formats import OutputFormat
from emberkv.validation import shown

Message = dict[str, Any]


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """Which tools an answer may call.

    mode: "none" forbids calls, "required" demands one. names: the only tools that may be called; empty: all.
    parallel: whether one answer may have several calls.
    """

    mode: Literal["auto", "none", "required"] = "auto"
    names: tuple[str, ...] = ()
    parallel: bool = True


@dataclass(frozen=True, slots=True)
class Conversation:
    """The conversation that is to be answered, in the form that transformers' chat templates take.

    messages: each with ``role`` and ``content`` (text); an assistant's may have ``reasoning_content`` (text) and
    ``tool_calls``, of which each is ``{"id", "type": "function", "function": {"name", "arguments": dict}}``, or text
    as arguments where the model wrote no JSON object; a tool's has ``tool_call_id``. tools: each
    ``{"type": "function", "function": {"name", "description", "parameters"}}``. They stay in the prompt whatever
    tool_choice is, so that the prefix stays the same.

    variables: of the template, as ``{"enable_thinking": False}``. begun: text that the answer begins with, which the
    client has given. left_out: how many parts of the request are not in the prompt because this server cannot use them,
    by type. add_generation_prompt, continue_final_message: as `Tokenizer.render_chat` takes them. ::

        Conversation([{"role": "user", "content": "Which lamps are lit?"}]).prompt_text(tokenizer)
    """

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] = ()
    tool_choice: ToolChoice = ToolChoice()
    variables: Mapping[str, Any] = field(default_factory=dict)
    begun: str = ""
    left_out: Mapping[str, int] = field(default_factory=dict)
    add_generation_prompt: bool = True
    continue_final_message: bool = False

    @property
    def system_text(self) -> str:
        """What the conversation begins with before the first message that is not the system's."""
        leading = takewhile(lambda message: message.get("role") in ("system", "developer"), self.messages)
        return "\n".join(content for message in leading if isinstance(content := message.get("content"), str))

    @property
    def beginning(self) -> int:
        """A hash of the messages up to the first answer, which the conversation's later turns have, too. Other
        processes have other hashes.
        """
        first = takewhile(lambda message: message["role"] != "assistant", self.messages)
        return hash(tuple((message["role"], str(message.get("content"))) for message in first))

    @property
    def goes_on(self) -> bool:
        """Whether further turns are to be expected: there are tools or an earlier answer, unlike in a side call such as
        one for a title.
        """
        return bool(self.tools) or any(message["role"] == "assistant" for message in self.messages)

    def counting_unread(self, tokenizer: Tokenizer) -> "Conversation":
        """The same, where variables that the model's chat template does not read are counted as left out.

        A template that reads ``enable_thinking`` knows by it of the effort "none".
        """
        unread = {name for name in self.variables if not tokenizer.template_reads(name)}
        if self.variables.get("reasoning_effort") == "none" and "enable_thinking" not in unread:
            unread.discard("reasoning_effort")
        left_out = Counter(self.left_out)
        for name in sorted(unread):
            count_left_out(left_out, name)
        return replace(self, left_out=left_out)

    def prompt_text(self, tokenizer: Tokenizer) -> str:
        """The prompt, up to where the answer goes on.

        Raises RequestError for a conversation that the model's chat template does not take.
        """
        rendered = tokenizer.render_chat(
            with_result_names(self.messages),
            tools=self.tools or None,
            add_generation_prompt=self.add_generation_prompt,
            continue_final_message=self.continue_final_message,
            variables=self.variables,
        )
        return rendered + self.begun

    def constraint(
        self, output_format: OutputFormat, prompt_text: str, wanted: Constraint | None = None
    ) -> Constraint | None:
        """Which answers the conversation allows a model of ``output_format`` to ``prompt_text``, this rendered.

        wanted: what the request demands of the answer's text, which thoughts may precede. With tools that may be
        called, the answer is that, or calls; before these, there may be text if the form is JSON.

        Raises RequestError for tools that cannot be demanded of the model, and where both calls and a form of the text
        are demanded.
        """
        in_reasoning = output_format.ends_in_reasoning(prompt_text, self.begun)
        calls = call_constraint(output_format, self.tools, self.tool_choice, in_reasoning=in_reasoning)
        if wanted is None:
            return calls
        if self.tool_choice.mode == "required":
            raise RequestError(
                "tool_choice demands a tool call, and the request demands a form of the answer's text, too; "
                "send one of them",
                param="tool_choice",
            )
        form = behind_reasoning(wanted, output_format, in_reasoning=in_reasoning)
        if not self.tools or self.tool_choice.mode == "none" or output_format.tools is None:
            return form
        demanded = replace(self.tool_choice, mode="required")
        is_json = wanted.kind in ("json_schema", "json_object")
        calls = call_constraint(output_format, self.tools, demanded, in_reasoning=in_reasoning, prose_first=is_json)
        return form if calls is None else either(calls, form)

    def parsing(
        self, output_format: OutputFormat, prompt_text: str, new_call_id: Callable[[], str] = openai_call_id
    ) -> OutputParsing:
        """How the answer is parsed that a model of ``output_format`` gives to ``prompt_text``, this rendered."""
        return OutputParsing(
            output_format,
            () if self.tool_choice.mode == "none" else self.tools,
            output_format.ends_in_reasoning(prompt_text, self.begun),
            self.tool_choice.parallel,
            new_call_id,
        )


_NAME = re.compile("[a-z0-9_-]{1,40}")
_MOST_KINDS = 20


def count_left_out(counts: Counter[str], kind: str) -> None:
    """Count a part that is left out. kind: its type, as the client wrote it, which is counted as "other" where it would
    not do in a header or a log.
    """
    counts[kind if _NAME.fullmatch(kind) and (kind in counts or len(counts) < _MOST_KINDS) else "other"] += 1


def placeholder(kind: str) -> str:
    """What stands in a prompt for a part that a text model cannot read.

    >>> placeholder("image")
    '[image left out]'
    """
    return f"[{kind.replace('_', ' ')} left out]"


def with_result_names(messages: Sequence[Mapping[str, Any]]) -> list[Message]:
    """The messages, in which each tool result has the name of the tool.

    Clients name a result by its call's id alone, while some chat templates show the tool's name.
    """
    names: dict[str, str] = {}
    named: list[Message] = []
    for message in messages:
        calls = message.get("tool_calls") or ()
        names |= {call["id"]: call["function"]["name"] for call in calls if isinstance(call.get("id"), str)}
        of_call = message.get("tool_call_id")
        is_named = message["role"] != "tool" or message.get("name") or not isinstance(of_call, str)
        named.append({**message} if is_named or of_call not in names else {**message, "name": names[of_call]})
    return named


STRUCTURED_FIELDS = ("guided_json", "guided_regex", "guided_choice", "guided_grammar", "structured_outputs")
"""vLLM's request fields for structured output, which are accepted as alternatives to ``response_format``."""

_FORMATS = ("json", "regex", "choice", "grammar", "json_object")
_HARMLESS = frozenset({"disable_any_whitespace", "disable_additional_properties", "disable_fallback"})


def constraint_of_response_format(given: object, param: str = "response_format") -> Constraint | None:
    """The checked constraint for OpenAI's ``response_format``, the Responses API's ``text.format`` or Anthropic's
    ``output_config.format``; None for plain text.

    The schema is read from ``json_schema.schema`` or from ``schema``. It is enforced whether or not ``strict`` is set.

    Raises RequestError for another type, and for a schema that cannot be compiled.
    """
    if given is None:
        return None
    if not isinstance(given, Mapping):
        raise RequestError(f"{param} is {shown(given)}; it must be an object with a type", param=param)
    match given.get("type"):
        case "text":
            return None
        case "json_object":
            return Constraint("json_object")
        case "json_schema":
            nested = given.get("json_schema")
            owner, place = (nested, f"{param}.json_schema") if isinstance(nested, Mapping) else (given, param)
            if owner.get("schema") is None:
                raise RequestError(f"{place}.schema is missing; it is required", param=f"{place}.schema")
            return _json_schema(owner["schema"], f"{place}.schema")
        case other:
            raise RequestError(
                f"{param}.type is {shown(other)}; it must be 'text', 'json_object' or 'json_schema'",
                param=f"{param}.type",
            )


def constraint_of_body(body: Mapping[str, Any]) -> Constraint | None:
    """The checked constraint for ``response_format`` or one of `STRUCTURED_FIELDS`; None if the request has none.

    body: the request's fields by name.

    Raises RequestError for more than one of these fields, for an unsupported value, and for a constraint that cannot
    be compiled.
    """
    found = {"response_format": constraint_of_response_format(body.get("response_format"))}
    for name in STRUCTURED_FIELDS:
        value = body.get(name)
        if value is None:
            continue
        if name == "structured_outputs":
            found[name] = _structured_outputs(value)
        else:
            found[name] = _vllm_constraint(name.removeprefix("guided_"), value, name)
    asked = {name: constraint for name, constraint in found.items() if constraint is not None}
    if len(asked) > 1:
        raise RequestError(f"{' and '.join(asked)} are both given; send one of them", param=list(asked)[1])
    return next(iter(asked.values()), None)


def _structured_outputs(given: object) -> Constraint | None:
    param = "structured_outputs"
    if not isinstance(given, Mapping):
        raise RequestError(f"{param} is {shown(given)}; it must be an object", param=param)
    asked = {name: value for name, value in given.items() if value not in (None, False) and name not in _HARMLESS}
    unknown = next((name for name in asked if name not in _FORMATS), None)
    if unknown is not None:
        raise RequestError(
            f"{param}.{unknown} is not supported; use one of {', '.join(_FORMATS)}",
            param=f"{param}.{unknown}",
        )
    if len(asked) != 1:
        raise RequestError(f"{param} has {len(asked)} formats; it must have one of {', '.join(_FORMATS)}", param=param)
    ((name, value),) = asked.items()
    return _vllm_constraint(name, value, f"{param}.{name}")


def _vllm_constraint(name: str, value: object, param: str) -> Constraint:
    match name:
        case "json_object":
            return Constraint("json_object")
        case "json":
            return _json_schema(value, param)
        case "choice":
            if not isinstance(value, list) or not value or not all(isinstance(each, str) for each in value):
                raise RequestError(f"{param} is {shown(value)}; it must be a list of strings", param=param)
            return check_constraint(Constraint("lark", f"start: {' | '.join(map(json.dumps, value))}"), param)
    if not isinstance(value, str):
        raise RequestError(f"{param} must be a string", param=param)
    if name == "regex":
        return check_constraint(Constraint("regex", value), param)
    try:
        lark = any_to_lark(value)
    except Exception as error:  # the converter raises various errors for invalid text
        raise RequestError(f"{param} is neither Lark nor GBNF: {reason_of(error)}", param=param) from error
    return check_constraint(Constraint("lark", lark), param)


def _json_schema(schema: object, param: str) -> Constraint:
    """schema: an object, or its JSON text."""
    text = schema if isinstance(schema, str) else json.dumps(schema)
    return check_constraint(Constraint("json_schema", text), param)
