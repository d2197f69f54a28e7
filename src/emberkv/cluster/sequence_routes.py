"""Routes by sequence over the workers of a cluster: a coordinator's, which say where a sequence belongs, and a
gateway's, which hand KV tensors on to the worker of their sequence and add up what the workers count.

A sequence belongs to a worker by consistent hashing of its id, among the workers that are up.
"""

import asyncio
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import aiohttp
from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from emberkv.cluster.hash_ring import VIRTUAL_NODES, HashRing
from emberkv.cluster.membership import Membership
from emberkv.cluster.workers import WorkerStatus
from emberkv.engine.request import GenerationRequest
from emberkv.errors import reason_of
from emberkv.serving.answer_service import Prompt
from emberkv.serving.app import AppParts
from emberkv.serving.generate_api import generate_router
from emberkv.serving.middleware import BodyLimit
from emberkv.serving.sequence_api import DetailRoute, parse_detailed
from emberkv.serving.tenancy import Tenant

STATS_SECONDS = 2.0
"""How long a worker may take to say what it counts."""

KV_SECONDS = 5.0
"""How long a worker may take to store or find tensors."""

MAX_DRAWS = 1000
"""Of ids for a sequence that is to belong to one worker; one of n workers has about every n-th id."""

_REGISTRATION_BYTES = 64 * 1024
_HANDED_ON = ("authorization", "x-api-key", "content-type")


@dataclass(frozen=True, slots=True)
class Member:
    """A worker as it registered. address: as ``http://127.0.0.1:8082``. is_up: whether it takes requests."""

    worker_id: str
    address: str
    is_up: bool = True


class Members(Protocol):
    """The workers of a cluster."""

    def members(self) -> Sequence[Member]: ...

    def register(self, worker_id: str, address: str) -> None:
        """A worker is there. One that was known, as after a restart, is known by its new address alone."""
        ...

    def deregister(self, worker_id: str) -> bool:
        """A worker is gone; whether it was known."""
        ...


class RegisteredMembers:
    """Members that are up from when they register until they deregister."""

    def __init__(self) -> None:
        self._members: dict[str, Member] = {}

    def members(self) -> Sequence[Member]:
        return tuple(self._members.values())

    def register(self, worker_id: str, address: str) -> None:
        self._members[worker_id] = Member(worker_id, address)

    def deregister(self, worker_id: str) -> bool:
        return self._members.pop(worker_id, None) is not None

    def set_up(self, worker_id: str, is_up: bool) -> None:
        self._members[worker_id] = replace(self._members[worker_id], is_up=is_up)


_ABSENT = (WorkerStatus.DRAINING, WorkerStatus.DOWN, WorkerStatus.INCOMPATIBLE)


class FollowedMembers:
    """The workers that a gateway follows, once they have named themselves; not those that leave, are lost or do not
    belong to it.
    """

    def __init__(self, membership: Membership) -> None:
        self._membership = membership

    def members(self) -> Sequence[Member]:
        return [
            Member(worker.worker_id, worker.url, worker.status is WorkerStatus.UP)
            for worker in self._membership.workers
            if worker.worker_id and worker.status not in _ABSENT
        ]

    def register(self, worker_id: str, address: str) -> None:
        self._membership.register(worker_id, address)

    def deregister(self, worker_id: str) -> bool:
        return self._membership.deregister(worker_id)


class SequenceRing:
    """Which member a sequence belongs to: one that is up, or any while none is."""

    def __init__(self, members: Members) -> None:
        self._members = members
        self._names: tuple[str, ...] = ()
        self._ring = HashRing()

    def owner(self, seq_id: str) -> Member | None:
        """None while there are no members."""
        everyone = self._members.members()
        members = sorted([each for each in everyone if each.is_up] or everyone, key=lambda each: each.worker_id)
        names = tuple(member.worker_id for member in members)
        if names != self._names:
            self._names, self._ring = names, HashRing(names)
        return members[next(self._ring.order(seq_id.encode()))] if members else None


class _Registration(BaseModel):
    worker_id: str = Field(min_length=1, max_length=128)
    address: str = Field(max_length=1024, pattern=r"^https?://[^\s/]+/?$")


