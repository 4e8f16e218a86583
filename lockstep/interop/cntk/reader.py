"""CNTK v2 models as plain data: one dictionary in protocol-buffer wire format.

Field numbers: dictionary 1 version, 2 entries (1 key, 2 value); value 1 version, 2 type, then one of 3 bool, 4 int, 5 size_t,
6 float, 7 double, 8 string, 9 shape, 10 axis, 11 vector, 12 dictionary, 13 array; shape 1 dims; axis 1 static index, 2 name,
3 ordered; vector 1 values; array 1 data type, 2 storage, 3 shape, 4 floats, 5 doubles, 6 bytes (each a message with field 1).

Shapes are column-major: the first dimension runs fastest. Here they are kept as written; arrays are given row-major with
their dimensions reversed, which is the same memory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lockstep.core.errors import FormatError, unknown_name
from lockstep.interop.wire import BYTES, Field, Wire

MAX_DEPTH = 24
MAX_DIMS = 32
MAX_ELEMENTS = 1 << 33
MAX_FUNCTIONS = 1 << 16
INPUT, OUTPUT, PARAMETER, CONSTANT, PLACEHOLDER = 0, 1, 2, 3, 4
BATCH_AXIS = "defaultBatchAxis"
LEGACY_MAGIC = b"B\0C\0N\0"


class Shape(tuple[int, ...]):
    """Dimensions in the file's order; -1 is inferred, -3 free."""


@dataclass(frozen=True)
class Axis:
    """A static axis by index (0 runs fastest, -1 is the last) or a dynamic one by name."""

    index: int
    name: str

    @property
    def is_dynamic(self) -> bool:
        """Whether it is the batch's or a sequence's."""
        return self.index >= (1 << 31) - 2 and not self.is_all_static

    @property
    def is_all_static(self) -> bool:
        """Whether it stands for all static axes."""
        return self.name == "AllStaticAxes"


@dataclass(frozen=True)
class Variable:
    """An input, parameter, constant or placeholder. `shape` in the file's order, `value` row-major."""

    uid: str
    name: str
    kind: int
    shape: Shape
    dynamic_axes: tuple[str, ...]
    is_sparse: bool
    value: NDArray[Any] | None


class Attributes:
    """A function's settings; notes which were read, so that none is passed over."""

    def __init__(self, function: Function, values: dict[str, Any]) -> None:
        self.function = function
        self.values = values
        self.read: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self.values

    def get(self, name: str, default: Any) -> Any:
        """A value as stored; its kind must be the default's (integers serve as reals)."""
        self.read.add(name)
        value = self.values.get(name, default)
        kinds: tuple[type, ...] = (type(default),)
        if default is None:
            return value
        if isinstance(default, float):
            kinds = (float, int)
        if not isinstance(value, kinds):
            raise self.function.fail(f"attribute {name} is {value!r:.60}, a {kinds[0].__name__} was expected")
        return value

    def unread(self, harmless: frozenset[str]) -> list[str]:
        """Names that nothing asked for."""
        return [name for name in self.values if name not in self.read and name not in harmless]


@dataclass(frozen=True)
class Function:
    """A primitive operator, or a block: a composite (`root`) with its placeholders bound to values."""

    uid: str
    name: str
    op: int
    inputs: tuple[str, ...]
    settings: dict[str, Any]
    path: str
    root: str = ""
    bound: tuple[tuple[str, str], ...] = ()

    def fail(self, message: str) -> FormatError:
        """An error that names file, function and operator."""
        return FormatError(message, path=self.path, op=f"{self.uid} (op {self.op})")


@dataclass(frozen=True)
class Model:
    """A composite function: its variables and functions by uid, and the function whose outputs are the model's."""

    variables: dict[str, Variable]
    functions: dict[str, Function]
    root: str
    path: str


