"""MXNet operators as functions of tensors. Each entry of `OPS` reads a node's attributes once, when the network is built.

Shapes of layers with weights stand in `layers.py`; here is everything that has none.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lockstep.core.errors import unknown_name
from lockstep.interop.mxnet.arrays import ARRAY_OPS, Function, Maker, axes_of
from lockstep.interop.mxnet.reader import Node


def _unary(function: Callable[[Tensor], Tensor]) -> Maker:
    return lambda node: function


def _binary(function: Callable[[Tensor, Tensor], Tensor]) -> Maker:
    return lambda node: lambda a, b: function(a, b)


def _compare(function: Callable[[Tensor, Tensor], Tensor]) -> Maker:
    return lambda node: lambda a, b: function(a, b).to(a.dtype)


def _scalar(function: Callable[[Tensor, float], Tensor]) -> Maker:
    def make(node: Node) -> Function:
        value = node.real("scalar", 0.0)
        return lambda a: function(a, value).to(a.dtype)

    return make


def _activation(node: Node) -> Function:
    kind = node.string("act_type", "")
    if kind not in _ACTIVATIONS:
        raise node.fail(unknown_name("act_type", kind, _ACTIVATIONS))
    return _ACTIVATIONS[kind]


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "softrelu": F.softplus,
    "softsign": F.softsign,
    "log_sigmoid": F.logsigmoid,
    "mish": F.mish,
}


def _softmax(log: bool) -> Maker:
    def make(node: Node) -> Function:
        axis, temperature = node.integer("axis", -1), node.real("temperature", 1.0)
        if node.flag("use_length", False):
            raise node.fail("use_length is not supported")
        node.string("dtype", "None")
        function = torch.log_softmax if log else torch.softmax
        return lambda x: function(x / temperature if temperature != 1 else x, axis)

    return make


def _softmax_of_rows(x: Tensor) -> Tensor:
    """Over all that a row holds. Plain rows keep their shape: what stands in front of the last softmax is a policy's logits."""
    return torch.softmax(x, 1) if x.ndim == 2 else torch.softmax(x.flatten(1), 1).reshape(x.shape)


def _softmax_activation(node: Node) -> Function:
    if node.string("mode", "instance") == "channel":
        return lambda x: torch.softmax(x, 1)
    return _softmax_of_rows


def _softmax_output(node: Node) -> Function:
    by_channel, keeps = node.flag("multi_output", False), node.flag("preserve_shape", False)
    if keeps:
        return lambda x, *label: torch.softmax(x, -1)
    if by_channel:
        return lambda x, *label: torch.softmax(x, 1)
    return lambda x, *label: _softmax_of_rows(x)


def _reduce(function: Callable[[Tensor, tuple[int, ...], bool], Tensor]) -> Maker:
    def make(node: Node) -> Function:
        axes, keeps, excludes = axes_of(node), node.flag("keepdims", False), node.flag("exclude", False)

        def reduce(x: Tensor) -> Tensor:
            dims = tuple(range(x.ndim)) if axes is None else tuple(axis % x.ndim for axis in axes)
            if excludes:
                dims = tuple(dim for dim in range(x.ndim) if dim not in dims)
            return function(x, dims, keeps)

        return reduce

    return make


def _product(x: Tensor, dims: tuple[int, ...], keeps: bool) -> Tensor:
    for dim in sorted(dims, reverse=True):
        x = x.prod(dim, keepdim=keeps)
    return x


def _norm(node: Node) -> Function:
    order, axes, keeps = node.integer("ord", 2), axes_of(node), node.flag("keepdims", False)
    return lambda x: torch.linalg.vector_norm(x, order, axes, keepdim=keeps)


def _argmax(sign: int) -> Maker:
    def make(node: Node) -> Function:
        axis = node.integer("axis", 0) if node.has("axis") else None
        keeps = node.flag("keepdims", False)
        return lambda x: (sign * x).argmax(axis, keepdim=keeps).to(x.dtype)

    return make


def _dot(node: Node) -> Function:
    left, right = node.flag("transpose_a", False), node.flag("transpose_b", False)
    node.string("forward_stype", "")

    def dot(a: Tensor, b: Tensor) -> Tensor:
        a = a.permute(*range(1, a.ndim), 0) if left and a.ndim > 1 else a
        b = b.permute(b.ndim - 1, *range(b.ndim - 1)) if right and b.ndim > 1 else b
        return torch.tensordot(a, b, dims=1)

    return dot


