"""Prioritised replay, the proportional variant (Schaul et al. 2016).

Legend: N environments, B sampled transitions.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from lockstep import kernels
from lockstep.core.errors import ConfigError
from lockstep.rl.replay import Batch, ReplayBuffer

PRIORITY_SEED = 0x9A10


class PrioritisedReplay:
    """Priorities over the transitions of a `ReplayBuffer`: P(i) = p_i^α / Σ p^α, p = |TD error| + eps.

    New transitions get the largest priority seen. A batch is stratified: one draw from each of B equal parts of the total
    mass. Importance weights (1 / (size · P(i)))^β are divided by the largest of the batch.

    Raises:
        ConfigError: alpha outside [0, 1].
    """

    def __init__(self, buffer: ReplayBuffer, *, alpha: float, seed: int, eps: float = 1e-6) -> None:
        if not 0.0 <= alpha <= 1.0:
            raise ConfigError(f"priority_alpha={alpha}; expected 0 (uniform) to 1 (fully proportional)")
        self.buffer, self.alpha, self.eps, self.seed = buffer, alpha, eps, seed + PRIORITY_SEED
        self.tree = kernels.SumTree(buffer.num_rows * buffer.num_envs)
        self.max_priority = 1.0
        self._index_N = np.arange(buffer.num_envs)

    def __len__(self) -> int:
        return len(self.buffer)

    def add(
        self,
        features: Any,
        action: Tensor,
        reward_N: np.ndarray,
        next_features: Any,
        terminated_N: np.ndarray,
        truncated_N: np.ndarray,
        valid_N: np.ndarray,
    ) -> None:
        """As `ReplayBuffer.add`; rows that are no transitions get no mass."""
        row = self.buffer.num_written % self.buffer.num_rows
        self.buffer.add(features, action, reward_N, next_features, terminated_N, truncated_N, valid_N)
        self.tree.update(self._index_N + row * self.buffer.num_envs, valid_N * self.max_priority**self.alpha)

    def sample(self, num: int, key: int, beta: float) -> Batch:
        """`num` transitions with their importance weights."""
        return self.buffer.gather(*self.draw(num, key, beta))

    def draw(self, num: int, key: int, beta: float) -> tuple[Tensor, Tensor]:
        """(flat indices [B], importance weights [B]) of `num` transitions."""
        where = torch.zeros(1, dtype=torch.int64), torch.tensor([key])
        uniform_B = kernels.uniform(self.seed, *where, num)[0].numpy().astype(np.float64)
        index_B = self.tree.find((np.arange(num) + uniform_B) * (self.tree.total / num))
        mass_B = self.tree.get(index_B)
        weight_B = (mass_B.min() / mass_B) ** beta
        return torch.from_numpy(index_B), torch.from_numpy(weight_B.astype(np.float32))

    def update(self, index_B: Tensor, error_B: Tensor) -> None:
        """New priorities from the magnitudes of TD errors (or losses of distributional heads)."""
        priority_B = np.abs(error_B.numpy().astype(np.float64)) + self.eps
        self.max_priority = max(self.max_priority, float(priority_B.max()))
        self.tree.update(index_B.numpy(), priority_B**self.alpha)

    def state_dict(self) -> dict[str, Any]:
        """The buffer, every leaf's mass and the largest priority."""
        mass = self.tree.get(np.arange(len(self.buffer)))
        return {"buffer": self.buffer.state_dict(), "mass": mass, "max_priority": self.max_priority}

    def load_state_dict(self, data: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self.buffer.load_state_dict(data["buffer"])
        self.tree.update(np.arange(len(data["mass"])), data["mass"])
        self.max_priority = float(data["max_priority"])
