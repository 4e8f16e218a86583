"""Reference sum tree: the same arithmetic by whole levels in NumPy. Legend: B entries of a batch."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def update(
    sums: NDArray[np.float64],
    minima: NDArray[np.float64],
    capacity: int,
    index_B: NDArray[np.int64],
    value_B: NDArray[np.float64],
) -> None:
    """Set leaves; of repeated indices the last counts."""
    nodes = index_B + capacity
    for node, value in zip(nodes, value_B, strict=True):
        sums[node] = minima[node] = value
    while len(nodes) and nodes[0] > 1:
        nodes = np.unique(nodes >> 1)
        left, right = 2 * nodes, 2 * nodes + 1
        sums[nodes] = sums[left] + sums[right]
        minima[nodes] = np.minimum(minima[left], minima[right])


def find(sums: NDArray[np.float64], capacity: int, prefix_B: NDArray[np.float64]) -> NDArray[np.int64]:
    """The leaf in whose interval of the running sum each prefix lies."""
    left, node = prefix_B.copy(), np.ones(len(prefix_B), np.int64)
    while len(node) and node[0] < capacity:
        node = node * 2
        right = (left >= sums[node]) & (sums[node + 1] > 0.0)
        left = np.where(right, left - sums[node], left)
        node = node + right
    return node - capacity
