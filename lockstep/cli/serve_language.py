"""`lockstep serve MODEL`: a language model over HTTP."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import tyro

from lockstep.cli.model_words import of_run
from lockstep.cli.store_args import stored_path, suggesting
from lockstep.core.collector import collector_paused
from lockstep.server.address import check_address
from lockstep.server.language_config import LanguageConfig


@dataclass(frozen=True)
class ServeLanguageArgs:
    """Serve a language model: OpenAI chat, completions, responses and embeddings, Anthropic messages."""

    model: Annotated[str, tyro.conf.Positional]
    """A GGUF file, a Hugging Face folder, a name in the store, or a hub id."""
    server: Annotated[LanguageConfig, tyro.conf.arg(name="")] = field(default_factory=LanguageConfig)
    store: Path | None = None
    """Folder of the model store; None: lockstep/models in the user's cache."""
    weights: str = ""
    """Of a run that kept an average: trained or averaged (default: those it serves)."""
    api_key: str = ""
    """Key that requests must carry (visible in the process list; prefer --api-key-file)."""
    api_key_file: Path | None = None
    """File that holds the key."""


def main(args: Sequence[str]) -> int:
    wish = tyro.cli(ServeLanguageArgs, args=list(args), prog="lockstep serve")
    with collector_paused():
        from lockstep.cli.serve import key_of
        from lockstep.server.service import LanguageService, begin_loading

        chosen, server = of_run(wish.model, wish.weights), wish.server
        path = stored_path(chosen, wish.store)
        if path != wish.model and not server.served_name:
            # Clients know the model by the name it has in the store or of its run, not by that of its file.
            server = replace(server, served_name=wish.model if path != chosen else Path(wish.model).name)
        key = key_of(wish.api_key, wish.api_key_file)
        check_address(server.host, server.port)
        service = LanguageService(path, server)
        begin_loading(service)
        # The model is loaded while the HTTP server is imported.
        from lockstep.server.language_run import serve_language

    with suggesting(wish.model, wish.store):
        serve_language(service, key=key)
    return 0
