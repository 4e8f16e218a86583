"""How well a model does on problems it was never trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from lockstep.core.errors import ConfigError, InputError
from lockstep.envs.lm.make import levelled
from lockstep.envs.lm.verify import VerifierPool
from lockstep.layers.low_rank import Adapter
from lockstep.learn.session import Scores
from lockstep.models.language import LanguageModel
from lockstep.rl.lm.batch import unjudged
from lockstep.rl.lm.problems import AnyTask, first_problems
from lockstep.rl.lm.rollout import Group, RolloutConfig, Rollouts, new_engine
from lockstep.tokenize.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Evaluation on held-out problems."""

    problems: int = 256
    """Held-out problems, the same every time."""
    samples: int = 1
    """Answers to each; their mean is the problem's score."""
    temperature: float = 0.0
    """0 takes the most probable token."""
    greedy: bool = True
    """Where the temperature is above 0, answer each problem by the most probable tokens too: metric "greedy"."""
    level: int = 0
    """Of the held-out problems, where the task has levels; it stays as it is while those of training change."""

    def check(self, task: AnyTask) -> None:
        """Refuse a level of a task without levels.

        Raises:
            ConfigError: names both.
        """
        if self.level and levelled(task) is None:
            raise ConfigError(
                f"level={self.level} of task {task.name}, which has no levels; leave it 0, or give task.levels"
            )


def evaluate(
    model: LanguageModel,
    tokenizer: Tokenizer,
    task: AnyTask,
    verifier: VerifierPool,
    rollout: RolloutConfig,
    config: EvaluationConfig,
    adapter: Adapter | None = None,
) -> tuple[Scores, list[Group]]:
    """Scores of the first held-out problems, by an engine of its own on the weights as they are.

    An answer whose verifier failed counts 0 and is counted in `verifier_failures`.

    Args:
        task: the held-out half.
        rollout: limits of tokens and turns.
        adapter: that answers go through.

    Raises:
        ConfigError: a level of a task without levels.
        EnvError: not one answer could be judged.
        InputError: a prompt leaves no room for an answer.

    Returns:
        (a score a problem, what the model wrote at the temperature).
    """
    config.check(task)
    problems = first_problems(task, config.problems, config.level)

    def answer(samples: int, temperature: float) -> list[Group]:
        limits = replace(rollout, group_size=samples, temperature=temperature, top_p=1.0, top_k=0, min_p=0.0)
        engine = new_engine(model, tokenizer, limits, adapter)
        return Rollouts(engine, task, problems.__getitem__, verifier, limits, seed=0).collect(range(len(problems)))

    groups = answer(config.samples, config.temperature)
    for group in groups:
        if not group.trajectories:
            raise InputError(
                f"held-out problem {group.problem.index} leaves no room for rollout.max_tokens={rollout.max_tokens} in the "
                f"model's {model.max_context} positions; give a model with more, shorter answers, or shorter problems",
                field="task",
            )
    lengths = [one.num_sampled for group in groups for one in group.trajectories]
    failures = sum(one.score is None or not one.score.is_scored for group in groups for one in group.trajectories)
    if failures == len(lengths):
        raise unjudged([one for group in groups for one in group.trajectories], f"of {len(problems)} held-out problems")
    extra = {"verifier_failures": float(failures), "length": sum(lengths) / len(lengths)}
    if levelled(task) is not None:
        extra["level"] = float(config.level)
    if config.greedy and config.temperature > 0.0:
        greedy = _means(answer(1, 0.0))
        extra["greedy"] = sum(greedy) / len(greedy)
    return Scores(_means(groups), extra=extra), groups


def _means(groups: Sequence[Group]) -> tuple[float, ...]:
    """Mean score of each problem's answers; one that could not be judged counts 0."""
    return tuple(
        sum(one.score.value for one in group.trajectories if one.score is not None and one.score.is_scored)
        / len(group.trajectories)
        for group in groups
    )
