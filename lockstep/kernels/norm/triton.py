"""Norms on a GPU: a row is one program, which sums it in one tree.

Legend: E model width.
"""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from lockstep.kernels.gpu import differentiable
from lockstep.kernels.norm import naive


@triton.jit
def _rms(x, residual, weight, total, y, eps, offset, width, HAS_RESIDUAL: tl.constexpr, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * width
    at = tl.arange(0, BLOCK)
    inside = at < width
    value = tl.load(x + start + at, mask=inside, other=0.0)
    if HAS_RESIDUAL:
        value += tl.load(residual + start + at, mask=inside, other=0.0)
        tl.store(total + start + at, value, mask=inside)
    inverse = 1.0 / tl.sqrt(tl.sum(value * value, 0) / width + eps)
    factor = tl.load(weight + at, mask=inside, other=0.0) + offset
    tl.store(y + start + at, value * inverse * factor, mask=inside)


@triton.jit
def _layer(x, weight, bias, y, eps, width, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * width
    at = tl.arange(0, BLOCK)
    inside = at < width
    value = tl.load(x + start + at, mask=inside, other=0.0)
    value = tl.where(inside, value - tl.sum(value, 0) / width, 0.0)
    value = value / tl.sqrt(tl.sum(value * value, 0) / width + eps)
    if HAS_WEIGHT:
        value *= tl.load(weight + at, mask=inside, other=0.0)
    if HAS_BIAS:
        value += tl.load(bias + at, mask=inside, other=0.0)
    tl.store(y + start + at, value, mask=inside)


def _run_rms(eps: float, offset: float, x: Tensor, residual: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
    x, weight = x.contiguous(), weight.contiguous()
    y, width = torch.empty_like(x), x.shape[-1]
    total = x if residual is None else torch.empty_like(x)
    beside = x if residual is None else residual.contiguous()
    if x.numel():
        block = triton.next_power_of_2(width)
        _rms[(x.numel() // width,)](x, beside, weight, total, y, eps, offset, width, residual is not None, BLOCK=block)
    return y, total


def rms_norm(x: Tensor, weight_E: Tensor, eps: float, offset: float) -> Tensor:
    """See `lockstep.kernels.rms_norm`."""

    def run(x: Tensor, weight: Tensor) -> Tensor:
        return _run_rms(eps, offset, x, None, weight)[0]

    out: Tensor = differentiable(run, partial(naive.rms_norm, eps=eps, offset=offset), (x, weight_E))
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight_E: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    """See `lockstep.kernels.add_rms_norm`."""
    reference = partial(naive.add_rms_norm, eps=eps, offset=offset)
    out: tuple[Tensor, Tensor] = differentiable(partial(_run_rms, eps, offset), reference, (x, residual, weight_E))
    return out


def layer_norm(x: Tensor, weight_E: Tensor | None, bias_E: Tensor | None, eps: float) -> Tensor:
    """See `lockstep.kernels.layer_norm`."""

    def run(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        x, width = x.contiguous(), x.shape[-1]
        y = torch.empty_like(x)
        if x.numel():
            parts = (x if part is None else part.contiguous() for part in (weight, bias))
            given = weight is not None, bias is not None
            _layer[(x.numel() // width,)](x, *parts, y, eps, width, *given, BLOCK=triton.next_power_of_2(width))
        return y

    out: Tensor = differentiable(run, partial(naive.layer_norm, eps=eps), (x, weight_E, bias_E))
    return out
