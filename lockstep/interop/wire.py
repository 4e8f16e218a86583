"""Protocol-buffer wire format by field number: a bounded reader for files nobody vouches for, and a small writer.

No schema is compiled and no framework's `.proto` is used: a caller walks the fields of a message and knows the numbers it
wants. Lengths are checked against the bytes that are left before anything is taken, arrays are views into the file, and
the number of fields a file may hold is capped.

Source: the encoding as documented at protobuf.dev/programming-guides/encoding.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lockstep.core.errors import FormatError

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
MAX_FIELDS = 1 << 20
"""Fields in one file together; a real network of a thousand layers has some 50,000."""
MAX_FILE_BYTES = 1 << 34


@dataclass(frozen=True)
class Field:
    """One field: `value` of a varint or the bits of a fixed one; `start` and `end` of bytes; `at` is where its key lies."""

    number: int
    kind: int
    value: int
    start: int
    end: int
    at: int


class Wire:
    """A file in wire format.

    >>> wire = Wire(encode_varint(1, 300) + encode_bytes(2, b"name"), "example")
    >>> [(field.number, field.value) for field in wire.fields() if field.kind == VARINT]
    [(1, 300)]
    >>> [wire.text(field) for field in wire.fields() if field.kind == BYTES]
    ['name']
    """

    def __init__(self, data: bytes | bytearray | memoryview, path: str, *, max_fields: int = MAX_FIELDS) -> None:
        self.data = memoryview(data)
        self.path = path
        self.fields_left = self.max_fields = max_fields

    @classmethod
    def open(cls, path: str | Path) -> Wire:
        """Read a file.

        Raises:
            FormatError: it is missing, empty, too large or unreadable.
        """
        return cls(read_file(path, MAX_FILE_BYTES), str(path))

    def fail(self, at: int, message: str) -> FormatError:
        """An error that names file and offset."""
        return FormatError(f"byte {at}: {message}", path=self.path)

    def fields(self, message: Field | None = None) -> Iterator[Field]:
        """The fields of a message in file order; of the file itself when no message is given."""
        if message is not None and message.kind != BYTES:
            raise self.fail(message.at, f"field {message.number} should hold a message and holds a number")
        at, end = (0, len(self.data)) if message is None else (message.start, message.end)
        while at < end:
            self.fields_left -= 1
            if self.fields_left < 0:
                raise self.fail(at, f"the file holds more than {self.max_fields} fields: damaged")
            field = self._field(at, end)
            yield field
            at = field.end

    def _field(self, at: int, end: int) -> Field:
        key, start = self.varint(at, end)
        number, kind = key >> 3, key & 7
        if number == 0:
            raise self.fail(at, "field number 0: not a protocol buffer, or damaged")
        if kind == VARINT:
            value, after = self.varint(start, end)
            return Field(number, kind, value, start, after, at)
        if kind == BYTES:
            length, start = self.varint(start, end)
            if length > end - start:
                raise self.fail(
                    at, f"field {number} claims {length} bytes and {end - start} are left: truncated or damaged"
                )
            return Field(number, kind, 0, start, start + length, at)
        if kind in (FIXED32, FIXED64):
            size = 4 if kind == FIXED32 else 8
            if size > end - start:
                raise self.fail(at, f"field {number} needs {size} bytes and {end - start} are left: truncated")
            bits = int.from_bytes(self.data[start : start + size], "little")
            return Field(number, kind, bits, start, start + size, at)
        raise self.fail(at, f"field {number} has wire type {kind}, which is not in use: damaged")

    def varint(self, at: int, end: int) -> tuple[int, int]:
        """(an unsigned number that begins at a byte, the byte behind it)."""
        value = shift = 0
        for position in range(at, min(end, at + 10)):
            byte = self.data[position]
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value & 0xFFFFFFFFFFFFFFFF, position + 1
            shift += 7
        raise self.fail(at, "a number runs past its end: truncated or damaged")

    def integer(self, field: Field) -> int:
        """A varint as a signed 64-bit integer."""
        if field.kind != VARINT:
            raise self.fail(field.at, f"field {field.number} should hold an integer")
        return field.value - (1 << 64) if field.value >= 1 << 63 else field.value

    def real(self, field: Field) -> float:
        """A fixed32 as float or a fixed64 as double."""
        if field.kind not in (FIXED32, FIXED64):
            raise self.fail(field.at, f"field {field.number} should hold a floating-point number")
        form = "<f" if field.kind == FIXED32 else "<d"
        value: float = struct.unpack_from(form, self.data, field.start)[0]
        return value

    def text(self, field: Field, limit: int = 1 << 16) -> str:
        """UTF-8 text of at most `limit` bytes."""
        if field.kind != BYTES or field.end - field.start > limit:
            raise self.fail(field.at, f"field {field.number} should hold a text of at most {limit} bytes")
        try:
            return bytes(self.data[field.start : field.end]).decode()
        except UnicodeDecodeError as error:
            raise self.fail(field.at, f"field {field.number} is not UTF-8 text: damaged") from error

    def integers(self, field: Field, limit: int = 64) -> list[int]:
        """A repeated integer field's part: one varint, or several packed, at most `limit`."""
        if field.kind == VARINT:
            return [self.integer(field)]
        if field.kind != BYTES:
            raise self.fail(field.at, f"field {field.number} should hold integers")
        values, at = [], field.start
        while at < field.end:
            value, at = self.varint(at, field.end)
            values.append(value - (1 << 64) if value >= 1 << 63 else value)
            if len(values) > limit:
                raise self.fail(field.at, f"field {field.number} holds more than {limit} integers: damaged")
        return values

    def array(self, field: Field, dtype: str) -> NDArray[np.generic]:
        """A repeated fixed-width field's part as a read-only view: packed, or one value."""
        if field.kind == VARINT:
            raise self.fail(field.at, f"field {field.number} should hold an array of {dtype}")
        size = np.dtype(dtype).itemsize
        if (field.end - field.start) % size:
            raise self.fail(
                field.at, f"field {field.number} has {field.end - field.start} bytes, no multiple of {size}"
            )
        return np.frombuffer(self.data[field.start : field.end], dtype)


def read_file(path: str | Path, limit: int) -> bytes:
    """A file's bytes.

    Raises:
        FormatError: it is missing, not a file, empty, larger than `limit`, or cannot be read.
    """
    path = Path(path)
    try:
        if not path.is_file():
            raise FormatError("is not a file" if path.exists() else "does not exist", path=str(path))
        size = path.stat().st_size
        if size == 0:
            raise FormatError("is empty", path=str(path))
        if size > limit:
            raise FormatError(f"has {size} bytes, more than the {limit} read here", path=str(path))
        return path.read_bytes()
    except OSError as error:
        raise FormatError(f"cannot be read: {error}", path=str(path)) from error


def _key(number: int, kind: int) -> bytes:
    return _number(number << 3 | kind)


def _number(value: int) -> bytes:
    out = bytearray()
    value &= 0xFFFFFFFFFFFFFFFF
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def encode_varint(number: int, value: int) -> bytes:
    """An integer, bool or enum field."""
    return _key(number, VARINT) + _number(value)


def encode_bytes(number: int, value: bytes) -> bytes:
    """A text, bytes or message field."""
    return _key(number, BYTES) + _number(len(value)) + value


def encode_integers(number: int, values: Iterable[int]) -> bytes:
    """A packed repeated integer field."""
    return encode_bytes(number, b"".join(_number(value) for value in values))
