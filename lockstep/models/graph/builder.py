"""How importers make a graph: tensors and nodes by name, in order.

>>> import numpy as np
>>> make = GraphBuilder()
>>> x = make.input("x", shape=("rows", 3))
>>> weight = make.tensor("fc.weight", np.ones((2, 3), np.float32))
>>> make.output(make.node("Gemm", [x, weight], transB=1), "y")
>>> module = make.build()
>>> module(torch.ones(1, 3)).tolist(), [name for name, _ in module.named_parameters()]
([[3.0, 3.0]], ['fc/weight'])
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from lockstep.core.errors import FormatError
from lockstep.models.graph.graph import About, Dim, Graph, Node, Port, Tensor
from lockstep.models.graph.module import GraphModule
from lockstep.models.graph.roles import is_weight
from lockstep.models.graph.values import host_value


class GraphBuilder:
    """Collects the parts of a graph. Names of values are unique; those that are not given are made up."""

    def __init__(self, *, opset: int = 21) -> None:
        self.opsets: dict[str, int] = {"": opset, "lockstep": 1}
        self._inputs: list[Port] = []
        self._outputs: list[Port] = []
        self._nodes: list[Node] = []
        self._values: dict[str, torch.Tensor] = {}
        self._wishes: dict[str, bool] = {}
        self._numbers = itertools.count(1)

    def input(self, name: str, *, dtype: str = "float32", shape: Sequence[Dim] | None = None) -> str:
        """Declare an input (NumPy dtype; sizes are numbers, names of free ones, or None)."""
        self._inputs.append(Port(name, dtype, None if shape is None else tuple(shape)))
        return name

    def output(self, value: str, name: str = "", *, dtype: str = "float32", shape: Sequence[Dim] | None = None) -> None:
        """Declare a value as output, under another name if given."""
        if name and name != value:
            self.node("Identity", [value], outputs=[name])
        self._outputs.append(Port(name or value, dtype, None if shape is None else tuple(shape)))

    def tensor(self, name: str, value: np.ndarray | torch.Tensor, *, trainable: bool | None = None) -> str:
        """Store a tensor. `trainable` None: decided by what uses it, see `roles`."""
        if name in self._values:
            raise FormatError(f"two tensors have the name {name!r}")
        tensor = value if isinstance(value, torch.Tensor) else torch.from_numpy(np.array(value, order="C"))
        self._values[name] = tensor
        if trainable is not None:
            self._wishes[name] = trainable
        return name

    def constant(self, value: Any, dtype: str = "int64") -> str:
        """Store numbers that are no weights, such as a shape."""
        return self.tensor(self.fresh("constant"), np.array(value, dtype), trainable=False)

    def node(
        self, op: str, inputs: Sequence[str], *, outputs: Sequence[str] = (), name: str = "", **attributes: Any
    ) -> str:
        """Add a node and return its first output; inputs come before the nodes that use them."""
        outs = tuple(outputs) or (self.fresh(op),)
        values = {key: _attribute(value) for key, value in attributes.items() if value is not None}
        self._nodes.append(Node(op, tuple(inputs), outs, values, name))
        return outs[0]

    def add(self, node: Node) -> None:
        """Add a ready node."""
        self._nodes.append(node)

    def fresh(self, stem: str) -> str:
        """A name that no value has yet."""
        return f"{stem}#{next(self._numbers)}"

    def body(self) -> GraphBuilder:
        """A builder of a body (of Scan, Loop, If): inputs, outputs and nodes of its own; tensors and fresh names are shared."""
        inner = GraphBuilder()
        inner._values, inner._wishes, inner._numbers = self._values, self._wishes, self._numbers
        return inner

    def graph(self) -> Graph:
        """What a body's builder collected, as the attribute of its node."""
        return Graph(inputs=tuple(self._inputs), outputs=tuple(self._outputs), nodes=tuple(self._nodes))

    def build(self, *, about: About | None = None, original: Mapping[str, bytes] | None = None) -> GraphModule:
        """The module. Stored tensors that nothing uses are left out.

        Raises:
            FormatError: an unknown operation, or a name that is used before it is defined.
        """
        body = self.graph()
        uses = _uses(body)
        keys: dict[str, None] = {}
        stored: dict[str, Tensor] = {}
        for name, value in self._values.items():
            if name not in uses:
                continue
            key = _key(name, keys)
            wish = self._wishes.get(name)
            is_float = value.dtype.is_floating_point
            trainable = is_float and (is_weight(value.ndim, uses[name]) if wish is None else wish)
            constant = None if trainable else host_value(value)
            dtype = str(value.dtype).removeprefix("torch.")
            stored[name] = Tensor(key, trainable, dtype, tuple(value.shape), constant)
        graph = Graph(
            inputs=body.inputs,
            outputs=body.outputs,
            nodes=body.nodes,
            tensors=stored,
            opsets=self.opsets,
            about=about or About(),
        )
        tensors = {tensor.key: self._values[name] for name, tensor in stored.items()}
        return GraphModule(graph, tensors, original=original)


def _uses(graph: Graph) -> dict[str, list[tuple[str, int]]]:
    """Name -> (operation, index of the input) of everything that reads it."""
    uses: dict[str, list[tuple[str, int]]] = {}
    for node in graph.walk():
        for index, name in enumerate(node.inputs):
            uses.setdefault(name, []).append((node.op, index))
        for value in node.attributes.values():
            if isinstance(value, Graph):
                for port in value.outputs:
                    uses.setdefault(port.name, []).append(("output", 0))
    for port in graph.outputs:
        uses.setdefault(port.name, []).append(("output", 0))
    return uses


def _key(name: str, keys: dict[str, None]) -> str:
    """A name that torch accepts (no dots), unique."""
    stem = name.replace(".", "/") or "tensor"
    key, number = stem, 2
    while key in keys or key in RESERVED:
        key, number = f"{stem}~{number}", number + 1
    keys[key] = None
    return key


def _attribute(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


RESERVED = frozenset(dir(GraphModule)) | {"graph", "original", "training"}
