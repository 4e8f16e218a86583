"""A policy server as a process: load, listen, drain."""

from __future__ import annotations

import logging
import signal
from collections.abc import Sequence
from types import FrameType

import torch

from lockstep.server.app import build_app
from lockstep.server.config import ServeConfig
from lockstep.server.listening import http_server
from lockstep.server.repository import Repository, name_folders


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
    server = http_server(
        build_app(repository, config, key=key),
        host=config.host,
        port=config.port,
        max_connections=config.max_connections,
        access_log=config.access_log,
        drain_s=config.drain_s,
    )
    # uvicorn raises the signal again once it has drained; these make that the orderly end of this function.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _ended)
    server.run()


def _ended(number: int, frame: FrameType | None) -> None:
    logging.getLogger("lockstep.server").info("ended by %s", signal.Signals(number).name)
