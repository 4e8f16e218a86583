"""Pooling over explicit windows: what each framework's rounding and padding rules come down to.

Legend: M images, C channels, D spatial sizes (one to three dimensions).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

Edges = Sequence[tuple[int, int]]
_MAX_POOLS = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}


def pool_windows(
    x: Tensor,
    kind: str,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    edges: Edges,
    counted: Edges | None,
    power: int = 2,
) -> Tensor:
    """Pool x [M, C, *D] padded by `edges` (before, after) of each dimension; entries no window reaches are left out.

    Args:
        x: the values.
        kind: max, avg, sum or lp (the `power`-norm).
        kernel, stride: of each dimension.
        edges: padding that the windows reach into.
        counted: the part of it that an average counts as zeros; None counts only real entries.
        power: of lp.
    """
    widths = [width for pair in reversed(edges) for width in pair]
    crop: tuple[slice, ...] = tuple(
        slice(0, (size + a + b - k) // s * s + k)
        for size, (a, b), k, s in zip(x.shape[2:], edges, kernel, stride, strict=True)
    )
    crop = (slice(None), slice(None), *crop)
    if kind == "max":
        return _MAX_POOLS[len(kernel)](F.pad(x, widths, value=-math.inf)[crop], kernel, stride)  # type: ignore[operator,no-any-return]
    values = x.abs() ** power if kind == "lp" else x
    sums = _window_sums(F.pad(values, widths)[crop], kernel, stride)
    if kind == "sum":
        return sums
    if kind == "lp":
        return sums ** (1 / power)
    ones = x.new_ones(1, 1, *x.shape[2:])
    if counted is not None:
        ones = F.pad(ones, [width for pair in reversed(counted) for width in pair], value=1.0)
    rest = [(a - c, b - d) for (a, b), (c, d) in zip(edges, counted or [(0, 0)] * len(edges), strict=True)]
    ones = F.pad(ones, [width for pair in reversed(rest) for width in pair])[crop]
    return sums / _window_sums(ones, kernel, stride)


def _window_sums(x: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    match len(kernel):
        case 1:
            return F.avg_pool1d(x, kernel, stride) * math.prod(kernel)
        case 2:
            return F.avg_pool2d(x, kernel, stride, divisor_override=1)
        case _:
            return F.avg_pool3d(x, kernel, stride, divisor_override=1)
