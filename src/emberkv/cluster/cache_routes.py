"""The routes under /v1/cache at a gateway: the caches of all workers, and the routing of a prompt, with its reasons.

Responses have the form of a single server's, with a field ``workers``: each worker's outcome.
"""

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import msgspec
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from emberkv.cluster.cache_operations import (
    CacheOperation,
    ExplainRequest,
    FindPath,
    ListPrefixes,
    Pin,
    Unpin,
    on_path,
)
from emberkv.cluster.cluster_engine import ClusterEngine
from emberkv.cluster.membership import Membership
from emberkv.cluster.policies import Decision
from emberkv.cluster.removals import MISSED, ClusterRemovals, WorkerAnswer, operate
from emberkv.cluster.wire import LoadReport, decode_prompt
from emberkv.cluster.workers import RoutedWorker, Worker
from emberkv.core.hashing import BlockHash, TokenChain
from emberkv.engine.request import GenerationRequest, SamplingParams
from emberkv.errors import EmberError
from emberkv.serving.api.cache_api import (
    CacheQuestion,
    CacheRoutes,
    check_json,
    listing_asked,
    tenant_meant,
    unknown_response,
)
from emberkv.serving.app import AppParts
from emberkv.serving.cache.service import PrefixPath
from emberkv.serving.errors import NotFoundError, NotReadyError
from emberkv.serving.tenancy import Tenant

_ANY_ANSWER = SamplingParams(max_tokens=1)

PARTLY_DONE = 207
"""The status of a response if some workers have failed."""


