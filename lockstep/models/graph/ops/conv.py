"""Convolutions.

Legend: N rows, C channels, M output channels, S spatial axes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lockstep.core.errors import FormatError
from lockstep.models.graph.call import Call
from lockstep.models.graph.ops.windows import padded, padding, symmetric
from lockstep.models.graph.values import Value, to_tensor, to_tensors

Function = Callable[..., Any]

CONV: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
TRANSPOSED: dict[int, Callable[..., Tensor]] = {
    1: F.conv_transpose1d,
    2: F.conv_transpose2d,
    3: F.conv_transpose3d,
}


def conv(call: Call, x: Value, weight: Value, bias: Value = None) -> Tensor:
    x, weight, bias = to_tensors((x, weight, bias))
    rank = spatial(call, x)
    kernel = list(weight.shape[2:])
    strides, dilations = list(call.get("strides", (1,) * rank)), list(call.get("dilations", (1,) * rank))
    pads = padding(call, list(x.shape[2:]), kernel, strides, dilations)
    same = symmetric(pads)
    if same is None:
        x, same = padded(x, pads, 0.0), [0] * rank
    return CONV[rank](x, weight, bias, strides, same, dilations, call.get("group", 1))


def spatial(call: Call, x: Tensor) -> int:
    """Number of spatial axes of [N, C, S...].

    Raises:
        FormatError: none that a convolution exists for.
    """
    rank = x.ndim - 2
    if rank not in CONV:
        raise FormatError(f"an input of rank {x.ndim}; expected 3, 4 or 5", op=call.op)
    return rank


def conv_transpose(call: Call, x: Value, weight: Value, bias: Value = None) -> Tensor:
    x, weight, bias = to_tensors((x, weight, bias))
    rank = spatial(call, x)
    kernel = list(weight.shape[2:])
    strides, dilations = list(call.get("strides", (1,) * rank)), list(call.get("dilations", (1,) * rank))
    extra = list(call.get("output_padding", (0,) * rank))
    full = [
        (int(n) - 1) * s + (k - 1) * d + 1 + e
        for n, s, k, d, e in zip(x.shape[2:], strides, kernel, dilations, extra, strict=True)
    ]
    pads = _transposed_pads(call, full, list(x.shape[2:]), strides)
    out = TRANSPOSED[rank](x, weight, bias, strides, 0, extra, call.get("group", 1), dilations)
    return padded(out, [-p for p in pads], 0.0)


def _transposed_pads(call: Call, full: list[int], sizes: list[Any], strides: list[int]) -> list[int]:
    """What is cut off the full result at each side."""
    rank = len(full)
    auto = call.get("auto_pad", "NOTSET")
    wish = call.get("output_shape", None)
    if wish is None and auto in ("NOTSET", "", "VALID"):
        return list(call.get("pads", (0,) * (2 * rank)))
    if wish is None:
        wish = [int(n) * s for n, s in zip(sizes, strides, strict=True)]
    wish = list(wish)[-rank:]
    total = [f - w for f, w in zip(full, wish, strict=True)]
    small = [t // 2 for t in total]
    large = [t - s for t, s in zip(total, small, strict=True)]
    return small + large if auto == "SAME_UPPER" else large + small


def conv_integer(call: Call, x: Value, weight: Value, x_zero: Value = None, weight_zero: Value = None) -> Tensor:
    x, weight = to_tensors((x, weight))
    x, weight = x.to(torch.float64), weight.to(torch.float64)
    if x_zero is not None:
        x = x - to_tensor(x_zero).to(torch.float64)
    if weight_zero is not None:
        zero = to_tensor(weight_zero).to(torch.float64)
        weight = weight - zero.reshape(-1, *(1,) * (weight.ndim - 1))
    return conv(call, x, weight).to(torch.int32)


def deform_conv(call: Call, x: Value, weight: Value, offset: Value, bias: Value = None, mask: Value = None) -> Tensor:
    """Deformable convolution in two dimensions (Dai et al. 2017, with the mask of Zhu et al. 2018): every tap is moved by its
    offset and sampled bilinearly."""
    x, weight, offset, bias, mask = to_tensors((x, weight, offset, bias, mask))
    kernel = list(call.get("kernel_shape", weight.shape[2:]))
    strides, dilations = list(call.get("strides", (1, 1))), list(call.get("dilations", (1, 1)))
    pads, groups, parts = list(call.get("pads", (0,) * 4)), call.get("group", 1), call.get("offset_group", 1)
    n, c = x.shape[:2]
    height, width = offset.shape[2:]
    taps = kernel[0] * kernel[1]
    offset = offset.reshape(n, parts, taps, 2, height, width)
    rows = torch.arange(height, dtype=x.dtype) * strides[0] - pads[0]
    columns = torch.arange(width, dtype=x.dtype) * strides[1] - pads[1]
    samples = []
    for tap in range(taps):
        y = rows.view(1, 1, -1, 1) + (tap // kernel[1]) * dilations[0] + offset[:, :, tap, 0]
        z = columns.view(1, 1, 1, -1) + (tap % kernel[1]) * dilations[1] + offset[:, :, tap, 1]
        value = _bilinear(x.reshape(n * parts, c // parts, *x.shape[2:]), y.flatten(0, 1), z.flatten(0, 1))
        if mask is not None:
            weightings = mask.reshape(n, parts, taps, height, width)[:, :, tap]
            value = value * weightings.reshape(n * parts, 1, height, width)
        samples.append(value.reshape(n, c, height, width))
    stacked = torch.stack(samples, dim=2).reshape(n, groups, c // groups, taps, height, width)
    kernels = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], taps)
    out = torch.einsum("ngcthw,gmct->ngmhw", stacked, kernels).reshape(n, -1, height, width)
    return out if bias is None else out + bias.view(-1, 1, 1)


def _bilinear(x: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """Values of [N, C, H, W] at fractional places [N, h, w], zero outside."""
    height, width = x.shape[2:]
    # grid_sample with align_corners maps -1..1 to the first and last element.
    grid = torch.stack([_unit(column, width), _unit(row, height)], dim=-1)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=True)


def _unit(place: Tensor, size: int) -> Tensor:
    # One element has no extent: any place but 0 must fall outside.
    return place * 2 / (size - 1) - 1 if size > 1 else place * 2


OPS: dict[str, Function] = {
    "Conv": conv,
    "ConvInteger": conv_integer,
    "ConvTranspose": conv_transpose,
    "DeformConv": deform_conv,
}
