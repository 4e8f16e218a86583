"""A graph of TensorFlow is looked through before TensorFlow opens it: damage gets an offset and no process is started for it.

Messages are walked by field number to the numbers in them: lengths, wire types, texts, sizes of constants against their bytes,
names that operations read. Operations that reach files or run Python are refused, for TensorFlow runs some of a graph while it
loads it. What a field means beyond that is left to TensorFlow.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

from lockstep.core.errors import FormatError
from lockstep.interop.tensorflow.bundle import check_checkpoint
from lockstep.interop.wire import BYTES, FIXED32, FIXED64, VARINT, Field, Wire, read_file

MAX_GRAPH_BYTES = 1 << 31
MAX_GRAPH_FIELDS = 1 << 23
MAX_DEPTH = 64
"""Messages in messages; protocol buffers' own readers stop at 100."""
MAX_FILLED_BYTES = 1 << 26
"""Largest constant that is stored as one number and a shape."""

MESSAGES: dict[str, dict[int, str]] = {
    "SavedModel": {1: "integer", 2: "MetaGraph"},
    "MetaGraph": {1: "MetaInfo", 2: "Graph", 5: "map Signature", 7: "Objects"},
    "MetaInfo": {1: "text", 4: "text", 5: "text", 6: "text", 7: "integer", 8: "map text"},
    "Signature": {1: "map TensorInfo", 2: "map TensorInfo", 3: "text"},
    "TensorInfo": {1: "text", 2: "integer", 3: "Shape"},
    "Graph": {1: "Node", 2: "Library", 3: "integer", 4: "Versions"},
    "Versions": {1: "integer", 2: "integer", 3: "integers"},
    "Library": {1: "Function", 2: "Gradient"},
    "Gradient": {1: "text", 2: "text"},
    "Function": {1: "OpDef", 3: "Node", 4: "map text", 5: "map Attribute", 6: "map text"},
    "OpDef": {1: "text", 2: "Argument", 3: "Argument", 5: "text", 6: "text", 17: "integer", 20: "text"},
    "Argument": {1: "text", 2: "text", 3: "integer", 4: "text", 5: "text", 6: "text", 16: "integer"},
    "Node": {1: "text", 2: "text", 3: "text", 4: "text", 5: "map Attribute"},
    "Attribute": {
        **{1: "List", 2: "bytes", 3: "integer", 4: "float", 5: "integer", 6: "integer", 7: "Shape", 8: "Tensor"},
        **{9: "text", 10: "Call"},
    },
    "List": {2: "bytes", 3: "integers", 4: "floats", 5: "integers", 6: "integers", 7: "Shape", 8: "Tensor", 9: "Call"},
    "Call": {1: "text", 2: "map Attribute"},
    "Shape": {2: "Dim", 3: "integer"},
    "Dim": {1: "integer", 2: "text"},
    "Tensor": {
        **{1: "integer", 2: "Shape", 3: "integer", 4: "bytes", 5: "floats", 6: "doubles", 7: "integers", 8: "bytes"},
        **{9: "floats", 10: "integers", 11: "integers", 12: "doubles", 13: "integers", 16: "integers", 17: "integers"},
    },
    "Objects": {1: "Object", 2: "map Concrete"},
    "Object": {1: "Child", 3: "Slot", 7: "Variable", 13: "text"},
    "Child": {1: "integer", 2: "text"},
    "Slot": {1: "integer", 2: "text", 3: "integer"},
    "Variable": {1: "integer", 2: "Shape", 3: "integer", 4: "integer", 5: "integer", 6: "text", 7: "text"},
    "Concrete": {2: "integers"},
}
"""Fields by message and number. "map X" is a repeated message of a text (1) and an X (2). Other numbers are let by."""

WIRE = {
    "text": (BYTES,),
    "bytes": (BYTES,),
    "integer": (VARINT,),
    "float": (FIXED32,),
    "integers": (VARINT, BYTES),
    "floats": (FIXED32, BYTES),
    "doubles": (FIXED64, BYTES),
}
SIZES = {1: 4, 2: 8, 3: 4, 4: 1, 5: 2, 6: 1, 8: 8, 9: 8, 10: 1, 14: 2, 17: 2, 18: 16, 19: 2, 22: 4, 23: 8}
"""Bytes of an element by DataType's number; texts (7) and resources (20) are of no size."""
TEXT_LIMIT = 1 << 20

REACH_OUT = (
    "CreateSummaryDbWriter",
    "CreateSummaryFileWriter",
    "EagerPyFunc",
    "ImmutableConst",
    "MatchingFiles",
    "PyFunc",
    "PyFuncStateless",
    "ReadFile",
    "WriteFile",
)
"""Operations that read or write files that a graph names, or call into Python; a saver's and a vocabulary's are not among them,
for nearly every SavedModel has them."""
TO_FILES = ("DebugIdentity", "DebugIdentityV2", "PrintV2")
"""Operations that do so where an attribute of theirs is the address of a file."""