def read_model(path: str | Path) -> Model:
    """Read a `.model` or `.dnn` of CNTK 2.

    Raises:
        FormatError: it is missing, truncated, damaged, or of CNTK 1; names file, offset or function.
    """
    wire = Wire.open(path)
    if bytes(wire.data[: len(LEGACY_MAGIC)]) == LEGACY_MAGIC:
        raise FormatError("is a model of CNTK 1; load it with CNTK 2 (Function.load) and save it again", path=wire.path)
    top = _dictionary(wire, None, 0)
    if _text(top, "type", "model", wire.path) != "CompositeFunction":
        raise FormatError(f"is a {top.get('type')!r:.40}, not the CompositeFunction that a model is", path=wire.path)
    variables: dict[str, Variable] = {}
    for entry in _list(top, "inputs", "model", wire.path):
        variable = _variable(entry, wire.path)
        variables[variable.uid] = variable
    functions: dict[str, Function] = {}
    for entry in _list(top, "primitive_functions", "model", wire.path):
        function = _function(entry, wire.path)
        if function.uid in functions or function.uid in variables:
            raise FormatError(f"two functions have the uid {function.uid!r}", path=wire.path)
        functions[function.uid] = function
    root = _text(top, "root", "model", wire.path)
    if root not in functions:
        raise FormatError(unknown_name("root function", root, list(functions)[:20]), path=wire.path)
    if len(functions) > MAX_FUNCTIONS:
        raise FormatError(f"has {len(functions)} functions", path=wire.path)
    return Model(variables, functions, root, wire.path)


def _variable(entry: Any, path: str) -> Variable:
    if not isinstance(entry, dict):
        raise FormatError("an input is not a dictionary", path=path)
    uid = _text(entry, "uid", "input", path)
    shape, axes, value, kind = (entry.get(name) for name in ("shape", "dynamic_axis", "value", "kind"))
    if not isinstance(shape, Shape) or not isinstance(kind, int) or not INPUT <= kind <= PLACEHOLDER:
        raise FormatError(f"variable {uid!r} has shape {shape!r:.40} and kind {kind!r:.20}", path=path)
    if kind in (PARAMETER, CONSTANT):
        if not isinstance(value, np.ndarray) or value.shape != tuple(shape)[::-1]:
            raise FormatError(f"variable {uid!r} of shape {tuple(shape)} has no value of that shape", path=path)
    else:
        value = None
    names = tuple(axis.name for axis in axes if isinstance(axis, Axis)) if isinstance(axes, list) else ()
    name = entry.get("name", "")
    is_sparse = entry.get("is_sparse") is True
    return Variable(uid, name if isinstance(name, str) else "", kind, shape, names, is_sparse, value)


def _function(entry: Any, path: str) -> Function:
    if not isinstance(entry, dict):
        raise FormatError("a function is not a dictionary", path=path)
    uid = _text(entry, "uid", "function", path)
    kind = entry.get("type")
    if kind != "PrimitiveFunction":
        raise FormatError(f"is a {kind!r:.40}; only primitive functions and blocks are supported", path=path, op=uid)
    inputs, settings, op = entry.get("inputs"), entry.get("attributes", {}), entry.get("op")
    if (
        not isinstance(op, int)
        or not isinstance(settings, dict)
        or not isinstance(inputs, list)
        or not all(isinstance(item, str) for item in inputs)
    ):
        raise FormatError("lacks op, inputs or attributes", path=path, op=uid)
    root = ""
    bound: tuple[tuple[str, str], ...] = ()
    if "block_function_composite" in entry:
        composite = entry["block_function_composite"]
        root = _text(composite, "root", uid, path) if isinstance(composite, dict) else ""
        keys = _list(entry, "block_function_composite_arguments_map_keys", uid, path)
        values = _list(entry, "block_function_composite_arguments_map_values", uid, path)
        if len(keys) != len(values) or not all(isinstance(item, str) for item in (*keys, *values)):
            raise FormatError("binds its placeholders wrongly", path=path, op=uid)
        bound = tuple(zip(keys, values, strict=True))
    name = entry.get("name", "")
    return Function(uid, name if isinstance(name, str) else "", op, tuple(inputs), settings, path, root, bound)


def _text(entry: dict[str, Any], name: str, what: str, path: str) -> str:
    value = entry.get(name)
    if not isinstance(value, str):
        raise FormatError(f"{what} has no {name}: not a model of CNTK 2, or damaged", path=path)
    return value


