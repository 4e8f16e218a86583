"""What a run was made with: packages, commit, machine."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

_PACKAGES = ("torch", "numpy", "gymnasium")
_DECIDING = ("tokenizers", "jinja2", "reasoning-gym", "textarena", "math-verify")
"""Extras that decide what a language model is asked and how it is judged; named where they are installed."""


def describe_versions(kernels: str = "") -> dict[str, Any]:
    """Versions of packages, commit of a source checkout (None outside one), platform and CPU.

    Args:
        kernels: which kernel variants are in use, in words.
    """
    commit, dirty = _git_commit(Path(__file__).resolve().parents[2])
    return {
        # The package itself is above every room; it is loaded, being this module's parent.
        "lockstep": sys.modules["lockstep"].__version__,
        **{package: _installed(package) for package in _PACKAGES},
        **{package: version for package in _DECIDING if (version := _installed(package)) is not None},
        "python": platform.python_version(),
        "commit": commit,
        "dirty": dirty,
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "num_cpus": os.cpu_count(),
        "kernels": kernels,
    }


def _installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_commit(folder: Path) -> tuple[str | None, bool | None]:
    """(commit, whether tracked files differ from it); (None, None) outside a checkout or without git."""
    if not (folder / ".git").exists():
        return None, None
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return None, None
    described = done.stdout.strip()
    if done.returncode != 0 or not described:
        return None, None
    return described.removesuffix("-dirty"), described.endswith("-dirty")


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    for line in lines:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()
