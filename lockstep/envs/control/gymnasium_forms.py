"""Steppers over Gymnasium's own vectorisers: what ours are measured and tested against."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import gymnasium as gym
from gymnasium.vector import AutoresetMode

from lockstep.envs.control.episodes import SeededEpisodes
from lockstep.envs.control.restore import ReplayRestore, WrappedReplay
from lockstep.envs.control.stepper import Stepper


def gymnasium_stepper(
    makers: Sequence[Callable[[], SeededEpisodes]], mode: AutoresetMode, kind: Literal["sync", "async"]
) -> Stepper:
    """`gymnasium.vector.SyncVectorEnv` or `AsyncVectorEnv` of seeded environments as a `Stepper`."""
    env: Any
    if kind == "sync":
        env = gym.vector.SyncVectorEnv(list(makers), autoreset_mode=mode)
    else:
        env = gym.vector.AsyncVectorEnv(list(makers), autoreset_mode=mode, context="forkserver")
    return Stepper(env, mode=mode, restorer=ReplayRestore(WrappedReplay(env)), seed_each=True)
