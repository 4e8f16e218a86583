"""`make_env`: from an `EnvConfig` to a `Stepper`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import gymnasium as gym
from gymnasium.vector import AutoresetMode

from lockstep.core.errors import ConfigError, unknown_name
from lockstep.envs.control.batch import BatchSim, BatchVectorEnv
from lockstep.envs.control.cartpole import CartPoleSim
from lockstep.envs.control.config import EnvConfig
from lockstep.envs.control.episodes import MaskSource, SeededEpisodes, episode_seed, find_mask
from lockstep.envs.control.mujoco_sim import TASKS, MujocoSim
from lockstep.envs.control.restore import ArrayRestore, ReplayRestore
from lockstep.envs.control.serial import SerialVectorEnv
from lockstep.envs.control.single import find_spec, make_single
from lockstep.envs.control.stepper import Stepper
from lockstep.envs.control.workers import WorkerVectorEnv

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


def resolve_vectoriser(config: EnvConfig) -> tuple[str, str]:
    """(vectoriser, why). "auto" follows a fixed rule and measures nothing, so that a run can be repeated.

    Raises:
        ConfigError: the one asked for does not exist for this environment.
    """
    native = find_native(config)
    if config.vectoriser == "native" and native is None:
        raise ConfigError(
            f"vectoriser='native': {config.id} with these settings has no native vector environment; "
            f"use 'sync', 'async' or 'auto'. Native: {', '.join(sorted(NATIVE))}"
        )
    if config.vectoriser != "auto":
        return config.vectoriser, "asked for"
    if native is not None:
        return "native", "the environment has its own batched code"
    return "sync", "no native code; worker processes cost more than they save on cheap environments"


def find_native(config: EnvConfig) -> Callable[[EnvConfig], Stepper] | None:
    """Builder of the environment's native vector form under these settings, None if there is none."""
    return NATIVE.get(config.id)


def _sync(config: EnvConfig) -> Stepper:
    env = SerialVectorEnv(seeded_makers(config), MODES[config.autoreset])
    return Stepper(env, mode=env.mode, restorer=ReplayRestore(env), clip_reward=config.clip_reward)


def _async(config: EnvConfig) -> Stepper:
    makers = seeded_makers(config)
    probe = makers[0]()
    spaces = (probe.observation_space, probe.action_space)
    probe.close()
    env = WorkerVectorEnv(
        makers, MODES[config.autoreset], spaces, num_workers=config.num_workers, deadline_s=config.deadline_s
    )
    return Stepper(env, mode=env.mode, restorer=ReplayRestore(env), clip_reward=config.clip_reward)


def seeded_makers(config: EnvConfig) -> list[Callable[[], SeededEpisodes]]:
    """One picklable constructor per environment."""
    mask = _probe_mask(config)
    return [partial(_make_seeded, config, i, mask) for i in range(config.num_envs)]


def _make_seeded(config: EnvConfig, index: int, mask: MaskSource | None) -> SeededEpisodes:
    return SeededEpisodes(make_single(config), index, mask)


def _probe_mask(config: EnvConfig) -> MaskSource | None:
    """Masks outside the observation show only after a reset, and only discrete actions have them."""
    env = make_single(config)
    try:
        if isinstance(env.action_space, gym.spaces.Box):
            return None
        _, info = env.reset(seed=episode_seed(0, 0, 0))
        return find_mask(env, info)
    finally:
        env.close()


def _native(config: EnvConfig) -> Stepper:
    build = find_native(config)
    assert build is not None
    return build(config)


def _cartpole(config: EnvConfig) -> Stepper:
    known = {"sutton_barto_reward"}
    for key in config.kwargs:
        if key not in known:
            raise ConfigError(unknown_name("argument of native CartPole", key, known) + "; or use vectoriser='sync'")
    return batch_stepper(config, CartPoleSim(config.num_envs, bool(config.kwargs.get("sutton_barto_reward", False))))


def batch_stepper(config: EnvConfig, sim: BatchSim) -> Stepper:
    """Stepper over a `BatchSim` with the registered time limit, or the one of the config."""
    limit = config.time_limit or find_spec(config.id).max_episode_steps
    env = BatchVectorEnv(sim, mode=MODES[config.autoreset], time_limit=limit)
    return Stepper(env, mode=env.mode, restorer=ArrayRestore(env), clip_reward=config.clip_reward)


def _mujoco(config: EnvConfig) -> Stepper:
    threads = config.num_threads or 1
    return batch_stepper(config, MujocoSim(make_single(config), TASKS[config.id], config.num_envs, threads))


BUILDERS: dict[str, Callable[[EnvConfig], Stepper]] = {"sync": _sync, "async": _async, "native": _native}
NATIVE: dict[str, Callable[[EnvConfig], Stepper]] = {"CartPole-v0": _cartpole, "CartPole-v1": _cartpole}
NATIVE |= dict.fromkeys(TASKS, _mujoco)
