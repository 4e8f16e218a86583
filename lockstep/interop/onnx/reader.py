"""An ONNX file as a trainable module.

bytes -> ModelProto (onnx's own parser) -> local functions inlined -> graph of our own -> module. The framework's graph is
kept beside it, without its weights, so that tuned ones can be written back.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from lockstep.core.errors import FormatError
from lockstep.core.extras import require
from lockstep.interop.onnx.functions import inlined
from lockstep.interop.onnx.tensors import BITS, DTYPE_WORDS, tensor_of
from lockstep.models.graph.builder import GraphBuilder
from lockstep.models.graph.graph import About, Graph, Node, Port, TensorValue
from lockstep.models.graph.module import GraphModule

ORIGINAL_NAME = "model.onnx"
MARK = "lockstep:"
"""Begins the doc string of each tensor of the kept graph whose content is in the module."""

LIKE = {"QuantizeLinear": 2, "CastLike": 1}
"""Operation -> the input whose element type its result has."""

# AttributeProto.type by number.
FLOAT, INT, STRING, TENSOR, GRAPH, FLOATS, INTS, STRINGS, TENSORS = 1, 2, 3, 4, 5, 6, 7, 8, 9
SPARSE, TYPE = 11, 13


def read_onnx(path: Path | str, *, layout: Literal["", "NCHW", "NHWC"] = "") -> GraphModule:
    """Read a file, external data included.

    Args:
        layout: of image inputs, where the caller knows it.

    Raises:
        FormatError: no ONNX file, damaged, or with an operation that is not known here.
        MissingExtraError: onnx is not installed.
    """
    path = Path(path)
    onnx = require("onnx", extra="onnx")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise FormatError(f"cannot be read: {error}", path=str(path)) from error
    return from_bytes(content, onnx, folder=path.parent, path=str(path), layout=layout)


def from_bytes(
    content: bytes, onnx: Any, *, folder: Path, path: str, layout: Literal["", "NCHW", "NHWC"] = ""
) -> GraphModule:
    """`read_onnx` of a file's content; `folder` holds its external data."""
    decode_error = require("google.protobuf.message", extra="onnx").DecodeError
    try:
        model = onnx.ModelProto.FromString(content)
    except (decode_error, ValueError, RuntimeError) as error:
        raise FormatError(f"not an ONNX file, or cut off: {error}", path=path) from error
    if not model.HasField("graph") or not model.graph.output:
        raise FormatError("not an ONNX file: it has no graph with outputs", path=path)
    return from_model(model, folder=folder, path=path, layout=layout)


def from_model(
    model: Any, *, folder: Path = Path(), path: str = "", layout: Literal["", "NCHW", "NHWC"] = ""
) -> GraphModule:
    """The module of a ModelProto, which this function changes.

    Raises:
        FormatError: see `read_onnx`.
    """
    try:
        model = inlined(model, path=path)
        return _Reader(model, folder, path).read(layout)
    except FormatError as error:
        if error.path or not path:
            raise
        raise FormatError(error.reason, path=path, op=error.op, offset=error.offset) from error
    except RecursionError as error:
        raise FormatError("graphs are nested too deeply", path=path) from error
    except (TypeError, UnicodeError) as error:
        # Protocol buffers hand out a name that is no UTF-8 as bytes.
        raise FormatError(f"a name or attribute in it is no text: {error}", path=path) from error


