"""Operations on images and boxes: padding, sampling at given places, regions, suppression.

Legend: N rows, C channels, H and W size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lockstep.core.errors import FormatError
from lockstep.models.graph.call import Call
from lockstep.models.graph.limits import check_size
from lockstep.models.graph.values import Value, to_ints, to_scalar, to_tensor, to_tensors

Function = Callable[..., Any]


def pad(call: Call, x: Value, pads: Value = None, value: Value = None, axes: Value = None) -> Tensor:
    x = to_tensor(x)
    wish = call.ints(pads, "pads")
    if wish is None:
        wish = list(call.need("paddings"))
    dims = list(range(x.ndim)) if axes is None else [a % x.ndim for a in to_ints(axes)]
    amounts = [[0, 0] for _ in range(x.ndim)]
    for i, dim in enumerate(dims):
        amounts[dim] = [wish[i], wish[i + len(dims)]]
    check_size([n + a + b for n, (a, b) in zip(x.shape, amounts, strict=True)])
    mode = call.get("mode", "constant")
    if mode == "constant":
        fill = call.get("value", 0) if value is None else to_scalar(value)
        order = [n for pair in reversed(amounts) for n in pair]
        if x.dtype == torch.bool:
            return F.pad(x.to(torch.uint8), order, value=int(bool(fill))).to(torch.bool)
        return F.pad(x, order, value=fill)
    for dim, (before, after) in enumerate(amounts):
        if before or after:
            x = x.index_select(dim, _border(x.shape[dim], before, after, mode, call).to(x.device))
    return x


def _border(size: Any, before: Any, after: Any, mode: str, call: Call) -> Tensor:
    """Where each element of a padded axis comes from."""
    place = torch.arange(-before, size + after)
    match mode:
        case "edge":
            return place.clamp(0, size - 1)
        case "wrap":
            return place % size
        case "reflect":
            if size == 1:
                return torch.zeros_like(place)
            period = 2 * (size - 1)
            place = place % period
            return torch.where(place >= size, period - place, place)
    raise FormatError(f"unknown mode {mode!r}", op=call.op)


def center_crop_pad(call: Call, x: Value, sizes: Value) -> Tensor:
    x = to_tensor(x)
    wish = to_ints(sizes)
    axes = [a % x.ndim for a in call.get("axes", range(x.ndim))]
    for axis, want in zip(axes, wish, strict=True):
        have = x.shape[axis]
        if have > want:
            x = x.narrow(axis, (have - want) // 2, want)
        elif have < want:
            before = (want - have) // 2
            order = [0, 0] * (x.ndim - axis - 1) + [before, want - have - before]
            x = F.pad(x, order)
    return x


def grid_sample(call: Call, x: Value, grid: Value) -> Tensor:
    x, grid = to_tensors((x, grid))
    mode = {"linear": "bilinear", "cubic": "bicubic"}.get(call.get("mode", "linear"), call.get("mode", "linear"))
    return F.grid_sample(
        x,
        grid.to(x.dtype),
        mode=mode,
        padding_mode=call.get("padding_mode", "zeros"),
        align_corners=bool(call.get("align_corners", 0)),
    )


def affine_grid(call: Call, theta: Value, sizes: Value) -> Tensor:
    return F.affine_grid(to_tensor(theta), to_ints(sizes), align_corners=bool(call.get("align_corners", 0)))


def roi_align(call: Call, x: Value, rois: Value, batch: Value) -> Tensor:
    """Averages (or maxima) of bilinear samples in a grid over each region (He et al. 2017)."""
    x, rois, batch = to_tensors((x, rois, batch))
    height, width = call.get("output_height", 1), call.get("output_width", 1)
    ratio, scale, how = call.get("sampling_ratio", 0), call.get("spatial_scale", 1.0), call.get("mode", "avg")
    half = call.get("coordinate_transformation_mode", "half_pixel" if call.version >= 16 else "output_half_pixel")
    shift = 0.5 if half == "half_pixel" else 0.0
    out = []
    for (left, top, right, bottom), row in zip((rois * scale - shift).tolist(), batch.tolist(), strict=True):
        h, w = bottom - top, right - left
        if not shift:
            h, w = max(h, 1.0), max(w, 1.0)
        ny, nx = ratio or max(-int(-h // height), 1), ratio or max(-int(-w // width), 1)
        y = top + (torch.arange(height * ny) + 0.5) * h / (height * ny)
        z = left + (torch.arange(width * nx) + 0.5) * w / (width * nx)
        samples = _sampled(x[int(row)], y, z, corners=how == "max")
        samples = samples.reshape(*samples.shape[:-2], height, ny, width, nx)
        out.append(samples.amax((0, 3, 5)) if how == "max" else samples.mean((2, 4)))
    return torch.stack(out) if out else x.new_zeros(0, x.shape[1], height, width)


def _sampled(image: Tensor, y: Tensor, z: Tensor, *, corners: bool) -> Tensor:
    """[C, H, W] at the grid of rows y and columns z, bilinear, zero more than one element outside. `corners`: the four weighted
    neighbours apart, in front."""
    height, width = image.shape[-2:]
    beyond = ((y < -1) | (y > height)).unsqueeze(1) | ((z < -1) | (z > width)).unsqueeze(0)
    y, z = y.clamp(0, height - 1), z.clamp(0, width - 1)
    y0, z0 = y.floor().long(), z.floor().long()
    y1, z1 = (y0 + 1).clamp(max=height - 1), (z0 + 1).clamp(max=width - 1)
    fy, fz = (y - y0).unsqueeze(1), (z - z0).unsqueeze(0)
    parts = [
        image[:, y0][:, :, z0] * ((1 - fy) * (1 - fz)),
        image[:, y0][:, :, z1] * ((1 - fy) * fz),
        image[:, y1][:, :, z0] * (fy * (1 - fz)),
        image[:, y1][:, :, z1] * (fy * fz),
    ]
    stacked = torch.stack(parts) * (~beyond)
    return stacked if corners else stacked.sum(0)


def max_roi_pool(call: Call, x: Value, rois: Value) -> Tensor:
    x, rois = to_tensors((x, rois))
    height, width = call.need("pooled_shape")
    scale = call.get("spatial_scale", 1.0)
    out = []
    for row, *corners in rois.tolist():
        left, top, right, bottom = (round(c * scale) for c in corners)
        region = x[int(row), :, top : bottom + 1, left : right + 1]
        out.append(F.adaptive_max_pool2d(region, (height, width)))
    return torch.stack(out)


def col2im(call: Call, x: Value, image: Value, block: Value) -> Tensor:
    """Sums of sliding blocks into an image of any number of axes."""
    x = to_tensor(x)
    sizes, kernel = to_ints(image), to_ints(block)
    rank = len(sizes)
    strides, dilations = call.get("strides", (1,) * rank), call.get("dilations", (1,) * rank)
    pads = call.get("pads", (0,) * (2 * rank))
    padded = [n + pads[i] + pads[rank + i] for i, n in enumerate(sizes)]
    counts = [(padded[i] - dilations[i] * (kernel[i] - 1) - 1) // strides[i] + 1 for i in range(rank)]
    n, c = x.shape[0], x.shape[1]
    for k in kernel:
        c //= k
    index = torch.zeros((), dtype=torch.int64)
    for i in range(rank):
        taps = torch.arange(kernel[i]).unsqueeze(1) * dilations[i] + torch.arange(counts[i]) * strides[i]
        shape = [1] * (2 * rank)
        shape[i], shape[rank + i] = taps.shape
        index = index * padded[i] + taps.reshape(shape)
    total = 1
    for size in padded:
        total *= size
    flat = x.new_zeros(n, c, total).index_add(2, index.reshape(-1), x.reshape(n, c, -1))
    out = flat.reshape(n, c, *padded)
    for i in range(rank):
        out = out.narrow(2 + i, pads[i], sizes[i])
    return out


def non_max_suppression(
    call: Call, boxes: Value, scores: Value, most: Value = None, overlap: Value = None, least: Value = None
) -> Tensor:
    """Indices [K, 3] of (row, class, box), best first within a class."""
    boxes, scores = to_tensors((boxes, scores))
    limit = 0 if most is None else int(to_scalar(most))
    threshold = 0.0 if overlap is None else float(to_scalar(overlap))
    floor = None if least is None else float(to_scalar(least))
    corners = _corners(boxes.to(torch.float64), bool(call.get("center_point_box", 0)))
    chosen = []
    for row in range(scores.shape[0]):
        for kind in range(scores.shape[1]):
            kept = _suppressed(corners[row], scores[row, kind], limit, threshold, floor)
            chosen += [(row, kind, box) for box in kept]
    return torch.tensor(chosen, dtype=torch.int64).reshape(-1, 3)


def _corners(boxes: Tensor, centred: bool) -> Tensor:
    """[..., 4] as least and largest corner."""
    if centred:
        middle, size = boxes[..., :2], boxes[..., 2:]
        return torch.cat([middle - size / 2, middle + size / 2], dim=-1)
    first, second = boxes[..., :2], boxes[..., 2:]
    return torch.cat([torch.minimum(first, second), torch.maximum(first, second)], dim=-1)


def _suppressed(boxes: Tensor, scores: Tensor, limit: int, threshold: float, floor: float | None) -> list[int]:
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    kept: list[int] = []
    for box in torch.argsort(scores, descending=True, stable=True).tolist():
        if len(kept) >= limit:
            break
        if floor is not None and float(scores[box]) <= floor:
            continue
        others = boxes[kept]
        low, high = torch.maximum(others[:, :2], boxes[box, :2]), torch.minimum(others[:, 2:], boxes[box, 2:])
        shared = (high - low).clamp(min=0).prod(1)
        union = areas[kept] + areas[box] - shared
        if not bool((shared / union > threshold).any()):
            kept.append(box)
    return kept


OPS: dict[str, Function] = {
    "AffineGrid": affine_grid,
    "CenterCropPad": center_crop_pad,
    "Col2Im": col2im,
    "GridSample": grid_sample,
    "MaxRoiPool": max_roi_pool,
    "NonMaxSuppression": non_max_suppression,
    "Pad": pad,
    "RoiAlign": roi_align,
}
