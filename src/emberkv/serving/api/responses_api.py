"""The Responses API: its routes, and its responses, whole or as events."""

from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response

from emberkv.core.sequence import FinishReason
from emberkv.engine.request import PrefillProgress
from emberkv.errors import RequestError
from emberkv.serving.answer_service import AnswerService, Prompt, RequestPreparer
from emberkv.serving.answers.answer import Answer
from emberkv.serving.answers.answer_stream import AnswerStream, WholeAnswer
from emberkv.serving.api.openai_api import prepare_chat
from emberkv.serving.api.openai_schema import ChatCompletionRequest
from emberkv.serving.api.response_store import ResponseStore, StoredResponse
from emberkv.serving.api.responses_schema import ResponsesRequest, sealed_thought
from emberkv.serving.api.validation import parse_body
from emberkv.serving.auth import ApiKeys
from emberkv.serving.canonical import CanonicalRules
from emberkv.serving.errors import NotFoundError, failure_mid_stream
from emberkv.serving.event_stream import compact_json, sse_event
from emberkv.serving.lifecycle import ServedModel
from emberkv.serving.parsing.events import (
    CallArguments,
    CallBegin,
    CallEnd,
    ContentText,
    OutputEvent,
    ParsedMessage,
    ReasoningText,
)
from emberkv.serving.tenancy import Tenant

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class PreparedResponse:
    """chat: the chat request that asks for the same. conversation: the items of the prompt, with those of earlier
    responses; size: their bytes as JSON, about. canonical, left_out: of its context.
    """

    request: ResponsesRequest
    chat: ChatCompletionRequest
    prompt: Prompt
    conversation: Sequence[Json]
    size: int
    canonical: Mapping[str, int]
    left_out: Mapping[str, int]


def prepare_response(
    body: bytes, model: ServedModel, rules: CanonicalRules | None, tenant: Tenant, store: ResponseStore
) -> PreparedResponse:
    """Check, render and tokenize a request. Raises RequestError."""
    request = parse_body(ResponsesRequest, body)
    request.check()
    earlier = _earlier(request, tenant, store)
    given, stored_bytes = with_stored_items(request.items(), tenant.name, store)
    items = [*(earlier.conversation if earlier else ()), *given]
    size = len(body) + stored_bytes + (earlier.size if earlier else 0)
    left_out: Counter[str] = Counter()
    chat, (prompt,), rendered = prepare_chat(request.chat_body(items, tenant.salt, left_out), model, rules)
    left_out.update(rendered.left_out)
    return PreparedResponse(request, chat, prompt, items, size, rendered.canonical, left_out)


def _earlier(request: ResponsesRequest, tenant: Tenant, store: ResponseStore) -> StoredResponse | None:
    if request.previous_response_id is None:
        return None
    found = store.get(tenant.name, request.previous_response_id)
    if found is None:
        raise RequestError(
            f"previous_response_id is {request.previous_response_id!r}; no such response is stored: send the whole "
            "conversation as input",
            param="previous_response_id",
        )
    return found


def with_stored_items(items: Sequence[Json], tenant: str, store: ResponseStore) -> tuple[list[Json], int]:
    """The items, each ``item_reference`` replaced by the output item that it names, and the bytes of these as JSON.

    Raises RequestError for an item that is not stored, or that is named twice, which would make a small request large.
    """
    whole: list[Json] = []
    named: set[str] = set()
    size = 0
    for index, item in enumerate(items):
        if item.get("type") == "item_reference":
            item_id, place = str(item.get("id")), f"input[{index}]"
            found = _stored_item(item_id, tenant, store)
            if found is None or item_id in named:
                problem = "is named twice" if found else "is not stored"
                raise RequestError(f"{place} refers to {item_id[:100]!r}, which {problem}: send the item", param=place)
            named.add(item_id)
            size += len(compact_json(found))
            whole.append(found)
        else:
            whole.append(item)
    return whole, size


def _stored_item(item_id: str, tenant: str, store: ResponseStore) -> Json | None:
    """An item of a stored response's output; the items' ids are made of the response's, see `OutputItems`."""
    stored = store.get(tenant, f"resp_{''.join(item_id.split('_')[1:2])}")
    output = stored.response["output"] if stored else ()
    return next((item for item in output if item["id"] == item_id), None)


