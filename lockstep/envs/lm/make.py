"""A task by name: the only place where a word from outside becomes one."""

from __future__ import annotations

from dataclasses import dataclass, field

from lockstep.envs.lm.reasoning_gym import ReasoningGymConfig, ReasoningGymTask
from lockstep.envs.lm.strict import StrictTask
from lockstep.envs.lm.task import EpisodeTask, Task


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """What a language model learns to do."""

    name: str = "chain_sum"
    """A generator of reasoning-gym."""
    options: dict[str, bool | int | float | str] = field(default_factory=dict)
    """Its difficulty, such as {"min_terms": 2, "max_terms": 3}."""
    partial_credit: bool = False
    """Keep the verifier's partial credit; else an answer is right or wrong."""
    seed: int = 0
    """Of the problems."""


def make_tasks(config: TaskConfig) -> tuple[Task | EpisodeTask, Task | EpisodeTask]:
    """(problems to train on, problems held out): they share none."""
    train, held_out = (
        ReasoningGymTask(
            ReasoningGymConfig(
                generator=config.name,
                options=dict(config.options),
                seed=config.seed,
                split=split,
                form="chat",
                system="",
                answer_in="text",
            )
        )
        for split in ("train", "held_out")
    )
    if config.partial_credit:
        return train, held_out
    return StrictTask(train), StrictTask(held_out)
