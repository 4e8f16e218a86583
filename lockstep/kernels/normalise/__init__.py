"""Zero mean and unit deviation over the rows of a minibatch. Legend: B rows."""

from __future__ import annotations

from torch import Tensor

from lockstep.core.errors import InputError
from lockstep.kernels import native
from lockstep.kernels.normalise import cpu, naive

IMPLEMENTATIONS = {"naive": naive.normalise, "cpu": cpu.normalise}


def normalise(x_B: Tensor, mask_B: Tensor | None = None) -> Tensor:
    """(x − mean) / (deviation + 1e-8) with the unbiased deviation, over the rows where `mask` is true.

    Fewer than two such rows: x itself. Sums are float64. Not differentiable.

    Raises:
        InputError: x is not [B], or the mask has another shape.
    """
    if x_B.dim() != 1 or (mask_B is not None and mask_B.shape != x_B.shape):
        got = None if mask_B is None else tuple(mask_B.shape)
        raise InputError(f"x must be [B] with a mask of its shape; got {tuple(x_B.shape)} and {got}", field="x")
    return IMPLEMENTATIONS[native.choose(x_B)](x_B.detach(), None if mask_B is None else mask_B.bool())
