"""Activations on a GPU, an element at a time.

Legend: T tokens, F feed-forward width.
"""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from lockstep.kernels.activation import naive
from lockstep.kernels.gpu import differentiable

_KINDS = {"silu": 0, "gelu_tanh": 1, "gelu": 2, "relu": 3}
_BLOCK = 1024


@triton.jit
def _value(x, KIND: tl.constexpr):
    if KIND == 0:
        y = x / (1.0 + tl.exp(-x))
    elif KIND == 1:
        # tanh(z) = 1 - 2 / (exp(2 z) + 1)
        z = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        y = 0.5 * x * (2.0 - 2.0 / (tl.exp(2.0 * z) + 1.0))
    elif KIND == 2:
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    else:
        y = tl.where(x < 0.0, 0.0, x)
    return y


@triton.jit
def _activate(x, y, num, KIND: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, _value(tl.load(x + at, mask=at < num, other=0.0), KIND), mask=at < num)


@triton.jit
def _gated(x, y, num, width, KIND: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < num
    place = at // width * 2 * width + at % width
    gate = _value(tl.load(x + place, mask=inside, other=0.0), KIND)
    tl.store(y + at, gate * tl.load(x + place + width, mask=inside, other=0.0), mask=inside)


def activate(x: Tensor, kind: str) -> Tensor:
    """See `lockstep.kernels.activate`."""

    def run(x: Tensor) -> Tensor:
        x = x.contiguous()
        y = torch.empty_like(x)
        if x.numel():
            _activate[(triton.cdiv(x.numel(), _BLOCK),)](x, y, x.numel(), KIND=_KINDS[kind], BLOCK=_BLOCK)
        return y

    out: Tensor = differentiable(run, partial(naive.activate, kind=kind), (x,))
    return out


def gated(gate_up: Tensor, kind: str) -> Tensor:
    """See `lockstep.kernels.gated`."""

    def run(x: Tensor) -> Tensor:
        x, width = x.contiguous(), x.shape[-1] // 2
        y = x.new_empty(*x.shape[:-1], width)
        if y.numel():
            _gated[(triton.cdiv(y.numel(), _BLOCK),)](x, y, y.numel(), width, KIND=_KINDS[kind], BLOCK=_BLOCK)
        return y

    out: Tensor = differentiable(run, partial(naive.gated, kind=kind), (gate_up,))
    return out
