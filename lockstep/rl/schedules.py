"""Values that change over a run.

>>> linear(1.0, 0.0, 0.25)
0.75
"""

from __future__ import annotations


def linear(start: float, end: float, progress: float) -> float:
    """Straight line from `start` (progress 0) to `end` (progress 1)."""
    return start + (end - start) * min(max(progress, 0.0), 1.0)


def linear_until(start: float, end: float, fraction: float, progress: float) -> float:
    """Straight line that reaches `end` after `fraction` of the run and stays there, as ε-greedy exploration has it.

    >>> linear_until(1.0, 0.5, 0.5, 0.75)
    0.5
    """
    return linear(start, end, progress / fraction if fraction > 0 else 1.0)
