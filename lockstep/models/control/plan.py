"""The one-call form of simple policies: same kernels, same bits, no Python between them.

Legend: N rows, D observation features, A actions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lockstep.core.errors import InputError
from lockstep.core.spaces import BoxSpace, DiscreteSpace, MultiDiscreteSpace
from lockstep.kernels.plan import ActPlan, Head, Net, Normaliser
from lockstep.layers.linear import MLP
from lockstep.models.control.heads import (
    LOG_STD_MAX,
    LOG_STD_MIN,
    Categorical,
    Deterministic,
    Gaussian,
    MultiCategorical,
    QValues,
    SquashedGaussian,
)
from lockstep.models.control.observation import real_array
from lockstep.models.control.step import PolicyStep

if TYPE_CHECKING:
    from lockstep.models.control.policy import Policy


class PolicyPlan:
    """Acts for N rows of a stateless dense policy. Every call overwrites the arrays that the last one returned."""

    def __init__(self, policy: Policy, num_rows: int, head: Head) -> None:
        assert isinstance(policy.actor, MLP)
        norm = policy.preprocess.normaliser
        normaliser = None if norm is None else Normaliser(norm.mean, norm.inv_std, norm.clip)
        assert policy.critic is None or isinstance(policy.critic, MLP)
        critic = None if policy.critic is None else net_of(policy.critic)
        self._plan = plan = ActPlan(net_of(policy.actor), head, num_rows, critic, normaliser)
        self._obs_shape = plan.obs.shape
        self._raw_shape = (num_rows, *policy.spec.obs_space.shape)  # type: ignore[union-attr]
        self._row_shape = self._raw_shape[1:]
        discrete = head.kind in ("categorical", "argmax")
        chosen = plan.choices if discrete else plan.actions
        self._single = isinstance(policy.spec.action_space, DiscreteSpace)
        self._action = chosen[:, 0] if self._single else chosen
        self._offset: np.ndarray | None = None
        self._box: tuple[np.ndarray, np.ndarray, np.ndarray | None] | None = None
        self._env_action = self._action
        if isinstance(policy.spec.action_space, BoxSpace):
            amap = policy.action_map
            half = amap.half_range.numpy() if amap.squashed else None
            self._box = (amap.low.numpy(), amap.high.numpy(), half)
            self._flat_env_action = np.zeros_like(plan.actions)
            self._env_action = self._flat_env_action.reshape(num_rows, *policy.spec.action_space.shape)
        elif (
            isinstance(policy.spec.action_space, DiscreteSpace | MultiDiscreteSpace) and policy.spec.action_space.start
        ):
            self._offset = np.array(policy.spec.action_space.start)
            self._env_action = np.zeros_like(self._action)
        has_logprob = head.kind in ("categorical", "gaussian", "squashed")
        self._step = PolicyStep(
            action=torch.from_numpy(self._action),
            env_action=torch.from_numpy(self._env_action),
            logprob=torch.from_numpy(plan.logprob) if has_logprob else torch.zeros(num_rows),
            value=None if critic is None else torch.from_numpy(plan.value),
            features=torch.from_numpy(plan.features),
            state={},
        )

    def act(self, obs: Any, seed: int, streams: Tensor, positions: Tensor, deterministic: bool) -> PolicyStep:
        """As `Actor.act`; obs is an array or tensor [N, ...]."""
        array = obs.numpy() if isinstance(obs, Tensor) else obs
        if array.shape != self._raw_shape:
            raise InputError(f"observation has shape {array.shape}; expected {self._raw_shape}", field="observation")
        array = array.reshape(self._obs_shape)
        if deterministic:  # the key of the noise is not read
            self._plan.run(array, deterministic=True)
        else:
            self._plan.run(array, seed, streams.numpy(), positions.numpy())
        self._map()
        return self._step

    def predict(self, obs: Any) -> Any:
        """Best action for one observation without a row dimension, in the environment's form."""
        array = obs if isinstance(obs, np.ndarray) else real_array(obs)
        if array.shape != self._row_shape:
            raise InputError(f"observation has shape {array.shape}; expected {self._row_shape}", field="observation")
        self._plan.run(array if array.ndim == 1 else array.reshape(self._obs_shape), deterministic=True)
        self._map()
        return self._env_action[0] if self._single else self._env_action[0].copy()

    def _map(self) -> None:
        """The policy's action map, on arrays (the same operations in the same order)."""
        if self._box is not None:
            low, high, half = self._box
            out = self._flat_env_action
            if half is None:
                np.maximum(self._action, low, out=out)
            else:
                np.add(self._action, 1.0, out=out)
                np.multiply(out, half, out=out)
                np.add(low, out, out=out)
                np.maximum(out, low, out=out)
            np.minimum(out, high, out=out)
        elif self._offset is not None:
            np.add(self._action, self._offset, out=self._env_action)


def build_plan(policy: Policy, num_rows: int) -> PolicyPlan | None:
    """The plan of `policy` for `num_rows` rows, or None where the policy needs the general path."""
    if not policy.preprocess.is_simple or policy.core is not None or not isinstance(policy.actor, MLP):
        return None
    head = head_of(policy)
    return None if head is None else PolicyPlan(policy, num_rows, head)


def head_of(policy: Policy) -> Head | None:
    """What the kernels need to know of the policy's head, or None where they have no such head."""
    match policy.head:
        case Categorical():
            return Head("categorical")
        case MultiCategorical(nvec=nvec):
            return Head("categorical", nvec=nvec)
        case Gaussian(log_std=log_std):
            return Head("gaussian", log_std=log_std)
        case SquashedGaussian():
            return Head("squashed", log_std_min=LOG_STD_MIN, log_std_max=LOG_STD_MAX)
        case Deterministic():
            return Head("tanh")
        case QValues(is_plain=True):
            return Head("argmax")
    return None


def net_of(mlp: MLP) -> Net:
    """The chain by reference to its parameters."""
    return Net(list(mlp.weights), list(mlp.biases), mlp.activation, mlp.output_activation, mlp.compute_dtype)
