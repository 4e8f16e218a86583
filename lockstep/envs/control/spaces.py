"""Gymnasium spaces to `core.spaces`, and the observations that go with them.

Observations are made canonical here, once: nested dictionaries and tuples become one flat dictionary with dotted keys,
float64 becomes float32, booleans become uint8 (0 or 1), text is dropped. Discrete values stay as the environment gives
them: the policy's own pipeline takes off what they start at, so that a saved policy reads what the environment says.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np

from lockstep.core.errors import EnvError
from lockstep.core.spaces import BoxSpace, DictSpace, DiscreteSpace, MultiDiscreteSpace, Space

MASK_KEY = "action_mask"
Obs = np.ndarray | dict[str, np.ndarray]


class ObsCodec:
    """Turns observations of a Gymnasium space, single or batched, into the canonical form.

    Attributes:
        space: the canonical space of one observation.
        dropped: keys left out because a policy cannot read them (text).

    Raises:
        EnvError: for spaces that have no array form (graphs, sequences).
    """

    def __init__(self, space: gym.Space[Any]) -> None:
        self.dropped: list[str] = []
        if isinstance(space, (gym.spaces.Dict, gym.spaces.Tuple)):
            leaves = _leaves(space, ())
            self.dropped = [".".join(map(str, path)) for path, leaf in leaves if _is_text(leaf)]
            kept = [(path, leaf) for path, leaf in leaves if not _is_text(leaf)]
            self.paths: list[tuple[str, tuple[Any, ...]]] = [(".".join(map(str, path)), path) for path, _ in kept]
            self.space: Space = DictSpace(
                {
                    key: mask_space(leaf) if key == MASK_KEY else leaf_space(leaf)
                    for (key, _), (_, leaf) in zip(self.paths, kept, strict=True)
                }
            )
            self.is_dict = True
        else:
            self.paths = []
            self.space = leaf_space(space)
            self.is_dict = False

    def split(self, obs: Any) -> Any:
        """Flat dictionary of raw leaves (dict and tuple spaces), or `obs` itself. No copies, no casts."""
        if not self.is_dict:
            return obs
        flat = {}
        for key, path in self.paths:
            leaf = obs
            try:
                for part in path:
                    leaf = leaf[part]
            except (KeyError, IndexError, TypeError) as error:
                raise EnvError(
                    f"the observation lacks {key!r}, which its space declares; got {type(obs).__name__} "
                    f"{list(obs) if isinstance(obs, dict) else ''}; return every part, or take it out of the space"
                ) from error
            flat[key] = leaf
        return flat

    def batch(self, obs: Any, num_envs: int) -> Obs:
        """Canonical arrays [num_envs, ...] of a raw batched observation."""
        return self.batch_flat(self.split(obs), num_envs)

    def batch_flat(self, flat: Any, num_envs: int) -> Obs:
        """`batch` of an observation that `split` has already flattened."""
        if isinstance(self.space, DictSpace):
            return {key: _cast(flat[key], sub, num_envs, key) for key, sub in self.space.spaces.items()}
        return _cast(flat, self.space, num_envs, "obs")


def leaf_space(space: gym.Space[Any]) -> Space:
    """Canonical form of a Box, Discrete, MultiDiscrete or MultiBinary space.

    Raises:
        EnvError: for any other space.
    """
    match space:
        case gym.spaces.Box():
            dtype = canonical_dtype(space.dtype)
            return BoxSpace(tuple(space.shape), dtype.name, *_bounds(space, dtype))
        case gym.spaces.Discrete():
            return DiscreteSpace(int(space.n), int(space.start))
        case gym.spaces.MultiDiscrete():
            if space.nvec.ndim != 1:
                raise EnvError(f"MultiDiscrete with nvec of shape {space.nvec.shape} is not supported; use one axis")
            start = tuple(int(n) for n in space.start) if np.any(space.start) else ()
            return MultiDiscreteSpace(tuple(int(n) for n in space.nvec), start)
        case gym.spaces.MultiBinary():
            return BoxSpace(tuple(space.shape), "uint8", (0.0,), (1.0,))
    raise EnvError(
        f"space {space} has no array form; supported: Box, Discrete, MultiDiscrete, MultiBinary, and Dict or Tuple of "
        "them. Wrap the environment so that it gives one of these"
    )


def action_space_of(space: gym.Space[Any]) -> Space:
    """Canonical action space: MultiBinary(n) becomes n choices of two.

    Raises:
        EnvError: for spaces that a policy cannot act in.
    """
    if isinstance(space, gym.spaces.MultiBinary) and len(space.shape) == 1:
        return MultiDiscreteSpace((2,) * int(space.shape[0]))
    if isinstance(space, (gym.spaces.Box, gym.spaces.Discrete, gym.spaces.MultiDiscrete)):
        return leaf_space(space)
    raise EnvError(f"action space {space} is not supported; supported: Box, Discrete, MultiDiscrete, MultiBinary")


def mask_space(space: gym.Space[Any]) -> BoxSpace:
    """Space of an action mask that the environment declares in its observation."""
    size = int(np.prod(space.shape or ()))
    return BoxSpace((size,), "bool", (0.0,), (1.0,))


def mask_size(action_space: gym.Space[Any]) -> int:
    """Length of an action mask: choices of a Discrete space, or those of all parts of a MultiDiscrete one.

    Raises:
        EnvError: for spaces without choices.
    """
    canonical = action_space_of(action_space)
    if isinstance(canonical, DiscreteSpace):
        return canonical.n
    if isinstance(canonical, MultiDiscreteSpace):
        return sum(canonical.nvec)
    raise EnvError(f"the environment gives an action mask, which needs discrete actions, but acts in {action_space}")


def canonical_dtype(dtype: Any) -> np.dtype:
    """float64 -> float32, bool -> uint8, other types unchanged."""
    given: np.dtype[Any] = np.dtype(dtype)
    if given == np.float64:
        return np.dtype(np.float32)
    return np.dtype(np.uint8) if given == np.bool_ else given


def action_writer(space: gym.Space[Any]) -> Callable[[np.ndarray], np.ndarray]:
    """Function from canonical actions [N, ...] to a fresh array in the environment's own dtype."""
    is_choice = isinstance(space, (gym.spaces.Discrete, gym.spaces.MultiDiscrete))
    dtype = np.int64 if is_choice else space.dtype
    return lambda actions: np.array(actions, dtype=dtype)


