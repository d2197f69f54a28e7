"""The Anthropic API's routes: messages and their token count; an answer as content blocks, whole or as events."""

import hmac
import json
from base64 import b64encode
from collections.abc import AsyncGenerator, Iterable, Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response
from pydantic_core import from_json

from emberkv.core.sequence import FinishReason
from emberkv.engine.request import PrefillProgress
from emberkv.serving.answer_service import AnswerService, Prompt, RequestPreparer
from emberkv.serving.answers.answer import AnswerState, new_call_id
from emberkv.serving.answers.answer_stream import MessageStream, WholeMessage
from emberkv.serving.api.anthropic_schema import MessagesRequest, PromptRequest
from emberkv.serving.api.rendering import RenderedPrompt, render_messages
from emberkv.serving.api.validation import parse_body
from emberkv.serving.auth import ApiKeys
from emberkv.serving.canonical import CanonicalRules
from emberkv.serving.errors import NotFoundError, anthropic_error, failure_mid_stream
from emberkv.serving.event_stream import compact_json, sse_event
from emberkv.serving.lifecycle import Lifecycle, ServedModel, answer_budget
from emberkv.serving.parsing.events import (
    CallArguments,
    CallBegin,
    CallEnd,
    ContentText,
    OutputEvent,
    ParsedCall,
    ParsedMessage,
    ReasoningText,
)
from emberkv.serving.tenancy import Tenant

INVALID_JSON = "INVALID_JSON"
"""The key for a tool's input that is not a JSON object, as Anthropic's documentation proposes."""


class Signer:
    """Signs thinking blocks by an HMAC with the tenant's salt. Clients send the signature back with the block. It is
    not verified, as the text is only rendered.
    """

    def __init__(self, salt: bytes) -> None:
        self._key = b"emberkv-thought-1" + salt
        self._digest = hmac.new(self._key, digestmod="sha256")

    def add(self, text: str) -> None:
        """Add text to the current block."""
        self._digest.update(text.encode(errors="replace"))

    def signature(self) -> str:
        """The signature of the text since the last call, in base64."""
        signed = b64encode(self._digest.digest()).decode()
        self._digest = hmac.new(self._key, digestmod="sha256")
        return signed


def content_blocks(message: ParsedMessage, signer: Signer) -> list[dict[str, Any]]:
    """A whole answer's blocks, in the order of a stream's. An empty answer has one empty text block."""
    blocks: list[dict[str, Any]] = []
    for part in message.parts():
        match part:
            case ReasoningText(text):
                signer.add(text)
                blocks.append({"type": "thinking", "thinking": text, "signature": signer.signature()})
            case ContentText(text):
                blocks.append({"type": "text", "text": text})
            case ParsedCall():
                blocks.append({"type": "tool_use", "id": part.call_id, "name": part.name, "input": tool_input(part)})
    return blocks or [{"type": "text", "text": ""}]


def tool_input(call: ParsedCall) -> dict[str, Any]:
    """A call's arguments as an object. If the answer was cut off, it has the arguments up to there.

    >>> tool_input(ParsedCall("read", '{"path": "a.py", "limit": 2', is_complete=False))
    {'path': 'a.py', 'limit': 2}
    """
    try:
        found = from_json(call.arguments, allow_partial="trailing-strings") if call.arguments else {}
        json.dumps(found, allow_nan=False)  # 1e999 is decoded as infinity, which JSON cannot encode
    except ValueError:  # the client gets the text that the model wrote
        found = None
    return found if isinstance(found, dict) else {INVALID_JSON: call.arguments}


