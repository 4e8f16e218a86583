"""A short supervised start on the task's own reference answers, for a model that cannot answer at all yet."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from lockstep.core.errors import ConfigError
from lockstep.core.trajectory import Problem
from lockstep.learn.learner import Learner, LearnerConfig
from lockstep.learn.losses import likelihood_loss
from lockstep.learn.optimiser import OptimiserConfig
from lockstep.learn.packing import Example, micro_batches
from lockstep.models.language import LanguageModel
from lockstep.rl.lm.problems import ProblemSource
from lockstep.rl.lm.rollout import PromptEncoder
from lockstep.tokenize.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class StartConfig:
    """Supervised steps before reinforcement."""

    steps: int = 0
    """Optimiser steps (0: none)."""
    batch: int = 128
    """Problems of a step."""
    micro_tokens: int = 8192
    """Tokens of a forward and backward pass."""
    learner: LearnerConfig = field(default_factory=lambda: LearnerConfig(optimiser=OptimiserConfig(lr=2e-3)))
    """Optimiser of the start; it is thrown away afterwards."""


def supervised_start(
    model: LanguageModel,
    tokenizer: Tokenizer,
    source: ProblemSource,
    config: StartConfig,
    on_step: Callable[[Mapping[str, float]], None] = lambda metrics: None,
) -> float:
    """Maximum likelihood of reference answers, after the prompts they answer. Returns the last step's loss in nats a token.

    Training problems only, from the end of the groups' numbers, so that reinforcement meets others.

    Raises:
        ConfigError: a problem without a reference answer; a step whose problems all have more tokens than the model has
            positions (of other steps those that do are left out).
    """
    learner, loss = Learner(model, config.learner, total_steps=config.steps), float("nan")
    for step, examples in enumerate(_batches(tokenizer, source, config)):
        examples = [example for example in examples if len(example.tokens) <= model.max_context]
        if not examples:
            raise ConfigError(
                f"no problem of the start's step {step + 1} fits the model's {model.max_context} positions with its answer; "
                "give a model with more, or shorter problems"
            )
        num_tokens = sum(example.num_weighted for example in examples)
        micros = micro_batches(examples, config.micro_tokens)
        loss = learner.step(micros, likelihood_loss(num_tokens))["loss"]
        on_step({"start": (step + 1) / config.steps, "start_loss": loss})
    return loss


def reference_example(tokenizer: Tokenizer, prompts: PromptEncoder, problem: Problem) -> Example:
    """A problem's reference answer after its prompt, and the end of the text.

    Raises:
        ConfigError: there is none.
    """
    if not problem.answer:
        raise ConfigError(
            f"problem {problem.index} has no reference answer, so there is nothing to start from; use start.steps=0 and "
            "teacher.references=0"
        )
    prompt = prompts.first(problem)
    answer = [*tokenizer.encode(problem.answer, add_special=False, parse_special=False), *tokenizer.eos_ids[:1]]
    return Example.of([*prompt, *answer], weight=[0.0] * len(prompt) + [1.0] * len(answer))


def _batches(tokenizer: Tokenizer, source: ProblemSource, config: StartConfig) -> Iterator[list[Example]]:
    prompts = PromptEncoder(tokenizer)
    for step in range(config.steps):
        first = (1 << 31) - 1 - step * config.batch
        yield [reference_example(tokenizer, prompts, source.training(first - place)) for place in range(config.batch)]
