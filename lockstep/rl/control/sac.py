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
from lockstep.layers.linear import MLP
from lockstep.models.control.actor import Actor
from lockstep.models.control.critics import Critics
from lockstep.models.control.heads import masked
from lockstep.models.control.plan import head_of, net_of
from lockstep.models.control.policy import Policy
from lockstep.models.control.preprocess import ACTION_MASK
from lockstep.models.control.spec import NetworkConfig, PolicySpec
from lockstep.rl.exploration import PolicySamples, UniformUntil
from lockstep.rl.losses import critic_gradient, sac_actor_gradients
from lockstep.rl.offpolicy import ReplayConfig, TransitionCollector, make_replay
from lockstep.rl.optimiser import make_optimiser
from lockstep.rl.replay import Batch, ReplayBuffer
from lockstep.rl.session import Result, RunConfig, Session
from lockstep.rl.soft import Choice, SampledActions, SampleNoise, Temperature


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
    """Collect, then learn from sampled batches; repeat."""
    kernels.set_num_threads(config.run.threads)
    env = make_env(config.env, seed=session.seed)
    policy = Policy(config.policy_spec(env.obs_space, env.action_space), seed=session.seed)
    actor = Actor(policy, env.num_envs, seed=session.seed)
    critics, target = make_critics(config, policy, session.seed), make_critics(config, policy, session.seed)
    temperature = Temperature(config.temperature, config.temperature_init, config.target_entropy, env.action_space)
    optimisers = Optimisers(
        *(make_optimiser(part, config.learning_rate, eps=config.adam_eps) for part in (policy, critics, temperature))
    )
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
            "optimiser": optimisers.actor,
            "critic_optimiser": optimisers.critics,
            "temperature_optimiser": optimisers.temperature,
        },
    )
    learner = Learner(config, policy, critics, target, temperature, optimisers, replay, seed=session.seed)
    while session.running:
        num_steps, episodes = collector.collect(config.replay.train_freq)
        metrics: dict[str, Tensor | float] = {}
        for key in config.replay.gradient_keys(session, collector.num_steps, env.num_envs):
            metrics = learner.learn(key)
        session.advance(num_steps, metrics, episodes)
    env.close()
    return session.finish()


@dataclass(frozen=True)
class Optimisers:
    """One for each part that learns."""

    actor: kernels.FusedAdam
    critics: kernels.FusedAdam
    temperature: kernels.FusedAdam


class Learner:
    """A gradient step: temperature, critics, policy, target critics. Dense networks over continuous actions take the
    gradients in compiled calls, others go through autograd; both see the same batches and noise."""

    def __init__(
        self,
        config: SACConfig,
        policy: Policy,
        critics: Critics,
        target: Critics,
        temperature: Temperature,
        optimisers: Optimisers,
        replay: ReplayBuffer,
        *,
        seed: int,
    ) -> None:
        self.config, self.critics, self.target = config, critics, target
        self.temperature, self.optimisers, self.replay = temperature, optimisers, replay
        discrete = isinstance(policy.spec.action_space, DiscreteSpace)
        self.soft = _Discrete(policy) if discrete else _Continuous(policy, seed)
        self.noise = SampleNoise(policy, seed)
        self.fused = _fused(policy, critics, target)
        self.pairs = list(target.parameters()), list(critics.parameters())

    def learn(self, key: int) -> dict[str, Tensor | float]:
        """The step that `key` stands for; its metrics."""
        alpha = self.temperature.value()
        metrics = self._autograd(key, alpha) if self.fused is None else self._compiled(self.fused, key, alpha)
        kernels.polyak(*self.pairs, self.config.tau)
        return metrics | {"temperature": alpha}

    def _compiled(self, gradients: kernels.SoftGradients, key: int, alpha: Tensor) -> dict[str, Tensor | float]:
        size, weight = self.config.replay.batch_size, float(alpha)
        rows, at_B = self.replay.rows(self.replay.draw(size, key))
        entropy_B, critic_loss, q_mean = gradients.critics(rows, at_B, self.noise.pair(size, key), weight)
        self._learn_temperature(entropy_B)
        self.optimisers.critics.step()
        entropy, q = gradients.actor(weight)
        self.optimisers.actor.step()
        actor_loss = -weight * entropy - q
        return {"critic_loss": critic_loss, "q_mean": q_mean, "actor_loss": actor_loss, "entropy": entropy}

    def _autograd(self, key: int, alpha: Tensor) -> dict[str, Tensor | float]:
        soft, optimisers = self.soft, self.optimisers
        batch = self.replay.sample(self.config.replay.batch_size, key)
        choice = soft.choose(batch.features, key)
        self._learn_temperature(choice.entropy_B)
        target_B = batch.reward_B + batch.discount_B * soft.next_value(self.target, batch, alpha, key)
        values_EB = soft.values(self.critics, batch)
        gradient_EB, metrics = critic_gradient(values_EB, target_B)
        optimisers.critics.zero_grad()
        values_EB.backward(gradient_EB)
        optimisers.critics.step()
        roots = choice.entropy_B, soft.expected(self.critics, batch, choice)
        gradients, actor_metrics = sac_actor_gradients(*roots, alpha)
        optimisers.actor.zero_grad()
        torch.autograd.backward(roots, gradients)
        optimisers.actor.step()
        return {**metrics, **actor_metrics}

    def _learn_temperature(self, entropy_B: Tensor) -> None:
        if self.temperature.learned:
            self.temperature.set_gradient(entropy_B)
            self.optimisers.temperature.step()


def _fused(policy: Policy, critics: Critics, target: Critics) -> kernels.SoftGradients | None:
    """The compiled step for these networks, or None where an encoder, masks or discrete actions need autograd."""
    head = head_of(policy)
    if head is None or head.kind != "squashed" or not policy.preprocess.features.plain:
        return None
    if not isinstance(policy.actor, MLP) or policy.core is not None:
        return None
    parameters = (*policy.parameters(), *critics.parameters(), *target.parameters())
    if not all(p.requires_grad and p.is_cpu and p.dtype is torch.float32 for p in parameters):
        return None
    return kernels.SoftGradients(net_of(policy.actor), net_of(critics.mlp), net_of(target.mlp), head)


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