class _Reader:
    """One model on its way into a `GraphBuilder`."""

    def __init__(self, model: Any, folder: Path, path: str) -> None:
        self.model, self.folder, self.path = model, folder, path
        self.make = GraphBuilder(opset=1)
        for entry in model.opset_import:
            self.make.opsets["" if entry.domain == "ai.onnx" else entry.domain] = int(entry.version)
        self.kept: list[tuple[Any, str]] = []
        self.names: set[str] = set()
        # Element types of 4 bits and less, which torch lacks, by name of the value.
        self.small: dict[str, int] = {}

    def read(self, layout: Literal["", "NCHW", "NHWC"]) -> GraphModule:
        graph = self.model.graph
        names: dict[str, str] = {}
        for value in [*graph.input, *graph.value_info, *graph.output]:
            if value.type.tensor_type.elem_type in BITS:
                self.small[value.name] = value.type.tensor_type.elem_type
        stored = self._stored(graph, names)
        for value in graph.input:
            if value.name not in stored:
                port = port_of(value)
                self.make.input(port.name, dtype=port.dtype, shape=port.shape)
        for proto in graph.node:
            node = self._node(proto, names)
            if node is not None:
                self.make.add(node)
        for value in graph.output:
            port = port_of(value)
            self.make.output(names.get(port.name, port.name), port.name, dtype=port.dtype, shape=port.shape)
        about = About(
            format="onnx",
            producer=" ".join(filter(None, (self.model.producer_name, self.model.producer_version))),
            layout=layout,
            notes={entry.key: entry.value for entry in self.model.metadata_props},
        )
        module = self.make.build(about=about)
        module.original[ORIGINAL_NAME] = self._skeleton(module)
        return module

    def _stored(self, graph: Any, names: dict[str, str]) -> set[str]:
        """Take a graph's initializers; `names` learns those that had to be renamed."""
        stored = set()
        for proto in graph.initializer:
            self._store(proto, proto.name, names)
            stored.add(proto.name)
        for sparse in graph.sparse_initializer:
            name = sparse.values.name
            self._keep(name, dense_of(sparse, self.folder, self.path), names)
            stored.add(name)
        return stored

    def _store(self, proto: Any, name: str, names: dict[str, str]) -> None:
        value = tensor_of(proto, self.folder, path=self.path)
        if proto.data_type in BITS:
            self.small[name] = proto.data_type
        kept = self._keep(name, value, names)
        if isinstance(value, torch.Tensor):
            self.kept.append((proto, kept))

    def _keep(self, name: str, value: torch.Tensor | np.ndarray, names: dict[str, str]) -> str:
        kept = name
        if name in self.names:
            # Two bodies may use one name; outside of both they need two.
            kept = self.make.fresh(name)
            names[name] = kept
        self.names.add(kept)
        if isinstance(value, np.ndarray):
            text = TensorValue("str", value.shape, tuple(map(str, value.reshape(-1).tolist())))
            self.make.add(Node("lockstep.Strings", (), (kept,), {"value": text}))
        else:
            self.make.tensor(kept, value)
        return kept

    def _node(self, proto: Any, names: dict[str, str]) -> Node | None:
        domain = "" if proto.domain == "ai.onnx" else proto.domain
        if proto.op_type == "Constant" and not domain:
            return self._constant(proto, names)
        attributes = {a.name: self._attribute(a, proto.op_type, names) for a in proto.attribute}
        if (
            proto.op_type in LIKE
            and len(proto.input) > (place := LIKE[proto.op_type])
            and proto.input[place] in self.small
        ):
            attributes["like"] = self.small[proto.input[place]]
        return Node(
            f"{domain}.{proto.op_type}" if domain else proto.op_type,
            tuple(names.get(name, name) for name in proto.input),
            tuple(proto.output),
            {name: value for name, value in attributes.items() if value is not None},
            proto.name,
        )

    def _constant(self, proto: Any, names: dict[str, str]) -> Node | None:
        if len(proto.attribute) != 1 or len(proto.output) != 1:
            raise FormatError("expected one attribute and one output", op="Constant", path=self.path)
        (attribute,), (name,) = proto.attribute, proto.output
        if attribute.type == TENSOR:
            self._store(attribute.t, name, names)
        elif attribute.type == SPARSE:
            self._keep(name, dense_of(attribute.sparse_tensor, self.folder, self.path), names)
        elif attribute.type in (FLOAT, FLOATS):
            value = attribute.f if attribute.type == FLOAT else list(attribute.floats)
            self._keep(name, torch.tensor(value, dtype=torch.float32), names)
        elif attribute.type in (INT, INTS):
            value = attribute.i if attribute.type == INT else list(attribute.ints)
            self._keep(name, torch.tensor(value, dtype=torch.int64), names)
        elif attribute.type in (STRING, STRINGS):
            strings = attribute.s.decode("utf-8", "replace")
            several = [text.decode("utf-8", "replace") for text in attribute.strings]
            self._keep(name, np.array(strings if attribute.type == STRING else several, dtype=object), names)
        else:
            raise FormatError(f"attribute of unknown type {attribute.type}", op="Constant", path=self.path)
        return None

    def _attribute(self, proto: Any, op: str, names: dict[str, str]) -> Any:
        match proto.type:
            case 1:
                return float(proto.f)
            case 2:
                return int(proto.i)
            case 3:
                return proto.s.decode("utf-8", "replace")
            case 4:
                return literal(tensor_of(proto.t, self.folder, path=self.path))
            case 5:
                return self._body(proto.g, names)
            case 6:
                return tuple(map(float, proto.floats))
            case 7:
                return tuple(map(int, proto.ints))
            case 8:
                return tuple(text.decode("utf-8", "replace") for text in proto.strings)
            case 9:
                return tuple(literal(tensor_of(t, self.folder, path=self.path)) for t in proto.tensors)
            case 13:
                return type_word(proto.tp)
        if proto.ref_attr_name:
            raise FormatError(f"attribute {proto.name!r} refers to a function that is not there", op=op, path=self.path)
        raise FormatError(f"attribute {proto.name!r} is of the unknown type {proto.type}", op=op, path=self.path)

    def _body(self, graph: Any, outer: Mapping[str, str]) -> Graph:
        names = dict(outer)
        for value in [*graph.input, *graph.output]:
            names.pop(value.name, None)
        self._stored(graph, names)
        nodes = [self._node(proto, names) for proto in graph.node]
        outputs = [port_of(value) for value in graph.output]
        return Graph(
            inputs=tuple(port_of(value) for value in graph.input),
            outputs=tuple(Port(names.get(port.name, port.name), port.dtype, port.shape) for port in outputs),
            nodes=tuple(node for node in nodes if node is not None),
        )

    def _skeleton(self, module: GraphModule) -> bytes:
        """The framework's graph without the content of those tensors that the module holds."""
        for proto, name in self.kept:
            tensor = module.graph.tensors.get(name)
            if tensor is None or tensor.value is not None:
                continue
            for field in ("raw_data", "float_data", "int32_data", "int64_data", "double_data", "uint64_data"):
                proto.ClearField(field)
            del proto.external_data[:]
            proto.data_location = 0
            proto.doc_string = MARK + name
        content: bytes = self.model.SerializeToString()
        return content


