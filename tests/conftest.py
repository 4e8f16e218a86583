"""Counts the random cases that the suites of invariance try, for the summary of a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest

_TRIED = pytest.StashKey[Counter[str]]()


@pytest.fixture
def tried(request: pytest.FixtureRequest) -> Callable[[str, int], None]:
    """Called with what was compared without a tolerance, and how many of it."""
    counts = request.config.stash.setdefault(_TRIED, Counter())

    def count(what: str, num: int = 1) -> None:
        counts[what] += num

    return count


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    counts = config.stash.get(_TRIED, Counter())
    if counts:
        terminalreporter.section("random cases compared without a tolerance")
        for what, num in sorted(counts.items()):
            terminalreporter.write_line(f"{num:>8}  {what}")
