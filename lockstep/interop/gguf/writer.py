"""Writer of GGUF version 3: metadata and tensors, aligned, appearing under its name only when it is complete."""

from __future__ import annotations

import os
import shutil
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from lockstep.core.errors import ConfigError, InputError, unknown_name
from lockstep.interop.files import replaced_when_checked
from lockstep.interop.gguf.container import MAX_NAME_BYTES, Field
from lockstep.interop.gguf.formats import BY_NAME, DEFAULT_ALIGNMENT, MAGIC, MAX_DIMS, SCALAR_DTYPES, ValueType


@dataclass(frozen=True)
class TensorData:
    """A tensor to write: `make` is called when its turn comes, so that one tensor at a time is in memory."""

    kind: str
    shape: tuple[int, ...]
    make: Callable[[], NDArray]
    """Its bytes, an array of any dtype and shape in C order."""

    @property
    def num_bytes(self) -> int:
        block = BY_NAME[self.kind]
        return int(np.prod(self.shape, dtype=np.int64)) // block.block_size * block.block_bytes


def write_gguf(
    path: str | Path,
    metadata: Mapping[str, Any],
    tensors: Mapping[str, TensorData],
    *,
    alignment: int = DEFAULT_ALIGNMENT,
) -> None:
    """Write a file that any GGUF reader opens.

    Args:
        path: ends in `.gguf`; replaced atomically.
        metadata: plain values (bool, str, float as float32, int as the narrowest of uint32, int32, uint64, int64; lists
            and numpy arrays of one type) or `Field`s where the type matters.
        tensors: in the order of the file.
        alignment: of every tensor, a power of two.

    Raises:
        InputError: a value or tensor that the format cannot hold.
        ConfigError: the path cannot be written, or its disk has not the room.
    """
    if alignment < 8 or alignment & (alignment - 1):
        raise InputError(f"alignment {alignment}: expected a power of two, at least 8", field="alignment")
    fields = {key: as_field(key, value) for key, value in metadata.items()}
    if alignment != DEFAULT_ALIGNMENT:
        fields["general.alignment"] = Field(ValueType.UINT32, alignment)
    header = _header(fields, tensors, alignment)
    need = len(header) + sum(tensor.num_bytes + alignment for tensor in tensors.values())
    with replaced_when_checked(Path(path), ".gguf") as temporary, temporary.open("wb") as file:
        check_room(temporary.parent, need)
        file.write(header)
        _pad(file, alignment)
        for name, tensor in tensors.items():
            array = np.ascontiguousarray(tensor.make())
            if array.nbytes != tensor.num_bytes:
                raise InputError(f"tensor {name!r} has {array.nbytes} bytes, expected {tensor.num_bytes}", field=name)
            file.write(array.reshape(-1).view(np.uint8).data)
            _pad(file, alignment)
        file.flush()
        os.fsync(file.fileno())


def check_room(folder: Path, num_bytes: int) -> None:
    """Before the first byte is written: does the disk hold the last one?

    Raises:
        ConfigError: it does not.
    """
    free = shutil.disk_usage(folder).free
    if num_bytes > free:
        raise ConfigError(
            f"{num_bytes / 2**20:,.0f} MiB are to be written and the disk of {folder} has {free / 2**20:,.0f} MiB free; free "
            "some, or give another place"
        )


def as_field(key: str, value: Any) -> Field:
    """A plain value with the type it is stored as.

    >>> as_field("llama.block_count", 2).type.name
    'UINT32'
    """
    if isinstance(value, Field):
        return value
    if isinstance(value, np.ndarray):
        kinds = {dtype: kind for kind, dtype in SCALAR_DTYPES.items() if kind is not ValueType.BOOL}
        kinds[np.dtype(bool)] = ValueType.BOOL
        if value.dtype not in kinds or value.ndim != 1:
            raise InputError(
                f"metadata {key!r}: array of {value.dtype}, shape {value.shape}, cannot be stored", field=key
            )
        return Field(ValueType.ARRAY, value, ValueType(kinds[value.dtype]))
    if isinstance(value, list | tuple):
        return _array_field(key, list(value))
    return Field(_scalar_type(key, value), value)


