"""From the head's coordinates to the environment's: the last module of a policy.

Legend: N rows, A action dimensions.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from lockstep.core.errors import ConfigError
from lockstep.core.spaces import BoxSpace, DiscreteSpace, MultiDiscreteSpace, Space


class ActionMap(nn.Module):
    """Discrete choices gain the space's start; a Gaussian's actions are clipped to the bounds; squashed ones are scaled
    from [-1, 1] to the bounds.

    >>> pedal = ActionMap(BoxSpace((1,), "float32", (0.0,), (4.0,)), squashed=True)
    >>> pedal(torch.tensor([[-1.0], [0.5]])).tolist()
    [[0.0], [3.0]]
    """

    def __init__(self, space: Space, *, squashed: bool) -> None:
        super().__init__()
        self.space = space
        self.squashed = squashed
        if isinstance(space, BoxSpace):
            low, high = space.bounds()
            if squashed and not (np.isfinite(low).all() and np.isfinite(high).all()):
                raise ConfigError(f"squashed actions need finite bounds; got low={low}, high={high}; bound the Box")
            self.register_buffer("low", torch.from_numpy(low.reshape(-1).copy()), persistent=False)
            self.register_buffer("high", torch.from_numpy(high.reshape(-1).copy()), persistent=False)
            self.register_buffer("half_range", (self.high - self.low) * 0.5, persistent=False)
            self.low: Tensor
            self.high: Tensor
            self.half_range: Tensor
        elif not isinstance(space, DiscreteSpace | MultiDiscreteSpace):
            raise ConfigError(f"actions must be Box, Discrete or MultiDiscrete; got {space}; flatten them in a wrapper")

    def forward(self, action: Tensor) -> Tensor:
        """[N] or [N, A] -> the environment's action with N rows."""
        match self.space:
            case DiscreteSpace():
                return action + self.space.start if self.space.start else action
            case MultiDiscreteSpace():
                return action + torch.tensor(self.space.start) if self.space.start else action
            case BoxSpace():
                flat = self.low + (action + 1.0) * self.half_range if self.squashed else action
                flat = torch.minimum(torch.maximum(flat, self.low), self.high)
                return flat.view(-1, *self.space.shape)
            case _:
                return action

    def inverse(self, env_action: Tensor) -> Tensor:
        """Environment action -> head coordinates, for data sets (clipped just inside (-1, 1) when squashed)."""
        match self.space:
            case DiscreteSpace():
                return env_action - self.space.start
            case MultiDiscreteSpace():
                return env_action - torch.tensor(self.space.lowest)
            case BoxSpace():
                flat = env_action.reshape(env_action.shape[0], -1).to(torch.float32)
                if self.squashed:
                    flat = ((flat - self.low) / self.half_range - 1.0).clamp(-1 + 1e-6, 1 - 1e-6)
                return flat
            case _:
                return env_action
