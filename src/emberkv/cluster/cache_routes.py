"""The routes under /v1/cache at a gateway: what all workers have, and where a prompt would go, and why."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import msgspec
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from emberkv.cluster.cluster_engine import ClusterEngine
from emberkv.cluster.membership import Membership, Worker
from emberkv.cluster.policies import Decision
from emberkv.cluster.wire import LoadReport
from emberkv.engine.request import GenerationRequest, SamplingParams
from emberkv.errors import EmberError
from emberkv.serving.api.cache_api import CacheRoutes, tenant_meant
from emberkv.serving.app import AppParts
from emberkv.serving.errors import NotFoundError, NotReadyError

_ANY_ANSWER = SamplingParams(max_tokens=1)


class ClusterCacheRoutes(CacheRoutes):
    """Statistics, sessions, explain and warm. What only a worker's ledger of blocks can answer (its prefixes, and pins
    and removal by them) is asked of the worker itself.
    """

    def __init__(
        self,
        parts: AppParts,
        membership: Membership,
        engine: Callable[[], ClusterEngine | None],
    ) -> None:
        super().__init__(parts.lifecycle, parts.guard, parts.tenants, parts.preparer, parts.answers, parts.wall_clock)
        self._membership = membership
        self._engine = engine

    def router(self) -> APIRouter:
        router = APIRouter(prefix="/v1/cache")
        for path, answer in (("", self.statistics), ("/sessions", self.sessions), ("/prefixes", self.elsewhere)):
            router.add_api_route(path, answer, methods=["GET"])
        for name, answer in (("explain", self.explain), ("warm", self.warm)):
            router.add_api_route(f"/{name}", answer, methods=["POST"])
        for name in ("pin", "unpin", "remove", "clear"):
            router.add_api_route(f"/{name}", self.elsewhere, methods=["POST"])
        return router

    async def statistics(self, http: Request) -> Response:
        """What each worker last reported of its pool and its work."""
        await self._guard.operator(http)
        workers = {
            worker.worker_id: {"status": worker.status.value, **load_json(worker.report)}
            for worker in self._membership.workers
            if worker.report is not None
        }
        return JSONResponse({"object": "cache", "workers": workers, "sessions": len(self._answers.sessions)})

    async def elsewhere(self, http: Request) -> Response:
        """For what only workers can answer."""
        await self._guard.operator(http)
        urls = ", ".join(worker.url for worker in self._membership.up) or "none is up"
        raise NotFoundError(f"a gateway does not answer {http.url.path}; ask each worker ({urls})")

    async def explain(self, http: Request) -> Response:
        """What the worker that a prompt would go to says of it, what the others have, and why that one is chosen."""
        tenant = await self._guard.asker(http)
        question = await self._question(http, "openai", "anthropic")
        whose = (tenant if tenant is not None else tenant_meant(question, self._tenants)).salted(question.cache_salt)
        prompt = await self._prompt(question, whose)
        engine = self._engine()
        request = GenerationRequest("", prompt.token_ids, _ANY_ANSWER, whose.salt, tenant=whose.name)
        decided = engine.decide(request) if engine is not None else None
        if decided is None:
            raise NotReadyError("no worker is up; send it again later")
        chosen, decision = decided
        workers = self._membership.up
        answers = await asyncio.gather(
            *(_explained(worker, prompt.token_ids, whose.name, whose.salt) for worker in workers)
        )
        found = dict(zip(workers, answers, strict=True))
        own = found.get(chosen)
        if own is None or "error" in own:
            raise NotReadyError("the worker that the prompt would go to does not answer; send it again later")
        return JSONResponse(
            {
                **own,
                "canonical": dict(prompt.canonical),
                "worker": chosen.worker_id,
                "why": decision.reason.value,
                "workers": [_worker_json(worker, decision, answer) for worker, answer in found.items()],
            }
        )


async def _explained(worker: Worker, tokens: Sequence[int], tenant: str, salt: bytes) -> dict[str, Any]:
    try:
        return await worker.connection.explain(tokens, tenant=tenant, salt=salt)
    except EmberError as error:
        return {"error": str(error)}


def _worker_json(worker: Worker, decision: Decision, answer: dict[str, Any]) -> dict[str, Any]:
    estimate = next((asdict(each) for each in decision.estimates if each.slot == worker.slot), None)
    if estimate is not None:
        del estimate["slot"]
    return {
        "worker": worker.worker_id,
        "index": "exact" if worker.exact else "degraded",
        "hit_tokens": answer.get("hit_tokens"),
        "hit_tokens_by_place": answer.get("hit_tokens_by_place"),
        "error": answer.get("error"),
        "estimate": estimate,
    }


def load_json(report: LoadReport) -> dict[str, Any]:
    """A report's figures by their names."""
    figures: dict[str, Any] = msgspec.to_builtins(report)
    return {name: value for name, value in figures.items() if name not in ("type", "worker_id", "epoch")}
