"""Low-rank adapters as every room speaks of them (Hu et al. 2021): the pairs of one matrix, and which rows go through whose.

Legend: K inputs, R rank, N outputs of one part of a matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class LowRankPair:
    """Adds scale * (x a) b to columns first_column .. first_column + N - 1 of a product. Both lie as kernels read them."""

    a_KR: Tensor
    """float32, contiguous: the transpose of the paper's A."""
    b_RN: Tensor
    """float32, contiguous: the transpose of the paper's B."""
    scale: float
    """alpha / r, or alpha / sqrt(r)."""
    first_column: int = 0


class RowAdapter(Protocol):
    """What the layers read of an adapter."""

    def pairs(self, path: str) -> Sequence[LowRankPair]:
        """Of the matrix with this name in the model; none where the adapter leaves it alone."""


@dataclass(frozen=True, slots=True, eq=False)
class AdapterRun:
    """Neighbouring rows of a batch that go through one adapter; rows of no run go through the base model alone."""

    first_row: int
    last_row: int
    """The row after the last."""
    adapter: RowAdapter
