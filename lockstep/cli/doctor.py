"""`lockstep doctor`: look at an environment, a task or everything a recipe will do, before spending hours on it."""

from __future__ import annotations

import difflib
import inspect
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from lockstep.cli.train import overridden
from lockstep.core.errors import ConfigError, EnvError, LockstepError
from lockstep.core.spaces import space_to_json
from lockstep.envs.control.config import EnvConfig
from lockstep.envs.control.doctor import DoctorReport, diagnose
from lockstep.envs.lm import doctor as task_doctor
from lockstep.envs.lm.find import find_task, names_task
from lockstep.envs.lm.games import TextEnv
from lockstep.envs.lm.make import make_tasks
from lockstep.envs.lm.records import find_object
from lockstep.envs.lm.task import EpisodeTask, Task
from lockstep.envs.lm.verify import VerifierConfig
from lockstep.recipes import RECIPES, recipe
from lockstep.rl.algorithms import is_language, train_function, validated
from lockstep.rl.lm.grpo import GRPOConfig
from lockstep.rl.session import Session

REPLAY_ROWS = 20_000


@dataclass(frozen=True)
class DoctorArgs:
    """Check spaces, rewards, determinism and autoreset, measure stepping rates, advise on vectoriser and threads; for a
    recipe also measure the learner and predict the wall time."""

    subject: Annotated[str, tyro.conf.Positional]
    """Environment id, name of a recipe, language task (reasoning_gym:NAME, FILE.jsonl), or import path of either. After a
    language model's recipe come the overrides that `lockstep train RECIPE` takes, such as --task.name."""
    num_envs: int = 0
    """Copies stepped together (0: the recipe's, or 8)."""
    seconds: float = 1.0
    """Time spent on measuring each form of the environment, and on the learner (seconds)."""
    json: Path | None = None
    """Also write the findings and figures to this file."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """Where the findings go."""

    json: Path | None = None
    """Also write the findings to this file."""


@dataclass(frozen=True)
class Prediction:
    """Time of a whole recipe, without its evaluations.

    >>> str(Prediction("r", 1000, 20.0, 5.0, 0.02)).splitlines()[0]
    'Recipe r: 1,000 steps in about 0.0 s of training'
    """

    recipe: str
    total_steps: int
    total_us: float
    """Microseconds of each environment step: stepping, acting and learning."""
    env_us: float
    """Of these, stepping alone, under random actions."""
    seconds: float

    def __str__(self) -> str:
        learner = max(self.total_us - self.env_us, 0.0)
        return "\n".join(
            [
                f"Recipe {self.recipe}: {self.total_steps:,} steps in about {_duration(self.seconds)} of training",
                f"  environment      {self.env_us:9.1f} us/step",
                f"  acting, learning {learner:9.1f} us/step",
                "  measured on a few updates; evaluations and checkpoints come on top",
            ]
        )


def main(args: Sequence[str]) -> int:
    if args and args[0] in RECIPES and is_language(recipe(args[0])):
        return _look_at_recipe(args[0], args[1:])
    wish = tyro.cli(DoctorArgs, args=list(args), prog="lockstep doctor")
    if _is_task(wish.subject):
        return _look_at_task(find_task(wish.subject), None, wish.json)
    config = recipe(wish.subject) if wish.subject in RECIPES else None
    env = EnvConfig(id=wish.subject) if config is None else config.env
    env = replace(env, num_envs=wish.num_envs) if wish.num_envs else env
    report = _diagnose(env, wish)
    print(report)
    document = {"env": asdict(env), **report_json(report)}
    if config is not None:
        try:
            prediction = predict(wish.subject, replace(config, env=env), report, seconds=wish.seconds)
            print(f"\n{prediction}")
            document["recipe"] = asdict(prediction)
        except LockstepError as error:
            print(f"\nRecipe {wish.subject}: the learner was not measured: {error}")
    _write_json(wish.json, document)
    return 1 if any(finding.level == "problem" for finding in report.findings) else 0


def _is_task(subject: str) -> bool:
    if subject in RECIPES or ":" not in subject:
        return names_task(subject)
    if names_task(subject):
        return True
    try:
        found = find_object(subject, "import path")
    except ConfigError:
        return False  # the environments' own error says more
    kinds = (Task, EpisodeTask, TextEnv)
    if isinstance(found, type):
        return issubclass(found, kinds)
    return isinstance(found, kinds) or (inspect.isfunction(found) and "split" in inspect.signature(found).parameters)


def _look_at_recipe(name: str, args: Sequence[str]) -> int:
    """The task of a language model's recipe, as the overrides say."""
    wish, config = overridden(name, Report, args, f"lockstep doctor {name}")
    if not isinstance(config, GRPOConfig):
        raise ConfigError(
            f"recipe {name!r} learns from a file, whose rows `lockstep train {name}` reads before it begins"
        )
    validated(config)
    config.check()
    return _look_at_task(make_tasks(config.task)[0], config.verifier, wish.json)


