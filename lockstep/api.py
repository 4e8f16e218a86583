"""The three-line path: train, evaluate, load. The command line calls these functions too."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from lockstep import kernels
from lockstep.core.env import runs_root
from lockstep.core.errors import CheckpointError, ConfigError, LockstepError, StoppedError, unknown_name
from lockstep.core.spaces import BoxSpace, Space, space_from_json
from lockstep.envs.control.config import EnvConfig
from lockstep.envs.control.spaces import action_space_of, leaf_space
from lockstep.learn import session as language
from lockstep.models.control.folder import load_policy
from lockstep.models.control.imported import imported_network
from lockstep.models.control.policy import Policy, build_head
from lockstep.models.control.preprocess import Preprocess
from lockstep.models.control.spec import HeadKind, NetworkConfig, PolicySpec
from lockstep.models.graph import GraphModule, save_graph
from lockstep.recipes import recipe as recipe_config
from lockstep.rl.algorithms import AlgorithmConfig, open_session, train_function, validated
from lockstep.rl.evaluate import Evaluation
from lockstep.rl.evaluate import evaluate as evaluate_policy
from lockstep.rl.session import ProgressHook, Result, Session
from lockstep.rl.video import record_episodes
from lockstep.runs.config_json import config_from_json
from lockstep.runs.directory import RunDirectory

IMPORTED = "imported"
"""Folder of a run directory with the network that its policy began from."""


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
    on_event: language.EventHook | None = None,
    policy: Any = None,
    **overrides: Any,
) -> Run:
    """Train and write a run directory.

    Args:
        recipe: a recipe's name (`lockstep train --list`) or a complete config.
        out: folder that holds run directories, default `runs/`.
        name: of the run, default the recipe's.
        recipe_name: what a config was made from, for the record.
        on_progress: called with (step, total_steps, metrics) at every metric line.
        on_event: called with (step, text) when something happened that a person should know, such as a lost worker.
        policy: a network in memory to begin from: a model of Keras, or what `lockstep.interop.load` returns (of a file or a
            folder, `network__imported` has the path).
        overrides: fields of the config by dotted or double-underscore name, e.g. `run__seed=3`, or by their own name
            where only one part of the config has it, e.g. `total_steps=20_000`.

    Raises:
        ConfigError: unknown recipe or field, or a value that cannot be run.
    """
    config = recipe_config(recipe) if isinstance(recipe, str) else recipe
    for key, value in overrides.items():
        config = override(config, key.replace("__", "."), value)
    validated(config)
    if policy is not None and "network" not in config.__dict__:
        raise ConfigError(f"policy= is for control policies; {type(config).__name__} trains a language model")
    imported = read_network(config) if policy is None else graph_of(policy)
    label = recipe if isinstance(recipe, str) else recipe_name or type(config).__name__.removesuffix("Config").lower()
    directory = RunDirectory.create(
        Path(out) if out is not None else runs_root(),
        name or label,
        config,
        config.run.seed,
        recipe=label,
        kernels=json.dumps(kernels.describe()),
    )
    if imported is not None:
        save_graph(imported, directory.path / IMPORTED)
    return _run(config, directory, on_progress, on_event, resume=False)


def policy_from(
    network: Any,
    obs_space: Any = None,
    action_space: Any = None,
    *,
    outputs: Literal["logits", "q", "mean", "parameters", "action", "latent", ""] = "",
    output: str = "",
    value: str = "",
    critic: bool = False,
    frame_stack: int = 1,
    config: NetworkConfig | None = None,
) -> Policy:
    """A policy of ours around a network of another framework, its weights taken over.

    Args:
        network: an imported module, a model of Keras, or a file that `lockstep.interop.load` reads.
        obs_space, action_space: Gymnasium's spaces or ours; None where the file says them (Stable-Baselines).
        outputs: what the network yields: logits (or probabilities) of discrete actions, action values, the mean of a normal
            distribution, parameters (mean and log-std) of one squashed by tanh, the action itself in (-1, 1), or features for
            dense layers of ours (`config.hidden_sizes`). Empty: what the file says.
        output, value: names of the outputs to use, where the first that fits is not the one.
        critic: the policy also gives the state's value: the network's, where an output has one column, else one of ours.
        frame_stack: frames that the policy joins; the steps of a network that reads sequences.
        config: of layers that are ours.

    Raises:
        ConfigError: spaces, network and `outputs` do not fit each other.
        FormatError: the file cannot be read.
    """
    from lockstep.interop.readers import load as load_network

    module = load_network(network) if isinstance(network, Path | str) else graph_of(network)
    about = module.graph.about
    obs_space = _space(obs_space, about.obs_space, leaf_space, "obs_space")
    action_space = _space(action_space, about.action_space, action_space_of, "action_space")
    spec = PolicySpec(
        obs_space=obs_space,
        action_space=action_space,
        head=_head(outputs, about.head, action_space),
        network=config or NetworkConfig(),
        critic=critic,
        frame_stack=frame_stack,
    )
    preprocess = Preprocess(spec.obs_space, normalise=False, frame_stack=frame_stack)
    imported = imported_network(
        module,
        preprocess.features,
        head=spec.head,
        num_params=build_head(spec).num_params,
        critic=critic,
        frame_stack=frame_stack,
        role="encoder" if outputs == "latent" else "policy",
        output=output,
        value=value,
    )
    return Policy(dataclasses.replace(spec, imported=imported))


def graph_of(network: Any) -> GraphModule:
    """A network in memory as ours.

    Raises:
        ConfigError: neither what `lockstep.interop.load` returns nor a model of Keras.
    """
    if isinstance(network, GraphModule):
        return network
    from lockstep.interop.keras.live import from_keras, is_keras_model

    if is_keras_model(network):
        return from_keras(network)
    raise ConfigError(
        f"network is a {type(network).__name__}; expected what lockstep.interop.load returns, a model of Keras, or a file"
    )


def _space(given: Any, told: Any, convert: Any, what: str) -> Space:
    if given is None:
        if told is None:
            raise ConfigError(f"the file does not say its {what}; give one, such as env.{what}")
        return space_from_json(dict(told))
    return given if isinstance(given, Space) else convert(given)  # type: ignore[no-any-return]


def _head(outputs: str, told: str, action_space: Space) -> HeadKind:
    heads: dict[str, HeadKind] = {
        "logits": "categorical",
        "q": "q",
        "mean": "gaussian",
        "parameters": "squashed",
        "action": "deterministic",
    }
    if outputs in heads:
        return heads[outputs]
    if outputs not in ("", "latent"):
        raise ConfigError(unknown_name("outputs", outputs, [*heads, "latent"]))
    if not outputs:
        if told not in heads.values():
            raise ConfigError(f"the file does not say what its outputs are; give outputs=, one of {[*heads, 'latent']}")
        return cast(HeadKind, told)
    return "gaussian" if isinstance(action_space, BoxSpace) else "categorical"


def read_network(config: AlgorithmConfig) -> GraphModule | None:
    """The network that a configuration imports, None if it imports none.

    Raises:
        FormatError: it cannot be read.
    """
    path = config.network.imported if "network" in config.__dict__ else ""
    if not path:
        return None
    from lockstep.interop.readers import load as load_network

    return load_network(path)


def resume(
    path: Path | str, *, on_progress: ProgressHook | None = None, on_event: language.EventHook | None = None
) -> Run:
    """Continue an interrupted run from its newest checkpoint (from the start where there is none).

    Raises:
        CheckpointError: not a run directory, or another process is at work in it.
    """
    directory = RunDirectory.open(Path(path))
    return _run(read_config(directory.path), directory, on_progress, on_event, resume=True)


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
        CheckpointError: missing, damaged, or a run before its first checkpoint.
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


def _run(
    config: AlgorithmConfig,
    directory: RunDirectory,
    on_progress: ProgressHook | None,
    on_event: language.EventHook | None,
    *,
    resume: bool,
) -> Run:
    if (directory.path / IMPORTED).is_dir():
        # The run's own copy: the file it came from may be gone when the run is resumed.
        config = override(config, "network.imported", str(directory.path / IMPORTED))
    session = open_session(config, directory, on_progress, on_event, resume=resume)
    try:
        with directory, session, polite_stop(session):
            result = train_function(type(config).__name__)[1](config, session)
    except (LockstepError, KeyboardInterrupt, OSError) as error:
        is_begun = any(directory.checkpoints_path.glob("step_*"))
        if not (is_begun or session.step or resume):
            shutil.rmtree(directory.path, ignore_errors=True)
        elif is_begun and not isinstance(error, StoppedError):
            error.add_note(
                f"nothing up to its last checkpoint is lost; go on with: lockstep train --resume {directory.path}"
            )
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
        if os.isatty(2):  # not through a stream, which the signal may have interrupted
            os.write(2, b"\nstops when this update is done; once more stops at once\n")

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
