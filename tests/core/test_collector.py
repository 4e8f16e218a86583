"""Pauses of the collector from several threads."""

from __future__ import annotations

import gc
from contextlib import ExitStack

from lockstep.core.collector import collector_paused


def test_the_last_pause_to_end_starts_the_collector_again() -> None:
    with ExitStack() as first, ExitStack() as second:
        first.enter_context(collector_paused())
        second.enter_context(collector_paused())
        first.close()  # as two threads do, whose pauses overlap
        assert not gc.isenabled()
        second.close()
        assert gc.isenabled()
