"""A binary tree of sums and minima for prioritised replay (Schaul et al. 2016). Legend: B entries of a batch."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lockstep.core.errors import InputError
from lockstep.kernels import native
from lockstep.kernels.sumtree import naive


class SumTree:
    """Non-negative float64 weights of `size` leaves with their sum, minimum and inverse cumulative distribution.

    >>> tree = SumTree(3)
    >>> tree.update([0, 2], [1.0, 3.0])
    >>> tree.total, tree.minimum, tree.find([0.5, 1.0]).tolist()
    (4.0, 1.0, [0, 2])
    """

    def __init__(self, size: int) -> None:
        if size < 1:
            raise InputError(f"size must be at least 1; got {size}", field="size")
        self.size = size
        self.capacity = 1 << (size - 1).bit_length()
        self.sums: NDArray[np.float64] = np.zeros(2 * self.capacity)
        self.minima: NDArray[np.float64] = np.full(2 * self.capacity, np.inf)

    @property
    def total(self) -> float:
        """Sum of all weights."""
        return float(self.sums[1])

    @property
    def minimum(self) -> float:
        """Least weight that has been set; inf when none has."""
        return float(self.minima[1])

    def update(self, index_B: ArrayLike, value_B: ArrayLike) -> None:
        """Set the weights of leaves; of repeated indices the last counts.

        Raises:
            InputError: for an index out of range, or a negative, infinite or NaN weight.
        """
        index = np.ascontiguousarray(index_B, np.int64).reshape(-1)
        value = np.ascontiguousarray(np.broadcast_to(np.asarray(value_B, np.float64), index.shape))
        if not len(index):
            return
        if index.min() < 0 or index.max() >= self.size:
            raise InputError(f"index must lie in 0..{self.size - 1}; got {index.min()}..{index.max()}", field="index")
        if not (np.isfinite(value).all() and value.min() >= 0.0):
            raise InputError("weights must be finite and not negative", field="value")
        if native.usable():
            native.lib().ls_sumtree_update(
                self.sums.ctypes.data,
                self.minima.ctypes.data,
                self.capacity,
                index.ctypes.data,
                value.ctypes.data,
                len(index),
            )
        else:
            naive.update(self.sums, self.minima, self.capacity, index, value)

    def get(self, index_B: ArrayLike) -> NDArray[np.float64]:
        """Weights of leaves, [B]."""
        return self.sums[np.asarray(index_B, np.int64) + self.capacity]

    def find(self, prefix_B: ArrayLike) -> NDArray[np.int64]:
        """For each prefix in [0, total) the leaf i with sum(w[:i]) <= prefix < sum(w[:i+1]); never a leaf of weight 0
        while the total is positive."""
        prefix = np.ascontiguousarray(prefix_B, np.float64).reshape(-1)
        if self.total <= 0.0:
            raise InputError("the tree is empty: no weight has been set", field="prefix")
        if not native.usable():
            return naive.find(self.sums, self.capacity, prefix)
        index: NDArray[np.int64] = np.empty(len(prefix), np.int64)
        native.lib().ls_sumtree_find(
            self.sums.ctypes.data, self.capacity, prefix.ctypes.data, index.ctypes.data, len(prefix)
        )
        return index
