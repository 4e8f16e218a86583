"""Rotary embedding through the compiled kernel; the gradient turns back.

Legend: T tokens, H heads, D head dim, P table rows, R rotated pairs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lockstep.core.errors import InputError
from lockstep.kernels import native


def _turn(x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, direction: float) -> Tensor:
    num_tokens, num_heads, head_dim = x.shape
    # Heads that lie side by side may be a part of a wider row, such as the joint projection of q, k and v.
    if x.stride(2) != 1 or x.stride(1) != head_dim:
        x = x.contiguous()
    y = torch.empty(x.shape)
    bad = native.lib().ls_rope(
        x.data_ptr(),
        x.stride(0),
        positions.data_ptr(),
        cos.data_ptr(),
        sin.data_ptr(),
        y.data_ptr(),
        num_tokens,
        num_heads,
        head_dim,
        cos.shape[1],
        cos.shape[0],
        interleaved,
        direction,
    )
    if bad >= 0:
        raise InputError(
            f"positions[{bad}] is {int(positions[bad])}; the tables hold 0..{len(cos) - 1}", field="positions"
        )
    return y


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
        ctx.save_for_backward(positions, cos, sin)
        ctx.interleaved = interleaved
        return _turn(x, positions, cos, sin, interleaved, 1.0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        native.refuse_double_backward()
        positions, cos, sin = ctx.saved_tensors
        return _turn(grads[0], positions, cos, sin, ctx.interleaved, -1.0), None, None, None, None


def rope(x_THD: Tensor, positions_T: Tensor, cos_PR: Tensor, sin_PR: Tensor, interleaved: bool) -> Tensor:
    """See `lockstep.kernels.rope`."""
    positions, cos, sin = native.contiguous(positions_T), native.contiguous(cos_PR), native.contiguous(sin_PR)
    if torch.is_grad_enabled() and x_THD.requires_grad:
        out: Tensor = _Rope.apply(x_THD, positions, cos, sin, interleaved)  # type: ignore[no-untyped-call]
        return out
    return _turn(x_THD, positions, cos, sin, interleaved, 1.0)
