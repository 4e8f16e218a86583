"""`make_env`: from an `EnvConfig` to a `Stepper`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import gymnasium as gym
from gymnasium.vector import AutoresetMode

from lockstep.core.errors import ConfigError, EnvError, unknown_name
from lockstep.envs.control.atari import AtariVectorEnv
from lockstep.envs.control.batch import BatchSim, BatchVectorEnv
from lockstep.envs.control.cartpole import CartPoleSim
from lockstep.envs.control.config import EnvConfig
from lockstep.envs.control.envpool_form import EnvPoolVectorEnv
from lockstep.envs.control.episodes import MaskSource, SeededEpisodes, broken, episode_seed, find_mask
from lockstep.envs.control.mujoco_sim import TASKS, MujocoSim
from lockstep.envs.control.restore import ArrayRestore, ArrayState, NoRestore, ReplayRestore, Restorer
from lockstep.envs.control.serial import SerialVectorEnv
from lockstep.envs.control.single import find_spec, find_target, is_target, make_single, not_made
from lockstep.envs.control.stepper import Stepper
from lockstep.envs.control.workers import WorkerVectorEnv

ATARI = "ALE/"

MODES = {
    "next_step": AutoresetMode.NEXT_STEP,
    "same_step": AutoresetMode.SAME_STEP,
    "disabled": AutoresetMode.DISABLED,
}


def make_env(config: EnvConfig, *, seed: int) -> Stepper:
    """Build `config.num_envs` copies and reset them under `seed`.

    Except in EnvPool, an episode is a function of (seed, environment index, episode number, actions).

    Args:
        config: what to build.
        seed: base seed, at least 0.

    Returns:
        A `Stepper` whose `obs` is the first observation; `reset` again if you want another seed.

    Raises:
        EnvError: unknown id, broken environment, unsupported spaces.
        MissingExtraError: the environment's package is not installed.
        ConfigError: a vectoriser that this environment does not have.
    """
    if seed < 0:
        raise ConfigError(f"seed={seed} must be 0 or more")
    vectoriser, why = resolve_vectoriser(config)
    stepper = BUILDERS[vectoriser](config)
    stepper.about |= {"id": config.id, "vectoriser": vectoriser, "why": why, "autoreset_asked": config.autoreset}
    stepper.reset(seed)
    return stepper


def rendering(config: EnvConfig) -> EnvConfig:
    """The same environment, one copy, in a form whose `Stepper.render` gives pictures (ALE: its observations)."""
    if config.id.startswith(ATARI):
        return replace(config, num_envs=1, vectoriser="native")
    return replace(config, num_envs=1, vectoriser="sync", kwargs={**config.kwargs, "render_mode": "rgb_array"})


def resolve_vectoriser(config: EnvConfig) -> tuple[str, str]:
    """(vectoriser, why). "auto" follows a fixed rule and measures nothing, so that a run can be repeated.

    Raises:
        ConfigError: the one asked for does not exist for this environment.
    """
    if config.vectoriser == "envpool":
        return "envpool", "asked for"  # EnvPool has environments that Gymnasium does not know
    native = find_native(config)
    if config.vectoriser == "native" and native is None:
        raise ConfigError(
            f"vectoriser='native': {config.id} has no native vector environment; use 'sync', 'async' or 'auto'. "
            f"Native: {', '.join(sorted(NATIVE))}, {ATARI}..., and any gymnasium.vector.VectorEnv by import path"
        )
    if config.vectoriser in ("sync", "async") and native is not None and native.is_only_form:
        raise ConfigError(f"vectoriser={config.vectoriser!r}: {config.id} is stepped natively; use 'auto' or 'native'")
    if config.vectoriser != "auto":
        return config.vectoriser, "asked for"
    if native is None:
        return "sync", "no native form; worker processes cost more than they save on cheap environments"
    if config.num_envs < native.min_envs:
        return "sync", f"the native form pays from {native.min_envs} environments on"
    return "native", "the environment has a native vector form"


def find_native(config: EnvConfig) -> NativeForm | None:
    """The environment's native vector form, None if it has none."""
    if config.id.startswith(ATARI):
        return NativeForm(_atari, is_only_form=True)
    if is_target(config.id):
        target = find_target(config.id)
        if isinstance(target, type) and issubclass(target, gym.vector.VectorEnv):
            return NativeForm(_user_vector, is_only_form=True)
        is_sim = isinstance(target, type) and issubclass(target, BatchSim)
        return NativeForm(_user_sim, is_only_form=True) if is_sim else None
    if config.id in NATIVE:
        return NATIVE[config.id]
    return NativeForm(_registered_vector) if find_spec(config.id).vector_entry_point is not None else None


