"""Deep Q-learning (Mnih et al. 2015) with the parts that Rainbow (Hessel et al. 2018) combines, each a switch: double
(van Hasselt et al. 2016), dueling, n-step returns, prioritised replay, noisy networks, and return distributions as C51 or
QR-DQN.

Legend: B batch rows, A actions, Z atoms or quantiles.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from lockstep import kernels
from lockstep.core.errors import ConfigError
from lockstep.core.spaces import DiscreteSpace, Space
from lockstep.envs.control.config import EnvConfig
from lockstep.envs.control.make import make_env
from lockstep.layers.linear import MLP, NoisyMLP
from lockstep.models.control.actor import Actor
from lockstep.models.control.heads import QValues, masked
from lockstep.models.control.plan import net_of
from lockstep.models.control.policy import Policy
from lockstep.models.control.preprocess import ACTION_MASK
from lockstep.models.control.spec import NetworkConfig, PolicySpec
from lockstep.rl.distributional import project_categorical
from lockstep.rl.exploration import EpsilonGreedy, ParameterNoise, UniformUntil, set_parameter_noise
from lockstep.rl.losses import categorical_td_loss, quantile_huber_loss, td_gradient, td_loss
from lockstep.rl.offpolicy import ReplayConfig, TransitionCollector, make_replay
from lockstep.rl.optimiser import make_optimiser
from lockstep.rl.prioritised import PrioritisedReplay
from lockstep.rl.replay import Batch, ReplayBuffer
from lockstep.rl.schedules import linear
from lockstep.rl.session import Result, RunConfig, Session

NOISE_SEED = 0xD09
TARGET_ROWS = 4096


@dataclass(frozen=True, kw_only=True)
class DQNConfig:
    """Deep Q-learning, up to Rainbow."""

    env: EnvConfig = field(default_factory=lambda: EnvConfig(num_envs=1))
    """Environment and number of copies."""
    network: NetworkConfig = field(
        default_factory=lambda: NetworkConfig(hidden_sizes=(64, 64), activation="relu", init="uniform")
    )
    """Q-network."""
    run: RunConfig = field(default_factory=RunConfig)
    """Length, seed, evaluation, checkpoints."""
    replay: ReplayConfig = field(default_factory=lambda: ReplayConfig(batch_size=32, train_freq=4))
    """Buffer, batches and how collection alternates with learning."""
    learning_rate: float = 1e-4
    """Adam step size."""
    adam_eps: float = 1e-8
    """Adam epsilon."""
    gamma: float = 0.99
    """Discount per step."""
    max_grad_norm: float = 10.0
    """Clip of the gradient's global norm."""
    target_every: int = 10_000
    """Environment steps between two updates of the target network."""
    tau: float = 1.0
    """Share of the network that enters the target at each update (1: copy)."""
    epsilon_start: float = 1.0
    """First chance of a random action."""
    epsilon_end: float = 0.05
    """Last chance of a random action."""
    exploration_fraction: float = 0.1
    """Part of the run over which the chance falls."""
    double: bool = False
    """Choose the target's action by the online network."""
    dueling: bool = False
    """State value and advantages as separate outputs."""
    noisy: bool = False
    """Noisy layers explore in place of random actions."""
    distribution: Literal["none", "categorical", "quantile"] = "none"
    """Learn the mean return, or its distribution as C51 or QR-DQN has it."""
    num_atoms: int = 51
    """Atoms or quantiles of a distribution."""
    support: tuple[float, float] = (-10.0, 10.0)
    """Smallest and largest return of a categorical distribution."""
    prioritised: bool = False
    """Sample by TD error."""
    priority_alpha: float = 0.6
    """Exponent of priorities (0: uniform)."""
    priority_beta: float = 0.4
    """First exponent of the importance weights; it grows to 1 over the run."""
    normalise_obs: bool = False
    """Running normalisation of observations, part of the policy."""
    frame_stack: int = 1
    """Frames joined by the policy."""

    def policy_spec(self, obs_space: Space, action_space: Space) -> PolicySpec:
        """The policy that this configuration trains on those spaces."""
        return PolicySpec(
            obs_space=obs_space,
            action_space=action_space,
            head="q",
            network=self.network,
            critic=False,
            normalise_obs=self.normalise_obs,
            frame_stack=self.frame_stack,
            dueling=self.dueling,
            noisy=self.noisy,
            num_atoms=1 if self.distribution == "none" else self.num_atoms,
            support=self.support if self.distribution == "categorical" else None,
        )


