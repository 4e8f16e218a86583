"""Layers without weights. Each entry of `OPS` reads a layer's parameters once and returns the function it computes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lockstep.interop.caffe.reader import LayerSpec

Function = Callable[..., Tensor | tuple[Tensor, ...]]
Shapes = Sequence[tuple[int, ...]]


class Op(nn.Module):
    """A pure function as a module."""

    def __init__(self, function: Function, kind: str) -> None:
        super().__init__()
        self.function = function
        self.kind = kind

    def forward(self, *bottoms: Tensor) -> Tensor | tuple[Tensor, ...]:
        """The function's value."""
        return self.function(*bottoms)

    def extra_repr(self) -> str:
        return self.kind


def axis_of(layer: LayerSpec, axis: int, num_dims: int) -> int:
    """An axis counted from the front; it may be given from the back."""
    if not -num_dims <= axis < num_dims:
        raise layer.fail(f"axis {axis} of an input with {num_dims} dimensions")
    return axis % num_dims


def _relu(layer: LayerSpec, shapes: Shapes) -> Function:
    slope = layer.param("relu_param").real("negative_slope", 0.0)
    return (lambda x: F.leaky_relu(x, slope)) if slope else F.relu


def _elu(layer: LayerSpec, shapes: Shapes) -> Function:
    alpha = layer.param("elu_param").real("alpha", 1.0)
    return lambda x: torch.where(x > 0, x, alpha * torch.expm1(x.clamp(max=0)))


def _power(layer: LayerSpec, shapes: Shapes) -> Function:
    param = layer.param("power_param")
    power, scale, shift = param.real("power", 1.0), param.real("scale", 1.0), param.real("shift", 0.0)
    return lambda x: (shift + scale * x) if power == 1 else (shift + scale * x) ** power


def _exp(layer: LayerSpec, shapes: Shapes) -> Function:
    param = layer.param("exp_param")
    base, scale, shift = param.real("base", -1.0), param.real("scale", 1.0), param.real("shift", 0.0)
    if base != -1 and base <= 0:
        raise layer.fail(f"base={base} must be positive, or -1 for e")
    rate = 1.0 if base == -1 else math.log(base)
    return lambda x: torch.exp(rate * (shift + scale * x))


def _log(layer: LayerSpec, shapes: Shapes) -> Function:
    param = layer.param("log_param")
    base, scale, shift = param.real("base", -1.0), param.real("scale", 1.0), param.real("shift", 0.0)
    if base != -1 and (base <= 0 or base == 1):
        raise layer.fail(f"base={base} must be positive and not 1, or -1 for e")
    rate = 1.0 if base == -1 else 1 / math.log(base)
    return lambda x: rate * torch.log(shift + scale * x)


def _threshold(layer: LayerSpec, shapes: Shapes) -> Function:
    threshold = layer.param("threshold_param").real("threshold", 0.0)
    return lambda x: (x > threshold).to(x.dtype)


def _clip(layer: LayerSpec, shapes: Shapes) -> Function:
    param = layer.param("clip_param")
    if "min" not in param or "max" not in param:
        raise layer.fail("clip_param needs min and max")
    low, high = param.real("min", 0.0), param.real("max", 0.0)
    return lambda x: x.clamp(low, high)


def _swish(layer: LayerSpec, shapes: Shapes) -> Function:
    beta = layer.param("swish_param").real("beta", 1.0)
    return lambda x: x * torch.sigmoid(beta * x)


def _eltwise(layer: LayerSpec, shapes: Shapes) -> Function:
    param = layer.param("eltwise_param")
    operation = param.enum("operation", ("PROD", "SUM", "MAX"), "SUM")
    coefficients = param.reals("coeff")
    if len(set(shapes)) != 1:
        raise layer.fail(f"inputs of shapes {list(shapes)}; equal ones were expected")
    if coefficients and (operation != "SUM" or len(coefficients) != len(shapes)):
        raise layer.fail(
            f"{len(coefficients)} coefficients for {len(shapes)} inputs of {operation}; SUM takes one for each"
        )
    weights = coefficients or [1.0] * len(shapes)

    def combine(*bottoms: Tensor) -> Tensor:
        out = bottoms[0] if weights[0] == 1 else weights[0] * bottoms[0]
        for weight, x in zip(weights[1:], bottoms[1:], strict=True):
            if operation == "SUM":
                out = torch.add(out, x, alpha=weight)
            else:
                out = out * x if operation == "PROD" else torch.maximum(out, x)
        return out

    return combine


def _concat(layer: LayerSpec, shapes: Shapes) -> Function:
    param = layer.param("concat_param")
    axis = axis_of(layer, param.integer("axis", param.integer("concat_dim", 1)), len(shapes[0]))
    return lambda *bottoms: torch.cat(bottoms, axis)


