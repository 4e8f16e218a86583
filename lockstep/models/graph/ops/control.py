"""Control flow: operations whose attributes are graphs that see the values around them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lockstep.core.errors import FormatError
from lockstep.models.graph.call import Call
from lockstep.models.graph.limits import MAX_STEPS
from lockstep.models.graph.values import Host, Items, Value, to_scalar, to_tensor

Function = Callable[..., Any]


def if_(call: Call, scope: dict[str, Value], condition: Value) -> tuple[Value, ...]:
    branch = call.need("then_branch" if bool(to_scalar(condition)) else "else_branch")
    return tuple(branch.run([], scope))


def loop(call: Call, scope: dict[str, Value], trips: Value, condition: Value, *carried: Value) -> tuple[Value, ...]:
    """body(iteration, condition, carried...) -> (condition, carried..., one slice of each scanned output...)."""
    body = call.need("body")
    most = None if trips is None else int(to_scalar(trips))
    going = condition is None or bool(to_scalar(condition))
    flag: Value = Host(True, torch.bool) if condition is None else condition
    values, slices, step = list(carried), [], 0
    while going and (most is None or step < most):
        if step >= MAX_STEPS:
            raise FormatError(f"more than {MAX_STEPS:,} iterations", op=call.op)
        flag, *out = body.run([Host(step, torch.int64), flag, *values], scope)
        values, scanned = out[: len(carried)], out[len(carried) :]
        slices.append(scanned)
        going = bool(to_scalar(flag))
        step += 1
    num_scanned = len(body.outputs) - 1 - len(carried)
    stacked = [_stack([row[i] for row in slices], 0) for i in range(num_scanned)]
    return (*values, *stacked)


def scan(call: Call, scope: dict[str, Value], *inputs: Value) -> tuple[Value, ...]:
    """body(states..., one slice of each scanned input...) -> (states..., one slice of each scanned output...)."""
    if call.version < 9:
        return _scan_8(call, scope, *inputs)
    body, num = call.need("body"), call.need("num_scan_inputs")
    states, scanned = list(inputs[: len(inputs) - num]), [to_tensor(x) for x in inputs[len(inputs) - num :]]
    num_out = len(body.outputs) - len(states)
    axes, reversed_in = call.get("scan_input_axes", (0,) * num), call.get("scan_input_directions", (0,) * num)
    out_axes = call.get("scan_output_axes", (0,) * num_out)
    reversed_out = call.get("scan_output_directions", (0,) * num_out)
    length = scanned[0].shape[axes[0]]
    rows = []
    for step in range(length):
        slices = [
            x.select(axis, length - 1 - step if backward else step)
            for x, axis, backward in zip(scanned, axes, reversed_in, strict=True)
        ]
        out = body.run([*states, *slices], scope)
        states = out[: len(states)]
        rows.append(out[len(states) :])
    stacked = []
    for i in range(num_out):
        column = [row[i] for row in rows]
        stacked.append(_stack(column[::-1] if reversed_out[i] else column, out_axes[i]))
    return (*states, *stacked)


def _scan_8(call: Call, scope: dict[str, Value], lengths: Value, *inputs: Value) -> tuple[Value, ...]:
    """The first form: rows in front, each run on its own for its length."""
    body, num = call.need("body"), call.need("num_scan_inputs")
    directions = call.get("directions", (0,) * num)
    tensors = [to_tensor(x) for x in inputs]
    num_states, steps = len(tensors) - num, tensors[-1].shape[1]
    states_out: list[list[Any]] = [[] for _ in range(num_states)]
    rows_out: list[list[Any]] = [[] for _ in range(len(body.outputs) - num_states)]
    for row in range(tensors[0].shape[0]):
        states: list[Any] = [x[row] for x in tensors[:num_states]]
        length = steps if lengths is None else int(to_tensor(lengths)[row])
        slices = []
        for step in range(length):
            places = [length - 1 - step if backward else step for backward in directions]
            out = body.run([*states, *(x[row, at] for x, at in zip(tensors[num_states:], places, strict=True))], scope)
            states = [to_tensor(x) for x in out[:num_states]]
            slices.append(out[num_states:])
        for kept, state in zip(states_out, states, strict=True):
            kept.append(state)
        for i, kept in enumerate(rows_out):
            stacked = _stack([s[i] for s in slices], 0)
            rest = torch.zeros(steps - length, *stacked.shape[1:], dtype=stacked.dtype)
            kept.append(torch.cat([stacked, rest]) if steps > length else stacked)
    return tuple(torch.stack(column) for column in [*states_out, *rows_out])


def sequence_map(call: Call, scope: dict[str, Value], first: Value, *others: Value) -> tuple[Value, ...]:
    body = call.need("body")
    columns: list[Items] = [Items() for _ in body.outputs]
    for i, item in enumerate(first):
        out = body.run([item, *(x[i] if isinstance(x, Items) else x for x in others)], scope)
        for column, value in zip(columns, out, strict=True):
            column.append(to_tensor(value))
    return tuple(columns)


def _stack(values: list[Value], axis: int) -> Any:
    if not values:
        return torch.zeros(0)
    tensors = [to_tensor(value) for value in values]
    return torch.stack(tensors, dim=axis)


OPS: dict[str, Function] = {"If": if_, "Loop": loop, "Scan": scan, "SequenceMap": sequence_map}
