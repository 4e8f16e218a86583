"""A task of any shape, for networks that came without their environment: point at the column that stands out.

Discrete: one of the columns that have an action (of an image's channels: of the first two, by brightness) is high and the
others low; choose it. Continuous: give the first columns themselves. Eight steps an episode, each a draw of its own.
"""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np

STEPS = 8


class Pointing(gymnasium.Env[Any, Any]):
    """Observations are independent draws.

    Args:
        columns: of an observation, or channels of an image.
        actions: among which to choose, or that are given.
        continuous: they are given.
        height, width: of an image; 0 where an observation is a vector.

    >>> env = Pointing(columns=3, actions=2)
    >>> obs, _ = env.reset(seed=0)
    >>> env.step(int(obs[:2].argmax()))[1], sorted(set(obs.tolist()))
    (1.0, [-1.0, 1.0])
    """

    def __init__(
        self, *, columns: int, actions: int, continuous: bool = False, height: int = 0, width: int = 0
    ) -> None:
        self.actions, self.continuous, self.is_image = actions, continuous, bool(height)
        if height:
            self.observation_space = gymnasium.spaces.Box(0, 255, (columns, height, width), np.uint8)
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
        assert self.observation_space.shape is not None
        num = self.observation_space.shape[0]
        if self.continuous:
            self.columns = self.np_random.normal(size=num).astype(np.float32)
        else:
            self.columns = np.full(num, -1.0, np.float32)
            self.columns[self.np_random.integers(min(num, self.actions, 2 if self.is_image else num))] = 1.0
        if not self.is_image:
            return self.columns
        bright = (32 + 192 * (self.columns > 0)).astype(np.uint8)
        return np.broadcast_to(bright[:, None, None], self.observation_space.shape).copy()

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        shown = self.columns[: self.actions]
        if self.continuous:
            reward = -float(np.abs(np.clip(shown, -1, 1) - action[: len(shown)]).mean())
        else:
            reward = float(int(action) == int(shown.argmax()))
        self.t += 1
        return self._draw(), reward, False, self.t >= STEPS, {}
