"""Random numbers. Their stream is torch's own: an exported policy decides without them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lockstep.models.graph.call import Call
from lockstep.models.graph.limits import check_size
from lockstep.models.graph.ops.cast import DTYPES
from lockstep.models.graph.values import Value, to_tensor

Function = Callable[..., Any]


def _generator(call: Call) -> torch.Generator | None:
    seed = call.get("seed", None)
    return None if seed is None else torch.Generator().manual_seed(int(seed))


def _uniform(call: Call, shape: Any, dtype: torch.dtype) -> Tensor:
    check_size(shape)
    low, high = call.get("low", 0.0), call.get("high", 1.0)
    return (low + (high - low) * torch.rand(tuple(shape), generator=_generator(call))).to(dtype)


def _normal(call: Call, shape: Any, dtype: torch.dtype) -> Tensor:
    check_size(shape)
    return (call.get("mean", 0.0) + call.get("scale", 1.0) * torch.randn(tuple(shape), generator=_generator(call))).to(
        dtype
    )


def shaped(fn: Callable[..., Tensor]) -> Function:
    def run(call: Call) -> Tensor:
        return fn(call, call.need("shape"), DTYPES[call.get("dtype", 1)])

    return run


def like(fn: Callable[..., Tensor]) -> Function:
    def run(call: Call, x: Value) -> Tensor:
        x = to_tensor(x)
        return fn(call, x.shape, DTYPES.get(call.get("dtype", 0), x.dtype))

    return run


def bernoulli(call: Call, x: Value) -> Tensor:
    x = to_tensor(x)
    draw = torch.rand(x.shape, generator=_generator(call), dtype=torch.float64)
    return (draw < x).to(DTYPES.get(call.get("dtype", 0), x.dtype))


def multinomial(call: Call, x: Value) -> Tensor:
    x = to_tensor(x)
    num = call.get("sample_size", 1)
    check_size([x.shape[0], num])
    draws = torch.multinomial(torch.softmax(x, 1), num, replacement=True, generator=_generator(call))
    return draws.to(DTYPES[call.get("dtype", 6)])


OPS: dict[str, Function] = {
    "Bernoulli": bernoulli,
    "Multinomial": multinomial,
    "RandomNormal": shaped(_normal),
    "RandomNormalLike": like(_normal),
    "RandomUniform": shaped(_uniform),
    "RandomUniformLike": like(_uniform),
}
