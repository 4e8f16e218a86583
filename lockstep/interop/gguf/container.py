"""Reader of the GGUF container (versions 2 and 3, little-endian), memory-mapped, made for files nobody vouches for.

Every length is checked against the bytes that are left before anything is allocated or looped over, and what can be
many (strings, fields, tensors, nesting) has a cap far above any real model: a hostile file costs a `FormatError`, not
memory or time. Tensor data is never touched here; `tensor_bytes` is a view into the mapping.
"""

from __future__ import annotations

import dataclasses
import itertools
import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lockstep.core.errors import FormatError, InputError, unknown_name
from lockstep.interop.gguf.formats import (
    DEFAULT_ALIGNMENT,
    MAGIC,
    MAX_DIMS,
    SCALAR_DTYPES,
    TENSOR_TYPES,
    TensorType,
    ValueType,
)

MAX_FIELDS = 1 << 16
MAX_TENSORS = 1 << 18
MAX_ITEMS = 1 << 21
"""Strings and nested arrays inside all arrays of a file together (the largest vocabularies need about 2^20)."""
MAX_DEPTH = 4
MAX_KEY_BYTES = 1 << 16
MAX_NAME_BYTES = 1 << 10
MAX_STRING_BYTES = 1 << 27

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_VALUE_TYPES = {int(value): value for value in ValueType}


@dataclass(frozen=True)
class Field:
    """A metadata value with its type kept.

    `value` is int, float, bool, str, a list of str (bytes that are not UTF-8 kept as surrogate escapes), a numpy array
    (a view into the file, except for bool) or, for arrays of arrays, a list of `Field`.
    """

    type: ValueType
    value: Any
    item_type: ValueType | None = None


@dataclass(frozen=True)
class TensorInfo:
    """A row of the tensor table. `shape` is in numpy order (the file holds it reversed); `start` counts from the file's
    first byte."""

    name: str
    shape: tuple[int, ...]
    type: TensorType
    start: int
    num_bytes: int
    part: int = 0
    """Which file of a split model holds it."""

    @property
    def row_bytes(self) -> int:
        """Bytes of one row (the last dimension)."""
        columns = self.shape[-1] if self.shape else 1
        return columns // self.type.block_size * self.type.block_bytes


