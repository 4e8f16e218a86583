"""Serialisable descriptions of observation and action spaces, so that a saved policy knows its pipeline's ends
without Gymnasium. `envs.control.spaces` converts from Gymnasium."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lockstep.core.errors import ConfigError


@dataclass(frozen=True)
class BoxSpace:
    """A real- or integer-valued array.

    `low` and `high` are flat tuples of `prod(shape)` bounds, or of one bound shared by all elements.

    >>> BoxSpace((2,), "float32", (-1.0,), (1.0,)).shape
    (2,)
    """

    shape: tuple[int, ...]
    dtype: str
    low: tuple[float, ...] = (-float("inf"),)
    high: tuple[float, ...] = (float("inf"),)

    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """(low, high) as float32 arrays of `shape`."""
        low = np.asarray(self.low, dtype=np.float32)
        high = np.asarray(self.high, dtype=np.float32)
        size = int(np.prod(self.shape))
        low = np.full(size, low[0], np.float32) if low.size == 1 else low
        high = np.full(size, high[0], np.float32) if high.size == 1 else high
        return low.reshape(self.shape), high.reshape(self.shape)


@dataclass(frozen=True)
class DiscreteSpace:
    """Integers start..start+n-1. A policy's pipeline subtracts `start` from observations and adds it to actions.

    >>> DiscreteSpace(3, start=5).lowest
    (5,)
    """

    n: int
    start: int = 0

    @property
    def lowest(self) -> tuple[int, ...]:
        """Least value, as the one column of a choice."""
        return (self.start,)


@dataclass(frozen=True)
class MultiDiscreteSpace:
    """A vector of independent choices; element i lies in start[i]..start[i]+nvec[i]-1 (`start` empty: all 0).

    >>> MultiDiscreteSpace((3, 2)).lowest
    (0, 0)
    """

    nvec: tuple[int, ...]
    start: tuple[int, ...] = ()

    @property
    def lowest(self) -> tuple[int, ...]:
        """Least value of each element."""
        return self.start or (0,) * len(self.nvec)


@dataclass(frozen=True)
class DictSpace:
    """Named sub-spaces, ordered.

    >>> list(DictSpace({"a": DiscreteSpace(2)}).spaces)
    ['a']
    """

    spaces: dict[str, Space] = field(default_factory=dict)


Space = BoxSpace | DiscreteSpace | MultiDiscreteSpace | DictSpace


def space_to_json(space: Space) -> dict[str, Any]:
    """JSON form of a space. Infinite bounds are written as the strings "inf" and "-inf".

    >>> space_to_json(DiscreteSpace(2))
    {'kind': 'discrete', 'n': 2, 'start': 0}
    """
    match space:
        case BoxSpace():
            return {
                "kind": "box",
                "shape": list(space.shape),
                "dtype": space.dtype,
                "low": [_bound_to_json(x) for x in space.low],
                "high": [_bound_to_json(x) for x in space.high],
            }
        case DiscreteSpace():
            return {"kind": "discrete", "n": space.n, "start": space.start}
        case MultiDiscreteSpace():
            return {"kind": "multi_discrete", "nvec": list(space.nvec), "start": list(space.start)}
        case DictSpace():
            return {"kind": "dict", "spaces": {name: space_to_json(sub) for name, sub in space.spaces.items()}}


def space_from_json(data: dict[str, Any]) -> Space:
    """Inverse of `space_to_json`.

    Raises:
        ConfigError: for an unknown kind or a missing field.
    """
    kind = data.get("kind")
    try:
        if kind == "box":
            low = tuple(float(x) for x in data["low"])
            high = tuple(float(x) for x in data["high"])
            return BoxSpace(tuple(data["shape"]), data["dtype"], low, high)
        if kind == "discrete":
            return DiscreteSpace(int(data["n"]), int(data["start"]))
        if kind == "multi_discrete":
            # Policies saved before offsets were part of this space lack "start".
            start = tuple(int(n) for n in data.get("start", ()))
            return MultiDiscreteSpace(tuple(int(n) for n in data["nvec"]), start)
        if kind == "dict":
            return DictSpace({name: space_from_json(sub) for name, sub in data["spaces"].items()})
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"space of kind {kind!r} is malformed: {error!r}; got {data!r}") from error
    raise ConfigError(f"unknown space kind {kind!r}; expected box, discrete, multi_discrete or dict")


def _bound_to_json(value: float) -> float | str:
    return value if np.isfinite(value) else str(value)
