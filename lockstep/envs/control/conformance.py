"""An environment whose observations say which episode and step they belong to, to check that nothing is mixed up.

Observation: (step, episode length, ends by termination, 1000 * last action). Lengths and kinds of ending are drawn from
the reset seed, so that episodes of all kinds end at different times; a wrong bootstrap, a dummy row taken for a
transition or a final observation lost in a reset shows in the numbers.
"""

# N environments

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np

from lockstep.envs.control.batch import BatchSim, Outcome

OBSERVATION_SPACE = gym.spaces.Box(-1e6, 1e6, (4,), np.float32)
NUM_ACTIONS = 3


def _plan(seed: int, longest: int) -> tuple[int, bool]:
    """(episode length, whether it ends by termination) of a reset seed; lengths start at 1."""
    return 1 + seed % longest, seed // longest % 2 == 0


class CounterEnv(gym.Env):
    """Counts its steps. Reward: the step number, plus the action / 10."""

    def __init__(self, longest: int = 7) -> None:
        self.observation_space, self.action_space = OBSERVATION_SPACE, gym.spaces.Discrete(NUM_ACTIONS)
        self.longest, self.count, self.length, self.terminates, self.last = longest, 0, 1, True, 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Draw the episode's length and ending from `seed`."""
        super().reset(seed=seed)
        self.count, self.last = 0, 0
        self.length, self.terminates = _plan(0 if seed is None else seed, self.longest)
        return self._obs(), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Count."""
        self.count += 1
        self.last = int(action)
        ended = self.count >= self.length
        reward = self.count + self.last / 10
        return self._obs(), reward, ended and self.terminates, ended and not self.terminates, {}

    def _obs(self) -> np.ndarray:
        return np.array([self.count, self.length, self.terminates, 1000 * self.last], np.float32)


class CounterSim(BatchSim):
    """`CounterEnv` over N rows."""

    def __init__(self, num_envs: int, longest: int = 7) -> None:
        self.num_envs, self.longest = num_envs, longest
        self.observation_space, self.action_space = OBSERVATION_SPACE, gym.spaces.Discrete(NUM_ACTIONS)
        self._obs_N4 = np.zeros((num_envs, 4), np.float32)

    def reset_rows(self, rows: list[int], seeds: list[int]) -> None:
        """Draw lengths and endings."""
        for i, seed in zip(rows, seeds, strict=True):
            length, terminates = _plan(seed, self.longest)
            self._obs_N4[i] = (0, length, terminates, 0)

    def step(self, actions: np.ndarray) -> Outcome:
        """Count."""
        obs = self._obs_N4
        obs[:, 0] += 1
        obs[:, 3] = 1000 * actions
        ended_N = obs[:, 0] >= obs[:, 1]
        terminates_N = obs[:, 2] == 1
        return obs[:, 0].astype(np.float64) + actions / 10, ended_N & terminates_N, ended_N & ~terminates_N

    def observe(self) -> np.ndarray:
        """Copies."""
        return self._obs_N4.copy()

    def get_state(self) -> dict[str, np.ndarray]:
        """Everything."""
        return {"obs_N4": self._obs_N4.copy()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Inverse."""
        self._obs_N4[:] = state["obs_N4"]

    def close(self) -> None:
        """Nothing to release."""
