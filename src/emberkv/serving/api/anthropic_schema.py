"""Request bodies of the Anthropic API."""

from collections import Counter
from collections.abc import Collection
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import Field

from emberkv.engine.request import MAX_STOP_STRINGS, Constraint, SamplingParams
from emberkv.errors import RequestError
from emberkv.serving.api.anthropic_blocks import BlockReader, template_tools
from emberkv.serving.api.conversation import Conversation, Message, ToolChoice, count_left_out
from emberkv.serving.api.structured_output import constraint_of_response_format
from emberkv.serving.api.validation import Integer, RequestBody

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
        given = self.tool_choice or {"type": "auto"}
        kind = _choice(given, "tool_choice", _MODES)
        if kind in ("any", "tool") and not tools:
            raise RequestError(f"tool_choice.type is {kind!r}, and there are no tools to call", param="tool_choice")
        names: tuple[str, ...] = ()
        if kind == "tool":
            names = tuple(name for tool in tools if (name := tool["function"]["name"]) == given.get("name"))[:1]
            if not names:
                raise RequestError(
                    f"tool_choice.name is {given.get('name')!r}; it must be the name of one of the tools",
                    param="tool_choice",
                )
        return ToolChoice(_MODES[kind], names, given.get("disable_parallel_tool_use") is not True)

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
