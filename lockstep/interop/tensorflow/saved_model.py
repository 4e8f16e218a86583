"""What `saved_model.pb` says besides its graph: names of the variables that it keeps by number, and the operations of its
functions, so that a template knows scopes, activations and strides. Nothing is executed.

Field numbers: SavedModel 2 meta graph; of it 2 graph, 7 objects. Graph: 2 library; of it 1 function: 1 signature (1 name),
3 operations (1 name, 2 kind, 5 attributes). Objects: 1 node: 1 children (1 node, 2 name), 7 variable (6 name).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from lockstep.core.errors import FormatError
from lockstep.interop.wire import BYTES, FIXED32, VARINT, Field, Wire, read_file

MAX_BYTES = 1 << 28
MAX_VARIABLES = 1 << 12
Attribute = float | str | tuple[int, ...]


@dataclass(frozen=True)
class Operation:
    """One operation of a function; of its attributes only numbers, texts and lists of integers."""

    name: str
    kind: str
    attributes: dict[str, Attribute] = field(default_factory=dict)


@dataclass(frozen=True)
class SavedModel:
    """`variables`: names of the root's `model_variables` by their number; `functions`: operations by the function's name."""

    variables: tuple[str, ...]
    functions: dict[str, tuple[Operation, ...]]


def read_saved_model(folder: Path) -> SavedModel:
    """Read `saved_model.pb` of a folder.

    Raises:
        FormatError: missing, damaged, or no graph.
    """
    path = folder / "saved_model.pb"
    wire = Wire(read_file(path, MAX_BYTES), str(path))
    for meta in _parts(wire, None, 2):
        functions = {}
        for graph in _parts(wire, meta, 2):
            for library in _parts(wire, graph, 2):
                for function in _parts(wire, library, 1):
                    name = "".join(_text(wire, signature, 1) for signature in _parts(wire, function, 1))
                    functions[name] = tuple(_operation(wire, node) for node in _parts(wire, function, 3))
        objects = [list(_parts(wire, part, 1)) for part in _parts(wire, meta, 7)]
        return SavedModel(_variables(wire, objects[0] if objects else []), functions)
    raise FormatError("holds no graph", path=str(path))


def _parts(wire: Wire, message: Field | None, number: int) -> Iterator[Field]:
    for part in wire.fields(message):
        if part.number == number and part.kind == BYTES:
            yield part


def _text(wire: Wire, message: Field, number: int) -> str:
    return "".join(wire.text(part) for part in _parts(wire, message, number))


def _children(wire: Wire, node: Field) -> dict[str, int]:
    found = {}
    for child in _parts(wire, node, 1):
        target = [wire.integer(part) for part in wire.fields(child) if part.number == 1 and part.kind == VARINT]
        found[_text(wire, child, 2)] = target[-1] if target else 0
    return found


def _variables(wire: Wire, nodes: list[Field]) -> tuple[str, ...]:
    def at(index: int) -> Field:
        if not 0 <= index < len(nodes):
            raise FormatError(f"names the object {index} of {len(nodes)}: damaged", path=wire.path)
        return nodes[index]

    if not nodes:
        return ()
    root = _children(wire, nodes[0])
    if "model_variables" not in root:
        return ()
    numbered = _children(wire, at(root["model_variables"]))
    if len(numbered) > MAX_VARIABLES or set(numbered) != {str(i) for i in range(len(numbered))}:
        raise FormatError(f"numbers its variables {sorted(numbered)[:6]}: damaged", path=wire.path)
    names = []
    for index in range(len(numbered)):
        found = [_text(wire, part, 6) for part in _parts(wire, at(numbered[str(index)]), 7)]
        names.append(found[0].removesuffix(":0") if found else "")
    return tuple(names)


def _operation(wire: Wire, node: Field) -> Operation:
    attributes: dict[str, Attribute] = {}
    for entry in _parts(wire, node, 5):
        for value in _parts(wire, entry, 2):
            for part in wire.fields(value):
                if part.number == 1 and part.kind == BYTES:
                    numbers = [n for item in wire.fields(part) if item.number == 3 for n in wire.integers(item)]
                    attributes[_text(wire, entry, 1)] = tuple(numbers)
                elif part.number == 2 and part.kind == BYTES and part.end - part.start < 32:
                    attributes[_text(wire, entry, 1)] = bytes(wire.data[part.start : part.end]).decode("latin-1")
                elif part.number == 4 and part.kind == FIXED32:
                    attributes[_text(wire, entry, 1)] = wire.real(part)
    return Operation(_text(wire, node, 1), _text(wire, node, 2), attributes)
