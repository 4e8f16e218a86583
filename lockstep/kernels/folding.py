"""Sums whose order of additions does not depend on what lies beside the row, for the naive twins."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def fold_sum(x: Tensor) -> Tensor:
    """Sum over the last dimension: the upper half is added to the lower one until a single element is left.

    Only elementwise additions, so that a row's bits cannot depend on the other rows, as they may in `Tensor.sum`.

    >>> import torch
    >>> fold_sum(torch.arange(5.0)).item()
    10.0
    """
    size = x.shape[-1]
    width = 1 << (size - 1).bit_length()
    x = functional.pad(x, (0, width - size)) if width != size else x
    while width > 1:
        width //= 2
        x = x[..., :width] + x[..., width:]
    return x[..., 0]
