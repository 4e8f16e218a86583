"""The FastAPI application of a language-model server, and the gate in front of it.

    request --> CORS --> key --> body (size, deadline) --> route --> dialect --> engine

Every error is told in the envelope of the route's dialect. Every reply names its request: `x-request-id`, the client's own
where it sent one; Anthropic's client reads `request-id`.
"""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from lockstep import __version__
from lockstep.core.errors import InputError
from lockstep.server.admin import add_admin_routes
from lockstep.server.dialects.anthropic import Messages, anthropic_error, anthropic_error_frame, count_tokens
from lockstep.server.dialects.openai_chat import ChatCompletion
from lockstep.server.dialects.openai_completions import Completion
from lockstep.server.dialects.openai_embeddings import embeddings
from lockstep.server.dialects.openai_envelope import openai_error, openai_error_frame
from lockstep.server.dialects.openai_responses import ResponseExchange, responses_error_frame
from lockstep.server.dialects.scores import rerank, score
from lockstep.server.dialects.tokens import detokenize, tokenize
from lockstep.server.following import follow
from lockstep.server.language_config import LanguageConfig
from lockstep.server.limits import BodyReader, Disconnected, check_key, decoded, parse_json
from lockstep.server.replies import Refusal, Reply, json_reply, shortened
from lockstep.server.service import LanguageService
from lockstep.server.stream import Answer, ErrorFrame, ErrorReply, Make, as_refusal, send_reply, while_connected
from lockstep.server.updates import Updates

log = logging.getLogger("lockstep.server")
OPEN_PATHS = frozenset({"/health", "/healthz", "/ready", "/v2/health/live", "/v2/health/ready"})
GENERATING: dict[str, tuple[Make, ErrorReply, ErrorFrame]] = {
    "/v1/chat/completions": (ChatCompletion, openai_error, openai_error_frame),
    "/v1/completions": (Completion, openai_error, openai_error_frame),
    "/v1/responses": (ResponseExchange, openai_error, responses_error_frame),
    "/v1/messages": (Messages, anthropic_error, anthropic_error_frame),
}
ANSWERING: dict[str, Callable[[LanguageService, dict[str, Any]], Awaitable[Any]]] = {
    "/v1/embeddings": embeddings,
    "/score": score,
    "/v1/score": score,
    "/rerank": rerank,
    "/v1/rerank": rerank,
    "/v1/messages/count_tokens": count_tokens,
    "/tokenize": tokenize,
    "/detokenize": detokenize,
}


def build_language_app(service: LanguageService, config: LanguageConfig, *, key: str = "") -> LanguageGate:
    """The ASGI application that serves `service`; its start begins the loading, its end the engine's."""

    updates = Updates(service)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(service.start(), name="load")]
        if service.followed is not None and config.reload_every_s:
            following = follow(service, updates, service.followed, service.followed_from)
            tasks.append(asyncio.create_task(following, name="follow"))
        yield
        for task in tasks[1:]:
            task.cancel()
        await asyncio.wait(tasks)
        await service.close()

    app = FastAPI(
        title="Lockstep language-model server", version=__version__, lifespan=lifespan, redirect_slashes=False
    )
    for path in GENERATING:
        app.add_api_route(path, _generating(service, path), methods=["POST"], response_class=Response)
    for path in ANSWERING:
        app.add_api_route(path, _answering(service, path), methods=["POST"], response_class=Response)
    _models(app, service)
    _operations(app, service)
    add_admin_routes(app, service, updates)
    for kind in (Refusal, InputError, HTTPException, Exception):
        app.add_exception_handler(kind, _refused)
    return LanguageGate(app, service, config, key.encode())


class LanguageGate:
    """What the HTTP server runs."""

    def __init__(self, app: FastAPI, service: LanguageService, config: LanguageConfig, key: bytes) -> None:
        self._app: Any = app
        self._entry: Any = self._handle
        if config.cors_origins:
            # Around everything: a page that may not read a refusal cannot tell a wrong key from a server that is down.
            self._entry = CORSMiddleware(
                self._handle,
                allow_origins=list(config.cors_origins),
                allow_methods=["*"],
                allow_headers=["*"],
                expose_headers=["x-request-id", "request-id", "retry-after"],
            )
        self.service = service
        self._bodies = BodyReader(config.max_body_bytes, config.body_timeout_s)
        self._key = key

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self._entry(scope, receive, send)

    async def _handle(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.perf_counter(), 0
        handed = False
        body = b""
        headers = dict(scope["headers"])
        request_id = _request_id(headers)
        name = b"request-id" if scope["path"].startswith("/v1/messages") else b"x-request-id"

        async def replay() -> Any:
            nonlocal handed
            if handed:
                return await receive()
            handed = True
            return {"type": "http.request", "body": body, "more_body": False}

        async def watched(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message.get("headers", ()), (name, request_id)]}
            await send(message)

        try:
            # A browser's preflight carries no key.
            if self._key and scope["path"] not in OPEN_PATHS and scope["method"] != "OPTIONS":
                check_key(headers, self._key)
            body = await self._bodies.read(receive, headers)
        except Refusal as error:
            reply = send_reply(watched, _envelope(scope["path"])(error))
        except Disconnected:
            return
        else:
            reply = self._app(scope, replay, watched)
        try:
            await reply
        finally:  # what failed is answered and then raised on, for the HTTP server to log
            route = scope.get("route")
            path = route.path if route is not None else "unknown"
            if status == 500:
                log.error("request %s, %s %s, was answered 500", request_id.decode(), scope["method"], scope["path"])
            self.service.metrics.requests.observe(path, status or 499, time.perf_counter() - started)


