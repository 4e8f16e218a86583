"""Operations of PaddlePaddle in the meaning of ONNX: each is a function of (lowering, operation) that adds nodes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from lockstep.core.errors import FormatError
from lockstep.interop.paddle.lowering import Lowering
from lockstep.interop.paddle.programs import Op, Value
from lockstep.interop.paddle.recurrent import lower_rnn
from lockstep.models.graph.limits import check_size

DTYPES = {2: "int32", 3: "int64", 4: "float16", 5: "float32", 6: "float64", 0: "bool", 20: "uint8", 21: "int8"}
# Element types of ONNX's Cast by name.
CAST = {
    "float32": 1,
    "uint8": 2,
    "int8": 3,
    "int32": 6,
    "int64": 7,
    "bool": 9,
    "float16": 10,
    "float64": 11,
    "bfloat16": 16,
}


def apply(low: Lowering, op: Op) -> None:
    """Add one operation.

    Raises:
        FormatError: it is not known, or of a variant that has no form here.
    """
    known = OPS.get(op.name)
    if known is None:
        raise FormatError("is not known here; convert the file with through='paddle2onnx'", op=op.name)
    try:
        results = known(low, op)
    except FormatError as error:
        raise FormatError(error.reason, op=error.op or op.name) from error
    for target, result in zip(op.outputs, results if isinstance(results, list) else [results], strict=False):
        if isinstance(target, list):
            low.names.update(zip(target, result, strict=True))
        elif isinstance(result, list):
            low.lists[target] = result
        elif target:
            low.names[target] = result


Lower = Callable[[Lowering, Op], Any]


def _plain(name: str, **keys: str) -> Lower:
    """An operation with one input and the same meaning; `keys`: attribute of ONNX = attribute of Paddle."""

    def lower(low: Lowering, op: Op) -> str:
        attributes = {
            ours: op.attributes[theirs] for ours, theirs in keys.items() if op.attributes.get(theirs) is not None
        }
        return low.make.node(name, [low.value(op.inputs[0])], **attributes)

    return lower


def _binary(name: str) -> Lower:
    def lower(low: Lowering, op: Op) -> str:
        x, y = low.value(op.inputs[0]), low.value(op.inputs[1])
        axis = op.attributes.get("axis", -1)
        if op.attributes.get("version") == 2 and axis != -1:
            # The second operand's dimensions lie at `axis` of the first's.
            trailing = low.rank(op.inputs[0]) - axis - low.rank(op.inputs[1])
            if trailing > 0:
                start = low.rank(op.inputs[1])
                y = low.make.node("Unsqueeze", [y, low.ints(range(start, start + trailing))])
        return low.make.node(name, [x, y])

    return lower


def _matmul(low: Lowering, op: Op) -> str:
    sides = []
    for index, key in enumerate(("transpose_x", "transpose_y")):
        side = low.value(op.inputs[index])
        if op.attributes.get(key):
            rank = low.rank(op.inputs[index])
            side = low.make.node("Transpose", [side], perm=[*range(rank - 2), rank - 1, rank - 2])
        sides.append(side)
    out = low.make.node("MatMul", sides)
    factor = op.attributes.get("alpha", 1.0)
    return out if factor in (1.0, None) else low.make.node("Mul", [out, low.make.constant(factor, "float32")])


def _mul(low: Lowering, op: Op) -> str:
    if op.attributes.get("x_num_col_dims", 1) != 1 or op.attributes.get("y_num_col_dims", 1) != 1:
        raise FormatError("flattens more than one dimension into rows")
    rows = low.make.node("Flatten", [low.value(op.inputs[0])], axis=1)
    return low.make.node("MatMul", [rows, low.value(op.inputs[1])])


def _pads(low: Lowering, op: Op, num: int) -> dict[str, Any]:
    word, pads = op.attributes.get("padding_algorithm", "EXPLICIT"), list(op.attributes.get("paddings", [0] * num))
    if word == "SAME":
        return {"auto_pad": "SAME_UPPER"}
    if word == "VALID":
        return {"pads": [0] * (2 * num)}
    if len(pads) == num:
        return {"pads": [*pads, *pads]}
    return {"pads": [*pads[0::2], *pads[1::2]]}


def _check_layout(op: Op) -> None:
    if op.attributes.get("data_format", "NCHW") not in ("NCHW", "NCL", "NC", "AnyLayout", "NCDHW"):
        raise FormatError(f"of the layout {op.attributes['data_format']}; NCHW is read")


def _conv(name: str, own_groups: bool = False) -> Lower:
    def lower(low: Lowering, op: Op) -> str:
        _check_layout(op)
        strides = list(op.attributes.get("strides", [1, 1]))
        inputs = [low.value(op.inputs[0]), low.value(op.inputs[1])]
        extra: dict[str, Any] = {}
        if name == "ConvTranspose" and any(op.attributes.get("output_padding") or []):
            extra["output_padding"] = list(op.attributes["output_padding"])
        return low.make.node(
            name,
            inputs,
            strides=strides,
            dilations=list(op.attributes.get("dilations", [1] * len(strides))),
            group=int(op.attributes.get("groups", 1)),
            **_pads(low, op, len(strides)),
            **extra,
        )

    return lower


def _pool(low: Lowering, op: Op) -> str:
    _check_layout(op)
    attributes = op.attributes
    kind, x = attributes.get("pooling_type", "max"), low.value(op.inputs[0])
    size = attributes.get("kernel_size")
    if size is None and len(op.inputs) > 1:
        size = _constant_ints(low, op.inputs[1])
    size = list(size or [])
    if attributes.get("global_pooling") or (attributes.get("adaptive") and all(n == 1 for n in size)):
        return low.make.node("GlobalMaxPool" if kind == "max" else "GlobalAveragePool", [x])
    if attributes.get("adaptive"):
        raise FormatError("adaptive pooling to more than one number has no form here")
    extra: dict[str, Any] = {} if kind == "max" else {"count_include_pad": int(not attributes.get("exclusive", True))}
    return low.make.node(
        "MaxPool" if kind == "max" else "AveragePool",
        [x],
        kernel_shape=size,
        strides=list(attributes.get("strides", size)),
        ceil_mode=int(bool(attributes.get("ceil_mode"))),
        **_pads(low, op, len(size)),
        **extra,
    )


def _constant_ints(low: Lowering, value: Value) -> list[int]:
    """Numbers of a constant that the program made."""
    found = low.numbers.get(low.value(value))
    if found is None:
        raise FormatError("takes a size that is computed")
    return found


def _batch_norm(low: Lowering, op: Op) -> str:
    _check_layout(op)
    x, mean, variance, scale, bias = (low.value(value) for value in op.inputs[:5])
    return low.make.node(
        "BatchNormalization", [x, scale, bias, mean, variance], epsilon=float(op.attributes.get("epsilon", 1e-5))
    )


def _layer_norm(low: Lowering, op: Op) -> str:
    x, scale, bias = (low.value(value) for value in op.inputs[:3])
    if not scale:
        raise FormatError("without a scale has no form here")
    axis = int(op.attributes.get("begin_norm_axis", 1))
    rank = low.rank(op.inputs[0])
    inputs = [x, scale, bias] if bias else [x, scale]
    if rank - axis > 1:
        # Paddle keeps scale and bias flat.
        sizes = low.ints(low.shapes[str(op.inputs[0])][axis:])
        inputs = [x, *(low.make.node("Reshape", [name, sizes]) for name in inputs[1:])]
    return low.make.node("LayerNormalization", inputs, axis=axis, epsilon=float(op.attributes.get("epsilon", 1e-5)))


def _group_norm(low: Lowering, op: Op) -> str:
    _check_layout(op)
    inputs = [low.value(value) for value in op.inputs[:3]]
    epsilon = float(op.attributes.get("epsilon", 1e-5))
    return low.make.node("GroupNormalization", inputs, num_groups=int(op.attributes["groups"]), epsilon=epsilon)


def _reshape(low: Lowering, op: Op) -> str:
    shape = low.ints(op.attributes["shape"]) if "shape" in op.attributes else low.value(op.inputs[1])
    return low.make.node("Reshape", [low.value(op.inputs[0]), shape])


def _flatten(low: Lowering, op: Op) -> str:
    x, rank = low.value(op.inputs[0]), low.rank(op.inputs[0])
    start, stop = (int(op.attributes[key]) % rank for key in ("start_axis", "stop_axis"))
    if start == 1 and stop == rank - 1:
        return low.make.node("Flatten", [x], axis=1)
    shape = low.shapes[str(op.inputs[0])]
    kept = [0] * start + [-1] + shape[stop + 1 :]
    if -1 in kept[start + 1 :]:
        raise FormatError("flattens before a free dimension")
    return low.make.node("Reshape", [x, low.ints(kept)])


def _axes(low: Lowering, op: Op) -> str:
    axes = op.attributes.get("axes", op.attributes.get("axis"))
    return low.value(op.inputs[1]) if axes is None else low.ints(axes if isinstance(axes, list) else [axes])


def _squeeze(name: str) -> Lower:
    return lambda low, op: low.make.node(name, [low.value(op.inputs[0]), _axes(low, op)])


def _reduce(name: str) -> Lower:
    def lower(low: Lowering, op: Op) -> str:
        keep = int(bool(op.attributes.get("keepdim")))
        axis = op.attributes.get("axis")
        inputs = [low.value(op.inputs[0])]
        if len(op.inputs) > 1 and op.inputs[1]:
            inputs.append(low.value(op.inputs[1]))
        elif axis is not None and axis != [] and not op.attributes.get("reduce_all"):
            inputs.append(low.ints(axis if isinstance(axis, list) else [axis]))
        return low.make.node(name, inputs, keepdims=keep)

    return lower


def _concat(low: Lowering, op: Op) -> str:
    axis = op.attributes.get("axis")
    if axis is None or (len(op.inputs) > 1 and op.inputs[1]):
        (axis,) = _constant_ints(low, op.inputs[1])
    return low.make.node("Concat", low.many(op.inputs[0]), axis=int(axis))


def _stack(low: Lowering, op: Op) -> str:
    axis = low.ints([op.attributes.get("axis", 0)])
    parts = [low.make.node("Unsqueeze", [part, axis]) for part in low.many(op.inputs[0])]
    return low.make.node("Concat", parts, axis=int(op.attributes.get("axis", 0)))


def _split(low: Lowering, op: Op) -> list[Any]:
    attributes = op.attributes
    if op.name == "split_with_num":
        (axis,) = _constant_ints(low, op.inputs[1])
        sizes = None
        num = int(attributes["num"])
    elif attributes.get("version") == 2:
        axis, sizes = int(attributes.get("axis", 0)), list(attributes.get("sections") or [])
        num = len(sizes) or int(attributes.get("num", 0))
    else:
        sizes, (axis,) = _constant_ints(low, op.inputs[1]), _constant_ints(low, op.inputs[2])
        num = len(sizes)
    if not 0 < num < 1024:
        raise FormatError(f"splits into {num}")
    outs = [low.make.fresh("split") for _ in range(num)]
    x = low.value(op.inputs[0])
    if sizes:
        low.make.node("Split", [x, low.ints(sizes)], outputs=outs, axis=int(axis))
    else:
        low.make.node("Split", [x], outputs=outs, axis=int(axis), num_outputs=num)
    return [outs]


def _builtin_split(low: Lowering, op: Op) -> list[Any]:
    return list(low.many(op.inputs[0]))


def _slice(low: Lowering, op: Op) -> str:
    attributes = op.attributes
    if attributes.get("version") == 2:
        starts, ends = low.ints(attributes["starts"]), low.ints(attributes["ends"])
    else:
        starts, ends = low.value(op.inputs[1]), low.value(op.inputs[2])
    out = low.make.node("Slice", [low.value(op.inputs[0]), starts, ends, low.ints(attributes["axes"])])
    dropped = attributes.get("decrease_axis") or []
    return low.make.node("Squeeze", [out, low.ints(dropped)]) if dropped else out


def _scale(low: Lowering, op: Op) -> str:
    make, x = low.make, low.value(op.inputs[0])
    factor = op.attributes.get("scale")
    scale = low.value(op.inputs[1]) if factor is None else make.constant(float(factor), "float32")
    bias = make.constant(float(op.attributes.get("bias", 0.0)), "float32")
    if op.attributes.get("bias_after_scale", True):
        return make.node("Add", [make.node("Mul", [x, scale]), bias])
    return make.node("Mul", [make.node("Add", [x, bias]), scale])


def _cast(low: Lowering, op: Op) -> str:
    word = op.attributes.get("dtype", DTYPES.get(op.attributes.get("out_dtype", -1), "?"))
    if word not in CAST:
        raise FormatError(f"casts to {word!r}")
    return low.make.node("Cast", [low.value(op.inputs[0])], to=CAST[word])


def _word(op: Op) -> str:
    dtype = op.attributes.get("dtype", 5)
    return DTYPES.get(dtype, "?") if isinstance(dtype, int) else str(dtype)


def _full(low: Lowering, op: Op) -> str:
    shape = [int(n) for n in op.attributes.get("shape", [])]
    check_size(shape)
    word, value = _word(op), float(op.attributes.get("value", 0.0))
    name = low.make.constant(np.full(shape, int(value) if word.startswith("int") else value), word)
    if word.startswith("int") and len(shape) <= 1:
        low.numbers[name] = [int(value)] * (shape[0] if shape else 1)
    return name


def _full_int_array(low: Lowering, op: Op) -> str:
    numbers = [int(n) for n in op.attributes["value"]]
    name = low.ints(numbers)
    low.numbers[name] = numbers
    return name


def _full_with_tensor(low: Lowering, op: Op) -> str:
    value = low.make.node("Cast", [low.value(op.inputs[0])], to=CAST.get(_word(op), 1))
    shape = low.value(op.inputs[1]) if len(op.inputs) > 1 else low.ints(op.attributes["shape"])
    return low.make.node("Expand", [value, shape])


def _dropout(low: Lowering, op: Op) -> list[Any]:
    x, mode = low.value(op.inputs[0]), op.attributes.get("mode", op.attributes.get("dropout_implementation"))
    if mode != "downscale_in_infer":
        return [x]
    rate = float(op.attributes.get("p", op.attributes.get("dropout_prob", 0.5)) or 0.0)
    return [low.make.node("Mul", [x, low.make.constant(1.0 - rate, "float32")])]


def _embedding(low: Lowering, op: Op) -> str:
    return low.make.node("Gather", [low.value(op.inputs[1]), low.value(op.inputs[0])], axis=0)


def _clip(low: Lowering, op: Op) -> str:
    bounds = [
        low.value(op.inputs[i])
        if len(op.inputs) > i and op.inputs[i]
        else low.make.constant(float(op.attributes[key]), "float32")
        for i, key in ((1, "min"), (2, "max"))
    ]
    return low.make.node("Clip", [low.value(op.inputs[0]), *bounds])


def _silu(low: Lowering, op: Op) -> str:
    x = low.value(op.inputs[0])
    return low.make.node("Mul", [x, low.make.node("Sigmoid", [x])])


def _relu6(low: Lowering, op: Op) -> str:
    bounds = [low.make.constant(bound, "float32") for bound in (0.0, 6.0)]
    return low.make.node("Clip", [low.value(op.inputs[0]), *bounds])


def _gelu(low: Lowering, op: Op) -> str:
    word = "tanh" if op.attributes.get("approximate") else "none"
    return low.make.node("Gelu", [low.value(op.inputs[0])], approximate=word)


def _square(low: Lowering, op: Op) -> str:
    return low.make.node("Mul", [low.value(op.inputs[0])] * 2)


def _rsqrt(low: Lowering, op: Op) -> str:
    return low.make.node("Reciprocal", [low.make.node("Sqrt", [low.value(op.inputs[0])])])


def _argmax(low: Lowering, op: Op) -> str:
    axis = op.attributes.get("axis")
    if axis is None:
        (axis,) = _constant_ints(low, op.inputs[1])
    keep = int(bool(op.attributes.get("keepdims", op.attributes.get("keepdim"))))
    return low.make.node("ArgMax", [low.value(op.inputs[0])], axis=int(axis), keepdims=keep)


def _same(low: Lowering, op: Op) -> str:
    return low.value(op.inputs[0])


OPS: dict[str, Lower] = {
    **{paddle: _plain(onnx) for paddle, onnx in {
        "abs": "Abs", "ceil": "Ceil", "cos": "Cos", "erf": "Erf", "exp": "Exp", "floor": "Floor", "log": "Log", "mish": "Mish",
        "reciprocal": "Reciprocal", "relu": "Relu", "round": "Round", "sigmoid": "Sigmoid", "sign": "Sign", "sin": "Sin",
        "softplus": "Softplus", "softsign": "Softsign", "sqrt": "Sqrt", "tanh": "Tanh", "hardswish": "HardSwish",
        "shape": "Shape", "shape64": "Shape", "logical_not": "Not",
    }.items()},
    **{paddle: _binary(onnx) for paddle, onnx in {
        "add": "Add", "subtract": "Sub", "multiply": "Mul", "divide": "Div", "maximum": "Max", "minimum": "Min",
        "elementwise_pow": "Pow", "greater_than": "Greater", "less_than": "Less", "equal": "Equal",
    }.items()},
    **{paddle: _reduce(onnx) for paddle, onnx in {
        "mean": "ReduceMean", "sum": "ReduceSum", "max": "ReduceMax", "min": "ReduceMin", "prod": "ReduceProd",
    }.items()},
    "argmax": _argmax,
    "assign": _same,
    "batch_norm": _batch_norm,
    "batch_norm_": _batch_norm,
    "builtin.combine": lambda low, op: [[low.value(value) for value in op.inputs]],
    "builtin.split": _builtin_split,
    "cast": _cast,
    "clip": _clip,
    "concat": _concat,
    "conv2d": _conv("Conv"),
    "conv2d_transpose": _conv("ConvTranspose"),
    "depthwise_conv2d": _conv("Conv"),
    "dropout": _dropout,
    "elu": _plain("Elu", alpha="alpha"),
    "embedding": _embedding,
    "expand": lambda low, op: low.make.node("Expand", [low.value(op.inputs[0]), low.value(op.inputs[1])]),
    "flatten": _flatten,
    "full": _full,
    "full_int_array": _full_int_array,
    "full_with_tensor": _full_with_tensor,
    "gelu": _gelu,
    "group_norm": _group_norm,
    "hardsigmoid": _plain("HardSigmoid", alpha="slope", beta="offset"),
    "layer_norm": _layer_norm,
    "leaky_relu": _plain("LeakyRelu", alpha="negative_slope"),
    "log_softmax": _plain("LogSoftmax", axis="axis"),
    "matmul": _matmul,
    "mul": _mul,
    "pool2d": _pool,
    "relu6": _relu6,
    "reshape": _reshape,
    "rnn": lower_rnn,
    "rsqrt": _rsqrt,
    "scale": _scale,
    "selu": _plain("Selu", alpha="alpha", gamma="scale"),
    "silu": _silu,
    "slice": _slice,
    "softmax": _plain("Softmax", axis="axis"),
    "split": _split,
    "split_with_num": _split,
    "square": _square,
    "squeeze": _squeeze("Squeeze"),
    "stack": _stack,
    "swish": _silu,
    "transpose": lambda low, op: low.make.node(
        "Transpose", [low.value(op.inputs[0])], perm=list(op.attributes.get("perm") or op.attributes["axis"])
    ),
    "unsqueeze": _squeeze("Unsqueeze"),
    "where": lambda low, op: low.make.node("Where", [low.value(value) for value in op.inputs[:3]]),
}  # fmt: skip
"""Operation of version 3 -> what adds it."""
