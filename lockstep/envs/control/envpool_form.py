"""EnvPool as a Gymnasium vector environment: C++ environments, NEXT_STEP autoreset, not restorable.

EnvPool seeds each environment once, when the pool is made, so `reset(seed)` makes a new pool; later episodes go on
with the environment's own generator.
"""

from __future__ import annotations

import os
import warnings
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode

from lockstep.core.errors import EnvError, unknown_name
from lockstep.core.extras import require
from lockstep.envs.control.config import EnvConfig
from lockstep.envs.control.episodes import episode_seed

INFO_KEYS = ("action_mask",)


class EnvPoolVectorEnv(gym.vector.VectorEnv):
    """`envpool.make(..., env_type="gymnasium")` behind Gymnasium's vector API."""

    def __init__(self, config: EnvConfig) -> None:
        self._envpool = require("envpool", extra="envpool")
        self._id = config.id.removeprefix("ALE/")
        known = self._envpool.list_all_envs()
        if self._id not in known:
            near = [name for name in known if name.startswith(self._id[:4])] or ["CartPole-v1"]
            raise EnvError(f"EnvPool: {unknown_name('environment', self._id, near[:8])}; or use vectoriser='auto'")
        self.num_envs = config.num_envs
        self._options: dict[str, Any] = {"num_envs": config.num_envs, **config.kwargs}
        self._options["num_threads"] = config.num_threads or min(os.cpu_count() or 1, config.num_envs)
        self._limit = config.time_limit
        self._length_N = np.zeros(config.num_envs, np.int64)
        if config.time_limit is not None:
            self._options["max_episode_steps"] = config.time_limit
        if config.id.startswith("ALE/"):
            atari = config.atari
            self._options |= {
                "stack_num": 1,
                "frame_skip": atari.frame_skip,
                "noop_max": atari.noop_max,
                "episodic_life": atari.episodic_life,
                "repeat_action_probability": atari.sticky,
                "full_action_space": atari.full_action_space,
                "reward_clip": False,
            }
        self.metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}
        self._pool: Any = self._make(0)
        self.single_observation_space = _with_true_bounds(self._pool.observation_space)
        self.single_action_space = self._pool.action_space
        self.observation_space = gym.vector.utils.batch_space(self.single_observation_space, self.num_envs)
        self.action_space = gym.vector.utils.batch_space(self.single_action_space, self.num_envs)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """First episodes under `seed`: a new pool."""
        if seed is not None:
            self._pool = self._make(seed)
        self._length_N[:] = 0
        obs, infos = self._pool.reset()
        return obs, _kept(infos)

    def step(self, actions: np.ndarray) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """One step of every environment.

        Raises:
            EnvError: the environment went on beyond `time_limit`, which some of EnvPool's do not know.
        """
        obs, reward_N, terminated_N, truncated_N, infos = self._pool.step(actions)
        if self._limit is not None:
            self._length_N += 1
            ended_N = terminated_N | truncated_N
            if ((self._length_N >= self._limit) & ~ended_N).any():
                raise EnvError(
                    f"time_limit={self._limit}: EnvPool's {self._id} does not end there; drop the limit, or use another "
                    "vectoriser"
                )
            self._length_N[ended_N] = -1  # the next step resets and is none of the episode
        return obs, reward_N, terminated_N, truncated_N, _kept(infos)

    def close_extras(self, **kwargs: Any) -> None:
        """End the pool's threads."""
        self._pool.close()

    def _make(self, seed: int) -> Any:
        seeds = [episode_seed(seed, i, 0) for i in range(self.num_envs)]
        with warnings.catch_warnings():
            # EnvPool declares float32 spaces with float64 bounds, on which Gymnasium warns.
            warnings.filterwarnings("ignore", message=".*precision lowered by casting")
            pool = self._envpool.make(self._id, env_type="gymnasium", env_seed=seeds, **self._options)
            _ = (pool.observation_space, pool.action_space)
        return pool


def _with_true_bounds(space: gym.Space[Any]) -> gym.Space[Any]:
    """EnvPool writes C++'s smallest positive and largest float where an observation has no bounds."""
    if not isinstance(space, gym.spaces.Box) or space.dtype.kind != "f":
        return space
    limits = np.finfo(np.float32)
    low = np.where(space.low == limits.tiny, -np.inf, space.low).astype(space.dtype)
    high = np.where(space.high == limits.max, np.inf, space.high).astype(space.dtype)
    return gym.spaces.Box(low, high, dtype=space.dtype.type)


def _kept(infos: dict[str, Any]) -> dict[str, Any]:
    return {key: infos[key] for key in INFO_KEYS if key in infos}
