"""Which configuration trains by which loop: the one dictionary where a name from outside becomes an algorithm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lockstep.core.errors import ConfigError, unknown_name
from lockstep.rl.control import a2c, bc, dqn, iql, ppo, sac, td3, tqc
from lockstep.rl.session import Result, Session

AlgorithmConfig = Any
"""Any of the configs below: frozen, with parts `env` and `run`."""

Train = Callable[[Any, Session], Result]

ALGORITHMS: dict[str, tuple[type, Train]] = {
    "A2CConfig": (a2c.A2CConfig, a2c.train),
    "BCConfig": (bc.BCConfig, bc.train),
    "DQNConfig": (dqn.DQNConfig, dqn.train),
    "IQLConfig": (iql.IQLConfig, iql.train),
    "PPOConfig": (ppo.PPOConfig, ppo.train),
    "SACConfig": (sac.SACConfig, sac.train),
    "TD3Config": (td3.TD3Config, td3.train),
    "TQCConfig": (tqc.TQCConfig, tqc.train),
}


def train_function(config_class: str) -> tuple[type, Train]:
    """(config class, loop) by the config class's name.

    Raises:
        ConfigError: unknown name.
    """
    if config_class not in ALGORITHMS:
        raise ConfigError(unknown_name("algorithm config", config_class, ALGORITHMS))
    return ALGORITHMS[config_class]


def validated(config: AlgorithmConfig) -> AlgorithmConfig:
    """The config, if it is one that can be trained.

    Raises:
        ConfigError: not an algorithm's config.
    """
    train_function(type(config).__name__)
    if config.run.total_steps < 1:
        raise ConfigError(f"run.total_steps={config.run.total_steps}; expected at least 1")
    return config
