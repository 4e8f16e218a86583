"""The module that runs a graph, every weight a Parameter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lockstep.core.errors import FormatError, InputError
from lockstep.models.graph.graph import Graph
from lockstep.models.graph.program import compile_graph
from lockstep.models.graph.values import Host, to_tensors


class GraphModule(nn.Module):
    """An imported network.

    `module(*inputs)` takes the inputs of `graph.inputs` in order and returns the output, or a tuple where there are
    several; `module.run(inputs)` maps names to tensors on both sides. Sizes follow the tensors given, not the file.
    Normalisation uses its stored statistics and dropout does nothing, in training too.

    Args:
        graph: what to run.
        tensors: stored tensors by `graph.tensors[name].key`; None starts all at zero, for `load_state_dict` to fill.
        original: files of the framework, by name, that travel along (so that tuned weights can be written back).

    Raises:
        FormatError: an operation that is not known, a tensor that is missing or does not fit.
    """

    def __init__(
        self, graph: Graph, tensors: Mapping[str, Tensor] | None, *, original: Mapping[str, bytes] | None = None
    ) -> None:
        super().__init__()
        self.graph = graph
        self.original = dict(original or {})
        self._program = compile_graph(graph, graph.opsets)
        self._weights: list[tuple[str, str]] = []
        self._constants: list[tuple[str, str, Any, torch.dtype]] = []
        for name, stored in graph.tensors.items():
            dtype = dtype_of(stored.dtype)
            if stored.key in self._parameters or stored.key in self._buffers:
                raise FormatError(f"two tensors have the key {stored.key!r}")
            if stored.value is not None:
                value = torch.tensor(stored.value, dtype=dtype)
                self.register_buffer(stored.key, value, persistent=False)
                self._constants.append((name, stored.key, stored.value, dtype))
                continue
            value = _weight(stored.key, stored.shape, dtype, tensors)
            self._weights.append((name, stored.key))
            if stored.trainable:
                self.register_parameter(stored.key, nn.Parameter(value))
            else:
                self.register_buffer(stored.key, value)

    def forward(self, *inputs: Any) -> Any:
        """Outputs for positional inputs.

        Raises:
            InputError: another number of inputs than the graph has.
            FormatError: operands that do not fit an operation, which the message names.
        """
        if len(inputs) != len(self.graph.inputs):
            names = ", ".join(map(str, self.graph.inputs))
            raise InputError(f"got {len(inputs)} inputs; expected {len(self.graph.inputs)}: {names}", field="inputs")
        outputs = self.outputs(inputs)
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Outputs by name for inputs by name.

        Raises:
            InputError: a name is missing or unknown.
        """
        names = [port.name for port in self.graph.inputs]
        for name in {**dict.fromkeys(names), **inputs}:
            if name not in inputs or name not in names:
                raise InputError(f"inputs are {names}; got {list(inputs)}", field=name)
        outputs = self.outputs([inputs[name] for name in names])
        return dict(zip((port.name for port in self.graph.outputs), outputs, strict=True))

    def outputs(self, inputs: Any) -> list[Any]:
        """Every output, in the graph's order."""
        scope: dict[str, Any] = {name: getattr(self, key) for name, key in self._weights}
        for name, key, data, dtype in self._constants:
            scope[name] = Host(data, dtype, getattr(self, key))
        return to_tensors(self._program.run(list(inputs), scope))

    def named_tensors(self) -> dict[str, Tensor]:
        """Stored tensors by the names that the framework gave them."""
        return {name: getattr(self, tensor.key) for name, tensor in self.graph.tensors.items()}

    def extra_repr(self) -> str:
        """Inputs, outputs and operations in one line."""
        ops = ", ".join(dict.fromkeys(node.op for node in self.graph.walk()))
        return f"{list(map(str, self.graph.inputs))} -> {list(map(str, self.graph.outputs))}: {ops}"


def dtype_of(word: str) -> torch.dtype:
    """torch's dtype of that name.

    Raises:
        FormatError: there is none.
    """
    found = torch.__dict__.get(word)
    if not isinstance(found, torch.dtype):
        raise FormatError(f"unknown dtype {word!r}")
    return found


def _weight(key: str, shape: tuple[int, ...], dtype: torch.dtype, tensors: Mapping[str, Tensor] | None) -> Tensor:
    if tensors is None:
        return torch.zeros(shape, dtype=dtype)
    if key not in tensors:
        raise FormatError(f"tensor {key!r} is missing")
    value = tensors[key].detach().clone()
    if tuple(value.shape) != shape or value.dtype != dtype:
        raise FormatError(f"tensor {key!r} is {value.dtype} {list(value.shape)}; expected {dtype} {list(shape)}")
    return value
