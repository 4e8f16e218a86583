"""A task by a word of the user's: `reasoning_gym:chain_sum`, a JSONL file, or an import path."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lockstep.core.errors import ConfigError
from lockstep.envs.lm.games import TextEnv
from lockstep.envs.lm.make import SCHEMES, TaskConfig, make_task
from lockstep.envs.lm.records import RecordsConfig, RecordsTask, find_object
from lockstep.envs.lm.task import EpisodeTask, Task


def find_task(word: str) -> Task | EpisodeTask:
    """The task that a word names.

    Args:
        word: `reasoning_gym:GENERATOR`, `textarena:GAME`, `code:FILE.jsonl`, a path that ends in .jsonl (GSM8K's fields; all
            of its records), or `my_module:task`, a task, a TextEnv, or something that makes a task when called without
            arguments, or as training calls it.

    Raises:
        ConfigError: it names none.
    """
    scheme, _, name = word.partition(":")
    if scheme in SCHEMES and name:
        return make_task(TaskConfig(name=word), "train")
    if Path(word).suffix == ".jsonl":
        return RecordsTask(RecordsConfig(path=word))
    found: Any = find_object(
        word, f"task; known: {', '.join(f'{s}:NAME' for s in SCHEMES)}, FILE.jsonl, my_module:task"
    )
    if isinstance(found, Task | EpisodeTask):
        return found
    if isinstance(found, type) and issubclass(found, TextEnv):
        return make_task(TaskConfig(name=word), "train")
    try:
        made = found() if callable(found) else found
    except TypeError:
        return make_task(TaskConfig(name=word), "train")
    if not isinstance(made, Task | EpisodeTask):
        raise ConfigError(f"{word!r} is {type(made).__name__}; expected a Task, or a function that makes one")
    return made


def names_task(word: str) -> bool:
    """Whether a word is of the form of a built-in scheme or a JSONL file; an import path may be anything."""
    return word.partition(":")[0] in SCHEMES or Path(word).suffix == ".jsonl"
