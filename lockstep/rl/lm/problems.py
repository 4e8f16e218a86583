"""Which problem group number g works on: a pure function, so that no run has to remember what it has met.

What is held out for evaluation is the task's business: its training and held-out halves are two tasks that share no problem.
"""

from __future__ import annotations

import zlib

from lockstep.core.child_process import describe
from lockstep.core.errors import EnvError, InputError, LockstepError
from lockstep.core.trajectory import Problem
from lockstep.envs.lm.task import EpisodeTask, Task, level_index

AnyTask = Task | EpisodeTask

_SEEDS_APART = 1 << 32
_SEEDS = 1 << 7


class ProblemSource:
    """Problems for training.

    Args:
        task: where they come from. A finite one is walked in an order shuffled anew in each pass; of an endless one each
            seed walks a stretch of its own.
        seed: of the run.
        level: of its problems, where it has levels.
    """

    def __init__(self, task: AnyTask, seed: int, level: int = 0) -> None:
        self._task, self._seed, self._level = task, seed, level

    def index(self, group: int) -> int:
        """Index of the problem of a group."""
        num = self._task.num_problems
        if num is None:
            return (self._seed % _SEEDS) * _SEEDS_APART + group
        epoch, place = divmod(group, num)
        return shuffled(place, num, self._seed * 1_000_003 + epoch)

    def training(self, group: int) -> Problem:
        """The problem of a group."""
        return posed(self._task, level_index(self._level, self.index(group)))


def posed(task: AnyTask, index: int) -> Problem:
    """The problem of an index.

    Raises:
        EnvError: the task raised something of its own, or gave no problem; says where.
    """
    try:
        problem = task.problem(index)
    except LockstepError:
        raise
    except Exception as error:
        raise EnvError(f"task {task.name} raised at problem {index}: {describe(error)}") from error
    if not isinstance(problem, Problem):
        raise EnvError(f"task {task.name} gave {type(problem).__name__} as problem {index}; expected a Problem")
    return problem


def first_problems(task: AnyTask, num: int, level: int = 0) -> list[Problem]:
    """The first `num` different problems of a task, the same for every run: what evaluations are on. Of episodes the first
    `num`: two that begin alike may go on differently.

    Args:
        level: of them, where the task has levels.

    Raises:
        InputError: the task has none, or no such level.
    """
    found: dict[str, Problem] = {}
    end = task.num_problems
    first = level_index(level, 0)
    for index in range(first, first + (4 * num if end is None else end)):
        problem = posed(task, index)
        found.setdefault(str(index) if isinstance(task, EpisodeTask) else text_of(problem), problem)
        if len(found) == num:
            break
    if not found:
        raise InputError(f"task {task.name} has no held-out problems; expected some to evaluate on", field="task")
    return list(found.values())


def text_of(problem: Problem) -> str:
    """What the model is asked, in one string."""
    if problem.prompt is not None:
        return problem.prompt
    assert problem.messages is not None
    return "\n".join(f"{message['role']}: {message.get('content')}" for message in problem.messages)


def reading(problem: Problem) -> str:
    """A problem with its reference answer: what a tokenizer of one's own is learned from."""
    return f"{text_of(problem)}\n{problem.answer}"


def shuffled(place: int, num: int, key: int) -> int:
    """Image of `place` under a permutation of range(num) that is a function of `key`: a Feistel network, cycle-walked.

    >>> sorted(shuffled(place, 10, 3) for place in range(10)) == list(range(10))
    True
    """
    half = max((num - 1).bit_length() + 1, 2) // 2
    mask = (1 << half) - 1
    while True:
        left, right = place >> half, place & mask
        for turn in range(4):
            mixed = zlib.crc32(f"{key}/{turn}/{right}".encode()) & mask
            left, right = right, left ^ mixed
        place = (left << half) | right
        if place < num:
            return place
