"""Native vector environments: physics over N rows at once, episodes and seeds exactly as for single environments."""

# N environments

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space

from lockstep.envs.control.episodes import episode_seed
from lockstep.envs.control.restore import ArrayState

Outcome = tuple[np.ndarray, np.ndarray, np.ndarray]
"""(reward_N float64, terminated_N bool, truncated_N bool: cut off by the simulator itself, not by a time limit)."""


class BatchSim(ABC):
    """N copies of one simulator, stepped together.

    A row must behave bit for bit as the single environment does: `reset_rows` takes the seeds that `Env.reset` would.
    """

    num_envs: int
    observation_space: gym.Space[Any]
    action_space: gym.Space[Any]

    @abstractmethod
    def reset_rows(self, rows: list[int], seeds: list[int]) -> None:
        """Start an episode in each of `rows`."""

    @abstractmethod
    def step(self, actions: np.ndarray) -> Outcome:
        """One step of every row. `actions` are in the space's own dtype. Rewards and terminations are fresh arrays."""

    @abstractmethod
    def observe(self) -> np.ndarray:
        """Observations of every row, a fresh array."""

    @abstractmethod
    def get_state(self) -> dict[str, np.ndarray]:
        """Copies of every array that decides the future."""

    @abstractmethod
    def set_state(self, state: dict[str, Any]) -> None:
        """Inverse of `get_state`."""

    @abstractmethod
    def close(self) -> None:
        """Release threads."""


class BatchVectorEnv(gym.vector.VectorEnv, ArrayState):
    """A `BatchSim` as a `gymnasium.vector.VectorEnv` in any autoreset mode, with per-episode seeds and a time limit."""

    def __init__(self, sim: BatchSim, *, mode: AutoresetMode, time_limit: int | None) -> None:
        self.sim, self.mode, self.num_envs = sim, mode, sim.num_envs
        self.metadata = {"autoreset_mode": mode}
        self.single_observation_space, self.single_action_space = sim.observation_space, sim.action_space
        self.observation_space = batch_space(sim.observation_space, sim.num_envs)
        self.action_space = batch_space(sim.action_space, sim.num_envs)
        self._limit = np.iinfo(np.int64).max if time_limit is None else time_limit
        self._seed = 0
        self._episode = np.full(sim.num_envs, -1, np.int64)
        self._steps = np.zeros(sim.num_envs, np.int64)
        self._pending = np.zeros(sim.num_envs, np.bool_)

    def reset(
        self, *, seed: int | list[int] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Reset all rows, or those of `options["reset_mask"]`. `seed` is the base seed of all."""
        if seed is not None:
            self._seed = seed[0] if isinstance(seed, list) else seed
            self._episode[:] = -1
        mask = (options or {}).get("reset_mask")
        self._start(np.arange(self.num_envs) if mask is None else np.flatnonzero(mask))
        return self.sim.observe(), {}

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """One step of every row. In SAME_STEP mode `final_obs` holds the true next observation of all rows."""
        reward_N, terminated_N, cut_N = self.sim.step(actions)
        self._steps += 1
        truncated_N = cut_N | (self._steps >= self._limit)
        if self.mode is AutoresetMode.NEXT_STEP and np.count_nonzero(self._pending):
            rows = np.flatnonzero(self._pending)
            self._start(rows)
            reward_N[rows], terminated_N[rows], truncated_N[rows] = 0.0, False, False
        obs = self.sim.observe()
        infos: dict[str, Any] = {}
        ended_N = terminated_N | truncated_N
        if self.mode is AutoresetMode.NEXT_STEP:
            self._pending = ended_N
        elif self.mode is AutoresetMode.SAME_STEP and np.count_nonzero(ended_N):
            infos["final_obs"] = obs
            self._start(np.flatnonzero(ended_N))
            obs = self.sim.observe()
        return obs, reward_N, terminated_N, truncated_N, infos

    def get_state(self) -> dict[str, Any]:
        """Simulator arrays, seeds and step counts."""
        counters = {"episode": self._episode.copy(), "steps": self._steps.copy(), "pending": self._pending.copy()}
        return {**self.sim.get_state(), **counters, "base_seed": self._seed}

    def set_state(self, state: dict[str, Any]) -> None:
        """Inverse."""
        self._seed = int(state["base_seed"])
        self._episode, self._steps = np.array(state["episode"]), np.array(state["steps"])
        self._pending = np.array(state["pending"])
        self.sim.set_state(state)

    def close_extras(self, **kwargs: Any) -> None:
        """Release threads."""
        self.sim.close()

    def _start(self, rows: np.ndarray) -> None:
        self._episode[rows] += 1
        self._steps[rows] = 0
        self._pending[rows] = False
        numbers = rows.tolist()
        self.sim.reset_rows(numbers, [episode_seed(self._seed, i, int(self._episode[i])) for i in numbers])
