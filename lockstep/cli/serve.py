"""`lockstep serve`: policies over HTTP; a language model if that is what the path holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from lockstep.cli.model_words import names_language_model
from lockstep.cli.store_args import meant
from lockstep.core.collector import collector_paused
from lockstep.core.errors import ConfigError
from lockstep.core.extras import check_installed
from lockstep.server.address import check_address
from lockstep.server.config import ServeConfig


@dataclass(frozen=True)
class ServeArgs:
    """Serve policies over the Open Inference Protocol (KServe v2) and POST /v1/policies/NAME/act.

    `lockstep serve MODEL`, with a GGUF file, a Hugging Face folder or a hub id, serves a language model: its options are
    told by `lockstep serve MODEL --help`.
    """

    policies: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Run directories or policy folders, each PATH or NAME=PATH."""
    server: Annotated[ServeConfig, tyro.conf.arg(name="")] = field(default_factory=ServeConfig)
    api_key: str = ""
    """Key that requests must carry (visible in the process list; prefer --api-key-file)."""
    api_key_file: Path | None = None
    """File that holds the key."""


def main(args: Sequence[str]) -> int:
    check_installed("fastapi", "uvicorn", extra="serve")
    if "--store" in args or any(names_language_model(argument) for argument in args):
        with collector_paused():
            from lockstep.cli.serve_language import main as serve_language
        return serve_language(args)
    wish = tyro.cli(ServeArgs, args=list(args), prog="lockstep serve")
    if not wish.policies:
        raise ConfigError(
            "nothing to serve; give run directories or policy folders, or a language model: a GGUF file, a Hugging Face "
            "folder, a name that `lockstep list` shows, or a hub id such as org/name"
        )
    for word in wish.policies:
        path = word.partition("=")[2] or word
        if not Path(path).exists():
            raise ConfigError(
                f"{path} does not exist; give a run directory or a policy folder, or of a language model a GGUF file, a "
                f"Hugging Face folder, a name that `lockstep list` shows, or a hub id such as org/name{meant(path)}"
            )
    check_address(wish.server.host, wish.server.port)
    from lockstep.server.run import serve

    serve(wish.policies, wish.server, key=read_key(wish))
    return 0


def read_key(wish: ServeArgs) -> str:
    """The API key, empty for none."""
    return key_of(wish.api_key, wish.api_key_file)


def key_of(key: str, file: Path | None) -> str:
    """The API key of two options, empty for none.

    Raises:
        ConfigError: given twice, or the file is missing or empty.
    """
    if file is None:
        return key
    if key:
        raise ConfigError("give either --api-key or --api-key-file")
    try:
        found = file.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--api-key-file {file} cannot be read: {error}") from error
    if not found:
        raise ConfigError(f"--api-key-file {file} is empty")
    return found
