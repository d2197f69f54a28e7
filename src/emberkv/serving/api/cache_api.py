"""The cache's own routes under /v1/cache: look, explain, warm, pin, remove. `AdminGuard` says which are let in."""

import re
import reprlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import AliasChoices, Field
from starlette.exceptions import HTTPException

from emberkv.core.hashing import BlockHash, TokenChain
from emberkv.engine.request import SamplingParams
from emberkv.errors import ConfigError, RequestError
from emberkv.serving.answer_service import AnswerService, Prompt, RequestPreparer
from emberkv.serving.api.anthropic_schema import PromptRequest
from emberkv.serving.api.openai_schema import MAX_SALT, ChatCompletionRequest, CompletionRequest
from emberkv.serving.api.rendering import RenderedPrompt, render_chat, render_messages
from emberkv.serving.api.responses_api import unstored_chat
from emberkv.serving.api.validation import RequestBody, parse_body
from emberkv.serving.auth import AdminGuard
from emberkv.serving.cache.service import CacheService, Explained, PrefixPath, explanation_json
from emberkv.serving.canonical import CanonicalRules
from emberkv.serving.errors import CLIENT_GONE, NotFoundError
from emberkv.serving.event_stream import compact_json, unless_disconnected
from emberkv.serving.lifecycle import Lifecycle, ServedModel, answer_budget
from emberkv.serving.request_context import RequestContext
from emberkv.serving.tenancy import DEFAULT_TENANT, Tenant, Tenants

MAX_TOKEN_ID = 2**31 - 1
_FORMS = ("openai", "anthropic", "response_id", "prefix")


class CacheQuestion(RequestBody):
    """The body of the routes under /v1/cache. Exactly one of the first four is given.

    openai: the body of a chat completion, a completion or a response; anthropic: a message request's. Both may leave
    out the model.
    response_id: of a past response; answer: which of its answers. prefix, or block_hash: a listed prefix's hash, in
    hexadecimal.
    tenant: the one that would send the prompt; only the operator may give it. seconds: how long to pin; None: until it
    is unpinned.
    """

    openai: dict[str, Any] | None = None
    anthropic: dict[str, Any] | None = None
    response_id: str | None = None
    prefix: str | None = Field(default=None, validation_alias=AliasChoices("prefix", "block_hash"))
    answer: Annotated[int, Field(ge=0)] = 0
    tenant: str | None = None
    seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None

    @property
    def cache_salt(self) -> str | None:
        """The OpenAI request's. Raises RequestError for one that a request could not have."""
        salt = (self.openai or {}).get("cache_salt")
        if salt is not None and not (isinstance(salt, str) and 0 < len(salt) <= MAX_SALT):
            raise RequestError(f"cache_salt must be a string of 1 to {MAX_SALT} characters", param="cache_salt")
        return salt

    def check(self, *accepted: str) -> None:
        """Raises RequestError unless exactly one of ``accepted`` is given, of all forms."""
        given = [form for form in _FORMS if getattr(self, form) is not None]
        if len(given) != 1 or given[0] not in accepted:
            raise RequestError(f"given: {', '.join(given) or 'nothing'}; give exactly one of {', '.join(accepted)}")

    def prefix_hash(self) -> bytes:
        """Raises RequestError unless it is hexadecimal."""
        try:
            return bytes.fromhex(self.prefix or "")
        except ValueError as error:
            message = f"prefix is {self.prefix!r}; it must be a block hash in hexadecimal, as they are listed"
            raise RequestError(message, param="prefix") from error


def rendered_prompt(
    question: CacheQuestion, model: ServedModel, rules: CanonicalRules | None, tenant: Tenant
) -> RenderedPrompt:
    """The prompt in question, as a request of the tenant would be rendered. Raises RequestError for what cannot be
    used.
    """
    named = compact_json({"model": model.names[0], **(question.anthropic or question.openai or {})}).encode()
    if question.anthropic is not None:
        request = parse_body(PromptRequest, named)
        model.check_name(request.model)
        return _checked(render_messages(request, model, rules, model.countable_tokens))
    if question.openai is not None and "prompt" in question.openai:
        completion = parse_body(CompletionRequest, named)
        model.check_name(completion.model)
        prompt = completion.prompts()[0]
        if isinstance(prompt, str):
            prompt = list(model.tokenizer.encode(prompt, add_special_tokens=True, max_tokens=model.countable_tokens))
        return _checked(RenderedPrompt(prompt))
    if question.openai is not None and "input" in question.openai:
        named = unstored_chat(named, tenant)
    chat = parse_body(ChatCompletionRequest, named)
    model.check_name(chat.model)
    return _checked(render_chat(chat, model, rules, model.countable_tokens))


def _checked(rendered: RenderedPrompt) -> RenderedPrompt:
    if not rendered.token_ids:
        raise RequestError("the prompt is empty; it must have at least one token", param="prompt")
    if max(rendered.token_ids) > MAX_TOKEN_ID:
        raise RequestError(f"prompt has a token id above {MAX_TOKEN_ID}, which no model has", param="prompt")
    return rendered


