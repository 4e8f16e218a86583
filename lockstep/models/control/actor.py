"""A policy at work on a fixed number of rows (environments or sessions): it carries their state, their random streams
and their positions. Collection, evaluation and the server all act through this class.

Legend: N rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lockstep.core.errors import InputError
from lockstep.core.tree import tree_map
from lockstep.models.control.observation import one_row
from lockstep.models.control.plan import build_plan

if TYPE_CHECKING:
    from lockstep.models.control.policy import Policy
    from lockstep.models.control.step import PolicyStep


class Actor:
    """Acts for N rows, remembering what each needs.

    The noise of row i is keyed by (seed, streams[i], positions[i]); a position counts the decisions of that row, so the
    same row makes the same choices whatever else is in the batch.

    Args:
        policy: shared, not copied; weight updates take effect at the next `act`.
        num_rows: N.
        seed: of the sampling noise.
        streams: int64 [N], default 0..N-1.
    """

    def __init__(self, policy: Policy, num_rows: int, *, seed: int, streams: Tensor | None = None) -> None:
        self.policy = policy
        self.num_rows = num_rows
        self.seed = seed
        self.streams = torch.arange(num_rows) if streams is None else streams
        self.positions = torch.zeros(num_rows, dtype=torch.int64)
        self.state = policy.initial_state(num_rows)
        self.starts = torch.ones(num_rows, dtype=torch.bool)
        self._plan = build_plan(policy, num_rows)

    def act(self, obs: Any, *, deterministic: bool = False) -> PolicyStep:
        """Decide for all rows and advance their state. Outputs may be views that the next call overwrites.

        Args:
            obs: numpy array or dictionary of arrays with N rows.
        """
        if self._plan is not None:
            return self._plan.act(obs, self.seed, self.streams, self.positions, deterministic)
        return self._act_general(obs, deterministic)

    @torch.no_grad()
    def _act_general(self, obs: Any, deterministic: bool) -> PolicyStep:
        policy = self.policy
        noise = policy.noise(self.seed, self.streams, self.positions)
        step = policy.act(tree_map(as_tensor, obs), self.state, self.starts, noise, deterministic=deterministic)
        self.state = step.state
        return step

    def advance(self, starts_N: np.ndarray, valid_N: np.ndarray | None = None) -> None:
        """After the environment stepped: which rows begin an episode, which rows' decision counted."""
        self.starts.numpy()[:] = starts_N
        positions_N = self.positions.numpy()
        positions_N += 1 if valid_N is None else valid_N

    @torch.no_grad()
    def values(self, obs: Any, rows: Tensor | None = None, *, continues: bool = False) -> Tensor:
        """V(obs) [N or len(rows)] without advancing the state.

        Args:
            rows: int64 indices; `obs` then has one row for each of them.
            continues: the observations follow the last decision in the same episode (a truncated episode's last one).
        """
        policy = self.policy
        state, starts = self.state, self.starts
        if rows is not None:
            state, starts = {name: x[rows] for name, x in state.items()}, starts[rows]
        if continues:
            starts = torch.zeros_like(starts)
        features, state = policy.encode(tree_map(as_tensor, obs), state, starts)
        value = policy(features, state, starts)[1]
        if value is None:
            raise InputError("values() needs a policy with a critic")
        return value

    def predict(self, obs: Any) -> np.ndarray:
        """Best action for one observation, without a row dimension; see `Policy.predict`."""
        if self._plan is not None:
            return self._plan.predict(obs)
        step = self.act(one_row(self.policy.spec.obs_space, obs), deterministic=True)
        self.starts.zero_()
        return step.env_action[0].numpy()

    def state_dict(self) -> dict[str, Any]:
        """What resuming needs: recurrent state, positions, episode starts."""
        return {"state": dict(self.state), "positions": self.positions.clone(), "starts": self.starts.clone()}

    def load_state_dict(self, data: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self.state = dict(data["state"])
        self.positions = data["positions"].clone()
        self.starts = data["starts"].clone()


def as_tensor(array: np.ndarray | Tensor) -> Tensor:
    """Numpy array -> tensor that shares its memory (a copy of read-only ones); float64 becomes float32."""
    if isinstance(array, Tensor):
        tensor = array
    else:
        tensor = torch.from_numpy(np.ascontiguousarray(array) if array.flags.writeable else array.copy())
    return tensor.to(torch.float32) if tensor.dtype == torch.float64 else tensor
