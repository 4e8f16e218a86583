"""Verifiers in killable worker processes: every answer gets a verdict, none of them for want of one a 0.

    score_all(task, items) --borrows idle workers--> chunks of items --> Score of each, in the order given

A worker that passes an item's deadline is killed with all it started and replaced; the item is TIMED_OUT. One that dies
(os._exit, a segmentation fault, out of memory) makes its item FAILED. Items it had not begun go to another worker.
"""

from __future__ import annotations

import hashlib
import math
import os
import pickle
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from types import FrameType
from typing import Any, final

from lockstep.core.child_process import fresh_context
from lockstep.core.errors import ConfigError, DeadlineError, EnvError
from lockstep.core.trajectory import Problem, Score, Verdict
from lockstep.envs.lm.player import Player
from lockstep.envs.lm.task import EpisodeTask, Task, Turn
from lockstep.envs.lm.worker import BROKEN, LOADED, READY, Job, Outcome, State, Worker, run_job

MAX_CHUNK = 64


@dataclass(frozen=True, kw_only=True)
class VerifierConfig:
    """How answers are judged."""

    workers: int = 1
    """Processes. 0 judges in the calling process: nothing to start, but what kills or fills it is not contained, and
    the deadline is held by SIGALRM in the main thread only; elsewhere an item is TIMED_OUT once it comes back late."""
    timeout_s: float = 10.0
    """Each item's deadline (seconds of wall time)."""
    start_s: float = 120.0
    """Deadline for a worker to start, and to load a task: imports take their time (seconds)."""
    memory_mb: int = 4096
    """Address space that a worker may take beyond what it begins with (MiB); 0: no limit."""


class _TooLateError(BaseException):
    """Raised by the alarm; no verifier's `except Exception` catches it."""


@final
class VerifierPool:
    """Judges answers. Safe to use from several threads: calls share the workers.

    Args:
        config: how.

    >>> from lockstep.envs.lm.verify import VerifierConfig, VerifierPool
    >>> pool = VerifierPool(VerifierConfig(workers=0))
    >>> pool.counts[Verdict.FAILED]
    0
    """

    def __init__(self, config: VerifierConfig | None = None) -> None:
        self.config = config or VerifierConfig()
        if self.config.workers < 0 or self.config.timeout_s <= 0 or self.config.start_s <= 0:
            raise ConfigError(f"{self.config}: workers must be 0 or more, timeout_s and start_s above 0")
        self.counts: Counter[Verdict] = Counter(dict.fromkeys(Verdict, 0))
        """Verdicts given so far."""
        self._context = fresh_context("lockstep.envs.lm.worker")
        self._free = threading.Condition()
        self._idle: deque[Worker] = deque()
        self._num_alive = 0
        self._is_closed = False
        self._pickled: dict[int, tuple[Any, bytes, bytes]] = {}
        self._players: dict[int, tuple[EpisodeTask, Player]] = {}

    def score_all(self, task: Task, items: Sequence[tuple[Problem, str]]) -> list[Score]:
        """The score of each (problem, text), in order.

        Raises:
            ConfigError: the task cannot travel to a worker.
            EnvError, DeadlineError: a worker does not start, or cannot load the task.
        """
        scores = [_score(outcome) for outcome in self.run(task, [("score", item) for item in items])]
        with self._free:
            self.counts.update(score.verdict for score in scores)
        return scores

    def step_all(self, task: EpisodeTask, items: Sequence[tuple[int, Sequence[str]]]) -> list[Turn | Score]:
        """The next turn of each episode, in order; a score where the episode failed or timed out, and so has ended.

        A worker that has the episode goes on with it; any other plays it from its beginning.

        Args:
            items: (index of the problem, what the model wrote, turn by turn).
        """
        here = task if self.config.workers else self._player(task)
        outcomes = self.run(here, [("play", (index, tuple(texts))) for index, texts in items])
        turns: list[Turn | Score] = []
        for outcome in outcomes:
            is_turn = outcome.verdict is Verdict.SCORED and isinstance(outcome.value, Turn)
            turns.append(outcome.value if is_turn else _score(outcome))
        with self._free:
            self.counts.update(
                turn.verdict if isinstance(turn, Score) else Verdict.SCORED
                for turn in turns
                if isinstance(turn, Score) or turn.is_done
            )
        return turns

    def run(self, task: Any, jobs: Sequence[Job]) -> list[Outcome]:
        """The outcome of each call of a method of `task`, in order. Raises as `score_all` does."""
        if self._is_closed:
            raise ConfigError("this verifier pool is closed; make a new one")
        if not jobs:
            return []
        if self.config.workers == 0:
            return [_run_here(task, job, self.config.timeout_s) for job in jobs]
        return _Call(self, *self._pickle(task), jobs).outcomes()

    def close(self) -> None:
        """End all workers. Idempotent."""
        with self._free:
            self._is_closed = True
            while self._idle:
                self._idle.popleft().kill()
                self._num_alive -= 1

    def __enter__(self) -> VerifierPool:
        return self

    def __exit__(self, *reason: object) -> None:
        self.close()

    def take(self, limit: float | None) -> Worker | None:
        """Borrow a worker, a new one if there are too few; None if all are lent.

        Args:
            limit: time of `time.monotonic` up to which to wait for one; None: do not wait.
        """
        with self._free:
            while True:
                if self._idle:
                    return self._idle.popleft()
                if self._num_alive < self.config.workers:
                    self._num_alive += 1
                    break
                if limit is None or not self._free.wait(max(0.0, limit - time.monotonic())):
                    return None
        try:
            return Worker(self._context, self.config.memory_mb << 20)
        except BaseException:
            self.lost()
            raise

    def give(self, worker: Worker) -> None:
        """Return a worker that is idle."""
        with self._free:
            if not self._is_closed:
                self._idle.append(worker)
                self._free.notify()
                return
        worker.kill()

    def lost(self) -> None:
        """A borrowed worker is no more."""
        with self._free:
            self._num_alive -= 1
            self._free.notify()

    def _player(self, task: EpisodeTask) -> Player:
        """Of episodes that are played in this process."""
        with self._free:
            known = self._players.get(id(task))
            if known is None or known[0] is not task:
                known = self._players[id(task)] = (task, Player(task))
            return known[1]

    def _pickle(self, task: Any) -> tuple[bytes, bytes]:
        with self._free:
            known = self._pickled.get(id(task))
            if known is not None and known[0] is task:
                return known[1], known[2]
        try:
            data = pickle.dumps(task)
        except Exception as error:
            raise ConfigError(
                f"task {type(task).__name__} cannot travel to a verifier process: {type(error).__name__}: {error}. Keep "
                "only its configuration in it and load the rest when needed, or judge with workers=0"
            ) from error
        digest = hashlib.sha256(data).digest()
        with self._free:
            while len(self._pickled) >= 16:
                self._pickled.pop(next(iter(self._pickled)))
            self._pickled[id(task)] = (task, digest, data)
        return digest, data


