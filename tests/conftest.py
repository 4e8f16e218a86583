"""Counts the random cases that the suites of invariance try, for the summary of a run, over all its processes;
and spares what was collected from the search for garbage."""

from __future__ import annotations

import gc
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Processes side by side share the cores: one thread each, or they wait for one another. Before torch is imported.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

gc.disable()
_TRIED = pytest.StashKey[Counter[str]]()


@pytest.fixture
def tried(request: pytest.FixtureRequest) -> Callable[[str, int], None]:
    """Called with what was compared without a tolerance, and how many of it."""
    counts = request.config.stash.setdefault(_TRIED, Counter())

    def count(what: str, num: int = 1) -> None:
        counts[what] += num

    return count


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """What the tests share holds no tests, and imports what most of them never need."""
    is_shared = collection_path.suffix == ".py" and not collection_path.name.startswith("test_")
    return True if is_shared and Path(__file__).parent in collection_path.parents else None


def pytest_collection_finish() -> None:
    """Imports and tests make nothing but what stays."""
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)
    gc.enable()


def pytest_sessionfinish(session: pytest.Session) -> None:
    # pytest looks for garbage five times at the end: once is through all that the session has brought.
    gc.collect()
    gc.freeze()
    if "PYTEST_XDIST_WORKER" in os.environ:
        session.config.workeroutput["tried"] = dict(session.config.stash.get(_TRIED, {}))  # type: ignore[attr-defined]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    node.config.stash.setdefault(_TRIED, Counter()).update(node.workeroutput.get("tried", {}))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    counts = config.stash.get(_TRIED, Counter())
    if counts:
        terminalreporter.section("random cases compared without a tolerance")
        for what, num in sorted(counts.items()):
            terminalreporter.write_line(f"{num:>8}  {what}")
