"""One observation as an environment gives it, checked and given a row dimension."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from lockstep.core.errors import InputError
from lockstep.core.spaces import BoxSpace, DictSpace, DiscreteSpace, Space


def one_row(space: Space, obs: Any, name: str = "observation") -> Any:
    """Arrays [1, ...] of a space, or a dictionary of them; parts that the space does not have are left out.

    Args:
        obs: nested dictionaries and tuples are taken apart as environments' are: "outer.inner", "pair.0".
        name: of the observation or of its part, for errors.

    Raises:
        InputError: a part is missing, or of the wrong form, shape, type or range; `field` names it.
    """
    if isinstance(space, DictSpace):
        parts = dict(_parts(obs, ""))
        for key in space.spaces:
            if key not in parts:
                raise InputError(f"observation lacks {key!r}; expected {', '.join(space.spaces)}", field=key)
        return {key: one_row(sub, parts[key], key) for key, sub in space.spaces.items()}
    try:
        array = np.asarray(obs)
    except ValueError as error:
        raise InputError(f"{name}: not an array: {error}", field=name) from error
    is_float = isinstance(space, BoxSpace) and space.dtype.startswith("float")
    if array.dtype.kind not in ("iubf" if is_float else "iub"):
        kind = "numbers" if is_float else "integers"
        raise InputError(f"{name}: expected {kind}; got {array.dtype}", field=name)
    shape = space.shape if isinstance(space, BoxSpace) else (len(space.lowest),)
    if isinstance(space, DiscreteSpace):
        shape = ()
    if array.shape != shape:
        raise InputError(f"{name} has shape {array.shape}; expected {shape}", field=name)
    if isinstance(space, BoxSpace):
        if is_float and not np.isfinite(array).all():
            raise InputError(f"{name} holds NaN or an infinity", field=name)
        return array.astype(space.dtype)[None]
    low = np.array(space.lowest).reshape(shape)
    high = low + (space.n if isinstance(space, DiscreteSpace) else np.array(space.nvec)) - 1
    if ((array < low) | (array > high)).any():
        raise InputError(f"{name}={array}; expected {low.tolist()} to {high.tolist()}", field=name)
    return array.astype(np.int64)[None]


def real_array(obs: Any) -> np.ndarray:
    """A float32 array.

    Raises:
        InputError: it does not hold numbers.
    """
    try:
        return np.asarray(obs, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise InputError(f"observation: expected an array of numbers; {error}", field="observation") from error


def _parts(obs: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """Leaves by dotted name. A list or tuple is also a leaf, for an array may be written as one."""
    if prefix and not isinstance(obs, dict):
        yield prefix, obs
    items = obs.items() if isinstance(obs, dict) else enumerate(obs) if isinstance(obs, tuple) else ()
    for key, value in items:
        yield from _parts(value, f"{prefix}.{key}" if prefix else str(key))
