"""A task by name: the only place where a word from outside becomes one."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from lockstep.core.errors import ConfigError, unknown_name
from lockstep.envs.lm.code import CodeConfig, CodeTask
from lockstep.envs.lm.games import TextArenaConfig, TextArenaTask, TextEnv, TextEnvConfig, TextEnvTask
from lockstep.envs.lm.mixture import CurriculumConfig
from lockstep.envs.lm.reasoning_gym import ReasoningGymConfig, ReasoningGymTask
from lockstep.envs.lm.records import RecordsConfig, RecordsTask, find_object
from lockstep.envs.lm.sandbox import SandboxConfig
from lockstep.envs.lm.strict import StrictTask
from lockstep.envs.lm.task import EpisodeTask, LevelledTask, Task

ALL = "all"
PartialCredit = Literal["auto", "no", "training", "always"]
AnyTask = Task | EpisodeTask
Split = Literal["train", "held_out"]
C = TypeVar("C")


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """What a language model learns to do."""

    name: str = "chain_sum"
    """A generator of reasoning-gym; FILE.jsonl of questions and answers; code:FILE.jsonl of programming problems with tests;
    textarena:GAME; or your own `module:name`: a TextEnv, or a class or function that makes a Task or an EpisodeTask when
    called with `split` ("train" or "held_out"), `seed` and the options."""
    options: dict[str, bool | int | float | str] = field(default_factory=dict)
    """Of the generator, such as {"min_terms": 2, "max_terms": 3}; else fields of RecordsConfig (such as judge), CodeConfig and
    SandboxConfig, TextArenaConfig or TextEnvConfig, or of your own; a game and a TextEnv get what is none of these."""
    levels: tuple[str, ...] = ()
    """A curriculum: attributes of the generator's own that rise with the level, such as num_terms, whatever the options say
    of them; or `all` that the options do not fix (a LevelledTask of yours takes `all` too). Empty: one level."""
    curriculum: CurriculumConfig = field(default_factory=CurriculumConfig)
    """When the level of training problems changes; only with `levels`."""
    partial_credit: PartialCredit = "auto"
    """Where a score between 0 and 1 is kept: no, training (held-out answers are right or wrong), always; auto: no for
    reasoning-gym's generators, some of which reward any answer of the right form, always for what else there is."""
    seed: int = 0
    """Of the problems."""

    def __post_init__(self) -> None:
        if self.partial_credit not in get_args(PartialCredit):
            raise ConfigError(
                f"partial_credit={self.partial_credit!r}; expected one of {', '.join(get_args(PartialCredit))}"
            )


def make_tasks(config: TaskConfig) -> tuple[AnyTask, AnyTask]:
    """(problems to train on, problems held out): they share none.

    Raises:
        ConfigError: no such generator, file, game or class, or options that it does not take.
        FormatError: a file that cannot be read; names the line.
    """
    train, held_out = (make_task(config, split) for split in ("train", "held_out"))
    kept = config.partial_credit
    if kept == "auto":
        kept = "no" if isinstance(train, ReasoningGymTask) else "always"
    if kept == "no" and isinstance(train, Task):
        train = StrictTask(train)
    if kept != "always" and isinstance(held_out, Task):
        held_out = StrictTask(held_out)
    return train, held_out


def make_task(config: TaskConfig, split: Split) -> AnyTask:
    """One half of a task, its scores as its verifier gives them.

    Raises:
        ConfigError, FormatError: as `make_tasks`.
    """
    scheme, _, name = config.name.partition(":")
    if scheme in SCHEMES and name:
        made = SCHEMES[scheme](name, config, split)
    elif name:
        made = _of_user(config, split)
    elif config.name.endswith(".jsonl"):
        made = RecordsTask(_made(RecordsConfig, {**config.options, "path": config.name, "split": split}))
    else:
        made = _generator(config.name, config, split)
    if config.levels and not isinstance(made, LevelledTask):
        raise ConfigError(
            f"task.levels={config.levels}; {config.name} has no levels (it is no LevelledTask): leave them out"
        )
    return made


