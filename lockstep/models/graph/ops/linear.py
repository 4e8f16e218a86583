"""Matrix products.

Legend: M rows, K inner, N columns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lockstep.models.graph.call import Call
from lockstep.models.graph.values import Value, to_tensor, to_tensors

Function = Callable[..., Any]


def product(x: Tensor, y: Tensor) -> Tensor:
    """Matrix product of any numeric type."""
    if x.dtype.is_floating_point:
        return torch.matmul(x, y)
    # Exact: the sums of 32-bit products that fit their type fit 64 bits.
    return torch.matmul(x.to(torch.int64), y.to(torch.int64)).to(x.dtype)


def matmul(call: Call, x: Value, y: Value) -> Tensor:
    x, y = to_tensors((x, y))
    return product(x, y)


def gemm(call: Call, a: Value, b: Value, c: Value = None) -> Tensor:
    a, b = to_tensors((a, b))
    alpha, beta = call.get("alpha", 1.0), call.get("beta", 1.0)
    if call.get("transA", 0):
        a = a.mT
    trans_b = call.get("transB", 0)
    bias = None if c is None else to_tensor(c, a.device)
    plain = alpha == 1.0 and beta == 1.0 and a.dtype.is_floating_point
    if plain and (bias is None or (bias.ndim == 1 and bias.shape[0] != 1)):
        return F.linear(a, b if trans_b else b.mT, bias)
    out = product(a, b.mT if trans_b else b)
    out = out if alpha == 1.0 else (alpha * out).to(out.dtype)
    if bias is None:
        return out
    return out + (bias if beta == 1.0 else (beta * bias).to(out.dtype))


OPS: dict[str, Function] = {"MatMul": matmul, "Gemm": gemm}
