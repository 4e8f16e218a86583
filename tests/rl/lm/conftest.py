"""Rollout workers as threads of the test: the same messages and engines, without the seconds that a process takes to start."""

from __future__ import annotations

import contextlib
import itertools
import threading
from multiprocessing import Pipe
from typing import Any

import pytest

from lockstep.rl.lm import fleet
from lockstep.rl.lm.worker import serve


class ThreadChild:
    """Stands for `ChildProcess`: its end of the pipe closes when it ends, however that is."""

    _pids = itertools.count(1)

    def __init__(self, context: Any, target: Any, arguments: tuple[Any, ...]) -> None:
        self.pipe, theirs = Pipe()
        self.pid = next(self._pids)

        def live() -> None:
            with contextlib.closing(theirs), contextlib.suppress(SystemExit):
                serve(theirs, *arguments)

        threading.Thread(target=live, daemon=True).start()

    def kill(self, *, grace_s: float = 0.0) -> str:
        self.pipe.close()
        return "killed by the test"


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet, "ChildProcess", ThreadChild)
