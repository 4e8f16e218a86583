"""From drawn tokens to what the client reads: text pieces, stops, finish reasons."""

from __future__ import annotations

from dataclasses import dataclass

from lockstep.core.errors import InputError
from lockstep.core.request import Alternative, FinishReason, Sample, WeightsVersion
from lockstep.core.sampling import SamplingParams
from lockstep.engine.queue import Sequence
from lockstep.tokenize.detokenise import IncrementalDecoder, StopMatcher
from lockstep.tokenize.tokenizer import Tokenizer


@dataclass(slots=True)
class Output:
    """What a step added to a sample."""

    sample: Sample
    """The whole sample so far; it goes on growing."""
    first: int
    """The new tokens are sample.tokens[first:] at the time of the step."""
    num: int
    text: str
    """The new piece of text."""
    is_finished: bool


class TextStream:
    """The text of one sample: whole characters only, cut before a stop string."""

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams) -> None:
        self._decoder = IncrementalDecoder(tokenizer, continuing=True)
        self._matcher = StopMatcher(params.stop, include_stop=params.include_stop)
        self._has_stops = bool(params.stop)
        self._min_tokens = params.min_tokens
        self._num_pushed = 0

    def push(self, token: int) -> tuple[str, str | None]:
        """The text this token adds and the stop string it completes, if it does."""
        self._num_pushed += 1
        text = self._decoder.push(token)
        if not self._has_stops or self._num_pushed < self._min_tokens:
            return text, None
        result = self._matcher.push(text)
        return result.text, result.stop

    def flush(self) -> tuple[str, str | None]:
        """What was held back, at an end that is no stop string."""
        result = self._matcher.push(self._decoder.flush())
        return result.text + ("" if result.stop is not None else self._matcher.flush()), result.stop


class Emitter:
    """Appends tokens to samples and decides when one ends."""

    def __init__(self, eos_token_ids: tuple[int, ...]) -> None:
        self._eos = frozenset(eos_token_ids)

    def take(
        self,
        sequence: Sequence,
        token: int,
        logprobs: tuple[float, float],
        alternatives: tuple[Alternative, ...],
        version: WeightsVersion,
    ) -> str:
        """One drawn token; returns the text it adds. `sample.finish_reason` says whether it was the last.

        Args:
            logprobs: of the raw model, and of the distribution drawn from.
        """
        sample, params = sequence.sample, sequence.request.params
        sequence.tokens.append(token)
        sample.tokens.append(token)
        sample.logprobs.append(logprobs[0])
        sample.sampling_logprobs.append(logprobs[1])
        sample.versions.append(version)
        if params.num_logprobs:
            sample.alternatives.append(alternatives)
        if sequence.shaper is not None:
            sequence.shaper.observe(token)
        ends = (token in self._eos and not params.ignore_eos) or token in params.stop_token_ids
        ends = ends and len(sample.tokens) >= params.min_tokens
        text = ""
        if sequence.text is not None and (not ends or params.include_stop):
            text, sample.stop = sequence.text.push(token)
        if sample.stop is not None:
            sample.finish_reason = FinishReason.STOP
        elif ends:
            sample.stop, sample.finish_reason = token, FinishReason.STOP
            text += self._rest(sequence)
        sample.text += text
        return text if sample.is_finished else text + self.settle(sequence)

    def settle(self, sequence: Sequence) -> str:
        """Ends a sample that is complete or as long as it may be, once its grammar has said which; returns the text that
        was held back."""
        sample, shaper = sequence.sample, sequence.shaper
        complete = shaper.is_complete if shaper is not None and not sequence.request.params.ignore_eos else False
        if complete is None or not (complete or len(sequence.tokens) >= sequence.max_known):
            return ""
        sample.finish_reason = FinishReason.STOP if complete else FinishReason.LENGTH
        text = self._rest(sequence)
        sample.text += text
        return text

    def fail(self, sequence: Sequence, error: InputError) -> str:
        """Ends a sample that cannot go on; returns the text that was held back."""
        sample, text = sequence.sample, self._rest(sequence)
        sample.text += text
        sample.finish_reason, sample.error, sample.error_field = FinishReason.ERROR, str(error), error.field
        return text

    def abort(self, sequence: Sequence) -> Output:
        """Ends a sample that is not finished; what was held back of its text comes out."""
        sample = sequence.sample
        text = self._rest(sequence)
        sample.text += text
        sample.finish_reason = FinishReason.ABORT
        return Output(sample, len(sample.tokens), 0, text, True)

    def _rest(self, sequence: Sequence) -> str:
        return sequence.text.flush()[0] if sequence.text is not None else ""