class ClusterCacheRoutes(CacheRoutes):
    """The cache routes over all workers. A worker that is down gets removals when it is up again."""

    def __init__(
        self,
        parts: AppParts,
        membership: Membership,
        engine: Callable[[], ClusterEngine | None],
        removals: ClusterRemovals,
    ) -> None:
        super().__init__(parts.lifecycle, parts.guard, parts.tenants, parts.preparer, parts.answers, parts.wall_clock)
        self._membership = membership
        self._cluster_engine = engine
        self._removals = removals

    def router(self) -> APIRouter:
        router = APIRouter(prefix="/v1/cache")
        for path, answer in (("", self.statistics), ("/sessions", self.sessions), ("/prefixes", self.prefixes)):
            router.add_api_route(path, answer, methods=["GET"])
        for answer in (self.explain, self.warm, self.pin, self.unpin, self.remove, self.clear):
            router.add_api_route(f"/{answer.__name__}", answer, methods=["POST"])
        return router

    async def statistics(self, http: Request) -> Response:
        """Each worker's latest load report, and the workers that have missed a removal."""
        await self._guard.operator(http)
        workers = {
            worker.worker_id: {"status": worker.status.value, **load_json(worker.report)}
            for worker in self._membership.workers
            if worker.report is not None
        }
        missed = sorted(self._removals.missed)
        fields = {"workers": workers, "sessions": len(self._answers.sessions), "missed_removals": missed}
        return JSONResponse({"object": "cache", **fields}, status_code=PARTLY_DONE if missed else 200)

    async def prefixes(self, http: Request) -> Response:
        """List the prefixes of all workers, each once, with the workers that have it."""
        await self._guard.operator(http)
        by, limit = listing_asked(http)
        outcomes = await self._everywhere(ListPrefixes(by, limit))
        listings = {worker.worker_id: answer["data"] for worker, answer in answers(outcomes).items()}
        return _respond("list", {"data": merged_prefixes(listings, by)[:limit]}, outcomes)

    async def pin(self, http: Request) -> Response:
        """Pin a prefix at the workers that have a part of it, or else at the one that it would be routed to."""
        await self._guard.operator(http)
        question, path = await self._path(http)
        make = partial(on_path, Pin, path, seconds=question.seconds)
        outcomes = await operate(self._membership.up, make(even_uncached=False))
        if not any(each["retained_blocks"] for each in answers(outcomes).values()):
            chosen, _ = self._decided(path.tokens, path.tenant, self._salt_of(path.tenant))
            outcomes |= await operate([chosen], make(even_uncached=True))
        done = answers(outcomes).values()
        fields = {
            "prefix": path.block_hashes[-1].hex(),
            "blocks": len(path.block_hashes),
            "retained_blocks": sum(each["retained_blocks"] for each in done),
            "tokens_kept_warm": sum(each["tokens_kept_warm"] for each in done),
        }
        return _respond("cache.pinned", fields, outcomes)

    async def unpin(self, http: Request) -> Response:
        await self._guard.operator(http)
        _, path = await self._path(http)
        outcomes = await self._everywhere(on_path(Unpin, path))
        return _respond("cache.unpinned", {"prefix": path.block_hashes[-1].hex()}, outcomes)

    async def remove(self, http: Request) -> Response:
        """Remove a prefix and its continuations at all workers, except blocks that other prefixes share."""
        await self._guard.operator(http)
        _, path = await self._path(http, any_length=True)
        return _removed("cache.removed", await self._removals.remove_prefix(path))

    async def clear(self, http: Request) -> Response:
        await self._guard.operator(http)
        check_json(http)
        return _removed("cache.cleared", await self._removals.remove(None))

    async def explain(self, http: Request) -> Response:
        """Explain a prompt by the worker that it would be routed to, or a past request by the worker that answered it,
        with the other workers' hits and the reason of the choice.
        """
        tenant = await self._guard.asker(http)
        question = await self._question(http, "openai", "anthropic", "response_id")
        if question.response_id is not None:
            return await self._explain_past(question, tenant)
        asker = tenant if tenant is not None else tenant_meant(question, self._tenants)
        prompt = await self._prompt(question, asker)
        whose = asker.salted(question.cache_salt)
        chosen, decision = self._decided(prompt.token_ids, whose.name, whose.salt)
        workers = self._membership.up
        explained = await asyncio.gather(
            *(_explained(worker, prompt.token_ids, whose.name, whose.salt) for worker in workers)
        )
        found = dict(zip(workers, explained, strict=True))
        own = found.get(chosen, {"error": "it is no longer up"})
        if "error" in own:
            raise NotReadyError(
                f"worker {chosen}, where the prompt would go, gives no explanation: {own['error']}; send it again later"
            )
        return JSONResponse(
            {
                **own,
                "canonical": dict(prompt.canonical),
                "worker": chosen.worker_id,
                "why": decision.reason.value,
                "workers": [
                    {
                        **_worker_json(worker, decision, answer),
                        "shared_tiers": self._membership.shared_with_others(worker),
                    }
                    for worker, answer in found.items()
                ],
            }
        )

    async def _explain_past(self, question: CacheQuestion, tenant: Tenant | None) -> Response:
        """Explain a past request by the first of its workers that still knows it. Later workers resumed its answer."""
        response_id = question.response_id or ""
        request, engine = self._remembered(response_id, tenant), self._cluster_engine()
        request_id = request.answer_id(question.answer)
        route = engine.route(request_id) if engine is not None else None
        if route is None or not route.reasons:
            raise unknown_response(response_id)
        reasons = []
        for name in dict.fromkeys(route.workers):
            worker = self._membership.named(name)
            if worker is None:
                reasons.append(f"worker {name} is gone")
                continue
            (outcome,) = (await operate([worker], ExplainRequest(request_id))).values()
            if isinstance(outcome, EmberError):
                reasons.append(f"worker {worker}: {outcome}")
                continue
            chosen = {"canonical": dict(request.canonical), "worker": name, "why": route.reasons[name].value}
            turns = {"answered_by": route.workers, "retried": route.retried, "resumed": route.resumed}
            return JSONResponse({**outcome, **chosen, **turns})
        message = f"response_id {response_id!r} cannot be explained any more: {'; '.join(reasons)}"
        raise NotFoundError(message, param="response_id")

    async def _listed_path(self, block_hash: BlockHash) -> PrefixPath:
        """The path of a listed prefix, from the first worker that knows it. Raises NotFoundError if none does."""
        outcomes = await self._everywhere(FindPath(block_hash))
        for found in answers(outcomes).values():
            parents = found.get("parents", ())  # a worker of an earlier version gives none
            return PrefixPath(found["block_hashes"], decode_prompt(found["tokens"]), found["tenant"], parents)
        reasons = "; ".join(f"{worker}: {outcome}" for worker, outcome in outcomes.items()) or "none is there"
        raise NotFoundError(f"prefix {block_hash.hex()!r} is known to no worker ({reasons})", param="prefix")

    def _chain(self, tokens: Sequence[int], tenant: Tenant) -> TokenChain:
        engine = self._cluster_engine()
        if engine is None:
            raise NotReadyError("no worker has been reached yet; send it again later")
        return engine.chain(GenerationRequest("", tokens, _ANY_ANSWER, tenant.salt, tenant=tenant.name))

    def _decided(self, tokens: Sequence[int], tenant: str, salt: bytes) -> tuple[Worker, Decision]:
        """The worker that a prompt would be routed to. Raises NotReadyError while no worker is up."""
        engine = self._cluster_engine()
        request = GenerationRequest("", tokens, _ANY_ANSWER, salt, tenant=tenant)
        decided = engine.decide(request) if engine is not None else None
        if decided is None:
            raise NotReadyError("no worker is up; send it again later")
        return decided

    def _salt_of(self, tenant: str) -> bytes:
        return self._tenants.named(tenant).salt if tenant in self._tenants.names else b""

    async def _everywhere(self, operation: CacheOperation) -> dict[Worker, WorkerAnswer]:
        return await operate(self._removals.workers, operation)


