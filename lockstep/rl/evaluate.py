"""Evaluation on environments of its own, with a confidence interval.

Legend: N environments.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from lockstep.core.errors import ConfigError, DeadlineError
from lockstep.envs.control.config import EnvConfig
from lockstep.envs.control.make import make_env
from lockstep.models.control.actor import Actor
from lockstep.models.control.policy import Policy
from lockstep.runs.stats import t_interval

EVAL_SEED_OFFSET = 1_000_003


@dataclass(frozen=True)
class Evaluation:
    """Returns of complete episodes (unclipped, undiscounted) and their lengths, in episode order.

    >>> Evaluation((1.0, 3.0), (5, 5), 0.1).mean
    2.0
    """

    returns: tuple[float, ...]
    lengths: tuple[int, ...]
    seconds: float

    @property
    def mean(self) -> float:
        """Mean return."""
        return float(np.mean(self.returns))

    @property
    def std(self) -> float:
        """Sample standard deviation of the returns."""
        return float(np.std(self.returns, ddof=1)) if len(self.returns) > 1 else 0.0

    @property
    def interval(self) -> tuple[float, float]:
        """95% interval of the mean over episodes (Student's t); NaN bounds for a single episode."""
        interval = t_interval(self.returns)
        return interval.low, interval.high

    def __str__(self) -> str:
        low, high = self.interval
        if len(self.returns) == 1:
            return f"{self.mean:.1f} (1 episode)"
        return f"{self.mean:.1f} (95% CI {low:.1f} to {high:.1f}, {len(self.returns)} episodes)"


class Decider(Protocol):
    """Whatever decides for N environments, remembering what it needs: a policy, or a file that was exported from one."""

    def decide(self, obs: Any) -> np.ndarray:
        """Observations, N rows -> the environments' actions."""

    def advance(self, starts_N: np.ndarray, valid_N: np.ndarray) -> None:
        """After the environments stepped: which rows begin an episode, which rows' decision counted."""


class _PolicyDecider:
    def __init__(self, actor: Actor, deterministic: bool) -> None:
        self.actor, self.deterministic = actor, deterministic
        self.advance = actor.advance

    def decide(self, obs: Any) -> np.ndarray:
        return self.actor.act(obs, deterministic=self.deterministic).env_action.numpy()


def evaluate(
    policy: Policy,
    env: EnvConfig,
    *,
    episodes: int,
    seed: int,
    deterministic: bool = True,
    num_envs: int | None = None,
    deadline_s: float = 3600.0,
) -> Evaluation:
    """Run whole episodes on fresh environments.

    Every environment plays the same number of episodes (the first ones it starts), so that short episodes are not
    counted more often than long ones. Seeds differ from training's.

    Raises:
        ConfigError: episodes < 1.
        DeadlineError: the episodes did not end in time; environments without an end need `time_limit`.
    """

    def decider(num: int) -> Decider:
        return _PolicyDecider(Actor(policy, num, seed=seed + EVAL_SEED_OFFSET), deterministic)

    return evaluate_decider(decider, env, episodes=episodes, seed=seed, num_envs=num_envs, deadline_s=deadline_s)


def evaluate_decider(
    decider: Callable[[int], Decider],
    env: EnvConfig,
    *,
    episodes: int,
    seed: int,
    num_envs: int | None = None,
    deadline_s: float = 3600.0,
) -> Evaluation:
    """`evaluate`, on the same episodes, for whatever else decides; `decider(N)` makes it for N environments.

    Raises:
        As `evaluate`.
    """
    if episodes < 1:
        raise ConfigError(f"episodes={episodes}; evaluation needs at least 1")
    num_envs = min(episodes, num_envs or 16)
    quota = np.array([episodes // num_envs + (i < episodes % num_envs) for i in range(num_envs)])
    stepper = make_env(replace(env, num_envs=num_envs, clip_reward=False), seed=seed + EVAL_SEED_OFFSET)
    start = time.perf_counter()
    try:
        actor = decider(num_envs)
        obs = stepper.reset(seed + EVAL_SEED_OFFSET)
        counts = np.zeros(num_envs, dtype=np.int64)
        ends: list[tuple[int, int, float, int]] = []
        while (counts < quota).any():
            if time.perf_counter() - start > deadline_s:
                raise DeadlineError(
                    f"evaluation of {episodes} episodes took over {deadline_s:.0f} s ({len(ends)} ended); "
                    "set env.time_limit, evaluate fewer episodes or raise deadline_s"
                )
            result = stepper.step(actor.decide(obs))
            actor.advance(result.starts_N, result.valid_N)
            obs = result.obs
            for end in result.episodes:
                if counts[end.env_index] < quota[end.env_index]:
                    ends.append((end.env_index, int(counts[end.env_index]), end.episode_return, end.length))
                    counts[end.env_index] += 1
    finally:
        stepper.close()
    ends.sort()
    returns, lengths = tuple(e[2] for e in ends), tuple(e[3] for e in ends)
    return Evaluation(returns, lengths, time.perf_counter() - start)
