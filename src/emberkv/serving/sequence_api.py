"""The routes by sequence, for clients of a coordinator with workers: KV tensors by sequence and layer, and statistics.

Their errors are ``{"detail": message}``, and 422 with a list of what is wrong for a body of another shape.
"""

from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, Literal, TypeVar

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel, Field, ValidationError
from starlette.exceptions import HTTPException

from emberkv.engine.assembly import AssembledEngine
from emberkv.errors import EmberError, RequestError, TensorError
from emberkv.serving.app import AppParts
from emberkv.serving.errors import SCOPE_KEY, error_response, failure_of, request_info
from emberkv.serving.kv_tensors import KVTensorStore, Sequence, StoredLayer
from emberkv.serving.lifecycle import Lifecycle, ServedModel, ServerPhase
from emberkv.serving.request_context import MAX_ID_LENGTH
from emberkv.serving.tenancy import Tenant
from emberkv.tensors import TensorBytes, TensorFormat, from_json, to_json

LONGEST_SHOWN = 1000
"""Characters of a wrong value that the error shows."""


class DetailRoute(APIRoute):
    """A route whose errors have the body ``{"detail": message}``."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def with_detail(http: Request) -> Response:
            try:
                return await handle(http)
            except (EmberError, HTTPException) as error:
                failure = failure_of(error)
                if SCOPE_KEY in http.scope:
                    info = request_info(http)
                    info.code, info.param = failure.code, failure.param
                return JSONResponse(
                    {"detail": failure.message}, status_code=failure.status, headers=dict(failure.headers)
                )

        return with_detail


async def _unknown_path(http: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    is_of_these = error.status_code in (404, 405) and http.method != "OPTIONS"
    if not is_of_these or http.scope["path"].startswith("/v1/"):
        return await error_response(http, error)
    return JSONResponse({"detail": error.detail}, status_code=error.status_code, headers=error.headers)


def answer_unknown_paths_in_detail(app: FastAPI) -> None:
    """Have the app answer unknown paths outside ``/v1`` by 404 and ``{"detail": "Not Found"}``, and unknown methods of
    known ones by 405 and ``{"detail": "Method Not Allowed"}``, as clients of these routes expect it.
    """
    app.add_exception_handler(HTTPException, _unknown_path)


Body = TypeVar("Body", bound=BaseModel)


def parse_detailed(kind: type[Body], body: bytes) -> Body:
    """A body as ``kind``. Raises RequestValidationError, which is answered by 422 and what is wrong with each field."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_context=False)
    raise RequestValidationError(
        [
            {
                "type": problem["type"],
                "loc": ("body", *problem["loc"]),
                "msg": problem["msg"],
                "input": {} if problem["type"] == "json_invalid" else _shown(problem["input"]),
            }
            for problem in problems
        ]
    )


def _shown(given: object) -> object:
    text = repr(given)
    return given if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}…"


class LayerName(BaseModel):
    seq_id: str = Field(min_length=1, max_length=MAX_ID_LENGTH)
    layer: int = Field(ge=0, lt=2**31)


class LayerQuestion(LayerName):
    format: Literal["raw", "safetensors"] = "raw"


class LayerTensors(LayerName):
    k: dict[str, Any]
    v: dict[str, Any]


