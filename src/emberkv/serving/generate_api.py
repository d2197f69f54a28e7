"""``/generate``: a text is continued, as server-sent events with each token's id; and routes that load the model.

The events, each ``data: JSON``, are one ``{"type": "start", "seq_id", "prompt"}``, one
``{"type": "token", "token", "token_id"}`` a token, and ``{"type": "done", "generated_text", "tokens_generated"}``.
A failure ends them with ``{"type": "error", "error"}``.
"""

import uuid
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Annotated, Any, Protocol

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

from emberkv.core.sequence import FinishReason
from emberkv.engine.request import PrefillProgress, SamplingParams
from emberkv.engine.tokenization.tokenizer import Tokenizer
from emberkv.errors import EmberError, RequestError
from emberkv.serving.answer_service import Prompt
from emberkv.serving.answers.answer import AnswerDelta
from emberkv.serving.answers.answer_stream import AnswerStream, WholeAnswer
from emberkv.serving.app import AppParts, RouterFactory
from emberkv.serving.errors import failure_mid_stream
from emberkv.serving.event_stream import ping_comment, sse_event
from emberkv.serving.kv_tensors import KVTensorStore
from emberkv.serving.lifecycle import Lifecycle, ServedModel, answer_budget
from emberkv.serving.request_context import MAX_ID_LENGTH
from emberkv.serving.sequence_api import DetailRoute, KVRoutes, model_facts, parse_detailed, status_router
from emberkv.serving.tenancy import Tenant

DEFAULT_TOKENS = 50


class GenerateRequest(BaseModel):
    """seq_id: groups requests as ``X-Session-Id`` does. model_name: None takes the model that is served."""

    model_config = ConfigDict(protected_namespaces=())

    prompt: str
    max_tokens: int = DEFAULT_TOKENS
    temperature: float = 1.0
    top_p: float = 1.0
    model_name: str | None = None
    seq_id: str | None = Field(default=None, min_length=1, max_length=MAX_ID_LENGTH)

    @property
    def is_empty(self) -> bool:
        """Whether no token is wanted."""
        return self.max_tokens <= 0


class NamedGenerateRequest(GenerateRequest):
    seq_id: str = Field(min_length=1, max_length=MAX_ID_LENGTH)


class InitRequest(BaseModel):
    model_config = ConfigDict(protected_namespaces=())

    model_name: str | None = None


def prepare_generate(
    body: bytes, model: ServedModel, kind: type[GenerateRequest]
) -> tuple[GenerateRequest, Prompt | None]:
    """Check and tokenize a request; no prompt where no token is wanted. Raises RequestError, RequestValidationError."""
    request = parse_detailed(kind, body)
    if request.model_name is not None:
        model.check_name(request.model_name)
    if not request.prompt:
        raise RequestError("the prompt is empty; it must have at least one character", param="prompt")
    # log-probabilities come with each token's id and its place in the text
    params = SamplingParams(1, request.temperature, request.top_p, logprobs=0)
    limit = model.engine.max_prompt_tokens
    token_ids = model.tokenizer.encode(request.prompt, add_special_tokens=True, max_tokens=limit)
    is_given = "max_tokens" in request.model_fields_set
    budget = answer_budget(model, len(token_ids), max(0, request.max_tokens) if is_given else None)
    if request.is_empty:
        return request, None
    params = replace(params, max_tokens=min(budget.tokens, request.max_tokens))
    return request, Prompt(token_ids, params, is_clipped=budget.is_clipped)


class GenerateWriter:
    """Writes an answer's events. end_token: the id of the token that ends a text, where there is one; it is among the
    events, with an empty text.
    """

    def __init__(self, seq_id: str, prompt: str, end_token: int | None) -> None:
        self._seq_id = seq_id
        self._prompt = prompt
        self._end_token = end_token
        self._text = ""
        self._tokens = 0

    def start(self) -> bytes:
        return sse_event({"type": "start", "seq_id": self._seq_id, "prompt": self._prompt})

    def done(self) -> bytes:
        text = self._prompt + self._text
        return sse_event({"type": "done", "generated_text": text, "tokens_generated": self._tokens})

    async def events(self, stream: AnswerStream) -> AsyncGenerator[bytes, None]:
        """All events; a failure becomes the last one."""
        yield self.start()
        try:
            async for delta in stream:
                for event in self._tokens_of(delta):
                    yield event
        except Exception as error:  # noqa: BLE001 - the answer has begun: the client can only learn of it by an event
            yield sse_event({"type": "error", "error": failure_mid_stream(error).message})
            return
        yield self.done()

    def ping(self, progress: PrefillProgress | None) -> bytes:
        return ping_comment(progress)

    def _tokens_of(self, delta: AnswerDelta) -> list[bytes]:
        self._text += delta.text
        ends = [placed.end for placed in delta.logprobs]
        ids = [placed.token.token_id for placed in delta.logprobs]
        starts = [placed.start for placed in delta.logprobs]
        if delta.finish_reason is FinishReason.STOP and self._end_token is not None:
            ids.append(self._end_token)
            starts.append(ends[-1] if ends else len(self._text) - len(delta.text))
            ends.append(len(self._text))
        elif delta.finish_reason is not None and ends:
            ends[-1] = len(self._text)  # with what the last token left of a character
        self._tokens += len(ids)
        return [
            sse_event({"type": "token", "token": self._text[start:end], "token_id": token_id})
            for start, end, token_id in zip(starts, ends, ids, strict=True)
        ]

    def whole(self, answers: list[WholeAnswer]) -> dict[str, Any]:
        raise NotImplementedError("/generate is always a stream")