class GGUFFile:
    """An open container: `metadata` by key, `tensors` by name in file order."""

    def __init__(self, data: NDArray[np.uint8], path: str) -> None:
        self.path = path
        self.parts = [data]
        cursor = _Cursor(data, path)
        self.version, num_tensors, num_fields = _read_start(cursor)
        self.metadata = _read_metadata(cursor, num_fields)
        self.alignment = _alignment(self.metadata, path)
        self.tensors = _read_tensors(cursor, num_tensors, self.alignment)

    @classmethod
    def open(cls, path: str | Path) -> GGUFFile:
        """Map a file and read its header; of a split model, given its first file, all of them.

        Raises:
            FormatError: it is not a readable GGUF file; the message says what is wrong and where.
        """
        path = Path(path)
        first = cls._open_one(path)
        count = first.value("split.count")
        if isinstance(count, int) and count > 1:
            first._add_parts(path, count)
        return first

    @classmethod
    def _open_one(cls, path: Path) -> GGUFFile:
        try:
            if not path.is_file():
                raise FormatError("is not a file" if path.exists() else "does not exist", path=str(path))
            with path.open("rb") as file:
                # Private and writable: torch takes the memory without a copy, and nothing is ever written back.
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except (OSError, ValueError) as error:
            if isinstance(error, FormatError):
                raise
            raise FormatError(f"cannot be read as GGUF: {error}", path=str(path)) from error
        return cls(np.frombuffer(mapped, np.uint8), str(path))

    def _add_parts(self, path: Path, count: int) -> None:
        ending = f"-00001-of-{count:05d}.gguf"
        if self.value("split.no") != 0 or not path.name.endswith(ending):
            raise FormatError(f"is one of {count} files of a model; open the first, named ...{ending}", path=self.path)
        for number in range(1, count):
            name = f"{path.name.removesuffix(ending)}-{number + 1:05d}-of-{count:05d}.gguf"
            part = GGUFFile._open_one(path.with_name(name))
            if part.value("split.no") != number or part.value("split.count") != count:
                raise FormatError(f"is not file {number + 1} of {count} as its name says", path=part.path)
            self.parts += part.parts
            for tensor, info in part.tensors.items():
                if tensor in self.tensors:
                    raise FormatError(f"has tensor {tensor!r}, which an earlier file has too", path=part.path)
                self.tensors[tensor] = dataclasses.replace(info, part=number)
        total = self.value("split.tensors.count")
        if isinstance(total, int) and total != len(self.tensors):
            raise FormatError(f"speaks of {total} tensors, its files hold {len(self.tensors)}", path=self.path)

    @classmethod
    def from_bytes(cls, data: bytes | bytearray, path: str = "<bytes>") -> GGUFFile:
        """Read a container that lies in memory."""
        return cls(np.frombuffer(data, np.uint8), path)

    def info(self, name: str) -> TensorInfo:
        """The table's row for a tensor.

        Raises:
            InputError: the file has no such tensor.
        """
        if name not in self.tensors:
            raise InputError(f"{self.path}: {unknown_name('tensor', name, self.tensors)[:400]}", field=name)
        return self.tensors[name]

    def tensor_bytes(self, name: str) -> NDArray[np.uint8]:
        """The tensor's bytes as they lie in the file: a view, no copy."""
        info = self.info(name)
        return self.parts[info.part][info.start : info.start + info.num_bytes]

    def value(self, key: str) -> Any:
        """The plain value of a metadata key, None if the file lacks it."""
        field = self.metadata.get(key)
        return None if field is None else field.value


class _Cursor:
    """Position in the header; every step forward is checked against the end."""

    def __init__(self, data: NDArray[np.uint8], path: str) -> None:
        self.view = memoryview(data.data)
        self.data = data
        self.size = len(data)
        self.at = 0
        self.items_left = MAX_ITEMS
        self.path = path

    def fail(self, message: str) -> FormatError:
        return FormatError(message, path=self.path)

    def take(self, num_bytes: int, what: str) -> int:
        start = self.at
        if num_bytes > self.size - start:
            raise self.fail(
                f"{what} at byte {start} needs {num_bytes} bytes and {self.size - start} are left: "
                "the file is truncated or damaged"
            )
        self.at = start + num_bytes
        return start

    def u32(self, what: str) -> int:
        value: int = _U32.unpack_from(self.view, self.take(4, what))[0]
        return value

    def u64(self, what: str) -> int:
        value: int = _U64.unpack_from(self.view, self.take(8, what))[0]
        return value

    def string(self, what: str, limit: int, errors: str = "strict") -> str:
        length = self.u64(what)
        if length > limit:
            raise self.fail(f"{what} at byte {self.at} claims {length} bytes, more than the {limit} allowed: damaged")
        start = self.take(length, what)
        try:
            return str(self.view[start : self.at], "utf-8", errors)
        except UnicodeDecodeError as error:
            raise self.fail(f"{what} at byte {start} is not UTF-8 ({error.reason}): damaged") from error

    def spend_items(self, count: int, what: str) -> None:
        self.items_left -= count
        if self.items_left < 0:
            raise self.fail(f"{what}: arrays hold more than {MAX_ITEMS} strings together: damaged or hostile")


