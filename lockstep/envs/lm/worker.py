"""One killable worker process: calls of a task's methods, an answer for each.

    owner (any thread)                         worker (own session, killed as a group)
    ------------------                         ---------------------------------------
    start                                      limits, then  -- READY -->
    -- (task digest, task or None, jobs) -->   unpickle the task once, -- LOADED --> or BROKEN with the reason
                                               each job:     -- (verdict, value, detail) -->
    close the pipe                             ends; so it does when the owner dies (PDEATHSIG on Linux)

A job is (method name, arguments). The owner knows from the order of answers which job is running, so a worker that hangs
or dies costs that job alone. What a verifier prints goes nowhere: a table is being drawn on the terminal.
"""

from __future__ import annotations

import enum
import math
import pickle
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from lockstep.core.child_process import MAX_DETAIL, ChildProcess, describe, settle
from lockstep.core.trajectory import Score, Verdict
from lockstep.envs.lm.player import playing

Job = tuple[str, tuple[Any, ...]]
READY, LOADED, BROKEN = b"ready", b"loaded", b"broken"
MAX_TASKS = 8


class State(enum.Enum):
    """What a worker is doing, as its owner sees it."""

    STARTING = "starting"
    IDLE = "idle"
    LOADING = "loading the task"
    RUNNING = "running"


@dataclass(frozen=True)
class Outcome:
    """What became of a job: a value where SCORED, the reason elsewhere."""

    verdict: Verdict
    value: Any
    detail: str


def work(pipe: Connection, memory_bytes: int) -> None:
    """A worker's life."""
    settle(memory_bytes)
    tasks: OrderedDict[bytes, Any] = OrderedDict()
    try:
        pipe.send_bytes(READY)
        while True:
            digest, task_bytes, jobs = pickle.loads(pipe.recv_bytes())
            if task_bytes is not None and not _load(pipe, tasks, digest, task_bytes):
                continue
            tasks.move_to_end(digest)
            pipe.send_bytes(LOADED)
            for job in jobs:
                pipe.send_bytes(_packed(run_job(tasks[digest], job)))
    except (EOFError, BrokenPipeError, ConnectionResetError, KeyboardInterrupt):
        pass  # the owner is gone, or closed the pipe


def run_job(task: Any, job: Job) -> Outcome:
    """The outcome of one job; what it raises is told, sys.exit included."""
    method, arguments = job
    try:
        result = getattr(task, method)(*arguments)
        if isinstance(result, Score):
            return Outcome(result.verdict, float(result.value), result.detail[:MAX_DETAIL])
        return Outcome(Verdict.SCORED, result, "")
    except (Exception, SystemExit) as error:
        return Outcome(Verdict.FAILED, math.nan, describe(error))


def _packed(outcome: Outcome) -> bytes:
    try:
        return pickle.dumps((outcome.verdict.value, outcome.value, outcome.detail))
    except Exception as error:
        return pickle.dumps((Verdict.FAILED.value, math.nan, f"its result cannot be sent: {describe(error)}"))


def _load(pipe: Connection, tasks: OrderedDict[bytes, Any], digest: bytes, task_bytes: bytes) -> bool:
    try:
        tasks[digest] = playing(pickle.loads(task_bytes))
    except BaseException as error:
        pipe.send_bytes(BROKEN + describe(error).encode("utf-8", errors="replace"))
        return False
    while len(tasks) > MAX_TASKS:
        tasks.popitem(last=False)
    return True


class Worker:
    """The owner's side of one worker process.

    Args:
        context: `fresh_context()`.
        memory_bytes: its limit of address space; 0 for none.
    """

    def __init__(self, context: Any, memory_bytes: int) -> None:
        self._child = ChildProcess(context, work, (memory_bytes,))
        self.pipe = self._child.pipe
        self.state = State.STARTING
        self.since = time.monotonic()
        self.chunk: list[int] = []
        """Places of the jobs not answered yet, in order."""
        self._known: OrderedDict[bytes, None] = OrderedDict()

    def send(self, digest: bytes, task_bytes: bytes, chunk: Sequence[int], jobs: Sequence[Job]) -> None:
        """Hand over jobs; the worker is idle, so it reads at once.

        Raises:
            OSError: it is gone.
        """
        assert self.state is State.IDLE
        is_known = digest in self._known
        self._known[digest] = None
        self._known.move_to_end(digest)
        while len(self._known) > MAX_TASKS:
            self._known.popitem(last=False)
        self.enter(State.LOADING)
        self.chunk = list(chunk)
        self.pipe.send_bytes(pickle.dumps((digest, None if is_known else task_bytes, list(jobs))))

    def enter(self, state: State) -> None:
        """A new state, and a new deadline with it."""
        self.state, self.since = state, time.monotonic()

    def kill(self, *, grace_s: float = 0.0) -> str:
        """End it and all that it started; how it ended. See `ChildProcess.kill`."""
        return self._child.kill(grace_s=grace_s)
