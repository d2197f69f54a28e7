"""Requests of the Anthropic API, and their messages as chat templates take them."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any

from pydantic import Field

from emberkv.engine.request import MAX_STOP_STRINGS, SamplingParams
from emberkv.engine.tokenization.tokenizer import Tokenizer
from emberkv.errors import RequestError
from emberkv.serving.api.conversation import Conversation
from emberkv.serving.api.validation import RequestBody, part_text, plain_text

_PASSED_OVER = ("thinking", "redacted_thinking")  # an earlier answer's thoughts are not part of the conversation


class PromptRequest(RequestBody):
    """The body of POST /v1/messages/count_tokens, and what POST /v1/messages has in common with it."""

    model: str
    messages: list[dict[str, Any]]
    system: str | list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: dict[str, Any] | None = None
    cache_control: dict[str, Any] | None = None
    metadata: dict[str, Any] | None = None

    @property
    def user_id(self) -> str:
        """``metadata.user_id``, by which agents name their session; "" without one."""
        given = (self.metadata or {}).get("user_id")
        return given if isinstance(given, str) else ""

    def prompt_text(self, tokenizer: Tokenizer) -> str:
        """The rendered prompt. An answer that the last message begins is continued.

        Raises RequestError naming the place of what cannot be used.
        """
        messages = self._template_messages()
        begun = ""
        if messages[-1]["role"] == "assistant" and "tool_calls" not in messages[-1]:
            begun = messages.pop()["content"]
        return Conversation(messages, self._template_tools() or (), begun=begun).prompt_text(tokenizer)

    def _template_messages(self) -> list[dict[str, Any]]:
        if not self.messages:
            raise RequestError("messages is empty; it must hold at least one message", param="messages")
        plain: list[dict[str, Any]] = []
        if self.system:
            plain.append({"role": "system", "content": plain_text(self.system, "system")})
        for index, message in enumerate(self.messages):
            plain += _messages_of(message, f"messages.{index}")
        return plain

    def _template_tools(self) -> list[dict[str, Any]] | None:
        choice = (self.tool_choice or {"type": "auto"}).get("type")
        if choice not in ("auto", "none"):
            raise RequestError(
                f"tool_choice.type is {choice!r}; only 'auto' and 'none' are supported", param="tool_choice"
            )
        if choice == "none" or not self.tools:
            return None
        return [_template_tool(tool, f"tools.{index}") for index, tool in enumerate(self.tools)]


class MessagesRequest(PromptRequest):
    """The body of POST /v1/messages. max_tokens: 0 computes the prompt, so that it is cached, and answers nothing."""

    max_tokens: Annotated[int, Field(ge=0)]
    stream: bool | None = None
    temperature: Annotated[float, Field(ge=0, le=1)] | None = None
    top_p: float | None = None
    top_k: int | None = None
    stop_sequences: Annotated[
        list[Annotated[str, Field(min_length=1)]], Field(max_length=MAX_STOP_STRINGS)
    ] | None = None  # fmt: skip

    def sampling(self, defaults: SamplingParams, max_tokens: int) -> SamplingParams:
        """defaults: the model's, for fields that the request does not give.

        Raises RequestError when a value is out of range.
        """
        given = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        fields: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        return replace(defaults, max_tokens=max(1, max_tokens), stop=tuple(self.stop_sequences or ()), **fields)


def _messages_of(message: Mapping[str, Any], place: str) -> list[dict[str, Any]]:
    """One API message as template messages: tool results come first, each as a message of its own."""
    role = message.get("role")
    if role not in ("user", "assistant"):
        raise RequestError(f"{place}.role is {role!r}; it must be 'user' or 'assistant'", param=f"{place}.role")
    content = message.get("content")
    if not isinstance(content, list):
        return [{"role": role, "content": plain_text(content, f"{place}.content")}]
    texts: list[str] = []
    calls: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    for index, block in enumerate(content):
        at = f"{place}.content.{index}"
        kind = block.get("type") if isinstance(block, dict) else None
        if kind == "tool_use" and role == "assistant":
            calls.append(_template_call(block, at))
        elif kind == "tool_result" and role == "user":
            results.append(_template_result(block, at))
        elif kind not in _PASSED_OVER:
            texts.append(part_text(block, at))
    own: dict[str, Any] = {"role": role, "content": "\n".join(texts)}
    if calls:
        own["tool_calls"] = calls
    return results + ([own] if texts or calls or not results else [])


def _template_call(block: Mapping[str, Any], place: str) -> dict[str, Any]:
    name, arguments = block.get("name"), block.get("input")
    if not isinstance(name, str) or not isinstance(arguments, dict):
        raise RequestError(f"{place} must have a name (string) and an input (object)", param=place)
    return {"id": block.get("id"), "type": "function", "function": {"name": name, "arguments": arguments}}


def _template_result(block: Mapping[str, Any], place: str) -> dict[str, Any]:
    content = plain_text(block.get("content") or "", f"{place}.content")
    return {"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": content}


def _template_tool(tool: Mapping[str, Any], place: str) -> dict[str, Any]:
    name, schema = tool.get("name"), tool.get("input_schema")
    if not isinstance(name, str) or not isinstance(schema, dict):
        raise RequestError(
            f"{place} must have a name (string) and an input_schema (object); tools that run on the server "
            "are not supported",
            param=place,
        )
    function = {"name": name, "description": tool.get("description") or "", "parameters": schema}
    return {"type": "function", "function": function}
