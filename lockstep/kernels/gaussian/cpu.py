"""Diagonal-normal heads through the compiled kernels.

Legend: M rows, A action dimensions, P = 2A distribution parameters.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lockstep.kernels import native

_UNBOUNDED = -math.inf, math.inf
_FLOAT_BYTES = 4


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _stride(log_std: Tensor) -> int:
    return 0 if log_std.dim() == 1 else log_std.shape[1]


def _evaluate(mean: Tensor, log_std: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
    num, width = mean.shape
    logprob, entropy = torch.empty(num, dtype=torch.float32), torch.empty(num, dtype=torch.float32)
    native.lib().ls_gaussian_evaluate(
        mean.data_ptr(),
        log_std.data_ptr(),
        _stride(log_std),
        actions.data_ptr(),
        logprob.data_ptr(),
        entropy.data_ptr(),
        num,
        width,
    )
    return logprob, entropy


class _Evaluate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mean: Tensor, log_std: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(mean, log_std, actions)
        return _evaluate(mean, log_std, actions)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, Tensor | None, None]:
        native.refuse_double_backward()
        mean, log_std, actions = ctx.saved_tensors
        dlogprob, dentropy = (None if g is None else native.contiguous(g) for g in grads)
        dmean = torch.empty_like(mean) if ctx.needs_input_grad[0] else None
        dlog_std = torch.empty_like(log_std) if ctx.needs_input_grad[1] else None
        native.lib().ls_gaussian_backward(
            mean.data_ptr(),
            log_std.data_ptr(),
            _stride(log_std),
            actions.data_ptr(),
            _address(dlogprob),
            _address(dentropy),
            _address(dmean),
            _address(dlog_std),
            *mean.shape,
        )
        return dmean, dlog_std, None


def evaluate(mean_MA: Tensor, log_std: Tensor, actions_MA: Tensor) -> tuple[Tensor, Tensor]:
    """(logprob_M, entropy_M)."""
    mean, log_std, actions = (native.contiguous(t) for t in (mean_MA, log_std, actions_MA))
    if torch.is_grad_enabled() and (mean.requires_grad or log_std.requires_grad):
        out: tuple[Tensor, Tensor] = _Evaluate.apply(mean, log_std, actions)  # type: ignore[no-untyped-call]
        return out
    return _evaluate(mean, log_std, actions)


@torch.no_grad()
def sample(mean_MA: Tensor, log_std: Tensor, normal_MA: Tensor | None) -> tuple[Tensor, Tensor]:
    """(actions_MA, logprob_M)."""
    mean, log_std = native.contiguous(mean_MA), native.contiguous(log_std)
    normal = None if normal_MA is None else native.contiguous(normal_MA)
    num, width = mean.shape
    actions, logprob = torch.empty((num, width), dtype=torch.float32), torch.empty(num, dtype=torch.float32)
    native.lib().ls_gaussian_sample(
        mean.data_ptr(),
        log_std.data_ptr(),
        _stride(log_std),
        _address(normal),
        actions.data_ptr(),
        logprob.data_ptr(),
        num,
        width,
    )
    return actions, logprob


def _squashed(
    mean: int, log_std: int, stride: int, bounds: tuple[float, float], normal: Tensor | None, num: int, width: int
) -> tuple[Tensor, Tensor]:
    actions, logprob = torch.empty((num, width), dtype=torch.float32), torch.empty(num, dtype=torch.float32)
    native.lib().ls_squashed_sample(
        mean, log_std, stride, *bounds, _address(normal), actions.data_ptr(), logprob.data_ptr(), num, width
    )
    return actions, logprob


def _squashed_backward(
    log_std: int,
    stride: int,
    bounds: tuple[float, float],
    normal: Tensor,
    actions: Tensor,
    grads: tuple[Tensor | None, ...],
    dmean: int,
    dlog_std: int,
) -> None:
    dactions, dlogprob = (None if g is None else native.contiguous(g) for g in grads)
    native.lib().ls_squashed_backward(
        log_std,
        stride,
        *bounds,
        normal.data_ptr(),
        actions.data_ptr(),
        _address(dactions),
        _address(dlogprob),
        dmean,
        dlog_std,
        *actions.shape,
    )


class _Squashed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mean: Tensor, log_std: Tensor, normal: Tensor) -> tuple[Tensor, Tensor]:
        num, width = mean.shape
        actions, logprob = _squashed(mean.data_ptr(), log_std.data_ptr(), width, _UNBOUNDED, normal, num, width)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(log_std, normal, actions)
        return actions, logprob

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor, Tensor, None]:
        native.refuse_double_backward()
        log_std, normal, actions = ctx.saved_tensors
        dmean = torch.empty(actions.shape, dtype=torch.float32)
        dlog_std = torch.empty(actions.shape, dtype=torch.float32)
        width = actions.shape[1]
        addresses = dmean.data_ptr(), dlog_std.data_ptr()
        _squashed_backward(log_std.data_ptr(), width, _UNBOUNDED, normal, actions, grads, *addresses)
        return dmean, dlog_std, None


def squashed_sample(mean_MA: Tensor, log_std_MA: Tensor, normal_MA: Tensor | None) -> tuple[Tensor, Tensor]:
    """(actions_MA, logprob_M) of tanh(mean + std * normal)."""
    mean, log_std = native.contiguous(mean_MA), native.contiguous(log_std_MA)
    normal = None if normal_MA is None else native.contiguous(normal_MA)
    if torch.is_grad_enabled() and (mean.requires_grad or log_std.requires_grad):
        normal = torch.zeros_like(mean) if normal is None else normal
        out: tuple[Tensor, Tensor] = _Squashed.apply(mean, log_std, normal)  # type: ignore[no-untyped-call]
        return out
    num, width = mean.shape
    return _squashed(mean.data_ptr(), log_std.data_ptr(), width, _UNBOUNDED, normal, num, width)


def _head(params: Tensor, bounds: tuple[float, float], normal: Tensor) -> tuple[Tensor, Tensor]:
    num, width = normal.shape
    address = params.data_ptr()
    return _squashed(address, address + width * _FLOAT_BYTES, 2 * width, bounds, normal, num, width)


class _SquashedHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, params: Tensor, bounds: tuple[float, float], normal: Tensor) -> tuple[Tensor, Tensor]:
        actions, logprob = _head(params, bounds, normal)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(params, normal, actions)
        ctx.bounds = bounds
        return actions, logprob

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor, None, None]:
        native.refuse_double_backward()
        params, normal, actions = ctx.saved_tensors
        dparams = torch.empty_like(params)
        width, dmean = actions.shape[1], dparams.data_ptr()
        offset = width * _FLOAT_BYTES
        log_std = params.data_ptr() + offset
        _squashed_backward(log_std, 2 * width, ctx.bounds, normal, actions, grads, dmean, dmean + offset)
        return dparams, None, None


def squashed_head(params_MP: Tensor, bounds: tuple[float, float], normal_MA: Tensor) -> tuple[Tensor, Tensor]:
    """(actions_MA, logprob_M) of params = (mean, log_std), log_std clamped."""
    params, normal = native.contiguous(params_MP), native.contiguous(normal_MA)
    if torch.is_grad_enabled() and params.requires_grad:
        out: tuple[Tensor, Tensor] = _SquashedHead.apply(params, bounds, normal)  # type: ignore[no-untyped-call]
        return out
    return _head(params, bounds, normal)
