"""PyTorch's own operators as operations of a graph, for networks that were traced rather than translated.

An operation `aten.NAME.OVERLOAD` holds its call in the attribute `call`: JSON of [arguments, named arguments], where
{"$input": n} stands for the n-th input, {"$dtype": "float32"} for a dtype. Only the names listed here are run: a folder from
a stranger calls nothing else.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import torch

from lockstep.core.errors import FormatError
from lockstep.models.graph.call import Call
from lockstep.models.graph.limits import check_size
from lockstep.models.graph.values import Value, to_tensor

NAMES = """
linear conv1d conv2d.default conv2d.padding conv3d conv_transpose1d conv_transpose2d.input conv_transpose3d.input
max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d embedding layer_norm group_norm instance_norm
relu leaky_relu prelu elu selu gelu mish softplus sigmoid tanh softmax.int log_softmax.int log_sigmoid
abs neg exp expm1 log log1p log2 log10 sqrt rsqrt square reciprocal floor ceil trunc round sign sin cos tan asin acos atan
sinh cosh asinh acosh atanh erf pow.Tensor_Scalar pow.Tensor_Tensor pow.Scalar logaddexp hypot
add.Tensor sub.Tensor mul.Tensor div.Tensor remainder.Tensor remainder.Scalar rsub.Scalar maximum minimum clamp
clamp_min clamp_max where.self where.ScalarOther where.ScalarSelf where.Scalar masked_fill.Scalar
eq.Tensor ne.Tensor lt.Tensor le.Tensor gt.Tensor ge.Tensor eq.Scalar ne.Scalar lt.Scalar le.Scalar gt.Scalar ge.Scalar
bitwise_not logical_not flatten.using_ints unflatten.int reshape view permute transpose.int t movedim.int swapaxes mT numpy_T
expand unsqueeze squeeze squeeze.dim squeeze.dims cat stack split.Tensor split_with_sizes chunk unbind.int narrow slice.Tensor
select.int index_select gather one_hot argmax argmin topk flip unfold repeat tile repeat_interleave.self_int pad
constant_pad_nd sum sum.dim_IntList mean mean.dim amax amin prod.dim_int logsumexp linalg_vector_norm matmul mm bmm
tensordot full zeros ones scalar_tensor zeros_like ones_like full_like new_ones new_zeros new_full arange arange.start
arange.start_step lstm.input gru.input rnn_tanh.input rnn_relu.input dropout contiguous clone detach alias
batch_norm addmm convolution _native_batch_norm_legit_no_training native_layer_norm _softmax _log_softmax hardtanh relu6
hardswish hardsigmoid adaptive_avg_pool1d adaptive_avg_pool2d celu glu rms_norm scaled_dot_product_attention max.dim min.dim
max.other min.other mul.Scalar add.Scalar sub.Scalar div.Scalar where.self clip cumsum minimum atan2 einsum index.Tensor
to.dtype to.dtype_layout to.device _to_copy type_as lift_fresh_copy detach_ sym_size.int
""".split()  # noqa: SIM905
CREATES = ("full", "zeros", "ones", "new_ones", "new_zeros", "new_full", "expand", "repeat", "tile")
"""Operators that make a tensor of a size among their arguments."""
INTEGERS: dict[str, Callable[..., Any]] = {
    "lockstep.IntegerAdd": lambda a, b: a + b,
    "lockstep.IntegerSub": lambda a, b: a - b,
    "lockstep.IntegerMul": lambda a, b: a * b,
    "lockstep.IntegerFloorDiv": lambda a, b: a // b,
    "lockstep.IntegerMod": lambda a, b: a % b,
    "lockstep.IntegerMax": max,
    "lockstep.IntegerMin": min,
}
"""Arithmetic on sizes."""


def operation(name: str) -> str:
    """The operation's full name: `linear` is `aten.linear.default`."""
    return f"aten.{name}" if "." in name else f"aten.{name}.default"


def _run(call: Call, *inputs: Value) -> Value:
    packet, overload = call.op.split(".")[1:]
    arguments, named = _decode(json.loads(call.need("call")), [to_tensor(value) for value in inputs])
    if packet in CREATES:
        sizes = [item for item in (*arguments, *named.values()) if isinstance(item, list)]
        check_size([abs(n) if not isinstance(n, torch.SymInt) else n for n in (sizes[0] if sizes else [])])
    if packet == "arange" and not all(
        math.isfinite(n) and abs(n) < 1 << 27 for n in arguments if not isinstance(n, torch.SymInt)
    ):
        raise FormatError(f"a range of {arguments}", op=call.op)
    device = next((value.device for value in inputs if isinstance(value, torch.Tensor)), None)
    if "device" in named:
        named["device"] = device
    # Not by `__getattr__`, which puts a new operator in the place of the registered one, without its Python kernels.
    out = getattr(getattr(torch.ops.aten, packet), overload)(*arguments, **named)
    return tuple(out) if isinstance(out, list) else out


def _integer(call: Call, *inputs: Value) -> Value:
    arguments, _ = _decode(json.loads(call.need("call")), list(inputs))
    return INTEGERS[call.op](*arguments)


def _decode(value: Any, inputs: list[Value]) -> Any:
    if isinstance(value, list):
        return [_decode(item, inputs) for item in value]
    if not isinstance(value, dict):
        return value
    if "$input" in value:
        return inputs[value["$input"]]
    if "$dtype" in value:
        return torch.__dict__[value["$dtype"]]
    if "$skip" in value:
        return None
    return {key: _decode(item, inputs) for key, item in value.items()}


OPS = {**{operation(name): _run for name in NAMES}, **dict.fromkeys(INTEGERS, _integer)}