class BlockEvents:
    """Encodes an answer's content as server-sent events, block by block."""

    def __init__(self, signer: Signer) -> None:
        self._signer = signer
        self._index = -1
        self._open = ""  # the type of the block that has begun and not ended

    def of(self, events: Iterable[OutputEvent]) -> Iterator[bytes]:
        """The API's events for the next parsed events. Deltas are formatted without `sse_event`, for speed: there is
        one for each token.
        """
        for event in events:
            match event:
                case ContentText(text):
                    if self._open != "text":
                        yield from self._begin({"type": "text", "text": ""})
                    yield self._delta("text_delta", "text", text)
                case ReasoningText(text):
                    if self._open != "thinking":
                        yield from self._begin({"type": "thinking", "thinking": "", "signature": ""})
                    self._signer.add(text)
                    yield self._delta("thinking_delta", "thinking", text)
                case CallBegin(_, name, call_id):
                    yield from self._begin({"type": "tool_use", "id": call_id, "name": name, "input": {}})
                case CallArguments(_, text):
                    yield self._delta("input_json_delta", "partial_json", text)
                case CallEnd():
                    yield from self._end()

    def rest(self) -> Iterator[bytes]:
        """The events that end the last block. An answer without blocks gets an empty text block."""
        if self._index < 0:
            yield from self._begin({"type": "text", "text": ""})
        yield from self._end()

    def _begin(self, block: dict[str, Any]) -> Iterator[bytes]:
        """End the block before, and begin another."""
        yield from self._end()
        self._index += 1
        self._open = block["type"]
        yield _event("content_block_start", index=self._index, content_block=block)

    def _end(self) -> Iterator[bytes]:
        if self._open == "thinking":
            yield self._delta("signature_delta", "signature", self._signer.signature())
        if self._open:
            yield _event("content_block_stop", index=self._index)
        self._open = ""

    def _delta(self, kind: str, name: str, text: str) -> bytes:
        return (
            f'event: content_block_delta\ndata: {{"type":"content_block_delta","index":{self._index},'
            f'"delta":{{"type":"{kind}","{name}":{compact_json(text)}}}}}\n\n'
        ).encode()


def _event(kind: str, **fields: object) -> bytes:
    return sse_event({"type": kind, **fields}, kind)


def prepare_messages(
    body: bytes, model: ServedModel, rules: CanonicalRules | None
) -> tuple[MessagesRequest, Prompt, RenderedPrompt]:
    """Check, render and tokenize a request. Raises RequestError."""
    request = parse_body(MessagesRequest, body)
    model.check_name(request.model)
    rendered = render_messages(request, model, rules, model.engine.max_prompt_tokens, finds_borders=True)
    constraint = rendered.constraint(model.output_format, request.constraint())
    budget = answer_budget(model, len(rendered.token_ids), request.max_tokens)
    prompt = Prompt(
        rendered.token_ids,
        request.sampling(model.sampling_defaults, budget.tokens, constraint),
        rendered.retain_tokens,
        rendered.retain_seconds,
        wants_no_tokens=request.max_tokens == 0,
        is_clipped=budget.is_clipped,
        parsing=rendered.parsing(model.output_format, partial(new_call_id, "toolu_")),
        system=rendered.system_text,
        history=rendered.history,
        recorder=rendered.recorder,
        next_prompt=rendered.next_prompt,
        borders=rendered.borders,
    )
    return request, prompt, rendered


def count_tokens(body: bytes, model: ServedModel, rules: CanonicalRules | None) -> int:
    """How many tokens a request's prompt has. Raises RequestError, also for many times what the model takes."""
    request = parse_body(PromptRequest, body)
    model.check_name(request.model)
    return len(render_messages(request, model, rules, model.countable_tokens).token_ids)


def anthropic_router(
    lifecycle: Lifecycle, keys: ApiKeys, preparer: RequestPreparer, answers: AnswerService
) -> APIRouter:
    """The routes, open to requests with one of ``keys``."""
    router = APIRouter()
    guard = Depends(keys.tenant)

    @router.post("/v1/messages")
    async def messages(http: Request, tenant: Annotated[Tenant, guard]) -> Response:
        work = partial(prepare_messages, rules=preparer.rules)
        request, prompt, rendered = await preparer.prepare(work, await http.body(), tenant)
        context = answers.request(
            http,
            "messages",
            tenant,
            rendered.canonical,
            user_id=request.user_id,
            inferred_session=rendered.session,
            left_out=rendered.left_out,
        )
        stream = answers.start([prompt], context)
        writer = MessageWriter(context.request_id, request.model, Signer(tenant.salt))
        return await answers.respond(http, stream, writer, as_events=bool(request.stream))

    @router.post("/v1/messages/count_tokens")
    async def count(http: Request, tenant: Annotated[Tenant, guard]) -> Response:
        work = partial(count_tokens, rules=preparer.rules)
        return JSONResponse({"input_tokens": await preparer.prepare(work, await http.body(), tenant)})

    @router.api_route(
        "/v1/messages/batches{rest:path}",
        methods=["GET", "POST", "DELETE"],
        dependencies=[guard],
        include_in_schema=False,
    )
    async def batches(rest: str) -> Response:
        raise NotFoundError("message batches are not supported; send each request to /v1/messages")

    return router


