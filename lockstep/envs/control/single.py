"""One environment from an id or an import path, and the error that says how to get it."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable
from copy import deepcopy
from types import ModuleType
from typing import Any

import gymnasium as gym

from lockstep.core.errors import EnvError
from lockstep.core.extras import require
from lockstep.envs.control.config import EnvConfig

PACKAGES = {
    "ALE/": ("ale_py", "atari"),
    "MiniGrid-": ("minigrid", "minigrid"),
    "BabyAI-": ("minigrid", "minigrid"),
    "MinAtar/": ("minatar", "minatar"),
}
"""Prefix of an id -> (package that registers it, extra that brings it)."""

ENTRY_EXTRAS = {"gymnasium.envs.box2d": ("Box2D", "box2d"), "gymnasium.envs.mujoco": ("mujoco", "mujoco")}
"""Entry points inside Gymnasium that need a package -> (package, extra)."""


def make_single(config: EnvConfig) -> gym.Env:
    """One environment with its time limit; without the checks that cost time on every step.

    Raises:
        EnvError: unknown id or import path, or the constructor failed.
        MissingExtraError: its package is not installed.
    """
    if is_target(config.id):
        return _from_target(config, find_target(config.id))
    spec = find_spec(config.id)
    for prefix, (package, extra) in ENTRY_EXTRAS.items():
        if str(spec.entry_point).startswith(prefix):
            require(package, extra=extra)
    spec = deepcopy(spec)
    # The stepper never steps before a reset, so the wrapper that checks this would only cost time.
    spec.order_enforce = False
    try:
        return gym.make(spec, max_episode_steps=config.time_limit, disable_env_checker=True, **config.kwargs)
    except Exception as error:
        raise not_made(config, error) from error


def not_made(config: EnvConfig, error: Exception) -> EnvError:
    """The error of a constructor that failed, to be raised from `error`; it may be any, for the constructor is a user's."""
    cause = str(error) if isinstance(error, (TypeError, gym.error.Error)) else f"{type(error).__name__}: {error}"
    return EnvError(f"{config.id} with kwargs {config.kwargs} could not be made: {cause}")


def register(env_id: str) -> None:
    """Import the package that registers `env_id`, if it is a known one."""
    for prefix, (package, extra) in PACKAGES.items():
        if env_id.startswith(prefix):
            module = require(package, extra=extra)
            if package == "minatar" and env_id not in gym.registry:
                require("minatar.gym", extra=extra).register_envs()
            elif env_id not in gym.registry:
                gym.register_envs(module)


def find_spec(env_id: str) -> gym.envs.registration.EnvSpec:
    """Registered spec of `env_id`.

    Raises:
        EnvError: unknown id, with the closest registered ones.
    """
    module, _, name = env_id.rpartition(":")
    if module:
        import_module(module, env_id)
    register(name)
    if name in gym.registry:
        return gym.registry[name]
    near = difflib.get_close_matches(name, list(gym.registry), n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise EnvError(
        f"unknown environment {env_id!r}; {hint}For your own, register it with gymnasium or give an import path "
        "'package.module:callable_or_class'. Extras bring more: box2d, mujoco, atari (ALE/...), minigrid, minatar"
    )


def is_target(env_id: str) -> bool:
    """Whether it is the import path of a callable; else it is a Gymnasium id, which may name the module that registers it
    ("my_package:MyEnv-v0"), as `gymnasium.make` takes it too.

    Raises:
        EnvError: no such module.
    """
    module, _, name = env_id.rpartition(":")
    return bool(module) and (name in vars(import_module(module, env_id)) or name not in gym.registry)


def import_module(name: str, env_id: str) -> ModuleType:
    """The module that an environment's id or path names.

    Raises:
        EnvError: it cannot be imported.
    """
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise EnvError(f"environment {env_id!r}: cannot import {name!r} ({type(error).__name__}: {error})") from error


def find_target(path: str) -> Callable[..., Any]:
    """The callable behind "package.module:name".

    Raises:
        EnvError: no such module or name.
    """
    module_name, _, name = path.rpartition(":")
    names = vars(import_module(module_name, path))
    if name not in names or not callable(names[name]):
        near = difflib.get_close_matches(name, [key for key, value in names.items() if callable(value)], n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise EnvError(f"environment {path!r}: {module_name!r} has no callable {name!r}{hint}")
    target: Callable[..., Any] = names[name]
    return target


def _from_target(config: EnvConfig, target: Callable[..., Any]) -> gym.Env:
    try:
        env = target(**config.kwargs)
    except Exception as error:
        raise not_made(config, error) from error
    if not isinstance(env, gym.Env):
        raise EnvError(f"{config.id} gave a {type(env).__name__}; expected a gymnasium.Env")
    return env if config.time_limit is None else gym.wrappers.TimeLimit(env, config.time_limit)