class _Call:
    """One call of `VerifierPool.run`: its queue, its borrowed workers."""

    def __init__(self, pool: VerifierPool, digest: bytes, task_bytes: bytes, jobs: Sequence[Job]) -> None:
        self._pool = pool
        self._digest, self._task_bytes = digest, task_bytes
        self._jobs = jobs
        self._queue = deque(range(len(jobs)))
        self._outcomes: list[Outcome | None] = [None] * len(jobs)
        self._workers: dict[Any, Worker] = {}

    def outcomes(self) -> list[Outcome]:
        try:
            while self._queue or any(worker.chunk for worker in self._workers.values()):
                self._hire()
                for pipe in wait(list(self._workers), timeout=self._patience()):
                    self._read(self._workers[pipe])
                for worker in list(self._workers.values()):
                    self._check(worker)
        finally:
            for worker in self._workers.values():
                if worker.state in (State.IDLE, State.STARTING):
                    self._pool.give(worker)
                else:
                    worker.kill()
                    self._pool.lost()
        assert None not in self._outcomes
        return [outcome for outcome in self._outcomes if outcome is not None]

    def _hire(self) -> None:
        """Give every idle worker a chunk, and borrow more while there are chunks."""
        for worker in list(self._workers.values()):
            if worker.state is State.IDLE and self._queue:
                self._assign(worker)
            elif worker.state is State.IDLE:
                self._pool.give(self._workers.pop(worker.pipe))
        spare = sum(worker.state is State.STARTING for worker in self._workers.values())
        while len(self._queue) > spare * self._chunk_size():
            # With no worker of our own we wait for somebody else's, who gets it back within its items' deadlines.
            hired = self._pool.take(None if self._workers else time.monotonic() + 1.0)
            if hired is None:
                return
            self._workers[hired.pipe] = hired
            if hired.state is State.IDLE:
                self._assign(hired)
            else:
                spare += 1

    def _chunk_size(self) -> int:
        share = math.ceil(len(self._queue) / (2 * self._pool.config.workers))
        return max(1, min(share, MAX_CHUNK))

    def _assign(self, worker: Worker) -> None:
        chunk = [self._queue.popleft() for _ in range(self._chunk_size())]
        try:
            worker.send(self._digest, self._task_bytes, chunk, [self._jobs[place] for place in chunk])
        except OSError:
            self._queue.extendleft(reversed(chunk))  # it died while idle; no item of ours is to blame
            worker.chunk = []
            self._drop(worker)

    def _limit_s(self, worker: Worker) -> float:
        config = self._pool.config
        return config.timeout_s if worker.state is State.RUNNING else config.start_s

    def _patience(self) -> float:
        """Seconds until the next deadline."""
        now = time.monotonic()
        return max(0.0, min((w.since + self._limit_s(w) - now for w in self._workers.values()), default=0.0))

    def _read(self, worker: Worker) -> None:
        """Take all that has arrived from a worker."""
        try:
            while worker.pipe in self._workers and worker.pipe.poll():
                self._answer(worker, worker.pipe.recv_bytes())
        except (EOFError, OSError):
            self._died(worker)

    def _answer(self, worker: Worker, message: bytes) -> None:
        if worker.state is State.STARTING and message == READY:
            worker.enter(State.IDLE)
        elif worker.state is State.LOADING and message == LOADED:
            worker.enter(State.RUNNING)
        elif worker.state is State.LOADING and message.startswith(BROKEN):
            reason = message[len(BROKEN) :].decode()
            raise EnvError(f"a verifier worker cannot load the task: {reason}")
        else:
            verdict, value, detail = pickle.loads(message)
            self._outcomes[worker.chunk.pop(0)] = Outcome(Verdict(verdict), value, detail)
            worker.enter(State.RUNNING if worker.chunk else State.IDLE)

    def _died(self, worker: Worker) -> None:
        state, chunk = worker.state, worker.chunk
        worker.chunk = []
        ending = self._drop(worker, grace_s=1.0)
        if state in (State.STARTING, State.LOADING):
            raise EnvError(
                f"a verifier worker ended while {state.value} ({ending}). If your script starts training at its top level, "
                "put that under `if __name__ == '__main__':`; if it ran out of memory, raise memory_mb"
            )
        if chunk:
            self._outcomes[chunk[0]] = Outcome(
                Verdict.FAILED,
                math.nan,
                f"the verifier's process died: {ending} (memory_mb={self._pool.config.memory_mb})",
            )
            self._queue.extendleft(reversed(chunk[1:]))

    def _check(self, worker: Worker) -> None:
        """Hold a worker to its deadline."""
        late_s = time.monotonic() - worker.since
        if worker.state is State.IDLE or late_s < self._limit_s(worker):
            return
        if worker.pipe.poll():
            self._read(worker)  # we were the late ones
            return
        state, chunk = worker.state, worker.chunk
        worker.chunk = []
        self._drop(worker)
        if state is not State.RUNNING:
            raise DeadlineError(
                f"a verifier worker spent start_s={self._pool.config.start_s:g} s {state.value}; raise start_s"
            )
        detail = f"killed at timeout_s={self._pool.config.timeout_s:g}"
        self._outcomes[chunk[0]] = Outcome(Verdict.TIMED_OUT, math.nan, detail)
        self._queue.extendleft(reversed(chunk[1:]))

    def _drop(self, worker: Worker, grace_s: float = 0.0) -> str:
        del self._workers[worker.pipe]
        ending = worker.kill(grace_s=grace_s)
        self._pool.lost()
        return ending


