"""Several tasks as one, and a curriculum that raises the level of each skill as the model masters it."""

from __future__ import annotations

import dataclasses
import random
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

from lockstep.core.errors import ConfigError
from lockstep.core.trajectory import Problem, Score
from lockstep.envs.lm.task import LevelledTask, Task, check_index, level_index, split_index


@final
class MixtureTask(LevelledTask):
    """A weighted mixture: chance decides which part a position belongs to, the same in every process.

    A part without levels has one; one with an end starts over at it. Parts of equal name count as one skill.

    Args:
        parts: (task, weight) pairs.
        seed: of the mixing.

    Raises:
        ConfigError: no parts, or a weight that is not above 0.
    """

    def __init__(self, parts: Sequence[tuple[Task, float]], *, seed: int = 0) -> None:
        if not parts or not all(weight > 0 for _, weight in parts):
            raise ConfigError(
                f"a mixture of {[(task.name, weight) for task, weight in parts]}; weights must be above 0"
            )
        self._tasks = [task for task, _ in parts]
        self._weights = [weight for _, weight in parts]
        self._seed = seed

    @property
    def name(self) -> str:
        return "+".join(task.name for task in self._tasks)

    @property
    def num_problems(self) -> int | None:
        return None

    def skill(self, position: int) -> str:
        task = self._tasks[self._part(position)]
        return task.skill(position) if isinstance(task, LevelledTask) else task.name

    def num_levels(self, skill: str) -> int:
        return max(
            (task.num_levels(skill) for task in self._tasks if isinstance(task, LevelledTask) and task.name == skill),
            default=1,
        )

    def problem(self, index: int) -> Problem:
        check_index(index, self)
        level, position = split_index(index)
        part = self._part(position)
        task = self._tasks[part]
        if isinstance(task, LevelledTask):
            inner = level_index(min(level, task.num_levels(task.skill(position)) - 1), position)
        else:
            inner = position if task.num_problems is None else position % task.num_problems
        problem = task.problem(inner)
        return dataclasses.replace(problem, index=index, data={"part": part, "index": inner, "data": problem.data})

    def score(self, problem: Problem, text: str) -> Score:
        data = problem.data
        inner = dataclasses.replace(problem, index=data["index"], data=data["data"])
        return self._tasks[data["part"]].score(inner, text)

    def _part(self, position: int) -> int:
        chance = random.Random(f"{self._seed}/{position}")
        return chance.choices(range(len(self._tasks)), self._weights)[0]


@dataclass(frozen=True, kw_only=True)
class CurriculumConfig:
    """When to go up, and when down again."""

    window: int = 64
    """Problems that the mean score is taken over; a new level begins a new window."""
    threshold: float = 0.7
    """Mean score of a full window from which on the skill goes up a level."""
    lower: float = 0.0
    """Mean score of a full window below which it goes down a level (0: never)."""
    first: int = 0
    """Level that it begins at, and never falls below."""
    highest: int | None = None
    """Level that it does not go beyond (None: the task's last)."""

    def __post_init__(self) -> None:
        if self.window < 1 or not 0 < self.threshold <= 1 or not 0 <= self.lower < self.threshold:
            raise ConfigError(
                f"window={self.window}, threshold={self.threshold}, lower={self.lower}; expected a window of 1 or more and "
                "0 <= lower < threshold <= 1"
            )
        if self.first < 0 or (self.highest is not None and self.highest < self.first):
            raise ConfigError(f"first={self.first}, highest={self.highest}; expected 0 <= first <= highest")


@dataclass(frozen=True)
class LevelChange:
    """A skill went to another level."""

    skill: str
    before: int
    after: int
    score: float
    """Mean of the window that decided."""


@final
class Curriculum:
    """The level of each skill of a task. Its state is plain data, for the checkpoint; the task stays a pure function.

        index = curriculum.index(position)            # which problem to pose at this position
        curriculum.observe(index, mean_score)         # what came of it

    Raises:
        ConfigError: the first level is beyond the task's last.
    """

    def __init__(self, task: LevelledTask, config: CurriculumConfig | None = None) -> None:
        self.config = config or CurriculumConfig()
        self._task = task
        self._levels: dict[str, int] = {}
        self._windows: dict[str, deque[float]] = {}

    @property
    def levels(self) -> dict[str, int]:
        """Level by skill, of the skills met so far."""
        return dict(self._levels)

    def index(self, position: int) -> int:
        """The index of the problem at a position, at the present level of its skill."""
        skill = self._task.skill(position)
        return level_index(self._level(skill), position)

    def observe(self, index: int, score: float) -> LevelChange | None:
        """Note a problem's mean score; what its skill's level became, if it changed. Problems of another level than the
        present one say nothing."""
        level, position = split_index(index)
        skill = self._task.skill(position)
        if level != self._level(skill):
            return None
        window = self._windows.setdefault(skill, deque(maxlen=self.config.window))
        window.append(score)
        if len(window) < self.config.window:
            return None
        mean = sum(window) / len(window)
        last = self._task.num_levels(skill) - 1
        highest = last if self.config.highest is None else min(self.config.highest, last)
        if mean >= self.config.threshold:
            after = min(level + 1, highest)
        else:
            after = max(level - (mean < self.config.lower), self.config.first)
        if after == level:
            return None
        self._levels[skill] = after
        window.clear()
        return LevelChange(skill, level, after, mean)

    def state_dict(self) -> dict[str, Any]:
        """Levels and windows as plain data."""
        return {
            "levels": dict(self._levels),
            "windows": {skill: list(window) for skill, window in self._windows.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`."""
        self._levels = {str(skill): int(level) for skill, level in state["levels"].items()}
        self._windows = {
            str(skill): deque(window, maxlen=self.config.window) for skill, window in state["windows"].items()
        }

    def _level(self, skill: str) -> int:
        if skill not in self._levels:
            last = self._task.num_levels(skill) - 1
            if self.config.first > last:
                raise ConfigError(f"first={self.config.first}: the levels of {skill} are 0 to {last}")
            self._levels[skill] = self.config.first
        return self._levels[skill]
