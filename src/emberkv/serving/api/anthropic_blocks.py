"""Converts messages of the Anthropic API to those of chat templates, with text, reasoning, calls and results."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from emberkv.errors import RequestError
from emberkv.serving.api.conversation import Message, count_left_out, placeholder
from emberkv.serving.api.validation import string_field

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
