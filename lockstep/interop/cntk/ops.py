"""CNTK's primitive operators as functions of `Value`s. Each entry of `OPS` reads a function's attributes once.

A static axis i of CNTK (0 runs fastest) is the tensor's dimension -(1 + i).

Legend: B rows of a batch, T time steps, S static dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lockstep.core.errors import InputError, unknown_name
from lockstep.interop.cntk.reader import BATCH_AXIS, Attributes, Axis, Function, Shape
from lockstep.interop.cntk.values import Value, align

Apply = Callable[[Sequence[Value], bool], Value]
Maker = Callable[[Function, Attributes], Apply]


def _map(function: Callable[[Tensor], Tensor]) -> Maker:
    def make(node: Function, attributes: Attributes) -> Apply:
        return lambda inputs, training: _with(inputs[0].dense(), function)

    return make


def _with(value: Value, function: Callable[[Tensor], Tensor]) -> Value:
    return replace(value, tensor=function(value.tensor))


def _zip(function: Callable[..., Tensor]) -> Maker:
    def make(node: Function, attributes: Attributes) -> Apply:
        def apply(inputs: Sequence[Value], training: bool) -> Value:
            tensors, num_dynamic, lengths = align(inputs)
            return Value(function(*tensors), num_dynamic, lengths)

        return apply

    return make


def _compare(function: Callable[[Tensor, Tensor], Tensor]) -> Maker:
    return _zip(lambda a, b: function(a, b).to(a.dtype))


def static_dim(node: Function, axis: Any, what: str = "axis") -> int:
    """The tensor dimension, counted from the back, of a static axis.

    Raises:
        FormatError: it is not a static axis.
    """
    if isinstance(axis, Axis) and not axis.is_dynamic and not axis.is_all_static and abs(axis.index) < 32:
        return axis.index
    raise node.fail(f"{what} {axis!r:.60} is not a static axis")


def _dim(index: int, value: Value) -> int:
    rank = len(value.static)
    if not -rank <= index < rank:
        raise InputError(f"static axis {index} of an operand with {rank} static dimensions", field="axis")
    return -(1 + index % rank)


def _times(node: Function, attributes: Attributes) -> Apply:
    num_out = attributes.get("outputRank", 1)
    mapped = attributes.get("inferInputRankToMap", -1)
    if not 0 <= num_out < 16 or mapped < -1:
        raise node.fail(
            f"outputRank={num_out}, inferInputRankToMap={mapped}: products over a sequence are not supported"
        )

    def apply(inputs: Sequence[Value], training: bool) -> Value:
        left, right = inputs[0].dense(), inputs[1]
        num_inner = len(left.static) - num_out
        if num_inner < 0 or num_inner > len(right.static):
            raise InputError(f"product of static shapes {left.static} and {right.static} with outputRank={num_out}")
        if left.num_dynamic == 0 and num_inner == 1 and (right.num_classes or right.tensor.layout != torch.strided):
            return _times_sparse(left, right)
        return product(left, right.dense(), num_inner)

    return apply


def _times_sparse(left: Value, right: Value) -> Value:
    """A row of the matrix for each index, or the weighted sum of rows for each sparse row."""
    table = left.tensor.flatten(1)
    if right.num_classes:
        out = F.embedding(right.tensor.long(), table)
    else:
        rows = _flat_rows(right.tensor) if right.num_dynamic == 2 else right.tensor
        out = torch.sparse.mm(rows, table).reshape(*right.tensor.shape[:-1], table.shape[1])
    return Value(out.reshape(*out.shape[:-1], *left.static[1:]), right.num_dynamic, right.lengths)


def _flat_rows(sparse: Tensor) -> Tensor:
    """A sparse [B, T, V] as [B * T, V]."""
    num_rows, num_steps, width = sparse.shape
    whole = sparse.coalesce()
    row, step, column = whole.indices()
    indices = torch.stack([row * num_steps + step, column])
    return torch.sparse_coo_tensor(indices, whole.values(), (num_rows * num_steps, width), check_invariants=True)


def product(left: Value, right: Value, num_inner: int) -> Value:
    """CNTK's `left times right` over the `num_inner` dimensions in the middle, on row-major tensors."""
    inner = math.prod(left.static[:num_inner])
    outs, rest = left.static[num_inner:], right.static[: len(right.static) - num_inner]
    a = right.tensor.reshape(*right.tensor.shape[: right.num_dynamic], math.prod(rest), inner)
    b = left.tensor.reshape(*left.tensor.shape[: left.num_dynamic], inner, math.prod(outs))
    num_dynamic = max(left.num_dynamic, right.num_dynamic)
    if left.num_dynamic == 1 and right.num_dynamic == 2:
        b = b[:, None]
    elif right.num_dynamic == 1 and left.num_dynamic == 2:
        a = a[:, None]
    out = torch.matmul(a, b)
    lengths = right.lengths if right.lengths is not None else left.lengths
    return Value(out.reshape(*out.shape[:num_dynamic], *rest, *outs), num_dynamic, lengths)


