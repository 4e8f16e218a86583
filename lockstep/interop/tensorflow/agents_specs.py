"""Spaces of a TF-Agents policy from `policy_specs.pbtxt`, which lies beside its SavedModel."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lockstep.core.errors import FormatError
from lockstep.core.spaces import BoxSpace, DiscreteSpace, MultiDiscreteSpace, Space
from lockstep.interop.caffe.text import Message, read_text

AGENTS = "policy_specs.pbtxt"
"""File that TF-Agents' PolicySaver writes into its SavedModel."""
DTYPES = {
    "DT_FLOAT": "float32",
    "DT_DOUBLE": "float64",
    "DT_INT32": "int32",
    "DT_INT64": "int64",
    "DT_UINT8": "uint8",
}
VALUES = ("float_val", "double_val", "int_val", "int64_val")
MAX_SIZE = 1 << 24


def read_specs(path: Path) -> tuple[Space | None, Space]:
    """(observations, actions). Observations are None where the file bounds integers by nothing.

    Raises:
        FormatError: damaged; a policy with state; several observations or actions.
    """
    fields = {
        entry.string("key"): entry.message("value")
        for entry in read_text(path).message("dict_value").messages("fields")
    }
    if "collect_data_spec" not in fields:
        raise FormatError(
            "has no collect_data_spec; the policy was not saved by TF-Agents' PolicySaver", path=str(path)
        )
    if "policy_state_spec" in fields and _leaves(fields["policy_state_spec"]):
        raise FormatError(
            "its policy is recurrent, which no template knows; signature='action' goes through tf2onnx", path=str(path)
        )
    found = {}
    for entry in fields["collect_data_spec"].message("named_tuple_value").messages("values"):
        found[entry.string("key")] = entry.message("value")
    leaves = {}
    for key in ("observation", "action"):
        parts = _leaves(found[key]) if key in found else []
        if len(parts) != 1:
            raise FormatError(f"has {len(parts)} tensors as its {key}; one is read", path=str(path))
        leaves[key] = parts[0]
    return _observations(leaves["observation"]), _actions(leaves["action"])


def _leaves(value: Message) -> list[Message]:
    """Specifications of tensors in a nest."""
    found = []
    for name, parts in value.fields.items():
        for part in parts:
            if isinstance(part, Message):
                is_leaf = name in ("tensor_spec_value", "bounded_tensor_spec_value")
                found += [part] if is_leaf else _leaves(part)
    return found


def _shape(owner: Message, name: str) -> tuple[int, ...]:
    return tuple(dim.integer("size", -1) for dim in owner.message(name).messages("dim"))


def _dtype(spec: Message) -> str:
    word = spec.string("dtype")
    if word not in DTYPES:
        raise spec.fail(f"the element type {word!r} is not read; known: {sorted(DTYPES)}")
    return DTYPES[word]


def _bound(spec: Message, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """[prod(shape)] float64: minimum or maximum."""
    tensor, num = spec.message(name), int(np.prod(shape, dtype=np.int64))
    if min(shape, default=1) < 1 or num > MAX_SIZE:
        raise spec.fail(f"the shape {list(shape)} is not read")
    try:
        content = tensor.string("tensor_content").encode("latin-1")
        values = (
            np.frombuffer(content, _dtype(tensor))
            if content
            else np.array([x for key in VALUES for x in tensor.reals(key)] or [0.0])
        )
        bound = np.broadcast_to(values.astype(np.float64), num)
    except (UnicodeEncodeError, ValueError) as error:
        raise spec.fail(f"its {name} is damaged: {error}") from error
    if np.isnan(bound).any():
        raise spec.fail(f"its {name} is not a number: damaged")
    return bound


def _observations(spec: Message) -> Space | None:
    shape, dtype = _shape(spec, "shape"), _dtype(spec)
    if "minimum" in spec and "maximum" in spec:
        return BoxSpace(shape, dtype, *(_bounds(_bound(spec, name, shape)) for name in ("minimum", "maximum")))
    if dtype == "uint8":
        return BoxSpace(shape, dtype, (0.0,), (255.0,))
    return BoxSpace(shape, dtype) if dtype.startswith("float") else None


def _actions(spec: Message) -> Space:
    shape, dtype = _shape(spec, "shape"), _dtype(spec)
    low, high = (_bound(spec, name, shape) for name in ("minimum", "maximum"))
    if dtype.startswith("float"):
        return BoxSpace(shape, dtype, _bounds(low), _bounds(high))
    if not (np.isfinite(low).all() and (high >= low).all() and (high - low < MAX_SIZE).all()):
        raise spec.fail(f"the actions {low.tolist()[:3]} to {high.tolist()[:3]} are none")
    sizes = (high - low + 1).astype(np.int64)
    if low.any():
        # TF-Agents counts from zero and then clips to the bounds.
        raise spec.fail(f"the actions begin at {low.tolist()[:3]}; TF-Agents chooses from 0 on, and so is read")
    return MultiDiscreteSpace(tuple(sizes.tolist())) if shape else DiscreteSpace(int(sizes[0]))


def _bounds(values: np.ndarray) -> tuple[float, ...]:
    return tuple(values.tolist()) if (values != values[0]).any() else (float(values[0]),)
