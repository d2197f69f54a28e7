"""The Responses API: its routes, and the encoding of responses, as one JSON object or as server-sent events."""

from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response

from emberkv.core.sequence import FinishReason
from emberkv.engine.request import PrefillProgress, SamplingParams
from emberkv.errors import RequestError
from emberkv.serving.answer_service import AnswerService, Prompt, RequestPreparer
from emberkv.serving.answers.answer import AnswerState
from emberkv.serving.answers.answer_stream import MessageStream, WholeMessage
from emberkv.serving.api.openai_api import prepare_chat
from emberkv.serving.api.openai_schema import ChatCompletionRequest
from emberkv.serving.api.responses_schema import (
    PageQuery,
    ResponsesRequest,
    ResponseStore,
    StoredResponse,
    signed_reasoning,
)
from emberkv.serving.api.validation import Json, parse_body, parse_query
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
    ParsedCall,
    ParsedMessage,
    ReasoningText,
)
from emberkv.serving.tenancy import Tenant


@dataclass(frozen=True, slots=True)
class ConvertedResponse:
    """A checked request as a chat completion request.

    chat: the body of that. conversation: the prompt's items, including those of earlier responses; size: their
    approximate bytes as JSON. left_out: how many parts of the request are not in the prompt, by type.
    """

    request: ResponsesRequest
    chat: bytes
    conversation: Sequence[Json]
    size: int
    left_out: Mapping[str, int]

    def keep(self, store: ResponseStore, tenant: str, response: Json) -> None:
        """Store the response with its conversation, unless the request asks not to."""
        if self.request.store is False:
            return
        conversation = [*self.conversation, *response["output"]]
        size = self.size + len(compact_json(response))
        store.put(tenant, response["id"], StoredResponse(response, conversation, len(self.conversation), size))


def convert_response(body: bytes, tenant: Tenant, store: ResponseStore) -> ConvertedResponse:
    """Check a request and convert it. Raises RequestError for an invalid one, and for a ``previous_response_id`` that
    is not stored.
    """
    request = parse_body(ResponsesRequest, body)
    request.check()
    earlier = _earlier(request, tenant, store)
    given, stored_bytes = with_stored_items(request.items(), tenant.name, store)
    items = [*(earlier.conversation if earlier else ()), *given]
    size = len(body) + stored_bytes + (earlier.size if earlier else 0)
    left_out: Counter[str] = Counter()
    chat = request.chat_body(items, tenant.salt, left_out)
    return ConvertedResponse(request, chat, items, size, left_out)


def unstored_chat(body: bytes, tenant: Tenant) -> bytes:
    """The body of the chat completion with the same prompt, for a request that stands alone: no response is stored that
    its ``previous_response_id`` or an ``item_reference`` could name. tenant: whose request it is, without its
    ``cache_salt``: signed reasoning is the prompt's only with the tenant's own salt. Raises RequestError.
    """
    return convert_response(body, tenant, ResponseStore(clock=lambda: 0.0)).chat


@dataclass(frozen=True, slots=True)
class PreparedResponse:
    """A checked and tokenized request. chat: the equivalent chat completion request. canonical: how often each
    canonical rule was applied. left_out: how many parts of the request are not in the prompt, by type.
    inferred_session: see `RenderedPrompt.session`.
    """

    converted: ConvertedResponse
    chat: ChatCompletionRequest
    prompt: Prompt
    canonical: Mapping[str, int]
    left_out: Mapping[str, int]
    inferred_session: str


def prepare_response(
    body: bytes, model: ServedModel, rules: CanonicalRules | None, tenant: Tenant, store: ResponseStore
) -> PreparedResponse:
    """Convert, render and tokenize a request. Raises RequestError."""
    converted = convert_response(body, tenant, store)
    chat, (prompt,), rendered = prepare_chat(converted.chat, model, rules)
    left_out = Counter(converted.left_out) + Counter(rendered.left_out)
    return PreparedResponse(converted, chat, prompt, rendered.canonical, left_out, rendered.session)


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

    Raises RequestError for a reference to an item that is not stored, and for two references to one item: without that
    limit, a small request could have a prompt of any size.
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
    """The output item with this id, or None if its response is not stored. Item ids contain the response's id, see
    `OutputItems`.
    """
    stored = store.get(tenant, f"resp_{''.join(item_id.split('_')[1:2])}")
    output = stored.response["output"] if stored else ()
    return next((item for item in output if item["id"] == item_id), None)


