"""A policy server as a process: load, listen, drain."""

from __future__ import annotations

import logging
import signal
from collections.abc import Sequence
from types import FrameType
from typing import Any

import torch
import uvicorn

from lockstep.server.app import build_app
from lockstep.server.config import ServeConfig
from lockstep.server.repository import Repository, name_folders

KEEP_ALIVE_S = 75


def serve(folders: Sequence[str], config: ServeConfig, *, key: str = "") -> None:
    """Serve until SIGTERM or SIGINT; then refuse new connections, finish what is in flight and return.

    Args:
        folders: `PATH` or `NAME=PATH` of run directories and policy folders.
        key: API key that requests must carry, empty for none.

    Raises:
        ConfigError, CheckpointError: nothing to serve, or not servable.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    torch.set_num_threads(config.num_threads)
    repository = Repository(name_folders(folders), config)
    for served in repository.policies.values():
        loaded = served.loaded
        logging.getLogger("lockstep.server").info(
            "policy %s: version %s, digest %s, %s", served.name, loaded.version, loaded.digest[:12], served.path
        )
    server = uvicorn.Server(
        uvicorn.Config(
            build_app(repository, config, key=key),
            host=config.host,
            port=config.port,
            log_config=None,
            access_log=config.access_log,
            server_header=False,
            limit_concurrency=config.max_connections,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=int(config.drain_s),
            http=http_protocol(),
        )
    )
    # uvicorn raises the signal again once it has drained; these make that the orderly end of this function.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _ended)
    server.run()


def http_protocol() -> Any:
    """uvicorn's fast protocol with joined writes, or its pure Python one where httptools is missing."""
    try:
        from lockstep.server.transport import JoinedProtocol
    except ImportError:
        return "auto"
    return JoinedProtocol


def _ended(number: int, frame: FrameType | None) -> None:
    logging.getLogger("lockstep.server").info("ended by %s", signal.Signals(number).name)