@dataclass
class _Names:
    """Of one graph or function: what its operations are called, and what they read with the place where it is said."""

    defined: set[str] = field(default_factory=set)
    read: list[tuple[str, int]] = field(default_factory=list)


def check_graph_file(path: Path, kind: str) -> Wire:
    """Look a file through that holds a "Graph", "MetaGraph" or "SavedModel"; its bytes, for who reads more of it.

    Raises:
        FormatError: damaged, or with an operation that reaches out; names the byte.
    """
    wire = Wire(read_file(path, MAX_GRAPH_BYTES), str(path), max_fields=MAX_GRAPH_FIELDS)
    _message(wire, None, kind, _Names(), 0)
    wire.fields_left = MAX_GRAPH_FIELDS
    return wire


def check_saved_model(folder: Path) -> None:
    """Look through a SavedModel: its graph and its variables, that they are there and whole.

    Raises:
        FormatError: as `check_graph_file`; a companion is missing or cut off.
    """
    check_graph_file(folder / "saved_model.pb", "SavedModel")
    if (folder / "variables").exists():
        check_checkpoint(folder)


def _message(wire: Wire, message: Field | None, kind: str, names: _Names, depth: int) -> None:
    if depth > MAX_DEPTH:
        raise wire.fail(message.at if message else 0, f"has messages {MAX_DEPTH} deep: damaged")
    fields = _fields_of(kind)
    own = _Names() if kind in ("Graph", "Function") else names
    for part in wire.fields(message):
        what = fields.get(part.number)
        if what is None:
            continue
        if what not in WIRE:
            _message(wire, part, what, own, depth + 1)
            continue
        if part.kind not in WIRE[what]:
            raise wire.fail(part.at, f"field {part.number} of a {kind} should hold {what}: damaged")
        if what == "text":
            text = wire.text(part, TEXT_LIMIT)
            if kind == "Node":
                _node(wire, part, text, own)
                if part.number == 2 and text in TO_FILES and b"file:" in bytes(wire.data[message.start : message.end]):  # type: ignore[union-attr]
                    raise _reaches_out(wire, part, text)
            elif kind == "Argument" and part.number == 1:
                own.defined.add(text)
        elif part.kind == BYTES and what != "bytes":
            _packed(wire, part, what)
    if own is not names:
        for name, at in own.read:
            if name not in own.defined:
                raise wire.fail(at, f"reads {name!r}, which nothing of the same {kind.lower()} yields: damaged")
    elif kind == "Tensor":
        _tensor(wire, message)


def _fields_of(kind: str) -> dict[int, str]:
    return {1: "text", 2: kind[4:]} if kind.startswith("map ") else MESSAGES[kind]


def _reaches_out(wire: Wire, part: Field, op: str) -> FormatError:
    return FormatError("reaches files or Python, and TensorFlow may run it", path=wire.path, op=op, offset=part.at)


def _node(wire: Wire, part: Field, text: str, names: _Names) -> None:
    if part.number == 1:
        if text in names.defined:
            raise wire.fail(part.at, f"a second operation is called {text!r}: damaged")
        names.defined.add(text)
    elif part.number == 2 and text in REACH_OUT:
        raise _reaches_out(wire, part, text)
    elif part.number == 3:
        names.read.append((text.removeprefix("^").partition(":")[0], part.at))


def _packed(wire: Wire, part: Field, what: str) -> None:
    size = part.end - part.start
    width = {"floats": 4, "doubles": 8}.get(what, 0)
    if width and size % width:
        raise wire.fail(part.at, f"field {part.number} has {size} bytes, no multiple of {width}: damaged")
    if what == "integers" and size and wire.data[part.end - 1] >= 0x80:
        raise wire.fail(part.at, f"field {part.number} ends within a number: damaged")


def _tensor(wire: Wire, message: Field | None) -> None:
    """Its bytes are as many as its shape says; a short form (one number for all) is of a size that can be meant."""
    dtype, content, at = 0, -1, message.at if message else 0
    shape: list[int] = []
    for part in wire.fields(message):
        if part.number == 1:
            dtype = part.value
        elif part.number == 2:
            for dim in wire.fields(part):
                sizes = [wire.integer(n) for n in wire.fields(dim) if n.number == 1] if dim.number == 2 else []
                shape += sizes[-1:] or ([0] if dim.number == 2 else [])
        elif part.number == 4:
            content = part.end - part.start
    if min(shape, default=0) < 0:
        raise wire.fail(at, f"a constant has the shape {shape}: damaged")
    size = math.prod(shape) * SIZES.get(dtype, 16)
    if content > 0 and dtype in SIZES and content != size:
        raise wire.fail(at, f"a constant of shape {shape} has {content} bytes instead of {size}: damaged")
    if content <= 0 and size > MAX_FILLED_BYTES:
        raise wire.fail(at, f"a constant of shape {shape} without its numbers would take {size} bytes")