def _with_ids(items: Iterable[Json]) -> list[Json]:
    """The items, each with an id that no other has, so that every page has a next one."""
    named: dict[str, Json] = {}
    for at, item in enumerate(items):
        own = item.get("id")
        item_id = own if isinstance(own, str) and own not in named else f"item_{at}"
        named[item_id] = {**item, "id": item_id}
    return list(named.values())


def _page_of(found: StoredResponse, query: PageQuery) -> Json:
    """A page of the input items. Items that came without an id of their own are numbered.

    Raises RequestError if there is no item with the id ``query.after``.
    """
    items = _with_ids(found.conversation[: found.input_items])
    if query.order == "desc":
        items.reverse()
    begin = 0
    if query.after is not None:
        ids = [item["id"] for item in items]
        if query.after not in ids:
            raise RequestError(f"after is {query.after[:100]!r}, which is not the id of an input item", param="after")
        begin = ids.index(query.after) + 1
    page = items[begin : begin + query.limit]
    return {
        "object": "list",
        "data": page,
        "first_id": page[0]["id"] if page else None,
        "last_id": page[-1]["id"] if page else None,
        "has_more": begin + query.limit < len(items),
    }


def responses_router(
    keys: ApiKeys, preparer: RequestPreparer, answers: AnswerService, store: ResponseStore
) -> APIRouter:
    """The routes under /v1/responses, for requests with one of ``keys``."""
    router = APIRouter(prefix="/v1/responses")
    guard = Depends(keys.tenant)

    @router.post("")
    async def create(http: Request, tenant: Annotated[Tenant, guard]) -> Response:
        work = partial(prepare_response, rules=preparer.rules, tenant=tenant, store=store)
        prepared = await preparer.prepare(work, await http.body(), tenant)
        request = prepared.converted.request
        context = answers.request(
            http,
            "responses",
            tenant.salted(prepared.chat.cache_salt),
            prepared.canonical,
            user_id=prepared.chat.session,
            inferred_session=prepared.inferred_session,
            left_out=prepared.left_out,
        )
        stream = answers.start([prepared.prompt], context)

        keep = partial(prepared.converted.keep, store, tenant.name)
        params = prepared.prompt.params
        writer = ResponsesWriter(context.request_id, context.created, request, params, tenant.salt, keep)
        return await answers.respond(http, stream, writer, as_events=bool(request.stream))

    @router.get("/{response_id}")
    async def retrieve(response_id: str, tenant: Annotated[Tenant, guard]) -> Response:
        return JSONResponse(_stored(store, tenant, response_id).response)

    @router.get("/{response_id}/input_items")
    async def input_items(http: Request, response_id: str, tenant: Annotated[Tenant, guard]) -> Response:
        found = _stored(store, tenant, response_id)
        return JSONResponse(_page_of(found, parse_query(PageQuery, http.query_params)))

    @router.delete("/{response_id}")
    async def delete(response_id: str, tenant: Annotated[Tenant, guard]) -> Response:
        _stored(store, tenant, response_id)
        store.delete(tenant.name, response_id)
        return JSONResponse({"id": response_id, "object": "response", "deleted": True})

    return router


def _stored(store: ResponseStore, tenant: Tenant, response_id: str) -> StoredResponse:
    """Raises NotFoundError."""
    found = store.get(tenant.name, response_id)
    if found is None:
        raise NotFoundError(f"no response {response_id[:100]!r} is stored; it may have expired", param="response_id")
    return found