def train(config: DQNConfig, session: Session) -> Result:
    """Collect, then fit the network to bootstrapped returns of sampled transitions; repeat."""
    _check(config)
    kernels.set_num_threads(config.run.threads)
    env = make_env(config.env, seed=session.seed)
    spec = config.policy_spec(env.obs_space, env.action_space)
    policy, target = Policy(spec, seed=session.seed), Policy(spec, seed=session.seed)
    actor = Actor(policy, env.num_envs, seed=session.seed)
    optimiser = make_optimiser(policy, config.learning_rate, eps=config.adam_eps)
    buffer = make_replay(config.replay, policy, env.num_envs, gamma=config.gamma, seed=session.seed)
    replay: ReplayBuffer | PrioritisedReplay = buffer
    if config.prioritised:
        replay = PrioritisedReplay(buffer, alpha=config.priority_alpha, seed=session.seed)
    collector = TransitionCollector(env, actor, replay, _exploration(config, policy, env.action_space, session))
    collector.begin(session.seed)
    session.begin(policy, {"collector": collector, "replay": replay, "target": target, "optimiser": optimiser})
    learner = Learner(config, policy, target, optimiser, replay, seed=session.seed)
    pairs = list(target.parameters()), list(policy.parameters())
    while session.running:
        num_steps, episodes = collector.collect(config.replay.train_freq)
        num_updates = (session.step + num_steps) // config.target_every - session.step // config.target_every
        if num_updates:
            kernels.polyak(*pairs, 1.0 - (1.0 - config.tau) ** num_updates)
        keys = config.replay.gradient_keys(session, collector.num_steps, env.num_envs)
        session.advance(num_steps, learner.learn(keys, session.progress), episodes)
    env.close()
    return session.finish()


class Learner:
    """The gradient steps of a round. A plain dense Q-network takes each in one compiled call, others go through autograd;
    both see the same batches."""

    def __init__(
        self,
        config: DQNConfig,
        policy: Policy,
        target: Policy,
        optimiser: kernels.FusedAdam,
        replay: ReplayBuffer | PrioritisedReplay,
        *,
        seed: int,
    ) -> None:
        self.config, self.policy, self.target, self.optimiser = config, policy, target, optimiser
        self.replay, self.seed = replay, seed
        self.fused = _fused(policy, target)

    def learn(self, keys: range, progress: float) -> dict[str, Tensor | float]:
        """One step for each key; metrics of the last."""
        if not keys:
            return {}
        return self._autograd(keys, progress) if self.fused is None else self._compiled(self.fused, keys, progress)

    def _compiled(self, gradients: kernels.QGradients, keys: range, progress: float) -> dict[str, Tensor | float]:
        replay, config = self.replay, self.config
        buffer = replay.buffer if isinstance(replay, PrioritisedReplay) else replay
        error = target_mean = 0.0
        for index_B, weight_B in _draws(config, replay, keys, progress):
            rows, at_B = buffer.rows(index_B)
            error_B, error, target_mean = gradients(rows, at_B, weight_B=weight_B, is_double=config.double)
            self.optimiser.step(max_grad_norm=config.max_grad_norm)
            if isinstance(replay, PrioritisedReplay):
                replay.update(index_B, error_B)
        return {"error": error, "target_mean": target_mean}

    def _autograd(self, keys: range, progress: float) -> dict[str, Tensor | float]:
        config, policy = self.config, self.policy
        error_B, target_BZ = torch.zeros(1), torch.zeros(1)
        for key, batch, next_params in _batches(config, self.replay, self.target, keys, progress):
            _set_noise(config, policy, self.seed, 0, key)
            target_BZ = bootstrap(config, policy, batch, next_params)
            self.optimiser.zero_grad()
            error_B = backpropagate(config, policy, batch, target_BZ)
            self.optimiser.step(max_grad_norm=config.max_grad_norm)
            if isinstance(self.replay, PrioritisedReplay):
                self.replay.update(batch.index_B, error_B)
        if isinstance(policy.actor, NoisyMLP):
            policy.actor.set_noise(None)
        return {"error": error_B.mean(), "target_mean": target_BZ.mean()}


def bootstrap(config: DQNConfig, policy: Policy, batch: Batch, next_params: Tensor) -> Tensor:
    """What the network is fitted to: returns [B], or their distribution as probabilities or quantiles [B, Z].

    Args:
        next_params: the target network at the next observations.
    """
    head = _q_head(policy)
    mask = _mask(batch.next_features)
    with torch.no_grad():
        chooser = policy.actor(policy.encoder(batch.next_features)) if config.double else next_params
        values_BA = masked(head.values(chooser), mask)
        if config.distribution == "none":
            if config.double:
                next_value_B = head.values(next_params).gather(1, values_BA.argmax(1, keepdim=True)).squeeze(1)
            else:
                next_value_B = values_BA.amax(1)
            return torch.addcmul(batch.reward_B, batch.discount_B, next_value_B)
        next_BZ = _pick(head.atoms(next_params), values_BA.argmax(1))
        if config.distribution == "categorical":
            return project_categorical(torch.softmax(next_BZ, 1), batch.reward_B, batch.discount_B, head.support_Z)
        return batch.reward_B.unsqueeze(1) + batch.discount_B.unsqueeze(1) * next_BZ


