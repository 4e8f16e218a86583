"""The only reader of `os.environ`: paths, logging and debugging, never behaviour."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def runs_root() -> Path:
    """Folder that holds run directories: `LOCKSTEP_RUNS`, else `runs/` under the working directory."""
    return Path(os.environ.get("LOCKSTEP_RUNS", "runs"))


def model_store() -> Path:
    """Folder that holds pulled models: `LOCKSTEP_STORE`, else `lockstep/models` in the user's cache (`XDG_CACHE_HOME`)."""
    own = os.environ.get("LOCKSTEP_STORE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lockstep" / "models"


def debug_naive() -> bool:
    """True if `LOCKSTEP_DEBUG_NAIVE=1`: every op takes its naive implementation, to tell a kernel bug from a model bug."""
    return os.environ.get("LOCKSTEP_DEBUG_NAIVE", "") == "1"


def converter_python(name: str) -> Path:
    """Interpreter that has a converter installed: `LOCKSTEP_NAME_PYTHON`, e.g. `LOCKSTEP_LITERT_PYTHON`, else our own."""
    return Path(os.environ.get(f"LOCKSTEP_{name.upper()}_PYTHON") or sys.executable)


def child_environment(**extra: str) -> dict[str, str]:
    """Copy of the environment for a child process, with `extra` set."""
    return {**os.environ, **extra}