def end_token_of(tokenizer: Tokenizer) -> int | None:
    """The id of the token that ends a text, by the tokenizer's description."""
    text = tokenizer.description.get("eos_token")
    ids = list(tokenizer.encode(text, add_special_tokens=False)) if isinstance(text, str) else []
    return ids[0] if len(ids) == 1 else None


async def ensure_model(lifecycle: Lifecycle) -> None:
    """Have a model on demand loaded. Raises HTTPException with the status 500 where that fails."""
    try:
        await lifecycle.ensure_model()
    except EmberError as error:
        raise HTTPException(500, f"Model initialization failed: {error}") from error


def worker_routers(store: KVTensorStore, worker_id: str) -> list[RouterFactory]:
    """All routes by sequence that a worker has; see docs/sequence-routes.md."""
    return [
        lambda parts: status_router(parts, store, worker_id),
        lambda parts: KVRoutes(parts, store, worker_id).router(),
        generate_router,
        lambda parts: model_router(parts, worker_id),
    ]


class SequencePlacement(Protocol):
    """Which worker of a cluster a sequence belongs to."""

    def draw(self, prompt: Prompt, tenant: Tenant) -> str:
        """The id of a new sequence, which belongs to the worker that its prompt is best computed at."""
        ...

    def worker(self, seq_id: str) -> str:
        """The worker's id; "" while there is none."""
        ...


def generate_router(parts: AppParts, placement: SequencePlacement | None = None) -> APIRouter:
    """placement: draws a ``seq_id`` where a request has none, and says which worker is to answer; None: each request
    must have one, and is answered here.
    """
    router = APIRouter(route_class=DetailRoute)
    kind = NamedGenerateRequest if placement is None else GenerateRequest

    @router.post("/generate")
    async def generate(http: Request, tenant: Annotated[Tenant, Depends(parts.keys.tenant)]) -> Response:
        def prepare(body: bytes, model: ServedModel) -> tuple[GenerateRequest, Prompt | None]:
            return prepare_generate(body, model, kind)

        await ensure_model(parts.lifecycle)
        request, prompt = await parts.preparer.prepare(prepare, await http.body(), tenant)
        if placement is not None and request.seq_id is None and prompt is not None:
            seq_id = placement.draw(prompt, tenant)
        else:
            seq_id = request.seq_id or str(uuid.uuid4())
        writer = GenerateWriter(seq_id, request.prompt, end_token_of(parts.lifecycle.model().tokenizer))
        if prompt is None:
            return Response(writer.start() + writer.done(), media_type="text/event-stream")
        worker = "" if placement is None else placement.worker(seq_id)
        context = replace(parts.answers.request(http, "generate", tenant), session=seq_id, worker=worker, seq_id=seq_id)
        stream = parts.answers.start([prompt], context)
        return await parts.answers.respond(http, stream, writer, as_events=True, has_late_headers=True)

    return router


def model_router(parts: AppParts, worker_id: str) -> APIRouter:
    """The routes by which a worker's operator loads and unloads its model."""
    router = APIRouter(prefix="/inference", route_class=DetailRoute)
    lifecycle, client, operator = parts.lifecycle, Depends(parts.keys.tenant), Depends(parts.guard.operator)

    def facts() -> dict[str, Any]:
        found = model_facts(lifecycle.model())
        return {"worker_id": worker_id, "model_info": found["info"], "memory_usage": found["memory"]}

    @router.post("/init", dependencies=[client])
    async def init(http: Request) -> Response:
        request = parse_detailed(InitRequest, await http.body() or b"{}")
        await ensure_model(lifecycle)
        if request.model_name is not None:
            lifecycle.model().check_name(request.model_name)
        return JSONResponse({"status": "initialized", **facts()})

    @router.get("/model/info", dependencies=[client])
    async def info() -> Response:
        if not lifecycle.has_model:
            return JSONResponse({"loaded": False, "worker_id": worker_id})
        return JSONResponse({"loaded": True, **facts()})

    @router.delete("/model", dependencies=[operator])
    async def unload() -> Response:
        if not lifecycle.has_model:
            return JSONResponse({"status": "no_model_loaded", "worker_id": worker_id})
        name = lifecycle.model().names[0]
        await lifecycle.unload_model()
        return JSONResponse({"status": "unloaded", "model_name": name, "worker_id": worker_id})

    return router
