"""Gymnasium-style environments, stepped together, with autoreset handled exactly."""

from lockstep.envs.control.config import AtariConfig, EnvConfig
from lockstep.envs.control.episodes import EpisodeEnd, episode_seed
from lockstep.envs.control.make import make_env, rendering
from lockstep.envs.control.stepper import EnvStep, Stepper

__all__ = ["AtariConfig", "EnvConfig", "EnvStep", "EpisodeEnd", "Stepper", "episode_seed", "make_env", "rendering"]
