"""Requests of the Anthropic API: their fields, and their messages in the form of chat templates."""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

from pydantic import Field

from emberkv.engine.request import MAX_STOP_STRINGS, Constraint, SamplingParams
from emberkv.errors import RequestError
from emberkv.serving.api.conversation import (
    Conversation,
    Message,
    ToolChoice,
    constraint_of_response_format,
    count_left_out,
    placeholder,
)
from emberkv.serving.api.validation import Integer, RequestBody, string_field

Block = Mapping[str, Any]

_ROLES = ("user", "assistant", "system")
_LEFT_OUT = frozenset({"image", "document", "container_upload", "server_tool_use", "mcp_tool_use", "redacted_thinking"})
_RESULT_OF_SERVER = "_tool_result"
"""The suffix of the types of blocks with results of tools on Anthropic's servers."""


@dataclass(slots=True)
class BlockReader:
    """Converts messages to those of a chat template.

    left_out: counts of the blocks that a text model cannot read, by type. Each is replaced by a short text, so that an
    image in the history does not end a conversation.

    All methods raise RequestError naming the place of an invalid value.
    """

    left_out: Counter[str] = field(default_factory=Counter)

    def messages(self, given: Iterable[Mapping[str, Any]]) -> list[Message]:
        """Convert a request's messages. Errors name the place of each as ``messages.INDEX``."""
        return [message for index, each in enumerate(given) for message in self._read(each, f"messages.{index}")]

    def text(self, content: object, place: str) -> str:
        """The content of a system prompt, a user's message or a tool's result: a string, or blocks, one a line."""
        if isinstance(content, str):
            return content
        if not isinstance(content, list):
            raise RequestError(f"{place} must be a string or a list of content blocks", param=place)
        return "\n".join(filter(None, (self._block_text(block, at) for block, at in _placed(content, place))))

    def _read(self, message: Mapping[str, Any], place: str) -> list[Message]:
        role, content = message.get("role"), message.get("content")
        if role not in _ROLES:
            raise RequestError(
                f"{place}.role is {role!r}; it must be one of {', '.join(_ROLES)}", param=f"{place}.role"
            )
        if not isinstance(content, list) or role == "system":
            return [{"role": role, "content": self.text(content, f"{place}.content")}]
        if role == "assistant":
            return [self._answer(content, f"{place}.content")]
        return self._question(content, f"{place}.content")

    def _question(self, blocks: Sequence[object], place: str) -> list[Message]:
        """A user's message: first the results of tools, each as a message of its own, then the user's text."""
        results: list[Message] = []
        texts: list[str] = []
        for block, at in _placed(blocks, place):
            if block.get("type") == "tool_result":
                results.append(self._result(block, at))
            else:
                texts.append(self._block_text(block, at))
        own: Message = {"role": "user", "content": "\n".join(filter(None, texts))}
        return [*results, own] if texts or not results else results

    def _answer(self, blocks: Sequence[object], place: str) -> Message:
        """An assistant's message. Its texts are joined without a separator, as the API splits one text into blocks."""
        texts: list[str] = []
        thoughts: list[str] = []
        calls: list[Message] = []
        for block, at in _placed(blocks, place):
            match block:
                case {"type": "tool_use"}:
                    calls.append(_call(block, at))
                case {"type": "thinking"}:
                    thoughts.append(string_field(block, "thinking", at))
                case {"type": "redacted_thinking"}:  # encrypted by another service: there is no text to stand for it
                    count_left_out(self.left_out, "redacted_thinking")
                case _:
                    texts.append(self._block_text(block, at))
        answer: Message = {"role": "assistant", "content": "".join(texts)}
        if any(thoughts):
            answer["reasoning_content"] = "\n".join(filter(None, thoughts))
        if calls:
            answer["tool_calls"] = calls
        return answer

    def _result(self, block: Block, place: str) -> Message:
        text = self.text(block.get("content") or "", f"{place}.content")
        if block.get("is_error") is True and "error" not in text[:40].lower():
            text = f"Error: {text}" if text else "Error"
        return {"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": text}

    def _block_text(self, block: Block, place: str) -> str:
        match block:
            case {"type": "document", "source": {"type": "text", "data": str(text)}}:
                return "\n".join(filter(None, (_title(block), text)))
            case {"type": "document", "source": {"type": "content", "content": str(text)}}:
                return "\n".join(filter(None, (_title(block), text)))
            case {"type": "document", "source": {"type": "content", "content": list(parts)}}:
                return self._titled(block, parts, f"{place}.source.content")
            case {"type": "search_result", "content": list(parts)}:
                return self._titled(block, parts, f"{place}.content")
            case {"type": "tool_reference", "tool_name": str(name)}:
                return f"[tool {name}]"
        return self._simple_text(block, place)

    def _titled(self, block: Block, parts: Sequence[object], place: str) -> str:
        """The text of a block with inner blocks, which can only be texts and images, so that nesting is bounded."""
        texts = [self._simple_text(part, at) for part, at in _placed(parts, place)]
        return "\n".join(filter(None, (_title(block), *texts)))

    def _simple_text(self, block: Block, place: str) -> str:
        kind = block.get("type")
        if kind == "text":
            return string_field(block, "text", place)
        if isinstance(kind, str) and kind != "tool_result" and (kind in _LEFT_OUT or kind.endswith(_RESULT_OF_SERVER)):
            count_left_out(self.left_out, kind)
            return placeholder(kind)
        raise RequestError(f"{place} has type {kind!r}; this server reads text, so it must be 'text'", param=place)