def anthropic_card(model: ServedModel, name: str) -> dict[str, Any]:
    """The model as Anthropic's ``/v1/models`` lists it."""
    return {
        "type": "model",
        "id": name,
        "display_name": name,
        "created_at": datetime.fromtimestamp(model.created, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "lifecycle": "active",
        "max_input_tokens": model.engine.max_prompt_tokens,
        "max_tokens": model.engine.context_length,
    }


def usage_of(answer: AnswerState) -> dict[str, int]:
    """The prompt's tokens in three parts that add up to all of them, and the answer's.

    Read: reused from the cache. Creation: computed in full blocks, which later prompts can reuse. Input: the
    rest, which is the prompt's last, partly filled block.
    """
    usage = answer.usage
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens - usage.created_tokens,
        "cache_creation_input_tokens": usage.created_tokens,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": answer.completion_tokens,
    }


STOP_REASONS = {FinishReason.STOP: "end_turn", FinishReason.LENGTH: "max_tokens"}
"""The API's words for how an answer ends without a stop string; an aborted or failed answer ends with an error."""


def stop_reason(answer: AnswerState) -> str | None:
    """How an answer ended, in the API's words; None while it goes on."""
    if answer.stop_sequence is not None:
        return "stop_sequence"
    if answer.finish_reason is FinishReason.STOP and answer.calls:
        return "tool_use"
    return None if answer.finish_reason is None else STOP_REASONS[answer.finish_reason]


class MessageWriter:
    """Writes one answer in the API's wire form, whole or as events. signer: of its thoughts."""

    def __init__(self, request_id: str, model: str, signer: Signer) -> None:
        self._id = request_id
        self._model = model
        self._signer = signer

    def whole(self, answers: Sequence[WholeMessage]) -> dict[str, Any]:
        """The response to a request that did not ask for a stream."""
        (whole,) = answers
        return {
            **self._message(whole.answer),
            "content": [] if whole.answer.wants_no_tokens else content_blocks(whole.message, self._signer),
            "stop_reason": stop_reason(whole.answer),
            "stop_sequence": whole.answer.stop_sequence,
        }

    async def events(self, stream: MessageStream) -> AsyncGenerator[bytes, None]:
        """The whole sequence of events. A failure becomes an error event, which is then the last."""
        try:
            await stream.started()
            (answer,) = stream.answers
            yield _event("message_start", message=self._message(answer))
            blocks = BlockEvents(self._signer)
            async for delta in stream:
                for event in blocks.of(delta.events):
                    yield event
            if not answer.wants_no_tokens:
                for event in blocks.rest():
                    yield event
            reason = {"stop_reason": stop_reason(answer), "stop_sequence": answer.stop_sequence}
            yield _event("message_delta", delta=reason, usage=usage_of(answer))
            yield _event("message_stop")
        except Exception as error:  # noqa: BLE001 - the answer has begun: the client can only learn of it by an event
            yield sse_event(anthropic_error(failure_mid_stream(error)), "error")

    def ping(self, progress: PrefillProgress | None) -> bytes:
        """The API's own event, with how far the prompt is computed."""
        return _event("ping", **({} if progress is None else {"prefill": asdict(progress)}))

    def _message(self, answer: AnswerState) -> dict[str, Any]:
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": usage_of(answer),
        }
