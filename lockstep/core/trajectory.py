"""What reinforcement learning of language models speaks: a problem, an episode on it, and the verdict on that episode.

One `Problem` yields a group of `Trajectory`s; a single-turn answer is an episode of one turn. Tokens are append-only: what
the model saw when it sampled token t is exactly `tokens[:t]`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from lockstep.core.errors import InputError
from lockstep.core.request import WeightsVersion


class Verdict(Enum):
    """How a score came about. Only SCORED carries a reward that may be learned from."""

    SCORED = "scored"
    FAILED = "failed"
    """The verifier raised; `Score.detail` has the exception."""
    TIMED_OUT = "timed_out"
    """The verifier passed its deadline and was killed."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """What a verifier said. Finite where it is SCORED; NaN elsewhere, so that no mean can take a failure for a 0.

    Raises:
        InputError: a reward that is no finite number.

    >>> Score.of(1.0)
    Score(value=1.0, verdict=<Verdict.SCORED: 'scored'>, detail='')
    >>> Score.failed("ValueError: no answer")
    Score(value=nan, verdict=<Verdict.FAILED: 'failed'>, detail='ValueError: no answer')
    """

    value: float
    verdict: Verdict = Verdict.SCORED
    detail: str = ""
    """For a person: what was expected, the exception, the deadline."""

    def __post_init__(self) -> None:
        if self.is_scored and not math.isfinite(self.value):
            raise InputError(f"a reward of {self.value}; expected a finite number", field="value")

    @staticmethod
    def of(value: float, detail: str = "") -> Score:
        """A reward."""
        return Score(value=float(value), detail=detail)

    @staticmethod
    def failed(detail: str) -> Score:
        """The verifier could not say; `detail` has the exception."""
        return Score(value=math.nan, verdict=Verdict.FAILED, detail=detail)

    @staticmethod
    def timed_out(detail: str) -> Score:
        """The verifier passed its deadline."""
        return Score(value=math.nan, verdict=Verdict.TIMED_OUT, detail=detail)

    @property
    def is_scored(self) -> bool:
        return self.verdict is Verdict.SCORED


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One problem of a task: a pure function of (task configuration, index), so it need not be stored to be met again.

    Exactly one of `prompt` and `messages` is given.
    """

    index: int
    prompt: str | None = None
    """Plain text, for a model without a chat template."""
    messages: tuple[Mapping[str, Any], ...] | None = None
    """OpenAI's form, rendered by the model's chat template."""
    tools: tuple[Mapping[str, Any], ...] = ()
    """Functions offered to the model, in OpenAI's form; the chat template writes them."""
    answer: str = ""
    """A reference answer where there is one; also the target of supervised training."""
    data: Mapping[str, Any] = field(default_factory=dict)
    """Plain values that the verifier wants beside the text."""

    def __post_init__(self) -> None:
        if (self.prompt is None) == (self.messages is None):
            raise InputError(f"problem {self.index} needs exactly one of prompt and messages", field="prompt")


@dataclass(kw_only=True)
class Trajectory:
    """One episode. Lists run parallel to `tokens`; at tokens that the model did not sample the numbers are 0 and the
    version None."""

    problem: int
    """`Problem.index`: equal for the whole group."""
    index: int
    """Which of the group's samples."""
    tokens: list[int]
    is_sampled: list[bool]
    """True where the model chose the token: the loss is over these."""
    logprobs: list[float]
    """Of the raw model."""
    sampling_logprobs: list[float]
    """Of the distribution drawn from, after temperature and truncation."""
    versions: list[WeightsVersion | None]
    text: str = ""
    """What the model wrote; of an episode of several turns, the last."""
    num_turns: int = 1
    is_truncated: bool = False
    """Cut off by a limit of tokens or turns rather than ended by the model or the task."""
    score: Score | None = None

    @property
    def num_sampled(self) -> int:
        return sum(self.is_sampled)

    @property
    def num_prompt(self) -> int:
        """Tokens before the first sampled one."""
        return self.is_sampled.index(True) if True in self.is_sampled else len(self.tokens)
