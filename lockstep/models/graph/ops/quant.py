"""Quantised numbers: to them, from them, and products of them.

Legend: scale s, zero point z: value = (q - z) * s.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lockstep.models.graph.call import Call
from lockstep.models.graph.ops.cast import DTYPES, FLOAT4, FLOAT8, SMALL, cast_to
from lockstep.models.graph.ops.conv import conv
from lockstep.models.graph.values import Value, to_tensor, to_tensors

Function = Callable[..., Any]

INTEGER_RANGE = {
    2: (0, 255),
    3: (-128, 127),
    4: (0, 65535),
    5: (-32768, 32767),
    21: (0, 15),
    22: (-8, 7),
    25: (0, 3),
    26: (-2, 1),
}


def broadcast(x: Tensor, parameter: Tensor, axis: int, block: int) -> Tensor:
    """A scale or zero point beside `x`: one for all, one for each index of `axis`, or one for each block along it."""
    if parameter.ndim == 0 or parameter.numel() == 1:
        return parameter.reshape(())
    axis = axis + x.ndim if axis < 0 else axis
    if block:
        return parameter.repeat_interleave(block, dim=axis).narrow(axis, 0, x.shape[axis])
    return parameter.reshape(-1, *(1,) * (x.ndim - axis - 1))


def quantise(x: Tensor, scale: Tensor, zero: Tensor | None, to: int, *, saturate: bool = True) -> Tensor:
    """round(x / s) + z, ties to even, in element type `to`."""
    scaled = x / scale
    if to in FLOAT8 or to == FLOAT4:
        shifted = scaled if zero is None else scaled + zero.to(scaled.dtype)
        return cast_to(shifted, to, saturate=saturate)
    low, high = INTEGER_RANGE[to]
    out = torch.round(scaled.to(torch.float32))
    out = out if zero is None else out + zero.to(torch.float32)
    dtype = SMALL[to][0] if to in SMALL else DTYPES[to]
    return out.clamp(low, high).to(torch.int32).to(dtype)


def quantize_linear(call: Call, x: Value, scale: Value, zero: Value = None) -> Tensor:
    x, scale, zero = to_tensors((x, scale, zero))
    axis, block = call.get("axis", 1), call.get("block_size", 0)
    to = call.get("output_dtype", 0) or call.get("like", 0)
    if not to:
        to = 2 if zero is None else number_of(zero)
    precision = call.get("precision", 0)
    x = x.to(DTYPES[precision] if precision else scale.dtype if scale.dtype.itemsize > 1 else x.dtype)
    zero = None if zero is None else broadcast(x, zero, axis, block)
    return quantise(x, broadcast(x, scale, axis, block).to(x.dtype), zero, to, saturate=bool(call.get("saturate", 1)))


def number_of(tensor: Tensor) -> int:
    """ONNX's number of a tensor's element type."""
    return next(number for number, dtype in DTYPES.items() if dtype == tensor.dtype)


def dequantize_linear(call: Call, x: Value, scale: Value, zero: Value = None) -> Tensor:
    x, scale, zero = to_tensors((x, scale, zero))
    axis, block = call.get("axis", 1), call.get("block_size", 0)
    factor = broadcast(x, scale, axis, block)
    wide = x.to(torch.float32)
    if zero is not None:
        wide = wide - broadcast(x, zero, axis, block).to(torch.float32)
    to = call.get("output_dtype", 0)
    out = wide * factor.to(torch.float32)
    return out.to(DTYPES[to] if to else factor.dtype)


def dynamic_quantize_linear(call: Call, x: Value) -> tuple[Tensor, Tensor, Tensor]:
    x = to_tensor(x)
    low, high = x.amin().clamp(max=0.0), x.amax().clamp(min=0.0)
    scale = (high - low) / 255
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    zero = torch.round((0.0 - low / scale).clamp(0, 255))
    y = (torch.round(x / scale) + zero).clamp(0, 255)
    return y.to(torch.uint8), scale, zero.to(torch.uint8)


def matmul_integer(call: Call, a: Value, b: Value, a_zero: Value = None, b_zero: Value = None) -> Tensor:
    return _product(a, b, a_zero, b_zero).to(torch.int32)


def _product(a: Value, b: Value, a_zero: Value, b_zero: Value) -> Tensor:
    """Exact product of shifted integers, int64."""
    a, b, a_zero, b_zero = (None if x is None else to_tensor(x).to(torch.int64) for x in (a, b, a_zero, b_zero))
    if a_zero is not None:
        # One zero point for each row.
        a = a - (a_zero.unsqueeze(-1) if a_zero.ndim == 1 and a_zero.shape[0] > 1 else a_zero)
    if b_zero is not None:
        b = b - b_zero
    return torch.matmul(a, b)


def qlinear_matmul(
    call: Call, a: Value, sa: Value, za: Value, b: Value, sb: Value, zb: Value, sy: Value, zy: Value
) -> Tensor:
    sa, sb, sy, zy = to_tensors((sa, sb, sy, zy))
    total = _product(a, b, za, zb).to(torch.float32)
    sa = sa.unsqueeze(-1) if sa.ndim == 1 and sa.shape[0] > 1 else sa
    factor = (sa * sb / sy).to(torch.float32)
    return quantise(total * factor, torch.ones(()), zy, number_of(zy))


def qlinear_conv(
    call: Call, x: Value, sx: Value, zx: Value, w: Value, sw: Value, zw: Value, sy: Value, zy: Value, bias: Value = None
) -> Tensor:
    x, sx, zx, w, sw, zw, sy, zy, bias = to_tensors((x, sx, zx, w, sw, zw, sy, zy, bias))
    wide = x.to(torch.float64) - zx.to(torch.float64)
    shape = (-1, *(1,) * (w.ndim - 1))
    weight = w.to(torch.float64) - (zw.reshape(shape) if zw.ndim else zw).to(torch.float64)
    total = conv(call, wide, weight, None if bias is None else bias.to(torch.float64))
    factor = (sx * sw / sy).to(torch.float64)
    factor = factor.reshape(-1, *(1,) * (total.ndim - 2)) if factor.ndim else factor
    return quantise((total * factor).to(torch.float32), torch.ones(()), zy, number_of(zy))


OPS: dict[str, Function] = {
    "DequantizeLinear": dequantize_linear,
    "DynamicQuantizeLinear": dynamic_quantize_linear,
    "MatMulInteger": matmul_integer,
    "QLinearConv": qlinear_conv,
    "QLinearMatMul": qlinear_matmul,
    "QuantizeLinear": quantize_linear,
}
