"""Implicit Q-learning (Kostrikov et al. 2022): offline, never asks for the value of an action outside the data.

Legend: B batch rows, E critics, A actions.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from lockstep import kernels
from lockstep.core.errors import ConfigError
from lockstep.core.spaces import BoxSpace, DiscreteSpace, Space
from lockstep.envs.control.config import EnvConfig
from lockstep.envs.control.make import make_env
from lockstep.models.control.critics import Critics
from lockstep.models.control.policy import Policy
from lockstep.models.control.spec import NetworkConfig, PolicySpec
from lockstep.rl.dataset import OfflineData, load_transitions
from lockstep.rl.losses import critic_loss, expectile_loss, weighted_regression_loss
from lockstep.rl.optimiser import make_optimiser
from lockstep.rl.replay import Batch
from lockstep.rl.session import Result, RunConfig, Session


@dataclass(frozen=True, kw_only=True)
class IQLConfig:
    """Implicit Q-learning."""

    dataset: str = ""
    """Path of an .npz file (observations, actions, rewards, terminals, timeouts) or a Minari data set id."""
    env: EnvConfig = field(default_factory=EnvConfig)
    """Environment that the data comes from; evaluations run on it."""
    network: NetworkConfig = field(
        default_factory=lambda: NetworkConfig(hidden_sizes=(256, 256), activation="relu", init="uniform")
    )
    """Network of policy, value and critics."""
    run: RunConfig = field(default_factory=lambda: RunConfig(total_steps=20_000))
    """Length (one step is one gradient step), seed, evaluation, checkpoints."""
    batch_size: int = 256
    """Transitions of a gradient step."""
    learning_rate: float = 3e-4
    """Adam step size."""
    gamma: float = 0.99
    """Discount per step."""
    tau: float = 0.005
    """Share of the critics that enters the target critics at each gradient step."""
    expectile: float = 0.7
    """Expectile of the value (0.5: the mean; towards 1: the best action in the data)."""
    temperature: float = 3.0
    """Inverse temperature of the advantage weights."""
    max_weight: float = 100.0
    """Largest advantage weight."""
    reward_scale: float = 1.0
    """Rewards are multiplied by this."""
    normalise_obs: bool = False
    """Normalise observations by the data's mean and deviation, part of the policy."""

    def policy_spec(self, obs_space: Space, action_space: Space) -> PolicySpec:
        """The policy that this configuration trains on those spaces."""
        return PolicySpec(
            obs_space=obs_space,
            action_space=action_space,
            head="gaussian" if isinstance(action_space, BoxSpace) else "categorical",
            network=self.network,
            critic=False,
            normalise_obs=self.normalise_obs,
        )


def train(config: IQLConfig, session: Session) -> Result:
    """For each batch: value by expectile regression, policy by weighted regression, critics by the value; repeat."""
    _check(config)
    kernels.set_num_threads(config.run.threads)
    env = make_env(config.env, seed=session.seed)
    obs_space, action_space = env.obs_space, env.action_space
    env.close()
    policy = Policy(config.policy_spec(obs_space, action_space), seed=session.seed)
    transitions = load_transitions(config.dataset, obs_space, action_space)
    data = OfflineData(transitions, policy, gamma=config.gamma, seed=session.seed)
    critics = _critics(config, policy, action_space, num_critics=2, seed=session.seed + 1)
    target = _critics(config, policy, action_space, num_critics=2, seed=session.seed + 1)
    value = _critics(config, policy, None, num_critics=1, seed=session.seed + 2)
    parts = {"policy_optimiser": policy, "critic_optimiser": critics, "value_optimiser": value}
    optimisers = {name: make_optimiser(module, config.learning_rate) for name, module in parts.items()}
    session.begin(policy, {"critics": critics, "target": target, "value": value, **optimisers})
    pairs = list(target.parameters()), list(critics.parameters())
    while session.running:
        batch = data.sample(config.batch_size, session.step)
        with torch.no_grad():
            q_B = _taken(target, batch).amin(0)
        v_B = value(batch.features)[0].squeeze(1)
        loss, metrics = expectile_loss(v_B, q_B, config.expectile)
        _minimise(loss, optimisers["value_optimiser"])
        with torch.no_grad():
            advantage_B = q_B - value(batch.features)[0].squeeze(1)
            next_v_B = value(batch.next_features)[0].squeeze(1)
            target_B = config.reward_scale * batch.reward_B + batch.discount_B * next_v_B
        logprob_B = policy.evaluate(batch.features, batch.action)[0]
        loss, actor_metrics = weighted_regression_loss(
            logprob_B, advantage_B, temperature=config.temperature, max_weight=config.max_weight
        )
        _minimise(loss, optimisers["policy_optimiser"])
        loss, critic_metrics = critic_loss(_taken(critics, batch), target_B)
        _minimise(loss, optimisers["critic_optimiser"])
        kernels.polyak(*pairs, config.tau)
        session.advance(1, {**metrics, **actor_metrics, **critic_metrics}, [])
    return session.finish()


def _taken(critics: Critics, batch: Batch) -> Tensor:
    """Values of the data's actions [E, B]."""
    if batch.action.is_floating_point():
        return critics(batch.features, batch.action).squeeze(2)
    q_EBA = critics(batch.features)
    return q_EBA.gather(2, batch.action.expand(len(q_EBA), -1).unsqueeze(2)).squeeze(2)


def _minimise(loss: Tensor, optimiser: kernels.FusedAdam) -> None:
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()


def _critics(config: IQLConfig, policy: Policy, action_space: Space | None, *, num_critics: int, seed: int) -> Critics:
    """Critics of actions in that space, or of observations alone."""
    return Critics(
        policy.preprocess.features,
        config.network,
        num_actions=int(np.prod(action_space.shape)) if isinstance(action_space, BoxSpace) else 0,
        num_critics=num_critics,
        num_outputs=action_space.n if isinstance(action_space, DiscreteSpace) else 1,
        seed=seed,
    )


def _check(config: IQLConfig) -> None:
    if not 0.0 < config.expectile < 1.0:
        raise ConfigError(f"expectile={config.expectile}; expected 0 < expectile < 1")
    if config.max_weight <= 0.0:
        raise ConfigError(f"max_weight={config.max_weight}; expected a positive number")
