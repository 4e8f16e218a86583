"""The addition inside autograd: its forward is the serving kernel, its backward matrix products of torch's.

Legend: M rows, K inputs, N outputs, R rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lockstep.kernels import native

if TYPE_CHECKING:
    from lockstep.kernels.low_rank import LowRankRun


class TrainedLowRank(torch.autograd.Function):
    """With h = x a: db = scale * hᵀ dy, dh = scale * dy bᵀ, da = xᵀ dh, dx += dh aᵀ; dy passes through to y."""

    @staticmethod
    def forward(
        ctx: Any,
        y_MN: Tensor,
        x_MK: Tensor,
        runs: Sequence[LowRankRun],
        add: Callable[[Tensor, Tensor, Sequence[LowRankRun]], None],
        *pairs: Tensor,
    ) -> Tensor:
        ctx.places = [(run.first_row, run.last_row, run.pair.scale, run.pair.first_column) for run in runs]
        ctx.save_for_backward(x_MK, *pairs)
        ctx.mark_dirty(y_MN)
        add(y_MN, x_MK, runs)
        return y_MN

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        native.refuse_double_backward()
        dy_MN = grads[0]
        x_MK, *pairs = ctx.saved_tensors
        needs = ctx.needs_input_grad
        dx = torch.zeros_like(x_MK) if needs[1] else None
        dpairs: list[Tensor | None] = []
        for index, (first, last, scale, column) in enumerate(ctx.places):
            a_KR, b_RN = pairs[2 * index], pairs[2 * index + 1]
            need_a, need_b = needs[4 + 2 * index], needs[5 + 2 * index]
            x, dy = x_MK[first:last], dy_MN[first:last, column : column + b_RN.shape[1]]
            dh = (dy @ b_RN.T).mul_(scale) if need_a or dx is not None else None
            if dx is not None and dh is not None:
                dx[first:last].addmm_(dh, a_KR.T)
            dpairs.append(x.T @ dh if need_a and dh is not None else None)
            dpairs.append(((x @ a_KR).T @ dy).mul_(scale) if need_b else None)
        return dy_MN, dx, None, None, *dpairs