def _batch_dot(node: Node) -> Function:
    left, right = node.flag("transpose_a", False), node.flag("transpose_b", False)
    node.string("forward_stype", "")
    return lambda a, b: torch.bmm(a.mT if left else a, b.mT if right else b)


def _l2_normalization(node: Node) -> Function:
    eps, mode = node.real("eps", 1e-10), node.string("mode", "instance")
    if mode not in ("instance", "channel", "spatial"):
        raise node.fail(unknown_name("mode", mode, ("instance", "channel", "spatial")))

    def normalise(x: Tensor) -> Tensor:
        first = {"instance": 1, "channel": 1, "spatial": 2}[mode]
        dims = (1,) if mode == "channel" else tuple(range(first, x.ndim))
        return x / (x.square().sum(dims, keepdim=True) + eps).sqrt()

    return normalise


def _lrn(node: Node) -> Function:
    alpha, beta, knorm = node.real("alpha", 1e-4), node.real("beta", 0.75), node.real("knorm", 2.0)
    size = node.integer("nsize", 5)
    if size < 1 or size % 2 == 0:
        raise node.fail(f"nsize={size} must be odd")

    def normalise(x: Tensor) -> Tensor:
        padded = F.pad(x.square(), (0, 0, 0, 0, size // 2, size // 2))
        return x * (knorm + alpha / size * padded.unfold(1, size, 1).sum(-1)) ** -beta

    return normalise


def _clip(node: Node) -> Function:
    low, high = node.real("a_min", -math.inf), node.real("a_max", math.inf)
    return lambda x: x.clamp(low, high)


def _hard_sigmoid(node: Node) -> Function:
    alpha, beta = node.real("alpha", 0.2), node.real("beta", 0.5)
    return lambda x: (alpha * x + beta).clamp(0, 1)


def _smooth_l1(node: Node) -> Function:
    square = node.real("scalar", 1.0) ** 2
    return lambda x: torch.where(x.abs() > 1 / square, x.abs() - 0.5 / square, 0.5 * square * x.square())


def _regression(function: Callable[[Tensor], Tensor]) -> Maker:
    def make(node: Node) -> Function:
        return lambda x, *label: function(x)

    return make


def _sum_all(*parts: Tensor) -> Tensor:
    out = parts[0]
    for part in parts[1:]:
        out = out + part
    return out


def _added(node: Node) -> Function:
    node.integer("num_args", 0)
    return _sum_all


def _power(a: Any, b: Any) -> Tensor:
    out: Tensor = a**b
    return out


_SCALAR_OPS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "plus": lambda a, s: a + s,
    "minus": lambda a, s: a - s,
    "rminus": lambda a, s: s - a,
    "mul": lambda a, s: a * s,
    "div": lambda a, s: a / s,
    "rdiv": lambda a, s: s / a,
    "power": _power,
    "rpower": lambda a, s: s**a,
    "maximum": lambda a, s: a.clamp(min=s),
    "minimum": lambda a, s: a.clamp(max=s),
    "mod": lambda a, s: torch.remainder(a, s),
    "equal": lambda a, s: a == s,
    "not_equal": lambda a, s: a != s,
    "greater": lambda a, s: a > s,
    "greater_equal": lambda a, s: a >= s,
    "lesser": lambda a, s: a < s,
    "lesser_equal": lambda a, s: a <= s,
}
_BINARY_OPS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "power": torch.pow,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "mod": torch.remainder,
    "hypot": torch.hypot,
}
_COMPARISONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "equal": torch.eq,
    "not_equal": torch.ne,
    "greater": torch.gt,
    "greater_equal": torch.ge,
    "lesser": torch.lt,
    "lesser_equal": torch.le,
}
_UNARY_OPS: dict[str, Callable[[Tensor], Tensor]] = {
    **{
        name: getattr(torch, name) for name in ("abs", "exp", "log", "log2", "log10", "log1p", "expm1", "sqrt", "rsqrt")
    },
    **{
        name: getattr(torch, name)
        for name in ("square", "sign", "floor", "ceil", "trunc", "round", "reciprocal", "sin")
    },
    **{
        name: getattr(torch, name)
        for name in ("cos", "tan", "arcsin", "arccos", "arctan", "sinh", "cosh", "tanh", "erf")
    },
    **{name: getattr(torch, name) for name in ("arcsinh", "arccosh", "arctanh", "sigmoid", "relu", "erfinv")},
    "negative": torch.neg,
    "rint": torch.round,
    "fix": torch.trunc,
    "cbrt": lambda x: x.sign() * x.abs() ** (1 / 3),
    "softsign": F.softsign,
    "zeros_like": torch.zeros_like,
    "ones_like": torch.ones_like,
    "_copy": lambda x: x,
    "identity": lambda x: x,
    "BlockGrad": torch.detach,
    "stop_gradient": torch.detach,
    "Flatten": lambda x: x.flatten(1),
    "flatten": lambda x: x.flatten(1),
    "logical_not": lambda x: (x == 0).to(x.dtype),
}


