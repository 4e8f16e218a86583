"""Beam search over the paged cache. The beams of a request are sequences like any others; each says which tokens could
follow it best, and when all have spoken the request branches: every beam goes on from the keys of the beam it descends
from. Full pages are shared, a page that is not full is copied; a beam without pages is recomputed, as after a preemption.

    running --draws--> `offer` --> rests --(all have offered)--> `branch` --> runs on its own keys, or its parent's

While one of them waits for room the others give theirs up, so beams never block each other.

Which beams survive, which texts count and when the search ends are as in `transformers` (its `early_stopping` False and
True): the score of a text is the sum of its log-probabilities divided by (its number of tokens) ** length_penalty.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lockstep.core.errors import InputError
from lockstep.core.request import FinishReason, Request, Sample, WeightsVersion
from lockstep.engine.emission import Output, TextStream
from lockstep.engine.queue import Sequence, State
from lockstep.engine.ranking import Ranking, adopt, whole
from lockstep.engine.sampler import Candidate
from lockstep.engine.scheduler import Scheduler


@dataclass(frozen=True, slots=True)
class _Step:
    """One continuation of one beam."""

    score: float
    beam: int
    candidate: Candidate
    version: WeightsVersion


@dataclass(frozen=True, slots=True)
class _Text:
    """A text that has ended."""

    score: float
    sample: Sample


class Beams(Ranking):
    """The search of one request.

    Args:
        endings: tokens that end a text.
        new_text: makes the reader of a text's tokens; None: ids only.
    """

    def __init__(
        self,
        request: Request,
        seed: int,
        sequences: list[Sequence],
        endings: frozenset[int],
        new_text: Callable[[], TextStream] | None,
    ) -> None:
        super().__init__(request, seed)
        self._params = request.params
        self._num_prompt = len(request.prompt)
        self._max_tokens = sequences[0].max_known - self._num_prompt
        self._endings = endings
        self._new_text = new_text
        self._live = {sequence.sample.index: sequence for sequence in sequences}
        self._scores = dict.fromkeys(self._live, 0.0)
        self._offers: dict[int, tuple[list[Candidate], WeightsVersion]] = {}
        self._found: list[_Text] = []
        self._error: InputError | None = None
        # Before the first branching all beams are the same text: one computes it.
        for sequence in sequences[1:]:
            sequence.rests = True

    @property
    def num_candidates(self) -> int:
        """Continuations that are looked at, so that enough are left when the best ones end the text."""
        return self._params.beam_width * max(2, 1 + len(self._endings))

    @property
    def has_ended(self) -> bool:
        return not self._live

    def offer(self, sequence: Sequence, candidates: list[Candidate], version: WeightsVersion) -> None:
        """The best continuations of a beam, all of whose tokens are computed."""
        self._offers[sequence.sample.index] = candidates, version
        sequence.rests = True

    def fail(self, error: InputError) -> None:
        """A beam's logits or grammar cannot be used."""
        self._error = error

    def settle(self, scheduler: Scheduler) -> int:
        """Called after each step: branches when all beams have offered; else, where one of them waits, lets the others
        make room for it. Returns the number of tokens that beams got."""
        if self._error:
            self._end(scheduler, list(self._live))
            return 0
        speaking = [index for index in self._live if not self._live[index].rests]
        if not speaking and self._offers:
            return self._branch(scheduler)
        if any(self._live[index].state is State.WAITING for index in speaking):
            for sequence in list(self._live.values()):
                if sequence.rests and sequence.state is State.RUNNING:
                    scheduler.preempt(sequence)
        return 0

    def conclude(self, sequences: list[Sequence]) -> list[Output]:
        for number, result in enumerate(self.results):
            adopt(result, sequences[0].sample)
            result.tokens, result.logprobs, result.sampling_logprobs, result.versions = [], [], [], []
            if number < len(self._found) and not self._error:
                adopt(result, self._found[number].sample)
                result.text = self._read(result)
            else:
                result.finish_reason = FinishReason.ERROR
                error = self._error or InputError(f"the search found {len(self._found)} texts and no more")
                result.error, result.error_field = str(error), error.field
        return [whole(result) for result in self.results]

    def _branch(self, scheduler: Scheduler) -> int:
        steps = [
            _Step(self._scores[index] + candidate.sampling_logprob, index, candidate, version)
            for index, (candidates, version) in sorted(self._offers.items())
            for candidate in candidates
        ]
        self._offers.clear()
        steps.sort(key=lambda step: -step.score)
        parents = {index: self._live[index] for index in self._live}
        length = next(iter(parents.values())).num_generated + 1
        going = self._sort_out(steps[: self.num_candidates], length)
        if not going or self._is_settled(going[0], length):
            self._end(scheduler, list(self._live))
            return len(going)
        self._move(scheduler, parents, going)
        return len(going)

    def _sort_out(self, steps: list[_Step], length: int) -> list[_Step]:
        """Keeps the texts that end here, where they are among the best; returns the continuations that go on."""
        width, going = self._params.beam_width, []
        for rank, step in enumerate(steps):
            ends = step.candidate.token in self._endings and length >= self._params.min_tokens
            if not ends and length < self._max_tokens:
                going.append(step)
            elif rank < width:
                sample = _longer(self._live[step.beam].sample, step)
                sample.finish_reason = FinishReason.STOP if ends else FinishReason.LENGTH
                sample.stop = step.candidate.token if ends else None
                self._found.append(_Text(step.score / length**self._params.length_penalty, sample))
        self._found.sort(key=lambda text: -text.score)
        del self._found[width:]
        return going[:width]

    def _is_settled(self, best: _Step, length: int) -> bool:
        if len(self._found) < self._params.beam_width:
            return False
        hope = best.score / length**self._params.length_penalty
        return self._params.early_stopping or hope <= self._found[-1].score

    def _move(self, scheduler: Scheduler, parents: dict[int, Sequence], going: list[_Step]) -> None:
        """The first continuation of a beam stays with it; further ones go to beams that have none."""
        staying: dict[int, _Step] = {}
        moving = [step for step in going if staying.setdefault(step.beam, step) is not step]
        free = [index for index in self._live if index not in staying]
        for step, index in zip(moving, free, strict=False):
            parent, sequence = parents[step.beam], parents[index]
            if sequence.tokens != parent.tokens:
                sequence.tokens = list(parent.tokens)
                scheduler.branch(sequence, parent)
            if parent.shaper is not None:
                if sequence.shaper is not None and sequence.shaper.guide is not None:
                    sequence.shaper.guide.close()
                sequence.shaper = parent.shaper.copy()
            sample = sequence.sample
            adopt(sample, _longer(parent.sample, step))
            self._extend(sequence, step)
        for index, step in staying.items():
            adopt(parents[index].sample, _longer(parents[index].sample, step))
            self._extend(parents[index], step)
        self._end(scheduler, free[len(moving) :])

    def _extend(self, sequence: Sequence, step: _Step) -> None:
        sequence.tokens.append(step.candidate.token)
        if sequence.shaper is not None:
            sequence.shaper.observe(step.candidate.token)
        sequence.rests, sequence.started = False, True
        self._scores[sequence.sample.index] = step.score

    def _end(self, scheduler: Scheduler, indices: list[int]) -> None:
        for index in indices:
            sequence = self._live.pop(index)
            sequence.rests = False
            scheduler.finish(sequence)

    def _read(self, sample: Sample) -> str:
        if self._new_text is None:
            return ""
        stream = self._new_text()
        ends = sample.finish_reason is FinishReason.STOP and not self._params.include_stop
        tokens = sample.tokens[:-1] if ends else sample.tokens
        return "".join(stream.push(token)[0] for token in tokens) + stream.flush()[0]


def _longer(sample: Sample, step: _Step) -> Sample:
    """A sample that goes on with this step."""
    longer = Sample(request_id=sample.request_id, index=sample.index, prompt=sample.prompt, seed=sample.seed)
    adopt(longer, sample)
    longer.tokens = [*sample.tokens, step.candidate.token]
    longer.logprobs = [*sample.logprobs, step.candidate.logprob]
    longer.sampling_logprobs = [*sample.sampling_logprobs, step.candidate.sampling_logprob]
    longer.versions = [*sample.versions, step.version]
    return longer
