"""Every episode has its own seed, so it is the same in every vectoriser and autoreset mode, and can be replayed."""

from __future__ import annotations

import traceback
from dataclasses import dataclass
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np

from lockstep.core.errors import EnvError
from lockstep.envs.control.spaces import MASK_KEY, ObsCodec, mask_size

_U64 = (1 << 64) - 1


class EpisodeEnd(NamedTuple):
    """An episode that ended on a step.

    >>> EpisodeEnd(env_index=3, episode_return=200.0, length=200).length
    200
    """

    env_index: int
    episode_return: float
    """Sum of the environment's own rewards, before any clipping."""
    length: int
    """Steps."""


def episode_seed(seed: int, env_index: int, episode: int) -> int:
    """Seed of reset number `episode` of environment `env_index` under the base seed: 31 bits, so that emulators which
    take a C int accept it.

    >>> episode_seed(0, 1, 2) == episode_seed(0, 1, 2) != episode_seed(0, 2, 1)
    True
    """
    mixed = 0
    for part in (seed, env_index, episode):
        # One splitmix64 round per part (Steele, Lea and Flood 2014): a SeedSequence would cost 15 us at each reset.
        mixed = (mixed + part + 0x9E3779B97F4A7C15) & _U64
        mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _U64
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _U64
        mixed ^= mixed >> 31
    return mixed >> 33


@dataclass(frozen=True)
class MaskSource:
    """Where an environment without an `action_mask` observation gives its mask: `info`, or a method by this name."""

    method: str | None = None


def find_mask(env: gym.Env, info: dict[str, Any]) -> MaskSource | None:
    """How `env`, just reset with `info`, offers an action mask outside its observation (None: it does not)."""
    space = env.observation_space
    if isinstance(space, gym.spaces.Dict) and MASK_KEY in space.spaces:
        return None
    if MASK_KEY in info:
        return MaskSource()
    for method in ("action_masks", "action_mask"):
        if env.has_wrapper_attr(method) and callable(env.get_wrapper_attr(method)):
            return MaskSource(method)
    return None


class Replay(NamedTuple):
    """What brings one environment back: which episode, and the actions since its reset (in the environment's dtype)."""

    episode: int
    actions: np.ndarray
    is_pending: bool
    """The episode has ended and its reset comes with the next step (NEXT_STEP mode)."""


class SeededEpisodes(gym.Wrapper):
    """Outermost wrapper of every single environment.

    Reset number k uses `episode_seed(base, index, k)`; `reset(seed=base)` sets the base and k = 0. Observations are
    split into the flat form of `ObsCodec`, with the action mask among them.
    """

    def __init__(self, env: gym.Env, index: int, mask: MaskSource | None = None, *, env_id: str = "") -> None:
        super().__init__(env)
        self.index, self.env_id = index, env_id
        self.mask = mask
        self.codec = ObsCodec(env.observation_space)
        self.base_seed = 0
        self.episode = -1
        self.is_plain = not self.codec.is_dict and mask is None
        self.observation_space = flat_space(env.observation_space, self.codec, env.action_space, mask)
        self._held: tuple[Any, float, bool, bool, dict[str, Any]] | None = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Start the next episode, or the first one of a new base seed. `options` are ignored."""
        if seed is not None:
            self.base_seed, self.episode = seed, -1
        self.episode += 1
        self._held = None
        obs, info = self.env.reset(seed=episode_seed(self.base_seed, self.index, self.episode))
        return self._canonical(obs, info), info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Step, or hand over what `restore` left."""
        if self._held is not None:
            held, self._held = self._held, None
            return held
        obs, reward, terminated, truncated, info = self.env.step(action)
        if self.is_plain:
            return obs, reward, terminated, truncated, info
        return self._canonical(obs, info), reward, terminated, truncated, info

    def restore(self, base_seed: int, plans: list[Replay], hold: bool) -> tuple[Any, bool]:
        """Replay this environment's plan.

        Args:
            base_seed: base seed of the saved run.
            plans: one per environment; this one takes its own.
            hold: let the next `step` return the restored observation without stepping, so that a vector environment
                around this one picks it up.

        Returns:
            (observation, whether the episode ended where the plan says).
        """
        plan = plans[self.index]
        self.base_seed, self.episode = base_seed, plan.episode - 1
        obs, _ = self.reset()
        ended = False
        for action in plan.actions:
            if ended:
                break
            obs, _, terminated, truncated, _ = self.step(action)
            ended = bool(terminated or truncated)
        is_faithful = ended == plan.is_pending
        if ended and not plan.is_pending:
            obs, _ = self.reset()
        if hold:
            self._held = (obs, 0.0, plan.is_pending, False, {})
        return obs, is_faithful

    def _canonical(self, obs: Any, info: dict[str, Any]) -> Any:
        if self.is_plain:
            return obs
        flat = self.codec.split(obs)
        if self.mask is None:
            return flat
        if not self.codec.is_dict:
            flat = {"obs": flat}
        flat[MASK_KEY] = self._mask(info)
        return flat

    def _mask(self, info: dict[str, Any]) -> np.ndarray:
        assert self.mask is not None
        if self.mask.method is not None:
            return np.asarray(self.env.get_wrapper_attr(self.mask.method)(), dtype=np.int8)
        if MASK_KEY not in info:
            raise EnvError(f"environment {self.index} gave an action mask in info at reset but not now")
        return np.asarray(info[MASK_KEY], dtype=np.int8)


def broken(index: int, env_id: str, where: str, error: Exception) -> EnvError:
    """The error that names the environment whose `where` ("reset" or "step") failed, to be raised from `error`.

    The place of `error` is in the message, because the command line prints messages without tracebacks.
    """
    if isinstance(error, EnvError):
        return EnvError(f"environment {index} ({env_id!r}) in {where}: {error}")
    last = traceback.extract_tb(error.__traceback__)[-1]
    return EnvError(
        f"environment {index} ({env_id!r}) raised {type(error).__name__} in {where}: {error} (at {last.filename}:"
        f"{last.lineno}, in {last.name}); reset must return (observation, info), step (observation, reward, "
        "terminated, truncated, info); mend the environment, or check it with `lockstep doctor`"
    )


def flat_space(
    space: gym.Space[Any], codec: ObsCodec, action_space: gym.Space[Any], mask: MaskSource | None
) -> gym.Space[Any]:
    """Gymnasium space of what `SeededEpisodes` gives: the space itself, or a flat Dict."""
    if not codec.is_dict and mask is None:
        return space
    spaces: dict[str, gym.Space[Any]] = {}
    if codec.is_dict:
        for key, path in codec.paths:
            leaf: Any = space
            for part in path:
                leaf = leaf[part]
            spaces[key] = leaf
    else:
        spaces["obs"] = space
    if mask is not None:
        spaces[MASK_KEY] = gym.spaces.MultiBinary(mask_size(action_space))
    return gym.spaces.Dict(spaces)
