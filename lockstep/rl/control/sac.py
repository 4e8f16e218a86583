"""Soft actor-critic (Haarnoja et al. 2018, with the automatic temperature of 2018b) for continuous actions and, with
expectations in place of samples, for discrete ones (Christodoulou 2019).

Legend: B batch rows, E critics, A actions.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lockstep import kernels
from lockstep.core.spaces import BoxSpace, DiscreteSpace, Space
from lockstep.envs.control.config import EnvConfig
from lockstep.envs.control.make import make_env
from lockstep.models.control.actor import Actor
from lockstep.models.control.critics import Critics
from lockstep.models.control.heads import masked
from lockstep.models.control.policy import Policy
from lockstep.models.control.preprocess import ACTION_MASK
from lockstep.models.control.spec import NetworkConfig, PolicySpec
from lockstep.rl.exploration import PolicySamples, UniformUntil
from lockstep.rl.losses import Metrics, critic_gradient, sac_actor_gradients
from lockstep.rl.offpolicy import ReplayConfig, TransitionCollector, make_replay
from lockstep.rl.optimiser import make_optimiser
from lockstep.rl.replay import Batch
from lockstep.rl.session import Result, RunConfig, Session
from lockstep.rl.soft import Choice, SampledActions, Temperature


@dataclass(frozen=True, kw_only=True)
class SACConfig:
    """Soft actor-critic."""

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
    """Critics, whose minimum is the value."""
    temperature: float | None = None
    """Fixed weight of the entropy (None: learned)."""
    temperature_init: float = 1.0
    """First value of a learned temperature."""
    target_entropy: float | None = None
    """Entropy that a learned temperature keeps (nats; None: minus the action dimensions, or 0.89 ln A for A discrete
    actions)."""
    normalise_obs: bool = False
    """Running normalisation of observations, part of the policy."""
    frame_stack: int = 1
    """Frames joined by the policy."""

    def policy_spec(self, obs_space: Space, action_space: Space) -> PolicySpec:
        """The policy that this configuration trains on those spaces."""
        return PolicySpec(
            obs_space=obs_space,
            action_space=action_space,
            head="squashed" if isinstance(action_space, BoxSpace) else "categorical",
            network=self.network,
            critic=False,
            normalise_obs=self.normalise_obs,
            frame_stack=self.frame_stack,
        )


def train(config: SACConfig, session: Session) -> Result:
    """Collect, then for each sampled batch: temperature, critics, policy, target critics; repeat."""
    kernels.set_num_threads(config.run.threads)
    env = make_env(config.env, seed=session.seed)
    policy = Policy(config.policy_spec(env.obs_space, env.action_space), seed=session.seed)
    actor = Actor(policy, env.num_envs, seed=session.seed)
    critics, target = make_critics(config, policy, session.seed), make_critics(config, policy, session.seed)
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
    soft = _Discrete(policy) if isinstance(env.action_space, DiscreteSpace) else _Continuous(policy, session.seed)
    pairs = list(target.parameters()), list(critics.parameters())
    while session.running:
        num_steps, episodes = collector.collect(config.replay.train_freq)
        metrics: Metrics = {}
        for key in config.replay.gradient_keys(session, collector.num_steps, env.num_envs):
            batch = replay.sample(config.replay.batch_size, key)
            choice = soft.choose(batch.features, key)
            alpha = temperature.value()
            if temperature.learned:
                temperature.set_gradient(choice.entropy_B)
                temperature_optimiser.step()
            target_B = batch.reward_B + batch.discount_B * soft.next_value(target, batch, alpha, key)
            values_EB = soft.values(critics, batch)
            gradient_EB, metrics = critic_gradient(values_EB, target_B)
            critic_optimiser.zero_grad()
            values_EB.backward(gradient_EB)
            critic_optimiser.step()
            roots = choice.entropy_B, soft.expected(critics, batch, choice)
            gradients, actor_metrics = sac_actor_gradients(*roots, alpha)
            optimiser.zero_grad()
            torch.autograd.backward(roots, gradients)
            optimiser.step()
            kernels.polyak(*pairs, config.tau)
            metrics |= {**actor_metrics, "temperature": alpha}
        session.advance(num_steps, metrics, episodes)
    env.close()
    return session.finish()


def make_critics(config: SACConfig, policy: Policy, seed: int) -> Critics:
    """Critics for the policy's input and actions."""
    space = policy.spec.action_space
    return Critics(
        policy.preprocess.features,
        config.network,
        num_actions=int(np.prod(space.shape)) if isinstance(space, BoxSpace) else 0,
        num_critics=config.num_critics,
        num_outputs=space.n if isinstance(space, DiscreteSpace) else 1,
        seed=seed + 1,
    )


class _Continuous:
    """Values at one sampled action of each row."""

    def __init__(self, policy: Policy, seed: int) -> None:
        self.sampler = SampledActions(policy, seed)

    def choose(self, features: Any, key: int) -> Choice:
        return self.sampler.choose(features, key)

    @torch.no_grad()
    def next_value(self, target: Critics, batch: Batch, alpha: Tensor, key: int) -> Tensor:
        choice = self.sampler.choose(batch.next_features, key, stream=1)
        q_B = target(batch.next_features, choice.action_BA).squeeze(2).amin(0)
        return q_B + alpha * choice.entropy_B

    def values(self, critics: Critics, batch: Batch) -> Tensor:
        return critics(batch.features, batch.action).squeeze(2)

    def expected(self, critics: Critics, batch: Batch, choice: Choice) -> Tensor:
        return critics.with_constant_weights(batch.features, choice.action_BA).squeeze(2).min(0).values


class _Discrete:
    """Expectations over all actions of each row."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy

    def choose(self, features: Any, key: int) -> Choice:
        mask = features[ACTION_MASK] if isinstance(features, dict) and ACTION_MASK in features else None
        logprob_BA = torch.log_softmax(masked(self.policy.actor(self.policy.encoder(features)), mask), dim=1)
        probs_BA = logprob_BA.exp()
        return Choice(-(probs_BA * logprob_BA).sum(1), probs_BA)

    @torch.no_grad()
    def next_value(self, target: Critics, batch: Batch, alpha: Tensor, key: int) -> Tensor:
        choice = self.choose(batch.next_features, key)
        q_BA = target(batch.next_features).amin(0)
        return (choice.action_BA * q_BA).sum(1) + alpha * choice.entropy_B

    def values(self, critics: Critics, batch: Batch) -> Tensor:
        q_EBA = critics(batch.features)
        return q_EBA.gather(2, batch.action.expand(len(q_EBA), -1).unsqueeze(2)).squeeze(2)

    def expected(self, critics: Critics, batch: Batch, choice: Choice) -> Tensor:
        with torch.no_grad():
            q_BA = critics(batch.features).amin(0)
        return (choice.action_BA * q_BA).sum(1)
