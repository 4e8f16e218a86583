"""The FastAPI application: every route, and the OpenAPI document that describes them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from lockstep import __version__
from lockstep.core.errors import CheckpointError, InputError
from lockstep.server import oip, schemas
from lockstep.server.act import act
from lockstep.server.config import ServeConfig
from lockstep.server.exposition import exposition
from lockstep.server.gate import ACT_ROUTE, INFER_ROUTE, LIVE, Gate
from lockstep.server.metrics import RequestMetrics
from lockstep.server.openapi import document_routes
from lockstep.server.replies import Refusal, Reply, error_reply, json_reply
from lockstep.server.repository import Repository, Served

ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": schemas.ErrorReply, "description": text}
    for status, text in {
        400: "wrong request; `field` names the part",
        401: "API key missing or wrong",
        404: "unknown policy, version or session",
        408: "the body came too slowly",
        413: "the body is too large",
        415: "content type or encoding is not supported",
        429: "too many requests wait",
        503: "shutting down, or the policy is unloaded",
        504: "the request's deadline passed",
    }.items()
}


def build_app(repository: Repository, config: ServeConfig, *, key: str = "") -> Gate:
    """The ASGI application that serves `repository`."""
    metrics = RequestMetrics()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        watch = asyncio.create_task(repository.watch(), name="watch")
        yield
        watch.cancel()
        repository.close()
        with suppress(asyncio.CancelledError, TimeoutError):
            await asyncio.wait_for(watch, timeout=5)

    app = FastAPI(
        title="Lockstep policy server", version=__version__, lifespan=lifespan, redirect_slashes=False, responses=ERRORS
    )
    app.include_router(_policies(repository))
    app.include_router(_models(repository))
    app.include_router(_model_repository(repository))
    app.include_router(_operations(repository, metrics))
    app.add_exception_handler(Refusal, _refused)
    app.add_exception_handler(InputError, _refused)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _invalid)
    document_routes(app, repository, needs_key=bool(key))
    return Gate(app, repository, metrics, config, key.encode())


def _policies(repository: Repository) -> APIRouter:
    router = APIRouter(prefix="/v1/policies", tags=["policies"])

    @router.get("", response_model=schemas.PolicyList)
    async def list_policies() -> Response:
        return _response(json_reply({"policies": [_info(served) for served in repository.policies.values()]}))

    @router.get("/{name}", response_model=schemas.PolicyInfo)
    async def show_policy(name: str) -> Response:
        return _response(json_reply(_info(repository[name])))

    @router.post(ACT_ROUTE.removeprefix("/v1/policies"), response_model=schemas.ActReply)
    async def decide(name: str, request: Request) -> Response:
        return _response(await act(repository, name, await request.body(), dict(request.headers.raw)))

    @router.post(
        "/{name}/reload",
        response_model=schemas.ReloadReply,
        responses={409: {"model": schemas.ErrorReply, "description": "damaged; the old version serves on"}},
    )
    async def reload(name: str) -> Response:
        return _response(json_reply(await _reload(repository[name])))

    @router.delete("/{name}/sessions/{session_id}", status_code=204)
    async def delete_session(name: str, session_id: str) -> Response:
        if not repository[name].sessions.remove(session_id):
            raise Refusal(404, f"{name} has no such session", field="session_id")
        return Response(status_code=204)

    return router


def _models(repository: Repository) -> APIRouter:
    router = APIRouter(prefix="/v2", tags=["Open Inference Protocol"])

    @router.get("", response_model=schemas.ServerMetadata)
    async def server_metadata() -> Response:
        return _response(oip.server_metadata())

    @router.get("/models/stats")
    async def all_stats() -> dict[str, Any]:
        return {"model_stats": [oip.model_stats(served) for served in repository.policies.values()]}

    def versioned(name: str, version: str) -> Served:
        served = repository[name]
        oip.check_version(served.loaded, name, version)
        return served

    @router.get("/models/{name}", response_model=schemas.ModelMetadata)
    async def model_metadata(name: str) -> Response:
        return _response(json_reply(oip.model_metadata(versioned(name, ""))))

    @router.get("/models/{name}/versions/{version}", response_model=schemas.ModelMetadata)
    async def version_metadata(name: str, version: str) -> Response:
        return _response(json_reply(oip.model_metadata(versioned(name, version))))

    @router.get("/models/{name}/ready", response_class=Response)
    async def model_ready(name: str) -> Response:
        return _ready(versioned(name, ""))

    @router.get("/models/{name}/versions/{version}/ready", response_class=Response)
    async def version_ready(name: str, version: str) -> Response:
        return _ready(versioned(name, version))

    @router.get("/models/{name}/config")
    async def model_config(name: str) -> dict[str, Any]:
        return oip.model_config(versioned(name, ""))

    @router.get("/models/{name}/versions/{version}/config")
    async def version_config(name: str, version: str) -> dict[str, Any]:
        return oip.model_config(versioned(name, version))

    @router.get("/models/{name}/stats")
    async def model_stats(name: str) -> dict[str, Any]:
        return {"model_stats": [oip.model_stats(versioned(name, ""))]}

    @router.get("/models/{name}/versions/{version}/stats")
    async def version_stats(name: str, version: str) -> dict[str, Any]:
        return {"model_stats": [oip.model_stats(versioned(name, version))]}

    @router.post(INFER_ROUTE.removeprefix("/v2"), response_model=schemas.InferReply)
    async def infer(name: str, request: Request) -> Response:
        return _response(await oip.infer(repository, name, "", await request.body(), dict(request.headers.raw)))

    @router.post("/models/{name}/versions/{version}/infer", response_model=schemas.InferReply)
    async def version_infer(name: str, version: str, request: Request) -> Response:
        return _response(await oip.infer(repository, name, version, await request.body(), dict(request.headers.raw)))

    return router


def _model_repository(repository: Repository) -> APIRouter:
    router = APIRouter(prefix="/v2/repository", tags=["Open Inference Protocol"])

    @router.post("/index", response_model=list[schemas.IndexEntry])
    async def index() -> Response:
        entries = [
            {
                "name": served.name,
                "version": served.loaded.version,
                "state": "READY" if served.ready else "UNAVAILABLE",
                "reason": "" if served.ready else "unloaded",
            }
            for served in repository.policies.values()
        ]
        return _response(json_reply(entries))

    @router.post("/models/{name}/load", responses={409: {"model": schemas.ErrorReply, "description": "damaged"}})
    async def load(name: str) -> dict[str, Any]:
        served = repository[name]
        await _reload(served)
        served.ready = True
        return {}

    @router.post("/models/{name}/unload")
    async def unload(name: str) -> dict[str, Any]:
        repository[name].ready = False
        return {}

    return router


def _operations(repository: Repository, metrics: RequestMetrics) -> APIRouter:
    router = APIRouter(tags=["operations"])

    @router.get("/health", response_class=Response)
    @router.get("/healthz", response_class=Response)
    @router.get(LIVE, response_class=Response)
    async def health() -> Response:
        return Response()

    @router.get("/ready", response_class=Response)
    @router.get("/v2/health/ready", response_class=Response)
    async def ready() -> Response:
        missing = [served.name for served in repository.policies.values() if not served.ready]
        if missing:
            raise Refusal(503, f"unloaded: {missing}", retry_after_s=1)
        return Response()

    @router.get("/metrics", response_class=Response)
    async def prometheus() -> Response:
        return Response(exposition(repository, metrics), media_type="text/plain; version=0.0.4")

    return router


def _ready(served: Served) -> Response:
    if not served.ready:
        raise Refusal(503, f"policy {served.name!r} is unloaded", field="name", retry_after_s=1)
    return Response()


def _info(served: Served) -> dict[str, Any]:
    loaded = served.loaded
    return {
        "name": served.name,
        "version": loaded.version,
        "digest": loaded.digest,
        "ready": served.ready,
        "recurrent": loaded.policy.is_recurrent,
        "num_sessions": len(served.sessions),
        "spec": loaded.policy.spec.to_json(),
    }


async def _reload(served: Served) -> dict[str, Any]:
    try:
        changed = await served.reload()
    except CheckpointError as error:
        raise Refusal(409, str(error), field="name") from error
    return {
        "name": served.name,
        "version": served.loaded.version,
        "digest": served.loaded.digest,
        "changed": changed,
    }


def _response(reply: Reply) -> Response:
    response = Response(reply.body, reply.status)
    response.raw_headers = [*reply.headers, (b"content-length", str(len(reply.body)).encode())]
    return response


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal | InputError)
    return _response(error_reply(error))


async def _http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    response = _response(error_reply(Refusal(error.status_code, str(error.detail))))
    response.headers.update(error.headers or {})
    return response


async def _invalid(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    field = str(first["loc"][-1])
    return _response(error_reply(Refusal(400, f"{field}: {first['msg']}", field=field)))
