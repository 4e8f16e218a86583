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
    temporary, old = path.with_name(f".{path.name}.unchecked"), path.with_name(f".{path.name}.old")
    try:
        for folder in (temporary, old):
            shutil.rmtree(folder, ignore_errors=True)
        temporary.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error}; give another place") from error
    try:
        yield temporary
        if path.exists():
            path.replace(old)
        temporary.replace(path)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error}; give another place") from error
    finally:
        for folder in (temporary, old):
            shutil.rmtree(folder, ignore_errors=True)
