"""Norms through the compiled kernels. Statistics are recomputed in the backward pass rather than kept.

Legend: E model width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lockstep.kernels import native

_ROWS = 64
"""LS_NORM_ROWS of csrc/language.h: rows behind one partial sum of a weight's gradient."""


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _forward(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    y, total = torch.empty_like(x), x if residual is None else torch.empty_like(x)
    width = x.shape[-1]
    native.lib().ls_rms_norm(
        x.data_ptr(),
        _address(residual),
        weight.data_ptr(),
        eps,
        offset,
        total.data_ptr(),
        y.data_ptr(),
        x.numel() // width if width else 0,
        width,
    )
    return y, total


def _layer_forward(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    y, width = torch.empty_like(x), x.shape[-1]
    rows = x.numel() // width if width else 0
    native.lib().ls_layer_norm(x.data_ptr(), _address(weight), _address(bias), eps, y.data_ptr(), rows, width)
    return y


def _backward(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    offset: float,
    dy: Tensor,
    dtotal: Tensor | None,
    wanted: tuple[bool, bool],
    centred: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(dx, dweight, dbias)."""
    native.refuse_double_backward()
    width = x.shape[-1]
    rows = x.numel() // width if width else 0
    partial = [torch.empty((rows + _ROWS - 1) // _ROWS, width) if want else None for want in wanted]
    dx, dy = torch.empty_like(x), native.contiguous(dy)
    native.lib().ls_norm_backward(
        x.data_ptr(),
        _address(weight),
        eps,
        offset,
        dy.data_ptr(),
        _address(dtotal),
        dx.data_ptr(),
        *map(_address, partial),
        rows,
        width,
        centred,
    )
    dweight, dbias = (None if p is None else p.sum(0) for p in partial)
    return dx, dweight, dbias


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.facts = eps, offset
        return _forward(x, None, weight, eps, offset)[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        eps, offset = ctx.facts
        dx, dweight, _ = _backward(x, weight, eps, offset, grads[0], None, (ctx.needs_input_grad[1], False), False)
        return dx, dweight, None, None


class _AddRmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float
    ) -> tuple[Tensor, Tensor]:
        y, total = _forward(x, residual, weight, eps, offset)
        ctx.save_for_backward(total, weight)
        ctx.facts = eps, offset
        return y, total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        total, weight = ctx.saved_tensors
        dtotal = native.contiguous(grads[1])
        dx, dweight, _ = _backward(total, weight, *ctx.facts, grads[0], dtotal, (ctx.needs_input_grad[2], False), False)
        return dx, dx, dweight, None, None


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return _layer_forward(x, weight, bias, eps)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        wanted = ctx.needs_input_grad[1], ctx.needs_input_grad[2]
        return *_backward(x, weight, ctx.eps, 0.0, grads[0], None, wanted, True), None


def rms_norm(x: Tensor, weight_E: Tensor, eps: float, offset: float) -> Tensor:
    """See `lockstep.kernels.rms_norm`."""
    x, weight = native.contiguous(x), native.contiguous(weight_E)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        out: Tensor = _RmsNorm.apply(x, weight, eps, offset)  # type: ignore[no-untyped-call]
        return out
    return _forward(x, None, weight, eps, offset)[0]


def add_rms_norm(x: Tensor, residual: Tensor, weight_E: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    """See `lockstep.kernels.add_rms_norm`."""
    x, residual, weight = native.contiguous(x), native.contiguous(residual), native.contiguous(weight_E)
    if torch.is_grad_enabled() and (x.requires_grad or residual.requires_grad or weight.requires_grad):
        out: tuple[Tensor, Tensor] = _AddRmsNorm.apply(x, residual, weight, eps, offset)  # type: ignore[no-untyped-call]
        return out
    return _forward(x, residual, weight, eps, offset)


def layer_norm(x: Tensor, weight_E: Tensor | None, bias_E: Tensor | None, eps: float) -> Tensor:
    """See `lockstep.kernels.layer_norm`."""
    weight, bias = (None if p is None else native.contiguous(p) for p in (weight_E, bias_E))
    x = native.contiguous(x)
    if torch.is_grad_enabled() and any(p is not None and p.requires_grad for p in (x, weight, bias)):
        out: Tensor = _LayerNorm.apply(x, weight, bias, eps)  # type: ignore[no-untyped-call]
        return out
    return _layer_forward(x, weight, bias, eps)
