"""The three-line path: train, evaluate, load. The command line calls these functions too."""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lockstep import kernels
from lockstep.core.env import runs_root
from lockstep.core.errors import CheckpointError, ConfigError, LockstepError, unknown_name
from lockstep.envs.control.config import EnvConfig
from lockstep.learn import session as language
from lockstep.models.control.folder import load_policy
from lockstep.models.control.policy import Policy
from lockstep.recipes import recipe as recipe_config
from lockstep.rl.algorithms import AlgorithmConfig, open_session, train_function, validated
from lockstep.rl.evaluate import Evaluation
from lockstep.rl.evaluate import evaluate as evaluate_policy
from lockstep.rl.session import ProgressHook, Result, Session
from lockstep.rl.video import record_episodes
from lockstep.runs.config_json import config_from_json
from lockstep.runs.directory import RunDirectory


@dataclass(frozen=True)
class Run:
    """A finished run: where it lies and what came out."""

    path: Path
    result: Result | language.Result

    @property
    def policy(self) -> Policy:
        """The trained policy of a control run.

        Raises:
            ConfigError: the run trained a language model.
        """
        if isinstance(self.result, language.Result):
            raise ConfigError(f"{self.path} holds a language model; open it with LLM({str(self.path)!r}), or serve it")
        assert self.result.policy is not None
        return self.result.policy


def train(
    recipe: str | AlgorithmConfig,
    *,
    out: Path | str | None = None,
    name: str = "",
    recipe_name: str = "",
    on_progress: ProgressHook | None = None,
    **overrides: Any,
) -> Run:
    """Train and write a run directory.

    Args:
        recipe: a recipe's name (`lockstep train --list`) or a complete config.
        out: folder that holds run directories, default `runs/`.
        name: of the run, default the recipe's.
        recipe_name: what a config was made from, for the record.
        on_progress: called with (step, total_steps, metrics) at every metric line.
        overrides: fields of the config by dotted or double-underscore name, e.g. `run__seed=3`, or by their own name
            where only one part of the config has it, e.g. `total_steps=20_000`.

    Raises:
        ConfigError: unknown recipe or field, or a value that cannot be run.
    """
    config = recipe_config(recipe) if isinstance(recipe, str) else recipe
    for key, value in overrides.items():
        config = override(config, key.replace("__", "."), value)
    validated(config)
    label = recipe if isinstance(recipe, str) else recipe_name or type(config).__name__.removesuffix("Config").lower()
    directory = RunDirectory.create(
        Path(out) if out is not None else runs_root(),
        name or label,
        config,
        config.run.seed,
        recipe=label,
        kernels=json.dumps(kernels.describe()),
    )
    return _run(config, directory, on_progress, resume=False)


def resume(path: Path | str, *, on_progress: ProgressHook | None = None) -> Run:
    """Continue an interrupted run from its newest checkpoint (from the start where there is none).

    Raises:
        CheckpointError: not a run directory, or another process is at work in it.
    """
    directory = RunDirectory.open(Path(path))
    return _run(read_config(directory.path), directory, on_progress, resume=True)


def evaluate(
    source: Policy | Path | str,
    *,
    env: str = "",
    episodes: int = 100,
    seed: int = 0,
    deterministic: bool = True,
) -> Evaluation:
    """Mean return with a confidence interval, on fresh environments.

    Args:
        source: a policy, a run directory, or a policy folder (which needs `env`).
        env: Gymnasium id or import path; default the run's own environment.
    """
    policy = source if isinstance(source, Policy) else load(source)
    config = env_of(source, env)
    return evaluate_policy(policy, config, episodes=episodes, seed=seed, deterministic=deterministic)


def record(
    source: Policy | Path | str, out: Path | str, *, env: str = "", episodes: int = 1, seed: int = 0, fps: int = 0
) -> list[float]:
    """Play episodes and write them as a video (`.mp4` or `.gif`); returns their returns."""
    policy = source if isinstance(source, Policy) else load(source)
    return record_episodes(policy, env_of(source, env), Path(out), episodes=episodes, seed=seed, fps=fps)


def load(path: Path | str) -> Policy:
    """The policy of a run directory or policy folder.

    Raises:
        CheckpointError: missing, damaged, or not finished (no policy written yet).
    """
    return load_policy(Path(path))


def read_config(path: Path) -> AlgorithmConfig:
    """The resolved config of a run directory.

    Raises:
        CheckpointError: not a run directory, or its config cannot be read.
    """
    if not (path / "config.json").is_file():
        raise CheckpointError(f"{path} is not a run directory: it has no config.json; `lockstep runs list` shows runs")
    try:
        document = json.loads((path / "config.json").read_text())
        kind = train_function(document["config"]["class"])[0]
        return config_from_json(kind, document["config"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}/config.json is missing or damaged: {error}") from error


def env_of(source: Policy | Path | str, env: str) -> Any:
    """The environment config to run a policy on: the run's, with its id replaced by `env` if given."""
    saved = None if isinstance(source, Policy) else _saved_env(Path(source))
    if saved is not None:
        return dataclasses.replace(saved, id=env) if env else saved
    if not env:
        raise ConfigError(
            "this policy does not name its environment; give one, e.g. --env CartPole-v1 or env='CartPole-v1'"
        )
    return EnvConfig(id=env)


def _saved_env(path: Path) -> EnvConfig | None:
    """The environment of a run directory or policy folder, None if it names none."""
    if (path / "run.json").exists():
        return read_config(path).env  # type: ignore[no-any-return]
    try:
        document = json.loads((path / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}/config.json is missing or damaged: {error}") from error
    return config_from_json(EnvConfig, document["environment"]) if "environment" in document else None


def override(config: Any, key: str, value: Any) -> Any:
    """Copy of a config with one field replaced, found by dotted path or by its own name if that is unique.

    Raises:
        ConfigError: no such field (with a suggestion), or several.
    """
    paths = [p for p in field_paths(config) if p == key or p.split(".")[-1] == key]
    if key in paths:
        paths = [key]
    if not paths:
        raise ConfigError(unknown_name("field", key, field_paths(config)))
    if len(paths) > 1:
        raise ConfigError(f"field {key!r} is ambiguous: {', '.join(paths)}; give the dotted name")
    return _replaced(config, paths[0].split("."), value)


def field_paths(config: Any, prefix: str = "") -> list[str]:
    """Dotted names of all leaf fields."""
    paths = []
    for field in dataclasses.fields(config):
        value = config.__dict__[field.name]
        if dataclasses.is_dataclass(value):
            paths += field_paths(value, f"{prefix}{field.name}.")
        else:
            paths.append(prefix + field.name)
    return paths


def _replaced(config: Any, path: list[str], value: Any) -> Any:
    head, *rest = path
    inner = _replaced(config.__dict__[head], rest, value) if rest else value
    return dataclasses.replace(config, **{head: inner})


def _run(config: AlgorithmConfig, directory: RunDirectory, on_progress: ProgressHook | None, *, resume: bool) -> Run:
    session = open_session(config, directory, on_progress, resume=resume)
    try:
        with directory, session, polite_stop(session):
            result = train_function(type(config).__name__)[1](config, session)
    except (LockstepError, KeyboardInterrupt):
        if session.step == 0 and not resume:
            shutil.rmtree(directory.path, ignore_errors=True)
        raise
    return Run(directory.path, result)


@contextmanager
def polite_stop(session: Session | language.Session) -> Iterator[None]:
    """While inside, SIGINT and SIGTERM end the run at its next update, with a checkpoint; a second one ends it at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> None:
        if session.stop_requested:
            raise KeyboardInterrupt
        session.stop_requested = True

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