def answers(outcomes: Mapping[Worker, WorkerAnswer]) -> dict[Worker, Mapping[str, Any]]:
    """The outcomes without errors."""
    return {worker: outcome for worker, outcome in outcomes.items() if not isinstance(outcome, EmberError)}


def merged_prefixes(listings: Mapping[str, Sequence[Mapping[str, Any]]], by: str) -> list[dict[str, Any]]:
    """Each prefix once, with the sum of its hits and the ``workers`` that have it, in the order of a single server.

    listings: each worker's, by its id. by: "hottest" or "largest".
    """
    merged: dict[str, dict[str, Any]] = {}
    for name, listing in listings.items():
        for each in listing:
            known = merged.setdefault(each["block_hash"], {**each, "hits": 0, "workers": []})
            known["hits"] += each["hits"]
            known["last_hit"] = max(known["last_hit"], each["last_hit"])
            known["tiers"] = list(dict.fromkeys([*known["tiers"], *each["tiers"]]))
            known["workers"].append(name)
    if by == "largest":
        return sorted(merged.values(), key=lambda each: -each["tokens"])
    return sorted(merged.values(), key=lambda each: -each["hits"] * each["tokens"])


def _respond(
    kind: str, fields: Mapping[str, Any], outcomes: Mapping[Worker, WorkerAnswer], *, repeats: bool = False
) -> Response:
    """repeats: whether the operation is repeated later at workers that are not up."""
    workers = [_outcome_json(worker, outcome, repeats) for worker, outcome in outcomes.items()]
    is_done = all(each["status"] == "done" for each in workers)
    return JSONResponse({"object": kind, **fields, "workers": workers}, status_code=200 if is_done else PARTLY_DONE)


def _outcome_json(worker: Worker, outcome: WorkerAnswer, repeats: bool) -> dict[str, Any]:
    named = {"worker": worker.worker_id, "url": worker.url}
    if isinstance(outcome, EmberError):
        status = "later" if repeats and isinstance(outcome, MISSED) else "failed"
        return {**named, "status": status, "error": str(outcome)}
    return {**named, "status": "done", **{name: value for name, value in outcome.items() if name != "data"}}


def _removed(kind: str, outcomes: Mapping[Worker, WorkerAnswer]) -> Response:
    blocks: Counter[str] = Counter()
    kept: dict[str, dict[str, Any]] = {}
    for answer in answers(outcomes).values():
        blocks.update(answer["blocks"])
        for tier, each in answer["kept"].items():
            known = kept.setdefault(tier, {"count": 0, "reason": each["reason"]})
            known["count"] += each["count"]
    learned = sum(each["learned_prompts"] for each in answers(outcomes).values())
    fields = {"blocks": dict(blocks), "learned_prompts": learned, "kept": kept}
    return _respond(kind, fields, outcomes, repeats=True)


async def _explained(worker: Worker, tokens: Sequence[int], tenant: str, salt: bytes) -> dict[str, Any]:
    try:
        return await worker.connection.explain(tokens, tenant=tenant, salt=salt)
    except EmberError as error:
        return {"error": str(error)}


def estimate_json(worker: RoutedWorker, decision: Decision) -> dict[str, Any] | None:
    """The decision's estimate for a worker, without its slot; None if the decision has none."""
    estimate = next((asdict(each) for each in decision.estimates if each.slot == worker.slot), None)
    if estimate is not None:
        del estimate["slot"]
    return estimate


def _worker_json(worker: Worker, decision: Decision, answer: dict[str, Any]) -> dict[str, Any]:
    return {
        "worker": worker.worker_id,
        "index": "exact" if worker.exact else "degraded",
        "hit_tokens": answer.get("hit_tokens"),
        "error": answer.get("error"),
        "estimate": estimate_json(worker, decision),
    }


def load_json(report: LoadReport) -> dict[str, Any]:
    """A report's fields by name."""
    fields: dict[str, Any] = msgspec.to_builtins(report)
    return {name: value for name, value in fields.items() if name not in ("type", "worker_id", "epoch")}
