"""Shape arithmetic on Python numbers. Each function may return `NotImplemented`, then the tensor form runs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from lockstep.models.graph.call import Call
from lockstep.models.graph.values import HOST_SIZE, Host

Function = Callable[..., Any]

INTEGERS = (torch.int64, torch.int32)


def elementwise(fn: Callable[..., Any], dtype: torch.dtype | None = None) -> Function:
    """An operation of numbers, broadcast over rank 0 and 1. Floating-point numbers are left to tensors."""

    def run(call: Call, *xs: Host) -> Any:
        if any(x.dtype not in INTEGERS and x.dtype != torch.bool for x in xs):
            return NotImplemented
        lengths = {len(x.data) for x in xs if isinstance(x.data, list) and len(x.data) != 1}
        if len(lengths) > 1:
            return NotImplemented
        if all(x.rank == 0 for x in xs):
            return Host(fn(*(x.data for x in xs)), dtype or xs[-1].dtype)
        num = lengths.pop() if lengths else 1
        columns = [x.items() if len(x.items()) == num else x.items() * num for x in xs]
        return Host([fn(*row) for row in zip(*columns, strict=True)], dtype or xs[-1].dtype)

    return run


def quotient(x: Any, y: Any) -> Any:
    """Towards zero; sizes are not negative."""
    if isinstance(x, int) and isinstance(y, int) and (x < 0) != (y < 0):
        return -(-x // y)
    return x // y


def remainder(call: Call, x: Host, y: Host) -> Any:
    if call.get("fmod", 0):
        return NotImplemented
    return elementwise(lambda a, b: a % b)(call, x, y)


def pick(condition: Any, x: Any, y: Any) -> Any:
    return x if condition else y


def cast(call: Call, x: Host) -> Any:
    """Between integers and booleans only: a fractional number is a tensor's business."""
    to = {6: torch.int32, 7: torch.int64, 9: torch.bool}.get(call.need("to"))
    if to is None or (x.dtype not in INTEGERS and x.dtype != torch.bool):
        return NotImplemented
    kind = bool if to == torch.bool else (int if x.dtype == torch.bool else _same)
    data = [kind(item) for item in x.data] if isinstance(x.data, list) else kind(x.data)
    return Host(data, to)


def _same(x: Any) -> Any:
    return x


def gather(call: Call, x: Host, index: Host) -> Any:
    if x.rank == 0:
        return NotImplemented
    if index.rank == 0:
        return Host(x.data[index.data], x.dtype)
    return Host([x.data[i] for i in index.data], x.dtype)


def concat(call: Call, *xs: Host) -> Any:
    if any(x.rank == 0 for x in xs):
        return NotImplemented
    return Host([item for x in xs for item in x.data], xs[0].dtype)


def slice_(call: Call, x: Host, starts: Any = None, ends: Any = None, axes: Any = None, steps: Any = None) -> Any:
    first, last = call.ints(starts, "starts"), call.ints(ends, "ends")
    if x.rank == 0 or first is None or last is None or len(first) != 1:
        return NotImplemented
    step = 1 if steps is None else steps.items()[0]
    return Host(x.data[slice(first[0], None if step < 0 and last[0] < -len(x.data) else last[0], step)], x.dtype)


def unsqueeze(call: Call, x: Host, axes: Any = None) -> Any:
    if x.rank or call.ints(axes, "axes") not in ([0], [-1]):
        return NotImplemented
    return Host([x.data], x.dtype)


def squeeze(call: Call, x: Host, axes: Any = None) -> Any:
    if x.rank == 0 or len(x.data) != 1:
        return NotImplemented
    return Host(x.data[0], x.dtype)


def reshape(call: Call, x: Host, sizes: Any = None) -> Any:
    wish = call.ints(sizes, "shape")
    if wish is None or len(wish) > 1:
        return NotImplemented
    items = x.items()
    if not wish:
        return Host(items[0], x.dtype) if len(items) == 1 else NotImplemented
    return Host(list(items), x.dtype) if wish[0] in (-1, len(items)) else NotImplemented


