"""Operations that choose elements by index, by condition or by rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lockstep.core.errors import FormatError
from lockstep.models.graph.call import Call
from lockstep.models.graph.limits import check_size
from lockstep.models.graph.ops.elementwise import WIDE
from lockstep.models.graph.values import Host, Value, to_ints, to_scalar, to_tensor, to_tensors

Function = Callable[..., Any]


def positive(index: Tensor, size: int) -> Tensor:
    """Indices from the end become indices from the start."""
    index = index.to(torch.int64)
    return torch.where(index < 0, index + size, index)


def gather(call: Call, x: Value, index: Value) -> Any:
    x = to_tensor(x)
    axis = call.get("axis", 0)
    if not isinstance(x, Tensor):
        return x.take(to_tensor(index).numpy(), axis)
    axis = axis + x.ndim if axis < 0 else axis
    if isinstance(index, Host) and index.rank == 0:
        return x.select(axis, index.data)
    where = positive(to_tensor(index, x.device), x.shape[axis])
    out = x.index_select(axis, where.reshape(-1))
    return out.reshape(*x.shape[:axis], *where.shape, *x.shape[axis + 1 :])


def gather_elements(call: Call, x: Value, index: Value) -> Tensor:
    x, index = to_tensors((x, index))
    axis = call.get("axis", 0)
    return torch.gather(x, axis, positive(index, x.shape[axis]))


def gather_nd(call: Call, x: Value, index: Value) -> Any:
    x, index = to_tensors((x, index))
    batch = call.get("batch_dims", 0)
    depth = index.shape[-1]
    rows = index.shape[:batch]
    flat = x.reshape(-1, *x.shape[batch:]) if batch else x.unsqueeze(0)
    where = index.reshape(-1, *index.shape[batch:]) if batch else index.unsqueeze(0)
    columns = [positive(where[..., i], flat.shape[1 + i]) for i in range(depth)]
    first = torch.arange(flat.shape[0], device=where.device).reshape(-1, *(1,) * (where.ndim - 2))
    out = flat[(first, *columns)]
    return out.reshape(*rows, *out.shape[1:]) if batch else out.squeeze(0)


REDUCE = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}


def scatter_elements(call: Call, x: Value, index: Value, updates: Value) -> Tensor:
    x, index, updates = to_tensors((x, index, updates))
    axis, how = call.get("axis", 0), call.get("reduction", "none")
    index = positive(index, x.shape[axis])
    if how == "none":
        return x.scatter(axis, index, updates)
    return x.scatter_reduce(axis, index, updates, REDUCE[how], include_self=True)


def scatter_nd(call: Call, x: Value, index: Value, updates: Value) -> Tensor:
    x, index, updates = to_tensors((x, index, updates))
    how = call.get("reduction", "none")
    depth = index.shape[-1]
    # Rows of the flattened leading dimensions that the indices address.
    places = torch.zeros(index.shape[:-1], dtype=torch.int64, device=x.device)
    for i in range(depth):
        column = positive(index[..., i], x.shape[i])
        if bool(((column < 0) | (column >= x.shape[i])).any()) if not torch.compiler.is_compiling() else False:
            raise FormatError(f"index out of range of dimension {i}, which has size {x.shape[i]}", op=call.op)
        places = places * x.shape[i] + column
    rows = x.reshape(-1, *x.shape[depth:])
    values = updates.reshape(-1, *x.shape[depth:])
    places = places.reshape(-1)
    if how == "none":
        return rows.index_copy(0, places, values).reshape(x.shape)
    expanded = places.reshape(-1, *(1,) * (rows.ndim - 1)).expand_as(values)
    return rows.scatter_reduce(0, expanded, values, REDUCE[how], include_self=True).reshape(x.shape)


def compress(call: Call, x: Value, condition: Value) -> Tensor:
    x, condition = to_tensors((x, condition))
    axis = call.get("axis", None)
    x, axis = (x.reshape(-1), 0) if axis is None else (x, axis)
    chosen = condition.to(torch.bool).nonzero().squeeze(1)
    return x.index_select(axis, chosen)


def nonzero(call: Call, x: Value) -> Tensor:
    return to_tensor(x).nonzero().T


def one_hot(call: Call, index: Value, depth: Value, values: Value) -> Tensor:
    index, values = to_tensors((index, values))
    num, axis = int(to_scalar(depth)), call.get("axis", -1)
    check_size([index.numel(), num])
    index = index.to(torch.int64)
    index = torch.where(index < 0, index + num, index)
    axis = axis + index.ndim + 1 if axis < 0 else axis
    span = torch.arange(num, device=index.device).reshape(-1, *(1,) * (index.ndim - axis))
    hot = index.unsqueeze(axis) == span
    return torch.where(hot, values[1], values[0])


def top_k(call: Call, x: Value, k: Value = None) -> tuple[Tensor, Tensor]:
    x = to_tensor(x)
    num = call.need("k") if k is None else to_ints(k)[0]
    axis, largest = call.get("axis", -1), bool(call.get("largest", 1))
    wide = x.to(WIDE[x.dtype]) if x.dtype in WIDE else x
    # Equal elements keep their order, which topk does not promise.
    values, index = torch.sort(wide, dim=axis, descending=largest, stable=True)
    return values.narrow(axis, 0, num).to(x.dtype), index.narrow(axis, 0, num)


def arg(fn: Callable[..., Tensor]) -> Function:
    """ArgMax and ArgMin."""

    def run(call: Call, x: Value) -> Tensor:
        x = to_tensor(x)
        axis, keep = call.get("axis", 0), bool(call.get("keepdims", 1))
        if call.get("select_last_index", 0):
            last = fn(x.flip(axis), dim=axis, keepdim=keep)
            return x.shape[axis] - 1 - last
        return fn(x, dim=axis, keepdim=keep)

    return run


def trilu(call: Call, x: Value, k: Value = None) -> Tensor:
    x = to_tensor(x)
    by = 0 if k is None else int(to_scalar(k))
    fn = torch.triu if call.get("upper", 1) else torch.tril
    if x.dtype in WIDE:
        return fn(x.to(WIDE[x.dtype]), by).to(x.dtype)
    return fn(x, by)


def range_(call: Call, start: Value, stop: Value, step: Value) -> Tensor:
    dtype = to_tensor(start).dtype
    first, last, by = (to_scalar(x) for x in (start, stop, step))
    if isinstance(first, int | float) and isinstance(last, int | float) and by:
        check_size([max(0, int((last - first) / by) + 1)])
    return torch.arange(first, last, by, dtype=dtype)


def unique(call: Call, x: Value) -> tuple[Tensor, ...]:
    x = to_tensor(x)
    axis = call.get("axis", None)
    values, inverse, counts = torch.unique(x, sorted=True, return_inverse=True, return_counts=True, dim=axis)
    flat, num = inverse.reshape(-1), len(counts)
    places = torch.arange(len(flat))
    first = torch.full((num,), len(flat)).scatter_reduce(0, flat, places, "amin")
    if not call.get("sorted", 1):
        order = first.argsort()
        rank = torch.empty_like(order)
        rank[order] = torch.arange(num)
        values = values.index_select(0 if axis is None else axis, order)
        return values, first[order], rank[flat], counts[order]
    return values, first, flat, counts


def reverse_sequence(call: Call, x: Value, lengths: Value) -> Tensor:
    x, lengths = to_tensors((x, lengths))
    time, batch = call.get("time_axis", 0), call.get("batch_axis", 1)
    steps = torch.arange(x.shape[time], device=x.device).unsqueeze(1)
    index = torch.where(steps < lengths, lengths - 1 - steps, steps)
    index = index if (time, batch) == (0, 1) else index.T
    return torch.gather(x, time, index.reshape(*index.shape, *(1,) * (x.ndim - 2)).expand_as(x))


def eye_like(call: Call, x: Value) -> Tensor:
    from lockstep.models.graph.ops.cast import DTYPES

    x = to_tensor(x)
    dtype = DTYPES.get(call.get("dtype", 0), x.dtype)
    rows, columns = x.shape
    return torch.diag_embed(torch.ones(max(rows, columns)), call.get("k", 0))[:rows, :columns].to(dtype)


def depth_to_space(call: Call, x: Value) -> Tensor:
    x = to_tensor(x)
    n, c, h, w = x.shape
    block = call.need("blocksize")
    if call.get("mode", "DCR") == "CRD":
        return F.pixel_shuffle(x, block)
    x = x.reshape(n, block, block, c // block**2, h, w).permute(0, 3, 4, 1, 5, 2)
    return x.reshape(n, c // block**2, h * block, w * block)


def space_to_depth(call: Call, x: Value) -> Tensor:
    x = to_tensor(x)
    n, c, h, w = x.shape
    block = call.need("blocksize")
    if call.get("mode", "DCR") == "CRD":
        return F.pixel_unshuffle(x, block)
    x = x.reshape(n, c, h // block, block, w // block, block).permute(0, 3, 5, 1, 2, 4)
    return x.reshape(n, c * block**2, h // block, w // block)


def tensor_scatter(call: Call, cache: Value, update: Value, where: Value = None) -> Tensor:
    """Write `update` into `cache` along an axis from each row's index on, around its end where circular."""
    cache, update = to_tensors((cache, update))
    axis = call.get("axis", -2) % cache.ndim
    size, num = cache.shape[axis], update.shape[axis]
    start = torch.zeros(cache.shape[0], dtype=torch.int64) if where is None else to_tensor(where).to(torch.int64)
    index = start.unsqueeze(1) + torch.arange(num)
    if call.get("mode", "linear") == "circular":
        index = index % size
    shape = [1] * cache.ndim
    shape[0], shape[axis] = index.shape
    return cache.scatter(axis, index.reshape(shape).expand_as(update), update)


OPS: dict[str, Function] = {
    "ArgMax": arg(torch.argmax),
    "ArgMin": arg(torch.argmin),
    "Compress": compress,
    "DepthToSpace": depth_to_space,
    "EyeLike": eye_like,
    "Gather": gather,
    "GatherElements": gather_elements,
    "GatherND": gather_nd,
    "NonZero": nonzero,
    "OneHot": one_hot,
    "Range": range_,
    "ReverseSequence": reverse_sequence,
    "Scatter": scatter_elements,
    "ScatterElements": scatter_elements,
    "ScatterND": scatter_nd,
    "SpaceToDepth": space_to_depth,
    "TensorScatter": tensor_scatter,
    "TopK": top_k,
    "Trilu": trilu,
    "Unique": unique,
}