def _placed(blocks: Sequence[object], place: str) -> Iterator[tuple[Block, str]]:
    """The blocks, each with its place in the request."""
    for index, block in enumerate(blocks):
        at = f"{place}.{index}"
        if not isinstance(block, dict):
            raise RequestError(f"{at} has type {type(block).__name__!r}; it must be an object with a type", param=at)
        yield block, at


def template_tools(tools: Iterable[Mapping[str, Any]], left_out: Counter[str]) -> list[Message]:
    """Tools in the form of chat templates. Tools that only Anthropic's service defines are counted in left_out.

    Raises RequestError naming the place of an invalid tool.
    """
    return [_tool(tool, f"tools.{at}") for at, tool in enumerate(tools) if not _is_left_out(tool, left_out)]


def _is_left_out(tool: Mapping[str, Any], left_out: Counter[str]) -> bool:
    """Whether the tool has a type such as web_search_20250305, and so no schema for the prompt."""
    kind = tool.get("type")
    if not isinstance(kind, str) or kind == "custom" or "input_schema" in tool:
        return False
    count_left_out(left_out, kind)
    return True


def _tool(tool: Mapping[str, Any], place: str) -> Message:
    name, schema = tool.get("name"), tool.get("input_schema")
    if not isinstance(name, str) or not isinstance(schema, dict):
        raise RequestError(f"{place} must have a name (string) and an input_schema (object)", param=place)
    function = {"name": name, "description": tool.get("description") or "", "parameters": schema}
    if tool.get("strict") is True:
        function["strict"] = True
    return {"type": "function", "function": function}


def _call(block: Block, place: str) -> Message:
    name, arguments = block.get("name"), block.get("input")
    if not isinstance(name, str) or not isinstance(arguments, dict):
        raise RequestError(f"{place} must have a name (string) and an input (object)", param=place)
    return {"id": block.get("id"), "type": "function", "function": {"name": name, "arguments": arguments}}


def _title(block: Block) -> str:
    """The title and the source of a document or a search result, one a line."""
    return "\n".join(value for name in ("title", "source") if isinstance(value := block.get(name), str) and value)


_WITHOUT_EFFECT = frozenset({"inference_geo", "service_tier"})
"""Fields that no class here names and that change no answer of this server."""

_MODES: dict[str, Literal["auto", "none", "required"]] = {
    "auto": "auto",
    "any": "required",
    "tool": "required",
    "none": "none",
}
_THINKING = ("enabled", "adaptive", "disabled")


