"""`lockstep train`: pick a recipe, override fields, watch it learn."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields, make_dataclass
from pathlib import Path
from typing import Any, TypeVar

import tyro

from lockstep.api import Run, read_config, resume, train
from lockstep.core.errors import ConfigError, unknown_name
from lockstep.learn.reward_model import RewardModelConfig
from lockstep.learn.session import BESIDE
from lockstep.learn.session import Result as LanguageResult
from lockstep.recipes import RECIPES, list_recipes, recipe
from lockstep.rl.algorithms import is_language, validated
from lockstep.runs.console import Columns, ProgressDisplay, print_curve
from lockstep.runs.directory import RunState
from lockstep.runs.record import RunRecord, read_run

USAGE = """usage: lockstep train RECIPE [--out DIR] [--name NAME] [--FIELD VALUE ...]
       lockstep train --resume RUN
       lockstep train --list
       lockstep train RECIPE --help      every field with its default and unit"""


COLUMNS = ("return", "length", "eval_return", "steps_per_s", "entropy", "approx_kl", "loss")
LANGUAGE_COLUMNS: dict[str, dict[str, str]] = {
    "supervised": {"checked": "rows read", "start": "start", "start_loss": "start loss"},
    "answers": {
        "reward": "reward",
        "pass_at_k": "pass@k",
        "uniform": "equal groups",
        "length": "length",
        "unscored": "unjudged",
        "too_long": "prompts too long",
        "eval": "held out",
        "averaged": "averaged",
        "trained": "trained",
        "teacher": "teacher",
        "level": "level",
    },
    "policy": {
        "old_kl": "KL",
        "reference_kl": "KL to reference",
        "entropy": "entropy",
        "clip_fraction": "clipped",
        "mismatch_max": "mismatch",
        "behind": "behind",
        "worker_lost": "workers lost",
    },
    "loss": {
        "loss": "loss",
        "grad_norm": "gradient",
        "lr": "lr",
        "nll": "nll",
        "divergence": "divergence",
        "margin": "margin",
        "accuracy": "accuracy",
    },
    "speed": {
        "rollout_tok_s": "rollout tok/s",
        "rollout_s": "rollout s",
        "learn_tok_s": "learn tok/s",
        "learn_s": "learn s",
        "publish_s": "publish s",
    },
}
"""Rows of the progress display: metrics, and what a person calls them."""


Options = TypeVar("Options")


@dataclass(frozen=True, kw_only=True)
class Output:
    """Where a run goes."""

    out: Path | None = None
    """Folder that holds run directories (default: runs/)."""
    name: str = ""
    """Name of the run (default: the recipe's)."""


def main(args: Sequence[str]) -> int:
    if not args or args[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    if args[0] == "--list":
        width = max(map(len, RECIPES))
        print("\n".join(f"{name:<{width}}  {summary}" for name, summary in list_recipes().items()))
        return 0
    if args[0] == "--resume":
        if len(args) != 2:
            raise ConfigError(f"--resume takes one run directory; got {list(args[1:])}")
        config = read_config(Path(args[1]))
        record = read_run(Path(args[1]))
        if record.state is RunState.FINISHED:
            return report_finished(record, "score" if is_language(config) else "return")
        with ProgressDisplay(config.run.total_steps, Path(args[1]).name, columns=columns(config)) as display:
            run = resume(
                args[1],
                on_progress=lambda step, _, metrics: display.update(step, dict(metrics)),
                on_event=lambda step, text: display.say(f"step {step}: {text}"),
            )
            display.update(run.result.steps)
        return report(run)
    if args[0].startswith("-"):
        raise ConfigError(f"{unknown_name('option', args[0], ['--list', '--resume', '--help'])}\n{USAGE}")
    name = args[0]
    output, config = overridden(name, Output, args[1:], f"lockstep train {name}")
    validated(config)
    with ProgressDisplay(config.run.total_steps, output.name or name, columns=columns(config)) as display:
        run = train(
            config,
            out=output.out,
            name=output.name or name,
            recipe_name=name,
            on_progress=lambda step, _, metrics: display.update(step, dict(metrics)),
            on_event=lambda step, text: display.say(f"step {step}: {text}"),
        )
        display.update(run.result.steps)
    return report(run)


def columns(config: Any) -> Columns:
    """Metrics that the progress display shows."""
    return LANGUAGE_COLUMNS if is_language(config) else COLUMNS


def overridden(name: str, options: type[Options], args: Sequence[str], prog: str) -> tuple[Options, Any]:
    """(options, the recipe's config with its fields overridden) of one flat command line for both.

    Raises:
        ConfigError: no such recipe.
    """
    default = recipe(name)
    kind = type(default)
    both = make_dataclass(f"{options.__name__}{kind.__name__}", [], bases=(options, kind), frozen=True, kw_only=True)
    wish = tyro.cli(
        both, args=list(args), default=both(**default.__dict__), prog=prog, description=list_recipes()[name]
    )
    made, config = (of(**{one.name: wish.__dict__[one.name] for one in fields(of)}) for of in (options, kind))  # type: ignore[arg-type]
    return made, config


def report_finished(record: RunRecord, word: str) -> int:
    """Say that there is nothing to resume, and what came out.

    Args:
        word: what an evaluation is the mean of: return (told with one digit) or score (with three).
    """
    evaluation, score = record.last_evaluation(), "no evaluation"
    if evaluation:
        score = (
            f"evaluation at step {evaluation.step:,}: mean {word} {evaluation.mean:,.{1 if word == 'return' else 3}f}"
        )
    print(f"{record.name} is finished: {record.num_steps:,} steps done; {score}")
    print(f"next             lockstep serve {record.path}   lockstep runs show {record.path}")
    return 0


CURVES = {"reward": "mean reward", "divergence": "divergence from the teacher", "loss": "loss"}
"""What a run is drawn by at its end: the first of these metrics that it has."""
OTHERS = {"averaged": "averaged weights", "trained": "the trained weights, not averaged", "teacher": "the teacher"}


def _report_language(run: Run, result: LanguageResult, record: RunRecord) -> int:
    curve = next((name for name in CURVES if name in record.metric_names()), None)
    if curve is not None:
        print_curve(*record.series(curve), title=CURVES[curve])
    print(f"updates          {result.steps:,} in {result.train_seconds:.1f} s")
    for word, scores in (("before", result.first), ("after", result.last)):
        if scores is not None:
            greedy = f"; most probable answers {scores.extra['greedy']:.3f}" if "greedy" in scores.extra else ""
            print(f"held out, {word:<6} {scores}{greedy}")
            failures = int(scores.extra.get("verifier_failures", 0))
            if failures:
                print(f"held out, {word:<6} the verifier failed on {failures} answers, which count as wrong")
            for other in BESIDE:
                if other in scores.extra:
                    print(f"held out, {word:<6} {scores.extra[other]:.3f}, {OTHERS[other]}")
    print(f"run directory    {run.path}")
    look = f"lockstep runs show {run.path}{' --samples' if (run.path / 'samples.jsonl').is_file() else ''}"
    if isinstance(read_config(run.path), RewardModelConfig):
        print(f"next             AutoModelForSequenceClassification.from_pretrained('{run.path}/model')   {look}")
    else:
        print(f"next             lockstep serve {run.path}   lockstep chat {run.path}   {look}")
    sys.stdout.flush()
    return 0


def report(run: Run) -> int:
    """Print what came out and where it lies."""
    result = run.result
    record = read_run(run.path)
    if isinstance(result, LanguageResult):
        return _report_language(run, result, record)
    if "return" in record.metric_names():
        print_curve(*record.series("return"))
    print(f"steps            {result.steps:,} in {result.train_seconds:.2f} s of training")
    if result.evaluation is not None:
        print(f"evaluation       {result.evaluation}")
    print(f"run directory    {run.path}")
    print(f"next             lockstep serve {run.path}   lockstep play {run.path}   lockstep runs show {run.path}")
    sys.stdout.flush()
    return 0