def _score(outcome: Outcome) -> Score:
    """An outcome as a score; a reward that is no finite number is the verifier's failure."""
    if outcome.verdict is not Verdict.SCORED:
        return Score(value=math.nan, verdict=outcome.verdict, detail=outcome.detail)
    if isinstance(outcome.value, float | int) and math.isfinite(outcome.value):
        return Score.of(outcome.value, outcome.detail)
    return Score.failed(f"the verifier returned {outcome.value!r:.200}; expected a Score with a finite value")


def _run_here(task: Any, job: Job, timeout_s: float) -> Outcome:
    """One job in this process and thread, under an alarm where there can be one."""
    started = time.monotonic()
    outcome = None
    if os.name == "posix" and threading.current_thread() is threading.main_thread():
        before = signal.signal(signal.SIGALRM, _too_late)
        try:
            try:
                signal.setitimer(signal.ITIMER_REAL, timeout_s)
                outcome = run_job(task, job)
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
        except _TooLateError:
            outcome = None
        finally:
            signal.signal(signal.SIGALRM, before)
    else:
        outcome = run_job(task, job)
    if outcome is None or time.monotonic() - started >= timeout_s:
        return Outcome(Verdict.TIMED_OUT, math.nan, f"took more than timeout_s={timeout_s:g}")
    return outcome


def _too_late(number: int, frame: FrameType | None) -> None:
    raise _TooLateError
