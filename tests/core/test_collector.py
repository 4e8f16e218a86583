"""Pauses of the collector from several threads."""

from __future__ import annotations

import gc
import subprocess
import sys
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


_PROGRAM = """
import gc
from lockstep.core.collector import collector_paused
with collector_paused():
    made = [[] for _ in range(5000)]
young = {id(item) for generation in (0, 1) for item in gc.get_objects(generation)}
assert gc.isenabled() and gc.get_freeze_count() == 0
assert not young.intersection(map(id, made))
"""


def test_what_was_made_within_a_pause_is_not_looked_through_at_its_end() -> None:
    subprocess.run(
        [sys.executable, "-c", _PROGRAM], check=True, timeout=60
    )  # a process whose collector nobody else set