def _array_field(key: str, items: list[Any]) -> Field:
    if not items:
        raise InputError(f"metadata {key!r}: an empty list has no item type; give a Field", field=key)
    if isinstance(items[0], list | tuple):
        return Field(ValueType.ARRAY, [_array_field(key, list(item)) for item in items], ValueType.ARRAY)
    kinds = {_scalar_type(key, item) for item in items}
    if kinds <= {ValueType.UINT32, ValueType.INT32, ValueType.UINT64, ValueType.INT64} and len(kinds) > 1:
        kinds = {ValueType.INT32 if kinds == {ValueType.UINT32, ValueType.INT32} else ValueType.INT64}
    if len(kinds) != 1:
        raise InputError(f"metadata {key!r}: items of different types {sorted(kinds)}", field=key)
    return Field(ValueType.ARRAY, items, kinds.pop())


def _scalar_type(key: str, value: Any) -> ValueType:
    if isinstance(value, bool):
        return ValueType.BOOL
    if isinstance(value, str):
        return ValueType.STRING
    if isinstance(value, float):
        return ValueType.FLOAT32
    if isinstance(value, int) and -(1 << 63) <= value < 1 << 64:
        if value < 0:
            return ValueType.INT32 if value >= -(1 << 31) else ValueType.INT64
        return ValueType.UINT32 if value < 1 << 32 else ValueType.UINT64
    raise InputError(f"metadata {key!r}: {value!r} cannot be stored", field=key)


def _pad(file: BinaryIO, alignment: int) -> None:
    file.write(b"\0" * (-file.tell() % alignment))


def _header(fields: Mapping[str, Field], tensors: Mapping[str, TensorData], alignment: int) -> bytes:
    parts = [MAGIC, struct.pack("<IQQ", 3, len(tensors), len(fields))]
    for key, field in fields.items():
        parts += [_string(key), struct.pack("<I", field.type), _value(key, field)]
    offset = 0
    for name, tensor in tensors.items():
        _check(name, tensor)
        parts += [_string(name), struct.pack("<I", len(tensor.shape))]
        parts += [struct.pack("<Q", size) for size in reversed(tensor.shape)]
        parts.append(struct.pack("<IQ", BY_NAME[tensor.kind].number, offset))
        offset += -(-tensor.num_bytes // alignment) * alignment
    return b"".join(parts)


def _check(name: str, tensor: TensorData) -> None:
    if tensor.kind not in BY_NAME:
        raise InputError(unknown_name("tensor type", tensor.kind, BY_NAME), field=name)
    block = BY_NAME[tensor.kind]
    if not 1 <= len(tensor.shape) <= MAX_DIMS or min(tensor.shape) < 1 or tensor.shape[-1] % block.block_size:
        raise InputError(f"tensor {name!r}: {tensor.kind} of shape {list(tensor.shape)} cannot be stored", field=name)
    if len(name.encode()) > MAX_NAME_BYTES:
        raise InputError(f"tensor name of {len(name.encode())} bytes, at most {MAX_NAME_BYTES}", field=name)


def _string(text: str) -> bytes:
    raw = text.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(raw)) + raw


def _value(key: str, field: Field) -> bytes:
    try:
        if field.type is ValueType.STRING:
            return _string(field.value)
        if field.type is not ValueType.ARRAY:
            return _scalars([field.value], field.type)
        assert field.item_type is not None
        head = struct.pack("<IQ", field.item_type, len(field.value))
        if field.item_type is ValueType.STRING:
            return head + b"".join(_string(item) for item in field.value)
        if field.item_type is ValueType.ARRAY:
            return head + b"".join(_value(key, item) for item in field.value)
        return head + _scalars(field.value, field.item_type)
    except (ValueError, TypeError, OverflowError, AttributeError) as error:
        raise InputError(
            f"metadata {key!r}: {field.value!r:.200} is not a {field.type.name}: {error}", field=key
        ) from error


def _scalars(values: Any, kind: ValueType) -> bytes:
    array = np.asarray(values)
    if kind is ValueType.BOOL:
        return (array != 0).astype(np.uint8).tobytes()
    return np.asarray(values, SCALAR_DTYPES[kind]).tobytes()
