"""The tokenizer's routes, in vLLM's shapes: tokenize, detokenize, tokenizer_info."""

from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response
from pydantic import Field

from emberkv.errors import RequestError
from emberkv.serving.answer_service import RequestPreparer
from emberkv.serving.api.openai_schema import ChatCompletionRequest, TemplateOptions
from emberkv.serving.api.rendering import render_chat
from emberkv.serving.api.validation import RequestBody, parse_body
from emberkv.serving.auth import ApiKeys
from emberkv.serving.canonical import CanonicalRules
from emberkv.serving.event_stream import compact_json
from emberkv.serving.lifecycle import Lifecycle, ServedModel
from emberkv.serving.tenancy import Tenant

MAX_TOKEN_ID = 2**31 - 1


class TokenizeRequest(TemplateOptions):
    """The body of POST /tokenize: a prompt, or a conversation, whose tokens are those of a chat completion's prompt.

    add_special_tokens: by default for a prompt only, as a chat template writes them itself.
    """

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(RequestBody):
    """The body of POST /detokenize."""

    model: str | None = None
    tokens: list[Annotated[int, Field(ge=0, le=MAX_TOKEN_ID)]]


def tokenize(body: bytes, model: ServedModel, rules: CanonicalRules | None) -> dict[str, Any]:
    """Raises RequestError. model: as the request's tenant sees it."""
    request = parse_body(TokenizeRequest, body)
    if request.model is not None:
        model.check_name(request.model)
    if (request.prompt is None) == (request.messages is None):
        raise RequestError("give either prompt or messages", param="prompt")
    token_ids = _token_ids(request, model, rules)
    names = [model.tokenizer.token_text(token_id) for token_id in token_ids] if request.return_token_strs else None
    return {
        "count": len(token_ids),
        "max_model_len": model.engine.context_length,
        "tokens": list(token_ids),
        "token_strs": names,
    }


def _token_ids(request: TokenizeRequest, model: ServedModel, rules: CanonicalRules | None) -> Sequence[int]:
    encode = partial(model.tokenizer.encode, max_tokens=model.countable_tokens)
    if request.prompt is not None:
        return encode(request.prompt, add_special_tokens=request.add_special_tokens is not False)
    given = compact_json({"model": "", **request.model_dump(exclude_none=True)})
    chat = parse_body(ChatCompletionRequest, given.encode())
    rendered = render_chat(chat, model, rules, model.countable_tokens)
    return encode(rendered.text, add_special_tokens=True) if request.add_special_tokens else rendered.token_ids


def detokenize(body: bytes, model: ServedModel) -> dict[str, Any]:
    """Special tokens are written out. Raises RequestError."""
    request = parse_body(DetokenizeRequest, body)
    if request.model is not None:
        model.check_name(request.model)
    text = b"".join(map(model.tokenizer.token_bytes, request.tokens))
    return {"prompt": text.decode(errors="replace")}


def tokenizer_router(lifecycle: Lifecycle, keys: ApiKeys, preparer: RequestPreparer) -> APIRouter:
    """The routes, open to requests with one of ``keys``."""
    router = APIRouter()
    guard = Depends(keys.tenant)

    @router.post("/tokenize")
    async def tokenize_text(http: Request, tenant: Annotated[Tenant, guard]) -> Response:
        work = partial(tokenize, rules=preparer.rules)
        return JSONResponse(await preparer.prepare(work, await http.body(), tenant))

    @router.post("/detokenize")
    async def detokenize_ids(http: Request, tenant: Annotated[Tenant, guard]) -> Response:
        return JSONResponse(await preparer.prepare(detokenize, await http.body(), tenant))

    @router.get("/tokenizer_info", dependencies=[guard])
    async def tokenizer_info() -> Response:
        model = lifecycle.model()
        return JSONResponse({**model.tokenizer.description, "model_max_length": model.engine.context_length})

    return router
