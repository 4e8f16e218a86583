"""Observations are a tensor or a dictionary of tensors; these maps treat both alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def tree_map(fn: Callable[..., Any], first: Any, *rest: Any) -> Any:
    """Apply `fn` to each leaf of one or more trees of equal structure.

    >>> tree_map(lambda x, y: x + y, {"a": 1}, {"a": 2})
    {'a': 3}
    """
    if isinstance(first, dict):
        return {key: tree_map(fn, value, *(other[key] for other in rest)) for key, value in first.items()}
    return fn(first, *rest)


def tree_leaves(tree: Any) -> list[Any]:
    """Leaves in key order.

    >>> tree_leaves({"b": 1, "a": {"c": 2}})
    [1, 2]
    """
    if isinstance(tree, dict):
        return [leaf for value in tree.values() for leaf in tree_leaves(value)]
    return [tree]