def tenant_meant(question: CacheQuestion, tenants: Tenants) -> Tenant:
    """Whose prompt the operator asks about. Raises RequestError for a tenant that is missing or unknown."""
    if question.tenant is None:
        if not tenants.names:
            return DEFAULT_TENANT
        known = ", ".join(map(repr, tenants.names))
        raise RequestError(f"tenant is missing; this server has {known}", param="tenant")
    try:
        return tenants.named(question.tenant)
    except ConfigError as error:
        raise RequestError(str(error), param="tenant") from error


MAX_LISTED = 200


def cache_router(
    lifecycle: Lifecycle,
    guard: AdminGuard,
    tenants: Tenants,
    preparer: RequestPreparer,
    answers: AnswerService,
    wall_clock: Callable[[], float],
) -> APIRouter:
    """The routes over the cache of the model that ``lifecycle`` holds. wall_clock: seconds since 1970."""
    routes = CacheRoutes(lifecycle, guard, tenants, preparer, answers, wall_clock)
    router = APIRouter(prefix="/v1/cache")
    for path, answer in (("", routes.statistics), ("/sessions", routes.sessions), ("/prefixes", routes.prefixes)):
        router.add_api_route(path, answer, methods=["GET"])
    router.add_api_route("/suggestions", routes.suggestions, methods=["GET"])
    for answer in (routes.explain, routes.warm, routes.pin, routes.unpin, routes.remove, routes.clear):
        router.add_api_route(f"/{answer.__name__}", answer, methods=["POST"])
    return router


