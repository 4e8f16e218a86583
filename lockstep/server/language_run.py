"""A language-model server as a process: listen, load, serve, drain.

SIGTERM or SIGINT --> service.drain (new requests: 503; running ones end, within drain_s) --> the server stops
a second one      --> the server stops at once
"""

from __future__ import annotations

import asyncio
import logging
import signal
import threading
from types import FrameType

import uvicorn

from lockstep.server.language import LanguageGate, build_language_app
from lockstep.server.language_config import LanguageConfig
from lockstep.server.listening import http_server
from lockstep.server.service import LanguageService, State

log = logging.getLogger("lockstep.server")
WATCH_S = 0.05


def serve_language(service: LanguageService, *, key: str = "") -> None:
    """Serve until SIGTERM or SIGINT.

    Args:
        service: not started; `begin_loading` may have been called.
        key: API key that requests must carry, empty for none.

    Raises:
        LockstepError: the model cannot be served.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    server = language_server(build_language_app(service, service.config, key=key), service.config)
    asyncio.run(serve_until_told(server, service))
    if service.state is State.FAILED and service.error is not None:
        raise service.error


def language_server(app: LanguageGate, config: LanguageConfig) -> uvicorn.Server:
    """The HTTP server, not yet listening."""
    return http_server(
        app,
        host=config.host,
        port=config.port,
        max_connections=config.max_connections,
        access_log=config.access_log,
        drain_s=5.0,
    )


async def serve_until_told(server: uvicorn.Server, service: LanguageService) -> None:
    """Runs the server to its end; signals are heard where this is the main thread."""
    told = asyncio.Event()
    loop = asyncio.get_running_loop()

    def hear(number: int, frame: FrameType | None) -> None:
        if told.is_set():
            server.should_exit = server.force_exit = True
        log.info("told to end by %s: new requests are refused, running ones end", signal.Signals(number).name)
        loop.call_soon_threadsafe(told.set)

    async def watch() -> None:
        while not server.started:
            await asyncio.sleep(WATCH_S)
        # The HTTP server has put its own handlers in place by now, which would stop listening at once.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, hear)
        while not told.is_set() and service.state is not State.FAILED:
            await asyncio.sleep(WATCH_S)
        if service.state is not State.FAILED:
            await service.drain()
        server.should_exit = True

    watcher = asyncio.create_task(watch())
    try:
        await server.serve()
    finally:
        watcher.cancel()
        await asyncio.gather(watcher, return_exceptions=True)
