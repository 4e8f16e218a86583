"""Advantage actor-critic (Mnih et al. 2016), synchronous: one gradient step on each short rollout.

Legend: T steps, N environments.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from lockstep import kernels
from lockstep.core.errors import ConfigError
from lockstep.core.spaces import BoxSpace, Space
from lockstep.core.tree import tree_map
from lockstep.envs.control.config import EnvConfig
from lockstep.envs.control.make import make_env
from lockstep.models.control.actor import Actor, as_tensor
from lockstep.models.control.policy import Policy
from lockstep.models.control.spec import NetworkConfig, PolicySpec
from lockstep.rl.losses import a2c_loss
from lockstep.rl.optimiser import make_optimiser
from lockstep.rl.rollout import Collector, RewardScaler, Rollout
from lockstep.rl.schedules import linear
from lockstep.rl.session import Result, RunConfig, Session


@dataclass(frozen=True, kw_only=True)
class A2CConfig:
    """Advantage actor-critic."""

    env: EnvConfig = field(default_factory=EnvConfig)
    """Environment and number of copies."""
    network: NetworkConfig = field(default_factory=NetworkConfig)
    """Policy network."""
    run: RunConfig = field(default_factory=RunConfig)
    """Length, seed, evaluation, checkpoints."""
    num_steps: int = 5
    """Steps of each environment per update."""
    learning_rate: float = 7e-4
    """Adam step size at the start."""
    learning_rate_end: float | None = None
    """Adam step size at the end, reached linearly (None: constant)."""
    adam_eps: float = 1e-5
    """Adam epsilon."""
    gamma: float = 0.99
    """Discount per step."""
    gae_lambda: float = 1.0
    """GAE decay; 1 gives the n-step advantage of the paper."""
    vtrace: bool = False
    """Targets by V-trace (Espeholt et al. 2018); on-policy they equal the n-step ones."""
    value_coef: float = 0.5
    """Weight of the value loss."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""
    max_grad_norm: float = 0.5
    """Clip of the gradient's global norm."""
    normalise_advantage: bool = False
    """Zero mean, unit deviation over the rollout."""
    normalise_obs: bool = False
    """Running normalisation of observations, part of the policy."""
    normalise_reward: bool = False
    """Scale rewards by the deviation of the discounted return (training only)."""
    frame_stack: int = 1
    """Frames joined by the policy."""
    log_std_init: float = 0.0
    """Initial log standard deviation of continuous actions."""

    def policy_spec(self, obs_space: Space, action_space: Space) -> PolicySpec:
        """The policy that this configuration trains on those spaces."""
        return PolicySpec(
            obs_space=obs_space,
            action_space=action_space,
            head="gaussian" if isinstance(action_space, BoxSpace) else "categorical",
            network=self.network,
            normalise_obs=self.normalise_obs,
            frame_stack=self.frame_stack,
            log_std_init=self.log_std_init,
        )


def train(config: A2CConfig, session: Session) -> Result:
    """Collect T steps of N environments, take one gradient step on them; repeat."""
    if config.num_steps < 1:
        raise ConfigError(f"num_steps={config.num_steps}; expected at least 1")
    kernels.set_num_threads(config.run.threads)
    env = make_env(config.env, seed=session.seed)
    policy = Policy(config.policy_spec(env.obs_space, env.action_space), seed=session.seed)
    actor = Actor(policy, env.num_envs, seed=session.seed)
    optimiser = make_optimiser(policy, config.learning_rate, eps=config.adam_eps)
    scaler = RewardScaler(env.num_envs, config.gamma)
    rollout = Rollout(config.num_steps, env.num_envs)
    collector = Collector(env, actor, keep_obs=config.normalise_obs)
    collector.begin(session.seed)
    session.begin(policy, {"collector": collector, "optimiser": optimiser, "scaler": scaler})
    while session.running:
        if config.learning_rate_end is not None:
            optimiser.lr = linear(config.learning_rate, config.learning_rate_end, session.progress)
        episodes = collector.collect(rollout)
        reward = scaler(rollout) if config.normalise_reward else rollout.reward
        advantage, value_target = _targets(config, reward, rollout)
        logprob, entropy, value = _outputs(policy, rollout)
        rows = rollout.valid.flatten()
        advantage = advantage.flatten()[rows]
        if config.normalise_advantage:
            std, mean = torch.std_mean(advantage)
            advantage = (advantage - mean) / (std + 1e-8)
        loss, metrics = a2c_loss(
            logprob[rows],
            entropy[rows],
            value[rows],
            advantage_B=advantage,
            return_B=value_target.flatten()[rows],
            value_coef=config.value_coef,
            entropy_coef=config.entropy_coef,
        )
        optimiser.zero_grad()
        loss.backward()
        optimiser.step(max_grad_norm=config.max_grad_norm)
        for obs in rollout.obs:
            policy.preprocess.update(tree_map(as_tensor, obs))
        session.advance(rollout.num_valid, metrics, episodes)
    env.close()
    return session.finish()


def _targets(config: A2CConfig, reward: torch.Tensor, rollout: Rollout) -> tuple[torch.Tensor, torch.Tensor]:
    """(advantage [T, N], value target [T, N])."""
    if config.vtrace:
        value_target, advantage = kernels.vtrace(
            torch.zeros_like(reward),
            reward,
            rollout.value,
            rollout.next_value,
            rollout.terminated,
            rollout.ended,
            rollout.valid,
            config.gamma,
        )
        return advantage, value_target
    advantage = kernels.gae(
        reward,
        rollout.value,
        rollout.next_value,
        rollout.terminated,
        rollout.ended,
        rollout.valid,
        config.gamma,
        config.gae_lambda,
    )
    return advantage, advantage + rollout.value


def _outputs(policy: Policy, rollout: Rollout) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(logprob, entropy, value) of every row [T * N] under the current weights."""
    assert rollout.action is not None
    if policy.is_recurrent:
        outs = policy.evaluate_sequence(rollout.features, rollout.action, rollout.initial_state, rollout.starts)
        logprob, entropy, value = (out.flatten() for out in outs)
        return logprob, entropy, value
    features = tree_map(lambda x: x.flatten(0, 1), rollout.features)
    return policy.evaluate(features, rollout.action.flatten(0, 1))
