"""Activations through the compiled kernels.

Legend: T tokens, F feed-forward width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lockstep.kernels import native

_NUMBERS = {"silu": 0, "gelu_tanh": 1, "gelu": 2, "relu": 3}
"""LsGate of csrc/language.h."""


def _gated(gate_up: Tensor, number: int) -> Tensor:
    width = gate_up.shape[-1] // 2
    y = torch.empty((*gate_up.shape[:-1], width))
    rows = y.numel() // width if width else 0
    native.lib().ls_gated(gate_up.data_ptr(), y.data_ptr(), rows, width, number)
    return y


def _activate(x: Tensor, number: int) -> Tensor:
    y = torch.empty_like(x)
    native.lib().ls_activate(x.data_ptr(), y.data_ptr(), x.numel(), number)
    return y


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, number: int) -> Tensor:
        ctx.save_for_backward(gate_up)
        ctx.number = number
        return _gated(gate_up, number)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        native.refuse_double_backward()
        (gate_up,) = ctx.saved_tensors
        dgate_up, dy, width = torch.empty_like(gate_up), native.contiguous(grads[0]), gate_up.shape[-1] // 2
        rows = dy.numel() // width if width else 0
        pointers = gate_up.data_ptr(), dy.data_ptr(), dgate_up.data_ptr()
        native.lib().ls_gated_backward(*pointers, rows, width, ctx.number)
        return dgate_up, None


class _Activate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, number: int) -> Tensor:
        ctx.save_for_backward(x)
        ctx.number = number
        return _activate(x, number)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        native.refuse_double_backward()
        (x,) = ctx.saved_tensors
        dx, dy = torch.empty_like(x), native.contiguous(grads[0])
        native.lib().ls_activate_backward(x.data_ptr(), dy.data_ptr(), dx.data_ptr(), x.numel(), ctx.number)
        return dx, None


def activate(x: Tensor, kind: str) -> Tensor:
    """See `lockstep.kernels.activate`."""
    x = native.contiguous(x)
    if torch.is_grad_enabled() and x.requires_grad:
        out: Tensor = _Activate.apply(x, _NUMBERS[kind])  # type: ignore[no-untyped-call]
        return out
    return _activate(x, _NUMBERS[kind])


def gated(gate_up_T2F: Tensor, kind: str) -> Tensor:
    """See `lockstep.kernels.gated`."""
    gate_up = native.contiguous(gate_up_T2F)
    if torch.is_grad_enabled() and gate_up.requires_grad:
        out: Tensor = _Gated.apply(gate_up, _NUMBERS[kind])  # type: ignore[no-untyped-call]
        return out
    return _gated(gate_up, _NUMBERS[kind])
