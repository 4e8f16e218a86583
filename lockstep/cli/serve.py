"""`lockstep serve`: policies over HTTP."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from lockstep.core.errors import ConfigError
from lockstep.core.extras import require
from lockstep.server.config import ServeConfig


@dataclass(frozen=True)
class ServeArgs:
    """Serve policies over the Open Inference Protocol (KServe v2) and POST /v1/policies/NAME/act."""

    policies: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Run directories or policy folders, each PATH or NAME=PATH."""
    server: Annotated[ServeConfig, tyro.conf.arg(name="")] = field(default_factory=ServeConfig)
    api_key: str = ""
    """Key that requests must carry (visible in the process list; prefer --api-key-file)."""
    api_key_file: Path | None = None
    """File that holds the key."""


def main(args: Sequence[str]) -> int:
    wish = tyro.cli(ServeArgs, args=list(args), prog="lockstep serve")
    for module in ("fastapi", "uvicorn"):
        require(module, extra="serve")
    from lockstep.server.run import serve

    serve(wish.policies, wish.server, key=read_key(wish))
    return 0


def read_key(wish: ServeArgs) -> str:
    """The API key, empty for none.

    Raises:
        ConfigError: given twice, or the file is missing or empty.
    """
    if wish.api_key_file is None:
        return wish.api_key
    if wish.api_key:
        raise ConfigError("give either --api-key or --api-key-file")
    try:
        key = wish.api_key_file.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--api-key-file {wish.api_key_file} cannot be read: {error}") from error
    if not key:
        raise ConfigError(f"--api-key-file {wish.api_key_file} is empty")
    return key