def _request_id(headers: dict[bytes, bytes]) -> bytes:
    """The client's, if it is one that a log can hold."""
    given = headers.get(b"x-request-id", b"")
    return given if re.fullmatch(rb"[!-~]{1,128}", given) else secrets.token_hex(16).encode()


def _generating(service: LanguageService, path: str) -> Callable[[Request], Awaitable[Response]]:
    make, envelope, frame = GENERATING[path]

    async def generate(request: Request) -> Response:
        return Answer(service, await request.body(), dict(request.headers.raw), make, envelope, frame)

    return generate


def _answering(service: LanguageService, path: str) -> Callable[[Request], Awaitable[Response]]:
    handler = ANSWERING[path]

    async def answer(request: Request) -> Response:
        service.check_open()
        headers = dict(request.headers.raw)
        body = parse_json(decoded(await request.body(), headers, service.config.max_body_bytes))
        try:
            document = await while_connected(request.receive, handler(service, body))
        except Disconnected:
            service.metrics.num_disconnected += 1
            return Response(status_code=499)
        return _response(json_reply(document))

    return answer


def _models(app: FastAPI, service: LanguageService) -> None:
    def described(request: Request, adapter: str = "") -> dict[str, Any]:
        name = adapter or service.name
        if "anthropic-version" in request.headers:
            stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(service.created))
            return {
                "type": "model",
                "id": name,
                "display_name": name,
                "created_at": stamp,
                "lifecycle": "active",
                "max_input_tokens": service.engine.plan.max_context,
            }
        entry = {"id": name, "object": "model", "created": service.created, "owned_by": "lockstep"}
        # As vLLM tells an adapter: where it came from, and on what it stands.
        origin = (
            {"root": service.adapters[adapter], "parent": service.name} if adapter else {"root": name, "parent": None}
        )
        return {**entry, **origin, "max_model_len": service.engine.plan.max_context}

    @app.get("/v1/models")
    async def list_models(request: Request) -> Any:
        service.check_open()
        data = [described(request, name) for name in ("", *service.adapters)]
        if "anthropic-version" in request.headers:
            return {"data": data, "has_more": False, "first_id": service.name, "last_id": data[-1]["id"]}
        return {"object": "list", "data": data}

    @app.get("/v1/models/{name:path}")
    async def show_model(name: str, request: Request) -> Any:
        service.check_open()
        return described(request, service.check_name(name))


def _operations(app: FastAPI, service: LanguageService) -> None:
    @app.get("/healthz", response_class=Response)
    @app.get("/v2/health/live", response_class=Response)
    async def live() -> Response:
        return Response()

    @app.get("/health", response_class=Response)
    @app.get("/ready", response_class=Response)
    @app.get("/v2/health/ready", response_class=Response)
    async def ready() -> Response:
        await service.check_health()
        return Response()

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        return Response(await service.metrics_page(), media_type="text/plain; version=0.0.4")

    @app.get("/version")
    async def version() -> dict[str, str]:
        return {"version": __version__}


def _envelope(path: str) -> ErrorReply:
    return anthropic_error if path.startswith("/v1/messages") else openai_error


async def _refused(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException):
        asked = f"{request.method} {shortened(request.url.path)}"
        told = {404: f"there is no route {asked}; /docs lists all", 405: f"{asked}: the route takes other methods"}
        refusal: Refusal | InputError = Refusal(error.status_code, told.get(error.status_code, str(error.detail)))
    else:
        refusal = as_refusal(error)
    return _response(_envelope(request.url.path)(refusal))


def _response(reply: Reply) -> Response:
    response = Response(reply.body, reply.status)
    response.raw_headers = [*reply.headers, (b"content-length", str(len(reply.body)).encode())]
    return response