def _list(entry: dict[str, Any], name: str, what: str, path: str) -> list[Any]:
    value = entry.get(name)
    if not isinstance(value, list):
        raise FormatError(f"{what} has no list of {name}: not a model of CNTK 2, or damaged", path=path)
    return value


def _dictionary(wire: Wire, message: Field | None, depth: int) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for item in wire.fields(message):
        if item.number == 2:
            key, value = "", None
            for part in wire.fields(item):
                if part.number == 1:
                    key = wire.text(part)
                elif part.number == 2:
                    value = _value(wire, part, depth + 1)
            values[key] = value
        elif item.number != 1:
            raise wire.fail(item.at, f"a dictionary has field {item.number}: not a model of CNTK 2, or damaged")
    return values


def _value(wire: Wire, message: Field, depth: int) -> Any:
    if depth > MAX_DEPTH:
        raise wire.fail(message.at, f"values nest deeper than {MAX_DEPTH}: damaged")
    found: Any = None
    for item in wire.fields(message):
        match item.number:
            case 1 | 2:
                wire.integer(item)
            case 3:
                found = wire.integer(item) != 0
            case 4 | 5:
                found = wire.integer(item)
            case 6 | 7:
                found = wire.real(item)
            case 8:
                found = wire.text(item)
            case 9:
                found = _shape(wire, item)
            case 10:
                found = _axis(wire, item)
            case 11:
                found = [_value(wire, part, depth + 1) for part in wire.fields(item) if part.number == 1]
            case 12:
                found = _dictionary(wire, item, depth + 1)
            case 13:
                found = _array(wire, item)
            case _:
                raise wire.fail(item.at, f"a value has field {item.number}: not a model of CNTK 2, or damaged")
    # Protocol buffers leave out a value that is the default of its type; the type alone says which.
    return _default(wire, message) if found is None else found


def _default(wire: Wire, message: Field) -> Any:
    kinds = {1: False, 2: 0, 3: 0, 4: 0.0, 5: 0.0, 6: "", 7: Shape(), 9: []}
    kind = next((wire.integer(item) for item in wire.fields(message) if item.number == 2), 0)
    return kinds.get(kind)


def _shape(wire: Wire, message: Field) -> Shape:
    dims = [dim for item in wire.fields(message) if item.number == 1 for dim in wire.integers(item, MAX_DIMS)]
    if len(dims) > MAX_DIMS or any(not -3 <= dim < 1 << 40 for dim in dims):
        raise wire.fail(message.at, f"shape {dims[:8]}: damaged")
    return Shape(dims)


def _axis(wire: Wire, message: Field) -> Axis:
    index, name = 0, ""
    for item in wire.fields(message):
        if item.number == 1:
            index = wire.integer(item)
        elif item.number == 2:
            name = wire.text(item)
    return Axis(index, name)


def _array(wire: Wire, message: Field) -> NDArray[Any]:
    shape, storage, kind = Shape(), 0, 0
    values: NDArray[Any] | None = None
    for item in wire.fields(message):
        if item.number == 1:
            kind = wire.integer(item)
        elif item.number == 2:
            storage = wire.integer(item)
        elif item.number == 3:
            shape = _shape(wire, item)
        elif item.number in (4, 5, 6):
            dtype = {4: "<f4", 5: "<f8", 6: "<f2"}[item.number]
            parts = [wire.array(part, dtype) for part in wire.fields(item) if part.number == 1 and part.kind == BYTES]
            values = np.concatenate(parts) if len(parts) > 1 else parts[0] if parts else np.empty(0, dtype)
        elif item.number == 7:
            raise wire.fail(item.at, f"an array has integer elements (type {kind}), which are not supported")
    if storage != 0:
        raise wire.fail(message.at, f"an array is sparse (storage {storage}); only dense ones are read")
    count = math.prod(shape)
    if values is None or any(dim < 0 for dim in shape) or count > MAX_ELEMENTS or values.size != count:
        size = 0 if values is None else values.size
        raise wire.fail(message.at, f"an array of shape {tuple(shape)} has {size} values: truncated or damaged")
    return values.reshape(tuple(shape)[::-1])
