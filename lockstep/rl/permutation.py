"""Minibatch order as a function of (seed, update, epoch): nothing to save, the same after a resume."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def minibatches(num_rows: int, size: int, num_epochs: int, seed: int, update: int) -> Iterator[Tensor]:
    """Row indices of each minibatch: `num_epochs` shuffled passes over `num_rows`, the last batch of a pass may be short.

    >>> [len(rows) for rows in minibatches(5, 2, 1, seed=0, update=0)]
    [2, 2, 1]
    """
    generator = torch.Generator()
    for epoch in range(num_epochs):
        generator.manual_seed(((seed * 1_000_003 + update) * 1_009 + epoch) & 0x7FFF_FFFF_FFFF_FFFF)
        order = torch.randperm(num_rows, generator=generator)
        yield from order.split(size)
