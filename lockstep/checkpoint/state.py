"""A nested training state as JSON beside named arrays, and back, exactly. Nothing is pickled.

JSON has neither tuples, bytes, NaN nor keys that are not strings; those are written as one-key objects whose key starts
with `$`:

    {"$torch": "3"}  {"$numpy": "4"}  {"$scalar": "5"}   array of that name in tensors.safetensors
    {"$tuple": [...]}  {"$items": [[key, value], ...]}   tuple; dictionary whose keys need it
    {"$float": "nan" | "inf" | "-inf"}  {"$bytes": base64}
"""

from __future__ import annotations

import base64
import binascii
import math
from typing import Any

import numpy as np
import torch

from lockstep.checkpoint.tensors import Array, dtype_name
from lockstep.core.errors import CheckpointError


def state_to_json(state: Any) -> tuple[Any, dict[str, Array]]:
    """Split a state into a JSON tree and its arrays.

    Args:
        state: nested dict (keys str, int, float, bool, None or tuples of those), list and tuple of tensors, arrays,
            NumPy scalars, int of any size, float, str, bytes, bool, None.

    Returns:
        (tree for `json.dumps`, arrays by name). Arrays are referenced, not copied.

    Raises:
        CheckpointError: a leaf has a type that cannot be written; the message names its place.

    >>> state_to_json({"step": 3, "span": (1, 2)})[0]
    {'step': 3, 'span': {'$tuple': [1, 2]}}
    """
    arrays: dict[str, Array] = {}
    return _encode(state, "state", arrays), arrays


def state_from_json(tree: Any, arrays: dict[str, Array]) -> Any:
    """Inverse of `state_to_json`.

    Raises:
        CheckpointError: the tree is malformed or names an array that is not there.
    """
    try:
        return _decode(tree, arrays)
    except (KeyError, TypeError, ValueError, binascii.Error) as error:
        raise CheckpointError(f"state.json is malformed: {error!r}") from error


def array_kinds(tree: Any) -> dict[str, str]:
    """For every array named in the tree, "torch" or "numpy"."""
    kinds: dict[str, str] = {}
    pending = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, list):
            pending.extend(node)
        elif isinstance(node, dict):
            for key, value in node.items():
                if key == "$torch":
                    kinds[str(value)] = "torch"
                elif key in ("$numpy", "$scalar"):
                    kinds[str(value)] = "numpy"
                else:
                    pending.append(value)
    return kinds


def _encode(value: Any, place: str, arrays: dict[str, Array]) -> Any:
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"$float": repr(value)}
    if isinstance(value, dict):
        if all(type(key) is str and not key.startswith("$") for key in value):
            return {key: _encode(item, f"{place}[{key!r}]", arrays) for key, item in value.items()}
        return {"$items": [_encode_item(key, item, place, arrays) for key, item in value.items()]}
    if type(value) is list:
        return [_encode(item, f"{place}[{i}]", arrays) for i, item in enumerate(value)]
    if type(value) is tuple:
        return {"$tuple": [_encode(item, f"{place}[{i}]", arrays) for i, item in enumerate(value)]}
    if type(value) is bytes:
        return {"$bytes": base64.b64encode(value).decode()}
    if isinstance(value, torch.Tensor):
        return {"$torch": _add(value, place, arrays)}
    if isinstance(value, np.ndarray):
        return {"$numpy": _add(value, place, arrays)}
    if isinstance(value, np.generic):
        return {"$scalar": _add(np.asarray(value), place, arrays)}
    raise CheckpointError(
        f"{place} is a {type(value).__module__}.{type(value).__qualname__}; expected a tensor, array, number, string, "
        "bytes, bool, None, list, tuple or dict. Convert it before it is saved."
    )


def _encode_item(key: Any, item: Any, place: str, arrays: dict[str, Array]) -> list[Any]:
    if isinstance(key, torch.Tensor | np.ndarray | np.generic):
        raise CheckpointError(f"{place} has a key of type {type(key).__qualname__}; expected a plain Python key")
    return [_encode(key, f"key of {place}", arrays), _encode(item, f"{place}[{key!r}]", arrays)]


def _add(array: Array, place: str, arrays: dict[str, Array]) -> str:
    if dtype_name(array) is None or (isinstance(array, torch.Tensor) and array.layout != torch.strided):
        raise CheckpointError(
            f"{place} is an array of dtype {array.dtype} that the file format cannot hold; "
            "expected a dense array of bool, integers, floats or complex64 in native byte order"
        )
    name = str(len(arrays))
    arrays[name] = array
    return name


def _decode(node: Any, arrays: dict[str, Array]) -> Any:
    if isinstance(node, list):
        return [_decode(item, arrays) for item in node]
    if not isinstance(node, dict):
        return node
    if len(node) != 1 or not next(iter(node)).startswith("$"):
        return {key: _decode(item, arrays) for key, item in node.items()}
    tag, body = next(iter(node.items()))
    match tag:
        case "$torch" | "$numpy":
            return arrays[body]
        case "$scalar":
            return arrays[body][()]
        case "$tuple":
            return tuple(_decode(item, arrays) for item in body)
        case "$items":
            return {_decode(key, arrays): _decode(item, arrays) for key, item in body}
        case "$float":
            return float(body)
        case "$bytes":
            return base64.b64decode(body, validate=True)
    raise CheckpointError(f"state.json holds the unknown tag {tag!r}; was it written by a newer version?")