def _cast(value: Any, space: Space, num_envs: int, key: str) -> np.ndarray:
    array = np.asarray(value)
    if isinstance(space, BoxSpace):
        shape: tuple[int, ...] = (num_envs, *space.shape)
        dtype = np.dtype(space.dtype)
    elif isinstance(space, DiscreteSpace):
        shape, dtype = (num_envs,), np.dtype(np.int64)
    else:
        assert isinstance(space, MultiDiscreteSpace)
        shape, dtype = (num_envs, len(space.nvec)), np.dtype(np.int64)
    if array.shape != shape:
        raise EnvError(f"observation {key!r} has shape {array.shape}, but its space says {shape}")
    return array.astype(dtype, copy=False)


def _leaves(space: gym.Space[Any], path: tuple[Any, ...]) -> list[tuple[tuple[Any, ...], gym.Space[Any]]]:
    if isinstance(space, gym.spaces.Dict):
        return [leaf for key, sub in space.spaces.items() for leaf in _leaves(sub, (*path, key))]
    if isinstance(space, gym.spaces.Tuple):
        return [leaf for index, sub in enumerate(space.spaces) for leaf in _leaves(sub, (*path, index))]
    return [(path, space)]


def _is_text(space: gym.Space[Any]) -> bool:
    return space.dtype is not None and np.dtype(space.dtype).kind == "U"


def _bounds(space: gym.spaces.Box, dtype: np.dtype) -> tuple[tuple[float, ...], tuple[float, ...]]:
    low, high = space.low.astype(np.float64).ravel(), space.high.astype(np.float64).ravel()
    if low.size == 0:
        return (-float("inf"),), (float("inf"),)
    return _shared(low), _shared(high)


def _shared(bound: np.ndarray) -> tuple[float, ...]:
    values = (bound[0],) if np.all(bound == bound[0]) else bound
    return tuple(float(x) for x in values)
