"""The HTTP server below an application, the same for policies and language models."""

from __future__ import annotations

from typing import Any

import uvicorn

_KEEP_ALIVE_S = 75


def http_server(
    app: Any, *, host: str, port: int, max_connections: int, access_log: bool, drain_s: float
) -> uvicorn.Server:
    """Not yet listening.

    Args:
        drain_s: for connections that are still open when it is told to end.
    """
    return uvicorn.Server(
        uvicorn.Config(
            app,
            host=host,
            port=port,
            log_config=None,
            access_log=access_log,
            server_header=False,
            limit_concurrency=max_connections,
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=int(drain_s),
            http=_protocol(),
        )
    )


def _protocol() -> Any:
    """uvicorn's fast protocol with joined writes, or its pure Python one where httptools is missing."""
    try:
        from lockstep.server.transport import JoinedProtocol
    except ImportError:
        return "auto"
    return JoinedProtocol