class _Deregistration(BaseModel):
    """The body of a registration, of which the id alone counts."""

    worker_id: str = Field(min_length=1, max_length=128)
    address: str = Field(max_length=1024)


Guard = Callable[[Request], Awaitable[None]]
"""Raises for a request that may not register workers."""


def coordinator_router(members: Members, guard: Guard) -> APIRouter:
    """Workers register, and clients ask where a sequence belongs. guard: of the routes that change the membership."""
    router = APIRouter(route_class=DetailRoute)
    ring = SequenceRing(members)

    @router.post("/register", dependencies=[Depends(guard)])
    async def register(http: Request) -> Response:
        worker = parse_detailed(_Registration, await http.body())
        members.register(worker.worker_id, worker.address.rstrip("/"))
        return JSONResponse({"message": f"Worker {worker.worker_id} registered."})

    @router.post("/deregister", dependencies=[Depends(guard)])
    async def deregister(http: Request) -> Response:
        worker = parse_detailed(_Deregistration, await http.body())
        if members.deregister(worker.worker_id):
            return JSONResponse({"message": f"Worker {worker.worker_id} deregistered."})
        return JSONResponse({"error": "worker not found"})

    @router.get("/workers")
    async def workers() -> Response:
        return JSONResponse(_addresses(members))

    @router.get("/kv/route/{seq_id}")
    async def route(seq_id: str) -> Response:
        owner = ring.owner(seq_id)
        if owner is None:
            return JSONResponse({"error": "No workers available"})
        return JSONResponse({"worker_id": owner.worker_id, "address": owner.address, "seq_id": seq_id})

    return router


