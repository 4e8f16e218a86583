"""Which of a run's threads sample and which learn, where both do so at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from lockstep import kernels


@dataclass(frozen=True, kw_only=True)
class ThreadShare:
    """Threads of kernels. Each process has one at least, so that more processes than threads share processors."""

    all: int
    """Of the run."""
    learner: int
    """Of the learner while samples are drawn beside it."""
    worker: int
    """Of each rollout worker."""

    @staticmethod
    def of(threads: int, workers: int, staleness: int) -> ThreadShare:
        """With staleness 0 sampling and learning take turns, and each has all threads. Above 0 they run at once: a half of the
        threads samples, in equal parts, and the learner has the rest; without workers one thread samples, the sampler's own.

        Args:
            threads: of the run (0: one a processor).
            workers: rollout workers (0: the learner's process samples).

        >>> ThreadShare.of(8, 3, 0).worker, ThreadShare.of(8, 3, 1)
        (2, ThreadShare(all=8, learner=5, worker=1))
        """
        every = threads or kernels.num_processors()
        if not staleness:
            return ThreadShare(all=every, learner=every, worker=max(every // max(workers, 1), 1))
        worker = max(every // 2 // max(workers, 1), 1) if workers else 1
        return ThreadShare(all=every, learner=max(every - worker * max(workers, 1), 1), worker=worker)

    @contextmanager
    def beside(self) -> Iterator[None]:
        """Within it the learner keeps to its share."""
        before = kernels.num_threads()
        kernels.set_num_threads(self.learner)
        try:
            yield
        finally:
            kernels.set_num_threads(before)
