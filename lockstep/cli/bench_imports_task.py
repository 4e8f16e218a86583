"""A task of any shape, for networks that came without their environment: point at the largest of the first columns.

Discrete: choose the column that is largest. Continuous: give the first columns themselves. In images a column is a channel's
brightness. Eight steps an episode.
"""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np

STEPS = 8


class Pointing(gymnasium.Env[Any, Any]):
    """Observations are independent draws.

    >>> env = Pointing(columns=3, actions=2)
    >>> obs, _ = env.reset(seed=0)
    >>> env.step(int(obs[:2].argmax()))[1]
    1.0
    """

    def __init__(self, *, columns: int, actions: int, continuous: bool = False, image: bool = False) -> None:
        self.actions, self.image, self.continuous = actions, image, continuous
        if image:
            self.observation_space = gymnasium.spaces.Box(0, 255, (84, 84, columns), np.uint8)
        else:
            self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (columns,), np.float32)
        self.action_space = (
            gymnasium.spaces.Box(-1.0, 1.0, (actions,), np.float32)
            if continuous
            else gymnasium.spaces.Discrete(actions)
        )
        self.t = 0
        self.columns: np.ndarray = np.zeros(columns, np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.t = 0
        return self._draw(), {}

    def _draw(self) -> Any:
        if not self.image:
            self.columns = self.np_random.normal(size=self.observation_space.shape).astype(np.float32)
            return self.columns
        assert self.observation_space.shape is not None
        self.columns = self.np_random.uniform(0.0, 1.0, self.observation_space.shape[2])
        return np.broadcast_to((255 * self.columns).astype(np.uint8), self.observation_space.shape).copy()

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        shown = self.columns[: self.actions]
        if self.continuous:
            reward = -float(np.abs(np.clip(shown, -1, 1) - action[: len(shown)]).mean())
        else:
            reward = float(int(action) == int(shown.argmax()))
        self.t += 1
        return self._draw(), reward, False, self.t >= STEPS, {}
