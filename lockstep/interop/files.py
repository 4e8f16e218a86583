"""A file that appears only when it is complete and checked."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from lockstep.core.errors import ConfigError


@contextlib.contextmanager
def replaced_when_checked(path: Path, suffix: str, *, companion: str = "") -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it at the end, or delete it if the body raises.

    Args:
        path: where the file is to be.
        suffix: that it must have.
        companion: suffix of a second file that belongs to it and shares its fate (empty: none).

    Raises:
        ConfigError: the name lacks the suffix, or the folder cannot be written.
    """
    if path.suffix != suffix:
        raise ConfigError(f"{path} must end in {suffix}")
    temporary = path.with_name(f".{path.stem}.unchecked{suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(b"")
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error}; give another place") from error
    try:
        yield temporary
        if companion:
            temporary.with_suffix(companion).replace(path.with_suffix(companion))
        temporary.replace(path)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error}; give another place") from error
    finally:
        temporary.unlink(missing_ok=True)
        if companion:
            temporary.with_suffix(companion).unlink(missing_ok=True)


@contextlib.contextmanager
def folder_replaced_when_checked(path: Path, marker: str) -> Iterator[Path]:
    """The same for a folder. One that is there already is replaced only if it holds the file `marker`, or nothing.

    Raises:
        ConfigError: it holds something else, or the place cannot be written.
    """
    if path.exists() and not (path / marker).is_file() and (not path.is_dir() or any(path.iterdir())):
        raise ConfigError(f"{path} holds something that no export wrote; give another place")
    if path.exists() and path.samefile("."):
        raise ConfigError(f"{path} is the folder you are in, which cannot be replaced; name it from outside")
    temporary, old = path.with_name(f".{path.name}.unchecked"), path.with_name(f".{path.name}.old")
    try:
        put_back(old, path)
        for folder in (temporary, old):
            shutil.rmtree(folder, ignore_errors=True)
        temporary.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error}; give another place") from error
    try:
        yield temporary
        try:
            if path.exists():
                path.replace(old)
            temporary.replace(path)
        finally:
            put_back(old, path)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error}; give another place") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)


def put_back(old: Path, path: Path) -> None:
    """The earlier folder, where a run was stopped after it was moved away and before the new one was there."""
    if old.exists() and not path.exists():
        old.replace(path)
