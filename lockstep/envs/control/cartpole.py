"""CartPole over N rows: the equations and the rounding of Gymnasium's `CartPoleEnv` (Barto, Sutton and Anderson 1983).

Gymnasium's own `CartPoleVectorEnv` draws every reset from one generator, so that an episode depends on when the others
end; here each row's episode has its own seed and equals the single environment bit for bit. It is also faster.
"""

# N environments; state rows: cart position, cart velocity, pole angle, pole angular velocity

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.utils import seeding

from lockstep.core.errors import EnvError
from lockstep.envs.control.batch import BatchSim, Outcome

GRAVITY, MASS_CART, MASS_POLE, HALF_LENGTH, FORCE, TAU = 9.8, 1.0, 0.1, 0.5, 10.0, 0.02
MASS = MASS_POLE + MASS_CART
POLE_MOMENT = MASS_POLE * HALF_LENGTH
X_LIMIT, ANGLE_LIMIT = 2.4, 12 * 2 * np.pi / 360


class CartPoleSim(BatchSim):
    """N carts. Reward 1 for every step, or Sutton and Barto's -1 at the fall."""

    def __init__(self, num_envs: int, sutton_barto_reward: bool = False) -> None:
        single: Any = gym.make("CartPole-v1", disable_env_checker=True).unwrapped
        self.num_envs = num_envs
        self.observation_space, self.action_space = single.observation_space, single.action_space
        self._sutton_barto = sutton_barto_reward
        self._state_4N = np.zeros((4, num_envs), np.float64)
        self._never_N = np.zeros(num_envs, np.bool_)
        self._limit_2 = np.array([[X_LIMIT], [ANGLE_LIMIT]])

    def reset_rows(self, rows: list[int], seeds: list[int]) -> None:
        """Uniform in [-0.05, 0.05]."""
        for i, seed in zip(rows, seeds, strict=True):
            self._state_4N[:, i] = seeding.np_random(seed)[0].uniform(low=-0.05, high=0.05, size=(4,))

    def step(self, actions: np.ndarray) -> Outcome:
        """One Euler step of 20 ms."""
        if ((actions < 0) | (actions > 1)).any():
            raise EnvError(f"CartPole takes actions 0 and 1, got {actions.tolist()}")
        state_4N = self._state_4N
        angle_N, spin_N = state_4N[2], state_4N[3]
        force_N = np.where(actions == 1, FORCE, -FORCE)
        cos_N, sin_N = np.cos(angle_N), np.sin(angle_N)
        temp_N = (force_N + POLE_MOMENT * (spin_N * spin_N) * sin_N) / MASS
        spin_rate_N = (GRAVITY * sin_N - cos_N * temp_N) / (
            HALF_LENGTH * (4.0 / 3.0 - MASS_POLE * (cos_N * cos_N) / MASS)
        )
        # Rates of the four state rows, in their order; positions move with the velocities from before the step.
        rate_4N = np.empty_like(state_4N)
        rate_4N[0], rate_4N[2], rate_4N[3] = state_4N[1], spin_N, spin_rate_N
        np.subtract(temp_N, POLE_MOMENT * spin_rate_N * cos_N / MASS, out=rate_4N[1])
        rate_4N *= TAU
        state_4N += rate_4N
        terminated_N: np.ndarray = np.logical_or.reduce(np.abs(state_4N[::2]) > self._limit_2, axis=0)
        reward_N: np.ndarray = 0.0 - terminated_N if self._sutton_barto else np.ones(self.num_envs)
        return reward_N, terminated_N, self._never_N

    def observe(self) -> np.ndarray:
        """[N, 4] float32."""
        return np.ascontiguousarray(self._state_4N.T, dtype=np.float32)

    def get_state(self) -> dict[str, np.ndarray]:
        """Physics."""
        return {"state_4N": self._state_4N.copy()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Inverse."""
        self._state_4N[:] = state["state_4N"]

    def close(self) -> None:
        """Nothing to release."""
