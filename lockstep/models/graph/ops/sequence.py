"""Sequences of tensors and optional values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lockstep.core.errors import FormatError
from lockstep.models.graph.call import Call
from lockstep.models.graph.values import Host, Items, Value, to_ints, to_scalar, to_tensor, to_tensors

Function = Callable[..., Any]


def construct(call: Call, *xs: Value) -> Items:
    return Items(to_tensors(xs))


def empty(call: Call) -> Items:
    return Items()


def at(call: Call, items: Items, index: Value) -> Any:
    return items[_place(items, index, call)]


def insert(call: Call, items: Items, x: Value, index: Value = None) -> Items:
    out = Items(items)
    place = len(items) if index is None else int(to_scalar(index))
    if not -len(items) <= place <= len(items):
        raise FormatError(f"place {place} in a sequence of {len(items)}", op=call.op)
    out.insert(place, to_tensor(x))
    return out


def erase(call: Call, items: Items, index: Value = None) -> Items:
    out = Items(items)
    del out[len(items) - 1 if index is None else _place(items, index, call)]
    return out


def length(call: Call, items: Items) -> Host:
    return Host(len(items), torch.int64)


def concat(call: Call, items: Items) -> Tensor:
    axis = call.need("axis")
    return torch.stack(list(items), dim=axis) if call.get("new_axis", 0) else torch.cat(list(items), dim=axis)


def split(call: Call, x: Value, sizes: Value = None) -> Items:
    x = to_tensor(x)
    axis = call.get("axis", 0)
    if sizes is None:
        parts = list(torch.split(x, 1, dim=axis))
        return Items(parts if call.get("keepdims", 1) else [part.squeeze(axis) for part in parts])
    wish = to_ints(sizes)
    scalar = sizes.rank == 0 if isinstance(sizes, Host) else sizes.ndim == 0
    return Items(torch.split(x, wish[0] if scalar else wish, dim=axis))


def _place(items: Items, index: Value, call: Call) -> int:
    place = int(to_scalar(index))
    if not -len(items) <= place < len(items):
        raise FormatError(f"place {place} in a sequence of {len(items)}", op=call.op)
    return place


def optional(call: Call, x: Value = None) -> Value:
    return x


def has_element(call: Call, x: Value = None) -> Host:
    return Host(x is not None, torch.bool)


def get_element(call: Call, x: Value) -> Value:
    if x is None:
        raise FormatError("an empty optional has no element", op=call.op)
    return x


OPS: dict[str, Function] = {
    "ConcatFromSequence": concat,
    "Optional": optional,
    "OptionalGetElement": get_element,
    "OptionalHasElement": has_element,
    "SequenceAt": at,
    "SequenceConstruct": construct,
    "SequenceEmpty": empty,
    "SequenceErase": erase,
    "SequenceInsert": insert,
    "SequenceLength": length,
    "SplitToSequence": split,
}
