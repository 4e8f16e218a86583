"""The seam between tasks and training: single-turn tasks, episodes of several turns, and tasks with levels.

Everything is a pure function of (configuration, index, what the model wrote): a problem met again after a crash, in
another process or on another machine is the same problem, and an episode can be played again from its texts.
"""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lockstep.core.errors import ConfigError, InputError
from lockstep.core.trajectory import Problem, Score

LEVEL_STRIDE = 1 << 40


class Task(ABC):
    """A source of problems with a verifier. One answer is one episode.

    An instance travels to verifier processes by pickle, so it should hold a configuration and load the rest when asked.
    """

    @property
    @abstractmethod
    def name(self) -> str:
        """For tables and records."""

    @property
    @abstractmethod
    def num_problems(self) -> int | None:
        """Indices run from 0 to this; None where they never end."""

    @abstractmethod
    def problem(self, index: int) -> Problem:
        """The problem of an index: the same in any process.

        Raises:
            InputError: an index outside `num_problems`.
        """

    @abstractmethod
    def score(self, problem: Problem, text: str) -> Score:
        """Judge what the model wrote. Runs in verifier processes; pure. What it raises becomes Verdict.FAILED."""


class LevelledTask(Task):
    """A task whose problems come in levels of difficulty, each an endless stream of its own (`split_index`)."""

    @abstractmethod
    def skill(self, position: int) -> str:
        """What the problem at a position practises: a curriculum keeps one level for each skill."""

    @abstractmethod
    def num_levels(self, skill: str) -> int:
        """Levels of a skill, at least 1."""


@dataclass(frozen=True, kw_only=True)
class Turn:
    """What an episode answers to the model's text. At most one of `messages` and `text` is given."""

    messages: tuple[Mapping[str, Any], ...] = ()
    """Appended to the conversation after the assistant's message; never the assistant's own."""
    text: str = ""
    """Appended to a plain prompt after what the model wrote."""
    reward: float = 0.0
    """Of this turn; an episode's score is the sum."""
    is_done: bool = False
    """The episode has ended; the model is not asked again."""
    is_truncated: bool = False
    """Ended by a limit of the episode rather than by its own end."""

    def __post_init__(self) -> None:
        if self.messages and self.text:
            raise InputError("a turn has messages or text, not both", field="messages")


class Episode(ABC):
    """One episode in the making. Deterministic: the same texts give the same turns."""

    @abstractmethod
    def start(self) -> Problem:
        """What the model sees first. Called once, before `step`."""

    @abstractmethod
    def step(self, text: str) -> Turn:
        """Go on after what the model wrote; its end-of-turn token is not in the text. Not called after the end."""


class EpisodeTask(ABC):
    """A source of episodes of several turns."""

    @property
    @abstractmethod
    def name(self) -> str:
        """For tables and records."""

    @property
    @abstractmethod
    def num_problems(self) -> int | None:
        """Indices run from 0 to this; None where they never end."""

    @abstractmethod
    def episode(self, index: int) -> Episode:
        """A fresh episode: a pure function of (configuration, index)."""

    def problem(self, index: int) -> Problem:
        """What the model sees first."""
        return self.episode(index).start()

    def play(self, index: int, texts: Sequence[str]) -> Turn:
        """The last turn of an episode played from its beginning. Raises as `replay` does."""
        return self.replay(index, texts)[1]

    def replay(self, index: int, texts: Sequence[str]) -> tuple[Episode, Turn]:
        """An episode played from its beginning, and its last turn.

        Raises:
            InputError: no texts, or more of them after the episode's end.
        """
        if not texts:
            raise InputError(f"{self.name}: an episode goes on after a text of the model's; got none", field="texts")
        episode = self.episode(index)
        episode.start()
        for number, text in enumerate(texts):
            turn = episode.step(text)
            if number + 1 < len(texts) and turn.is_done:
                raise InputError(
                    f"{self.name}: episode {index} ended at turn {number + 1} of {len(texts)}", field="texts"
                )
        return episode, turn


def level_index(level: int, position: int) -> int:
    """The index of a position within a level; `split_index` takes it apart.

    >>> split_index(level_index(2, 7))
    (2, 7)
    """
    if not 0 <= position < LEVEL_STRIDE or level < 0:
        raise InputError(f"level={level}, position={position}; expected 0 <= position < 2^40 and a level from 0 on")
    return level * LEVEL_STRIDE + position


def split_index(index: int) -> tuple[int, int]:
    """(level, position) of an index."""
    return divmod(index, LEVEL_STRIDE)


def check_index(index: int, task: Task | EpisodeTask) -> None:
    """Raise InputError unless the index is one of the task's."""
    end = task.num_problems
    if index < 0 or (end is not None and index >= end):
        raise InputError(f"{task.name}: problem {index} of {end}; indices run from 0", field="index")


def is_held_out(text: str, share: float) -> bool:
    """Whether a problem is kept for evaluation: decided by its text alone, so that one that comes twice stays on one side.

    >>> [is_held_out(text, 0.5) for text in "abcd"]
    [False, True, True, False]
    """
    return zlib.crc32(text.encode()) / 2**32 < share


def check_share(value: float, name: str) -> None:
    """Raise ConfigError unless 0 <= value < 1."""
    if not 0 <= value < 1:
        raise ConfigError(f"{name}={value}; expected a share from 0 up to, but not including, 1")
