"""Reference dense chain in plain torch. The reduction over K is a loop of multiplies and adds, because a matrix product
of a library may take another order for another number of rows.

Legend: M rows, K in, N out, E ensemble members.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lockstep.kernels import native

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda z: z,
    "tanh": torch.tanh,
    "relu": torch.relu,
    "elu": functional.elu,
    "silu": functional.silu,
    "gelu": lambda z: functional.gelu(z, approximate="tanh"),
    "sigmoid": torch.sigmoid,
}


def matmul(x: Tensor, w: Tensor, start: Tensor | None = None) -> Tensor:
    """start + x w with the sum over K in rising order; batch dimensions broadcast."""
    if native.state.mode == "traceable":
        return x @ w if start is None else x @ w + start
    out = start
    for k in range(w.shape[-2]):
        term = x[..., :, k : k + 1] * w[..., k : k + 1, :]
        out = term if out is None else out + term
    assert out is not None
    return out


def round_to_bf16(x: Tensor) -> Tensor:
    """float32 values that bfloat16 can hold, round to nearest even."""
    return x.to(torch.bfloat16).to(torch.float32)


class _RoundedProduct(torch.autograd.Function):
    """x w with both operands rounded to bf16 in the product and in both products of its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return matmul(round_to_bf16(x), round_to_bf16(w))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        dy = round_to_bf16(grads[0])
        dx = matmul(dy, round_to_bf16(w).transpose(-1, -2))
        dw = matmul(round_to_bf16(x).transpose(-1, -2), dy)
        return _sum_to(dx, x), _sum_to(dw, w)


def _sum_to(grad: Tensor, like: Tensor) -> Tensor:
    return grad.sum(0) if grad.dim() > like.dim() else grad


def mlp(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    activation: str,
    output_activation: str,
    dtype: str,
) -> Tensor:
    """See `lockstep.kernels.mlp`."""
    last = len(weights) - 1
    for index, (w, b) in enumerate(zip(weights, biases, strict=True)):
        row = None if b is None else b.unsqueeze(-2)
        if dtype == "bf16" and native.state.mode != "traceable":
            product = _RoundedProduct.apply(x, w)  # type: ignore[no-untyped-call]
            x = product if row is None else product + row
        else:
            if dtype == "bf16":
                x, w = round_to_bf16(x), round_to_bf16(w)
            x = matmul(x, w, row)
        x = ACTIVATIONS[output_activation if index == last else activation](x)
    return x
