"""Settings of which each is right and which together are not: found before anything is trained."""

from __future__ import annotations

from lockstep.core.errors import ConfigError, InputError
from lockstep.rl.lm.batch import LearnConfig
from lockstep.rl.lm.problems import AnyTask, ProblemSource
from lockstep.rl.lm.rollout import PromptEncoder, RolloutConfig

COMPARED = ("group_normalised", "group_centred", "leave_one_out", "group_batch_whitened", "max_likelihood")
"""Advantages that compare a sample with its group's others."""


def check_advantage(learn: LearnConfig, rollout: RolloutConfig) -> None:
    """Refuse groups from which the advantage would learn nothing, or something else.

    Raises:
        ConfigError: names both settings.
    """
    loss, size = learn.loss, rollout.group_size
    if learn.minibatches > rollout.groups:
        raise ConfigError(
            f"learn.minibatches={learn.minibatches} of rollout.groups={rollout.groups}: a group stays in one of them, and some "
            "would be empty; give as many groups, or fewer minibatches"
        )
    if loss.advantage in COMPARED and size < 2:
        raise ConfigError(
            f"rollout.group_size={size} with learn.loss.advantage={loss.advantage!r}, which compares a sample with its group's "
            "others; give 2 or more, or the advantage batch_whitened, greedy_baseline or gae"
        )
    if loss.advantage == "pass_at_k" and size < loss.k:
        raise ConfigError(
            f"rollout.group_size={size} with learn.loss.k={loss.k}; expected k samples or more in a group"
        )
    if loss.advantage == "greedy_baseline" and not rollout.greedy_baseline:
        raise ConfigError(
            "learn.loss.advantage='greedy_baseline' subtracts the greedy answer's reward; set rollout.greedy_baseline=True"
        )
    if loss.advantage == "max_likelihood" and learn.overlong_buffer:
        raise ConfigError(
            f"learn.overlong_buffer={learn.overlong_buffer} makes rewards negative, and learn.loss.advantage='max_likelihood' "
            "is for rewards of 0 or more; set it to 0"
        )
    if learn.overlong_buffer > rollout.max_tokens:
        raise ConfigError(
            f"learn.overlong_buffer={learn.overlong_buffer} of rollout.max_tokens={rollout.max_tokens}: answers cannot be so "
            "long; give at most as many"
        )
    if loss.aggregation == "fixed" and loss.max_length < 1:
        raise ConfigError(
            "learn.loss.aggregation='fixed' divides by learn.loss.max_length=0; give the limit of new tokens, "
            f"rollout.max_tokens={rollout.max_tokens}"
        )


def check_lengths(rollout: RolloutConfig, context: int) -> None:
    """Refuse answers that nothing has room for.

    Args:
        context: positions of the model.

    Raises:
        ConfigError: names both settings.
    """
    if rollout.max_tokens >= context:
        raise ConfigError(
            f"rollout.max_tokens={rollout.max_tokens} in a model of {context} positions leaves no room for a prompt; give less"
        )


def check_prompts(
    task: AnyTask, source: ProblemSource, prompts: PromptEncoder, num_groups: int, config: RolloutConfig, context: int
) -> None:
    """Look through the problems of a finite task that a run will pose.

    Args:
        num_groups: of the run.
        context: positions of the model.

    Raises:
        InputError: names the first problem whose prompt leaves no room for an answer.
    """
    if task.num_problems is None:
        return
    for number in range(min(num_groups, task.num_problems)):
        problem = source.training(number)
        num_tokens = len(prompts.first(problem))
        if num_tokens + config.max_tokens > context:
            raise InputError(
                f"problem {problem.index} of task {task.name} has a prompt of {num_tokens} tokens, which leaves no room for "
                f"rollout.max_tokens={config.max_tokens} in the model's {context} positions; shorten it, or give a model with "
                "more",
                field="task",
            )


def check_sampler(learn: LearnConfig, rollout: RolloutConfig) -> None:
    """Refuse samples of other numbers than the learner's where nothing would correct them.

    Raises:
        ConfigError: names both settings.
    """
    if rollout.dtype == "learner":
        return
    wish = f"rollout.dtype={rollout.dtype!r} samples from other numbers than the learner's"
    if learn.exact:
        raise ConfigError(
            f"{wish}, which learn.exact=True forbids; set it to False, with learn.loss.correction.kind='truncate'"
        )
    if learn.loss.correction.kind == "none" and learn.loss.weighs_samples:
        raise ConfigError(
            f"{wish} and learn.loss.correction.kind is 'none'; use 'truncate' or 'mask', which weigh each token by "
            "the ratio of the two"
        )
