"""Element types and how values move between them.

Types of 4 bits and less have no arithmetic in torch: their values are kept one a byte, in int8, uint8 or float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lockstep.core.errors import FormatError
from lockstep.models.graph.call import Call
from lockstep.models.graph.values import Value, to_tensor

Function = Callable[..., Any]

DTYPES: dict[int, torch.dtype] = {
    1: torch.float32,
    2: torch.uint8,
    3: torch.int8,
    4: torch.uint16,
    5: torch.int16,
    6: torch.int32,
    7: torch.int64,
    9: torch.bool,
    10: torch.float16,
    11: torch.float64,
    12: torch.uint32,
    13: torch.uint64,
    14: torch.complex64,
    15: torch.complex128,
    16: torch.bfloat16,
    17: torch.float8_e4m3fn,
    18: torch.float8_e4m3fnuz,
    19: torch.float8_e5m2,
    20: torch.float8_e5m2fnuz,
}
"""ONNX's number of an element type -> torch's."""
STRING = 8
SMALL = {21: (torch.uint8, 4), 22: (torch.int8, 4), 25: (torch.uint8, 2), 26: (torch.int8, 2)}
FLOAT4 = 23
FLOAT8 = (17, 18, 19, 20)

FLOAT8_MAX = {17: 448.0, 18: 240.0, 19: 57344.0, 20: 57344.0}
FLOAT4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def cast(call: Call, x: Value) -> Any:
    return cast_to(to_tensor(x), call.need("to"), saturate=bool(call.get("saturate", 1)))


def cast_like(call: Call, x: Value, like: Value) -> Any:
    like = to_tensor(like)
    to = call.get("like", 0)
    if to:
        return cast_to(to_tensor(x), to, saturate=bool(call.get("saturate", 1)))
    to = STRING if not isinstance(like, Tensor) else next(n for n, dtype in DTYPES.items() if dtype == like.dtype)
    return cast_to(to_tensor(x), to, saturate=bool(call.get("saturate", 1)))


def cast_to(x: Any, to: int, *, saturate: bool) -> Any:
    """`x` (a tensor, or an array of strings) in another element type."""
    if not isinstance(x, Tensor):
        return _from_text(x, to)
    if to == STRING:
        return _to_text(x)
    if to in SMALL:
        dtype, bits = SMALL[to]
        return _wrapped(x, dtype, bits)
    if to == FLOAT4:
        return _nearest_float4(x.to(torch.float32))
    if to not in DTYPES:
        raise FormatError(f"cast to the unknown element type {to}", op="Cast")
    if to in FLOAT8:
        return _to_float8(x.to(torch.float32), to, saturate)
    if x.dtype.is_floating_point and x.dtype.itemsize == 1:
        x = x.to(torch.float32)
    return x.to(DTYPES[to])


def _wrapped(x: Tensor, dtype: torch.dtype, bits: int) -> Tensor:
    """The low bits of an integer, signed or not."""
    if x.dtype.is_floating_point:
        x = x.to(torch.float32)
    low = x.to(torch.int64) & ((1 << bits) - 1)
    if dtype == torch.int8:
        low = torch.where(low >= 1 << (bits - 1), low - (1 << bits), low)
    return low.to(dtype)


def _nearest_float4(x: Tensor) -> Tensor:
    """Round to the nearest number of E2M1, ties to the even mantissa, beyond the largest to it."""
    values = torch.tensor(FLOAT4_VALUES, device=x.device)
    size = x.abs().clamp(max=6.0).nan_to_num(6.0)
    place = torch.searchsorted(values, size).clamp(1, 7)
    low, high = values[place - 1], values[place]
    middle = (low + high) / 2
    up = (size > middle) | ((size == middle) & (place % 2 == 0))
    return torch.copysign(torch.where(up, high, low), x)


def _to_float8(x: Tensor, to: int, saturate: bool) -> Tensor:
    dtype, top = DTYPES[to], FLOAT8_MAX[to]
    if saturate:
        return torch.where(x.isnan(), x, x.clamp(-top, top)).to(dtype)
    if to == 19:
        return x.to(dtype)
    # Half a unit in the last place above the largest number rounds to it, more is not a number.
    half = top * (1 + (2.0**-4 if to in (17, 18) else 2.0**-3))
    lost = (x.abs() > half) | ~x.isfinite()
    return torch.where(lost, torch.full_like(x, torch.nan), x.clamp(-top, top)).to(dtype)


def _from_text(x: np.ndarray, to: int) -> Any:
    if to == STRING:
        return x
    words = [str(word) for word in x.reshape(-1)]
    if to in (9,):
        return torch.tensor([word.lower() not in ("", "0", "false") for word in words]).reshape(x.shape)
    dtype = DTYPES[to]
    try:
        if dtype.is_floating_point:
            return torch.tensor([float(w) for w in words], dtype=torch.float64).to(dtype).reshape(x.shape)
        return torch.tensor([int(w) for w in words]).to(dtype).reshape(x.shape)
    except ValueError as error:
        raise FormatError(f"text that is no number: {error}", op="Cast") from error


def _to_text(x: Tensor) -> np.ndarray:
    """Numbers in the shortest form that reads back as the same."""
    if x.dtype in (torch.bfloat16, *(DTYPES[n] for n in FLOAT8)):
        x = x.to(torch.float32)
    array = x.detach().cpu().numpy()
    words = [_word(item) for item in array.reshape(-1)]
    return np.array(words, dtype=object).reshape(array.shape)


def _word(item: Any) -> str:
    if isinstance(item, np.floating):
        if np.isnan(item):
            return "NaN"
        if np.isinf(item):
            return "INF" if item > 0 else "-INF"
    return str(item)


def bit_cast(call: Call, x: Value) -> Tensor:
    return to_tensor(x).view(DTYPES[call.need("to")])


OPS: dict[str, Function] = {"BitCast": bit_cast, "Cast": cast, "CastLike": cast_like}
