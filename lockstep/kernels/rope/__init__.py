"""Rotary position embedding (Su et al. 2021). A token's bits depend on the token and its position only.

Legend: T tokens, H heads, D head dim, P table rows, R rotated pairs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lockstep.core.errors import InputError
from lockstep.kernels import native
from lockstep.kernels.gpu import Later
from lockstep.kernels.rope import cpu, naive

IMPLEMENTATIONS: dict[str, Any] = {
    "naive": naive,
    "cpu": cpu,
    "opaque": naive,
    "triton": Later("lockstep.kernels.rope.triton"),
}


def rope(x_THD: Tensor, positions_T: Tensor, cos_PR: Tensor, sin_PR: Tensor, interleaved: bool = False) -> Tensor:
    """Rotate the first 2R of D dimensions by the angle of the token's position; the rest passes unchanged.

    Args:
        x_THD: queries or keys; a view whose heads lie side by side is read in place.
        positions_T: int64, below P.
        cos_PR, sin_PR: tables by position.
        interleaved: pairs are neighbours (2r, 2r + 1); else r and R + r.

    Returns:
        [T, H, D], differentiable with respect to x.

    Raises:
        InputError: for shapes that do not fit, or a position outside the tables.
    """
    shape, table = x_THD.shape, cos_PR.shape
    if len(shape) != 3 or len(table) != 2 or 2 * table[1] > shape[2] or sin_PR.shape != table:
        raise InputError(
            f"x is {tuple(x_THD.shape)} with tables {tuple(cos_PR.shape)} and {tuple(sin_PR.shape)}; expected "
            "[T, H, D] and two [P, R] with 2R <= D",
            field="x",
        )
    if positions_T.dtype is not torch.int64 or positions_T.shape != shape[:1]:
        raise InputError(
            f"positions are {positions_T.dtype} {tuple(positions_T.shape)}; expected int64 [{x_THD.shape[0]}]",
            field="positions",
        )
    if cos_PR.dtype is not x_THD.dtype or sin_PR.dtype is not x_THD.dtype:
        raise InputError(f"the tables are {cos_PR.dtype} and {sin_PR.dtype}; expected {x_THD.dtype} as x", field="cos")
    return IMPLEMENTATIONS[native.choose(x_THD, has_triton=True)].rope(x_THD, positions_T, cos_PR, sin_PR, interleaved)