def levelled(task: AnyTask) -> LevelledTask | None:
    """The levels of a task that `make_tasks` made, None if it has none."""
    inner = task.inner if isinstance(task, StrictTask) else task
    return inner if isinstance(inner, LevelledTask) else None


def _generator(name: str, config: TaskConfig, split: Split) -> Task:
    options: dict[str, Any] = dict(config.options)
    task = ReasoningGymTask(
        ReasoningGymConfig(
            generator=name,
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


def _programs(path: str, config: TaskConfig, split: Split) -> Task:
    limits, wishes = _parted(SandboxConfig, config.options)
    sandbox = _made(SandboxConfig, limits)
    return CodeTask(_made(CodeConfig, {**wishes, "path": path, "split": split, "sandbox": sandbox}))


def _game(name: str, config: TaskConfig, split: Split) -> EpisodeTask:
    wishes, options = _parted(TextArenaConfig, config.options)
    return TextArenaTask(
        _made(TextArenaConfig, {**wishes, "game": name, "options": options, "seed": config.seed, "split": split})
    )


SCHEMES: Mapping[str, Callable[[str, TaskConfig, Split], AnyTask]] = {
    "reasoning_gym": _generator,
    "textarena": _game,
    "code": _programs,
}
"""What may stand before a colon; any other word is a module."""


def _of_user(config: TaskConfig, split: Split) -> AnyTask:
    found = find_object(
        config.name, f"task; known: {', '.join(f'{s}:NAME' for s in SCHEMES)}, FILE.jsonl, my_module:MyTask"
    )
    if isinstance(found, type) and issubclass(found, TextEnv):
        wishes, options = _parted(TextEnvConfig, config.options)
        return TextEnvTask(
            _made(
                TextEnvConfig, {**wishes, "env": config.name, "options": options, "seed": config.seed, "split": split}
            )
        )
    if not callable(found):
        raise ConfigError(
            f"{config.name!r} is {type(found).__name__}; training needs two tasks that share no problem: name a class, or a "
            "function of split and seed that makes one"
        )
    wish: dict[str, Any] = {"split": split, "seed": config.seed, **config.options}
    try:
        inspect.signature(found).bind(**wish)
    except TypeError as error:
        raise ConfigError(
            f"{config.name!r} cannot be called with {', '.join(wish)}: {error}; it makes one half of a task, as in "
            "`def __init__(self, split: str, seed: int)`, with problems that the other split never has. A function that judges "
            "is for records: --task.name FILE.jsonl --task.options judge my_module:score"
        ) from error
    made = found(**wish)
    if not isinstance(made, Task | EpisodeTask):
        raise ConfigError(f"task {config.name!r} makes {type(made).__name__}; expected a Task or an EpisodeTask")
    if config.levels not in ((), (ALL,)):
        raise ConfigError(f"task.levels={config.levels}; {config.name} takes ('all',), and only as a LevelledTask")
    return made


def _parted(kind: type, options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(options that are fields of a config, the others)."""
    names = {one.name for one in fields(kind)}
    ours = {name: value for name, value in options.items() if name in names}
    return ours, {name: value for name, value in options.items() if name not in names}


def _made(kind: type[C], values: Mapping[str, Any]) -> C:
    """A config, its fields looked at: they come from the command line as whatever they look like.

    Raises:
        ConfigError: a field that it has not, or a value that the field cannot have.
    """
    hints = get_type_hints(kind)
    for name, value in values.items():
        if name not in hints:
            raise ConfigError(unknown_name(f"option of {kind.__name__}", name, hints))
        hint = hints[name]
        if get_origin(hint) is Literal and value not in get_args(hint):
            raise ConfigError(unknown_name(f"{kind.__name__}.{name}", str(value), get_args(hint)))
        allowed = (int, float) if hint is float else hint
        if hint in (str, int, float, bool) and (not isinstance(value, allowed) or (hint is int and value is True)):
            raise ConfigError(f"{kind.__name__}.{name}={value!r} is {type(value).__name__}; expected {hint.__name__}")
    return kind(**values)
