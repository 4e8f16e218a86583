"""What a benchmark writes: with what it was measured; and the file of one that takes hours, written after every training,
gone on with after an interruption."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lockstep import kernels
from lockstep.core.errors import ConfigError
from lockstep.runs.versions import describe_versions


def measured_with() -> dict[str, Any]:
    """Packages, commit and machine, and which kernels were used: a figure of ours means little without."""
    return describe_versions(json.dumps(kernels.describe()))


def begin_figures(path: Path | None, *parts: str) -> dict[str, Any]:
    """Empty figures, or those of an interrupted measurement of the same commit, which goes on.

    Args:
        path: where they are kept; None: nowhere.
        parts: names of the tables that are filled.

    Raises:
        ConfigError: the file holds figures of another commit.
    """
    figures: dict[str, Any] = {"versions": measured_with(), **{part: {} for part in parts}}
    if path is None or not path.exists():
        return figures
    earlier = dict(json.loads(path.read_text()))
    if earlier["versions"]["commit"] != figures["versions"]["commit"]:
        raise ConfigError(f"{path} holds figures of another commit; name another file or delete it")
    return earlier


def write_figures(path: Path | None, figures: dict[str, Any]) -> None:
    """Whole or not at all."""
    if path is not None:
        scratch = path.with_name(path.name + ".writing")
        scratch.write_text(json.dumps(figures, indent=2) + "\n")
        scratch.replace(path)
