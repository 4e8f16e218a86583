"""Resize and its older form Upsample: one matrix of weights for each axis.

Legend: I input size of an axis, O output size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lockstep.core.errors import FormatError
from lockstep.models.graph.call import Call
from lockstep.models.graph.limits import check_size
from lockstep.models.graph.values import Host, Value, to_ints, to_tensor

Function = Callable[..., Any]


def to_floats(value: Value) -> list[float]:
    """Numbers of a Host or tensor."""
    return [float(x) for x in (value.items() if isinstance(value, Host) else value.reshape(-1).tolist())]


def is_given(value: Value) -> bool:
    """Whether an optional input is there and not empty."""
    return value is not None and (len(value.items()) if isinstance(value, Host) else value.numel()) > 0


def resize(call: Call, x: Value, roi: Value = None, scales: Value = None, sizes: Value = None) -> Tensor:
    x = to_tensor(x)
    if call.version < 11:
        scales, roi = roi, None
    axes = [a % x.ndim for a in call.get("axes", range(x.ndim))]
    mode, how = call.get("mode", "nearest"), call.get("coordinate_transformation_mode", "half_pixel")
    if call.version < 11:
        how = "asymmetric"
    inputs = [int(x.shape[a]) for a in axes]
    if is_given(sizes):
        outputs = to_ints(sizes)
        factors = [o / i for o, i in zip(outputs, inputs, strict=True)]
        policy = call.get("keep_aspect_ratio_policy", "stretch")
        if policy != "stretch":
            factor = (min if policy == "not_larger" else max)(factors)
            factors = [factor] * len(axes)
            outputs = [math.floor(i * factor + 0.5) for i in inputs]
    elif is_given(scales):
        factors = to_floats(scales)
        outputs = [math.floor(i * f) for i, f in zip(inputs, factors, strict=True)]
    else:
        raise FormatError("neither scales nor sizes", op=call.op)
    region = to_floats(roi) if is_given(roi) and how == "tf_crop_and_resize" else [0.0] * len(axes) + [1.0] * len(axes)
    check_size([*outputs, *(x.shape[a] for a in range(x.ndim) if a not in axes)])
    outside = torch.zeros((), dtype=torch.bool)
    dtype = x.dtype
    for place, axis in enumerate(axes):
        crop = (region[place], region[place + len(axes)])
        size, out, factor = inputs[place], outputs[place], factors[place]
        if size == out and factor == 1.0 and crop == (0.0, 1.0):
            continue
        at = coordinates(how, size, out, factor, crop)
        if how == "tf_crop_and_resize":
            beyond = (at < 0) | (at > size - 1)
            outside = outside | beyond.reshape(-1, *(1,) * (x.ndim - axis - 1))
        x = _resample(call, x, axis, at, size, factor, mode)
    if how == "tf_crop_and_resize":
        x = torch.where(outside, torch.full_like(x, call.get("extrapolation_value", 0.0)), x)
    return x if x.dtype == dtype else _back(x, dtype)


def _back(x: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype.is_floating_point:
        return x.to(dtype)
    info = torch.iinfo(dtype)
    return x.round().clamp(info.min, info.max).to(dtype)


def coordinates(how: str, size: int, out: int, scale: float, crop: tuple[float, float]) -> Tensor:
    """Places in the input of each output element, float64 [O]."""
    i = torch.arange(out, dtype=torch.float64)
    match how:
        case "half_pixel":
            return (i + 0.5) / scale - 0.5
        case "half_pixel_symmetric":
            adjusted = out / (size * scale)
            return size / 2 * (1 - adjusted) + (i + 0.5) / scale - 0.5
        case "pytorch_half_pixel":
            return (i + 0.5) / scale - 0.5 if out > 1 else torch.zeros(out, dtype=torch.float64)
        case "align_corners":
            return i * (size - 1) / (size * scale - 1) if out > 1 else torch.zeros(out, dtype=torch.float64)
        case "asymmetric":
            return i / scale
        case "tf_half_pixel_for_nn":
            return (i + 0.5) / scale
        case "tf_crop_and_resize":
            start, end = crop
            if out > 1:
                return start * (size - 1) + i * (end - start) * (size - 1) / (out - 1)
            return 0.5 * (start + end) * (size - 1) + torch.zeros(out, dtype=torch.float64)
    raise FormatError(f"unknown coordinate_transformation_mode {how!r}", op="Resize")


def _resample(call: Call, x: Tensor, axis: int, at: Tensor, size: int, scale: float, mode: str) -> Tensor:
    if mode == "nearest":
        rounding = call.get("nearest_mode", "round_prefer_floor") if call.version >= 11 else "floor"
        return x.index_select(axis, nearest(at, rounding).clamp(0, size - 1))
    if mode not in ("linear", "cubic"):
        raise FormatError(f"unknown mode {mode!r}", op=call.op)
    weights = matrix(call, at, size, scale, cubic=mode == "cubic")
    wide = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    return torch.movedim(torch.matmul(torch.movedim(wide, axis, -1), weights.T.to(wide.dtype)), -1, axis)


def nearest(at: Tensor, rounding: str) -> Tensor:
    """Whole places."""
    match rounding:
        case "round_prefer_floor":
            out = torch.ceil(at - 0.5)
        case "round_prefer_ceil":
            out = torch.floor(at + 0.5)
        case "floor":
            out = torch.floor(at)
        case "ceil":
            out = torch.ceil(at)
        case _:
            raise FormatError(f"unknown nearest_mode {rounding!r}", op="Resize")
    return out.to(torch.int64)


def matrix(call: Call, at: Tensor, size: int, scale: float, *, cubic: bool) -> Tensor:
    """Weights [O, I] of linear or cubic interpolation (Keys 1981), widened where it shrinks with antialiasing."""
    shrink = min(scale, 1.0) if call.get("antialias", 0) else 1.0
    reach = math.ceil((2 if cubic else 1) / shrink)
    first = torch.floor(at).to(torch.int64)
    taps = first.unsqueeze(1) + torch.arange(-reach + 1, reach + 1)
    distance = (at.unsqueeze(1) - taps) * shrink
    weights = _cubic(distance, call.get("cubic_coeff_a", -0.75)) if cubic else (1 - distance.abs()).clamp(min=0.0)
    if call.get("exclude_outside", 0):
        weights = torch.where((taps >= 0) & (taps < size), weights, torch.zeros_like(weights))
        weights = weights / weights.sum(1, keepdim=True)
    elif shrink < 1.0:
        weights = weights / weights.sum(1, keepdim=True)
    out = torch.zeros(len(at), size, dtype=torch.float64)
    return out.scatter_add(1, taps.clamp(0, size - 1), weights)


def _cubic(distance: Tensor, a: float) -> Tensor:
    d = distance.abs()
    near = (a + 2) * d**3 - (a + 3) * d**2 + 1
    far = a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
    return torch.where(d <= 1, near, torch.where(d < 2, far, torch.zeros_like(d)))


def upsample(call: Call, x: Value, scales: Value = None) -> Tensor:
    factors = list(call.need("scales")) if scales is None else to_floats(scales)
    inner = Call("Resize", {"mode": "linear" if "linear" in call.get("mode", "nearest") else "nearest"}, 10, 1)
    return resize(inner, x, Host(factors, torch.float32))


OPS: dict[str, Function] = {"Resize": resize, "Upsample": upsample}
