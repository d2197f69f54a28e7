"""The OpenAI API's routes: chat completions, completions, models."""

from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response

from emberkv.errors import RequestError
from emberkv.serving.answer_service import AnswerService
from emberkv.serving.answers.answer import echo_of
from emberkv.serving.answers.generator import Prompt, answer_budget
from emberkv.serving.api.anthropic_api import anthropic_card
from emberkv.serving.api.openai_responses import ChatWriter, CompletionWriter
from emberkv.serving.api.openai_schema import (
    DEFAULT_COMPLETION_TOKENS,
    MAX_ECHOED_LOGPROBS,
    ChatCompletionRequest,
    CompletionRequest,
    OpenAIRequest,
)
from emberkv.serving.api.rendering import Applied, render_chat
from emberkv.serving.api.validation import parse_body
from emberkv.serving.auth import ApiKeys
from emberkv.serving.canonical import CanonicalRules
from emberkv.serving.errors import speaks_anthropic
from emberkv.serving.lifecycle import Lifecycle, ServedModel
from emberkv.serving.request_context import RequestContext
from emberkv.serving.tenancy.tenants import Tenant
from emberkv.serving.workers import RequestPreparer


def prepare_chat(
    body: bytes, model: ServedModel, rules: CanonicalRules | None
) -> tuple[ChatCompletionRequest, list[Prompt], Applied]:
    """Check, render and tokenize a chat request. Without max_tokens, an answer may fill the context.

    Raises RequestError.
    """
    request = parse_body(ChatCompletionRequest, body)
    model.check_name(request.model)
    request.check()
    logprobs = request.wanted_logprobs
    rendered = render_chat(request, model.tokenizer, rules, model.engine.max_prompt_tokens)
    token_ids = rendered.token_ids
    if request.max_completion_tokens is None:
        field, wanted = "max_tokens", request.max_tokens
    else:
        field, wanted = "max_completion_tokens", request.max_completion_tokens
    budget = answer_budget(model.engine, len(token_ids), wanted, field=field)
    prompts = [
        Prompt(token_ids, each, rendered.retain_tokens, rendered.retain_seconds)
        for each in request.sampling(model.sampling_defaults, max_tokens=budget, logprobs=logprobs)
    ]
    return request, prompts, rendered.canonical


def prepare_completion(body: bytes, model: ServedModel) -> tuple[CompletionRequest, list[Prompt]]:
    """Check and tokenize a completion request. Raises RequestError."""
    request = parse_body(CompletionRequest, body)
    model.check_name(request.model)
    request.check()
    prompts = []
    for given in request.prompts():
        token_ids = _completion_tokens(given, model)
        budget = answer_budget(model.engine, len(token_ids), request.max_tokens)
        if request.max_tokens is None:
            budget = min(budget, DEFAULT_COMPLETION_TOKENS)
        silent = request.max_tokens == 0
        choices = request.sampling(
            model.sampling_defaults,
            max_tokens=1 if silent else budget,
            logprobs=request.logprobs,
            prompt_logprobs=request.logprobs if request.echo else None,
        )
        echo = echo_of(given, token_ids, model.tokenizer) if request.echo else None
        prompts += [Prompt(token_ids, params, silent=silent, echo=echo) for params in choices]
    _check_echoed_logprobs(request, prompts)
    return request, prompts


def _check_echoed_logprobs(request: CompletionRequest, prompts: list[Prompt]) -> None:
    if not request.echo or request.logprobs is None:
        return
    entries = sum(len(prompt.token_ids) for prompt in prompts) * (request.logprobs + 1)
    if entries > MAX_ECHOED_LOGPROBS:
        raise RequestError(
            f"echo with logprobs asks for {entries} log-probabilities of prompt tokens; at most {MAX_ECHOED_LOGPROBS} "
            "are given at once: send fewer prompts, shorter ones, or smaller logprobs",
            param="logprobs",
        )


def _completion_tokens(given: str | list[int], model: ServedModel) -> Sequence[int]:
    if not isinstance(given, str):
        return given
    return model.tokenizer.encode(given, add_special_tokens=True, max_tokens=model.engine.max_prompt_tokens)


def openai_router(lifecycle: Lifecycle, keys: ApiKeys, preparer: RequestPreparer, answers: AnswerService) -> APIRouter:
    """The routes, open to requests with one of ``keys``."""
    router = APIRouter()
    guard = Depends(keys.tenant)

    def writer_arguments(request: OpenAIRequest, context: RequestContext) -> dict[str, Any]:
        model = lifecycle.model()
        return {
            "request_id": context.request_id,
            "model": model.names[0],
            "created": context.created,
            "tokens": model.tokenizer,
            "choices": request.choices,
            "include_usage": request.include_usage,
        }

    @router.post("/v1/chat/completions")
    async def chat_completions(http: Request, tenant: Annotated[Tenant, guard]) -> Response:
        work = partial(prepare_chat, rules=preparer.rules)
        request, prompts, canonical = await preparer.prepare(work, await http.body(), tenant)
        context = answers.request(http, "chat_completions", tenant.salted(request.cache_salt), canonical)
        stream = answers.start(prompts, context)
        writer = ChatWriter(**writer_arguments(request, context))
        return await answers.respond(http, stream, writer, as_events=bool(request.stream))

    @router.post("/v1/completions")
    async def completions(http: Request, tenant: Annotated[Tenant, guard]) -> Response:
        request, prompts = await preparer.prepare(prepare_completion, await http.body(), tenant)
        context = answers.request(http, "completions", tenant.salted(request.cache_salt))
        stream = answers.start(prompts, context)
        writer = CompletionWriter(**writer_arguments(request, context))
        return await answers.respond(http, stream, writer, as_events=bool(request.stream))

    @router.get("/v1/models", dependencies=[guard])
    async def models(http: Request) -> Response:
        model = lifecycle.model()
        if speaks_anthropic(http):
            cards = [anthropic_card(model, name) for name in model.names]
            return JSONResponse(
                {"data": cards, "has_more": False, "first_id": model.names[0], "last_id": model.names[-1]}
            )
        return JSONResponse({"object": "list", "data": [_model_card(model, name) for name in model.names]})

    @router.get("/v1/models/{name:path}", dependencies=[guard])
    async def model_card(name: str, http: Request) -> Response:
        model = lifecycle.model()
        model.check_name(name)
        return JSONResponse((anthropic_card if speaks_anthropic(http) else _model_card)(model, name))

    return router


def _model_card(model: ServedModel, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": model.created,
        "owned_by": "emberkv",
        "max_model_len": model.engine.context_length,
    }