def responses_router(
    keys: ApiKeys, preparer: RequestPreparer, answers: AnswerService, store: ResponseStore, clock: Callable[[], float]
) -> APIRouter:
    """The routes, open to requests with one of ``keys``. clock: the store's."""
    router = APIRouter(prefix="/v1/responses")
    guard = Depends(keys.tenant)

    def stored(tenant: Tenant, response_id: str) -> StoredResponse:
        found = store.get(tenant.name, response_id)
        if found is None:
            raise NotFoundError(f"no response {response_id[:100]!r} is stored, or not any more", param="response_id")
        return found

    @router.post("")
    async def create(http: Request, tenant: Annotated[Tenant, guard]) -> Response:
        work = partial(prepare_response, rules=preparer.rules, tenant=tenant, store=store)
        prepared = await preparer.prepare(work, await http.body(), tenant)
        request = prepared.request
        context = answers.request(
            http,
            "responses",
            tenant.salted(prepared.chat.cache_salt),
            prepared.canonical,
            user_id=prepared.chat.session,
            left_out=prepared.left_out,
        )
        stream = answers.start([prepared.prompt], context)

        def keep(response: Json) -> None:
            if request.store is False:
                return
            conversation = [*prepared.conversation, *response["output"]]
            size = prepared.size + len(compact_json(response))
            kept = StoredResponse(response, conversation, len(prepared.conversation), size, clock())
            store.put(tenant.name, response["id"], kept)

        writer = ResponsesWriter(context.request_id, context.created, prepared, tenant.salt, keep)
        return await answers.respond(http, stream, writer, as_events=bool(request.stream))

    @router.get("/{response_id}")
    async def retrieve(response_id: str, tenant: Annotated[Tenant, guard]) -> Response:
        return JSONResponse(stored(tenant, response_id).response)

    @router.get("/{response_id}/input_items")
    async def input_items(response_id: str, tenant: Annotated[Tenant, guard]) -> Response:
        found = stored(tenant, response_id)
        items = list(found.conversation[: found.input_items])
        return JSONResponse({"object": "list", "data": items, "has_more": False})

    @router.delete("/{response_id}")
    async def delete(response_id: str, tenant: Annotated[Tenant, guard]) -> Response:
        stored(tenant, response_id)
        store.delete(tenant.name, response_id)
        return JSONResponse({"id": response_id, "object": "response", "deleted": True})

    return router


class ResponsesWriter:
    """Writes one answer in the API's wire form, whole or as events. keep: is given the response once it has ended."""

    def __init__(
        self, response_id: str, created: int, prepared: PreparedResponse, salt: bytes, keep: Callable[[Json], None]
    ) -> None:
        self._id = response_id
        self._created = created
        self._prepared = prepared
        self._keep = keep
        self._salt = salt if prepared.request.wants_sealed_thoughts else None
        self._sequence = 0

    def whole(self, answers: list[WholeAnswer]) -> Json:
        """The response to a request that did not ask for a stream."""
        (whole,) = answers
        output = OutputItems(self._id, self._salt)
        for _ in output.of(events_of(whole.message)):
            pass
        return self._ended(whole.answer, output)

    async def events(self, stream: AnswerStream) -> AsyncGenerator[bytes, None]:
        """The whole sequence of events. A failure becomes the event ``response.failed``, which is then the last."""
        output = OutputItems(self._id, self._salt)
        (answer,) = stream.answers
        try:
            for kind in ("response.created", "response.in_progress"):
                yield self._event({"type": kind, "response": self._response("in_progress", [])})
            async for delta in stream:
                for event in output.of(delta.events):
                    yield self._event(event)
            for event in output.rest(_status(answer)):
                yield self._event(event)
            response = self._ended(answer, output)
            yield self._event({"type": f"response.{response['status']}", "response": response})
        except Exception as error:  # noqa: BLE001 - the answer has begun: the client can only learn of it by an event
            failure = failure_mid_stream(error)
            failed = {"code": failure.code or "server_error", "message": failure.message}
            response = {**self._response("failed", output.items), "error": failed}
            yield self._event({"type": "response.failed", "response": response})

    def ping(self, progress: PrefillProgress | None) -> bytes:
        """The API's own event, once more, since clients that wait for events do not count comments."""
        shown = {} if progress is None else {"prefill": asdict(progress)}
        in_progress = self._response("in_progress", [])
        return self._event({"type": "response.in_progress", "response": in_progress, **shown})

    def _event(self, event: Json) -> bytes:
        numbered = {**event, "sequence_number": self._sequence}
        self._sequence += 1
        return sse_event(numbered, event["type"])

    def _ended(self, answer: Answer, output: "OutputItems") -> Json:
        status = _status(answer)
        for _ in output.rest(status):
            pass
        incomplete = {"reason": "max_output_tokens"} if status == "incomplete" else None
        response = {**self._response(status, output.items), "incomplete_details": incomplete, "usage": _usage(answer)}
        self._keep(response)
        return response

    def _response(self, status: str, output: Sequence[Json]) -> Json:
        request = self._prepared.request
        reasoning = request.reasoning
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "metadata": request.metadata or {},
            "model": request.model,
            "output": list(output),
            "parallel_tool_calls": request.parallel_tool_calls is not False,
            "previous_response_id": request.previous_response_id,
            "reasoning": {"effort": reasoning and reasoning.effort, "summary": reasoning and reasoning.summary},
            "store": request.store is not False,
            "temperature": self._prepared.prompt.params.temperature,
            "text": {"format": (request.text and request.text.format) or {"type": "text"}},
            "tool_choice": request.tool_choice or "auto",
            "tools": request.tools or [],
            "top_p": self._prepared.prompt.params.top_p,
            "truncation": "disabled",
            "usage": None,
        }