def _transpose_times(node: Function, attributes: Attributes) -> Apply:
    num_out = attributes.get("outputRank", 1)

    def apply(inputs: Sequence[Value], training: bool) -> Value:
        left = inputs[0].dense()
        if len(left.static) != 2 or num_out != 1:
            raise InputError(
                f"transposed product of static shapes {left.static}, outputRank={num_out}: a matrix is needed"
            )
        return product(_with(left, lambda x: x.mT), inputs[1].dense(), 1)

    return apply


def _slice(node: Function, attributes: Attributes) -> Apply:
    axes = attributes.get("axisVec", None) or [attributes.get("axis", None)]
    begins = attributes.get("beginIndexVec", None) or [attributes.get("beginIndex", 0)]
    ends = attributes.get("endIndexVec", None) or [attributes.get("endIndex", 0)]
    steps = attributes.get("sliceStridesVec", None) or [attributes.get("sliceStrides", 1)]
    numbers = (*begins, *ends, *steps)
    if not len(axes) == len(begins) == len(ends) or not all(isinstance(item, int) for item in numbers):
        raise node.fail("axes and bounds differ in number")
    steps = steps * len(axes) if len(steps) == 1 else steps
    if any(step < 1 for step in steps):
        raise node.fail(f"strides {steps}; only positive ones are supported")
    cuts = [
        (static_dim(node, axis), begin, end or None, step)
        for axis, begin, end, step in zip(axes, begins, ends, steps, strict=True)
    ]

    def apply(inputs: Sequence[Value], training: bool) -> Value:
        value = inputs[0].dense()
        for axis, begin, end, step in cuts:
            dim = _dim(axis, value)
            size = value.tensor.shape[dim]
            start, stop, _ = slice(begin, end).indices(size)
            picked = value.tensor.narrow(dim, start, max(stop - start, 0))
            if step > 1:
                picked = picked.index_select(dim, torch.arange(0, picked.shape[dim], step, device=picked.device))
            value = replace(value, tensor=picked)
        return value

    return apply


def _splice(node: Function, attributes: Attributes) -> Apply:
    axis = static_dim(node, attributes.get("axis", None))

    def apply(inputs: Sequence[Value], training: bool) -> Value:
        tensors, num_dynamic, lengths = align(inputs)
        rank = tensors[0].ndim - num_dynamic
        index = axis % rank if axis < 0 else axis
        if index >= rank:
            tensors = [
                x.reshape(*x.shape[:num_dynamic], *(1,) * (index + 1 - rank), *x.shape[num_dynamic:]) for x in tensors
            ]
        front = torch.broadcast_shapes(*(x.shape[:num_dynamic] for x in tensors))
        tensors = [x.expand(*front, *x.shape[num_dynamic:]) for x in tensors]
        return Value(torch.cat(tensors, -(1 + index)), num_dynamic, lengths)

    return apply