def backpropagate(config: DQNConfig, policy: Policy, batch: Batch, target_BZ: Tensor) -> Tensor:
    """Gradients of the loss into the policy's parameters; returns |TD error|, or the loss of distributions, [B]."""
    head = _q_head(policy)
    params = policy.actor(policy.encoder(batch.features))
    if head.is_plain:
        gradient_BA, error_B = td_gradient(params, batch.action, target_BZ, batch.weight_B)
        params.backward(gradient_BA)
        return error_B
    atoms = head.atoms(params)
    if config.distribution == "none":
        loss, error_B = td_loss(atoms.gather(1, batch.action.unsqueeze(1)).squeeze(1), target_BZ, batch.weight_B)
    elif config.distribution == "categorical":
        loss, error_B = categorical_td_loss(_pick(atoms, batch.action), target_BZ, batch.weight_B)
    else:
        loss, error_B = quantile_huber_loss(_pick(atoms, batch.action), target_BZ, batch.weight_B)
    loss.backward()
    return error_B


def _batches(
    config: DQNConfig, replay: ReplayBuffer | PrioritisedReplay, target: Policy, keys: range, progress: float
) -> Iterator[tuple[int, Batch, Tensor]]:
    """(key, batch, target network at its next observations). The target does not move within a round, so it is asked for
    many batches at once; not where batches depend on the errors before, or each has its own noise."""
    size = config.replay.batch_size
    together = 1 if config.prioritised or config.noisy else max(TARGET_ROWS // size, 1)
    for start in range(0, len(keys), together):
        part = keys[start : start + together]
        if isinstance(replay, PrioritisedReplay):
            rows = replay.sample(size, part[0], linear(config.priority_beta, 1.0, progress))
        else:
            rows = replay.sample(size * len(part), part[0])
        _set_noise(config, target, replay.seed, 1, part[0])
        with torch.no_grad():
            next_params = target.actor(target.encoder(rows.next_features))
        yield from zip(part, rows.split(size), next_params.split(size), strict=True)


def _draws(
    config: DQNConfig, replay: ReplayBuffer | PrioritisedReplay, keys: range, progress: float
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """(flat indices [B], importance weights [B]) of each gradient step: the rows of `_batches`."""
    size = config.replay.batch_size
    if isinstance(replay, PrioritisedReplay):
        beta = linear(config.priority_beta, 1.0, progress)
        for key in keys:
            yield replay.draw(size, key, beta)
        return
    together = max(TARGET_ROWS // size, 1)
    for start in range(0, len(keys), together):
        part = keys[start : start + together]
        index = replay.draw(size * len(part), part[0])
        for i in range(len(part)):
            yield index[i * size : (i + 1) * size], None


def _fused(policy: Policy, target: Policy) -> kernels.QGradients | None:
    """The compiled step for `policy`, or None where its network or its head needs autograd."""
    if not (isinstance(policy.actor, MLP) and isinstance(target.actor, MLP) and policy.preprocess.features.plain):
        return None
    if not _q_head(policy).is_plain:
        return None
    if not all(p.requires_grad and p.is_cpu and p.dtype is torch.float32 for p in policy.parameters()):
        return None
    return kernels.QGradients(net_of(policy.actor), net_of(target.actor))


def _exploration(config: DQNConfig, policy: Policy, space: Space, session: Session) -> UniformUntil:
    assert isinstance(space, DiscreteSpace)
    rest: EpsilonGreedy | ParameterNoise
    if config.noisy:
        rest = ParameterNoise(policy, seed=session.seed)
    else:
        rest = EpsilonGreedy(
            space.n,
            start=config.epsilon_start,
            end=config.epsilon_end,
            fraction=config.exploration_fraction,
            total_steps=session.config.total_steps,
            seed=session.seed,
        )
    return UniformUntil(space, config.replay.learning_starts, rest, seed=session.seed)


def _set_noise(config: DQNConfig, policy: Policy, seed: int, stream: int, key: int) -> None:
    if config.noisy:
        assert isinstance(policy.actor, NoisyMLP)
        set_parameter_noise(policy.actor, seed + NOISE_SEED, stream=stream, position=key)


def _pick(atoms_BAZ: Tensor, action_B: Tensor) -> Tensor:
    """The atoms of one action of each row [B, Z]."""
    return atoms_BAZ[torch.arange(len(action_B)), action_B]


def _q_head(policy: Policy) -> QValues:
    assert isinstance(policy.head, QValues)
    return policy.head


def _mask(features: Any) -> Tensor | None:
    return features[ACTION_MASK] if isinstance(features, dict) and ACTION_MASK in features else None


def _check(config: DQNConfig) -> None:
    if config.distribution != "none" and config.num_atoms < 2:
        raise ConfigError(f"num_atoms={config.num_atoms}; a distribution needs at least 2")
    if config.distribution == "categorical" and not config.support[0] < config.support[1]:
        raise ConfigError(f"support={config.support}; expected (smallest, largest) return")
    if config.target_every < 1:
        raise ConfigError(f"target_every={config.target_every}; expected at least 1 environment step")
    if not 0.0 < config.tau <= 1.0:
        raise ConfigError(f"tau={config.tau}; expected 0 < tau <= 1")
