"""Converts requests of other APIs to chat completions, which every foreign worker has, and makes the writers that
convert the answers back.
"""

from collections import Counter
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from emberkv.cluster.foreign.answers import decoded
from emberkv.engine.request import PrefillProgress, SamplingParams
from emberkv.errors import RequestError
from emberkv.serving.answers.answer_stream import MessageStream, WholeMessage
from emberkv.serving.api.anthropic_api import MessageWriter, Signer
from emberkv.serving.api.anthropic_schema import MessagesRequest, PromptRequest
from emberkv.serving.api.conversation import Conversation
from emberkv.serving.api.responses_api import ResponsesWriter, convert_response
from emberkv.serving.api.responses_schema import ResponseStore
from emberkv.serving.api.validation import Json, parse_body
from emberkv.serving.event_stream import compact_json
from emberkv.serving.request_context import RequestContext
from emberkv.serving.tenancy import Tenant

CHAT_PATH = "/v1/chat/completions"


class MessageResponseWriter(Protocol):
    """Writes answers that are parsed: `MessageWriter` and `ResponsesWriter`."""

    def whole(self, answers: Sequence[WholeMessage]) -> Json: ...

    def events(self, stream: MessageStream) -> AsyncGenerator[bytes, None]: ...

    def ping(self, progress: PrefillProgress | None) -> bytes: ...


@dataclass(frozen=True, slots=True)
class Conversion:
    """A request as a chat completion.

    chat: the body of that, without ``stream``. writer: makes the writer of its answer. stops: its stop strings.
    wants_no_tokens: its ``max_tokens`` is 0. user_id: names its session where no header does. left_out: how many parts
    of the request are not in the prompt, by type.
    """

    chat: Json
    streams: bool
    writer: Callable[[RequestContext], MessageResponseWriter]
    stops: tuple[str, ...] = ()
    wants_no_tokens: bool = False
    user_id: str = ""
    left_out: Mapping[str, int] = field(default_factory=dict)


def convert(api: str, body: bytes, tenant: Tenant, store: ResponseStore) -> Conversion:
    """Convert a request to ``api``, "messages" or "responses". Raises RequestError for an invalid one."""
    return _converted_messages(body, tenant) if api == "messages" else _converted_responses(body, tenant, store)


def _converted_messages(body: bytes, tenant: Tenant) -> Conversion:
    request = parse_body(MessagesRequest, body)
    chat, left_out = prompt_body(request)
    settings = {
        "max_tokens": max(1, request.max_tokens),
        "temperature": request.temperature,
        "top_p": request.top_p,
        "top_k": request.top_k,
        "stop": request.stop_sequences,
        "response_format": _response_format(request),
    }
    return Conversion(
        {**chat, **{name: value for name, value in settings.items() if value is not None}},
        bool(request.stream),
        lambda context: MessageWriter(context.request_id, request.model, Signer(tenant.salt)),
        tuple(request.stop_sequences or ()),
        wants_no_tokens=request.max_tokens == 0,
        user_id=request.user_id,
        left_out=left_out,
    )


def prompt_body(request: PromptRequest) -> tuple[Json, Mapping[str, int]]:
    """What a chat completion says of the prompt of an Anthropic request, and what is left out. Raises RequestError."""
    conversation = request.conversation()
    messages = [_chat_message(message) for message in conversation.messages]
    body: Json = {"model": request.model, "messages": messages, **_tool_fields(conversation)}
    if conversation.variables:
        body["chat_template_kwargs"] = dict(conversation.variables)
    if conversation.begun:  # as vLLM and emberkv are asked to continue a message
        messages.append({"role": "assistant", "content": conversation.begun})
        body |= {"add_generation_prompt": False, "continue_final_message": True}
    return body, conversation.left_out


def _chat_message(message: Mapping[str, Any]) -> Json:
    """A message of a chat template as one of the API, in which a call's arguments are text."""
    calls = [
        {**call, "function": {**call["function"], "arguments": _as_text(call["function"]["arguments"])}}
        for call in message.get("tool_calls", ())
    ]
    return {**message, **({"tool_calls": calls} if calls else {})}


def _as_text(arguments: object) -> str:
    return arguments if isinstance(arguments, str) else compact_json(arguments)


def _tool_fields(conversation: Conversation) -> Json:
    """The tools and how they may be called; the defaults are left out, for servers that do not know these fields."""
    if not conversation.tools:
        return {}
    choice = conversation.tool_choice
    fields: Json = {"tools": list(conversation.tools)}
    if choice.names:
        fields["tool_choice"] = {"type": "function", "function": {"name": choice.names[0]}}
    elif choice.mode != "auto":
        fields["tool_choice"] = choice.mode
    return fields if choice.parallel else {**fields, "parallel_tool_calls": False}


def _response_format(request: MessagesRequest) -> Json | None:
    wanted = (request.output_config or {}).get("format") or request.output_format
    if wanted is None or wanted.get("type") != "json_schema" or "json_schema" in wanted:
        return wanted
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": wanted.get("schema")}}


def _converted_responses(body: bytes, tenant: Tenant, store: ResponseStore) -> Conversion:
    converted = convert_response(body, tenant, store)
    request = converted.request
    chat = decoded(converted.chat)
    if not isinstance(chat, dict):
        raise RequestError("the body is nested too deeply")
    params = SamplingParams(
        temperature=1.0 if request.temperature is None else request.temperature,
        top_p=1.0 if request.top_p is None else request.top_p,
    )

    def writer(context: RequestContext) -> ResponsesWriter:
        keep = partial(converted.keep, store, tenant.name)
        return ResponsesWriter(context.request_id, context.created, request, params, tenant.salt, keep)

    session = chat.get("prompt_cache_key")
    return Conversion(
        chat,
        bool(request.stream),
        writer,
        user_id=session if isinstance(session, str) else "",
        left_out=Counter(converted.left_out),
    )
