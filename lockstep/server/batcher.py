"""Requests that wait are answered together.

    handler --submit--> queue --_flush--> Runner.run --> each request's future --> handler
                          ^                  |
                          '---- next batch --'

- A handler waits on its future. It is set by the batch it ran in, or by the deadline sweep.
- `_flush` is called by the event loop once after the handlers that are ready have queued (or after `max_wait_us`, or
  when a batch is full). It takes what is queued, in order, skipping a second request of a session already taken.
- A quick policy runs inside `_flush`: handing it to a thread costs more than it saves. A slow one runs in one worker
  thread; when it is done the loop calls `_finish`, which starts the next batch. There is never more than one batch.
- The sweep runs while requests wait; it fails those past their deadline, wherever they are.
- It ends with `close`: what is queued is refused, the thread is left to finish.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from concurrent.futures import Future as ThreadFuture
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from lockstep.server.metrics import Histogram
from lockstep.server.replies import Refusal
from lockstep.server.runner import Ask, Decision, Runner

INLINE_BELOW_S = 0.002
SWEEP_S = 0.05
BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)

log = logging.getLogger("lockstep.server")
Outcome = Decision | Exception


@dataclass(slots=True)
class Job:
    """A request in the queue, with the runner of the policy version it was checked against."""

    ask: Ask
    runner: Runner
    inline: bool
    deadline: float
    queued: float
    future: asyncio.Future[Decision]


@dataclass
class BatchStats:
    """Counts and nanoseconds since start, as Triton's statistics want them.

    >>> BatchStats().num_batches
    0
    """

    num_batches: int = 0
    num_rows: int = 0
    num_succeeded: int = 0
    num_failed: int = 0
    queue_ns: int = 0
    run_ns: int = 0
    success_ns: int = 0
    fail_ns: int = 0
    last_ms: int = 0
    batch_rows: Histogram = field(default_factory=lambda: Histogram(BATCH_BUCKETS))


class Batcher:
    """The queue of one policy. All methods are called on the event loop.

    Args:
        max_batch: most rows of a batch; a request with more runs alone.
        max_wait_s: how long an incomplete batch waits for more.
        max_queue: most requests that wait.
    """

    def __init__(self, *, max_batch: int, max_wait_s: float, max_queue: int) -> None:
        self.max_batch = max_batch
        self.max_wait_s = max_wait_s
        self.max_queue = max_queue
        self.stats = BatchStats()
        self._queue: deque[Job] = deque()
        self._queued_rows = 0
        self._running: list[Job] = []
        self._timer: asyncio.Handle | None = None
        self._sweeper: asyncio.TimerHandle | None = None
        self._thread: ThreadPoolExecutor | None = None
        self._closed = False

    def __len__(self) -> int:
        return len(self._queue)

    def check_room(self) -> None:
        """Raises Refusal if another request cannot be queued."""
        if self._closed:
            raise Refusal(503, "the server is shutting down", retry_after_s=1)
        if len(self._queue) >= self.max_queue:
            raise Refusal(429, f"{self.max_queue} requests are waiting; try again later", retry_after_s=1)

    def submit(self, ask: Ask, runner: Runner, *, inline: bool, timeout_s: float) -> asyncio.Future[Decision]:
        """Queue a request; its future yields the decision, InputError or Refusal.

        Raises:
            Refusal: the queue is full or closed.
        """
        self.check_room()
        loop = asyncio.get_running_loop()
        now = time.perf_counter()
        job = Job(ask, runner, inline, now + timeout_s, now, loop.create_future())
        self._queue.append(job)
        self._queued_rows += ask.num_rows
        if not self._running:
            self._arm(loop)
        if self._sweeper is None:
            self._sweeper = loop.call_later(SWEEP_S, self._sweep)
        return job.future

    def close(self) -> None:
        """Refuse what waits and whatever comes."""
        self._closed = True
        for job in self._queue:
            _settle(job, Refusal(503, "the server is shutting down", retry_after_s=1))
        self._queue.clear()
        for handle in (self._timer, self._sweeper):
            if handle is not None:
                handle.cancel()
        if self._thread is not None:
            self._thread.shutdown(wait=False)

    def _arm(self, loop: asyncio.AbstractEventLoop) -> None:
        """Have `_flush` called; at once if a batch is full, else after the wait."""
        full = self._queued_rows >= self.max_batch or self.max_wait_s <= 0
        if self._timer is not None:
            if not full or not isinstance(self._timer, asyncio.TimerHandle):
                return
            self._timer.cancel()
        self._timer = loop.call_soon(self._flush) if full else loop.call_later(self.max_wait_s, self._flush)

    def _flush(self) -> None:
        self._timer = None
        if self._closed or self._running:
            return
        jobs = self._take()
        if not jobs:
            return
        loop = asyncio.get_running_loop()
        if all(job.inline for job in jobs):
            self._settle_batch(jobs, _run(jobs))
            if self._queue:
                self._arm(loop)
            return
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="policy")
        self._running = jobs
        done = self._thread.submit(_run, jobs)
        done.add_done_callback(lambda done: _call(loop, self._finish, done))

    def _finish(self, done: ThreadFuture[tuple[list[Outcome], float, float]]) -> None:
        jobs, self._running = self._running, []
        self._settle_batch(jobs, done.result())
        if self._queue and not self._closed:
            self._arm(asyncio.get_running_loop())

    def _take(self) -> list[Job]:
        """The next batch: jobs from the front, of one runner, within `max_batch` rows, each session once."""
        jobs: list[Job] = []
        skipped: list[Job] = []
        num_rows = 0
        sessions: set[str] = set()
        queue = self._queue
        while queue:
            job = queue[0]
            ask = job.ask
            if job.future.done():
                self._queued_rows -= ask.num_rows
                queue.popleft()
                continue
            if jobs and (num_rows + ask.num_rows > self.max_batch or job.runner is not jobs[0].runner):
                break
            queue.popleft()
            if ask.session is not None:
                if ask.session.name in sessions:
                    skipped.append(job)
                    continue
                sessions.add(ask.session.name)
            num_rows += ask.num_rows
            jobs.append(job)
        queue.extendleft(reversed(skipped))
        self._queued_rows -= num_rows
        return jobs

    def _settle_batch(self, jobs: list[Job], run: tuple[list[Outcome], float, float]) -> None:
        outcomes, started, seconds = run
        stats = self.stats
        now = time.perf_counter()
        num_rows = 0
        for job, outcome in zip(jobs, outcomes, strict=True):
            num_rows += job.ask.num_rows
            stats.queue_ns += int((started - job.queued) * 1e9)
            if isinstance(outcome, Decision):
                stats.num_succeeded += 1
                stats.success_ns += int((now - job.queued) * 1e9)
            else:
                stats.num_failed += 1
                stats.fail_ns += int((now - job.queued) * 1e9)
            _settle(job, outcome)
        stats.num_batches += 1
        stats.num_rows += num_rows
        stats.run_ns += int(seconds * 1e9)
        stats.last_ms = int(time.time() * 1000)
        stats.batch_rows.add(num_rows)

    def _sweep(self) -> None:
        self._sweeper = None
        now = time.perf_counter()
        for job in [*self._queue, *self._running]:
            if job.deadline < now:
                _settle(
                    job,
                    Refusal(504, "the request's deadline passed before the policy answered; the server is overloaded"),
                )
        if (self._queue or self._running) and not self._closed:
            self._sweeper = asyncio.get_running_loop().call_later(SWEEP_S, self._sweep)


def _run(jobs: list[Job]) -> tuple[list[Outcome], float, float]:
    """(outcomes in order, when it began, seconds). An unexpected error fails the batch, not the server."""
    started = time.perf_counter()
    outcomes: list[Outcome]
    try:
        outcomes = list(jobs[0].runner.run([job.ask for job in jobs]))
    except Exception as error:  # a request must never take the server down
        log.exception("a batch of %d requests failed", len(jobs))
        outcomes = [Refusal(500, f"the policy failed: {type(error).__name__}")] * len(jobs)
    return outcomes, started, time.perf_counter() - started


def _settle(job: Job, outcome: Outcome) -> None:
    if job.future.done():
        return
    if isinstance(outcome, Decision):
        job.future.set_result(outcome)
    else:
        job.future.set_exception(outcome)


def _call(loop: asyncio.AbstractEventLoop, function: object, *args: object) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(function, *args)  # type: ignore[arg-type]