def port_of(value: Any) -> Port:
    """A ValueInfoProto as port."""
    kind = value.type.WhichOneof("value") or ""
    if kind != "tensor_type":
        return Port(value.name, kind.removesuffix("_type") or "?", None)
    tensor = value.type.tensor_type
    word = DTYPE_WORDS.get(tensor.elem_type, "?")
    if not tensor.HasField("shape"):
        return Port(value.name, word, None)
    dims = tuple(
        int(d.dim_value) if d.HasField("dim_value") and d.dim_value > 0 else (d.dim_param or None)
        for d in tensor.shape.dim
    )
    return Port(value.name, word, dims)


def type_word(proto: Any) -> str:
    """A TypeProto in words, such as `sequence(float32)`."""
    kind = proto.WhichOneof("value") or ""
    if kind == "tensor_type":
        return DTYPE_WORDS.get(proto.tensor_type.elem_type, "?")
    inner = {"sequence_type": proto.sequence_type.elem_type, "optional_type": proto.optional_type.elem_type}.get(kind)
    return f"{kind.removesuffix('_type')}({'' if inner is None else type_word(inner)})"


def literal(value: torch.Tensor | np.ndarray) -> TensorValue:
    """An attribute's tensor as numbers."""
    if isinstance(value, torch.Tensor):
        numbers = value.to(torch.float32) if value.dtype.itemsize == 1 and value.dtype.is_floating_point else value
        word = str(value.dtype).removeprefix("torch.")
        return TensorValue(word, tuple(value.shape), tuple(numbers.reshape(-1).tolist()))
    return TensorValue("str", value.shape, tuple(map(str, value.reshape(-1).tolist())))


def dense_of(sparse: Any, folder: Path, path: str) -> torch.Tensor:
    """A SparseTensorProto as dense tensor."""
    values, indices = (tensor_of(part, folder, path=path) for part in (sparse.values, sparse.indices))
    dims = list(sparse.dims)
    from lockstep.models.graph.limits import check_size

    check_size(dims)
    if not isinstance(values, torch.Tensor) or not isinstance(indices, torch.Tensor):
        raise FormatError("a sparse tensor of strings", path=path)
    out = torch.zeros(dims, dtype=values.dtype)
    try:
        if indices.ndim == 2:
            out[tuple(indices.T)] = values
        else:
            out.view(-1)[indices] = values
    except (IndexError, RuntimeError) as error:
        raise FormatError(f"sparse tensor {sparse.values.name!r}: {error}", path=path) from error
    return out


__all__ = ["from_bytes", "from_model", "read_onnx"]
