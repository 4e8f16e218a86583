"""Networks that are known by their weights alone: layers one after another, told by names and shapes.

A file of weights says neither the activation nor what is joined where; a template (Stable-Baselines3, CleanRL, TF-Agents) or
the caller does.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from lockstep.core.errors import FormatError, unknown_name
from lockstep.models.graph.builder import GraphBuilder

ACTIVATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "relu": ("Relu", {}),
    "tanh": ("Tanh", {}),
    "sigmoid": ("Sigmoid", {}),
    "elu": ("Elu", {}),
    "selu": ("Selu", {}),
    "gelu": ("Gelu", {}),
    "silu": ("Silu", {}),
    "swish": ("Silu", {}),
    "leaky_relu": ("LeakyRelu", {"alpha": 0.01}),
    "softplus": ("Softplus", {}),
    "mish": ("Mish", {}),
    "hard_sigmoid": ("HardSigmoid", {"alpha": 1 / 6}),
    "softsign": ("Softsign", {}),
    "exp": ("Exp", {}),
    "none": ("", {}),
    "linear": ("", {}),
}
"""Word -> operation and its attributes."""

NATURE_STRIDES = {8: 4, 4: 2, 3: 1}
"""Stride by kernel size, of the convolutions of Mnih et al. 2015, which every template with images uses."""


@dataclass
class Layer:
    """A dense layer [out, in] or a convolution [out, in, h, w], with its bias and a LayerNorm behind it."""

    name: str
    weight: torch.Tensor
    bias: torch.Tensor | None = None
    norm: dict[str, torch.Tensor] = field(default_factory=dict)
    norm_epsilon: float = 1e-5


def activation(make: GraphBuilder, x: str, word: str) -> str:
    """Add an activation by its word.

    Raises:
        FormatError: unknown.
    """
    if word not in ACTIVATIONS:
        raise FormatError(unknown_name("activation", word, ACTIVATIONS))
    op, attributes = ACTIVATIONS[word]
    if op == "Silu":
        return make.node("Mul", [x, make.node("Sigmoid", [x])])
    return make.node(op, [x], **attributes) if op else x


def chain(
    make: GraphBuilder, x: str, layers: Sequence[Layer], word: str, *, last: str = "none", channels_last: bool = False
) -> str:
    """Layers one after another with an activation between them and `last` behind them. Images are flattened between
    convolutions and dense layers, in the order channels, rows, columns; with `channels_last` (TensorFlow) an image input is
    [N, rows, columns, channels] and flattened in that order.

    Raises:
        FormatError: the shapes do not follow each other.
    """
    before: Layer | None = None
    if channels_last and layers[0].weight.ndim == 4:
        x = make.node("Transpose", [x], perm=[0, 3, 1, 2])
    for index, layer in enumerate(layers):
        _check(layer, before)
        inputs = [x, make.tensor(f"{layer.name}.weight", layer.weight)]
        if layer.bias is not None:
            inputs.append(make.tensor(f"{layer.name}.bias", layer.bias))
        if layer.weight.ndim == 4:
            kernel = layer.weight.shape[2]
            if kernel not in NATURE_STRIDES:
                raise FormatError(f"{layer.name} is a convolution of kernel {kernel}, whose stride no template tells")
            x = make.node("Conv", inputs, strides=[NATURE_STRIDES[kernel]] * 2)
        else:
            if before is not None and before.weight.ndim == 4:
                rows = make.node("Transpose", [x], perm=[0, 2, 3, 1]) if channels_last else x
                inputs[0] = make.node("Flatten", [rows], axis=1)
            x = make.node("Gemm", inputs, transB=1)
        if layer.norm:
            scale, shift = (make.tensor(f"{layer.name}.norm.{key}", layer.norm[key]) for key in ("weight", "bias"))
            x = make.node("LayerNormalization", [x, scale, shift], axis=-1, epsilon=layer.norm_epsilon)
        x = activation(make, x, word if index < len(layers) - 1 else last)
        before = layer
    return x


def _check(layer: Layer, before: Layer | None) -> None:
    shape = list(layer.weight.shape)
    if layer.weight.ndim not in (2, 4) or not layer.weight.dtype.is_floating_point or 0 in shape:
        raise FormatError(f"{layer.name} has a weight {layer.weight.dtype} {shape}; expected a matrix or a convolution")
    if layer.bias is not None and list(layer.bias.shape) != shape[:1]:
        raise FormatError(f"{layer.name} has a bias {list(layer.bias.shape)} beside a weight {shape}")
    if before is None:
        return
    out = before.weight.shape[0]
    fits = shape[1] == out if before.weight.ndim == layer.weight.ndim else shape[1] % out == 0
    if not fits or layer.weight.ndim > before.weight.ndim:
        raise FormatError(f"{layer.name} {shape} does not follow {before.name} {list(before.weight.shape)}")


def layers_of(tensors: Mapping[str, torch.Tensor], prefix: str) -> list[Layer]:
    """Layers under a prefix in the order of their numbers: "net.0.weight", "net.2.weight"; "fc1.weight", "fc2.weight"; or the
    one layer "net.weight". A vector "net.1.weight" behind a layer is a LayerNorm.

    >>> names = layers_of({"net.0.weight": torch.ones(3, 2), "net.10.weight": torch.ones(1, 3)}, "net.")
    >>> [layer.name for layer in names]
    ['net.0', 'net.10']
    """
    return ordered_layers(tensors, [stem for stem in _stems(tensors) if f"{stem}.".startswith(prefix)])


def ordered_layers(tensors: Mapping[str, torch.Tensor], stems: Sequence[str]) -> list[Layer]:
    """Layers by the numbers in their names."""
    layers: list[Layer] = []
    for stem in sorted(stems, key=lambda stem: tuple(map(int, re.findall(r"\d+", stem)))):
        weight, bias = tensors[f"{stem}.weight"], tensors.get(f"{stem}.bias")
        if weight.ndim == 1 and layers and bias is not None and weight.shape[0] == layers[-1].weight.shape[0]:
            layers[-1].norm = {"weight": weight, "bias": bias}
        else:
            layers.append(Layer(stem, weight, bias))
    return layers


def groups_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, list[Layer]]:
    """Chains by what their layers' names have in common before their last number.

    >>> one = torch.ones(1, 1)
    >>> list(groups_of({"actor.0.weight": one, "actor.2.weight": one, "value.weight": one}))
    ['actor', 'value']
    """
    groups: dict[str, list[str]] = {}
    for stem in _stems(tensors):
        found = re.fullmatch(r"(.*?)(\d+)(\D*)", stem)
        groups.setdefault((found.group(1) if found else stem).strip("._") or "network", []).append(stem)
    return {name: ordered_layers(tensors, stems) for name, stems in groups.items()}


def _stems(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    return [name.removesuffix(".weight") for name in tensors if name.endswith(".weight")]


def image_layout(layers: Sequence[Layer], *, channels_last: bool = False) -> tuple[int | str | None, ...]:
    """The input's shape of a chain: ("rows", K), or ("rows", C, None, None) where a convolution is first."""
    weight = layers[0].weight
    if weight.ndim == 4:
        channels = int(weight.shape[1])
        return ("rows", None, None, channels) if channels_last else ("rows", channels, None, None)
    return ("rows", int(weight.shape[1]))
