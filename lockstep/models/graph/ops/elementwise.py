"""Operations that treat elements one by one: arithmetic, comparisons, logic, activations.

Sources: the operator's reference of ONNX (onnx.ai/onnx/operators).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lockstep.core.errors import FormatError
from lockstep.models.graph.call import Call
from lockstep.models.graph.values import Value, to_scalar, to_tensor, to_tensors

Function = Callable[..., Any]

WIDE = {torch.uint16: torch.int32, torch.uint32: torch.int64, torch.uint64: torch.int64}
"""Unsigned types that torch stores without arithmetic, and where their arithmetic happens."""


def unary(fn: Any) -> Function:
    """An operation of one tensor without attributes."""

    def run(call: Call, x: Value) -> Tensor:
        return fn(to_tensor(x))

    return run


def widened(fn: Any) -> Callable[..., Tensor]:
    """The function on operands whose type has arithmetic, its result in their type (booleans stay so)."""

    @functools.wraps(fn)
    def run(*xs: Tensor) -> Tensor:
        dtype = xs[0].dtype
        if dtype not in WIDE:
            return fn(*xs)
        out = fn(*(x.to(WIDE[x.dtype]) if x.dtype in WIDE else x for x in xs))
        return out if out.dtype == torch.bool else out.to(dtype)

    return run


def aligned(call: Call, x: Tensor, y: Tensor) -> Tensor:
    """Before opset 7 the second operand is aligned at `axis` of the first where `broadcast` is set."""
    axis = call.get("axis", None)
    if call.version >= 7 or axis is None or not call.get("broadcast", 0):
        return y
    return y.reshape(y.shape + (1,) * (x.ndim - axis % x.ndim - y.ndim))


def binary(fn: Any) -> Function:
    """An operation of two tensors with broadcasting."""
    safe = widened(fn)

    def run(call: Call, x: Value, y: Value) -> Tensor:
        x, y = to_tensors((x, y))
        return safe(x, aligned(call, x, y))

    return run


def variadic(fn: Any) -> Function:
    """An operation of one or more tensors, folded from the left."""
    safe = widened(fn)

    def run(call: Call, *xs: Value) -> Tensor:
        return functools.reduce(safe, to_tensors(xs))

    return run


def divide(x: Tensor, y: Tensor) -> Tensor:
    """Integers are divided towards zero."""
    return x / y if x.dtype.is_floating_point else torch.div(x, y, rounding_mode="trunc")


def power(call: Call, x: Value, y: Value) -> Tensor:
    x, y = to_tensors((x, y))
    if y.ndim == 0 and not y.dtype.is_floating_point and x.dtype.is_floating_point:
        y = y.to(x.dtype)
    if not x.dtype.is_floating_point and y.dtype.is_floating_point:
        return torch.pow(x.to(torch.float64), y).to(x.dtype)
    return torch.pow(x, aligned(call, x, y)).to(x.dtype)


def modulo(call: Call, x: Value, y: Value) -> Tensor:
    x, y = to_tensors((x, y))
    fn = torch.fmod if call.get("fmod", 0) else torch.remainder
    return widened(fn)(x, y)


def mean(call: Call, *xs: Value) -> Tensor:
    tensors = to_tensors(xs)
    return functools.reduce(torch.add, tensors) / len(tensors)


def shift(call: Call, x: Value, y: Value) -> Tensor:
    x, y = to_tensors((x, y))
    left = call.need("direction") == "LEFT"
    dtype = x.dtype
    wide = torch.int64
    if dtype == torch.uint64 and not left:
        # A logical shift of the bits of a signed number: the sign's copies are masked away.
        bits, by = x.view(torch.int64), y.to(wide)
        keep = torch.where(by == 0, torch.full_like(by, -1), (1 << (64 - by).clamp(max=63)) - 1)
        return ((bits >> by) & keep).view(torch.uint64)
    out = x.to(wide) << y.to(wide) if left else x.to(wide) >> y.to(wide)
    return out.to(dtype)


def bitwise_not(call: Call, x: Value) -> Tensor:
    return widened(torch.bitwise_not)(to_tensor(x))


def clip(call: Call, x: Value, low: Value = None, high: Value = None) -> Tensor:
    x = to_tensor(x)
    bounds = [call.get("min", None) if low is None else low, call.get("max", None) if high is None else high]
    low, high = (bound if bound is None or isinstance(bound, float) else to_scalar(bound) for bound in bounds)
    if low is None and high is None:
        return x
    if low is not None and high is not None and low > high:
        return torch.full_like(x, high)

    def bounded(t: Tensor) -> Tensor:
        return torch.clamp(t, min=low, max=high)

    return widened(bounded)(x)


def where(call: Call, condition: Value, x: Value, y: Value) -> Any:
    condition, x, y = to_tensors((condition, x, y))
    if not isinstance(x, Tensor):
        import numpy as np

        return np.where(condition.numpy(), x, y)
    return torch.where(condition.to(torch.bool), x, y)


def relu(x: Tensor) -> Tensor:
    return torch.relu(x)


def leaky_relu(call: Call, x: Value) -> Tensor:
    return F.leaky_relu(to_tensor(x), call.get("alpha", 0.01))


def elu(call: Call, x: Value) -> Tensor:
    return F.elu(to_tensor(x), call.get("alpha", 1.0))


def celu(call: Call, x: Value) -> Tensor:
    return F.celu(to_tensor(x), call.get("alpha", 1.0))


def selu(call: Call, x: Value) -> Tensor:
    x = to_tensor(x)
    alpha, gamma = call.get("alpha", 1.67326319217681884765625), call.get("gamma", 1.05070102214813232421875)
    return gamma * torch.where(x > 0, x, alpha * torch.expm1(torch.clamp(x, max=0.0)))


def gelu(call: Call, x: Value) -> Tensor:
    return F.gelu(to_tensor(x), approximate=call.get("approximate", "none"))


def hard_sigmoid(call: Call, x: Value) -> Tensor:
    return torch.clamp(call.get("alpha", 0.2) * to_tensor(x) + call.get("beta", 0.5), 0.0, 1.0)


def hard_swish(call: Call, x: Value) -> Tensor:
    x = to_tensor(x)
    return x * torch.clamp(x / 6.0 + 0.5, 0.0, 1.0)


def swish(call: Call, x: Value) -> Tensor:
    x = to_tensor(x)
    return x * torch.sigmoid(call.get("alpha", 1.0) * x)


def shrink(call: Call, x: Value) -> Tensor:
    x = to_tensor(x)
    bias, bound = call.get("bias", 0.0), call.get("lambd", 0.5)
    zero = torch.zeros_like(x)
    return torch.where(x < -bound, (x + bias).to(x.dtype), torch.where(x > bound, (x - bias).to(x.dtype), zero))


def thresholded_relu(call: Call, x: Value) -> Tensor:
    x = to_tensor(x)
    return torch.where(x > call.get("alpha", 1.0), x, torch.zeros_like(x))


def prelu(call: Call, x: Value, slope: Value) -> Tensor:
    x, slope = to_tensors((x, slope))
    if call.version < 7 and slope.ndim == 1 and x.ndim > 1 and slope.shape[0] > 1:
        slope = slope.reshape(-1, *(1,) * (x.ndim - 2))
    if not x.dtype.is_floating_point:
        return torch.where(x < 0, widened(torch.mul)(x, slope), x)
    return torch.relu(x) + slope * torch.clamp(x, max=0)


def scaled_tanh(call: Call, x: Value) -> Tensor:
    return call.get("alpha", 1.0) * torch.tanh(call.get("beta", 1.0) * to_tensor(x))


def affine(call: Call, x: Value) -> Tensor:
    return call.get("alpha", 1.0) * to_tensor(x) + call.get("beta", 0.0)


def is_inf(call: Call, x: Value) -> Tensor:
    x = to_tensor(x)
    out = torch.zeros(x.shape, dtype=torch.bool, device=x.device)
    if call.get("detect_positive", 1):
        out = out | (x == math.inf)
    if call.get("detect_negative", 1):
        out = out | (x == -math.inf)
    return out


def softmax(fn: Callable[..., Tensor]) -> Function:
    """Softmax and LogSoftmax: before opset 13 over all axes from `axis` on."""

    def run(call: Call, x: Value) -> Tensor:
        x = to_tensor(x)
        if call.version >= 13:
            return fn(x, dim=call.get("axis", -1))
        axis = call.get("axis", 1)
        axis = axis + x.ndim if axis < 0 else axis
        if axis == x.ndim - 1:
            return fn(x, dim=axis)
        return fn(x.flatten(axis), dim=axis).reshape(x.shape)

    return run


def hardmax(call: Call, x: Value) -> Tensor:
    x = to_tensor(x)
    axis = call.get("axis", -1 if call.version >= 13 else 1)
    axis = axis + x.ndim if axis < 0 else axis
    flat = x if call.version >= 13 else x.flatten(axis)
    best = flat.argmax(axis, keepdim=True)
    return torch.zeros_like(flat).scatter(axis, best, 1.0).reshape(x.shape)


def equal(call: Call, x: Value, y: Value) -> Any:
    x, y = to_tensors((x, y))
    if not isinstance(x, Tensor):
        return torch.from_numpy((x == y).astype(bool))
    return torch.eq(x, aligned(call, x, y))


def identity(call: Call, x: Value) -> Value:
    return x


def dropout(call: Call, x: Value, ratio: Value = None, training: Value = None) -> Any:
    """Inference only; in training mode with a ratio a graph asks for noise that has no place in a policy."""
    x = to_tensor(x)
    if training is not None and bool(to_scalar(training)):
        chance = 0.5 if ratio is None else float(to_scalar(ratio))
        if chance > 0.0:
            raise FormatError("training mode is not supported; export the network for inference", op=call.op)
    return x, torch.ones(x.shape, dtype=torch.bool if call.version >= 10 else x.dtype, device=x.device)


def cumulative(fn: Callable[..., Tensor], start: float) -> Function:
    """CumSum and CumProd along an axis, exclusive or in reverse."""

    def run(call: Call, x: Value, axis: Value) -> Tensor:
        x, dim = to_tensor(x), int(to_scalar(axis))
        reverse, exclusive = call.get("reverse", 0), call.get("exclusive", 0)
        x = x.flip(dim) if reverse else x
        out = fn(x, dim=dim).to(x.dtype)
        if exclusive:
            first = torch.full_like(out.narrow(dim, 0, 1), start)
            out = torch.cat([first, out.narrow(dim, 0, out.shape[dim] - 1)], dim=dim)
        return out.flip(dim) if reverse else out

    return run


OPS: dict[str, Function] = {
    **{
        name: unary(fn)
        for name, fn in {
            "Abs": widened(torch.abs),
            "Acos": torch.acos,
            "Acosh": torch.acosh,
            "Asin": torch.asin,
            "Asinh": torch.asinh,
            "Atan": torch.atan,
            "Atanh": torch.atanh,
            "Ceil": torch.ceil,
            "Cos": torch.cos,
            "Cosh": torch.cosh,
            "Erf": torch.erf,
            "Exp": torch.exp,
            "Floor": torch.floor,
            "IsNaN": torch.isnan,
            "Log": torch.log,
            "Mish": F.mish,
            "Neg": torch.neg,
            "Not": torch.logical_not,
            "Reciprocal": torch.reciprocal,
            "Relu": relu,
            "Round": torch.round,
            "Sigmoid": torch.sigmoid,
            "Sign": widened(torch.sign),
            "Sin": torch.sin,
            "Sinh": torch.sinh,
            "Softplus": F.softplus,
            "Softsign": F.softsign,
            "Sqrt": torch.sqrt,
            "Tan": torch.tan,
            "Tanh": torch.tanh,
        }.items()
    },
    **{
        name: binary(fn)
        for name, fn in {
            "Add": torch.add,
            "And": torch.logical_and,
            "BitwiseAnd": torch.bitwise_and,
            "BitwiseOr": torch.bitwise_or,
            "BitwiseXor": torch.bitwise_xor,
            "Div": divide,
            "Greater": torch.gt,
            "GreaterOrEqual": torch.ge,
            "Less": torch.lt,
            "LessOrEqual": torch.le,
            "Mul": torch.mul,
            "Or": torch.logical_or,
            "Sub": torch.sub,
            "Xor": torch.logical_xor,
        }.items()
    },
    "Affine": affine,
    "BitShift": shift,
    "BitwiseNot": bitwise_not,
    "Celu": celu,
    "Clip": clip,
    "CumProd": cumulative(torch.cumprod, 1.0),
    "CumSum": cumulative(torch.cumsum, 0.0),
    "Dropout": dropout,
    "Elu": elu,
    "Equal": equal,
    "Gelu": gelu,
    "HardSigmoid": hard_sigmoid,
    "HardSwish": hard_swish,
    "Hardmax": hardmax,
    "Identity": identity,
    "IsInf": is_inf,
    "LeakyRelu": leaky_relu,
    "LogSoftmax": softmax(torch.log_softmax),
    "Max": variadic(torch.maximum),
    "Mean": mean,
    "Min": variadic(torch.minimum),
    "Mod": modulo,
    "PRelu": prelu,
    "Pow": power,
    "ScaledTanh": scaled_tanh,
    "Selu": selu,
    "Shrink": shrink,
    "Softmax": softmax(torch.softmax),
    "Sum": variadic(torch.add),
    "Swish": swish,
    "ThresholdedRelu": thresholded_relu,
    "Where": where,
}
