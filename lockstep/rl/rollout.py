"""On-policy collection: T steps of N environments into one buffer.

Legend: T steps, N environments, A action dimensions.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lockstep import kernels
from lockstep.core.tree import tree_map
from lockstep.envs.control.stepper import EpisodeEnd, Stepper
from lockstep.models.control.actor import Actor, as_tensor

LOG = logging.getLogger("lockstep")


class Rollout:
    """Buffers of T steps of N environments, time first, filled in place.

    `next_value` is V of the true next observation, also where an episode was truncated; `valid` is False on rows that
    are no transitions (autoreset dummies); `ended` is terminated or truncated. `arrays` are NumPy views of the tensors.
    """

    def __init__(self, num_steps: int, num_envs: int) -> None:
        self.num_steps, self.num_envs = num_steps, num_envs
        shape = (num_steps, num_envs)
        self.features: Any = None
        self.action: Tensor | None = None
        self.obs: list[Any] = []
        self.logprob = torch.empty(shape)
        self.value = torch.empty(shape)
        self.next_value = torch.empty(shape)
        self.reward = torch.empty(shape)
        self.terminated = torch.empty(shape, dtype=torch.bool)
        self.ended = torch.empty(shape, dtype=torch.bool)
        self.valid = torch.empty(shape, dtype=torch.bool)
        self.starts = torch.empty(shape, dtype=torch.bool)
        self.initial_state: dict[str, Tensor] = {}
        self.arrays: dict[str, Any] = {
            name: self.__dict__[name].numpy()
            for name in ("logprob", "value", "reward", "terminated", "ended", "valid", "starts")
        }

    @property
    def num_valid(self) -> int:
        """Transitions in the buffer."""
        return int(self.valid.sum())

    def allocate(self, features: Any, action: Tensor) -> None:
        """Buffers for inputs and actions, shaped like the first step's."""
        self.features = tree_map(lambda x: torch.empty(self.num_steps, *x.shape, dtype=x.dtype), features)
        self.action = torch.empty(self.num_steps, *action.shape, dtype=action.dtype)
        self.arrays["features"] = tree_map(lambda x: x.numpy(), self.features)
        self.arrays["action"] = self.action.numpy()


class Collector:
    """Steps the environments with the policy; owns what lies between two rollouts.

    Args:
        env: reset by `begin`.
        actor: decides for all its environments.
        keep_obs: also keep raw observations in the rollout, for the normaliser's statistics.
    """

    def __init__(self, env: Stepper, actor: Actor, *, keep_obs: bool) -> None:
        self.env, self.actor, self.keep_obs = env, actor, keep_obs
        self.obs: Any = None
        self.exact = True

    def begin(self, seed: int) -> None:
        """Reset the environments."""
        self.obs = self.env.reset(seed)

    def collect(self, rollout: Rollout) -> list[EpisodeEnd]:
        """Fill the rollout; returns the episodes that ended in it."""
        env, actor = self.env, self.actor
        episodes: list[EpisodeEnd] = []
        arrays = rollout.arrays
        rollout.initial_state = dict(actor.state)
        rollout.obs.clear()
        has_value = actor.policy.critic is not None
        rollout.next_value.zero_()
        for t in range(rollout.num_steps):
            arrays["starts"][t] = actor.starts.numpy()
            if self.keep_obs:
                rollout.obs.append(self.obs)
            step = actor.act(self.obs)
            if rollout.action is None:
                rollout.allocate(step.features, step.action)
            tree_map(lambda buffer, x, t=t: buffer.__setitem__(t, x.numpy()), arrays["features"], step.features)
            arrays["action"][t] = step.action.numpy()
            arrays["logprob"][t] = step.logprob.numpy()
            if step.value is not None:
                arrays["value"][t] = step.value.numpy()
            result = env.step(step.env_action.numpy())
            arrays["reward"][t] = result.reward_N
            arrays["terminated"][t] = result.terminated_N
            np.logical_or(result.terminated_N, result.truncated_N, out=arrays["ended"][t])
            arrays["valid"][t] = result.valid_N
            if has_value and result.truncated_N.any():
                self._bootstrap_truncated(rollout, t, result.next_obs, result.truncated_N)
            actor.advance(result.starts_N, result.valid_N)
            self.obs = result.obs
            episodes += result.episodes
        if has_value:
            self._link(rollout)
        return episodes

    def state_dict(self) -> dict[str, Any]:
        """Environments and actor, to go on exactly where the run was."""
        return {"env": self.env.state_dict(), "actor": self.actor.state_dict()}

    def load_state_dict(self, data: dict[str, Any]) -> None:
        """Inverse of `state_dict`; `exact` tells whether the environments could be restored to the very state."""
        self.exact = restore_env(self.env, data["env"])
        self.actor.load_state_dict(data["actor"])
        self.obs = self.env.obs
        self.actor.starts.numpy()[:] = self.env.starts_N

    def _link(self, rollout: Rollout) -> None:
        """V(next) is the value at t + 1 unless the episode ended there; after the last step, of the present observation."""
        following = torch.cat([rollout.value[1:], self.actor.values(self.obs).unsqueeze(0)])
        rollout.next_value.copy_(torch.where(rollout.ended, rollout.next_value, following))

    def _bootstrap_truncated(self, rollout: Rollout, t: int, next_obs: Any, truncated_N: np.ndarray) -> None:
        rows = torch.from_numpy(np.flatnonzero(truncated_N))
        last = tree_map(lambda x: as_tensor(x)[rows], next_obs)
        rollout.next_value[t, rows] = self.actor.values(last, rows, continues=True)


def restore_env(env: Stepper, state: dict[str, Any]) -> bool:
    """`env.load_state_dict(state)` for a resumed run, which is warned where it cannot be exact."""
    exact = env.load_state_dict(state)
    if not exact:
        LOG.warning(
            "%d of %d environments could not be restored to the very state (%s); they start new episodes, and the "
            "curve differs from an uninterrupted run's from here on",
            int((~env.exact_N).sum()),
            env.num_envs,
            env.describe()["restore"],
        )
    return exact


class RewardScaler:
    """Scales rewards by the running standard deviation of the discounted return, as VecNormalize does in common
    libraries (Engstrom et al. 2020 name its effect). Statistics are training state, not part of the policy."""

    def __init__(self, num_envs: int, gamma: float, *, clip: float = 10.0, eps: float = 1e-8) -> None:
        self.gamma, self.clip, self.eps = gamma, clip, eps
        self.running = torch.zeros(num_envs)
        self.mean, self.var, self.count = 0.0, 1.0, 1e-4

    def __call__(self, rollout: Rollout) -> Tensor:
        """Update with the rollout, then return its scaled rewards [T, N]."""
        returns, self.running = kernels.discounted_return(rollout.reward, rollout.ended, self.running, self.gamma)
        values = returns[rollout.valid].to(torch.float64)
        if values.numel():
            mean, var, num = values.mean().item(), values.var(unbiased=False).item(), values.numel()
            delta, total = mean - self.mean, self.count + num
            m2 = self.var * self.count + var * num + delta**2 * self.count * num / total
            self.mean, self.var, self.count = self.mean + delta * num / total, m2 / total, total
        return (rollout.reward / (self.var + self.eps) ** 0.5).clamp(-self.clip, self.clip)

    def state_dict(self) -> dict[str, Any]:
        return {"running": self.running.clone(), "mean": self.mean, "var": self.var, "count": self.count}

    def load_state_dict(self, data: dict[str, Any]) -> None:
        self.running = data["running"].clone()
        self.mean, self.var, self.count = data["mean"], data["var"], data["count"]
