"""The groups of each batch, sampled when the batch is wanted or ahead of it.

Batch b is groups b * P .. b * P + P - 1 and trains version b into version b + 1. A group may begin once version
b - staleness is published, so none of its tokens is ever older than `staleness` versions when it is learned from: the
bound holds by pacing, and nothing is discarded. With staleness 0 that is the synchronous loop.

    learner thread:  take(b) --waits for groups--> ... learn ... --publish(b + 1), holding the weights-->
    sampler thread:  start groups the bound allows; one engine step at a time, holding the weights; waits when the bound
                     allows nothing more; ends with `close`, or with an error that `take` raises

Both run kernels at once; `weights` excludes an engine step from the moment in which weights change, nothing else. A sample
in flight goes on under new weights where it is (its earlier keys stay), and each token names its version.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

from lockstep.core.errors import ConfigError, DeadlineError
from lockstep.rl.lm.rollout import Group, Rollouts, RolloutStats

WAKE_S = 0.5
"""How long the sampler sleeps at most when it has nothing to do."""


class Collector:
    """Use as a context manager: leaving it ends the sampler's thread.

    Args:
        rollouts: nobody else may move it while the thread runs.
        groups: P.
        staleness: versions a token may be behind when it is learned from.
        version: already published.
        timeout_s: how long the sampler may be silent, between two steps of its engine or in one, before `take` gives up; and
            deadline of `close`.
        threaded: run the sampler in its own thread even where the bound is 0; the result is the same.
    """

    def __init__(
        self,
        rollouts: Rollouts,
        groups: int,
        staleness: int,
        version: int,
        *,
        timeout_s: float = 600.0,
        threaded: bool | None = None,
    ) -> None:
        if staleness < 0:
            raise ConfigError(f"staleness={staleness}; expected 0 (synchronous) or more")
        self.weights = threading.Lock()
        self._rollouts, self._groups, self._staleness, self._timeout_s = rollouts, groups, staleness, timeout_s
        self._version = version
        self._next = version * groups
        self._ready: dict[int, Group] = {}
        self._changed = threading.Condition()
        self._error: BaseException | None = None
        self._moved = -math.inf
        """When the sampler last ended a step."""
        self._closing = self._publishing = False
        self._thread: threading.Thread | None = None
        if staleness > 0 if threaded is None else threaded:
            self._thread = threading.Thread(target=self._sample, name="lockstep-sampler", daemon=True)
            self._thread.start()

    def take(self, batch: int) -> tuple[list[Group], RolloutStats]:
        """The groups of a batch, in order.

        Raises:
            DeadlineError: the sampler is silent. However long a batch takes, it is waited for while it moves.
        """
        numbers = range(batch * self._groups, (batch + 1) * self._groups)
        if self._thread is None:
            return self._rollouts.collect(numbers), self._rollouts.stats
        asked = time.monotonic()
        with self._changed:
            while self._error is None and any(number not in self._ready for number in numbers):
                self._changed.wait(min(WAKE_S, self._timeout_s))
                if time.monotonic() - max(self._moved, asked) > self._timeout_s:
                    missing = [number for number in numbers if number not in self._ready]
                    raise DeadlineError(
                        f"batch {batch}: {len(missing)} of {self._groups} groups did not end, and the sampler has been silent "
                        f"for {self._timeout_s:.0f} s; look at the verifier's deadline (verifier.timeout_s) and at what the "
                        "task does, then resume the run"
                    )
            if self._error is not None:
                raise self._error
            groups = [self._ready.pop(number) for number in numbers]
            stats, self._rollouts.stats = self._rollouts.stats, RolloutStats()
            return groups, stats

    def published(self, version: int, changes: Sequence[Callable[[], object]]) -> None:
        """Makes the changes of weights while no step of the engine reads them, then lets the sampler go on."""
        with self._changed:
            self._publishing = True  # a lock alone goes to whoever asks first, and the sampler asks all the time
        try:
            with self.weights:
                for change in changes:
                    change()
        finally:
            with self._changed:
                self._publishing = False
                self._changed.notify_all()
        with self._changed:
            self._version = version
            self._changed.notify_all()

    def close(self) -> None:
        """Ends the thread; samples in flight are forgotten and begin anew in a resumed run."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(self._timeout_s)
            if self._thread.is_alive():
                raise DeadlineError(f"the sampler did not end in {self._timeout_s:.0f} s; a step of the engine hangs")
            self._thread = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _sample(self) -> None:
        flying: list[int] = []
        try:
            while True:
                with self._changed:
                    while not self._closing and (self._publishing or not (flying or self._may_start())):
                        self._changed.wait(WAKE_S)
                    if self._closing:
                        return
                    while self._may_start() and len(flying) < 2 * self._groups:
                        self._rollouts.start(self._next)
                        flying.append(self._next)
                        self._next += 1
                with self.weights:
                    began = time.perf_counter()
                    self._rollouts.advance()
                    seconds = time.perf_counter() - began
                with self._changed:
                    self._moved = time.monotonic()
                    self._rollouts.stats.seconds += seconds
                    for number in flying[:]:
                        group = self._rollouts.pop(number)
                        if group is not None:
                            self._ready[number] = group
                            flying.remove(number)
                            self._changed.notify_all()
        except BaseException as error:  # handed to the learner, which raises it
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _may_start(self) -> bool:
        return self._next // self._groups <= self._version + self._staleness