class KVRoutes:
    """Stores KV tensors of clients, each tenant's apart from the others', and reads those of generated sequences where
    the prefix cache has them. worker_id: is in each answer.

    The routes use the store off the event loop: it copies tensors under its lock.
    """

    def __init__(self, parts: AppParts, store: KVTensorStore, worker_id: str) -> None:
        self._parts = parts
        self._store = store
        self._worker_id = worker_id
        parts.answers.generated.on_begin.append(store.forget_copies)

    def router(self) -> APIRouter:
        router = APIRouter(route_class=DetailRoute)
        tenant = Depends(self._parts.keys.tenant)

        @router.post("/kv/put")
        async def put(http: Request, owner: Tenant = tenant) -> Response:
            return await self._write(http, owner, appends=False)

        @router.post("/kv/append")
        async def append(http: Request, owner: Tenant = tenant) -> Response:
            return await self._write(http, owner, appends=True)

        @router.post("/kv/get")
        async def get(http: Request, owner: Tenant = tenant) -> Response:
            return await self._get(http, owner)

        @router.delete("/kv/{seq_id}")
        async def delete(seq_id: str, owner: Tenant = tenant) -> Response:
            self._parts.answers.generated.forget((owner.name, seq_id))
            await self._parts.preparer.run(partial(self._store.delete, (owner.name, seq_id)))
            return JSONResponse({"status": "evicted", "seq_id": seq_id, "worker_id": self._worker_id})

        @router.get("/kv/{seq_id}/{layer}/length")
        async def length(seq_id: str, layer: int, owner: Tenant = tenant) -> Response:
            sequence = owner.name, seq_id
            seq_len = await self._stored_length(sequence, layer)
            if not seq_len and (engine := self._engine) is not None:
                seq_len = await self._parts.answers.generated.length(sequence, layer, engine)
            return JSONResponse({"seq_id": seq_id, "layer": layer, "seq_len": seq_len, "worker_id": self._worker_id})

        return router

    @property
    def _engine(self) -> AssembledEngine | None:
        lifecycle = self._parts.lifecycle
        return lifecycle.model().assembled if lifecycle.has_model else None

    async def _stored_length(self, sequence: Sequence, layer: int) -> int:
        return await self._parts.preparer.run(partial(self._store.length, sequence, layer))

    async def _computed(self, sequence: Sequence, layer: int) -> StoredLayer | None:
        """What the prefix cache has of a generated sequence."""
        engine = self._engine
        return None if engine is None else await self._parts.answers.generated.read(sequence, layer, engine)

    async def _write(self, http: Request, owner: Tenant, *, appends: bool) -> Response:
        body = await http.body()

        def parse() -> tuple[LayerTensors, TensorBytes, TensorBytes]:
            request = parse_detailed(LayerTensors, body)
            return request, _tensor(request.k, "k"), _tensor(request.v, "v")

        request, k, v = await self._parts.preparer.run(parse, len(body))
        sequence, layer = (owner.name, request.seq_id), request.layer
        if appends:
            seq_len = await self._append(sequence, layer, k, v)
        else:
            seq_len = await self._parts.preparer.run(partial(self._store.put, sequence, layer, k, v))
        return JSONResponse(
            {
                "status": "ok",
                "seq_id": request.seq_id,
                "layer": layer,
                "seq_len": seq_len,
                "tensor_shapes": {"k": k.shape, "v": v.shape},
                "tensor_dtypes": {"k": f"torch.{k.dtype}", "v": f"torch.{v.dtype}"},
                "worker_id": self._worker_id,
            }
        )

    async def _append(self, sequence: Sequence, layer: int, k: TensorBytes, v: TensorBytes) -> int:
        """Rows of a generated sequence go behind a copy of what was computed. How many there are then."""
        computed = None
        if not await self._stored_length(sequence, layer):
            computed = await self._computed(sequence, layer)
        append = partial(self._store.append, sequence, layer, k, v, behind=computed)
        seq_len = await self._parts.preparer.run(append)
        if computed is not None and (current := self._parts.answers.generated.request_id(sequence)):
            forget = partial(self._store.forget_copies, sequence, but_of=current)
            await self._parts.preparer.run(forget)  # it may have begun anew since it was read
        return seq_len

    async def _get(self, http: Request, owner: Tenant) -> Response:
        body = await http.body()

        def look_up() -> tuple[LayerQuestion, StoredLayer | None]:
            request = parse_detailed(LayerQuestion, body)
            return request, self._store.get((owner.name, request.seq_id), request.layer)

        request, found = await self._parts.preparer.run(look_up)
        found = found or await self._computed((owner.name, request.seq_id), request.layer)
        if found is None:
            raise HTTPException(404, "KV entry not found")
        form: TensorFormat = request.format
        named = {"seq_id": request.seq_id, "layer": request.layer, "seq_len": found.seq_len}

        def answer() -> Response:
            tensors = {"k": to_json(found.k, form), "v": to_json(found.v, form)}
            return JSONResponse({**named, **tensors, "worker_id": self._worker_id})

        return await self._parts.preparer.run(answer, len(found.k.data) + len(found.v.data))


def _tensor(value: dict[str, Any], name: str) -> TensorBytes:
    try:
        return from_json(value)
    except TensorError as error:
        raise RequestError(f"{name}: {error}", param=name) from error


def status_router(parts: AppParts, store: KVTensorStore, worker_id: str) -> APIRouter:
    """A worker's ``/health`` and ``/stats``."""
    router = APIRouter(route_class=DetailRoute)
    lifecycle = parts.lifecycle

    @router.get("/health")
    async def health() -> Response:
        if lifecycle.phase is ServerPhase.FAILED:
            body = {"status": "failed", "worker_id": worker_id, "detail": lifecycle.detail}
            return JSONResponse(body, status_code=503)
        return JSONResponse({"status": "ok", "worker_id": worker_id})

    @router.get("/stats", dependencies=[Depends(parts.guard.metrics)])
    async def stats() -> Response:
        return JSONResponse(
            {
                "worker_id": worker_id,
                "kv_cache": _kv_cache(store),
                "prefix_cache": _prefix_cache(lifecycle),
                "generated_sequences": len(parts.answers.sessions),
                "model": {"loaded": True, **model_facts(lifecycle.model())}
                if lifecycle.has_model
                else {"loaded": False},
            }
        )

    return router


def _kv_cache(store: KVTensorStore) -> dict[str, object]:
    found = store.stats()
    return {
        "entries": found.entries,
        "num_entries": found.entries,
        "max_entries": found.max_entries,
        "unique_sequences": found.sequences,
        "evicted_sequences": found.evicted_sequences,
        "device": "cpu",
        "total_bytes": found.bytes,
        "total_mb": found.bytes / 2**20,
        "max_bytes": found.max_bytes,
    }


def _prefix_cache(lifecycle: Lifecycle) -> dict[str, int]:
    """What requests have left in the KV pool, in bytes."""
    stats = lifecycle.engine_stats()
    if stats is None:
        return {"cached_bytes": 0, "used_bytes": 0, "max_bytes": 0}
    return {
        "cached_bytes": stats.cached_blocks * stats.block_bytes,
        "used_bytes": (stats.total_blocks - stats.free_blocks) * stats.block_bytes,
        "max_bytes": stats.total_blocks * stats.block_bytes,
    }


def model_facts(model: ServedModel) -> dict[str, Any]:
    """The model's ``info`` and ``memory``; GB are 2^30 bytes, of weights and KV pool."""
    stats = model.engine.stats()
    used = model.dims.weight_bytes + stats.total_blocks * stats.block_bytes
    device = model.about.get("device", "cpu")
    return {
        "info": {
            "model_name": model.names[0],
            "num_layers": model.dims.layers,
            "num_heads": model.dims.heads,
            "num_kv_heads": model.dims.kv_heads,
            "head_dim": model.dims.head_dim,
            "device": device,
            "dtype": model.about.get("dtype", ""),
        },
        "memory": {"device": device, "allocated_gb": used / 2**30, "reserved_gb": used / 2**30},
    }
