"""Recurrences that a trace keeps as one operation, so that a graph has a free number of steps.

    eager:                body(states, slices, outer), step by step
    inside `recording()`: one operator lockstep::loop, which `interop.traced` makes a Scan with a body traced apart

Legend: T steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

Body = Callable[[list[Tensor], list[Tensor], list[Tensor]], tuple[list[Tensor], list[Tensor]]]
"""(states, one slice of each scanned tensor, tensors from outside) -> (next states, results of the step)."""

OPERATOR = "lockstep.loop.default"
_bodies: ContextVar[list[Body] | None] = ContextVar("bodies", default=None)


@contextmanager
def recording() -> Iterator[list[Body]]:
    """While inside, `loop` leaves an operator in the trace; its last argument is an index of the list."""
    bodies: list[Body] = []
    token = _bodies.set(bodies)
    try:
        yield bodies
    finally:
        _bodies.reset(token)


def is_recording() -> bool:
    """Whether a trace is being made that keeps recurrences."""
    return _bodies.get() is not None


def loop(
    body: Body, states: Sequence[Tensor], scanned: Sequence[Tensor], outer: Sequence[Tensor] = ()
) -> tuple[list[Tensor], list[Tensor]]:
    """Run a body over the first axis of the scanned tensors.

    Args:
        body: uses no tensors but its arguments (weights come through `outer`), and keeps the shapes of the states.
        states: before the first step.
        scanned: [T, ...], at least one.
        outer: what every step sees.

    Returns:
        (last states, results [T, ...]).

    >>> ends, sums = loop(lambda s, x, o: ([s[0] + x[0]], [s[0]]), [torch.zeros(())], [torch.tensor([1.0, 2.0, 3.0])])
    >>> ends[0].item(), sums[0].tolist()
    (6.0, [0.0, 1.0, 3.0])
    """
    bodies = _bodies.get()
    if bodies is None:
        return _run(body, list(states), list(scanned), list(outer))
    bodies.append(body)
    out = _loop(list(states), list(scanned), list(outer), len(bodies) - 1)
    return out[: len(states)], out[len(states) :]


def _run(
    body: Body, states: list[Tensor], scanned: list[Tensor], outer: list[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    rows = []
    for step in range(scanned[0].shape[0]):
        states, results = body(states, [x[step] for x in scanned], outer)
        rows.append(results)
    return states, [torch.stack(column) for column in zip(*rows, strict=True)]


@torch.library.custom_op("lockstep::loop", mutates_args=())
def _loop(states: list[Tensor], scanned: list[Tensor], outer: list[Tensor], index: int) -> list[Tensor]:
    bodies = _bodies.get()
    assert bodies is not None, "lockstep::loop stands for a body that only its trace knows"
    ends, results = _run(bodies[index], states, scanned, outer)
    return [x.clone() for x in (*ends, *results)]


@_loop.register_fake
def _(states: list[Tensor], scanned: list[Tensor], outer: list[Tensor], index: int) -> list[Tensor]:
    bodies = _bodies.get()
    assert bodies is not None
    ends, results = bodies[index](list(states), [x[0] for x in scanned], list(outer))
    num_steps = scanned[0].shape[0]
    return [torch.empty_like(x) for x in ends] + [x.new_empty(num_steps, *x.shape) for x in results]
