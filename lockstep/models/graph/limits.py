"""Bounds on what a graph may ask for, so that a damaged or hostile file ends in an error and not in a full machine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from lockstep.core.errors import FormatError

MAX_ELEMENTS = 2**27
"""Elements of a tensor that one operation makes larger than its inputs (half a GiB of float32)."""
MAX_STEPS = 1_000_000
"""Iterations of a Loop or Scan."""


def check_size(dims: Sequence[Any]) -> None:
    """Raises:
    FormatError: sizes below zero, or more than `MAX_ELEMENTS` in all.
    """
    total = 1
    for n in dims:
        if isinstance(n, torch.SymInt):
            return
        if n < 0:
            raise FormatError(f"a tensor of shape {list(dims)}")
        total *= int(n)
    if total > MAX_ELEMENTS:
        raise FormatError(f"a tensor of shape {list(dims)}: more than {MAX_ELEMENTS:,} elements")
