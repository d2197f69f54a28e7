"""What all routes share."""

import asyncio
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from fastapi import Request

from emberkv.serving.answer_stream import AnswerStream
from emberkv.serving.auth import ApiKeys
from emberkv.serving.generator import Prompt, TextGenerator
from emberkv.serving.lifecycle import Lifecycle, LoadedModel
from emberkv.serving.metrics import Clock, ServingMetrics
from emberkv.serving.secret import SECRET_BYTES
from emberkv.serving.tenants import Tenant, Tenants

DEFAULT_MAX_BODY_BYTES = 16 * 2**20
LARGE_BODY_BYTES = 20_000  # from here on, parsing and tokenizing would be felt by others on the event loop

T = TypeVar("T")


@dataclass(frozen=True)
class ServingSettings:
    """max_body_bytes: the largest request body accepted.

    tenants: who may ask; None makes each of ``api_keys`` one of its own, and without these no key is asked for.
    """

    api_keys: tuple[str, ...] = ()
    max_body_bytes: int = DEFAULT_MAX_BODY_BYTES
    tenants: Tenants | None = None


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
        self._generator: TextGenerator | None = None

    def start(self, prompts: Sequence[Prompt], *, api: str, tenant: Tenant, arrived: float) -> AnswerStream:
        """Start answers that a drain waits for.

        Raises NotReadyError unless the server takes requests, else what ``Engine.submit`` raises.
        """
        self.lifecycle.check_accepting()
        if self._generator is None:
            model = self.lifecycle.model()
            self._generator = TextGenerator(model.engine, model.tokenizer, metrics=self.metrics, clock=self.clock)
        stream = self._generator.start(
            prompts, api=api, tenant=tenant, arrived=arrived, on_close=self.lifecycle.untrack
        )
        self.lifecycle.track(stream)
        return stream

    async def tenant(self, request: Request) -> Tenant:
        """The route dependency that checks the API key. Raises UnauthorizedError."""
        return self.keys.tenant_of(request.headers)

    async def prepare(self, work: Callable[[bytes, LoadedModel], T], body: bytes) -> T:
        """Parse, render and tokenize a request; off the event loop when it is large."""
        task = partial(work, body, self.lifecycle.model())
        return await asyncio.to_thread(task) if len(body) > LARGE_BODY_BYTES else task()
