"""How a vector environment is brought back to where it was.

replay   reset each environment to its episode's seed and repeat its actions: exact for any deterministic simulator
arrays   the environment's own arrays and random generators, written back
none     a new episode everywhere, and `load_state_dict` says so
"""

# N environments, L actions kept

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, Protocol

import gymnasium as gym
import numpy as np

from lockstep.envs.control.episodes import Replay
from lockstep.envs.control.spaces import Obs

if TYPE_CHECKING:
    from lockstep.envs.control.stepper import Stepper

HISTORY_LIMIT = 100_000
"""Actions kept per environment; longer episodes are not restorable by replay."""


class Restorer(ABC):
    """Saves and restores the inside of a vector environment for a `Stepper`.

    `on_reset` and `on_step` are told of every reset and step; `save` gives arrays and JSON-able values; `load` returns
    (canonical observations, bool_N that started a new episode instead), or None if nothing could be restored.
    """

    method: str
    note: str

    @abstractmethod
    def on_reset(self) -> None: ...

    @abstractmethod
    def on_step(self, actions: np.ndarray, length_N: np.ndarray) -> None: ...

    @abstractmethod
    def save(self, stepper: Stepper) -> dict[str, Any]: ...

    @abstractmethod
    def load(self, stepper: Stepper, state: dict[str, Any], saved: Obs) -> tuple[Obs, np.ndarray] | None: ...


class NoRestore(Restorer):
    """Nothing can be restored; `note` says why."""

    def __init__(self, note: str) -> None:
        self.method, self.note = "none", note

    def on_reset(self) -> None:
        """Nothing to keep."""

    def on_step(self, actions: np.ndarray, length_N: np.ndarray) -> None:
        """Nothing to keep."""

    def save(self, stepper: Stepper) -> dict[str, Any]:
        """Empty."""
        return {}

    def load(self, stepper: Stepper, state: dict[str, Any], saved: Obs) -> None:
        """Nothing restored."""


class Replayable(Protocol):
    """A vector environment that replays plans itself: (raw observations, bool_N where the replay went as planned)."""

    def restore(self, base_seed: int, plans: list[Replay]) -> tuple[Any, np.ndarray]: ...


class ReplayRestore(Restorer):
    """Keeps the actions since the oldest running episode's reset."""

    def __init__(self, env: Replayable) -> None:
        self.method = "replay"
        self.note = "reset to the episode's seed and repeat its actions; exact for deterministic simulators"
        self._env = env
        self._actions: list[np.ndarray] = []

    def on_reset(self) -> None:
        """Forget all actions."""
        self._actions.clear()

    def on_step(self, actions: np.ndarray, length_N: np.ndarray) -> None:
        """Keep the actions; `actions` is never written to afterwards."""
        kept = self._actions
        kept.append(actions)
        if len(kept) % 1024 == 0:
            needed = min(int(length_N.max()), HISTORY_LIMIT)
            del kept[: len(kept) - needed]

    def save(self, stepper: Stepper) -> dict[str, Any]:
        """The actions since the oldest reset, [L, N, ...]."""
        needed = min(int(stepper.length_N.max()), len(self._actions))
        kept = self._actions[len(self._actions) - needed :]
        like = np.empty((0, stepper.num_envs))
        return {"actions_LN": np.stack(kept) if kept else like}

    def load(self, stepper: Stepper, state: dict[str, Any], saved: Obs) -> tuple[Obs, np.ndarray] | None:
        """Replay."""
        actions_LN = np.asarray(state["actions_LN"])
        if int(stepper.length_N.max()) > len(actions_LN):
            return None
        plans = [
            Replay(int(episode), actions_LN[len(actions_LN) - int(length) :, i], bool(pending))
            for i, (episode, length, pending) in enumerate(
                zip(stepper.episode_N, stepper.length_N, stepper.pending_N, strict=True)
            )
        ]
        raw, faithful_N = self._env.restore(stepper.seed, plans)
        self._actions = list(actions_LN)
        return stepper.canonical(raw, {}), ~np.asarray(faithful_N)


class WrappedReplay:
    """Replays a Gymnasium `SyncVectorEnv` or `AsyncVectorEnv` of `SeededEpisodes`.

    Each wrapper replays its plan and holds the result; one step then hands all of them over, which also sets the vector
    environment's own record of who is to be reset next.
    """

    def __init__(self, env: gym.vector.VectorEnv) -> None:
        self._env: Any = env

    def restore(self, base_seed: int, plans: list[Replay]) -> tuple[Any, np.ndarray]:
        """See `Replayable`."""
        self._env.reset(seed=[base_seed] * len(plans))
        results = self._env.call("restore", base_seed, plans, True)
        faithful_N = np.array([is_faithful for _, is_faithful in results])
        raw, *_ = self._env.step(self._env.action_space.sample())
        return raw, faithful_N


class ArrayState(ABC):
    """A vector environment whose whole state can be read and written."""

    @abstractmethod
    def get_state(self) -> dict[str, Any]:
        """Copies of arrays, and JSON-able values."""

    @abstractmethod
    def set_state(self, state: dict[str, Any]) -> None:
        """Inverse of `get_state`."""


class ArrayRestore(Restorer):
    """Writes the environment's own state back."""

    def __init__(self, env: ArrayState) -> None:
        self.method, self.note = "arrays", "the environment's arrays and random generators"
        self._env = env

    def on_reset(self) -> None:
        """Nothing to keep."""

    def on_step(self, actions: np.ndarray, length_N: np.ndarray) -> None:
        """Nothing to keep."""

    def save(self, stepper: Stepper) -> dict[str, Any]:
        """The environment's state."""
        return self._env.get_state()

    def load(self, stepper: Stepper, state: dict[str, Any], saved: Obs) -> tuple[Obs, np.ndarray]:
        """Write it back; the observation is the saved one, which the state belongs to."""
        self._env.set_state(state)
        return saved, np.zeros(stepper.num_envs, np.bool_)