def _sync(config: EnvConfig) -> Stepper:
    probe = probe_single(config)
    env = SerialVectorEnv(seeded_makers(config, probe), MODES[config.autoreset])
    return _noted(Stepper(env, mode=env.mode, restorer=ReplayRestore(env), clip_reward=config.clip_reward), probe)


def _async(config: EnvConfig) -> Stepper:
    probe = probe_single(config)
    env = WorkerVectorEnv(
        seeded_makers(config, probe),
        MODES[config.autoreset],
        probe.spaces,
        num_workers=config.num_workers,
        deadline_s=config.deadline_s,
    )
    return _noted(Stepper(env, mode=env.mode, restorer=ReplayRestore(env), clip_reward=config.clip_reward), probe)


def _noted(stepper: Stepper, probe: Probe) -> Stepper:
    stepper.about["dropped"] = list(probe.dropped)
    return stepper


@dataclass(frozen=True)
class Probe:
    """What one throw-away environment shows: masks outside the observation appear only after a reset."""

    mask: MaskSource | None
    spaces: tuple[gym.Space[Any], gym.Space[Any]]
    """(observation, action) spaces of a seeded environment."""
    dropped: tuple[str, ...]
    """Observation parts that have no array form."""


def probe_single(config: EnvConfig) -> Probe:
    """Make one environment, reset it, look, close it."""
    env = make_single(config)
    try:
        mask = None
        if not isinstance(env.action_space, gym.spaces.Box):
            try:
                _, info = env.reset(seed=episode_seed(0, 0, 0))
            except Exception as error:
                raise broken(0, config.id, "reset", error) from error
            mask = find_mask(env, info)
        seeded = SeededEpisodes(env, 0, mask, env_id=config.id)
        return Probe(mask, (seeded.observation_space, seeded.action_space), tuple(seeded.codec.dropped))
    finally:
        env.close()


def seeded_makers(config: EnvConfig, probe: Probe | None = None) -> list[Callable[[], SeededEpisodes]]:
    """One picklable constructor per environment."""
    mask = (probe_single(config) if probe is None else probe).mask
    return [partial(_make_seeded, config, i, mask) for i in range(config.num_envs)]


def _make_seeded(config: EnvConfig, index: int, mask: MaskSource | None) -> SeededEpisodes:
    return SeededEpisodes(make_single(config), index, mask, env_id=config.id)


def _envpool(config: EnvConfig) -> Stepper:
    env = EnvPoolVectorEnv(config)
    restorer = NoRestore("EnvPool keeps its state and generators to itself")
    return Stepper(env, mode=AutoresetMode.NEXT_STEP, restorer=restorer, clip_reward=config.clip_reward)


def _native(config: EnvConfig) -> Stepper:
    form = find_native(config)
    assert form is not None
    return form.build(config)


def _cartpole(config: EnvConfig) -> Stepper:
    known = {"sutton_barto_reward"}
    for key in config.kwargs:
        if key not in known:
            raise ConfigError(unknown_name("argument of native CartPole", key, known) + "; or use vectoriser='sync'")
    return batch_stepper(config, CartPoleSim(config.num_envs, bool(config.kwargs.get("sutton_barto_reward", False))))


