"""`lockstep eval` of a language model: right answers to held-out problems, greedy and sampled, with 95% intervals."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from lockstep.api import read_config
from lockstep.cli.model_words import of_run
from lockstep.cli.store_args import stored_path, suggesting
from lockstep.core.errors import ConfigError
from lockstep.engine.llm import load
from lockstep.envs.lm.make import TaskConfig, make_tasks
from lockstep.envs.lm.verify import VerifierConfig, VerifierPool
from lockstep.kernels import set_num_threads
from lockstep.learn.session import Scores
from lockstep.rl.lm.advantages import estimated_pass_at_k
from lockstep.rl.lm.evaluate import EvaluationConfig, evaluate
from lockstep.rl.lm.grpo import GRPOConfig
from lockstep.rl.lm.rollout import Group, RolloutConfig


@dataclass(frozen=True)
class LanguageEvalArgs:
    """Evaluate a language model on problems it was not trained on."""

    source: Annotated[Path, tyro.conf.Positional]
    """Run directory, model folder, GGUF file, a name in the store, or hub id."""
    task: str = ""
    """Task by name, with its own defaults (default: the run's)."""
    task_options: dict[str, bool | int | float | str] = field(default_factory=dict)
    """Options of `task`, as --task.options of `lockstep train grpo-task`."""
    problems: int = 256
    """Held-out problems, the same every time."""
    samples: int = 4
    """Answers to each problem at the temperature (0: greedy only)."""
    temperature: float = 1.0
    """Of the sampled answers."""
    max_tokens: int = 0
    """Tokens of an answer (0: as the run was trained)."""
    weights: str = ""
    """Of a run that kept an average: trained or averaged (default: those it serves)."""
    level: int | None = None
    """Of the problems, where the task has a curriculum (default: as the run evaluates)."""
    dtype: str = "auto"
    """Precision: auto, fp32, bf16, int8 or int4."""
    num_threads: int = 0
    """Threads of the model (0: one a processor); scores do not depend on them."""
    json: Path | None = None
    """Also write the figures to this file."""


def main(args: Sequence[str]) -> int:
    wish = tyro.cli(LanguageEvalArgs, args=list(args), prog="lockstep eval")
    if wish.samples < 0 or wish.problems < 1:
        raise ConfigError(f"problems={wish.problems}, samples={wish.samples}; expected 1 or more, 0 or more")
    set_num_threads(wish.num_threads)
    task, rollout, verifier, level = _of_run(wish)
    rollout = replace(rollout, max_tokens=wish.max_tokens or rollout.max_tokens)
    source = str(wish.source)
    with suggesting(source):
        model, tokenizer = load(stored_path(of_run(source, wish.weights)), wish.dtype)
    held_out = make_tasks(task)[1]
    rows: dict[str, tuple[Scores, list[Group]]] = {}
    with VerifierPool(verifier) as pool:
        plans = {"greedy": EvaluationConfig(problems=wish.problems, level=level)}
        if wish.samples:
            name = f"temperature {wish.temperature:g}"
            plans[name] = EvaluationConfig(
                problems=wish.problems,
                samples=wish.samples,
                temperature=wish.temperature,
                greedy=False,
                level=level,
            )
        for name, plan in plans.items():
            rows[name] = evaluate(model, tokenizer, held_out, pool, rollout, plan)
    print(f"task             {held_out.name}, held out")
    for name, (scores, groups) in rows.items():
        print(f"{name:<16} {scores}; mean length {scores.extra['length']:.1f}")
        if wish.samples > 1 and name != "greedy":
            print(f"{f'pass@{wish.samples}':<16} {Scores(_pass_at_k(groups, wish.samples))}")
    failures = sum(int(scores.extra["verifier_failures"]) for scores, _ in rows.values())
    if failures:
        print(f"verifier         failed on {failures} answers, which count as wrong")
    if wish.json is not None:
        wish.json.write_text(json.dumps(_figures(wish, held_out.name, rows), indent=2) + "\n")
    return 0


def _of_run(wish: LanguageEvalArgs) -> tuple[TaskConfig, RolloutConfig, VerifierConfig, int]:
    """Of the run, where the source is one that was reinforced; and the level of its problems."""
    if wish.task_options and not wish.task:
        raise ConfigError(f"--task-options {wish.task_options} without --task; name the task that they are of")
    given = TaskConfig(name=wish.task, options=wish.task_options)
    if (wish.source / "run.json").is_file():
        config = read_config(wish.source)
        if isinstance(config, GRPOConfig):
            task = given if wish.task else config.task
            level = 0 if wish.task else config.evaluation.level
            return task, config.rollout, config.verifier, level if wish.level is None else wish.level
    if not wish.task:
        raise ConfigError(f"{wish.source} does not name its task; give one, e.g. --task chain_sum")
    return given, RolloutConfig(), VerifierConfig(), wish.level or 0


def _pass_at_k(groups: Sequence[Group], k: int) -> tuple[float, ...]:
    """Whether any of k answers is right, problem by problem; unjudged ones are not."""
    right = [sum(1 for t in g.trajectories if t.score is not None and t.score.value >= 1.0) for g in groups]
    return tuple(estimated_pass_at_k(k, num, k) for num in right)


def _figures(wish: LanguageEvalArgs, task: str, rows: dict[str, tuple[Scores, list[Group]]]) -> dict[str, Any]:
    found: dict[str, Any] = {"task": task, "source": str(wish.source), "problems": wish.problems}
    for name, (scores, groups) in rows.items():
        low, high = scores.interval
        found[name] = {"mean": scores.mean, "ci_low": low, "ci_high": high, **scores.extra, "values": scores.values}
        if wish.samples > 1 and name != "greedy":
            found[f"pass@{wish.samples}"] = asdict(Scores(_pass_at_k(groups, wish.samples)))["values"]
    return found
