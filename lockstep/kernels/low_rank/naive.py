"""Reference in plain torch, in the kernel's order of reduction.

Legend: M rows, K inputs, N outputs, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from lockstep.kernels import native
from lockstep.kernels.packed_linear.naive import fma

if TYPE_CHECKING:
    from lockstep.kernels.low_rank import LowRankRun


def add(y_MN: Tensor, x_MK: Tensor, runs: Sequence[LowRankRun]) -> None:
    """See `lockstep.kernels.low_rank.add_low_rank`."""
    for run in runs:
        pair, rows = run.pair, x_MK[run.first_row : run.last_row]
        y = y_MN[run.first_row : run.last_row, pair.first_column : pair.first_column + pair.b_RN.shape[1]]
        if native.state.mode == "traceable":
            y += (rows @ pair.a_KR) * pair.scale @ pair.b_RN
            continue
        h = rows.new_zeros(rows.shape[0], pair.a_KR.shape[1])
        for k in range(rows.shape[1]):
            h = fma(rows[:, k : k + 1], pair.a_KR[k], h)
        h *= pair.scale
        for j in range(h.shape[1]):
            y.copy_(fma(h[:, j : j + 1], pair.b_RN[j], y))
