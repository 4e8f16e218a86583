"""Recurrent cells through the compiled kernels. Gates are recomputed in the backward pass rather than kept.

Legend: T time steps, M rows, H hidden units.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lockstep.kernels import native


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _call(function: Callable[..., None], tensors: tuple[Tensor | None, ...], *sizes: int) -> None:
    function(*map(_address, tensors), *sizes)


def _contiguous(grads: tuple[Tensor | None, ...]) -> list[Tensor | None]:
    return [None if g is None else native.contiguous(g) for g in grads]


class _LstmGates(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pre: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        h_out, c_out = torch.empty_like(c), torch.empty_like(c)
        _call(native.lib().ls_lstm_gates, (pre, c, h_out, c_out), *c.shape)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(pre, c, c_out)
        return h_out, c_out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor, Tensor]:
        native.refuse_double_backward()
        pre, c, c_out = ctx.saved_tensors
        dpre, dc = torch.empty_like(pre), torch.empty_like(c)
        _call(native.lib().ls_lstm_gates_backward, (pre, c, c_out, *_contiguous(grads), dpre, dc), *c.shape)
        return dpre, dc


class _GruGates(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, re: Tensor, h: Tensor) -> Tensor:
        out = torch.empty_like(h)
        _call(native.lib().ls_gru_gates, (inputs, re, h, out), *h.shape)
        ctx.save_for_backward(inputs, re, h)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        native.refuse_double_backward()
        inputs, re, h = ctx.saved_tensors
        outs = torch.empty_like(inputs), torch.empty_like(re), torch.empty_like(h)
        _call(native.lib().ls_gru_gates_backward, (inputs, re, h, native.contiguous(grads[0]), *outs), *h.shape)
        return outs


class _LstmSequence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor, h0: Tensor, c0: Tensor, starts: Tensor
    ) -> tuple[Tensor, Tensor]:
        num_steps, num, hidden = inputs.shape[0], *h0.shape
        h, c, h_before, c_before = (torch.empty(num_steps, num, hidden) for _ in range(4))
        pre = torch.empty_like(inputs)
        tensors = (inputs, weight, bias, starts, h0, c0, h, c, h_before, c_before, pre)
        _call(native.lib().ls_lstm_sequence, tensors, num_steps, num, hidden)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(weight, starts, c, h_before, c_before, pre)
        return h, c[-1].clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        native.refuse_double_backward()
        weight, starts, c, h_before, c_before, pre = ctx.saved_tensors
        num_steps, num, hidden = c.shape
        dh, dc_last = _contiguous(grads)
        dinputs, dweight, dbias = torch.empty_like(pre), torch.empty_like(weight), torch.empty(4 * hidden)
        dh0, dc0 = torch.empty(num, hidden), torch.empty(num, hidden)
        tensors = (weight, starts, c, h_before, c_before, pre, dh, None, dc_last, dinputs, dweight, dbias, dh0, dc0)
        _call(native.lib().ls_lstm_sequence_backward, tensors, num_steps, num, hidden)
        return dinputs, dweight, dbias, dh0, dc0, None


class _GruSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor, h0: Tensor, starts: Tensor) -> Tensor:
        num_steps, num, hidden = inputs.shape[0], *h0.shape
        h, h_before = torch.empty(num_steps, num, hidden), torch.empty(num_steps, num, hidden)
        re = torch.empty_like(inputs)
        _call(native.lib().ls_gru_sequence, (inputs, weight, bias, starts, h0, h, h_before, re), num_steps, num, hidden)
        ctx.save_for_backward(inputs, weight, starts, h_before, re)
        return h

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        native.refuse_double_backward()
        inputs, weight, starts, h_before, re = ctx.saved_tensors
        num_steps, num, hidden = h_before.shape
        dh = native.contiguous(grads[0])
        dinputs, dre, dweight = torch.empty_like(inputs), torch.empty_like(re), torch.empty_like(weight)
        dbias, dh0 = torch.empty(3 * hidden), torch.empty(num, hidden)
        tensors = (inputs, weight, starts, h_before, re, dh, None, dinputs, dre, dweight, dbias, dh0)
        _call(native.lib().ls_gru_sequence_backward, tensors, num_steps, num, hidden)
        return dinputs, dweight, dbias, dh0, None


def lstm_gates(pre_M4H: Tensor, c_MH: Tensor) -> tuple[Tensor, Tensor]:
    """See `lockstep.kernels.lstm_gates`."""
    out: tuple[Tensor, Tensor] = _LstmGates.apply(  # type: ignore[no-untyped-call]
        native.contiguous(pre_M4H), native.contiguous(c_MH)
    )
    return out


def gru_gates(in_M3H: Tensor, re_M3H: Tensor, h_MH: Tensor) -> Tensor:
    """See `lockstep.kernels.gru_gates`."""
    tensors = map(native.contiguous, (in_M3H, re_M3H, h_MH))
    out: Tensor = _GruGates.apply(*tensors)  # type: ignore[no-untyped-call]
    return out


def lstm_sequence(
    inputs_TM4H: Tensor, weight: Tensor, bias: Tensor, h_MH: Tensor, c_MH: Tensor, starts_TM: Tensor
) -> tuple[Tensor, Tensor]:
    """See `lockstep.kernels.lstm_sequence`; one call for all steps."""
    tensors = map(native.contiguous, (inputs_TM4H, weight, bias, h_MH, c_MH, starts_TM))
    out: tuple[Tensor, Tensor] = _LstmSequence.apply(*tensors)  # type: ignore[no-untyped-call]
    return out


def gru_sequence(inputs_TM3H: Tensor, weight: Tensor, bias: Tensor, h_MH: Tensor, starts_TM: Tensor) -> Tensor:
    """See `lockstep.kernels.gru_sequence`; one call for all steps."""
    tensors = map(native.contiguous, (inputs_TM3H, weight, bias, h_MH, starts_TM))
    out: Tensor = _GruSequence.apply(*tensors)  # type: ignore[no-untyped-call]
    return out
