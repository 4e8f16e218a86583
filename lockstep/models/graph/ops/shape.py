"""Operations that move elements without changing them, and those that read or make shapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lockstep.core.errors import FormatError
from lockstep.models.graph.call import Call
from lockstep.models.graph.limits import check_size
from lockstep.models.graph.values import Host, Value, to_ints, to_scalar, to_tensor, to_tensors

Function = Callable[..., Any]


def shape(call: Call, x: Value) -> Host:
    x = to_tensor(x)
    sizes = list(x.shape)
    start, end = call.get("start", 0), call.get("end", len(sizes))
    return Host(sizes[start:end] if start or end != len(sizes) else sizes, torch.int64)


def size(call: Call, x: Value) -> Host:
    total: Any = 1
    for n in to_tensor(x).shape:
        total = total * n
    return Host(total, torch.int64)


def reshape(call: Call, x: Value, sizes: Value = None) -> Any:
    x = to_tensor(x)
    wish = call.ints(sizes, "shape") or []
    if not call.get("allowzero", 0):
        # 0 keeps the size at that place.
        wish = [x.shape[i] if isinstance(n, int) and n == 0 else n for i, n in enumerate(wish)]
    return x.reshape(wish)


def flatten(call: Call, x: Value) -> Tensor:
    x = to_tensor(x)
    axis = call.get("axis", 1)
    axis = axis + x.ndim if axis < 0 else axis
    if axis == 0:
        return x.reshape(1, -1)
    if axis == 1 and x.ndim >= 2:
        return x.flatten(1)
    rows = 1
    for n in x.shape[:axis]:
        rows = rows * n
    columns = 1
    for n in x.shape[axis:]:
        columns = columns * n
    return x.reshape(rows, columns)


def squeeze(call: Call, x: Value, axes: Value = None) -> Any:
    x = to_tensor(x)
    dims = call.ints(axes, "axes")
    if dims is None:
        return x.squeeze()
    for dim in dims:
        if x.shape[dim] != 1:
            raise FormatError(
                f"axis {dim} of its input has size {x.shape[dim]}; only axes of size 1 can go", op=call.op
            )
    return x.squeeze(tuple(dims))


def unsqueeze(call: Call, x: Value, axes: Value = None) -> Any:
    x = to_tensor(x)
    dims = call.ints(axes, "axes") or []
    rank = x.ndim + len(dims)
    for dim in sorted(dim % rank for dim in dims):
        x = x.unsqueeze(dim)
    return x


def transpose(call: Call, x: Value) -> Any:
    x = to_tensor(x)
    perm = call.get("perm", None)
    if isinstance(x, Tensor):
        return x.permute(*(range(x.ndim - 1, -1, -1) if perm is None else perm))
    return x.transpose(perm)


def concat(call: Call, *xs: Value) -> Any:
    tensors = to_tensors(xs)
    axis = call.get("axis", 1)
    if not isinstance(tensors[0], Tensor):
        import numpy as np

        return np.concatenate(tensors, axis)
    return torch.cat(tensors, dim=axis)


def split(call: Call, x: Value, sizes: Value = None) -> tuple[Tensor, ...]:
    x = to_tensor(x)
    axis = call.get("axis", 0)
    parts = call.ints(sizes, "split")
    if parts is None:
        num = call.get("num_outputs", call.num_outputs)
        total = x.shape[axis]
        each = (total + num - 1) // num
        parts = [each] * (num - 1)
        parts.append(total - each * (num - 1))
    if len(parts) != call.num_outputs:
        raise FormatError(f"{len(parts)} parts for {call.num_outputs} outputs", op=call.op)
    return tuple(torch.split(x, parts, dim=axis))


def slice_(
    call: Call, x: Value, starts: Value = None, ends: Value = None, axes: Value = None, steps: Value = None
) -> Any:
    x = to_tensor(x)
    first, last = call.ints(starts, "starts") or [], call.ints(ends, "ends") or []
    dims = call.ints(axes, "axes") or list(range(len(first)))
    strides = [1] * len(first) if steps is None else to_ints(steps)
    for dim, start, end, step in zip(dims, first, last, strides, strict=True):
        x = _slice_axis(x, dim, start, end, step)
    return x


def _slice_axis(x: Any, dim: int, start: Any, end: Any, step: int) -> Any:
    if step == 0:
        raise FormatError("a step of 0", op="Slice")
    index = [slice(None)] * x.ndim
    if step > 0:
        index[dim] = slice(start, end, step)
        return x[tuple(index)]
    size = x.shape[dim]
    # Python's range for a negative step, walked forwards and turned round: torch has no negative strides.
    places = range(*slice(start, None if end < -size else end, step).indices(int(size)))
    if not len(places):
        index[dim] = slice(0, 0)
        return x[tuple(index)]
    index[dim] = slice(places[-1], places[0] + 1, -step)
    x = x[tuple(index)]
    return x.flip(dim) if isinstance(x, Tensor) else x


def expand(call: Call, x: Value, sizes: Value) -> Any:
    x = to_tensor(x)
    wish = to_ints(sizes)
    rank = max(len(wish), x.ndim)
    wish = [1] * (rank - len(wish)) + wish
    have = [1] * (rank - x.ndim) + list(x.shape)
    # A size of 1 stands for whatever the tensor has.
    full = [h if isinstance(w, int) and w == 1 else w for h, w in zip(have, wish, strict=True)]
    check_size(full)
    return x.expand(full)


def tile(call: Call, x: Value, repeats: Value, tiles_axis: Value = None) -> Tensor:
    x = to_tensor(x)
    if call.version < 6 and tiles_axis is not None:
        times = [1] * x.ndim
        times[int(to_scalar(tiles_axis))] = int(to_scalar(repeats))
    else:
        times = to_ints(repeats)
    check_size([n * t for n, t in zip(x.shape, times, strict=True)])
    return x.repeat(times)


def constant_of_shape(call: Call, sizes: Value) -> Tensor:
    value = call.get("value", None)
    dims = to_ints(sizes)
    check_size(dims)
    if value is None:
        return torch.zeros(dims)
    from lockstep.models.graph.module import dtype_of

    return torch.full(dims, value.data[0], dtype=dtype_of(value.dtype))


def broadcast_args(call: Call, x: Value, y: Value) -> Host:
    shape = torch.broadcast_shapes(to_ints(x), to_ints(y))
    return Host(list(shape), to_tensor(x).dtype)


OPS: dict[str, Function] = {
    "BroadcastArgs": broadcast_args,
    "Concat": concat,
    "ConstantOfShape": constant_of_shape,
    "Expand": expand,
    "Flatten": flatten,
    "Reshape": reshape,
    "Shape": shape,
    "Size": size,
    "Slice": slice_,
    "Split": split,
    "Squeeze": squeeze,
    "Tile": tile,
    "Transpose": transpose,
    "Unsqueeze": unsqueeze,
}
