"""A file that appears only when it is complete and checked."""

from __future__ import annotations

import contextlib
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
        raise ConfigError(f"cannot write {path}: {error}; give another --out") from error
    try:
        yield temporary
        if companion:
            temporary.with_suffix(companion).replace(path.with_suffix(companion))
        temporary.replace(path)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error}; give another --out") from error
    finally:
        temporary.unlink(missing_ok=True)
        if companion:
            temporary.with_suffix(companion).unlink(missing_ok=True)