class PromptRequest(RequestBody):
    """The body of POST /v1/messages/count_tokens, and what POST /v1/messages has in common with it."""

    model: str
    messages: list[dict[str, Any]]
    system: str | list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: dict[str, Any] | None = None
    thinking: dict[str, Any] | None = None
    output_config: dict[str, Any] | None = None
    output_format: dict[str, Any] | None = None
    cache_control: dict[str, Any] | None = None
    metadata: dict[str, Any] | None = None

    @property
    def user_id(self) -> str:
        """``metadata.user_id``, by which agents name their session; "" without one."""
        given = (self.metadata or {}).get("user_id")
        return given if isinstance(given, str) else ""

    def conversation(self) -> Conversation:
        """The conversation that is to be answered. If the last message is the assistant's, the answer continues it.

        Raises RequestError naming the place of what cannot be used.
        """
        self.refuse("mcp_servers", "container")
        if not self.messages:
            raise RequestError("messages is empty; it must hold at least one message", param="messages")
        reader = BlockReader()
        messages: list[Message] = []
        if system := reader.text(self.system or "", "system"):
            messages.append({"role": "system", "content": system})
        messages += reader.messages(self.messages)
        begun, last = "", messages[-1]
        is_begun = last["role"] == "assistant" and "tool_calls" not in last
        is_continued = is_begun and bool(last["content"].strip()) and "reasoning_content" in last
        if is_begun and not is_continued:
            begun = messages.pop()["content"]
        tools = template_tools(self.tools or (), reader.left_out)
        self._count_unknown(reader.left_out)
        return Conversation(
            messages,
            tools,
            self._tool_choice(tools),
            variables=self._template_variables(),
            begun=begun,
            left_out=reader.left_out,
            add_generation_prompt=not is_continued,
            continue_final_message=is_continued,  # so that the template writes its thoughts
        )

    def constraint(self) -> Constraint | None:
        """What ``output_config.format``, formerly ``output_format``, asks for. Raises RequestError."""
        nested = (self.output_config or {}).get("format")
        if nested is not None:
            return constraint_of_response_format(nested, "output_config.format")
        return constraint_of_response_format(self.output_format, "output_format")

    def _count_unknown(self, left_out: Counter[str]) -> None:
        """Count the unknown fields, which are ignored."""
        for name, value in (self.model_extra or {}).items():
            if value and name not in _WITHOUT_EFFECT and not (name == "context_management" and _keeps_all(value)):
                count_left_out(left_out, name)

    def _tool_choice(self, tools: list[Message]) -> ToolChoice:
        choice = self.tool_choice or {"type": "auto"}
        kind = _choice(choice, "tool_choice", _MODES)
        if kind in ("any", "tool") and not tools:
            raise RequestError(f"tool_choice.type is {kind!r}, and there are no tools to call", param="tool_choice")
        names: tuple[str, ...] = ()
        if kind == "tool":
            names = tuple(name for tool in tools if (name := tool["function"]["name"]) == choice.get("name"))[:1]
            if not names:
                raise RequestError(
                    f"tool_choice.name is {choice.get('name')!r}; it must be the name of one of the tools",
                    param="tool_choice",
                )
        return ToolChoice(_MODES[kind], names, choice.get("disable_parallel_tool_use") is not True)

    def _template_variables(self) -> dict[str, Any]:
        variables: dict[str, Any] = {}
        if self.thinking:
            variables["enable_thinking"] = _choice(self.thinking, "thinking", _THINKING) != "disabled"
        if isinstance(effort := (self.output_config or {}).get("effort"), str):
            variables["reasoning_effort"] = effort
        return variables


def _choice(given: dict[str, Any], field: str, accepted: Collection[str]) -> str:
    """The type of an option. Raises RequestError for one that is not accepted."""
    kind = given.get("type")
    if not isinstance(kind, str) or kind not in accepted:
        raise RequestError(f"{field}.type is {kind!r}; it must be one of {', '.join(accepted)}", param=field)
    return kind


def _keeps_all(context_management: object) -> bool:
    """Whether no edit takes anything out of the conversation. Claude Code sends such an edit with each request."""
    edits = context_management.get("edits") if isinstance(context_management, dict) else None
    return isinstance(edits, list) and all(isinstance(edit, dict) and edit.get("keep") == "all" for edit in edits)


class MessagesRequest(PromptRequest):
    """The body of POST /v1/messages. max_tokens: 0 computes the prompt, so that it is cached, and answers nothing."""

    max_tokens: Annotated[Integer, Field(ge=0)]
    stream: bool | None = None
    temperature: Annotated[float, Field(ge=0, le=1)] | None = None
    top_p: float | None = None
    top_k: Integer | None = None
    stop_sequences: Annotated[
        list[Annotated[str, Field(min_length=1)]], Field(max_length=MAX_STOP_STRINGS)
    ] | None = None  # fmt: skip

    def sampling(self, defaults: SamplingParams, max_tokens: int, constraint: Constraint | None) -> SamplingParams:
        """defaults: the model's, for fields that the request does not give.

        Raises RequestError when a value is out of range.
        """
        given = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        fields: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        fields |= {"stop": tuple(self.stop_sequences or ()), "constraint": constraint}
        return replace(defaults, max_tokens=max(1, max_tokens), **fields)