def _read_start(cursor: _Cursor) -> tuple[int, int, int]:
    start = cursor.take(4, "magic")
    magic = bytes(cursor.view[start : start + 4])
    if magic != MAGIC:
        raise cursor.fail(f"starts with {magic!r}, expected {MAGIC!r}: this is not a GGUF file")
    version = cursor.u32("version")
    if version & 0xFFFF == 0 and version:
        raise cursor.fail(
            "is big-endian GGUF; only little-endian is read: convert it with gguf's gguf_convert_endian.py"
        )
    if version not in (2, 3):
        raise cursor.fail(f"is GGUF version {version}; versions 2 and 3 are read: convert the model again")
    num_tensors = cursor.u64("tensor count")
    num_fields = cursor.u64("metadata count")
    # The smallest table row takes 24 bytes, the smallest field 13: a count the file cannot hold is refused before a loop.
    if num_tensors > min(MAX_TENSORS, cursor.size // 24):
        raise cursor.fail(f"claims {num_tensors} tensors in a file of {cursor.size} bytes: damaged or truncated")
    if num_fields > min(MAX_FIELDS, cursor.size // 13):
        raise cursor.fail(f"claims {num_fields} metadata fields in a file of {cursor.size} bytes: damaged or truncated")
    return version, num_tensors, num_fields


def _value_type(cursor: _Cursor, what: str) -> ValueType:
    number = cursor.u32(f"type of {what}")
    if number not in _VALUE_TYPES:
        raise cursor.fail(f"{what} has value type {number}, expected 0 to 12: damaged")
    return _VALUE_TYPES[number]


def _read_metadata(cursor: _Cursor, num_fields: int) -> dict[str, Field]:
    fields: dict[str, Field] = {}
    for index in range(num_fields):
        key = cursor.string(f"key of metadata field {index}", MAX_KEY_BYTES)
        if key in fields:
            raise cursor.fail(f"metadata key {key!r} appears twice: damaged")
        what = f"metadata {key!r}"
        fields[key] = _read_value(cursor, _value_type(cursor, what), what, depth=0)
    return fields


def _read_value(cursor: _Cursor, kind: ValueType, what: str, depth: int) -> Field:
    if kind is ValueType.STRING:
        return Field(kind, cursor.string(what, MAX_STRING_BYTES))
    if kind is ValueType.ARRAY:
        return _read_array(cursor, what, depth + 1)
    dtype = SCALAR_DTYPES[kind]
    start = cursor.take(dtype.itemsize, what)
    value = np.frombuffer(cursor.view, dtype, 1, start)[0].item()
    return Field(kind, bool(value) if kind is ValueType.BOOL else value)


def _read_array(cursor: _Cursor, what: str, depth: int) -> Field:
    if depth > MAX_DEPTH:
        raise cursor.fail(f"{what} nests arrays deeper than {MAX_DEPTH}: damaged or hostile")
    item_type = _value_type(cursor, f"items of {what}")
    count = cursor.u64(f"length of {what}")
    smallest = {ValueType.STRING: 8, ValueType.ARRAY: 12}.get(item_type) or SCALAR_DTYPES[item_type].itemsize
    if count > (cursor.size - cursor.at) // smallest:
        raise cursor.fail(
            f"{what} claims {count} items at byte {cursor.at} with {cursor.size - cursor.at} bytes left: "
            "the file is truncated or damaged"
        )
    if item_type in SCALAR_DTYPES:
        dtype = SCALAR_DTYPES[item_type]
        start = cursor.take(count * dtype.itemsize, what)
        # A view of bytes first: the header is not aligned, and an empty array at the end has no address.
        array = cursor.data[start : cursor.at].view(dtype)
        return Field(ValueType.ARRAY, array != 0 if item_type is ValueType.BOOL else array, item_type)
    cursor.spend_items(count, what)
    if item_type is ValueType.STRING:
        return Field(ValueType.ARRAY, _read_strings(cursor, count, what), item_type)
    return Field(ValueType.ARRAY, [_read_array(cursor, what, depth + 1) for _ in range(count)], item_type)


def _read_strings(cursor: _Cursor, count: int, what: str) -> list[str]:
    """As `cursor.string`, without a call for each: a vocabulary has hundreds of thousands."""
    first, view, at, size, length_of = cursor.at, cursor.view, cursor.at, cursor.size, _U64.unpack_from
    begins: list[int] = []
    for _ in range(count):
        begins.append(at)
        start = at + 8
        at = start + length_of(view, at)[0] if start <= size else size + 1
        if at > size:
            raise cursor.fail(f"item {len(begins) - 1} of {what} ends after the file: it is truncated or damaged")
    cursor.at = at
    # Of a length's eight bytes the last is zero and separates: all strings are decoded at once.
    kept = np.ones(at - first, np.bool_)
    lengths = np.array(begins, np.int64)[:, None] - first + np.arange(7)
    kept[lengths] = False
    joined = cursor.data[first:at][kept].tobytes()
    if joined.count(0) == count:
        return joined.decode("utf-8", "surrogateescape").split("\0")[1:]
    ends = [*begins[1:], at]  # some string holds a zero itself
    return [str(view[b + 8 : e], "utf-8", "surrogateescape") for b, e in zip(begins, ends, strict=True)]


def _alignment(metadata: dict[str, Field], path: str) -> int:
    field = metadata.get("general.alignment")
    if field is None:
        return DEFAULT_ALIGNMENT
    value = field.value
    if field.type is not ValueType.UINT32 or value < 1 or value & (value - 1) or value > 1 << 20:
        raise FormatError(f"general.alignment is {value!r}, expected a uint32 power of two up to 2^20", path=path)
    return int(value)


def _read_tensors(cursor: _Cursor, num_tensors: int, alignment: int) -> dict[str, TensorInfo]:
    rows = [_read_row(cursor, index, alignment) for index in range(num_tensors)]
    data_start = -(-cursor.at // alignment) * alignment
    tensors: dict[str, TensorInfo] = {}
    for name, shape, kind, offset, num_bytes in rows:
        if name in tensors:
            raise cursor.fail(f"tensor {name!r} appears twice: damaged")
        start = data_start + offset
        if start + num_bytes > cursor.size:
            raise cursor.fail(
                f"tensor {name!r} ({kind.name} {list(shape)}) spans bytes {start} to {start + num_bytes} of a file of "
                f"{cursor.size}: the file is truncated or damaged"
            )
        tensors[name] = TensorInfo(name, shape, kind, start, num_bytes)
    for first, second in _neighbours(tensors):
        if first.start + first.num_bytes > second.start:
            raise cursor.fail(f"tensors {first.name!r} and {second.name!r} overlap at byte {second.start}: damaged")
    return tensors


def _neighbours(tensors: dict[str, TensorInfo]) -> Iterator[tuple[TensorInfo, TensorInfo]]:
    ordered = sorted(tensors.values(), key=lambda info: info.start)
    return itertools.pairwise(ordered)


def _read_row(cursor: _Cursor, index: int, alignment: int) -> tuple[str, tuple[int, ...], TensorType, int, int]:
    name = cursor.string(f"name of tensor {index}", MAX_NAME_BYTES)
    what = f"tensor {name!r}"
    num_dims = cursor.u32(f"rank of {what}")
    if num_dims > MAX_DIMS:
        raise cursor.fail(f"{what} has {num_dims} dimensions, expected at most {MAX_DIMS}: damaged")
    shape = tuple(reversed([cursor.u64(f"shape of {what}") for _ in range(num_dims)]))
    if 0 in shape:
        raise cursor.fail(f"{what} has shape {list(shape)}, expected no zero: damaged")
    number = cursor.u32(f"type of {what}")
    if number not in TENSOR_TYPES:
        raise cursor.fail(f"{what} has type {number}, which is unknown here: damaged, or newer than this reader")
    kind = TENSOR_TYPES[number]
    offset = cursor.u64(f"offset of {what}")
    if offset % alignment:
        raise cursor.fail(f"{what} starts at data byte {offset}, not a multiple of the alignment {alignment}: damaged")
    columns = shape[-1] if shape else 1
    if columns % kind.block_size:
        raise cursor.fail(
            f"{what} has rows of {columns}, not a multiple of the {kind.block_size} of {kind.name}: damaged"
        )
    num_elements = 1
    for size in shape:
        num_elements *= size
    return name, shape, kind, offset, num_elements // kind.block_size * kind.block_bytes