def coordinator_app(members: Members, guard: Guard) -> ASGIApp:
    """A coordinator on a port of its own."""
    app = FastAPI(title="emberkv coordinator", docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    app.include_router(coordinator_router(members, guard))
    app.add_middleware(BodyLimit, max_bytes=lambda: _REGISTRATION_BYTES)

    @app.get("/health")
    async def health() -> Response:
        return JSONResponse({"status": "ok", "service": "coordinator"})

    @app.get("/stats")
    async def stats() -> Response:
        count = len(members.members())
        return JSONResponse({"total_workers": count, "workers": _addresses(members), "hash_ring": _ring_json(count)})

    return app


class ByPort:
    """An ASGI app whose requests to one port are another app's."""

    def __init__(self, app: ASGIApp, port: int, other: ASGIApp) -> None:
        self._app = app
        self._port = port
        self._other = other

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_other = scope["type"] == "http" and scope["server"] is not None and scope["server"][1] == self._port
        await (self._other if is_other else self._app)(scope, receive, send)


def _addresses(members: Members) -> dict[str, Any]:
    return {each.worker_id: {"address": each.address} for each in members.members()}


def _ring_json(members: int) -> dict[str, int]:
    return {"virtual_nodes": VIRTUAL_NODES, "total_nodes": VIRTUAL_NODES * members}


class _SequenceName(BaseModel):
    model_config = ConfigDict(extra="ignore")

    seq_id: str = Field(min_length=1)


class SequenceGateway:
    """A gateway's routes by sequence. Belongs to one event loop.

    client: has kept connections to the workers; made when it is first needed where it is None. best: the id of the
    worker that a prompt would go to, by what is cached where; "" while there is none.
    """

    def __init__(
        self,
        members: Members,
        guard: Guard,
        client: aiohttp.ClientSession | None = None,
        *,
        best: Callable[[GenerationRequest], str] = lambda _: "",
    ) -> None:
        self._members = members
        self._guard = guard
        self._best = best
        self._ring = SequenceRing(members)
        self._client = client

    async def close(self) -> None:
        if self._client is not None:
            await self._client.close()

    def routes(self, parts: AppParts) -> APIRouter:
        """All routes, of the coordinator, too; ``/generate`` is answered by the app's own engine."""
        router = APIRouter(route_class=DetailRoute)

        @router.get("/health")
        async def health() -> Response:
            return JSONResponse({"status": "ok", "service": "gateway"})

        @router.get("/stats", dependencies=[Depends(parts.guard.metrics)])
        async def stats(http: Request) -> Response:
            return JSONResponse(await self.stats(_headers(http), len(parts.answers.sessions)))

        async def forward(http: Request) -> Response:
            body = await http.body()
            named = await parts.preparer.run(lambda: parse_detailed(_SequenceName, body), len(body))
            return await self.forward(http.url.path, named.seq_id, body, _headers(http))

        for path in ("/kv/put", "/kv/append", "/kv/get"):
            router.add_api_route(path, forward, methods=["POST"], dependencies=[Depends(parts.keys.tenant)])
        router.include_router(coordinator_router(self._members, self._guard))
        router.include_router(generate_router(parts, self))
        return router

    def draw(self, prompt: Prompt, tenant: Tenant) -> str:
        """See `SequencePlacement`: ids are drawn until one belongs to that worker."""
        best = self._best(GenerationRequest("", prompt.token_ids, prompt.params, tenant.salt, tenant=tenant.name))
        for _ in range(MAX_DRAWS):
            seq_id = str(uuid.uuid4())
            if self.worker(seq_id) == best:
                break
        return seq_id

    def worker(self, seq_id: str) -> str:
        owner = self._ring.owner(seq_id)
        return "" if owner is None else owner.worker_id

    async def forward(self, path: str, seq_id: str, body: bytes, headers: Mapping[str, str]) -> Response:
        """The answer of the worker that a sequence belongs to."""
        owner = self._ring.owner(seq_id)
        if owner is None:
            raise HTTPException(503, f"Failed to route seq_id {seq_id}", {"retry-after": "1"})
        timeout = aiohttp.ClientTimeout(total=KV_SECONDS)
        try:
            async with self._session().post(
                f"{owner.address}{path}", data=body, headers=headers, timeout=timeout
            ) as answer:
                content = await answer.read()
                return Response(content, answer.status, media_type=answer.content_type)
        except (aiohttp.ClientError, TimeoutError) as error:
            reason = f"worker {owner.worker_id}, which has seq_id {seq_id}, does not answer: {reason_of(error)}"
            raise HTTPException(503, reason, {"retry-after": "1"}) from error

    async def stats(self, headers: Mapping[str, str], generated: int) -> dict[str, Any]:
        """What all workers count, each asked now, and sums of it. generated: sequences that were generated through this
        gateway; workers count only those that they were asked for themselves.
        """
        members = self._members.members()
        workers = await asyncio.gather(*(self._stats_of(each, headers) for each in members))
        healthy = [each for each in workers if "error" not in each]
        stored = [each["kv_cache"] for each in healthy]
        sequences = generated + sum(each["unique_sequences"] for each in stored)
        sequences += sum(each["generated_sequences"] for each in healthy)
        sums = {"total_sequences": sequences, "total_kv_entries": sum(each["entries"] for each in stored)}
        return {
            "workers": workers,
            "total_workers": len(workers),
            "healthy_workers": len(healthy),
            "cluster_healthy": bool(workers) and len(healthy) == len(workers),
            "aggregate": sums,
            **sums,
            "total_entries": sums["total_kv_entries"],
            "total_bytes": sum(each["total_bytes"] for each in stored),
            "hash_ring": _ring_json(len(members)),
        }

    async def _stats_of(self, member: Member, headers: Mapping[str, str]) -> dict[str, Any]:
        named = {"worker_id": member.worker_id, "address": member.address}
        timeout = aiohttp.ClientTimeout(total=STATS_SECONDS)
        try:
            async with self._session().get(f"{member.address}/stats", headers=headers, timeout=timeout) as answer:
                if answer.status != 200:
                    return {**named, "status": "error", "error": f"HTTP {answer.status}"}
                found: dict[str, Any] = await answer.json()
                return {**found, **named}
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            return {**named, "health": {"status": "unreachable"}, "error": reason_of(error)}

    def _session(self) -> aiohttp.ClientSession:
        if self._client is None:
            self._client = aiohttp.ClientSession()
        return self._client


def _headers(http: Request) -> dict[str, str]:
    """Of a request, those that go on to the worker."""
    return {name: http.headers[name] for name in _HANDED_ON if name in http.headers}
