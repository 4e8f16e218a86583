"""The model store on the command line: `lockstep pull`, `list`, `show` and `rm`, and names that other verbs take."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from lockstep.core.env import model_store
from lockstep.core.errors import InputError
from lockstep.interop.store import ModelStore, StoredModel, describe


@dataclass(frozen=True)
class PullArgs:
    """Copy a model into the store: from the hub, or from a file or folder here. A pull that was stopped goes on."""

    source: Annotated[str, tyro.conf.Positional]
    """`organisation/name` on the hub, a GGUF file, or a model folder."""
    name: str = ""
    """In the store; empty: as the source is called."""
    file: str = ""
    """Which of several GGUF files, such as '*q4_0.gguf'."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    endpoint: str | None = None
    """Address of another hub."""
    store: Path | None = None
    """Folder of the store; None: lockstep/models in the user's cache."""


@dataclass(frozen=True)
class ListArgs:
    """Models in the store."""

    store: Path | None = None
    """Folder of the store; None: lockstep/models in the user's cache."""


@dataclass(frozen=True)
class NameArgs:
    """One model of the store."""

    model: Annotated[str, tyro.conf.Positional]
    """Its name, as `lockstep list` shows it."""
    store: Path | None = None
    """Folder of the store; None: lockstep/models in the user's cache."""


@dataclass(frozen=True)
class RemoveArgs:
    """Take models out of the store: all that are named, or none."""

    models: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Their names, as `lockstep list` shows them."""
    store: Path | None = None
    """Folder of the store; None: lockstep/models in the user's cache."""


def opened(store: Path | None) -> ModelStore:
    """The store that is meant."""
    return ModelStore(store if store is not None else model_store())


def stored_path(word: str, store: Path | None = None) -> str:
    """The path of a model that the store has under this name, else the word itself; what is here goes before names."""
    found = None if Path(word).exists() else opened(store).find(word)
    return word if found is None else str(found.path)


def meant(word: str, store: Path | None = None) -> str:
    """What to add to the news that there is no such model: names of the store that are near; empty if none is."""
    names = " or ".join(map(repr, opened(store).near(word)))
    return f"; did you mean {names}, which `lockstep list` shows?" if names else ""


@contextmanager
def suggesting(word: str, store: Path | None = None) -> Iterator[None]:
    """The error that neither this machine nor the hub has a model goes on with the names of the store that are near."""
    try:
        yield
    except InputError as error:
        hint = "" if error.field != "model" or Path(word).exists() else meant(word, store)
        if hint:
            raise InputError(f"{error}{hint}", field="model") from error
        raise


def pull(args: Sequence[str]) -> int:
    wish = tyro.cli(PullArgs, args=list(args), prog="lockstep pull")
    made = opened(wish.store).pull(
        wish.source,
        name=wish.name,
        file=wish.file,
        revision=wish.revision,
        endpoint=wish.endpoint,
        progress=_bar if sys.stderr.isatty() else lambda file, done, size: None,
    )
    print(f"{made.name}: {made.format}, {byte_words(made.num_bytes)}, in {made.folder}")
    return 0


def list_models(args: Sequence[str]) -> int:
    wish = tyro.cli(ListArgs, args=list(args), prog="lockstep list")
    store = opened(wish.store)
    rows = [
        ("NAME", "SIZE", "FORMAT", "PULLED"),
        *map(_row, store.models(told=lambda error: print(error, file=sys.stderr))),
    ]
    if len(rows) == 1:
        print(f"no models in {store.root}; `lockstep pull` fetches one")
        return 0
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return 0


def show(args: Sequence[str]) -> int:
    wish = tyro.cli(NameArgs, args=list(args), prog="lockstep show")
    for key, value in describe(opened(wish.store).get(wish.model)).items():
        text = f"{value:,}" if isinstance(value, int) and key != "bytes" else str(value)
        print(f"{'size' if key == 'bytes' else key:14} {byte_words(value) if key == 'bytes' else text}")
    return 0


def remove(args: Sequence[str]) -> int:
    wish = tyro.cli(RemoveArgs, args=list(args), prog="lockstep rm")
    if not wish.models:
        raise InputError("no model is named; `lockstep list` shows them", field="models")
    store = opened(wish.store)
    names = dict.fromkeys(wish.models)
    for name in names:
        store.whole_or_damaged(name)
    for name in names:
        gone = store.remove(name)
        print(f"removed {gone.name}: {byte_words(gone.num_bytes)}")
    return 0


def _row(model: StoredModel) -> tuple[str, str, str, str]:
    pulled = time.strftime("%Y-%m-%d %H:%M", time.localtime(model.pulled))
    return model.name, byte_words(model.num_bytes), model.format, pulled


def byte_words(num: int) -> str:
    """Bytes as a person reads them.

    >>> byte_words(1536), byte_words(3 << 30)
    ('1.5 KiB', '3.0 GiB')
    """
    size, unit = float(num), 0
    while size >= 1024 and unit < 4:
        size, unit = size / 1024, unit + 1
    return f"{num} B" if unit == 0 else f"{size:.1f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[unit]}"


def _bar(file: str, done: int, size: int) -> None:
    end = "\n" if done == size else ""
    print(f"\r{file}: {byte_words(done)} of {byte_words(size)}   ", end=end, file=sys.stderr, flush=True)
