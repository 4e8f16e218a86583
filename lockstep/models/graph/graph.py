"""The graph of an imported network as plain frozen data, and its JSON form.

Operations have the names, attributes and meaning of ONNX (`Gemm`, `Conv`, `LSTM`; of another domain `domain.Name`);
what a framework has and ONNX lacks is an operation of the domain `lockstep`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from lockstep.core.errors import FormatError

Dim = int | str | None


@dataclass(frozen=True)
class Port:
    """An input or output: name, NumPy dtype, shape. A dimension is a number, the name of a free one, or None (free,
    without a name); `shape` None: not even the rank is known. Declared sizes are information, never checked.

    >>> Port("obs", "float32", ("batch", 4)).is_free(0)
    True
    """

    name: str
    dtype: str = "float32"
    shape: tuple[Dim, ...] | None = None

    def is_free(self, dim: int) -> bool:
        """Whether a dimension has no fixed size."""
        return self.shape is None or not isinstance(self.shape[dim], int)

    def __str__(self) -> str:
        shape = "?" if self.shape is None else ", ".join("?" if d is None else str(d) for d in self.shape)
        return f"{self.name} {self.dtype} [{shape}]"


@dataclass(frozen=True)
class TensorValue:
    """An attribute that is a small array: dtype in NumPy's words, shape, numbers in C order."""

    dtype: str
    shape: tuple[int, ...]
    data: tuple[Any, ...]


@dataclass(frozen=True)
class Node:
    """One operation. An empty input name is an input left out, an empty output name an output nobody wants.

    Attributes are numbers, strings, lists of them, `TensorValue` and `Graph` (the bodies of If, Loop, Scan).
    """

    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    name: str = ""


@dataclass(frozen=True)
class Tensor:
    """A stored tensor: `key` is its name in the module and in safetensors files, `dtype` torch's word.

    A trainable one is a Parameter. A small constant that decides shapes has its `value` here and not in the file of weights.
    """

    key: str
    trainable: bool
    dtype: str
    shape: tuple[int, ...]
    value: Any = None


@dataclass(frozen=True, kw_only=True)
class About:
    """What is known of a network besides its graph."""

    format: str = ""
    """Reader that brought it: onnx, caffe, mxnet, cntk, ..."""
    producer: str = ""
    """Program that wrote the file, with its version."""
    layout: Literal["", "NCHW", "NHWC"] = ""
    """Axes of image inputs (empty: not known, taken as NCHW)."""
    time_axis: int | None = None
    """Axis of the steps in sequence inputs of rank 3 (None: 1, rows first)."""
    marker: str = ""
    """Input [T, N] that is 0 where a sequence begins and 1 where it goes on (Caffe's `cont`); a policy clears states itself."""
    scale: float = 1.0
    """Factor on raw observations before they enter the network, such as 1/255 for images."""
    mean: tuple[float, ...] = ()
    """Subtracted from raw observations before `scale`: one number, or one for each channel or column."""
    states: Mapping[str, str] = field(default_factory=dict)
    """Recurrent state: name of an input -> name of the output that is its next value."""
    head: str = ""
    """Action distribution that the outputs are for, as `PolicySpec.head` has it (empty: the file does not say)."""
    log_std: tuple[float, ...] = ()
    """Logarithm of the standard deviation of a normal distribution that the file keeps beside its network."""
    obs_space: Mapping[str, Any] | None = None
    """Space of observations in JSON form, where the file says it."""
    action_space: Mapping[str, Any] | None = None
    """Space of actions."""
    notes: Mapping[str, str] = field(default_factory=dict)
    """Anything else the file says, in words."""

    @staticmethod
    def from_json(data: dict[str, Any]) -> About:
        """Inverse of `asdict`."""
        unknown = sorted(set(data) - {f.name for f in fields(About)})
        if unknown:
            raise FormatError(f"about an imported network: unknown fields {unknown}")
        return About(**{**data, **{key: tuple(data.get(key, ())) for key in ("mean", "log_std")}})


@dataclass(frozen=True, kw_only=True)
class Graph:
    """A network as data. `opsets` gives the version of each domain ("" is ONNX's own)."""

    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    nodes: tuple[Node, ...]
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    opsets: Mapping[str, int] = field(default_factory=lambda: {"": 21})
    about: About = field(default_factory=About)

    def walk(self) -> Iterator[Node]:
        """Every node, those of inner graphs included."""
        for node in self.nodes:
            yield node
            for value in node.attributes.values():
                if isinstance(value, Graph):
                    yield from value.walk()

    def to_json(self) -> dict[str, Any]:
        """JSON values, inverse of `from_json`."""
        return {
            "inputs": [_port_to_json(port) for port in self.inputs],
            "outputs": [_port_to_json(port) for port in self.outputs],
            "nodes": [_node_to_json(node) for node in self.nodes],
            "tensors": {name: _tensor_to_json(tensor) for name, tensor in self.tensors.items()},
            "opsets": dict(self.opsets),
            "about": asdict(self.about),
        }

    @staticmethod
    def from_json(data: Any) -> Graph:
        """Build from `to_json`'s form.

        Raises:
            FormatError: it is not one.
        """
        try:
            return Graph(
                inputs=tuple(_port_from_json(port) for port in data["inputs"]),
                outputs=tuple(_port_from_json(port) for port in data["outputs"]),
                nodes=tuple(_node_from_json(node) for node in data["nodes"]),
                tensors={name: _tensor_from_json(tensor) for name, tensor in data["tensors"].items()},
                opsets={str(domain): int(version) for domain, version in data["opsets"].items()},
                about=About.from_json(data["about"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise FormatError(f"not the graph of an imported network: {error!r}") from error


def _tensor_to_json(tensor: Tensor) -> list[Any]:
    return [tensor.key, tensor.trainable, tensor.dtype, list(tensor.shape), tensor.value]


def _tensor_from_json(data: list[Any]) -> Tensor:
    key, trainable, dtype, shape, value = data
    return Tensor(str(key), bool(trainable), str(dtype), tuple(int(n) for n in shape), value)


def _port_to_json(port: Port) -> list[Any]:
    return [port.name, port.dtype, None if port.shape is None else list(port.shape)]


def _port_from_json(data: list[Any]) -> Port:
    name, dtype, shape = data
    return Port(str(name), str(dtype), None if shape is None else tuple(shape))


def _node_to_json(node: Node) -> dict[str, Any]:
    out: dict[str, Any] = {"op": node.op, "inputs": list(node.inputs), "outputs": list(node.outputs)}
    if node.name:
        out["name"] = node.name
    if node.attributes:
        out["attributes"] = {name: _value_to_json(value) for name, value in node.attributes.items()}
    return out


def _node_from_json(data: dict[str, Any]) -> Node:
    return Node(
        str(data["op"]),
        tuple(data["inputs"]),
        tuple(data["outputs"]),
        {name: _value_from_json(value) for name, value in data.get("attributes", {}).items()},
        str(data.get("name", "")),
    )


def _value_to_json(value: Any) -> Any:
    if isinstance(value, Graph):
        return {"graph": value.to_json()}
    if isinstance(value, TensorValue):
        return {"tensor": [value.dtype, list(value.shape), list(value.data)]}
    return list(value) if isinstance(value, tuple) else value


def _value_from_json(value: Any) -> Any:
    if isinstance(value, dict):
        if "graph" in value:
            return Graph.from_json(value["graph"])
        dtype, shape, numbers = value["tensor"]
        return TensorValue(str(dtype), tuple(shape), tuple(numbers))
    return tuple(value) if isinstance(value, list) else value
