"""Which configuration trains by which loop: the one dictionary where a name from outside becomes an algorithm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lockstep.core.errors import ConfigError, unknown_name
from lockstep.learn import distill, preference, reward_model, sft
from lockstep.learn import session as language
from lockstep.rl.control import a2c, bc, dqn, iql, ppo, sac, td3, tqc
from lockstep.rl.control import distill as policy_distill
from lockstep.rl.lm import grpo
from lockstep.rl.ranges import CONTROL, LANGUAGE, check_ranges
from lockstep.rl.session import ProgressHook, RunConfig, Session
from lockstep.runs.directory import RunDirectory

AlgorithmConfig = Any
"""Any of the configs below: frozen, with a part `run`, and those of control with a part `env`."""

Train = Callable[[Any, Any], Any]
"""(config, session) -> what came out."""

ALGORITHMS: dict[str, tuple[type, Train]] = {
    "A2CConfig": (a2c.A2CConfig, a2c.train),
    "BCConfig": (bc.BCConfig, bc.train),
    "DQNConfig": (dqn.DQNConfig, dqn.train),
    "DistillConfig": (distill.DistillConfig, distill.train),
    "GRPOConfig": (grpo.GRPOConfig, grpo.train),
    "IQLConfig": (iql.IQLConfig, iql.train),
    "PPOConfig": (ppo.PPOConfig, ppo.train),
    "PolicyDistillConfig": (policy_distill.PolicyDistillConfig, policy_distill.train),
    "PreferenceConfig": (preference.PreferenceConfig, preference.train),
    "RewardModelConfig": (reward_model.RewardModelConfig, reward_model.train),
    "SACConfig": (sac.SACConfig, sac.train),
    "SFTConfig": (sft.SFTConfig, sft.train),
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
        ConfigError: not an algorithm's config, or a value that no algorithm can use.
    """
    train_function(type(config).__name__)
    check_ranges(config, CONTROL if isinstance(config.run, RunConfig) else LANGUAGE)
    return config


def open_session(
    config: AlgorithmConfig,
    directory: RunDirectory,
    on_progress: ProgressHook | None,
    on_event: language.EventHook | None = None,
    *,
    resume: bool,
) -> Session | language.Session:
    """The session that the config's loop runs in: control counts environment steps, language counts updates and events."""
    if isinstance(config.run, RunConfig):
        return Session(config.run, config.env, directory=directory, on_progress=on_progress, resume=resume)
    return language.Session(config.run, directory=directory, on_progress=on_progress, on_event=on_event, resume=resume)


def is_language(config: AlgorithmConfig) -> bool:
    """Whether the config trains a language model."""
    return isinstance(config.run, language.UpdatesConfig)