def _look_at_task(task: Task | EpisodeTask, verifier: VerifierConfig | None, out: Path | None) -> int:
    if isinstance(task, EpisodeTask):
        report = task_doctor.diagnose_episodes(task, config=verifier)
    else:
        report = task_doctor.diagnose(task, config=verifier)
    print(report)
    _write_json(out, {"task": report.name, "findings": [asdict(finding) for finding in report.findings]})
    return 0 if report.is_healthy else 1


def _write_json(path: Path | None, document: Mapping[str, Any]) -> None:
    if path is not None:
        try:
            path.write_text(json.dumps(document, indent=2) + "\n")
        except OSError as error:
            raise ConfigError(f"--json {path} cannot be written: {error}") from error


def _diagnose(env: EnvConfig, wish: DoctorArgs) -> DoctorReport:
    try:
        return diagnose(env, seconds_per_rate=wish.seconds)
    except EnvError as error:
        near = difflib.get_close_matches(wish.subject, RECIPES, n=1)
        if near:
            raise ConfigError(f"{error}\nor did you mean the recipe {near[0]!r}?") from error
        raise


def predict(name: str, config: Any, report: DoctorReport, *, seconds: float = 1.0) -> Prediction:
    """Train the recipe for a moment and extrapolate.

    Args:
        config: of the algorithm.
        report: of its environment.
        seconds: least time to measure, after a warm-up.

    Raises:
        ConfigError: it cannot be trained, e.g. for lack of a data set.
    """
    total_us = measure_training(config, seconds=seconds)
    steps = config.run.total_steps
    try:
        env_us = report.predict_wall_time(1, 0.0) * 1e6
    except ValueError:
        env_us = 0.0
    if "dataset" in config.__dict__:
        env_us = 0.0
    return Prediction(name, steps, total_us, min(env_us, total_us), steps * total_us * 1e-6)


def measure_training(config: Any, *, seconds: float) -> float:
    """Microseconds of training for each environment step, after a warm-up. Longer and longer trainings, until the
    measured part takes `seconds` or is the whole run."""
    config, warm, chunk = _shortened(config)
    total = max(config.run.total_steps, warm + chunk)
    while True:
        num_steps, elapsed = _timed(config, warm, chunk)
        if elapsed >= seconds or warm + chunk >= total:
            return 1e6 * elapsed / num_steps
        growth = min(max(2.0, 1.2 * seconds / elapsed), 16.0)
        chunk = min(int(chunk * growth), total - warm)


def _shortened(config: Any) -> tuple[Any, int, int]:
    """(config that begins to learn at once, steps of the warm-up, steps of the first measurement)."""
    fields = config.__dict__
    if "replay" in fields:
        # A full buffer's memory is not needed to time a step; nor are thousands of random actions before the first.
        rows = min(config.replay.buffer_size, REPLAY_ROWS)
        starts = min(config.replay.learning_starts, 2 * config.replay.batch_size)
        config = replace(config, replay=replace(config.replay, buffer_size=rows, learning_starts=starts))
        update = config.replay.train_freq * config.env.num_envs
        return config, starts + 2 * update, 4 * update
    if "num_steps" in fields:
        update = config.num_steps * config.env.num_envs
        return config, update, update
    return config, 20, 50


def _timed(config: Any, warm: int, chunk: int) -> tuple[int, float]:
    """(steps, seconds) between the end of the warm-up and the end of the run."""
    run = replace(config.run, total_steps=warm + chunk, log_every=1, eval_every=0, final_episodes=0, tensorboard=False)
    marks: list[tuple[int, float]] = []

    def mark(step: int, total: int, metrics: Mapping[str, float]) -> None:
        if step >= warm:
            marks.append((step, time.perf_counter()))

    session = Session(run, config.env, on_progress=mark)
    train_function(type(config).__name__)[1](replace(config, run=run), session)
    (first, start), (last, end) = marks[0], marks[-1]
    if first == last:
        raise ConfigError("the recipe has a single update; there is nothing to extrapolate from")
    return last - first, end - start


def report_json(report: DoctorReport) -> dict[str, Any]:
    """The report as plain data."""
    return {
        "observation": space_to_json(report.obs_space),
        "action": space_to_json(report.action_space),
        "about": {key: value if _is_plain(value) else str(value) for key, value in report.about.items()},
        "findings": [asdict(finding) for finding in report.findings],
        "rates": [
            {**asdict(rate), "us_per_step": rate.us_per_step if rate.steps_per_s else None} for rate in report.rates
        ],
        "auto": report.auto,
        "auto_why": report.auto_why,
        "threads": {**asdict(report.threads), "advice": report.threads.advice}
        if is_dataclass(report.threads)
        else None,
    }


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, str | int | float | bool | list | tuple)


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"
