"""Twin delayed deterministic policy gradients (Fujimoto et al. 2018); `ddpg` is the configuration without its three
changes (Lillicrap et al. 2016).

Legend: B batch rows, E critics, A action dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lockstep import kernels
from lockstep.core.errors import ConfigError
from lockstep.core.spaces import BoxSpace, Space
from lockstep.envs.control.config import EnvConfig
from lockstep.envs.control.make import make_env
from lockstep.models.control.actor import Actor
from lockstep.models.control.critics import Critics
from lockstep.models.control.policy import Policy
from lockstep.models.control.spec import NetworkConfig, PolicySpec
from lockstep.rl.exploration import GaussianNoise, UniformUntil
from lockstep.rl.losses import Metrics, critic_loss
from lockstep.rl.offpolicy import ReplayConfig, TransitionCollector, make_replay
from lockstep.rl.optimiser import make_optimiser
from lockstep.rl.session import Result, RunConfig, Session

NOISE_SEED = 0x7D3


@dataclass(frozen=True, kw_only=True)
class TD3Config:
    """Twin delayed deterministic policy gradients."""

    env: EnvConfig = field(default_factory=lambda: EnvConfig(id="Pendulum-v1", num_envs=1))
    """Environment and number of copies."""
    network: NetworkConfig = field(
        default_factory=lambda: NetworkConfig(hidden_sizes=(400, 300), activation="relu", init="uniform")
    )
    """Network of the policy and of each critic."""
    run: RunConfig = field(default_factory=RunConfig)
    """Length, seed, evaluation, checkpoints."""
    replay: ReplayConfig = field(default_factory=ReplayConfig)
    """Buffer, batches and how collection alternates with learning."""
    learning_rate: float = 1e-3
    """Adam step size of policy and critics."""
    adam_eps: float = 1e-8
    """Adam epsilon."""
    gamma: float = 0.99
    """Discount per step."""
    tau: float = 0.005
    """Share of the networks that enters their targets at each policy update."""
    num_critics: int = 2
    """Critics, whose minimum is the target."""
    policy_delay: int = 2
    """Gradient steps of the critics for one of the policy."""
    exploration_noise: float = 0.1
    """Standard deviation of the noise on collected actions (actions span -1 to 1)."""
    target_noise: float = 0.2
    """Standard deviation of the noise on the target's actions (0: none)."""
    target_noise_clip: float = 0.5
    """Largest noise on the target's actions."""
    normalise_obs: bool = False
    """Running normalisation of observations, part of the policy."""
    frame_stack: int = 1
    """Frames joined by the policy."""

    def policy_spec(self, obs_space: Space, action_space: Space) -> PolicySpec:
        """The policy that this configuration trains on those spaces."""
        return PolicySpec(
            obs_space=obs_space,
            action_space=action_space,
            head="deterministic",
            network=self.network,
            critic=False,
            normalise_obs=self.normalise_obs,
            frame_stack=self.frame_stack,
        )


def ddpg(config: TD3Config) -> TD3Config:
    """The same configuration as deep deterministic policy gradients: one critic, no delay, no target smoothing.

    >>> ddpg(TD3Config()).policy_delay
    1
    """
    return replace(config, num_critics=1, policy_delay=1, target_noise=0.0)


def train(config: TD3Config, session: Session) -> Result:
    """Collect, then for each sampled batch: critics, and every `policy_delay`-th time policy and targets; repeat."""
    _check(config)
    kernels.set_num_threads(config.run.threads)
    env = make_env(config.env, seed=session.seed)
    spec = config.policy_spec(env.obs_space, env.action_space)
    policy, target_policy = Policy(spec, seed=session.seed), Policy(spec, seed=session.seed)
    actor = Actor(policy, env.num_envs, seed=session.seed)
    critics, target = _make_critics(config, policy, session.seed), _make_critics(config, policy, session.seed)
    optimiser = make_optimiser(policy, config.learning_rate, eps=config.adam_eps)
    critic_optimiser = make_optimiser(critics, config.learning_rate, eps=config.adam_eps)
    replay = make_replay(config.replay, policy, env.num_envs, gamma=config.gamma, seed=session.seed)
    noise = GaussianNoise(policy.head.num_params, config.exploration_noise, seed=session.seed)
    exploration = UniformUntil(env.action_space, config.replay.learning_starts, noise, seed=session.seed)
    collector = TransitionCollector(env, actor, replay, exploration)
    collector.begin(session.seed)
    session.begin(
        policy,
        {
            "collector": collector,
            "replay": replay,
            "critics": critics,
            "target": target,
            "target_policy": target_policy,
            "optimiser": optimiser,
            "critic_optimiser": critic_optimiser,
        },
    )
    targets = [*target_policy.parameters(), *target.parameters()]
    sources = [*policy.parameters(), *critics.parameters()]
    while session.running:
        num_steps, episodes = collector.collect(config.replay.train_freq)
        metrics: Metrics = {}
        for key in config.replay.gradient_keys(session, collector.num_steps, env.num_envs):
            batch = replay.sample(config.replay.batch_size, key)
            with torch.no_grad():
                next_action = smoothed_action(config, target_policy, batch.next_features, session.seed, key)
                next_value_B = target(batch.next_features, next_action).squeeze(2).amin(0)
            target_B = batch.reward_B + batch.discount_B * next_value_B
            loss, critic_metrics = critic_loss(critics(batch.features, batch.action).squeeze(2), target_B)
            critic_optimiser.zero_grad()
            loss.backward()
            critic_optimiser.step()
            metrics |= critic_metrics
            if key % config.policy_delay == 0:
                action = policy.actor(policy.encoder(batch.features))
                loss = -critics.with_constant_weights(batch.features, action)[0].mean()
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                kernels.polyak(targets, sources, config.tau)
                metrics["actor_loss"] = loss.detach()
        session.advance(num_steps, metrics, episodes)
    env.close()
    return session.finish()


def smoothed_action(config: TD3Config, policy: Policy, features: Any, seed: int, key: int) -> Tensor:
    """The policy's action plus clipped normal noise, within [-1, 1] (Fujimoto et al. 2018, eq. 14-15)."""
    action = policy.actor(policy.encoder(features))
    if config.target_noise == 0.0:
        return action
    noise = kernels.normal(seed + NOISE_SEED, torch.zeros(1, dtype=torch.int64), torch.tensor([key]), action.numel())
    clip = config.target_noise_clip
    return (action + (noise.view_as(action) * config.target_noise).clamp_(-clip, clip)).clamp_(-1.0, 1.0)


def _make_critics(config: TD3Config, policy: Policy, seed: int) -> Critics:
    space = policy.spec.action_space
    assert isinstance(space, BoxSpace)
    return Critics(
        policy.preprocess.features,
        config.network,
        num_actions=int(np.prod(space.shape)),
        num_critics=config.num_critics,
        num_outputs=1,
        seed=seed + 1,
    )


def _check(config: TD3Config) -> None:
    for name in ("num_critics", "policy_delay"):
        if config.__dict__[name] < 1:
            raise ConfigError(f"{name}={config.__dict__[name]}; expected at least 1")
    for name in ("exploration_noise", "target_noise", "target_noise_clip"):
        if config.__dict__[name] < 0:
            raise ConfigError(f"{name}={config.__dict__[name]}; expected 0 or more")
