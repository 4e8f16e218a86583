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

import contextlib
import ctypes
import enum
import math
import os
import pickle
import signal
import sys
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from lockstep.core.trajectory import Score, Verdict

Job = tuple[str, tuple[Any, ...]]
READY, LOADED, BROKEN = b"ready", b"loaded", b"broken"
MAX_TASKS = 8
MAX_DETAIL = 2000
_PDEATHSIG = 1


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
    _settle(memory_bytes)
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


def describe(error: BaseException) -> str:
    """The exception and where it was raised, within `MAX_DETAIL` characters.

    >>> describe(ValueError("no answer"))
    'ValueError: no answer'
    """
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    place = f" ({os.path.basename(frame.tb_frame.f_code.co_filename)}:{frame.tb_lineno})" if frame is not None else ""
    try:
        text = str(error)
    except Exception as broken:
        text = f"its message cannot be written ({type(broken).__name__})"
    return f"{type(error).__name__}: {text[:MAX_DETAIL]}{place}"


def _load(pipe: Connection, tasks: OrderedDict[bytes, Any], digest: bytes, task_bytes: bytes) -> bool:
    try:
        tasks[digest] = pickle.loads(task_bytes)
    except BaseException as error:
        pipe.send_bytes(BROKEN + describe(error).encode("utf-8", errors="replace"))
        return False
    while len(tasks) > MAX_TASKS:
        tasks.popitem(last=False)
    return True


def _settle(memory_bytes: int) -> None:
    """Own session, end with the owner, quiet, limited."""
    if os.name == "posix":
        os.setsid()
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if memory_bytes:
            import resource

            resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)


class Worker:
    """The owner's side of one worker process.

    Args:
        context: of multiprocessing; forkserver, since fork would copy a process whose threads may hold locks.
        memory_bytes: its limit of address space; 0 for none.
    """

    def __init__(self, context: Any, memory_bytes: int) -> None:
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=work, args=(theirs, memory_bytes), daemon=True)
        self.process.start()
        theirs.close()
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
        """End it and all that it started; how it ended.

        Args:
            grace_s: time for a worker that is ending by itself, so that its own exit status is seen.
        """
        self.process.join(grace_s)
        code = self.process.exitcode
        if os.name == "posix" and self.process.pid is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):  # nothing is left of it
                os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        self.process.join(5.0)
        self.pipe.close()
        return _ending(code if code is not None else self.process.exitcode)


def _ending(code: int | None) -> str:
    if code is not None and code < 0:
        names = {member.value: member.name for member in signal.Signals}
        return f"killed by {names.get(-code, f'signal {-code}')}"
    return f"exit status {code}"
