"""Tasks for the doctor to look at; a module of few imports, since verifier processes load it."""

from __future__ import annotations

import random

from lockstep.core.trajectory import Problem, Score
from lockstep.envs.lm.task import Task


class Subject(Task):
    """A task with one chosen fault."""

    def __init__(self, fault: str = "") -> None:
        self.fault = fault

    @property
    def name(self) -> str:
        return f"subject-{self.fault}"

    @property
    def num_problems(self) -> int | None:
        return 3

    def problem(self, index: int) -> Problem:
        salt = random.random() if self.fault == "same again" else 0
        return Problem(index=index, prompt=f"{index} {salt}", answer="" if self.fault == "none" else f"a{index}")

    def score(self, problem: Problem, text: str) -> Score:
        if self.fault == "raises" and not text.startswith("a"):
            raise ValueError("cannot read")
        if self.fault == "generous":
            return Score.of(1.0)
        return Score.of(float(text == problem.answer and self.fault != "reference"))


healthy = Subject()
nothing = 3


def make() -> Subject:
    """A task by a function."""
    return Subject("reference")