def _make_loss(node: Node) -> Function:
    for name in ("grad_scale", "valid_thresh", "normalization"):
        node.string(name, "")
    return lambda x: x


OPS: dict[str, Maker] = {
    **ARRAY_OPS,
    **{name: _unary(function) for name, function in _UNARY_OPS.items()},
    **{f"_{name}_scalar": _scalar(function) for name, function in _SCALAR_OPS.items()},
    **{f"_{name.capitalize()}Scalar": _scalar(_SCALAR_OPS[name]) for name in ("plus", "minus", "mul", "div", "power")},
    **{"_RMinusScalar": _scalar(_SCALAR_OPS["rminus"]), "_RDivScalar": _scalar(_SCALAR_OPS["rdiv"])},
    **{f"broadcast_{name}": _binary(function) for name, function in _BINARY_OPS.items()},
    **{f"broadcast_{name}": _compare(function) for name, function in _COMPARISONS.items()},
    **{f"_{name}": _compare(function) for name, function in _COMPARISONS.items()},
    **{f"elemwise_{name}": _binary(_BINARY_OPS[name]) for name in ("add", "sub", "mul", "div")},
    **{f"_{name}": _binary(_BINARY_OPS[name]) for name in ("sub", "mul", "div", "mod", "power", "maximum", "minimum")},
    **{name: _binary(torch.add) for name in ("_plus", "_Plus", "_add", "_grad_add", "broadcast_plus")},
    **{name: _binary(torch.sub) for name in ("_minus", "_Minus", "broadcast_minus")},
    **{
        "_Mul": _binary(torch.mul),
        "_Div": _binary(torch.div),
        "_Power": _binary(torch.pow),
        "_hypot": _binary(torch.hypot),
    },
    **{"_Maximum": _binary(torch.maximum), "_Minimum": _binary(torch.minimum)},
    **dict.fromkeys(("add_n", "ElementWiseSum", "_sum"), _added),
    **{name: _reduce(lambda x, dims, keeps: x.sum(dims, keepdim=keeps)) for name in ("sum", "sum_axis")},
    **{name: _reduce(lambda x, dims, keeps: x.amax(dims, keepdim=keeps)) for name in ("max", "max_axis")},
    **{name: _reduce(lambda x, dims, keeps: x.amin(dims, keepdim=keeps)) for name in ("min", "min_axis")},
    **dict.fromkeys(("MakeLoss", "make_loss"), _make_loss),
    **dict.fromkeys(("SoftmaxOutput", "Softmax"), _softmax_output),
    **{name: _regression(lambda x: x) for name in ("LinearRegressionOutput", "MAERegressionOutput", "SVMOutput")},
    "Activation": _activation,
    "L2Normalization": _l2_normalization,
    "LRN": _lrn,
    "LogisticRegressionOutput": _regression(torch.sigmoid),
    "SoftmaxActivation": _softmax_activation,
    "argmax": _argmax(1),
    "argmin": _argmax(-1),
    "batch_dot": _batch_dot,
    "broadcast_like": lambda node: lambda x, like: x.expand(like.shape),
    "clip": _clip,
    "dot": _dot,
    "hard_sigmoid": _hard_sigmoid,
    "log_softmax": _softmax(log=True),
    "mean": _reduce(lambda x, dims, keeps: x.mean(dims, keepdim=keeps)),
    "norm": _norm,
    "prod": _reduce(_product),
    "smooth_l1": _smooth_l1,
    "softmax": _softmax(log=False),
    "where": lambda node: lambda condition, a, b: torch.where(condition != 0, a, b),
}
"""The operator's name -> what makes its function."""
LABELLED = (
    "SoftmaxOutput",
    "Softmax",
    "LinearRegressionOutput",
    "MAERegressionOutput",
    "SVMOutput",
    "LogisticRegressionOutput",
)
"""Heads whose second input is a label, of no use outside MXNet's own training."""
