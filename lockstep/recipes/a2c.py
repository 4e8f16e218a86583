"""A2C recipes."""

from __future__ import annotations

from lockstep.envs.control.config import EnvConfig
from lockstep.rl.control.a2c import A2CConfig
from lockstep.rl.session import RunConfig


def cartpole() -> A2CConfig:
    """CartPole-v1 by A2C, 8 environments."""
    return A2CConfig(
        env=EnvConfig(id="CartPole-v1", num_envs=8),
        run=RunConfig(total_steps=300_000),
        learning_rate=1e-3,
        learning_rate_end=0.0,
        num_steps=16,
        gae_lambda=0.95,
        gamma=0.98,
    )


def pendulum() -> A2CConfig:
    """Pendulum-v1 by A2C with RL-Zoo's hyper-parameters (without gSDE), 1M steps."""
    return A2CConfig(
        env=EnvConfig(id="Pendulum-v1", num_envs=8),
        run=RunConfig(total_steps=1_000_000),
        num_steps=8,
        learning_rate=7e-4,
        learning_rate_end=0.0,
        gamma=0.9,
        gae_lambda=0.9,
        normalise_obs=True,
        normalise_reward=True,
    )
