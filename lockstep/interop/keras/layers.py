"""Layers of Keras in the meaning of ONNX: each is a function of (lowering, configuration, inputs, datasets of its weights)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from lockstep.core.errors import FormatError
from lockstep.interop.keras.lowering import Lowering, Value
from lockstep.interop.keras.recurrent import GATES, recurrent

Config = dict[str, Any]
Layer = Callable[[Lowering, Config, list[Value], list[str]], Value]


def _dense(low: Lowering, config: Config, xs: list[Value], datasets: list[str]) -> Value:
    name, x = config["name"], low.last(xs[0])
    units = int(config["units"])
    kernel = low.stored(
        f"{name}.kernel", [_one(datasets, 0)], lambda arrays: _sized(arrays[0], units), lambda stored: [stored]
    )
    out = low.make.node("MatMul", [x, kernel])
    if config.get("use_bias", True):
        out = low.make.node("Add", [out, low.plain(f"{name}.bias", _one(datasets, 1))])
    return low.activation(Value(xs[0].rank, last=out), config.get("activation"))


def _one(datasets: list[str], index: int) -> str:
    if index >= len(datasets):
        raise FormatError(f"has {len(datasets)} arrays; one more was expected")
    return datasets[index]


def _sized(kernel: np.ndarray, units: int) -> np.ndarray:
    if kernel.ndim < 2 or kernel.shape[-1] != units:
        raise ValueError(f"{units} units in the configuration and a kernel {list(kernel.shape)} in the file")
    return kernel


def _window(config: Config, key: str) -> list[int]:
    value = config[key] if config.get(key) is not None else config["pool_size"]
    return [int(n) for n in value] if isinstance(value, list) else [int(value)] * 2


def _padding(config: Config) -> dict[str, Any]:
    word = config.get("padding", "valid")
    if word not in ("same", "valid"):
        raise FormatError(f"has the padding {word!r}, which has no form here")
    return {"auto_pad": "SAME_UPPER" if word == "same" else "VALID"}


def _check_layout(config: Config) -> None:
    if config.get("data_format") not in (None, "channels_last"):
        raise FormatError(f"has the layout {config['data_format']}; channels_last is read")


def _conv2d(low: Lowering, config: Config, xs: list[Value], datasets: list[str]) -> Value:
    _check_layout(config)
    name = config["name"]
    filters = int(config["filters"])
    kernel = low.stored(
        f"{name}.kernel",
        [_one(datasets, 0)],
        lambda arrays: np.ascontiguousarray(_sized(arrays[0], filters).transpose(3, 2, 0, 1)),
        lambda stored: [stored.transpose(2, 3, 1, 0)],
    )
    inputs = [low.first(xs[0]), kernel]
    if config.get("use_bias", True):
        inputs.append(low.plain(f"{name}.bias", _one(datasets, 1)))
    out = low.make.node(
        "Conv",
        inputs,
        strides=_window(config, "strides"),
        dilations=_window(config, "dilation_rate"),
        group=int(config.get("groups", 1)),
        **_padding(config),
    )
    return low.activation(Value(4, first=out), config.get("activation"))


def _pool(op: str) -> Layer:
    def lower(low: Lowering, config: Config, xs: list[Value], datasets: list[str]) -> Value:
        _check_layout(config)
        out = low.make.node(
            op,
            [low.first(xs[0])],
            kernel_shape=_window(config, "pool_size"),
            strides=_window(config, "strides"),
            **_padding(config),
        )
        return Value(4, first=out)

    return lower


def _global(op: str) -> Layer:
    def lower(low: Lowering, config: Config, xs: list[Value], datasets: list[str]) -> Value:
        keep = int(bool(config.get("keepdims")))
        axes = low.make.constant(list(range(1, xs[0].rank - 1)))
        out = low.make.node(op, [low.last(xs[0]), axes], keepdims=keep)
        return Value(xs[0].rank if keep else 2, last=out)

    return lower


def _flatten(low: Lowering, config: Config, xs: list[Value], datasets: list[str]) -> Value:
    return Value(2, last=low.make.node("Flatten", [low.last(xs[0])], axis=1))


def _reshape(low: Lowering, config: Config, xs: list[Value], datasets: list[str]) -> Value:
    target = [int(n) for n in config["target_shape"]]
    return Value(len(target) + 1, last=low.make.node("Reshape", [low.last(xs[0]), low.make.constant([0, *target])]))


def _batch_norm(low: Lowering, config: Config, xs: list[Value], datasets: list[str]) -> Value:
    axis = config.get("axis", -1)
    axis = axis[0] if isinstance(axis, list) else axis
    if axis not in (-1, xs[0].rank - 1):
        raise FormatError(f"normalises axis {axis}; the last is read")
    parts = [part for part, key in (("gamma", "scale"), ("beta", "center")) if config.get(key, True)]
    parts += ["moving_mean", "moving_variance"]
    names = {}
    for index, part in enumerate(parts):
        trainable = part in ("gamma", "beta")
        names[part] = low.plain(f"{config['name']}.{part}", _one(datasets, index), trainable=trainable)
    if "gamma" not in names or "beta" not in names:
        size = low.file.array(_one(datasets, len(parts) - 1)).shape
        for part, fill in (("gamma", 1.0), ("beta", 0.0)):
            names.setdefault(part, low.make.constant(np.full(size, fill), "float32"))
    inputs = [low.first(xs[0]), names["gamma"], names["beta"], names["moving_mean"], names["moving_variance"]]
    out = low.make.node("BatchNormalization", inputs, epsilon=float(config.get("epsilon", 1e-3)))
    return Value(xs[0].rank, first=out)


def _layer_norm(low: Lowering, config: Config, xs: list[Value], datasets: list[str]) -> Value:
    axis = config.get("axis", -1)
    axis = axis[0] if isinstance(axis, list) else axis
    if axis not in (-1, xs[0].rank - 1) or not config.get("scale", True):
        raise FormatError("normalises another axis than the last, or has no scale")
    inputs = [low.last(xs[0]), low.plain(f"{config['name']}.gamma", _one(datasets, 0))]
    if config.get("center", True):
        inputs.append(low.plain(f"{config['name']}.beta", _one(datasets, 1)))
    epsilon = float(config.get("epsilon", 1e-3))
    return Value(xs[0].rank, last=low.make.node("LayerNormalization", inputs, axis=-1, epsilon=epsilon))


def _merge(op: str) -> Layer:
    def lower(low: Lowering, config: Config, xs: list[Value], datasets: list[str]) -> Value:
        return Value(xs[0].rank, last=low.make.node(op, [low.last(x) for x in xs]))

    return lower


def _concatenate(low: Lowering, config: Config, xs: list[Value], datasets: list[str]) -> Value:
    axis = int(config.get("axis", -1))
    return Value(xs[0].rank, last=low.make.node("Concat", [low.last(x) for x in xs], axis=axis))


def _rescaling(low: Lowering, config: Config, xs: list[Value], datasets: list[str]) -> Value:
    scale, offset = float(config["scale"]), float(config.get("offset", 0.0))
    scaled = low.make.node("Mul", [low.last(xs[0]), low.make.constant(scale, "float32")])
    return Value(xs[0].rank, last=low.make.node("Add", [scaled, low.make.constant(offset, "float32")]))


def _embedding(low: Lowering, config: Config, xs: list[Value], datasets: list[str]) -> Value:
    table = low.plain(f"{config['name']}.embeddings", _one(datasets, 0))
    index = low.make.node("Cast", [low.last(xs[0])], to=7)
    return Value(xs[0].rank + 1, last=low.make.node("Gather", [table, index], axis=0))


def _same(low: Lowering, config: Config, xs: list[Value], datasets: list[str]) -> Value:
    return xs[0]


def _activation(low: Lowering, config: Config, xs: list[Value], datasets: list[str]) -> Value:
    return low.activation(xs[0], config["activation"])


def _leaky_relu(low: Lowering, config: Config, xs: list[Value], datasets: list[str]) -> Value:
    return low.like(
        xs[0],
        "LeakyRelu",
        alpha=float(config["negative_slope"] if "negative_slope" in config else config.get("alpha", 0.3)),
    )


def _relu(low: Lowering, config: Config, xs: list[Value], datasets: list[str]) -> Value:
    if config.get("negative_slope") or config.get("threshold"):
        raise FormatError("has a slope or threshold, which has no form here")
    return low.activation(xs[0], "relu6" if config.get("max_value") == 6.0 else "relu")


def _recurrent(kind: str) -> Layer:
    return lambda low, config, xs, datasets: recurrent(low, kind, config, xs[0], datasets, both=False)


def _bidirectional(low: Lowering, config: Config, xs: list[Value], datasets: list[str]) -> Value:
    inner = config["layer"]
    if inner["class_name"] not in GATES or config.get("merge_mode", "concat") != "concat":
        raise FormatError(f"of {inner['class_name']} merged by {config.get('merge_mode')}: not read")
    own = {**inner["config"], "name": config["name"]}
    return recurrent(low, inner["class_name"], own, xs[0], datasets, both=True)


def _time_distributed(low: Lowering, config: Config, xs: list[Value], datasets: list[str]) -> Value:
    inner = config["layer"]
    if inner["class_name"] not in ("Dense", "Activation"):
        raise FormatError(f"of {inner['class_name']}; Dense is read")
    return LAYERS[inner["class_name"]](low, {**inner["config"], "name": config["name"]}, xs, datasets)


LAYERS: dict[str, Layer] = {
    "Activation": _activation,
    "Add": _merge("Sum"),
    "Average": _merge("Mean"),
    "AveragePooling2D": _pool("AveragePool"),
    "BatchNormalization": _batch_norm,
    "Bidirectional": _bidirectional,
    "Concatenate": _concatenate,
    "Conv2D": _conv2d,
    "Dense": _dense,
    "Dropout": _same,
    "ELU": lambda low, config, xs, datasets: low.like(xs[0], "Elu", alpha=float(config.get("alpha", 1.0))),
    "Embedding": _embedding,
    "Flatten": _flatten,
    "GRU": _recurrent("GRU"),
    "GaussianDropout": _same,
    "GaussianNoise": _same,
    "GlobalAveragePooling2D": _global("ReduceMean"),
    "GlobalMaxPooling2D": _global("ReduceMax"),
    "LSTM": _recurrent("LSTM"),
    "LayerNormalization": _layer_norm,
    "LeakyReLU": _leaky_relu,
    "MaxPooling2D": _pool("MaxPool"),
    "Maximum": _merge("Max"),
    "Minimum": _merge("Min"),
    "Multiply": _merge("Mul"),
    "ReLU": _relu,
    "Rescaling": _rescaling,
    "Reshape": _reshape,
    "SimpleRNN": _recurrent("SimpleRNN"),
    "Softmax": lambda low, config, xs, datasets: low.activation(xs[0], "softmax"),
    "SpatialDropout2D": _same,
    "Subtract": _merge("Sub"),
    "TimeDistributed": _time_distributed,
}
"""Class -> what adds it. `Lambda` and layers of the user's are code, which is not executed."""

WEIGHTED = (
    "BatchNormalization",
    "Bidirectional",
    "Conv2D",
    "Dense",
    "Embedding",
    "GRU",
    "LSTM",
    "LayerNormalization",
    "SimpleRNN",
    "TimeDistributed",
)
"""Those that have weights."""
