"""What the user asks of an environment."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from lockstep.core.errors import ConfigError

Vectoriser = Literal["auto", "sync", "async", "native", "envpool"]
Autoreset = Literal["next_step", "same_step", "disabled"]
VECTORISERS: tuple[Vectoriser, ...] = ("auto", "sync", "async", "native", "envpool")
AUTORESETS: tuple[Autoreset, ...] = ("next_step", "same_step", "disabled")


@dataclass(frozen=True, kw_only=True)
class AtariConfig:
    """Preprocessing of ALE games (frame stacks belong to the policy)."""

    frame_skip: int = 4
    """Emulator frames per step."""
    sticky: float = 0.25
    """Probability that the emulator repeats the previous action (0.25 is the v5 protocol, 0 the older one)."""
    noop_max: int = 30
    """Most no-op frames played after a reset (0: none)."""
    episodic_life: bool = False
    """End the episode at each lost life."""
    full_action_space: bool = False
    """All 18 actions instead of the game's own."""


@dataclass(frozen=True, kw_only=True)
class EnvConfig:
    """One environment, how many copies of it and how they are stepped."""

    id: str = "CartPole-v1"
    """Gymnasium id ("CartPole-v1", "ALE/Pong-v5", "MiniGrid-Empty-5x5-v0", "MinAtar/Breakout-v1"; "package:MyEnv-v0" where
    importing the package registers it) or an import path "package.module:callable_or_class" that returns a
    `gymnasium.Env` or is a `gymnasium.vector.VectorEnv` class."""
    num_envs: int = 8
    """Copies stepped together (environments)."""
    vectoriser: Vectoriser = "auto"
    """How copies are stepped: sync (one loop), async (worker processes), native (the environment's own batched code),
    envpool, or auto (native where it exists, else sync)."""
    autoreset: Autoreset = "same_step"
    """Autoreset mode asked of the vectoriser. Where it supports only another one, that one is used and reported; the
    transitions of each environment are the same in all three (next_step leaves out its reset rows, so that rollouts
    of equal length hold fewer of them)."""
    time_limit: int | None = None
    """Truncate episodes after this many steps (None: the environment's registered limit)."""
    kwargs: dict[str, bool | int | float | str] = field(default_factory=dict)
    """Arguments of the environment's constructor."""
    clip_reward: bool = False
    """Give the learner the sign of each reward; episode returns stay unclipped."""
    num_workers: int = 0
    """Worker processes of the async vectoriser (0: one per core, at most one per environment)."""
    num_threads: int = 0
    """Threads of a native vector environment (0: its own choice)."""
    deadline_s: float = 60.0
    """Longest wait for a worker process (seconds)."""
    atari: AtariConfig = field(default_factory=AtariConfig)
    """Preprocessing of ALE games; ignored by every other environment."""

    def __post_init__(self) -> None:
        if self.num_envs < 1:
            raise ConfigError(f"num_envs={self.num_envs} must be at least 1")
        if self.vectoriser not in VECTORISERS:
            raise ConfigError(f"vectoriser={self.vectoriser!r} must be one of {', '.join(VECTORISERS)}")
        if self.autoreset not in AUTORESETS:
            raise ConfigError(f"autoreset={self.autoreset!r} must be one of {', '.join(AUTORESETS)}")
        if self.time_limit is not None and self.time_limit < 1:
            raise ConfigError(f"time_limit={self.time_limit} must be at least 1 step, or None for the registered limit")
        if self.num_workers < 0:
            raise ConfigError(f"num_workers={self.num_workers} must be 0 (one per core) or more")
        if self.deadline_s <= 0:
            raise ConfigError(f"deadline_s={self.deadline_s} must be positive (seconds)")