def _atari(config: EnvConfig) -> Stepper:
    env = AtariVectorEnv(config)
    restorer: Restorer = ReplayRestore(env)
    if config.atari.episodic_life:
        restorer = NoRestore("with episodic_life an episode starts in the middle of a game")
    return Stepper(env, mode=AutoresetMode.DISABLED, restorer=restorer, clip_reward=config.clip_reward)


def _user_vector(config: EnvConfig) -> Stepper:
    target = find_target(config.id)
    kwargs: dict[str, Any] = dict(config.kwargs)
    if "autoreset_mode" in inspect.signature(target).parameters:
        kwargs["autoreset_mode"] = MODES[config.autoreset]
    if config.time_limit is not None:
        raise ConfigError(f"time_limit: {config.id} is a vector environment, which keeps its own limit; use its kwargs")
    try:
        env = target(num_envs=config.num_envs, **kwargs)
    except Exception as error:
        raise not_made(config, error) from error
    return vector_stepper(env, config)


def _user_sim(config: EnvConfig) -> Stepper:
    try:
        sim: BatchSim = find_target(config.id)(config.num_envs, **config.kwargs)
    except Exception as error:
        raise not_made(config, error) from error
    return batch_stepper(config, sim)


def _registered_vector(config: EnvConfig) -> Stepper:
    limit: dict[str, Any] = {} if config.time_limit is None else {"max_episode_steps": config.time_limit}
    kwargs: dict[str, Any] = {**config.kwargs, **limit}
    env = gym.make_vec(config.id, num_envs=config.num_envs, vectorization_mode="vector_entry_point", **kwargs)
    return vector_stepper(env, config)


def vector_stepper(env: gym.vector.VectorEnv, config: EnvConfig) -> Stepper:
    """Stepper over any `gymnasium.vector.VectorEnv` that declares its autoreset mode; restorable if it is an
    `ArrayState`.

    Raises:
        EnvError: no `metadata["autoreset_mode"]`.
    """
    mode = env.metadata.get("autoreset_mode")
    if not isinstance(mode, AutoresetMode):
        raise EnvError(
            f"{config.id}: metadata['autoreset_mode'] is {mode!r}; a vector environment must declare a "
            "gymnasium.vector.AutoresetMode there, or its transitions cannot be told from resets"
        )
    restorer: Restorer = NoRestore("the vector environment is no lockstep.envs.control.restore.ArrayState")
    if isinstance(env, ArrayState):
        restorer = ArrayRestore(env)
    return Stepper(env, mode=mode, restorer=restorer, clip_reward=config.clip_reward)


def batch_stepper(config: EnvConfig, sim: BatchSim) -> Stepper:
    """Stepper over a `BatchSim` with the registered time limit, or the one of the config."""
    limit = config.time_limit
    if limit is None and ":" not in config.id:
        limit = find_spec(config.id).max_episode_steps
    env = BatchVectorEnv(sim, mode=MODES[config.autoreset], time_limit=limit)
    return Stepper(env, mode=env.mode, restorer=ArrayRestore(env), clip_reward=config.clip_reward)


def _mujoco(config: EnvConfig) -> Stepper:
    threads = config.num_threads or 1
    return batch_stepper(config, MujocoSim(make_single(config), TASKS[config.id], config.num_envs, threads))


BUILDERS: dict[str, Callable[[EnvConfig], Stepper]] = {
    "sync": _sync,
    "async": _async,
    "envpool": _envpool,
    "native": _native,
}


@dataclass(frozen=True)
class NativeForm:
    """A native vector environment and the fewest copies from which it is faster than the serial loop (measured)."""

    build: Callable[[EnvConfig], Stepper]
    min_envs: int = 1
    is_only_form: bool = False
    """There is no single environment to step by sync or async."""


NATIVE = {
    "CartPole-v0": NativeForm(_cartpole, min_envs=4),
    "CartPole-v1": NativeForm(_cartpole, min_envs=4),
    **dict.fromkeys(TASKS, NativeForm(_mujoco)),
}