def _status(answer: Answer) -> str:
    return "incomplete" if answer.finish_reason is FinishReason.LENGTH else "completed"


def _usage(answer: Answer) -> Json:
    usage = answer.usage
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens},
        "output_tokens": answer.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": answer.reasoning_tokens},
        "total_tokens": usage.prompt_tokens + answer.completion_tokens,
    }


def events_of(message: ParsedMessage) -> Iterator[OutputEvent]:
    """The events of a whole answer."""
    if message.reasoning:
        yield ReasoningText(message.reasoning)
    if message.content:
        yield ContentText(message.content)
    for index, call in enumerate(message.calls):
        yield CallBegin(index, call.name, call.call_id)
        yield CallArguments(index, call.arguments)
        yield CallEnd(index, call.is_complete)


class OutputItems:
    """An answer's output as items of the API, and the events that tell of them as they come.

    response_id: is part of the items' ids. salt: with one, thoughts have an ``encrypted_content``. items: those that
    have begun; an item's text is in it once the item has ended.
    """

    def __init__(self, response_id: str, salt: bytes | None) -> None:
        self.items: list[Json] = []
        self._key = response_id.partition("_")[2]
        self._salt = salt
        self._text: list[str] = []
        self._is_open = False

    def of(self, events: Iterable[OutputEvent]) -> Iterator[Json]:
        """What the next part of the answer adds."""
        for event in events:
            match event:
                case ReasoningText(text):
                    yield from self._within("reasoning", "reasoning_text")
                    yield self._delta("response.reasoning_text.delta", text, content_index=0)
                case ContentText(text):
                    yield from self._within("message", "output_text")
                    yield self._delta("response.output_text.delta", text, content_index=0, logprobs=[])
                case CallBegin(_, name, call_id):
                    yield from self._end("completed")
                    yield self._begin(
                        "fc", {"type": "function_call", "name": name, "call_id": call_id, "arguments": ""}
                    )
                case CallArguments(_, text):
                    yield self._delta("response.function_call_arguments.delta", text)
                case CallEnd(_, is_complete):
                    yield from self._end("completed" if is_complete else "incomplete")

    def rest(self, status: str) -> Iterator[Json]:
        """The end of the last item; of an answer without any, an empty message."""
        if not self.items:
            yield from self._within("message", "output_text")
        yield from self._end(status)

    def _within(self, kind: str, part: str) -> Iterator[Json]:
        """Begin an item with one part, unless one of its kind has begun."""
        if self._is_open and self.items[-1]["type"] == kind:
            return
        yield from self._end("completed")
        if kind == "message":
            yield self._begin("msg", {"type": "message", "role": "assistant", "content": []})
        else:
            yield self._begin("rs", {"type": "reasoning", "summary": [], "content": []})
        yield self._placed("response.content_part.added", content_index=0, part=_part(part, ""))

    def _begin(self, prefix: str, item: Json) -> Json:
        self.items.append({"id": f"{prefix}_{self._key}_{len(self.items)}", "status": "in_progress", **item})
        self._text.clear()
        self._is_open = True
        return {"type": "response.output_item.added", "output_index": len(self.items) - 1, "item": {**self.items[-1]}}

    def _end(self, status: str) -> Iterator[Json]:
        if not self._is_open:
            return
        self._is_open = False
        item, text = self.items[-1], "".join(self._text)
        item["status"] = status
        match item["type"]:
            case "function_call":
                item["arguments"] = text
                yield self._placed("response.function_call_arguments.done", name=item["name"], arguments=text)
            case "message":
                item["content"] = [_part("output_text", text)]
                yield self._placed("response.output_text.done", content_index=0, text=text, logprobs=[])
                yield self._placed("response.content_part.done", content_index=0, part=item["content"][0])
            case "reasoning":
                item["content"] = [_part("reasoning_text", text)]
                if self._salt is not None:
                    item["encrypted_content"] = sealed_thought(text, self._salt)
                yield self._placed("response.reasoning_text.done", content_index=0, text=text)
                yield self._placed("response.content_part.done", content_index=0, part=item["content"][0])
        yield {"type": "response.output_item.done", "output_index": len(self.items) - 1, "item": {**item}}

    def _delta(self, kind: str, text: str, **fields: Any) -> Json:
        self._text.append(text)
        return self._placed(kind, delta=text, **fields)

    def _placed(self, kind: str, **fields: Any) -> Json:
        return {"type": kind, "item_id": self.items[-1]["id"], "output_index": len(self.items) - 1, **fields}


def _part(kind: str, text: str) -> Json:
    return {"type": kind, "text": text, **({"annotations": [], "logprobs": []} if kind == "output_text" else {})}
