"""A program of PaddlePaddle on its way into a graph: which value has which name."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lockstep.core.errors import FormatError
from lockstep.interop.paddle.programs import Value
from lockstep.models.graph.builder import GraphBuilder


class Lowering:
    """A program on its way into a graph. `names` are the graph's names of the program's values, `numbers`
    integers of constants by those names."""

    def __init__(self, make: GraphBuilder, shapes: dict[str, list[int]], weights: dict[str, torch.Tensor]) -> None:
        self.make, self.shapes, self.weights = make, shapes, weights
        self.names: dict[str, str] = {}
        self.lists: dict[str, list[str]] = {}
        self.numbers: dict[str, list[int]] = {}

    def value(self, value: Value) -> str:
        """The graph's name of an input; "" of one that is left out."""
        if isinstance(value, list):
            raise FormatError("a list stands where one value was expected")
        if value and value not in self.names:
            raise FormatError(f"the value {value!r} is used before it is computed")
        return self.names[value] if value else ""

    def many(self, value: Value) -> list[str]:
        """Names of a list."""
        if isinstance(value, list):
            return [self.value(item) for item in value]
        if value not in self.lists:
            raise FormatError(f"{value!r} is not a list of values")
        return self.lists[value]

    def rank(self, value: Value) -> int:
        """Dimensions of a value, as the program declares it."""
        if not isinstance(value, str) or value not in self.shapes:
            raise FormatError(f"the rank of {value!r} is not declared")
        return len(self.shapes[value])

    def ints(self, numbers: Sequence[int]) -> str:
        return self.make.constant([int(n) for n in numbers])
