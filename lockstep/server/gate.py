"""The ASGI entry: what every request passes, and a short way for the two that carry the load.

    request --> key --> body (size, deadline) --> act | infer         (answered here)
                                              '-> FastAPI application (everything else, and the OpenAPI document)

The short way calls the functions that the application's own routes call; it saves routing and middleware, which cost more
than a small policy's decision. No request ends without a reply, whatever is raised.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from lockstep.core.errors import InputError
from lockstep.server.act import act
from lockstep.server.config import ServeConfig
from lockstep.server.limits import BodyReader, Disconnected, Headers, check_key
from lockstep.server.metrics import RequestMetrics
from lockstep.server.oip import infer
from lockstep.server.replies import Refusal, Reply, error_reply
from lockstep.server.repository import Repository

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

log = logging.getLogger("lockstep.server")
OPEN_PATHS = frozenset({"/health", "/healthz", "/ready", "/v2/health/live", "/v2/health/ready"})
LIVE = "/v2/health/live"
ACT_ROUTE = "/v1/policies/{name}/act"
INFER_ROUTE = "/v2/models/{name}/infer"


class Gate:
    """The application that the HTTP server runs.

    Args:
        app: answers what the gate does not.
        key: API key, empty for none.
    """

    def __init__(
        self, app: App, repository: Repository, metrics: RequestMetrics, config: ServeConfig, key: bytes = b""
    ) -> None:
        self.app = app
        self.repository = repository
        self.metrics = metrics
        self.bodies = BodyReader(config.max_body_bytes, config.request_timeout_s)
        self.key = key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.perf_counter()
        try:
            route, status = await self._answer(scope, receive, send)
        except Disconnected:
            return
        self.metrics.observe(route, status, time.perf_counter() - started)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> tuple[str, int]:
        """(route, status) once the reply is sent."""
        path = scope["path"]
        route = "refused"
        try:
            headers = dict(scope["headers"])
            if self.key and path not in OPEN_PATHS:
                check_key(headers, self.key)
            if path == LIVE:
                route, reply = LIVE, Reply(200, b"")
            else:
                body = await self.bodies.read(receive, headers)
                short = self._short_way(scope["method"], path, body, headers)
                if short is None:
                    return await self._through_app(scope, body, receive, send)
                route = short[0]
                reply = await short[1]
        except (Refusal, InputError) as error:
            reply = error_reply(error)
        except Disconnected:
            raise
        except Exception:  # the last line of defence: an error of ours must not close the connection
            log.exception("%s %s failed", scope["method"], route)
            reply = error_reply(Refusal(500, "internal error; the server's log has it"))
        await _send(send, reply)
        return route, reply.status

    def _short_way(self, method: str, path: str, body: bytes, headers: Headers) -> tuple[str, Awaitable[Reply]] | None:
        if method != "POST":
            return None
        match path.split("/"):
            case ["", "v1", "policies", name, "act"]:
                return ACT_ROUTE, act(self.repository, name, body, headers)
            case ["", "v2", "models", name, "infer"]:
                return INFER_ROUTE, infer(self.repository, name, "", body, headers)
            case ["", "v2", "models", name, "versions", version, "infer"]:
                return INFER_ROUTE, infer(self.repository, name, version, body, headers)
        return None

    async def _through_app(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> tuple[str, int]:
        status = 500
        handed = False

        async def replay() -> Message:
            nonlocal handed
            if handed:
                return await receive()
            handed = True
            return {"type": "http.request", "body": body, "more_body": False}

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        await self.app(scope, replay, watched)
        route = scope.get("route")
        return (route.path if route is not None else "unknown"), status


async def _send(send: Send, reply: Reply) -> None:
    headers = [*reply.headers, (b"content-length", str(len(reply.body)).encode())]
    await send({"type": "http.response.start", "status": reply.status, "headers": headers})
    await send({"type": "http.response.body", "body": reply.body})
