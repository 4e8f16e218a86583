"""Models by hub id, through `huggingface_hub` and its cache."""

from __future__ import annotations

import re
from pathlib import Path

from lockstep.core.errors import InputError
from lockstep.core.extras import require

_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_SMALL = ("*.json", "*.jinja", "*.txt", "tokenizer.model", "*.tiktoken")
_SAFE = ("model*.safetensors",)
_PICKLED = ("pytorch_model*.bin",)


def is_hub_id(text: str) -> bool:
    """True for `name` or `organisation/name`.

    >>> is_hub_id("Qwen/Qwen2.5-0.5B"), is_hub_id("./folder"), is_hub_id("a/b/c")
    (True, False, False)
    """
    return _ID.fullmatch(text) is not None and ".." not in text and "--" not in text


def download(hub_id: str, *, revision: str | None = None, cache: Path | None = None, offline: bool = False) -> Path:
    """The model's folder in the hub cache; files that are missing are fetched.

    Args:
        hub_id: `organisation/name`.
        revision: branch, tag or commit.
        cache: the cache's folder; by default the library's.
        offline: take what the cache has and never ask the network.

    Raises:
        InputError: no such model or revision, no access, no network and nothing cached; the message says which.
        MissingExtraError: `huggingface_hub` is not installed.
    """
    hub = require("huggingface_hub", extra="hub")
    # Old models have no safetensors: their pickles are fetched only then.
    for weights in (_SAFE, _PICKLED):
        try:
            found = hub.snapshot_download(
                hub_id,
                revision=revision,
                cache_dir=cache,
                local_files_only=offline,
                allow_patterns=[*_SMALL, *weights],
            )
        # The library's errors derive from these two families, as do those of its HTTP client.
        except (OSError, ValueError, RuntimeError) as error:
            raise InputError(_explain(hub_id, revision, offline, error), field="model") from error
        folder = Path(found)
        if any(folder.glob("*.safetensors")) or any(folder.glob("*.bin")):
            break
    return folder


def _explain(hub_id: str, revision: str | None, offline: bool, error: Exception) -> str:
    kind = type(error).__name__
    at = f" at revision {revision!r}" if revision else ""
    if kind == "RepositoryNotFoundError":
        return f"{hub_id!r} is neither a folder here nor a model on the hub (or it is private: log in with `hf auth login`)"
    if kind == "RevisionNotFoundError":
        return f"{hub_id!r} has no revision {revision!r}"
    if kind == "GatedRepoError":
        return f"{hub_id!r} asks you to accept its terms on its page, and to log in with `hf auth login`"
    if kind == "LocalEntryNotFoundError":
        why = "offline was asked for" if offline else "the hub cannot be reached"
        return f"{hub_id!r}{at} is not in the cache and {why}; connect, or give the path of a folder"
    return f"{hub_id!r}{at} could not be fetched ({kind}: {str(error)[:200]}); connect, or give the path of a folder"
