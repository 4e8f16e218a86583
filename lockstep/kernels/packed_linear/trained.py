"""The packed product inside autograd: its forward is the serving kernel, its backward a matrix product of torch's.

A gradient need not be bit-reproducible across batch splits, so the backward may take any order of reduction.

Legend: M rows, N outputs, K inputs, X experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lockstep.kernels.packed_linear.packing import unpack_rows
from lockstep.kernels.packed_linear.weight import PackedWeight

ROWS_AT_ONCE = 4096  # outputs of a quantised matrix that are spelled out together in the backward pass


class TrainedLinear(torch.autograd.Function):
    """y = x Wᵀ + b. In bf16 the operands of both products of the gradient are rounded to bf16, as they are forward."""

    @staticmethod
    def forward(
        ctx: Any,
        x_MK: Tensor,
        weight_NK: Tensor | None,
        bias_N: Tensor | None,
        packed: PackedWeight,
        product: Callable[[Tensor, PackedWeight, Tensor | None], Tensor],
    ) -> Tensor:
        ctx.packed = packed
        ctx.save_for_backward(x_MK, weight_NK)
        return product(x_MK, packed, bias_N)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_MK, weight_NK = ctx.saved_tensors
        dy_MN = grads[0]
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        dx = input_gradient(dy_MN, weight_NK, ctx.packed) if need_x else None
        dweight = weight_gradient(dy_MN, x_MK, weight_NK, ctx.packed) if need_weight else None
        return dx, dweight, dy_MN.sum(0) if need_bias else None, None, None


def input_gradient(dy_MN: Tensor, weight_NK: Tensor | None, packed: PackedWeight) -> Tensor:
    """dy W, float32 [M, K]; a quantised W is spelled out some thousand outputs at a time."""
    if not packed.quantised and weight_NK is not None:
        compute = _compute_dtype(packed)
        return (dy_MN.to(compute) @ weight_NK.to(compute)).to(torch.float32)
    dx_MK = dy_MN.new_zeros(dy_MN.shape[0], packed.num_inputs)
    for first in range(0, packed.num_outputs, ROWS_AT_ONCE):
        last = min(first + ROWS_AT_ONCE, packed.num_outputs)
        dx_MK.addmm_(dy_MN[:, first:last], unpack_rows(packed, first, last))
    return dx_MK


def weight_gradient(dy_MN: Tensor, x_MK: Tensor, weight_NK: Tensor, packed: PackedWeight) -> Tensor:
    """dyᵀ x in the weight's dtype."""
    compute = _compute_dtype(packed)
    return (dy_MN.to(compute).T @ x_MK.to(compute)).to(weight_NK.dtype)


def _compute_dtype(packed: PackedWeight) -> torch.dtype:
    return torch.bfloat16 if packed.format == "bf16" else torch.float32


class TrainedGrouped(torch.autograd.Function):
    """`TrainedLinear` of every expert over its rows."""

    @staticmethod
    def forward(
        ctx: Any,
        x_MK: Tensor,
        weight_XNK: Tensor | None,
        bias_XN: Tensor | None,
        experts: list[PackedWeight],
        starts: list[int],
        product: Callable[[Tensor, Tensor | None], Tensor],
    ) -> Tensor:
        ctx.experts, ctx.starts = experts, starts
        ctx.save_for_backward(x_MK, weight_XNK, bias_XN)
        return product(x_MK, bias_XN)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_MK, weight_XNK, bias_XN = ctx.saved_tensors
        dy_MN = grads[0]
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        dx = torch.empty_like(x_MK) if need_x else None
        dweight = torch.zeros_like(weight_XNK) if need_weight else None
        dbias = torch.zeros_like(bias_XN) if need_bias else None
        for x, packed in enumerate(ctx.experts):
            rows = slice(ctx.starts[x], ctx.starts[x + 1])
            if rows.start == rows.stop:
                continue
            weight = None if weight_XNK is None else weight_XNK[x]
            if dx is not None:
                dx[rows] = input_gradient(dy_MN[rows], weight, packed)
            if dweight is not None:
                dweight[x] = weight_gradient(dy_MN[rows], x_MK[rows], weight_XNK[x], packed)
            if dbias is not None:
                dbias[x] = dy_MN[rows].sum(0)
        return dx, dweight, dbias, None, None, None
