"""Reductions over axes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lockstep.models.graph.call import Call
from lockstep.models.graph.values import Value, to_tensor

Function = Callable[..., Any]


def reduction(fn: Callable[[Tensor, tuple[int, ...], bool], Tensor]) -> Function:
    """An operation with axes as attribute (older opsets) or input, all of them where none are given."""

    def run(call: Call, x: Value, axes: Value = None) -> Tensor:
        x = to_tensor(x)
        dims = call.ints(axes, "axes")
        if not dims:
            if call.get("noop_with_empty_axes", 0):
                return fn(x.unsqueeze(0), (0,), False)
            dims = list(range(x.ndim))
        if x.ndim == 0:
            return fn(x.unsqueeze(0), (0,), False)
        return fn(x, tuple(dims), bool(call.get("keepdims", 1)))

    return run


def _prod(x: Tensor, dims: tuple[int, ...], keep: bool) -> Tensor:
    for dim in sorted((d % x.ndim for d in dims), reverse=True):
        x = torch.prod(x, dim, keepdim=keep)
    return x


def _sum(x: Tensor, dims: tuple[int, ...], keep: bool) -> Tensor:
    return x.sum(dims, keepdim=keep).to(x.dtype)


def _mean(x: Tensor, dims: tuple[int, ...], keep: bool) -> Tensor:
    if x.dtype.is_floating_point:
        return x.mean(dims, keepdim=keep)
    return torch.div(x.sum(dims, keepdim=keep), _count(x, dims), rounding_mode="trunc").to(x.dtype)


def _count(x: Tensor, dims: tuple[int, ...]) -> int:
    total = 1
    for dim in dims:
        total *= x.shape[dim]
    return total


def _extreme(fn: Callable[..., Tensor], empty: float) -> Callable[[Tensor, tuple[int, ...], bool], Tensor]:
    def run(x: Tensor, dims: tuple[int, ...], keep: bool) -> Tensor:
        if any(isinstance(x.shape[d], int) and x.shape[d] == 0 for d in dims):
            low = empty if x.dtype.is_floating_point else _limit(x.dtype, empty)
            shape = [1 if i in {d % x.ndim for d in dims} else n for i, n in enumerate(x.shape)]
            out = torch.full(shape, low, dtype=x.dtype)
            return out if keep else out.squeeze(tuple(d % x.ndim for d in dims))
        return fn(x, dims, keepdim=keep)

    return run


def _limit(dtype: torch.dtype, empty: float) -> int:
    if dtype == torch.bool:
        return int(empty > 0)
    info = torch.iinfo(dtype)
    return info.max if empty > 0 else info.min


def _log_sum_exp(x: Tensor, dims: tuple[int, ...], keep: bool) -> Tensor:
    if not x.dtype.is_floating_point:
        return torch.logsumexp(x.to(torch.float64), dims, keepdim=keep).to(x.dtype)
    return torch.logsumexp(x, dims, keepdim=keep)


def _log_sum(x: Tensor, dims: tuple[int, ...], keep: bool) -> Tensor:
    return torch.log(x.sum(dims, keepdim=keep)).to(x.dtype)


def _l1(x: Tensor, dims: tuple[int, ...], keep: bool) -> Tensor:
    return x.abs().sum(dims, keepdim=keep).to(x.dtype)


def _l2(x: Tensor, dims: tuple[int, ...], keep: bool) -> Tensor:
    return (
        (x * x)
        .sum(dims, keepdim=keep)
        .to(torch.float32 if not x.dtype.is_floating_point else x.dtype)
        .sqrt()
        .to(x.dtype)
    )


def _sum_square(x: Tensor, dims: tuple[int, ...], keep: bool) -> Tensor:
    return (x * x).sum(dims, keepdim=keep).to(x.dtype)


OPS: dict[str, Function] = {
    "ReduceL1": reduction(_l1),
    "ReduceL2": reduction(_l2),
    "ReduceLogSum": reduction(_log_sum),
    "ReduceLogSumExp": reduction(_log_sum_exp),
    "ReduceMax": reduction(_extreme(torch.amax, -torch.inf)),
    "ReduceMean": reduction(_mean),
    "ReduceMin": reduction(_extreme(torch.amin, torch.inf)),
    "ReduceProd": reduction(_prod),
    "ReduceSum": reduction(_sum),
    "ReduceSumSquare": reduction(_sum_square),
}