def _reshape(node: Function, attributes: Attributes) -> Apply:
    new_shape = attributes.get("newShape", Shape())
    begin, end = attributes.get("beginAxis", None), attributes.get("endAxis", None)
    first = begin.index if isinstance(begin, Axis) else 0
    last = end.index if isinstance(end, Axis) and not end.is_dynamic and abs(end.index) < 32 else None

    def apply(inputs: Sequence[Value], training: bool) -> Value:
        value = inputs[0].dense()
        dims = value.static[::-1]
        start = first if first >= 0 else len(dims) + first
        # Axis.end_static_axis() is written as an index past every real one, or left at zero with a begin of zero.
        stop = len(dims) if last is None or (last == 0 and start == 0) else last if last > 0 else len(dims) + last
        old = math.prod(dims[start:stop])
        fixed = math.prod(dim for dim in new_shape if dim > 0)
        middle = [dim if dim > 0 else old // max(fixed, 1) for dim in new_shape]
        shape = (*dims[:start], *middle, *dims[stop:])[::-1]
        return _with(value, lambda x: x.reshape(*x.shape[: value.num_dynamic], *shape))

    return apply


def _transpose_axes(node: Function, attributes: Attributes) -> Apply:
    first, second = (static_dim(node, attributes.get(name, None), name) for name in ("axis1", "axis2"))

    def apply(inputs: Sequence[Value], training: bool) -> Value:
        value = inputs[0].dense()
        return _with(value, lambda x: x.transpose(_dim(first, value), _dim(second, value)))

    return apply


_REDUCTIONS: dict[str, Callable[[Tensor, tuple[int, ...], bool], Tensor]] = {
    "Sum": lambda x, dims, keeps: x.sum(dims, keepdim=keeps),
    "Mean": lambda x, dims, keeps: x.mean(dims, keepdim=keeps),
    "Max": lambda x, dims, keeps: x.amax(dims, keepdim=keeps),
    "Min": lambda x, dims, keeps: x.amin(dims, keepdim=keeps),
    "LogSum": lambda x, dims, keeps: x.logsumexp(dims, keepdim=keeps),
}
_NEUTRAL = {"Sum": 0.0, "Mean": 0.0, "Max": -math.inf, "Min": math.inf, "LogSum": -math.inf}


def _reduce(node: Function, attributes: Attributes) -> Apply:
    axes = attributes.get("axisVec", None) or [attributes.get("axis", None)]
    kind, keeps = attributes.get("reductionOpName", "Sum"), attributes.get("reductionKeepDimensions", True)
    if kind in ("Argmax", "Argmin"):
        return _reduce_index(node, axes, kind == "Argmax", keeps)
    if kind not in _REDUCTIONS:
        raise node.fail(unknown_name("reduction", kind, [*_REDUCTIONS, "Argmax", "Argmin"]))
    reduce = _REDUCTIONS[kind]
    if not all(isinstance(axis, Axis) for axis in axes):
        raise node.fail("names no axis")
    if len(axes) == 1 and axes[0].is_dynamic:
        return _reduce_dynamic(node, axes[0], kind)
    whole = any(axis.is_all_static for axis in axes)
    indices = [] if whole else [static_dim(node, axis) for axis in axes]

    def apply(inputs: Sequence[Value], training: bool) -> Value:
        value = inputs[0].dense()
        rank = len(value.static)
        dims = tuple(-(1 + i) for i in range(rank)) if whole else tuple(_dim(index, value) for index in indices)
        return _with(value, lambda x: reduce(x, dims, keeps)) if dims else value

    return apply


def _reduce_index(node: Function, axes: list[Any], largest: bool, keeps: bool) -> Apply:
    if len(axes) != 1:
        raise node.fail(f"{len(axes)} axes; one was expected")
    axis = static_dim(node, axes[0])

    def apply(inputs: Sequence[Value], training: bool) -> Value:
        value = inputs[0].dense()
        dim = _dim(axis, value)
        return _with(value, lambda x: (x if largest else -x).argmax(dim, keepdim=keeps).to(x.dtype))

    return apply


def _reduce_dynamic(node: Function, axis: Axis, kind: str) -> Apply:
    if axis.name in (BATCH_AXIS, "AllAxes"):
        raise node.fail(f"a reduction over {axis.name} mixes the rows of a batch; it is not supported")

    def apply(inputs: Sequence[Value], training: bool) -> Value:
        value = inputs[0].dense()
        if value.num_dynamic != 2:
            raise InputError("a reduction over the sequence of an operand that has none", field="axis")
        mask, x = value.mask(), value.tensor
        if mask is not None:
            x = x.masked_fill(~mask.reshape(*mask.shape, *(1,) * (x.ndim - 2)), _NEUTRAL[kind])
        if kind == "Mean" and value.lengths is not None:
            counts = value.lengths.reshape(-1, *(1,) * (x.ndim - 2))
            return Value(x.sum(1) / counts, 1)
        return Value(_REDUCTIONS[kind](x, (1,), False), 1)

    return apply


def _softmax(log: bool) -> Maker:
    function = torch.log_softmax if log else torch.softmax

    def make(node: Function, attributes: Attributes) -> Apply:
        axis = attributes.get("axis", None)
        index = None if axis is None else static_dim(node, axis)

        def apply(inputs: Sequence[Value], training: bool) -> Value:
            value = inputs[0].dense()
            if index is not None:
                return _with(value, lambda x: function(x, _dim(index, value)))
            return _with(value, lambda x: function(x.flatten(value.num_dynamic), -1).reshape(x.shape))

        return apply

    return make


def _hardmax(x: Tensor) -> Tensor:
    return F.one_hot(x.argmax(-1), x.shape[-1]).to(x.dtype)


def _batch_norm(node: Function, attributes: Attributes) -> Apply:
    """Statistics are inputs 3 to 5 (mean, variance, count), which training changes in place."""
    spatial, eps = attributes.get("spatial", True), attributes.get("epsilon", 1e-5)
    horizon, blend = attributes.get("normalizationTimeConstant", 0.0), attributes.get("blendTimeConstant", 0.0)
    if blend not in (0.0, math.inf):
        raise node.fail(f"blendTimeConstant={blend}; only 0 (the batch's statistics) and infinity are supported")

    def apply(inputs: Sequence[Value], training: bool) -> Value:
        value = inputs[0].dense()
        scale, bias, mean, variance = (item.tensor.reshape(-1) for item in inputs[1:5])
        x, front = value.tensor, value.num_dynamic
        shape = (-1, *(1,) * (len(value.static) - 1)) if spatial else value.static
        if training and blend == 0.0:
            mask = value.mask()
            rows = x[mask] if mask is not None else x.flatten(0, front - 1) if front == 2 else x
            dims = (0, *range(2, rows.ndim)) if spatial else (0,)
            new_mean, new_variance = rows.mean(dims), rows.var(dims, correction=0)
            num, count = rows.shape[0], rows.numel() // new_mean.numel()
            with torch.no_grad():
                share = 1 - math.exp(-num / horizon) if horizon > 0 else 1.0
                unbiased = new_variance.reshape(-1) * (count / (count - 1) if count > 1 else 1.0)
                mean.lerp_(new_mean.reshape(-1), share)
                variance.lerp_(unbiased, share)
                if len(inputs) > 5:
                    inputs[5].tensor.add_(num)
            mean, variance = new_mean.reshape(-1), new_variance.reshape(-1)
        factor = scale * torch.rsqrt(variance + eps)
        return _with(value, lambda x: x * factor.reshape(shape) + (bias - mean * factor).reshape(shape))

    return apply


def _dropout(node: Function, attributes: Attributes) -> Apply:
    rate = attributes.get("dropoutRate", 0.0)
    if not 0 <= rate < 1:
        raise node.fail(f"dropoutRate={rate} must lie in [0, 1)")
    return lambda inputs, training: _with(inputs[0].dense(), lambda x: F.dropout(x, rate, training))


def _one_hot(node: Function, attributes: Attributes) -> Apply:
    num = attributes.get("numClass", 0)
    attributes.get("oneHotOutputSparse", False)
    axis = static_dim(node, attributes.get("onehotAxis", Axis(-1, "")))
    if not 0 < num < 1 << 24:
        raise node.fail(f"numClass={num}")

    def apply(inputs: Sequence[Value], training: bool) -> Value:
        value = inputs[0].dense()
        rank = len(value.static) + 1
        hot = F.one_hot(value.tensor.long(), num).to(value.tensor.dtype)
        return replace(value, tensor=hot.movedim(-1, -(1 + axis % rank)))

    return apply


def _clip(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return torch.minimum(torch.maximum(x, low), high)


def _cross_entropy(scores: Tensor, label: Tensor) -> Tensor:
    return -(label * torch.log_softmax(scores, -1)).sum(-1, keepdim=True)


def _classification_error(scores: Tensor, label: Tensor) -> Tensor:
    return (scores.argmax(-1, keepdim=True) != label.argmax(-1, keepdim=True)).to(scores.dtype)


def _reconcile(node: Function, attributes: Attributes) -> Apply:
    """The first operand repeated along the dynamic axes of the second."""

    def apply(inputs: Sequence[Value], training: bool) -> Value:
        value, like = inputs[0].dense(), inputs[1]
        front = tuple(like.tensor.shape[: like.num_dynamic])
        own = tuple(value.tensor.shape[: value.num_dynamic])
        own = (*own, *(1,) * (like.num_dynamic - len(own)))
        tensor = value.tensor.reshape(*own, *value.static).expand(*front, *value.static)
        return Value(tensor, like.num_dynamic, like.lengths)

    return apply


def _elu(node: Function, attributes: Attributes) -> Apply:
    alpha = attributes.get("alpha", 1.0)
    return lambda inputs, training: _with(
        inputs[0].dense(), lambda x: torch.where(x > 0, x, alpha * torch.expm1(x.clamp(max=0)))
    )


def _squeeze(node: Function, attributes: Attributes) -> Apply:
    axes = attributes.get("axisVec", None) or []
    indices = [static_dim(node, axis) for axis in axes]

    def apply(inputs: Sequence[Value], training: bool) -> Value:
        value = inputs[0].dense()
        first = value.num_dynamic - value.tensor.ndim
        dims = [_dim(index, value) for index in indices] or [
            dim for dim in range(first, 0) if value.tensor.shape[dim] == 1
        ]
        return _with(value, lambda x: x.squeeze(tuple(dims))) if dims else value

    return apply


OPS: dict[int, tuple[str, int, Maker]] = {
    0: ("Negate", 1, _map(torch.neg)),
    1: ("Sigmoid", 1, _map(torch.sigmoid)),
    2: ("Tanh", 1, _map(torch.tanh)),
    3: ("ReLU", 1, _map(F.relu)),
    4: ("Exp", 1, _map(torch.exp)),
    5: ("Log", 1, _map(torch.log)),
    6: ("Sqrt", 1, _map(torch.sqrt)),
    7: ("Floor", 1, _map(torch.floor)),
    8: ("Abs", 1, _map(torch.abs)),
    9: ("Reciprocal", 1, _map(torch.reciprocal)),
    10: ("Softmax", 1, _softmax(log=False)),
    11: ("Hardmax", 1, _map(_hardmax)),
    12: ("TransposeAxes", 1, _transpose_axes),
    14: ("Slice", 1, _slice),
    15: ("Dropout", 1, _dropout),
    16: ("Reshape", 1, _reshape),
    19: ("Plus", 2, _zip(torch.add)),
    20: ("Minus", 2, _zip(torch.sub)),
    21: ("ElementTimes", 2, _zip(torch.mul)),
    22: ("Equal", 2, _compare(torch.eq)),
    23: ("NotEqual", 2, _compare(torch.ne)),
    24: ("Less", 2, _compare(torch.lt)),
    25: ("LessEqual", 2, _compare(torch.le)),
    26: ("Greater", 2, _compare(torch.gt)),
    27: ("GreaterEqual", 2, _compare(torch.ge)),
    31: ("Times", 2, _times),
    32: ("TransposeTimes", 2, _transpose_times),
    34: ("SquaredError", 2, _zip(lambda a, b: (a - b).square().sum(-1, keepdim=True))),
    35: ("CrossEntropyWithSoftmax", 2, _zip(_cross_entropy)),
    36: ("ClassificationError", 2, _zip(_classification_error)),
    39: ("ReduceElements", 1, _reduce),
    40: ("BatchNormalization", 5, _batch_norm),
    41: ("Clip", 3, _zip(_clip)),
    42: ("Select", 3, _zip(lambda flag, a, b: torch.where(flag != 0, a, b))),
    43: ("Splice", 1, _splice),
    50: ("ReconcileDynamicAxis", 2, _reconcile),
    51: ("LogSoftmax", 1, _softmax(log=True)),
    52: ("LogPlus", 2, _zip(torch.logaddexp)),
    54: ("Sin", 1, _map(torch.sin)),
    55: ("Cos", 1, _map(torch.cos)),
    56: ("Pass", 1, _map(lambda x: x)),
    62: ("NoOp", 1, _map(lambda x: x)),
    64: ("StopGradient", 1, _map(torch.detach)),
    65: ("ELU", 1, _elu),
    68: ("OneHot", 1, _one_hot),
    69: ("Pow", 2, _zip(torch.pow)),
    75: ("StableSigmoid", 1, _map(torch.sigmoid)),
    77: ("Sinh", 1, _map(torch.sinh)),
    78: ("Cosh", 1, _map(torch.cosh)),
    81: ("Asin", 1, _map(torch.asin)),
    82: ("Acos", 1, _map(torch.acos)),
    85: ("Atanh", 1, _map(torch.atanh)),
    86: ("Asinh", 1, _map(torch.asinh)),
    88: ("Squeeze", 1, _squeeze),
    95: ("Tan", 1, _map(torch.tan)),
    96: ("Atan", 1, _map(torch.atan)),
}
"""The operator's number in the file -> (name, least number of inputs, what makes its function)."""
