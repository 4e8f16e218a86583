"""A task that needs no package, and one whose verifier hangs. Light to import: each verifier process does so."""

from __future__ import annotations

import time

from lockstep.core.trajectory import Problem, Score
from lockstep.envs.lm.task import LevelledTask, Task, split_index


class Digits(Task):
    """Write a digit: the nearer to the one asked for, the better."""

    def __init__(self, split: str = "train", seed: int = 0) -> None:
        self._is_training = split == "train"
        self._first = 0 if self._is_training else 5

    @property
    def name(self) -> str:
        return "digits"

    @property
    def num_problems(self) -> int | None:
        return None

    def problem(self, index: int) -> Problem:
        digit = str(self._first + index % 5)
        return Problem(index=index, prompt=f"say {digit}:", answer=digit)

    def score(self, problem: Problem, text: str) -> Score:
        digits = [ord(letter) for letter in text]
        return Score.of(1.0 / (1.0 + min((abs(digit - ord(problem.answer)) for digit in digits), default=99)))


class AllDigits(Digits):
    """Asks for the same digits in training and afterwards: what a teacher knows can be learned of it."""

    def problem(self, index: int) -> Problem:
        return Problem(index=index, prompt=f"say {index % 10}:", answer=str(index % 10))


class Broken(Digits):
    """Whose verifier is never done with an answer, or only with evaluation's."""

    def __init__(self, split: str = "train", seed: int = 0, everywhere: bool = True) -> None:
        super().__init__(split, seed)
        self._raises = everywhere or split == "train"

    def score(self, problem: Problem, text: str) -> Score:
        if self._raises:
            raise ZeroDivisionError("no such judge")
        return super().score(problem, text)


class Raising(Digits):
    """Which cannot pose a problem."""

    def problem(self, index: int) -> Problem:
        raise KeyError("no map")


class NoProblem(Digits):
    """Whose author forgot to return it."""

    def problem(self, index: int) -> Problem:
        return None  # type: ignore[return-value]


class Moody(Digits):
    """Whose verifier raises at every third problem and is content with nothing at the others."""

    def score(self, problem: Problem, text: str) -> Score:
        if problem.index % 3 == 1:
            raise ValueError("not in the mood")
        return Score.of(0.25)


class Sleepy(Digits):
    """Sleeps for ever over every third answer."""

    def score(self, problem: Problem, text: str) -> Score:
        if problem.index % 3 == 0:
            time.sleep(3600)
        return Score.of(float(len(text) % 2))


class Ladder(LevelledTask):
    """Every answer is right at levels 0 and 1, and none at levels 2 and 3."""

    def __init__(self, split: str = "train", seed: int = 0) -> None:
        pass

    @property
    def name(self) -> str:
        return "ladder"

    @property
    def num_problems(self) -> int | None:
        return None

    def skill(self, position: int) -> str:
        return "climbing"

    def num_levels(self, skill: str) -> int:
        return 4

    def problem(self, index: int) -> Problem:
        level, position = split_index(index)
        return Problem(index=index, prompt=f"climb {level} {position % 9}:", answer="1")

    def score(self, problem: Problem, text: str) -> Score:
        return Score.of(float(split_index(problem.index)[0] < 2))
