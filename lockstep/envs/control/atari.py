"""ALE games through ALE's own vector environment, with a seed per episode.

ALE resets ended games by itself, with whatever its generators hold. Here each ended game is reset through
`reset_mask` with its episode's seed before the next step, which makes an episode a function of (seed, environment,
episode, actions): comparable across runs, and restorable by replay. One frame per observation; the policy stacks.
"""

# N environments

from __future__ import annotations

import os
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode

from lockstep.core.errors import ConfigError
from lockstep.core.extras import require
from lockstep.envs.control.config import EnvConfig
from lockstep.envs.control.episodes import Replay, episode_seed
from lockstep.envs.control.single import find_spec


class AtariVectorEnv(gym.vector.VectorEnv):
    """N games of one kind in DISABLED mode. Observations [N, 1, 84, 84] uint8, one grey frame."""

    def __init__(self, config: EnvConfig) -> None:
        vector_env: Any = require("ale_py.vector_env", extra="atari")
        game: str = find_spec(config.id).kwargs["game"]
        atari = config.atari
        extra: dict[str, Any] = dict(config.kwargs)
        threads = config.num_threads or min(os.cpu_count() or 1, config.num_envs)
        # Without a time limit of the user's, ALE's own limit of 108,000 frames (30 minutes of play) holds.
        limit = 108_000 if config.time_limit is None else config.time_limit * atari.frame_skip
        try:
            self.inner = vector_env.AtariVectorEnv(
                game,
                config.num_envs,
                num_threads=threads,
                max_num_frames_per_episode=limit,
                repeat_action_probability=atari.sticky,
                full_action_space=atari.full_action_space,
                stack_num=1,
                frameskip=atari.frame_skip,
                noop_max=atari.noop_max,
                # ALE's own episodic_life starts a new game at each lost life, so only the first would be played.
                life_loss_info=atari.episodic_life,
                reward_clipping=False,
                use_fire_reset=False,
                **extra,
            )
        except TypeError as error:
            raise ConfigError(f"{config.id} with kwargs {config.kwargs} could not be made: {error}") from error
        self.num_envs = config.num_envs
        self.metadata = {"autoreset_mode": AutoresetMode.DISABLED}
        self.single_observation_space = self.inner.single_observation_space
        self.single_action_space = self.inner.single_action_space
        self.observation_space, self.action_space = self.inner.observation_space, self.inner.action_space
        self._last = np.zeros(self.observation_space.shape or (), np.uint8)
        self._is_episodic_life = atari.episodic_life
        self._goes_on_N = np.zeros(self.num_envs, np.bool_)
        self._seed = 0
        self._episode_N = np.full(self.num_envs, -1, np.int64)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Reset all games, or those of `options["reset_mask"]`, to the seeds of their next episodes."""
        if seed is not None:
            self._seed = seed
            self._episode_N[:] = -1
        mask_N = (options or {}).get("reset_mask", np.ones(self.num_envs, np.bool_))
        if seed is None:
            mask_N = mask_N & ~self._goes_on_N  # a lost life ends the episode, not the game
        self._episode_N += mask_N
        return (self._start(mask_N) if mask_N.any() else self._last), {}

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """`frame_skip` frames of every game."""
        obs, reward_N, terminated_N, truncated_N, infos = self.inner.step(actions)
        terminated_N, truncated_N = terminated_N.astype(np.bool_), truncated_N.astype(np.bool_)
        if self._is_episodic_life:
            self._goes_on_N = terminated_N & ~truncated_N & (infos["lives"] > 0)
        self._last = obs
        return obs, reward_N, terminated_N, truncated_N, {}

    def restore(self, base_seed: int, plans: list[Replay]) -> tuple[np.ndarray, np.ndarray]:
        """Replay all plans at once, each started so late that all end together."""
        self._seed = base_seed
        self._episode_N = np.array([plan.episode for plan in plans], np.int64)
        length_N = np.array([len(plan.actions) for plan in plans])
        total = int(length_N.max())
        faithful_N = np.ones(self.num_envs, np.bool_)
        obs = self._start(np.ones(self.num_envs, np.bool_))
        for t in range(total):
            starting_N = (total - length_N == t) & (t > 0)
            if starting_N.any():
                self._start(starting_N)
            ahead_N = t - (total - length_N)
            actions = [plan.actions[k] if k >= 0 else 0 for plan, k in zip(plans, ahead_N.tolist(), strict=True)]
            obs, _, terminated_N, truncated_N, _ = self.step(np.array(actions, np.int64))
            faithful_N &= ~((terminated_N | truncated_N) & (ahead_N >= 0))
        fresh_N = ~faithful_N | ((length_N == 0) & (total > 0))
        self._episode_N += ~faithful_N
        if fresh_N.any():
            obs = self._start(fresh_N)
        return obs, faithful_N

    def render(self) -> tuple[np.ndarray, ...]:
        """The last observations as grey pictures; ALE's vector environment has no others."""
        return tuple(np.repeat(frame[0][:, :, None], 3, axis=2) for frame in self._last)

    def close_extras(self, **kwargs: Any) -> None:
        """ALE ends its threads with the object."""
        self.inner.close()

    def _start(self, mask_N: np.ndarray) -> np.ndarray:
        seeds = [episode_seed(self._seed, i, int(self._episode_N[i])) for i in np.flatnonzero(mask_N).tolist()]
        obs, _ = self.inner.reset(seed=np.array(seeds), options={"reset_mask": mask_N})
        self._last = np.asarray(obs)
        return self._last
