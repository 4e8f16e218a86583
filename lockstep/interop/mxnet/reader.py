"""MXNet's files as plain data: a graph from `-symbol.json` of every age, arrays from `.params`.

`.params`: u64 0x112, u64 0, u64 count, that many arrays, u64 count, that many names (u64 length, bytes). An array starts with
a word that tells its version: 0xF993FAC8 (V1), ...C9 (V2), ...CA (V3); any other word is the number of dimensions of the oldest
form, whose dimensions have 32 bits. Then storage type (V2 and V3), u32 number of dimensions, i64 dimensions, i32 device type
and number, i32 type of the elements, elements. Names are `arg:NAME`, `aux:NAME` or plain.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lockstep.core.errors import FormatError, unknown_name
from lockstep.interop.wire import MAX_FILE_BYTES, read_file

LIST_MAGIC = 0x112
ARRAY_V1, ARRAY_V2, ARRAY_V3 = 0xF993FAC8, 0xF993FAC9, 0xF993FACA
MAX_ARRAYS = 1 << 18
MAX_DIMS = 32
MAX_NODES = 1 << 16
MAX_SYMBOL_BYTES = 1 << 26
MAX_NAME_BYTES = 1 << 12
DTYPES: dict[int, np.dtype[Any]] = {
    0: np.dtype("<f4"),
    1: np.dtype("<f8"),
    2: np.dtype("<f2"),
    3: np.dtype("u1"),
    4: np.dtype("<i4"),
    5: np.dtype("i1"),
    6: np.dtype("<i8"),
    7: np.dtype("?"),
}
_STORAGE = {1: "row_sparse", 2: "csr"}


@dataclass(frozen=True)
class Params:
    """Arrays by name without their prefix; `auxiliary` names those saved as `aux:`."""

    arrays: dict[str, NDArray[Any]]
    auxiliary: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Node:
    """A variable (`op` is "null") or an operator. `inputs` are (node number, output number)."""

    number: int
    op: str
    name: str
    attributes: dict[str, str]
    inputs: tuple[tuple[int, int], ...]
    path: str
    read: set[str] = field(default_factory=set, compare=False)

    def fail(self, message: str) -> FormatError:
        """An error that names file, node and operator."""
        return FormatError(f"node {self.number} {self.name!r} ({self.op}): {message}", path=self.path)

    def string(self, name: str, default: str) -> str:
        """An attribute as written."""
        self.read.add(name)
        return self.attributes.get(name, default)

    def _parse(self, name: str, default: Any, convert: Callable[[str], Any], what: str) -> Any:
        text = self.string(name, "None").strip()
        if text in ("None", "null", ""):
            return default
        try:
            return convert(text)
        except (ValueError, OverflowError) as error:
            raise self.fail(f"{name}={text[:40]!r} is not {what}") from error

    def integer(self, name: str, default: int) -> int:
        """An integer attribute."""
        value: int = self._parse(name, default, _integer, "an integer")
        return value

    def real(self, name: str, default: float) -> float:
        """A floating-point attribute."""
        value: float = self._parse(name, default, float, "a number")
        return value

    def flag(self, name: str, default: bool) -> bool:
        """A boolean attribute."""
        value: bool = self._parse(name, default, _flag, "True or False")
        return value

    def integers(self, name: str, default: tuple[int | None, ...] = ()) -> tuple[Any, ...]:
        """A tuple attribute; entries may be None."""
        value: tuple[Any, ...] = self._parse(name, default, _integers, "a tuple of integers")
        return value

    def has(self, name: str) -> bool:
        """Whether the attribute is given and is not None."""
        self.read.add(name)
        return self.attributes.get(name, "None").strip() not in ("None", "")


@dataclass(frozen=True)
class Symbol:
    """A graph in topological order, and its outputs."""

    nodes: tuple[Node, ...]
    heads: tuple[tuple[int, int], ...]
    path: str


def _integer(text: str) -> int:
    value = int(text.rstrip("lL"))
    if abs(value) >= 1 << 62:
        raise ValueError(text)
    return value


def _flag(text: str) -> bool:
    if text.lower() not in ("true", "false", "1", "0"):
        raise ValueError(text)
    return text.lower() in ("true", "1")


def _integers(text: str) -> tuple[int | None, ...]:
    inner = text.strip().removeprefix("(").removeprefix("[").removesuffix(")").removesuffix("]")
    parts = [part.strip() for part in inner.split(",") if part.strip()]
    if len(parts) > MAX_DIMS:
        raise ValueError(text)
    return tuple(None if part == "None" else _integer(part) for part in parts)


def read_symbol(path: str | Path) -> Symbol:
    """Read a `-symbol.json`.

    Raises:
        FormatError: it is missing, damaged or not a graph of MXNet; the message names the node.
    """
    data = read_file(path, MAX_SYMBOL_BYTES)
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"is not JSON: {str(error)[:120]}", path=str(path)) from error
    if not isinstance(content, dict) or not isinstance(content.get("nodes"), list):
        raise FormatError("has no list of nodes; is it a -symbol.json of MXNet?", path=str(path))
    entries = content["nodes"]
    if not 0 < len(entries) <= MAX_NODES:
        raise FormatError(f"has {len(entries)} nodes", path=str(path))
    nodes = tuple(_node(number, entry, str(path)) for number, entry in enumerate(entries))
    heads = content.get("heads") or [[len(nodes) - 1, 0]]
    return Symbol(nodes, _references(heads, len(nodes), "heads", str(path)), str(path))


def _node(number: int, entry: Any, path: str) -> Node:
    if not isinstance(entry, dict) or not isinstance(entry.get("op"), str) or not isinstance(entry.get("name"), str):
        raise FormatError(f"node {number} has no op and name", path=path)
    if "subgraphs" in entry:
        raise FormatError(f"node {number} {entry['name']!r} ({entry['op']}): control flow is not supported", path=path)
    attributes: dict[str, str] = {}
    for key in ("attr", "param", "attrs"):
        part = entry.get(key) or {}
        if not isinstance(part, dict):
            raise FormatError(f"node {number} {entry['name']!r}: {key} is not a table", path=path)
        attributes |= {str(name): str(value) for name, value in part.items()}
    inputs = _references(entry.get("inputs") or [], number, f"node {number} {entry['name']!r}", path)
    return Node(number, entry["op"], entry["name"], attributes, inputs, path)


def _references(items: Any, limit: int, what: str, path: str) -> tuple[tuple[int, int], ...]:
    if not isinstance(items, list):
        raise FormatError(f"{what}: inputs are not a list", path=path)
    references = []
    for item in items:
        pair = [item, 0] if isinstance(item, int) else item
        if (
            not isinstance(pair, list)
            or len(pair) < 2
            or not all(isinstance(value, int) for value in pair[:2])
            or not 0 <= pair[0] < limit
            or not 0 <= pair[1] < MAX_NODES
        ):
            raise FormatError(f"{what}: {str(item)[:40]} does not refer to an earlier node", path=path)
        references.append((pair[0], pair[1]))
    return tuple(references)


def read_params(path: str | Path) -> Params:
    """Read a `.params` file (also Gluon's, and what `mx.nd.save` wrote from a dictionary).

    Raises:
        FormatError: it is missing, truncated, damaged, or an array is sparse or of an unknown type; names the offset.
    """
    cursor = _Cursor(read_file(path, MAX_FILE_BYTES), str(path))
    if cursor.number("<Q", "magic") != LIST_MAGIC:
        raise cursor.fail(0, "does not start with 0x112; is it a .params file of MXNet?")
    cursor.number("<Q", "reserved word")
    num = cursor.count("arrays")
    arrays = [_read_array(cursor, index) for index in range(num)]
    num_names = cursor.count("names")
    if num_names != num:
        raise cursor.fail(cursor.at - 8, f"{num} arrays and {num_names} names; a list without names is not a model's")
    found: dict[str, NDArray[Any]] = {}
    auxiliary = set()
    for array in arrays:
        start = cursor.at
        kind, _, name = cursor.name().rpartition(":")
        if kind not in ("", "arg", "aux") or name in found:
            raise cursor.fail(start, f"array name {kind}:{name!r} is repeated or not arg: or aux:")
        found[name] = array
        if kind == "aux":
            auxiliary.add(name)
    return Params(found, frozenset(auxiliary))


class _Cursor:
    def __init__(self, data: bytes, path: str) -> None:
        self.data = data
        self.path = path
        self.at = 0

    def fail(self, at: int, message: str) -> FormatError:
        return FormatError(f"byte {at}: {message}", path=self.path)

    def take(self, num: int, what: str) -> int:
        start = self.at
        if num > len(self.data) - start:
            raise self.fail(
                start, f"{what} needs {num} bytes and {len(self.data) - start} are left: truncated or damaged"
            )
        self.at = start + num
        return start

    def number(self, form: str, what: str) -> int:
        start = self.take(struct.calcsize(form), what)
        value: int = struct.unpack_from(form, self.data, start)[0]
        return value

    def count(self, what: str) -> int:
        num = self.number("<Q", f"number of {what}")
        if num > min(MAX_ARRAYS, len(self.data)):
            raise self.fail(self.at - 8, f"claims {num} {what}: damaged")
        return num

    def name(self) -> str:
        length = self.number("<Q", "length of a name")
        if length > MAX_NAME_BYTES:
            raise self.fail(self.at - 8, f"a name claims {length} bytes: damaged")
        start = self.take(length, "name")
        try:
            return self.data[start : self.at].decode()
        except UnicodeDecodeError as error:
            raise self.fail(start, "a name is not UTF-8 text: damaged") from error


def _read_array(cursor: _Cursor, index: int) -> NDArray[Any]:
    start = cursor.at
    word = cursor.number("<I", f"array {index}")
    dim_form = "<q"
    if word in (ARRAY_V2, ARRAY_V3):
        storage = cursor.number("<i", "storage type")
        if storage != 0:
            name = _STORAGE.get(storage, f"of storage type {storage}")
            raise cursor.fail(start, f"array {index} is {name}; only dense arrays are read (call tostype('default'))")
    if word in (ARRAY_V1, ARRAY_V2, ARRAY_V3):
        num_dims = cursor.number("<i", "number of dimensions")
    else:
        num_dims, dim_form = word, "<I"
    if not 0 <= num_dims <= MAX_DIMS:
        raise cursor.fail(start, f"array {index} claims {num_dims} dimensions: damaged")
    shape = tuple(cursor.number(dim_form, "dimension") for _ in range(num_dims))
    if num_dims == 0 and word != ARRAY_V3:
        return np.empty(0, np.float32)
    cursor.take(8, "device")
    code = cursor.number("<i", "type of elements")
    if code not in DTYPES:
        raise cursor.fail(cursor.at - 4, f"array {index}: {unknown_name('element type', str(code), map(str, DTYPES))}")
    count = math.prod(shape)
    if any(dim < 0 for dim in shape) or count > len(cursor.data):
        raise cursor.fail(start, f"array {index} claims shape {shape}, more than the file holds: truncated or damaged")
    first = cursor.take(count * DTYPES[code].itemsize, f"array {index} of shape {shape}")
    return np.frombuffer(cursor.data, DTYPES[code], count, first).reshape(shape)