class CacheRoutes:
    """All but explain and suggestions are the operator's. A POST's body is a `CacheQuestion`."""

    def __init__(
        self,
        lifecycle: Lifecycle,
        guard: AdminGuard,
        tenants: Tenants,
        preparer: RequestPreparer,
        answers: AnswerService,
        wall_clock: Callable[[], float],
    ) -> None:
        self._lifecycle = lifecycle
        self._guard = guard
        self._tenants = tenants
        self._preparer = preparer
        self._answers = answers
        self._wall_clock = wall_clock

    async def statistics(self, http: Request) -> Response:
        await self._guard.operator(http)
        sessions = self._answers.sessions
        return JSONResponse({"object": "cache", **await self._cache().statistics(), "sessions": len(sessions)})

    async def sessions(self, http: Request) -> Response:
        await self._guard.operator(http)
        return JSONResponse({"object": "list", "data": self._answers.sessions.listing()})

    async def prefixes(self, http: Request) -> Response:
        await self._guard.operator(http)
        listed = await self._cache().prefixes(*listing_asked(http), self._lifecycle.model().tokenizer)
        return JSONResponse({"object": "list", "data": listed})

    async def explain(self, http: Request) -> Response:
        """The explanation of a tenant's own prompt or response; the operator may ask about any tenant's."""
        tenant = await self._guard.asker(http)
        question = await self._question(http, "openai", "anthropic", "response_id")
        if question.response_id is not None:
            explained = self._past(question.response_id, question.answer, tenant)
        else:
            explained = await self._present(question, tenant)
        tokenizer = self._lifecycle.model().tokenizer
        return JSONResponse(explanation_json(explained, tokenizer, now=self._wall_clock()))

    async def suggestions(self, http: Request) -> Response:
        """Canonical rules for volatile lines in a tenant's own prompts; the operator sees those of all tenants."""
        tenant = await self._guard.asker(http)
        found = self._answers.volatile_lines.suggestions(None if tenant is None else tenant.name)
        return JSONResponse({"object": "list", "data": [each.as_json() for each in found]})

    async def warm(self, http: Request) -> Response:
        """Have a prompt computed now, so that the next request with it hits."""
        await self._guard.operator(http)
        question = await self._question(http, "openai", "anthropic")
        tenant = tenant_meant(question, self._tenants)
        prompt = await self._prompt(question, tenant)
        answer_budget(self._lifecycle.model(), len(prompt.token_ids), 1)
        request = self._answers.request(http, "warm", tenant.salted(question.cache_salt), prompt.canonical)
        stream = self._answers.start([Prompt(prompt.token_ids, SamplingParams(max_tokens=1))], request)
        async with stream:
            answers = await unless_disconnected(http.receive, stream.collect())
        if answers is None:
            return Response(status_code=CLIENT_GONE)
        usage = answers[0].answer.usage
        fields = {"cached_tokens": usage.cached_tokens, "computed_tokens": usage.computed_tokens}
        return JSONResponse({"object": "cache.warmed", "prompt_tokens": usage.prompt_tokens, **fields})

    async def pin(self, http: Request) -> Response:
        """Have a prefix evicted last. For good, it is also warmed again whenever it is lost."""
        await self._guard.operator(http)
        question, path = await self._path(http)
        fields = await self._cache().pin(path, question.seconds)
        return JSONResponse({"object": "cache.pinned", "prefix": path.block_hashes[-1].hex(), **fields})

    async def unpin(self, http: Request) -> Response:
        await self._guard.operator(http)
        _, path = await self._path(http)
        await self._cache().unpin(path)
        return JSONResponse({"object": "cache.unpinned", "prefix": path.block_hashes[-1].hex()})

    async def remove(self, http: Request) -> Response:
        """Forget a prefix, unless others share it, and all that goes on from it."""
        await self._guard.operator(http)
        _, path = await self._path(http, any_length=True)
        return JSONResponse({"object": "cache.removed", **(await self._cache().remove(path)).as_json()})

    async def clear(self, http: Request) -> Response:
        await self._guard.operator(http)
        check_json(http)
        return JSONResponse({"object": "cache.cleared", **(await self._cache().remove_blocks(None)).as_json()})

    def _past(self, response_id: str, answer: int, tenant: Tenant | None) -> Explained:
        request = self._remembered(response_id, tenant)
        explanation = self._cache().ledger_store.explained(request.answer_id(answer))
        if explanation is None:
            raise unknown_response(response_id)
        return Explained(explanation, request.canonical)

    def _remembered(self, response_id: str, tenant: Tenant | None) -> RequestContext:
        """The request of a response. Another tenant's is as unknown as one that never was: NotFoundError."""
        request = self._answers.recent.get(response_id)
        if request is None or (tenant is not None and request.tenant.name != tenant.name):
            raise unknown_response(response_id)
        return request

    async def _present(self, question: CacheQuestion, tenant: Tenant | None) -> Explained:
        asker = tenant if tenant is not None else tenant_meant(question, self._tenants)
        prompt = await self._prompt(question, asker)
        others = [] if tenant is not None else [self._tenants.named(name) for name in self._tenants.names]
        explained = await self._cache().explain(prompt.token_ids, asker.salted(question.cache_salt), others)
        return replace(explained, canonical=prompt.canonical)

    async def _path(self, http: Request, *, any_length: bool = False) -> tuple[CacheQuestion, PrefixPath]:
        """Raises RequestError for a prompt that fills no block, unless it may have any length."""
        question = await self._question(http, "openai", "anthropic", "prefix")
        if question.prefix is not None:
            return question, await self._listed_path(question.prefix_hash())
        tenant = tenant_meant(question, self._tenants)
        prompt = await self._prompt(question, tenant)
        chain = await self._preparer.run(partial(self._chain, prompt.token_ids, tenant.salted(question.cache_salt)))
        if not chain.block_hashes and not any_length:
            raise RequestError(f"the prompt has {len(chain)} tokens; it must fill a block of {chain.block_size}")
        return question, PrefixPath.of(chain, prompt.token_ids, tenant.name)

    async def _listed_path(self, block_hash: BlockHash) -> PrefixPath:
        """Raises NotFoundError for a prefix that is not known."""
        return await self._cache().path(block_hash)

    def _chain(self, tokens: Sequence[int], tenant: Tenant) -> TokenChain:
        return self._cache().chain(tokens, tenant)

    async def _question(self, http: Request, *accepted: str) -> CacheQuestion:
        check_json(http)
        body = await http.body()
        question = await self._preparer.run(partial(parse_body, CacheQuestion, body), len(body))
        question.check(*accepted)
        return question

    async def _prompt(self, question: CacheQuestion, tenant: Tenant) -> RenderedPrompt:
        """tenant: as for `unstored_chat`."""
        model = self._preparer.model_for(tenant.name)
        return await self._preparer.run(partial(rendered_prompt, question, model, self._preparer.rules, tenant))

    def _cache(self) -> CacheService:
        cache = self._lifecycle.model().cache
        if cache is None:
            raise HTTPException(404)
        return cache


def listing_asked(http: Request) -> tuple[str, int]:
    """By what prefixes are to be listed, and how many. Raises RequestError."""
    by, limit = http.query_params.get("by", "hottest"), http.query_params.get("limit", "20")
    if by not in ("hottest", "largest"):
        raise RequestError(f"by is {reprlib.repr(by)}; it must be 'hottest' or 'largest'", param="by")
    if not re.fullmatch("0*[1-9][0-9]{0,2}", limit, re.ASCII) or int(limit.lstrip("0")) > MAX_LISTED:
        raise RequestError(f"limit is {reprlib.repr(limit)}; it must be from 1 to {MAX_LISTED}", param="limit")
    return by, int(limit)


def unknown_response(response_id: str) -> NotFoundError:
    message = f"response_id {response_id!r} is unknown; only the last responses are remembered"
    return NotFoundError(message, param="response_id")


def check_json(http: Request) -> None:
    """Refuse what is not JSON: a form of another site's page can send other types from the browser of an operator."""
    if http.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise HTTPException(415, "the content-type must be application/json")