def _slice(layer: LayerSpec, shapes: Shapes) -> Function:
    param = layer.param("slice_param")
    axis = axis_of(layer, param.integer("axis", param.integer("slice_dim", 1)), len(shapes[0]))
    size, num = shapes[0][axis], len(layer.tops)
    points = param.integers("slice_point")
    if not points and size % num:
        raise layer.fail(f"{size} entries do not divide into {num} outputs; give slice_point")
    edges = [0, *(points or [size // num * part for part in range(1, num)]), size]
    if len(edges) != num + 1 or any(a >= b for a, b in itertools.pairwise(edges)):
        raise layer.fail(f"slice points {edges[1:-1]} do not cut {size} entries into {num} outputs")
    sizes = [b - a for a, b in itertools.pairwise(edges)]
    return lambda x: x.split(sizes, axis)


def _flatten(layer: LayerSpec, shapes: Shapes) -> Function:
    param = layer.param("flatten_param")
    start, end = (axis_of(layer, param.integer(*item), len(shapes[0])) for item in (("axis", 1), ("end_axis", -1)))
    if start > end:
        raise layer.fail(f"axis {start} lies behind end_axis {end}")
    return lambda x: x.flatten(start, end)


def _reshape(layer: LayerSpec, shapes: Shapes) -> Function:
    param = layer.param("reshape_param")
    num_dims = len(shapes[0])
    start = param.integer("axis", 0)
    start = start if start >= 0 else num_dims + start + 1
    num_axes = param.integer("num_axes", -1)
    end = num_dims if num_axes == -1 else start + num_axes
    dims = param.message("shape").integers("dim")
    if not 0 <= start <= end <= num_dims or dims.count(-1) > 1 or any(dim < -1 for dim in dims):
        raise layer.fail(f"shape {dims} in place of axes {start} to {end} of an input {shapes[0]}")
    if any(dim == 0 and start + index >= num_dims for index, dim in enumerate(dims)):
        raise layer.fail(f"shape {dims} copies a dimension that an input {shapes[0]} does not have")

    def reshape(x: Tensor) -> Tensor:
        middle = [x.shape[start + index] if dim == 0 else dim for index, dim in enumerate(dims)]
        return x.reshape(*x.shape[:start], *middle, *x.shape[end:])

    return reshape


def _permute(layer: LayerSpec, shapes: Shapes) -> Function:
    order = layer.param("permute_param").integers("order")
    order += [dim for dim in range(len(shapes[0])) if dim not in order]
    if sorted(order) != list(range(len(shapes[0]))):
        raise layer.fail(f"order {order} of an input {shapes[0]}")
    return lambda x: x.permute(order)


def _softmax(layer: LayerSpec, shapes: Shapes) -> Function:
    axis = axis_of(layer, layer.param("softmax_param").integer("axis", 1), len(shapes[0]))
    return lambda x: torch.softmax(x, axis)


def _reduction(layer: LayerSpec, shapes: Shapes) -> Function:
    param = layer.param("reduction_param")
    axis = axis_of(layer, param.integer("axis", 0), len(shapes[0]))
    coefficient = param.real("coeff", 1.0)
    operation = param.enum("operation", ("", "SUM", "ASUM", "SUMSQ", "MEAN"), "SUM")
    prepare: dict[str, Callable[[Tensor], Tensor]] = {"ASUM": torch.abs, "SUMSQ": torch.square}
    before = prepare.get(operation, lambda x: x)

    def reduce(x: Tensor) -> Tensor:
        rows = before(x).flatten(axis)
        return coefficient * (rows.mean(-1) if operation == "MEAN" else rows.sum(-1))

    return reduce


def _argmax(layer: LayerSpec, shapes: Shapes) -> Function:
    param = layer.param("argmax_param")
    k, gives_value = param.integer("top_k", 1), param.flag("out_max_val", False)
    if "axis" in param:
        axis = axis_of(layer, param.integer("axis", 0), len(shapes[0]))

        def along(x: Tensor) -> Tensor:
            values, indices = x.topk(k, axis)
            return values if gives_value else indices.to(x.dtype)

        return along

    def whole(x: Tensor) -> Tensor:
        values, indices = x.flatten(1).topk(k, 1)
        parts = [indices.to(x.dtype), values] if gives_value else [indices.to(x.dtype)]
        return torch.stack(parts, 1)

    return whole


def _crop(layer: LayerSpec, shapes: Shapes) -> Function:
    param = layer.param("crop_param")
    start = axis_of(layer, param.integer("axis", 2), len(shapes[0]))
    num = len(shapes[0]) - start
    offsets = param.integers("offset") or [0]
    offsets = offsets * num if len(offsets) == 1 else offsets
    if len(offsets) != num or len(shapes[1]) != len(shapes[0]):
        raise layer.fail(f"offsets {offsets} for an input {shapes[0]} cropped like {shapes[1]} from axis {start}")
    for dim, offset in enumerate(offsets, start):
        if offset < 0 or offset + shapes[1][dim] > shapes[0][dim]:
            raise layer.fail(f"offset {offset} and size {shapes[1][dim]} leave dimension {dim} of {shapes[0]}")

    def crop(x: Tensor, like: Tensor) -> Tensor:
        for dim, offset in enumerate(offsets, start):
            x = x.narrow(dim, offset, like.shape[dim])
        return x

    return crop


def _tile(layer: LayerSpec, shapes: Shapes) -> Function:
    param = layer.param("tile_param")
    axis, tiles = axis_of(layer, param.integer("axis", 1), len(shapes[0])), param.integer("tiles", 0)
    if tiles < 1:
        raise layer.fail("tiles must be at least 1")
    return lambda x: x.repeat(*(tiles if dim == axis else 1 for dim in range(x.ndim)))


def _mvn(layer: LayerSpec, shapes: Shapes) -> Function:
    param = layer.param("mvn_param")
    by_variance, eps = param.flag("normalize_variance", True), param.real("eps", 1e-9)
    first = 1 if param.flag("across_channels", False) else 2

    def normalise(x: Tensor) -> Tensor:
        dims = tuple(range(first, x.ndim))
        centred = x - x.mean(dims, keepdim=True)
        return centred / (centred.square().mean(dims, keepdim=True).sqrt() + eps) if by_variance else centred

    return normalise


def _lrn(layer: LayerSpec, shapes: Shapes) -> Function:
    param = layer.param("lrn_param")
    size, alpha, beta = param.integer("local_size", 5), param.real("alpha", 1.0), param.real("beta", 0.75)
    k = param.real("k", 1.0)
    if size < 1 or size % 2 == 0:
        raise layer.fail(f"local_size={size} must be odd")
    if len(shapes[0]) != 4:
        raise layer.fail(f"input of shape {shapes[0]}; four dimensions were expected")
    if param.enum("norm_region", ("ACROSS_CHANNELS", "WITHIN_CHANNEL"), "ACROSS_CHANNELS") == "WITHIN_CHANNEL":
        # Built by Caffe from its pooling and power layers: the mean over the window, and 1 whatever k says.
        return lambda x: x * (1 + alpha * F.avg_pool2d(x.square(), size, 1, size // 2)) ** -beta

    def across(x: Tensor) -> Tensor:
        padded = F.pad(x.square(), (0, 0, 0, 0, size // 2, size // 2))
        sums = padded.unfold(1, size, 1).sum(-1)
        return x * (k + alpha / size * sums) ** -beta

    return across


def _split(layer: LayerSpec, shapes: Shapes) -> Function:
    return lambda x: (x,) * len(layer.tops)


class Dropout(nn.Module):
    """Zeroes a share of the entries while training and scales the rest, so that nothing is to do otherwise."""

    def __init__(self, layer: LayerSpec) -> None:
        super().__init__()
        self.ratio = layer.param("dropout_param").real("dropout_ratio", 0.5)
        if not 0 <= self.ratio < 1:
            raise layer.fail(f"dropout_ratio={self.ratio} must lie in [0, 1)")

    def forward(self, x: Tensor) -> Tensor:
        """Same shape."""
        return F.dropout(x, self.ratio, self.training)


OPS: dict[str, Callable[[LayerSpec, Shapes], Function]] = {
    "AbsVal": lambda layer, shapes: torch.abs,
    "ArgMax": _argmax,
    "BNLL": lambda layer, shapes: F.softplus,
    "Clip": _clip,
    "Concat": _concat,
    "Crop": _crop,
    "ELU": _elu,
    "Eltwise": _eltwise,
    "Exp": _exp,
    "Flatten": _flatten,
    "LRN": _lrn,
    "Log": _log,
    "MVN": _mvn,
    "Permute": _permute,
    "Power": _power,
    "ReLU": _relu,
    "Reduction": _reduction,
    "Reshape": _reshape,
    "Sigmoid": lambda layer, shapes: torch.sigmoid,
    "Slice": _slice,
    "Softmax": _softmax,
    "Split": _split,
    "Swish": _swish,
    "TanH": lambda layer, shapes: torch.tanh,
    "Threshold": _threshold,
    "Tile": _tile,
}
"""The type's name in a `.prototxt` -> what makes its function."""
NUM_BOTTOMS = {"Concat": (1, None), "Eltwise": (2, None), "Crop": (2, 2)}
"""Least and most inputs where it is not one."""
