"""The level that a batch's problems are posed at: raised and lowered by how often the answers were right.

Groups of batch b are of the levels that followed from batches 0 .. b - 1 - staleness: the last of them is certain when the
first group may begin, so a problem is a function of what was answered and not of who was faster, and a resumed run poses the
same ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lockstep.core.trajectory import Problem
from lockstep.envs.lm.make import TaskConfig, levelled
from lockstep.envs.lm.mixture import Curriculum, LevelChange
from lockstep.envs.lm.task import level_index, split_index
from lockstep.rl.lm.problems import AnyTask, ProblemSource, posed
from lockstep.rl.lm.rollout import Group


class Course:
    """Problems of groups. A task without `levels` has those of its source.

    Args:
        task: to train on.
        config: it was made from.
        source: which position of the task a group works on.
        groups: of a batch.
        staleness: of the run.

    Raises:
        ConfigError: a first level that the task has not.
    """

    def __init__(self, task: AnyTask, config: TaskConfig, source: ProblemSource, groups: int, staleness: int) -> None:
        self._task, self._source, self._groups, self._staleness = task, source, groups, staleness
        self._first = config.curriculum.first
        self._levels = levelled(task) if config.levels else None
        self._curriculum = Curriculum(self._levels, config.curriculum) if self._levels is not None else None
        if self._curriculum is not None:
            self._curriculum.index(source.index(0))
        self._after: dict[int, dict[str, int]] = {0: {}}
        """Levels by skill after so many batches, for the batches that may still be begun."""

    @property
    def has_levels(self) -> bool:
        """Whether there is anything to keep in a checkpoint."""
        return self._curriculum is not None

    def problem(self, group: int) -> Problem:
        """The problem of a group; asked for when it may begin, not before."""
        if self._levels is None:
            return self._source.training(group)
        position = self._source.index(group)
        levels = self._after[max(group // self._groups - self._staleness, 0)]
        level = levels.get(self._levels.skill(position), self._first)
        return posed(self._task, level_index(level, position))

    def observe(self, batch: int, groups: Sequence[Group]) -> list[LevelChange]:
        """Note how many of each group's judged answers were right (full marks); the levels that change by it."""
        if self._curriculum is None:
            return []
        changes = []
        for group in groups:
            right = [one.score.value >= 1.0 for one in group.trajectories if one.score and one.score.is_scored]
            if right:
                changes.append(self._curriculum.observe(group.problem.index, sum(right) / len(right)))
        self._after[batch + 1] = self._curriculum.levels
        for old in [known for known in self._after if known < batch + 1 - self._staleness]:
            del self._after[old]
        return [change for change in changes if change is not None]

    def metrics(self, groups: Sequence[Group]) -> dict[str, float]:
        """The mean level of these groups' problems, where there are levels."""
        if self._curriculum is None:
            return {}
        return {"level": math.fsum(split_index(group.problem.index)[0] for group in groups) / len(groups)}

    def state_dict(self) -> dict[str, Any]:
        """See `Stateful`."""
        assert self._curriculum is not None
        return {"curriculum": self._curriculum.state_dict(), "after": {n: dict(it) for n, it in self._after.items()}}

    def load_state_dict(self, data: Mapping[str, Any]) -> None:
        """See `Stateful`."""
        assert self._curriculum is not None
        self._curriculum.load_state_dict(data["curriculum"])
        self._after = {int(num): dict(levels) for num, levels in data["after"].items()}


def told(change: LevelChange) -> tuple[str, str]:
    """A change as (kind, text) of an event."""
    verb = "raised" if change.after > change.before else "lowered"
    return f"level_{verb}", (
        f"{change.skill}: level {verb} from {change.before} to {change.after}, as {change.score:.0%} of answers were right"
    )
