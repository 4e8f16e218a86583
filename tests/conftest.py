"""Counts the random cases that the suites of invariance try, for the summary of a run, over all its processes;
and spares what was collected from the search for garbage."""

from __future__ import annotations

import gc
import os
from collections import Counter
from collections.abc import Callable
from typing import Any

# Processes side by side share the cores: one thread each, or they wait for one another. Before torch is imported.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

_TRIED = pytest.StashKey[Counter[str]]()


@pytest.fixture
def tried(request: pytest.FixtureRequest) -> Callable[[str, int], None]:
    """Called with what was compared without a tolerance, and how many of it."""
    counts = request.config.stash.setdefault(_TRIED, Counter())

    def count(what: str, num: int = 1) -> None:
        counts[what] += num

    return count


def pytest_collection_finish() -> None:
    gc.freeze()


def pytest_sessionfinish(session: pytest.Session) -> None:
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
