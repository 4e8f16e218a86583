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

# Zero-dimensional arrays: NumPy combines them with an array faster than Python floats, with the same rounding.
GRAVITY, MASS_POLE, HALF_LENGTH, TAU = np.array(9.8), np.array(0.1), np.array(0.5), np.array(0.02)
MASS, POLE_MOMENT, FOUR_THIRDS = np.array(0.1 + 1.0), np.array(0.1 * 0.5), np.array(4.0 / 3.0)
FORCES = np.array([-10.0, 10.0])
LIMITS = np.array([[2.4], [12 * 2 * np.pi / 360]])
"""Metres and radians at which an episode ends."""


class CartPoleSim(BatchSim):
    """N carts. Reward 1 for every step, or Sutton and Barto's -1 at the fall."""

    def __init__(self, num_envs: int, sutton_barto_reward: bool = False) -> None:
        single: Any = gym.make("CartPole-v1", disable_env_checker=True).unwrapped
        self.num_envs = num_envs
        self.observation_space, self.action_space = single.observation_space, single.action_space
        self._sutton_barto = sutton_barto_reward
        self._state_4N = np.zeros((4, num_envs), np.float64)
        work = np.empty((4, num_envs))
        self._buffers = (self._state_4N, np.empty((4, num_envs)), *work)
        self._never_N = np.zeros(num_envs, np.bool_)

    def reset_rows(self, rows: list[int], seeds: list[int]) -> None:
        """Uniform in [-0.05, 0.05]."""
        for i, seed in zip(rows, seeds, strict=True):
            self._state_4N[:, i] = seeding.np_random(seed)[0].uniform(low=-0.05, high=0.05, size=(4,))

    def step(self, actions: np.ndarray) -> Outcome:
        """One Euler step of 20 ms."""
        if np.minimum.reduce(actions) < 0 or np.maximum.reduce(actions) > 1:
            raise EnvError(f"CartPole takes actions 0 and 1, got {actions.tolist()}")
        state_4N, rate_4N, cos_N, sin_N, temp_N, work_N = self._buffers
        spin_N, spin_rate_N = state_4N[3], rate_4N[3]
        np.cos(state_4N[2], out=cos_N)
        np.sin(state_4N[2], out=sin_N)
        # temp = (force + pole_moment * spin^2 * sin) / mass
        np.multiply(spin_N, spin_N, out=temp_N)
        temp_N *= POLE_MOMENT
        temp_N *= sin_N
        temp_N += FORCES[actions]
        temp_N /= MASS
        # spin_rate = (gravity * sin - cos * temp) / (half_length * (4 / 3 - mass_pole * cos^2 / mass))
        np.multiply(sin_N, GRAVITY, out=spin_rate_N)
        np.multiply(cos_N, temp_N, out=work_N)
        spin_rate_N -= work_N
        np.multiply(cos_N, cos_N, out=work_N)
        work_N *= MASS_POLE
        work_N /= MASS
        np.subtract(FOUR_THIRDS, work_N, out=work_N)
        work_N *= HALF_LENGTH
        spin_rate_N /= work_N
        # acceleration = temp - pole_moment * spin_rate * cos / mass
        np.multiply(spin_rate_N, POLE_MOMENT, out=work_N)
        work_N *= cos_N
        work_N /= MASS
        np.subtract(temp_N, work_N, out=rate_4N[1])
        # Positions move with the velocities from before the step.
        rate_4N[0::2] = state_4N[1::2]
        rate_4N *= TAU
        state_4N += rate_4N
        outside_2N = np.abs(state_4N[0::2]) > LIMITS
        terminated_N: np.ndarray = outside_2N[0] | outside_2N[1]
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
