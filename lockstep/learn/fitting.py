"""The loop that fits any module to batches: loss, gradient, update.

batches -> objective -> backward (summed over `accumulate` batches) -> optimiser -> loss of the step
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from lockstep.core.errors import ConfigError, DivergedError

T = TypeVar("T")


class Updater(Protocol):
    """What changes the weights: torch's optimisers, and `interop.caffe.solver.SolverOptimiser`."""

    def zero_grad(self) -> None: ...

    def step(self) -> object: ...


def fit(
    objective: Callable[[T], Tensor],
    optimiser: Updater,
    batches: Iterable[T],
    *,
    num_steps: int | None = None,
    accumulate: int = 1,
) -> Iterator[float]:
    """Update after update; yields the mean loss of each, after its update.

    Args:
        objective: batch -> scalar loss to minimise, averaged as its author means it.
        optimiser: whose gradients are cleared before, and which steps after, the batches of one update. Gradients of
            several batches are summed; Caffe's solver divides them itself, for torch's divide in the objective.
        batches: ends the loop when it ends, an incomplete update left out.
        num_steps: updates at most.
        accumulate: batches of one update.

    Raises:
        DivergedError: the loss is not finite; the weights are those of the update before.
        ConfigError: accumulate is below 1.

    >>> weight = torch.nn.Parameter(torch.zeros(()))
    >>> losses = list(fit(lambda x: (weight - x) ** 2, torch.optim.SGD([weight], 0.25), [3.0, 3.0]))
    >>> losses, float(weight.detach())
    ([9.0, 2.25], 2.25)
    """
    if accumulate < 1:
        raise ConfigError(f"accumulate={accumulate} must be at least 1")
    source = iter(batches)
    step = 0
    while num_steps is None or step < num_steps:
        optimiser.zero_grad()
        total = 0.0
        for _ in range(accumulate):
            batch = next(source, None)
            if batch is None:
                return
            loss = objective(batch)
            value = float(loss.detach())
            if not torch.isfinite(loss.detach()).all():
                raise DivergedError(f"the loss of step {step} is {value}; lower the learning rate or look at the data")
            loss.backward()  # type: ignore[no-untyped-call]
            total += value
        optimiser.step()
        step += 1
        yield total / accumulate
