"""A task by a word of the user's: `reasoning_gym:chain_sum`, a JSONL file, or an import path."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lockstep.core.errors import ConfigError
from lockstep.envs.lm.games import TextArenaConfig, TextArenaTask
from lockstep.envs.lm.reasoning_gym import ReasoningGymConfig, ReasoningGymTask
from lockstep.envs.lm.records import RecordsConfig, RecordsTask, find_object
from lockstep.envs.lm.task import EpisodeTask, Task

_SCHEMES: Mapping[str, Callable[[str], Task | EpisodeTask]] = {
    "reasoning_gym": lambda name: ReasoningGymTask(ReasoningGymConfig(generator=name)),
    "textarena": lambda name: TextArenaTask(TextArenaConfig(game=name)),
}


def find_task(word: str) -> Task | EpisodeTask:
    """The task that a word names.

    Args:
        word: `reasoning_gym:GENERATOR`, `textarena:GAME`, a path that ends in .jsonl (GSM8K's fields), or
            `my_module:task`, a task or something that makes one when called without arguments.

    Raises:
        ConfigError: it names none.
    """
    scheme, _, name = word.partition(":")
    if scheme in _SCHEMES and name:
        return _SCHEMES[scheme](name)
    if Path(word).suffix == ".jsonl":
        return RecordsTask(RecordsConfig(path=word))
    found: Any = find_object(
        word, f"task; known: {', '.join(f'{s}:NAME' for s in _SCHEMES)}, FILE.jsonl, my_module:task"
    )
    task = found if isinstance(found, Task | EpisodeTask) else found() if callable(found) else found
    if not isinstance(task, Task | EpisodeTask):
        raise ConfigError(f"{word!r} is {type(task).__name__}; expected a Task, or a function that makes one")
    return task


def names_task(word: str) -> bool:
    """Whether a word is of the form of a built-in scheme or a JSONL file; an import path may be anything."""
    return word.partition(":")[0] in _SCHEMES or Path(word).suffix == ".jsonl"
