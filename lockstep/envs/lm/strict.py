"""Right or wrong: a task whose partial credit is taken away."""

from __future__ import annotations

from typing import final

from lockstep.core.trajectory import Problem, Score
from lockstep.envs.lm.task import Task


@final
class StrictTask(Task):
    """Scores 1 where the task gives full marks, else 0.

    Several verifiers give some credit to any answer of the right form or length, and a policy finds that sooner than
    arithmetic.
    """

    def __init__(self, task: Task) -> None:
        self._task = task

    @property
    def inner(self) -> Task:
        """The task with its partial credit."""
        return self._task

    @property
    def name(self) -> str:
        return self._task.name

    @property
    def num_problems(self) -> int | None:
        return self._task.num_problems

    def problem(self, index: int) -> Problem:
        return self._task.problem(index)

    def score(self, problem: Problem, text: str) -> Score:
        score = self._task.score(problem, text)
        return Score.of(float(score.value >= 1.0), score.detail) if score.is_scored else score
