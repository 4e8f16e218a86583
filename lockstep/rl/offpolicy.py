"""Collection for replay algorithms: act, explore, step, remember.

Legend: N environments.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lockstep.core.errors import ConfigError
from lockstep.core.tree import tree_map
from lockstep.envs.control.episodes import EpisodeEnd
from lockstep.envs.control.stepper import Stepper
from lockstep.models.control.actor import Actor, as_tensor
from lockstep.models.control.policy import Policy
from lockstep.rl.exploration import Exploration
from lockstep.rl.prioritised import PrioritisedReplay
from lockstep.rl.replay import Encode, ReplayBuffer
from lockstep.rl.rollout import restore_env
from lockstep.rl.session import Session


@dataclass(frozen=True, kw_only=True)
class ReplayConfig:
    """The buffer, its batches, and how collection alternates with learning. Fields mean what they mean in
    Stable-Baselines3."""

    buffer_size: int = 1_000_000
    """Transitions kept."""
    batch_size: int = 256
    """Transitions of a gradient step."""
    learning_starts: int = 100
    """Environment steps with uniformly random actions before the first gradient step."""
    train_freq: int = 1
    """Steps of each environment between two rounds of gradient steps."""
    gradient_steps: int = 1
    """Gradient steps of a round (-1: as many as environment steps were taken)."""
    n_step: int = 1
    """Steps of a return before it bootstraps."""

    def __post_init__(self) -> None:
        for name in ("buffer_size", "batch_size", "train_freq", "n_step"):
            value = self.__dict__[name]
            if value < 1:
                raise ConfigError(f"replay.{name}={value}; expected at least 1")
        if self.gradient_steps < 1 and self.gradient_steps != -1:
            raise ConfigError(f"replay.gradient_steps={self.gradient_steps}; expected at least 1, or -1")
        if self.learning_starts < 0:
            raise ConfigError(f"replay.learning_starts={self.learning_starts}; expected 0 or more")

    def gradient_keys(self, session: Session, num_collected: int, num_envs: int) -> range:
        """One integer for each gradient step of this round, never the same in a run: it keys indices and noise. Empty
        until more than `learning_starts` steps were collected."""
        steps = self.train_freq * num_envs if self.gradient_steps == -1 else self.gradient_steps
        if num_collected <= self.learning_starts:
            return range(0)
        return range(session.updates * steps, (session.updates + 1) * steps)


class TransitionCollector:
    """Steps the environments and writes transitions into the buffer; owns what lies between two calls.

    What is stored is the network's input, computed once. With an observation normaliser, whose statistics move, raw
    observations are stored instead and encoded when sampled (see `stored_encoder`).
    """

    def __init__(
        self, env: Stepper, actor: Actor, replay: ReplayBuffer | PrioritisedReplay, exploration: Exploration
    ) -> None:
        self.env, self.actor, self.replay, self.exploration = env, actor, replay, exploration
        self.obs: Any = None
        self.num_steps = 0
        self.exact = True
        preprocess = actor.policy.preprocess
        self._raw = preprocess.normaliser is not None
        self._plain = preprocess.is_simple
        self._no_starts_N = torch.zeros(env.num_envs, dtype=torch.bool)

    def begin(self, seed: int) -> None:
        """Reset the environments."""
        self.obs = self.env.reset(seed)

    def collect(self, num_steps: int) -> tuple[int, list[EpisodeEnd]]:
        """Take `num_steps` steps of every environment: (transitions stored, episodes that ended)."""
        env, actor, exploration = self.env, self.actor, self.exploration
        action_map = actor.policy.action_map
        episodes: list[EpisodeEnd] = []
        before = self.num_steps
        for _ in range(num_steps):
            exploration.prepare(self.num_steps)
            step = actor.act(self.obs, deterministic=exploration.deterministic)
            action = exploration.choose(step, actor.streams, actor.positions, self.num_steps)
            if action is None:
                action, env_action = step.action, step.env_action
            else:
                env_action = action_map(action)
            result = env.step(env_action.numpy())
            stored, next_stored = self._stored(step.features, result.next_obs)
            self.replay.add(
                stored, action, result.reward_N, next_stored, result.terminated_N, result.truncated_N, result.valid_N
            )
            actor.advance(result.starts_N, result.valid_N)
            self.obs = result.obs
            self.num_steps += int(np.count_nonzero(result.valid_N))
            if result.episodes:
                episodes += result.episodes
        return self.num_steps - before, episodes

    def _stored(self, features: Any, next_obs: Any) -> tuple[Any, Any]:
        """What the buffer gets of this step: features or raw observations, and the same of the next."""
        if self._raw:
            raw = tree_map(as_tensor, self.obs)
            self.actor.policy.preprocess.update(raw)
            return raw, tree_map(as_tensor, next_obs)
        if self._plain:
            return features, next_obs.reshape(features.shape)
        return features, self.actor.policy.encode(tree_map(as_tensor, next_obs), self.actor.state, self._no_starts_N)[0]

    def state_dict(self) -> dict[str, Any]:
        """Environments, acting state and the step count: collection goes on exactly where the run was."""
        return {"env": self.env.state_dict(), "actor": self.actor.state_dict(), "num_steps": self.num_steps}

    def load_state_dict(self, data: dict[str, Any]) -> None:
        """Inverse; `exact` tells whether the environments could be restored to the very state."""
        self.exact = restore_env(self.env, data["env"])
        self.actor.load_state_dict(data["actor"])
        self.num_steps = int(data["num_steps"])
        self.obs = self.env.obs
        self.actor.starts = torch.from_numpy(np.array(self.env.starts_N))


def make_replay(config: ReplayConfig, policy: Policy, num_envs: int, *, gamma: float, seed: int) -> ReplayBuffer:
    """The buffer that a `TransitionCollector` of this policy fills.

    Raises:
        ConfigError: replay needs independent transitions, but the policy is recurrent, or normalises observations before
            stacking frames.
    """
    if policy.is_recurrent:
        raise ConfigError(
            f"network.recurrent={policy.spec.network.recurrent!r}: replay algorithms learn from single transitions; "
            "use PPO, or a frame stack"
        )
    if policy.preprocess.normaliser is not None and policy.spec.frame_stack > 1:
        raise ConfigError("normalise_obs with frame_stack > 1 cannot be replayed; drop one of them")
    encode = stored_encoder(policy)
    return ReplayBuffer(config.buffer_size, num_envs, seed=seed, gamma=gamma, n_step=config.n_step, encode=encode)


def stored_encoder(policy: Policy) -> Encode | None:
    """How sampled rows become network input: as they are, or through the normaliser as it stands now."""
    if policy.preprocess.normaliser is None:
        return None

    @torch.no_grad()
    def encode(obs: Any) -> Any:
        return policy.preprocess(obs, {}, _NO_STARTS)[0]

    return encode


_NO_STARTS = torch.zeros(0, dtype=torch.bool)
