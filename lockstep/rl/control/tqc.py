"""Truncated quantile critics (Kuznetsov et al. 2020): soft actor-critic whose critics learn return distributions, with the
largest quantiles left out of the target against overestimation.

Legend: B batch rows, E critics, Z quantiles of each, A action dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from lockstep import kernels
from lockstep.core.errors import ConfigError
from lockstep.core.spaces import BoxSpace, Space
from lockstep.envs.control.config import EnvConfig
from lockstep.envs.control.make import make_env
from lockstep.models.control.actor import Actor
from lockstep.models.control.critics import Critics
from lockstep.models.control.policy import Policy
from lockstep.models.control.spec import NetworkConfig, PolicySpec
from lockstep.rl.distributional import truncate_quantiles
from lockstep.rl.exploration import PolicySamples, UniformUntil
from lockstep.rl.losses import Metrics, quantile_huber_loss, sac_actor_loss, temperature_loss
from lockstep.rl.offpolicy import ReplayConfig, TransitionCollector, make_replay
from lockstep.rl.optimiser import make_optimiser
from lockstep.rl.session import Result, RunConfig, Session
from lockstep.rl.soft import SampledActions, Temperature


@dataclass(frozen=True, kw_only=True)
class TQCConfig:
    """Truncated quantile critics."""

    env: EnvConfig = field(default_factory=lambda: EnvConfig(id="Pendulum-v1", num_envs=1))
    """Environment and number of copies."""
    network: NetworkConfig = field(
        default_factory=lambda: NetworkConfig(hidden_sizes=(256, 256), activation="relu", init="uniform")
    )
    """Network of the policy and of each critic."""
    run: RunConfig = field(default_factory=RunConfig)
    """Length, seed, evaluation, checkpoints."""
    replay: ReplayConfig = field(default_factory=ReplayConfig)
    """Buffer, batches and how collection alternates with learning."""
    learning_rate: float = 3e-4
    """Adam step size of policy, critics and temperature."""
    adam_eps: float = 1e-8
    """Adam epsilon."""
    gamma: float = 0.99
    """Discount per step."""
    tau: float = 0.005
    """Share of the critics that enters the target critics at each gradient step."""
    num_critics: int = 2
    """Critics."""
    num_quantiles: int = 25
    """Quantiles of each critic."""
    num_dropped: int = 2
    """Largest quantiles left out of the target, for each critic."""
    temperature: float | None = None
    """Fixed weight of the entropy (None: learned)."""
    temperature_init: float = 1.0
    """First value of a learned temperature."""
    target_entropy: float | None = None
    """Entropy that a learned temperature keeps (nats; None: minus the action dimensions)."""
    normalise_obs: bool = False
    """Running normalisation of observations, part of the policy."""
    frame_stack: int = 1
    """Frames joined by the policy."""

    def policy_spec(self, obs_space: Space, action_space: Space) -> PolicySpec:
        """The policy that this configuration trains on those spaces."""
        return PolicySpec(
            obs_space=obs_space,
            action_space=action_space,
            head="squashed",
            network=self.network,
            critic=False,
            normalise_obs=self.normalise_obs,
            frame_stack=self.frame_stack,
        )


def train(config: TQCConfig, session: Session) -> Result:
    """Collect, then for each sampled batch: temperature, critics, policy, target critics; repeat."""
    _check(config)
    kernels.set_num_threads(config.run.threads)
    env = make_env(config.env, seed=session.seed)
    policy = Policy(config.policy_spec(env.obs_space, env.action_space), seed=session.seed)
    actor = Actor(policy, env.num_envs, seed=session.seed)
    critics, target = _make_critics(config, policy, session.seed), _make_critics(config, policy, session.seed)
    temperature = Temperature(config.temperature, config.temperature_init, config.target_entropy, env.action_space)
    optimiser = make_optimiser(policy, config.learning_rate, eps=config.adam_eps)
    critic_optimiser = make_optimiser(critics, config.learning_rate, eps=config.adam_eps)
    temperature_optimiser = make_optimiser(temperature, config.learning_rate, eps=config.adam_eps)
    replay = make_replay(config.replay, policy, env.num_envs, gamma=config.gamma, seed=session.seed)
    exploration = UniformUntil(env.action_space, config.replay.learning_starts, PolicySamples(), seed=session.seed)
    collector = TransitionCollector(env, actor, replay, exploration)
    collector.begin(session.seed)
    session.begin(
        policy,
        {
            "collector": collector,
            "replay": replay,
            "critics": critics,
            "target": target,
            "temperature": temperature,
            "optimiser": optimiser,
            "critic_optimiser": critic_optimiser,
            "temperature_optimiser": temperature_optimiser,
        },
    )
    sampler = SampledActions(policy, session.seed)
    pairs = list(target.parameters()), list(critics.parameters())
    while session.running:
        num_steps, episodes = collector.collect(config.replay.train_freq)
        metrics: Metrics = {}
        for key in config.replay.gradient_keys(session, collector.num_steps, env.num_envs):
            batch = replay.sample(config.replay.batch_size, key)
            choice = sampler.choose(batch.features, key)
            alpha = temperature.value()
            if temperature.learned:
                temperature_optimiser.zero_grad()
                temperature_loss(temperature.log_alpha, -choice.entropy_B, temperature.target_entropy).backward()
                temperature_optimiser.step()
            with torch.no_grad():
                next_choice = sampler.choose(batch.next_features, key, stream=1)
                next_EBZ = target(batch.next_features, next_choice.action_BA)
                next_BY = truncate_quantiles(next_EBZ, config.num_dropped * config.num_critics)
                soft_BY = next_BY + (alpha * next_choice.entropy_B).unsqueeze(1)
                target_BY = batch.reward_B.unsqueeze(1) + batch.discount_B.unsqueeze(1) * soft_BY
            quantiles_EBZ = critics(batch.features, batch.action)
            loss, _ = quantile_huber_loss(
                quantiles_EBZ.flatten(0, 1), target_BY.repeat(config.num_critics, 1), sum_over_quantiles=False
            )
            critic_optimiser.zero_grad()
            loss.backward()
            critic_optimiser.step()
            metrics = {"critic_loss": loss.detach(), "q_mean": quantiles_EBZ.detach().mean(), "temperature": alpha}
            q_B = critics.with_constant_weights(batch.features, choice.action_BA).mean((0, 2))
            loss, actor_metrics = sac_actor_loss(-choice.entropy_B, q_B, alpha)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            kernels.polyak(*pairs, config.tau)
            metrics |= actor_metrics
        session.advance(num_steps, metrics, episodes)
    env.close()
    return session.finish()


def _make_critics(config: TQCConfig, policy: Policy, seed: int) -> Critics:
    space = policy.spec.action_space
    assert isinstance(space, BoxSpace)
    return Critics(
        policy.preprocess.features,
        config.network,
        num_actions=int(np.prod(space.shape)),
        num_critics=config.num_critics,
        num_outputs=config.num_quantiles,
        seed=seed + 1,
    )


def _check(config: TQCConfig) -> None:
    for name in ("num_critics", "num_quantiles"):
        if config.__dict__[name] < 1:
            raise ConfigError(f"{name}={config.__dict__[name]}; expected at least 1")
    if not 0 <= config.num_dropped < config.num_quantiles:
        raise ConfigError(
            f"num_dropped={config.num_dropped}; expected 0 to {config.num_quantiles - 1}, below num_quantiles"
        )
