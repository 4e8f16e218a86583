"""Replay of transitions for N vector environments: a ring of rows, read by counter-based index.

Legend: T ring rows, N environments, B sampled transitions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lockstep import kernels
from lockstep.core.errors import ConfigError, InputError
from lockstep.core.tree import tree_leaves, tree_map

INDEX_SEED = 0x5E1EC7
MAX_REDRAWS = 1000

Encode = Callable[[Any], Any]


@dataclass(slots=True)
class Batch:
    """B transitions. With n-step returns `reward_B` is the discounted sum of the window's rewards, `next_features` what
    followed its last step, and `discount_B` what the bootstrap value is multiplied by: γ^n, or 0 after a termination.

    >>> Batch(None, torch.zeros(4), torch.zeros(4), None, torch.zeros(4), torch.arange(4)).split(2)[1].index_B.tolist()
    [2, 3]
    """

    features: Any
    action: Tensor
    reward_B: Tensor
    next_features: Any
    discount_B: Tensor
    index_B: Tensor
    weight_B: Tensor | None = None

    def split(self, size: int) -> list[Batch]:
        """Consecutive parts of `size` rows, views of this batch."""
        num = len(self.reward_B)
        return [self] if size >= num else [self._slice(slice(i, i + size)) for i in range(0, num, size)]

    def _slice(self, rows: slice) -> Batch:
        return Batch(
            tree_map(lambda x: None if x is None else x[rows], self.features),
            self.action[rows],
            self.reward_B[rows],
            tree_map(lambda x: None if x is None else x[rows], self.next_features),
            self.discount_B[rows],
            self.index_B[rows],
            None if self.weight_B is None else self.weight_B[rows],
        )


class ReplayBuffer:
    """The newest `capacity` transitions. Storage is allocated at the first `add`, in the dtypes that come in (images stay
    uint8), and each time step is one row of N transitions.

    A transition keeps its true next observation, so that a truncated episode bootstraps from where it was cut. Rows that
    are no transitions (`valid_N` false) occupy space and are never sampled. Indices are a function of (seed, key): there
    is no random state to save.

    Args:
        capacity: transitions, rounded down to whole rows of N.
        num_envs: N.
        seed: of the indices.
        gamma: discount per step.
        n_step: steps of a return; windows stop at the end of an episode and at the newest row.
        encode: from stored observations to network input, applied when sampling (None: they are stored as features).

    Raises:
        ConfigError: capacity below one row, or n_step below 1 or beyond the rows.
    """

    def __init__(
        self, capacity: int, num_envs: int, *, seed: int, gamma: float, n_step: int = 1, encode: Encode | None = None
    ) -> None:
        self.num_envs, self.seed, self.gamma, self.n_step, self.encode = num_envs, seed, gamma, n_step, encode
        self.num_rows = capacity // num_envs
        if self.num_rows < 1:
            raise ConfigError(f"buffer_size={capacity} must hold at least one step of num_envs={num_envs}")
        if not 1 <= n_step <= self.num_rows:
            raise ConfigError(f"n_step={n_step}; expected 1 to {self.num_rows}, the buffer's steps of each environment")
        self.num_written = 0
        shape = (self.num_rows, num_envs)
        self.reward = torch.zeros(shape)
        self.discount = torch.zeros(shape)
        self.terminated = torch.zeros(shape, dtype=torch.bool)
        self.ended = torch.zeros(shape, dtype=torch.bool)
        self.valid = torch.zeros(shape, dtype=torch.bool)
        self.features: Any = None
        self.next_features: Any = None
        self.action: Tensor | None = None
        self._columns: list[np.ndarray] = []
        self._rows: kernels.TransitionRows | None = None
        self._has_invalid = self._is_plain = False

    def __len__(self) -> int:
        """Rows times N that are filled, invalid ones included."""
        return min(self.num_written, self.num_rows) * self.num_envs

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
        """Append one step of N environments; everything is copied."""
        if self.action is None:
            self._allocate(features, action)
        row = self.num_written % self.num_rows
        plain = self._is_plain
        leaves = [features, next_features] if plain else [*tree_leaves(features), *tree_leaves(next_features)]
        for column, leaf in zip(self._columns, (*leaves, action), strict=False):
            column[row] = leaf.numpy() if isinstance(leaf, Tensor) else leaf
        reward, discount, terminated, ended, valid = self._columns[-5:]
        reward[row], terminated[row], valid[row] = reward_N, terminated_N, valid_N
        ended[row] = terminated_N | truncated_N
        discount[row] = np.where(terminated_N, 0.0, self.gamma) if np.count_nonzero(terminated_N) else self.gamma
        self._has_invalid = self._has_invalid or int(np.count_nonzero(valid_N)) < self.num_envs
        self.num_written += 1

    def sample(self, num: int, key: int) -> Batch:
        """`num` transitions drawn uniformly, with replacement; the same (seed, key, contents) draw the same."""
        return self.gather(self.draw(num, key))

    def draw(self, num: int, key: int) -> Tensor:
        """Flat indices [B] of valid transitions."""
        size = len(self)
        if size == 0:
            raise InputError("the replay buffer is empty; collect before sampling", field="replay")
        index_B = uniform_index(num, size, self.seed, key)
        if self._has_invalid:
            valid = self.valid.view(-1)
            for attempt in range(1, MAX_REDRAWS):
                wrong = (~valid[index_B]).nonzero().squeeze(1)
                if not len(wrong):
                    break
                index_B[wrong] = uniform_index(len(wrong), size, self.seed, key, attempt)
            else:
                raise InputError("the replay buffer holds no valid transition", field="replay")
        return index_B

    def gather(self, index_B: Tensor, weight_B: Tensor | None = None) -> Batch:
        """The transitions at flat indices, with their n-step returns."""
        assert self.action is not None
        last_B = index_B
        if self.n_step > 1:
            time_B = torch.div(index_B, self.num_envs, rounding_mode="floor")
            env_B = index_B - time_B * self.num_envs
            newest = (self.num_written - 1) % self.num_rows
            reward_B, discount_B, last_time_B = kernels.nstep_returns(
                self.reward, self.terminated, self.ended, time_B, env_B, newest, self.n_step, self.gamma
            )
            last_B = last_time_B * self.num_envs + env_B
        else:
            reward_B, discount_B = _rows(self.reward, index_B), _rows(self.discount, index_B)
        features = tree_map(lambda x: _rows(x, index_B), self.features)
        next_features = tree_map(lambda x: _rows(x, last_B), self.next_features)
        action = _rows(self.action, index_B)
        if self.encode is not None:
            features, next_features = self.encode(features), self.encode(next_features)
        return Batch(features, action, reward_B, next_features, discount_B, index_B, weight_B)

    def rows(self, index_B: Tensor) -> tuple[kernels.TransitionRows, Tensor]:
        """The transitions at flat indices as (rows, index into them) for `kernels.QGradients`: the storage itself where
        it holds what the network reads, else gathered rows.
        """
        if self._rows is not None:
            return self._rows, index_B
        batch = self.gather(index_B)
        rows = kernels.TransitionRows(
            batch.features, batch.action, batch.reward_B, batch.next_features, batch.discount_B
        )
        return rows, torch.arange(len(index_B))

    def state_dict(self) -> dict[str, Any]:
        """The filled part (views, not copies) and the position."""
        rows = slice(min(self.num_written, self.num_rows))
        state: dict[str, Any] = {"num_written": self.num_written, "num_rows": self.num_rows, "num_envs": self.num_envs}
        if self.action is None:
            return state
        for name in ("reward", "discount", "terminated", "ended", "valid", "action"):
            state[name] = self.__dict__[name][rows]
        state["features"] = tree_map(lambda x: x[rows], self.features)
        state["next_features"] = tree_map(lambda x: x[rows], self.next_features)
        return state

    def load_state_dict(self, data: dict[str, Any]) -> None:
        """Inverse of `state_dict`.

        Raises:
            InputError: the state is of a buffer of another shape.
        """
        for name, mine in (("num_rows", self.num_rows), ("num_envs", self.num_envs)):
            if data[name] != mine:
                raise InputError(f"the saved replay buffer has {name}={data[name]}, this one {mine}", field=name)
        self.num_written = int(data["num_written"])
        if "action" not in data:
            return
        first = tree_map(lambda x: x[0], data["features"])
        self._allocate(first, data["action"][0])
        rows = slice(min(self.num_written, self.num_rows))
        for name in ("reward", "discount", "terminated", "ended", "valid", "action"):
            self.__dict__[name][rows] = data[name]
        tree_map(lambda mine, saved: mine[rows].copy_(saved), self.features, data["features"])
        tree_map(lambda mine, saved: mine[rows].copy_(saved), self.next_features, data["next_features"])
        self._has_invalid = not bool(self.valid[rows].all())

    def _allocate(self, features: Any, action: Tensor) -> None:
        # Zeroed pages are handed out by the system when they are first written, so an unfilled buffer costs nothing.
        def make(x: Any) -> Tensor:
            leaf = torch.as_tensor(x)
            return torch.zeros(self.num_rows, *leaf.shape, dtype=leaf.dtype)

        self.features, self.next_features = tree_map(make, features), tree_map(make, features)
        self.action = make(action)
        columns = [*tree_leaves(self.features), *tree_leaves(self.next_features), self.action]
        columns += [self.reward, self.discount, self.terminated, self.ended, self.valid]
        self._columns = [column.numpy() for column in columns]
        self._is_plain = isinstance(self.features, Tensor)
        if self.n_step == 1 and self.encode is None and isinstance(self.features, Tensor):
            parts = (self.features, self.action, self.reward, self.next_features, self.discount)
            self._rows = kernels.TransitionRows(*(part.flatten(0, 1) for part in parts))


def _rows(column_TN: Tensor, index_B: Tensor) -> Tensor:
    return column_TN.flatten(0, 1).index_select(0, index_B)


def uniform_index(num: int, size: int, seed: int, key: int, attempt: int = 0) -> Tensor:
    """`num` draws from 0..size-1, with replacement: int64 [B], a function of the arguments alone."""
    return kernels.uniform_index(INDEX_SEED + seed, attempt, key, num, size)
