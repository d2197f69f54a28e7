"""What all routes share."""

import os
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from fastapi import Request

from emberkv.serving.answers import cache_header
from emberkv.serving.answers.answer import Answer
from emberkv.serving.answers.answer_stream import AnswerStream
from emberkv.serving.answers.generator import Prompt, TextGenerator
from emberkv.serving.auth import AdminGuard, ApiKeys, IsOwnUser
from emberkv.serving.canonical import CanonicalRules
from emberkv.serving.errors import request_info
from emberkv.serving.http.request_body import default_max_bytes
from emberkv.serving.lifecycle import Lifecycle, LoadedModel
from emberkv.serving.metrics.collectors import (
    BuildCollector,
    ReuseCollector,
    TierCollector,
    TokenizerCollector,
    WarmupCollector,
)
from emberkv.serving.metrics.request_metrics import Clock, ServingMetrics, TenantMetrics
from emberkv.serving.request_context import RecentRequests, RequestContext, Sessions, session_id
from emberkv.serving.request_log import log_finished
from emberkv.serving.tenancy.keys import SECRET_BYTES
from emberkv.serving.tenancy.tenants import Tenant, Tenants
from emberkv.serving.trace_recorder import TraceRecorder
from emberkv.serving.worker_pool import WorkerPool

LARGE_BODY_BYTES = 20_000  # from here on, parsing and tokenizing would be felt by others on the event loop

_ID_PREFIXES = {"messages": "msg_", "chat_completions": "chatcmpl-", "completions": "cmpl-", "warm": "warm-"}

T = TypeVar("T")


@dataclass(frozen=True)
class ServingSettings:
    """max_body_bytes: the largest request body accepted; None: what `default_max_bytes` says of the model's context.

    tenants: who may ask; None makes each of ``api_keys`` one of its own, and without these no key is asked for.
    canonical: rules that rewrite prompts before they are rendered. recorder: is told of every request. For admin_key,
    metrics_key, bound_to_loopback and is_own_user see `AdminGuard`. allowed_origins: see `SourceCheck`. Web pages from
    these may ask, "*" being all. root_path: the path under which a proxy serves all routes.
    """

    api_keys: tuple[str, ...] = ()
    max_body_bytes: int | None = None
    tenants: Tenants | None = None
    canonical: CanonicalRules | None = None
    admin_key: str | None = None
    metrics_key: str | None = None
    recorder: TraceRecorder | None = None
    bound_to_loopback: bool = False
    is_own_user: IsOwnUser = lambda _: True
    allowed_origins: tuple[str, ...] = ()
    root_path: str = ""


class ServingContext:
    """The state behind one app.

    clock: monotonic seconds, for latencies. wall_clock: seconds since 1970, for answers' ``created``.
    """

    def __init__(
        self,
        lifecycle: Lifecycle,
        settings: ServingSettings,
        *,
        clock: Clock = time.perf_counter,
        wall_clock: Clock = time.time,
    ) -> None:
        self.lifecycle = lifecycle
        self.settings = settings
        self.clock = clock
        self.wall_clock = wall_clock
        self.tenants = settings.tenants or Tenants(settings.api_keys, secret=os.urandom(SECRET_BYTES))
        self.keys = ApiKeys(self.tenants)
        self.metrics = ServingMetrics(lifecycle.engine_stats)
        self.metrics.register(TierCollector(lifecycle.engine_stats))
        self.metrics.register(BuildCollector(lifecycle.about))
        self.metrics.register(lifecycle.background)
        self.metrics.register(WarmupCollector(lifecycle.warmup_report))
        self.metrics.register(TokenizerCollector(lifecycle.tokenizer_cache_bytes))
        self.metrics.register(ReuseCollector(lifecycle.reuse))
        self.guard = AdminGuard(
            settings.admin_key,
            metrics_key=settings.metrics_key,
            bound_to_loopback=settings.bound_to_loopback,
            tenants=self.tenants,
            keys=self.keys,
            is_own_user=settings.is_own_user,
        )
        self.sessions = Sessions()
        self.workers = WorkerPool()
        self.recent = RecentRequests()
        self.tenant_metrics = TenantMetrics(lifecycle.engine_stats)
        self._generator: TextGenerator | None = None

    def asked(
        self, http: Request, api: str, tenant: Tenant, arrived: float, canonical: Mapping[str, int] | None = None
    ) -> RequestContext:
        """A request that has arrived. Raises RequestError for a session's id that is too long."""
        request_id = _ID_PREFIXES[api] + uuid.uuid4().hex
        http_id = request_info(http).request_id
        return RequestContext(request_id, api, tenant, arrived, session_id(http.headers), canonical or {}, http_id)

    def max_body_bytes(self) -> int:
        """The largest body that is accepted now; before the model is loaded, the least that any model accepts."""
        if self.settings.max_body_bytes is not None:
            return self.settings.max_body_bytes
        return default_max_bytes(self.lifecycle.model().engine.context_length if self.lifecycle.has_model else 0)

    def start(self, prompts: Sequence[Prompt], asked: RequestContext) -> AnswerStream:
        """Start answers that a drain waits for.

        Raises NotReadyError unless the server takes requests, else what ``Engine.submit`` raises.
        """
        self.lifecycle.check_accepting()
        if self._generator is None:
            model = self.lifecycle.model()
            recorder = self.settings.recorder
            engine = model.engine if recorder is None else recorder.over(model.engine, model.public)
            self._generator = TextGenerator(engine, model.tokenizer, metrics=self.metrics, clock=self.clock)
        stream = self._generator.start(prompts, asked, on_close=partial(self._closed, asked))
        self.lifecycle.track(stream)
        self.recent.add(asked)
        return stream

    def cache_headers(self, stream: AnswerStream) -> dict[str, str]:
        """What a response says about the cache, once its first answer has begun."""
        request_id, answer, _ = stream.timed_answers[0]
        return {cache_header.NAME: str(self._summary(request_id, answer))}

    def _summary(self, request_id: str, answer: Answer) -> cache_header.CacheSummary:
        cache = self.lifecycle.model().cache
        explanation = cache.books.explained(request_id) if cache is not None else None
        return cache_header.summary_of(answer.usage, explanation)

    def _closed(self, asked: RequestContext, stream: AnswerStream) -> None:
        self.lifecycle.untrack(stream)
        usages = [answer.usage for answer in stream.answers]
        self.sessions.count(asked, usages, self.wall_clock())
        self.tenant_metrics.count(asked.tenant.name, usages)
        for request_id, answer, timer in stream.timed_answers:
            log_finished(asked, request_id, answer, timer, self._summary(request_id, answer))
        if (reuse := self.lifecycle.reuse()) is not None:
            reuse.settle()

    async def tenant(self, request: Request) -> Tenant:
        """The route dependency that checks the API key. Raises UnauthorizedError."""
        return self.keys.tenant_of(request.headers)

    async def prepare(self, work: Callable[[bytes, LoadedModel], T], body: bytes, tenant: Tenant) -> T:
        """Parse, render and tokenize a request; off the event loop when it is large."""
        task = partial(work, body, self.lifecycle.model().seen_by(tenant.name))
        return await self.workers.run(task) if len(body) > LARGE_BODY_BYTES else task()
