"""How well a model does on problems it was never trained on."""

from __future__ import annotations

from dataclasses import dataclass, replace

from lockstep.envs.lm.verify import VerifierPool
from lockstep.layers.low_rank import Adapter
from lockstep.learn.session import Scores
from lockstep.models.language import LanguageModel
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

    A problem whose verifier failed counts 0 and is counted in `verifier_failures`.

    Args:
        task: the held-out half.
        rollout: limits of tokens and turns.
        adapter: that answers go through.

    Returns:
        (a score a problem, what the model wrote).
    """
    problems = first_problems(task, config.problems)
    limits = replace(rollout, group_size=config.samples, temperature=config.temperature, top_p=1.0, top_k=0, min_p=0.0)
    rollouts = Rollouts(
        new_engine(model, tokenizer, limits, adapter), task, lambda number: problems[number], verifier, limits, seed=0
    )
    groups = rollouts.collect(range(len(problems)))
    values, failures = [], 0
    for group in groups:
        scores = [one.score for one in group.trajectories]
        failures += sum(score is None or not score.is_scored for score in scores)
        values.append(sum(s.value for s in scores if s is not None and s.is_scored) / len(scores))
    lengths = [one.num_sampled for group in groups for one in group.trajectories]
    extra = {"verifier_failures": float(failures), "length": sum(lengths) / len(lengths)}
    return Scores(tuple(values), extra=extra), groups