def flatten_ints(fn: Callable[[list[Any]], Any]) -> Function:
    """A reduction over a whole list."""

    def run(call: Call, x: Host, axes: Any = None) -> Any:
        dims = call.ints(axes, "axes")
        if x.rank == 0 or x.dtype not in INTEGERS or (not dims and call.get("noop_with_empty_axes", 0)):
            return NotImplemented
        if not x.data:
            return NotImplemented
        total = fn(x.data)
        return Host([total] if call.get("keepdims", 1) else total, x.dtype)

    return run


def product(items: list[Any]) -> Any:
    total: Any = 1
    for item in items:
        total = total * item
    return total


def range_(call: Call, start: Host, stop: Host, step: Host) -> Any:
    values = (start.data, stop.data, step.data)
    if not all(type(x) is int for x in values) or not values[2]:
        return NotImplemented
    if math.ceil((values[1] - values[0]) / values[2]) > HOST_SIZE:
        return NotImplemented
    return Host(list(range(*values)), start.dtype)


def constant_of_shape(call: Call, sizes: Host) -> Any:
    value = call.get("value", None)
    dims = sizes.items()
    if value is None or value.dtype not in ("int64", "int32") or len(dims) > 1 or not all(type(n) is int for n in dims):
        return NotImplemented
    if not dims:
        return Host(value.data[0], torch.__dict__[value.dtype])
    return Host([value.data[0]] * dims[0], torch.__dict__[value.dtype]) if 0 <= dims[0] <= HOST_SIZE else NotImplemented


def expand(call: Call, x: Host, sizes: Host) -> Any:
    dims = sizes.items()
    if len(dims) != 1 or type(dims[0]) is not int or not 0 < dims[0] <= HOST_SIZE or len(x.items()) not in (1, dims[0]):
        return NotImplemented
    items = x.items()
    return Host(items if len(items) == dims[0] else items * dims[0], x.dtype)


def identity(call: Call, x: Host) -> Host:
    return x


def broadcast_args(call: Call, x: Host, y: Host) -> Any:
    """The shape of two shapes together; an operation of TensorFlow that its exporter leaves in ONNX files."""
    first, second = x.items(), y.items()
    rank = max(len(first), len(second))
    first, second = [1] * (rank - len(first)) + first, [1] * (rank - len(second)) + second
    return Host([b if isinstance(a, int) and a == 1 else a for a, b in zip(first, second, strict=True)], x.dtype)


OPS: dict[str, Function] = {
    "Add": elementwise(lambda x, y: x + y),
    "And": elementwise(lambda x, y: x and y),
    "BroadcastArgs": broadcast_args,
    "Cast": cast,
    "Concat": concat,
    "ConstantOfShape": constant_of_shape,
    "Div": elementwise(quotient),
    "Equal": elementwise(lambda x, y: x == y, torch.bool),
    "Expand": expand,
    "Gather": gather,
    "Greater": elementwise(lambda x, y: x > y, torch.bool),
    "GreaterOrEqual": elementwise(lambda x, y: x >= y, torch.bool),
    "Identity": identity,
    "Less": elementwise(lambda x, y: x < y, torch.bool),
    "LessOrEqual": elementwise(lambda x, y: x <= y, torch.bool),
    "Max": elementwise(max),
    "Min": elementwise(min),
    "Mod": remainder,
    "Mul": elementwise(lambda x, y: x * y),
    "Neg": elementwise(lambda x: -x),
    "Not": elementwise(lambda x: not x),
    "Or": elementwise(lambda x, y: x or y),
    "Range": range_,
    "ReduceMax": flatten_ints(max),
    "ReduceMin": flatten_ints(min),
    "ReduceProd": flatten_ints(product),
    "ReduceSum": flatten_ints(sum),
    "Reshape": reshape,
    "Slice": slice_,
    "Squeeze": squeeze,
    "Sub": elementwise(lambda x, y: x - y),
    "Unsqueeze": unsqueeze,
    "Where": elementwise(pick),
}
