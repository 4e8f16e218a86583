"""Requests whose samples are chosen among more sequences than they ask for: best-of here, beams in `beams`.

Such a request's samples stay empty until all its sequences have ended; then they get what the best of them wrote, at once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from lockstep.core.request import FinishReason, Request, Sample
from lockstep.engine.emission import Output

if TYPE_CHECKING:
    from lockstep.engine.queue import Sequence


class Ranking(ABC):
    """What comes of a request's sequences. `results` are the samples that the client reads."""

    def __init__(self, request: Request, seed: int) -> None:
        self.results = [
            Sample(request_id=request.id, index=index, prompt=request.prompt, seed=seed)
            for index in range(request.params.n)
        ]

    @abstractmethod
    def conclude(self, sequences: list[Sequence]) -> list[Output]:
        """Fills the results once all sequences have ended."""

    def abort(self) -> list[Output]:
        """The results of a request that ends before its time: nothing."""
        for result in self.results:
            result.finish_reason = FinishReason.ABORT
        return [whole(result) for result in self.results]


class BestOf(Ranking):
    """The n sequences with the highest mean log-probability of a token under the raw model, the best first; of equals the
    one drawn first. A sequence that failed comes last."""

    def conclude(self, sequences: list[Sequence]) -> list[Output]:
        ranked = sorted(sequences, key=lambda sequence: (-mean_logprob(sequence.sample), sequence.sample.index))
        for result, sequence in zip(self.results, ranked, strict=False):
            adopt(result, sequence.sample)
        return [whole(result) for result in self.results]


def mean_logprob(sample: Sample) -> float:
    """By which best-of ranks.

    >>> mean_logprob(Sample(request_id="a", index=0, prompt=(1,), seed=0, logprobs=[-1.0, -2.0]))
    -1.5
    """
    if sample.finish_reason is FinishReason.ERROR or not sample.logprobs:
        return -float("inf")
    return sum(sample.logprobs) / len(sample.logprobs)


def adopt(result: Sample, source: Sample) -> None:
    """The result says what the source says."""
    for name, value in vars(source).items():
        if name not in ("request_id", "index"):
            setattr(result, name, value)


def whole(result: Sample) -> Output:
    """All of a result in one output."""
    return Output(result, 0, len(result.tokens), result.text, True)
