"""Models by hub id, through `huggingface_hub` and its cache."""

from __future__ import annotations

import errno
import fnmatch
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lockstep.core.errors import InputError
from lockstep.core.extras import require

_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_SMALL = ("*.json", "*.jinja", "*.txt", "tokenizer.model", "*.tiktoken")
_SAFE = ("model*.safetensors",)
ANSWER_S = 10.0
"""The hub's time to say what a model has, in seconds; then what the cache has counts."""
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
    cached_only = offline or _is_silent(hub, hub_id, revision)
    # Old models have no safetensors: their pickles are fetched only then.
    for weights in (_SAFE, _PICKLED):
        try:
            found = hub.snapshot_download(
                hub_id,
                revision=revision,
                cache_dir=cache,
                local_files_only=cached_only,
                allow_patterns=[*_SMALL, *weights],
            )
        except Exception as error:  # those of its HTTP client derive from nothing narrower
            raise InputError(_explain(hub_id, revision, offline, error), field="model") from error
        folder = Path(found)
        if any(folder.glob("*.safetensors")) or any(folder.glob("*.bin")):
            break
    return folder


def list_files(
    hub_id: str, *, file: str = "", revision: str | None = None, endpoint: str | None = None
) -> tuple[str, dict[str, int]]:
    """The commit that a revision means, and name and bytes of the files that make the model there.

    Args:
        file: pattern of the one GGUF file to take; empty: safetensors if there are any, else the only GGUF file, else
            pickles.
        endpoint: address of another hub.

    Raises:
        InputError: as `download`, or several GGUF files and no choice among them.
        MissingExtraError: `huggingface_hub` is not installed.
    """
    hub = require("huggingface_hub", extra="hub")
    try:
        info = hub.HfApi(endpoint=endpoint).model_info(hub_id, revision=revision, files_metadata=True, timeout=ANSWER_S)
    except Exception as error:  # as in download
        raise InputError(_explain(hub_id, revision, False, error), field="model") from error
    sizes = {item.rfilename: int(item.size or 0) for item in info.siblings or () if "/" not in item.rfilename}
    ggufs = [name for name in sizes if name.endswith(".gguf") and fnmatch.fnmatch(name, file or "*")]
    small = [name for name in sizes if any(fnmatch.fnmatch(name, pattern) for pattern in _SMALL)]
    for pattern in (*_SAFE, *_PICKLED):
        weights = [name for name in sizes if fnmatch.fnmatch(name, pattern)]
        if weights and not file and (pattern in _SAFE or not ggufs):
            return str(info.sha), {name: sizes[name] for name in [*small, *weights]}
    if len(ggufs) != 1:
        names = ", ".join(sorted(name for name in sizes if name.endswith(".gguf"))[:12])
        found = f"{len(ggufs)} GGUF files" + (f" match {file!r}" if file else "")
        raise InputError(
            f"{hub_id!r} has {found}; choose one by --file: {names or 'it holds no weights'}", field="file"
        )
    return str(info.sha), {ggufs[0]: sizes[ggufs[0]]}


def download_files(
    hub_id: str,
    sizes: Mapping[str, int],
    folder: Path,
    *,
    revision: str,
    endpoint: str | None = None,
    progress: Callable[[str, int, int], Any],
) -> None:
    """Files of a repository into a folder; what is there already is kept, and a file that was begun goes on: the library's
    own download begins such a file anew in the next process.

    Args:
        sizes: name and bytes, as `list_files` tells them.
        progress: called with each file's name and size when it is here.

    Raises:
        InputError: as `download`.
    """
    hub = require("huggingface_hub", extra="hub")
    from huggingface_hub.file_download import http_get

    for name, size in sizes.items():
        target, part = folder / name, folder / f"{name}.part"
        if not target.exists():
            try:
                with part.open("ab") as file:
                    if file.tell() != size:
                        url = hub.hf_hub_url(hub_id, name, revision=revision, endpoint=endpoint)
                        headers = hub.utils.build_hf_headers()
                        http_get(url, file, resume_size=file.tell(), headers=headers, expected_size=size)
                    os.fsync(file.fileno())
            except Exception as error:  # as in download
                if isinstance(error, OSError) and error.errno in (
                    errno.ENOSPC,
                    errno.EDQUOT,
                    errno.EROFS,
                    errno.EACCES,
                ):
                    raise  # the disk's, not the hub's
                raise InputError(_explain(hub_id, revision, False, error), field="model") from error
            part.rename(target)
        progress(name, size, size)


def _is_silent(hub: Any, hub_id: str, revision: str | None) -> bool:
    """Whether the hub does not answer: the library's own first question would wait for ever."""
    try:
        hub.HfApi().model_info(hub_id, revision=revision, timeout=ANSWER_S)
    except Exception as error:  # as in download, which meets every other one again and tells it
        return "Timeout" in type(error).__name__
    return False


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
