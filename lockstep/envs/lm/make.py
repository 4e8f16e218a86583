"""A task by name: the only place where a word from outside becomes one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from lockstep.core.errors import ConfigError
from lockstep.envs.lm.mixture import CurriculumConfig
from lockstep.envs.lm.reasoning_gym import ReasoningGymConfig, ReasoningGymTask
from lockstep.envs.lm.records import RecordsConfig, RecordsTask, find_object
from lockstep.envs.lm.strict import StrictTask
from lockstep.envs.lm.task import EpisodeTask, LevelledTask, Task

ALL = "all"
PartialCredit = Literal["no", "training", "always"]


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """What a language model learns to do."""

    name: str = "chain_sum"
    """A generator of reasoning-gym; a .jsonl file of questions and answers; or your own task as `module:Class`, called
    with `split` ("train" or "held_out"), `seed` and the options."""
    options: dict[str, bool | int | float | str] = field(default_factory=dict)
    """Its difficulty, such as {"min_terms": 2, "max_terms": 3}."""
    levels: tuple[str, ...] = ()
    """A curriculum: attributes of the generator's own that rise with the level, such as num_terms, whatever the options say
    of them; or `all` that the options do not fix (a LevelledTask of yours takes `all` too). Empty: one level."""
    curriculum: CurriculumConfig = field(default_factory=CurriculumConfig)
    """When the level of training problems changes; only with `levels`."""
    partial_credit: PartialCredit = "no"
    """Where the verifier's partial credit is kept: no, training (held-out answers are right or wrong), always."""
    seed: int = 0
    """Of the problems."""

    def __post_init__(self) -> None:
        if self.partial_credit not in get_args(PartialCredit):
            raise ConfigError(
                f"partial_credit={self.partial_credit!r}; expected one of {', '.join(get_args(PartialCredit))}"
            )


def make_tasks(config: TaskConfig) -> tuple[Task | EpisodeTask, Task | EpisodeTask]:
    """(problems to train on, problems held out): they share none.

    Raises:
        ConfigError: no such generator, file or class, or options that it does not take.
    """
    train, held_out = (_make(config, split) for split in ("train", "held_out"))
    if config.partial_credit == "no" and isinstance(train, Task):
        train = StrictTask(train)
    if config.partial_credit != "always" and isinstance(held_out, Task):
        held_out = StrictTask(held_out)
    return train, held_out


def levelled(task: Task | EpisodeTask) -> LevelledTask | None:
    """The levels of a task that `make_tasks` made, None if it has none."""
    inner = task.inner if isinstance(task, StrictTask) else task
    return inner if isinstance(inner, LevelledTask) else None


def _make(config: TaskConfig, split: Literal["train", "held_out"]) -> Task | EpisodeTask:
    options: dict[str, Any] = dict(config.options)
    if ":" in config.name:
        made = find_object(config.name, "task")(split=split, seed=config.seed, **options)
        if not isinstance(made, Task | EpisodeTask):
            raise ConfigError(f"task {config.name!r} makes {type(made).__name__}; expected a Task or an EpisodeTask")
        if config.levels and (config.levels != (ALL,) or not isinstance(made, LevelledTask)):
            raise ConfigError(f"task.levels={config.levels}; {config.name} takes ('all',), and only as a LevelledTask")
        return made
    if config.name.endswith(".jsonl"):
        if config.levels:
            raise ConfigError(f"task.levels={config.levels}; {config.name} has no levels: leave them out")
        return RecordsTask(RecordsConfig(path=config.name, split=split, **options))
    task = ReasoningGymTask(
        ReasoningGymConfig(
            generator=config.name,
            options=options,
            has_levels=bool(config.levels),
            attributes=() if config.levels == (ALL,) else config.levels,
            seed=config.seed,
            split=split,
            form="chat",
            system="",
            answer_in="text",
        )
    )
    if config.levels and task.num_levels(task.name) == 1:
        raise ConfigError(
            f"{task.name} has one level of task.levels={config.levels}: task.options {options} fix the rest of its curriculum, "
            "or the generator refuses the next level; name the attributes that shall rise, or leave task.levels out"
        )
    return task
