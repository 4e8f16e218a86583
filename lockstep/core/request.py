"""What goes into an engine and what comes out. One `Request` yields `params.n` samples."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from lockstep.core.sampling import SamplingParams


class FinishReason(Enum):
    """Why a sample ended."""

    STOP = "stop"
    """An end-of-sequence token, a stop token or a stop string; `Sample.stop` says which."""
    LENGTH = "length"
    ABORT = "abort"
    """The client left, or somebody aborted it."""
    ERROR = "error"
    """It could not go on; `Sample.error` says why. Other samples are not touched."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt and how to go on from it.

    >>> Request(id="a", prompt=(1, 2, 3), params=SamplingParams(max_tokens=4)).prompt
    (1, 2, 3)
    """

    id: str
    prompt: tuple[int, ...]
    params: SamplingParams
    priority: int = 0
    """Lower runs first where the engine schedules by priority."""
    adapter: str = ""
    """Name of a LoRA adapter; empty: the base model."""
    cache_salt: str = ""
    """Prefixes are shared only among requests of equal salt."""


@dataclass(frozen=True)
class WeightsVersion:
    """Which weights produced a token: a counter, and a digest of what was effectively served, adapters included."""

    version: int
    digest: str


@dataclass(frozen=True)
class Alternative:
    """A token and its log-probability under the raw model."""

    token: int
    logprob: float


@dataclass(kw_only=True)
class Sample:
    """One completion, growing while it runs. Lists run parallel to `tokens`."""

    request_id: str
    index: int
    """Which of the request's n samples."""
    prompt: tuple[int, ...]
    seed: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    """Of the raw model: log softmax of its logits."""
    sampling_logprobs: list[float] = field(default_factory=list)
    """Of the distribution the token was drawn from, after penalties, bans, temperature and truncation."""
    alternatives: list[tuple[Alternative, ...]] = field(default_factory=list)
    prompt_logprobs: list[float | None] = field(default_factory=list)
    """None for the first token, which nothing precedes. Empty unless asked for."""
    prompt_alternatives: list[tuple[Alternative, ...]] = field(default_factory=list)
    versions: list[WeightsVersion] = field(default_factory=list)
    text: str = ""
    finish_reason: FinishReason | None = None
    stop: str | int | None = None
    """The stop string or token id that ended it."""
    error: str = ""
    error_field: str = ""
    """The part of the request that is at fault; empty where the request is not."""
    num_cached: int = 0
    """Prompt tokens whose keys came from the prefix cache."""

    @property
    def is_finished(self) -> bool:
        return self.finish_reason is not None
