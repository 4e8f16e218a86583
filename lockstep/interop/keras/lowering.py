"""A Keras model on its way into a graph: layouts of values, and where each weight came from."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from lockstep.core.errors import FormatError
from lockstep.interop.chains import ACTIVATIONS
from lockstep.models.graph.builder import GraphBuilder

Arrays = list[np.ndarray]


class Weights(Protocol):
    """Arrays of a model by layer: of a file of HDF5 or of a checkpoint of TensorFlow. Its methods raise FormatError."""

    path: Path
    config: dict[str, Any]
    content: bytes

    def places(self, layers: list[dict[str, Any]], weighted: Collection[str]) -> dict[str, str]:
        """Layer's name -> its group."""

    def datasets(self, group: str) -> list[str]:
        """Names of a group's arrays, in the order of the layer's weights."""

    def array(self, name: str) -> np.ndarray:
        """One array as float32."""


@dataclass
class Value:
    """A tensor with its channels last (as Keras has it), first, or both; `rank` with the rows."""

    rank: int
    last: str = ""
    first: str = ""


@dataclass
class Place:
    """One stored tensor: the file's arrays it was made of, and the way back."""

    tensor: str
    datasets: list[str]
    back: Callable[[np.ndarray], Arrays]


@dataclass
class Lowering:
    """The state of the translation."""

    make: GraphBuilder
    file: Weights
    keras2: bool
    places: list[Place] = field(default_factory=list)

    def last(self, value: Value) -> str:
        """The value with channels last."""
        if not value.last:
            value.last = self.make.node("Transpose", [value.first], perm=[0, *range(2, value.rank), 1])
        return value.last

    def first(self, value: Value) -> str:
        """The value with channels behind the rows."""
        if not value.first:
            value.first = self.make.node("Transpose", [value.last], perm=[0, value.rank - 1, *range(1, value.rank - 1)])
        return value.first

    def like(self, value: Value, op: str, **attributes: object) -> Value:
        """An elementwise operation, in the layout that is there."""
        source = value.first or value.last
        out = self.make.node(op, [source], **attributes)  # type: ignore[arg-type]
        return Value(value.rank, first=out) if value.first else Value(value.rank, last=out)

    def activation(self, value: Value, word: object) -> Value:
        """Keras' activation by its name.

        Raises:
            FormatError: not known, or code of the user's.
        """
        word = "linear" if word is None else word
        if isinstance(word, dict):
            word = word.get("config") if isinstance(word.get("config"), str) else word.get("class_name")
        if word == "softmax":
            return Value(value.rank, last=self.make.node("Softmax", [self.last(value)], axis=-1))
        if word == "relu6":
            bounds = [self.make.constant(bound, "float32") for bound in (0.0, 6.0)]
            source = value.first or value.last
            out = self.make.node("Clip", [source, *bounds])
            return Value(value.rank, first=out) if value.first else Value(value.rank, last=out)
        if word not in ACTIVATIONS:
            raise FormatError(f"has the activation {word!r}, which is not known here")
        op, attributes = ACTIVATIONS[str(word)]
        if word == "hard_sigmoid" and self.keras2:
            attributes = {"alpha": 0.2}
        if word == "leaky_relu":
            attributes = {"alpha": 0.2}
        if word == "gelu":
            attributes = {"approximate": "none"}
        if op == "Silu":
            gate = self.like(value, "Sigmoid")
            source, other = (value.first, gate.first) if value.first else (value.last, gate.last)
            out = self.make.node("Mul", [source, other])
            return Value(value.rank, first=out) if value.first else Value(value.rank, last=out)
        return self.like(value, op, **attributes) if op else value

    def stored(
        self,
        name: str,
        datasets: Sequence[str],
        there: Callable[[Arrays], np.ndarray],
        back: Callable[[np.ndarray], Arrays],
        *,
        trainable: bool = True,
    ) -> str:
        """Store the tensor that `there` makes of some of the file's arrays."""
        try:
            tensor = there([self.file.array(dataset) for dataset in datasets])
        except (ValueError, IndexError) as error:
            raise FormatError(f"has arrays that do not fit: {error}") from error
        self.places.append(Place(name, list(datasets), back))
        return self.make.tensor(name, tensor, trainable=trainable)

    def plain(self, name: str, dataset: str, *, trainable: bool = True) -> str:
        """Store an array as it is."""
        return self.stored(name, [dataset], lambda arrays: arrays[0], lambda array: [array], trainable=trainable)