class ResponsesWriter:
    """Encodes one answer as the API's JSON, or as events. params: by which it is sampled. keep: called with the
    response's JSON when it has ended.
    """

    def __init__(
        self,
        response_id: str,
        created: int,
        request: ResponsesRequest,
        params: SamplingParams,
        salt: bytes,
        keep: Callable[[Json], None],
    ) -> None:
        self._id = response_id
        self._created = created
        self._request = request
        self._params = params
        self._keep = keep
        self._salt = salt if request.wants_encrypted_reasoning else None
        self._sequence = 0

    def whole(self, answers: Sequence[WholeMessage]) -> Json:
        """The response to a request that did not ask for a stream."""
        (whole,) = answers
        output = OutputItems(self._id, self._salt)
        for _ in output.of(events_of(whole.message)):
            pass
        return self._ended(whole.answer, output)

    async def events(self, stream: MessageStream) -> AsyncGenerator[bytes, None]:
        """All events of the stream. A failure becomes a final ``response.failed`` event."""
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
        except Exception as error:  # noqa: BLE001 - the headers are sent: a failure can only be an event
            failure = failure_mid_stream(error)
            failed = {"code": failure.code or "server_error", "message": failure.message}
            response = {**self._response("failed", output.items), "error": failed}
            yield self._event({"type": "response.failed", "response": response})

    def ping(self, progress: PrefillProgress | None) -> bytes:
        """Another ``response.in_progress`` event, as clients with an idle timeout do not count comments."""
        shown = {} if progress is None else {"prefill": asdict(progress)}
        in_progress = self._response("in_progress", [])
        return self._event({"type": "response.in_progress", "response": in_progress, **shown})

    def _event(self, event: Json) -> bytes:
        numbered = {**event, "sequence_number": self._sequence}
        self._sequence += 1
        return sse_event(numbered, event["type"])

    def _ended(self, answer: AnswerState, output: "OutputItems") -> Json:
        status = _status(answer)
        for _ in output.rest(status):
            pass
        incomplete = {"reason": "max_output_tokens"} if status == "incomplete" else None
        response = {**self._response(status, output.items), "incomplete_details": incomplete, "usage": _usage(answer)}
        self._keep(response)
        return response

    def _response(self, status: str, output: Sequence[Json]) -> Json:
        request = self._request
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
            "temperature": self._params.temperature,
            "text": {"format": (request.text and request.text.format) or {"type": "text"}},
            "tool_choice": request.tool_choice or "auto",
            "tools": request.tools or [],
            "top_p": self._params.top_p,
            "truncation": "disabled",
            "usage": None,
        }


def _status(answer: AnswerState) -> str:
    return "incomplete" if answer.finish_reason is FinishReason.LENGTH else "completed"


def _usage(answer: AnswerState) -> Json:
    usage = answer.usage
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": usage.created_tokens},
        "output_tokens": answer.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": answer.reasoning_tokens},
        "total_tokens": usage.prompt_tokens + answer.completion_tokens,
    }


def events_of(message: ParsedMessage) -> Iterator[OutputEvent]:
    """The events of a whole answer."""
    calls = 0
    for part in message.parts():
        if isinstance(part, ParsedCall):
            yield CallBegin(calls, part.name, part.call_id)
            yield CallArguments(calls, part.arguments)
            yield CallEnd(calls, part.is_complete)
            calls += 1
        else:
            yield part


class OutputItems:
    """Builds an answer's output items, and the events that announce them as they are generated.

    response_id: part of the items' ids. salt: the tenant's; if given, reasoning items have ``encrypted_content``.
    items: the items that have begun. An item gets its text when it ends.
    """

    def __init__(self, response_id: str, salt: bytes | None) -> None:
        self.items: list[Json] = []
        self._key = response_id.partition("_")[2]
        self._salt = salt
        self._text: list[str] = []
        self._is_open = False

    def of(self, events: Iterable[OutputEvent]) -> Iterator[Json]:
        """The API's events for the next parsed events of the answer."""
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
        """The events that end the last item. An answer without items gets an empty message."""
        if not self.items:
            yield from self._within("message", "output_text")
        yield from self._end(status)

    def _within(self, kind: str, part: str) -> Iterator[Json]:
        """Begin an item of this kind with one content part, unless the open item is of this kind."""
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
                    item["encrypted_content"] = signed_reasoning(text, self._salt)
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
