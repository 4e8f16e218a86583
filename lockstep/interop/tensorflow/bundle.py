"""Checkpoints of TensorFlow (TF1 Saver V2, TF2, variables of a SavedModel): a sorted table of entries, and shards of numbers.

`NAME.index` is a table in the layout of LevelDB: blocks of key-value pairs with shared prefixes, an index block, a footer of 48
bytes. Each value is a message (1 element type, 2 shape, 3 shard, 4 offset, 5 size) about a stretch of
`NAME.data-0000i-of-0000n`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from lockstep.core.errors import FormatError
from lockstep.interop.wire import VARINT, Field, Wire, read_file

MAGIC = 0xDB4775248B80FB57
FOOTER = 48
MAX_INDEX_BYTES = 1 << 28
MAX_SHARDS = 1 << 12
MAX_KEY = 1 << 12

# DataType by number, with torch's words; 7 is text, which checkpoints keep of Python objects.
DTYPES: dict[int, torch.dtype] = {
    1: torch.float32,
    2: torch.float64,
    3: torch.int32,
    4: torch.uint8,
    5: torch.int16,
    6: torch.int8,
    9: torch.int64,
    10: torch.bool,
    14: torch.bfloat16,
    19: torch.float16,
}


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies: element type by number, shape, shard, first byte, number of bytes."""

    dtype: int
    shape: tuple[int, ...]
    shard: int
    offset: int
    size: int
    is_sliced: bool


def read_checkpoint(path: Path | str) -> dict[str, torch.Tensor]:
    """Tensors by name. Names of TF2 end in "/.ATTRIBUTES/VARIABLE_VALUE".

    Args:
        path: `NAME.index`, `NAME`, or the folder of a SavedModel.

    Raises:
        FormatError: damaged, a shard is missing, or a tensor that is stored in slices.
    """
    index = index_of(Path(path))
    entries, num_shards = _entries(read_file(index, MAX_INDEX_BYTES), str(index))
    tensors: dict[str, torch.Tensor] = {}
    for name, entry in entries.items():
        if entry.dtype not in DTYPES:
            continue  # text and resources
        if entry.is_sliced:
            raise FormatError(f"tensor {name!r} is stored in slices, which is not read", path=str(index))
        tensors[name] = _tensor(name, entry, _shard(index, entry, num_shards))
    if not tensors:
        raise FormatError("holds no tensors of numbers", path=str(index))
    return tensors


def check_checkpoint(path: Path | str) -> None:
    """Whether all that a checkpoint names is there; nothing but its index is read.

    Raises:
        FormatError: as `read_checkpoint`.
    """
    index = index_of(Path(path))
    entries, num_shards = _entries(read_file(index, MAX_INDEX_BYTES), str(index))
    for name, entry in entries.items():
        shard = _shard(index, entry, num_shards)
        if entry.dtype in DTYPES and not entry.is_sliced:
            _check_size(name, entry, shard)
        _check_place(name, entry, shard)


def _shard(index: Path, entry: Entry, num_shards: int) -> Path:
    return index.with_name(f"{index.name.removesuffix('.index')}.data-{entry.shard:05d}-of-{num_shards:05d}")


def index_of(path: Path) -> Path:
    """The `.index` file that a name means."""
    if path.is_dir():
        inner = path / "variables" if (path / "variables").is_dir() else path
        return inner / "variables.index"
    if path.suffix in (".index", ".meta"):
        return path.with_suffix(".index")
    stem = path.name.partition(".data-")[0]
    return path.with_name(f"{stem}.index")


def _check_size(name: str, entry: Entry, shard: Path) -> None:
    wanted = math.prod(entry.shape) * DTYPES[entry.dtype].itemsize
    if wanted != entry.size or min(entry.shape, default=0) < 0:
        raise FormatError(
            f"tensor {name!r} of shape {list(entry.shape)} is said to have {entry.size} bytes: damaged", path=str(shard)
        )


def _check_place(name: str, entry: Entry, shard: Path) -> None:
    if entry.offset < 0 or entry.size < 0:
        raise FormatError(
            f"tensor {name!r} is said to have {entry.size} bytes from {entry.offset}: damaged", path=str(shard)
        )
    try:
        size = shard.stat().st_size if entry.size else 0
    except OSError as error:
        raise FormatError(f"holds tensor {name!r} and cannot be read: {error}", path=str(shard)) from error
    if entry.size and entry.offset + entry.size > size:
        raise FormatError(
            f"tensor {name!r} lies beyond its end ({size} bytes): truncated", path=str(shard), offset=entry.offset
        )


def _tensor(name: str, entry: Entry, shard: Path) -> torch.Tensor:
    dtype = DTYPES[entry.dtype]
    _check_size(name, entry, shard)
    _check_place(name, entry, shard)
    if not entry.size:
        return torch.zeros(entry.shape, dtype=dtype)
    try:
        with shard.open("rb") as file:
            file.seek(entry.offset)
            raw = bytearray(file.read(entry.size))
    except OSError as error:
        raise FormatError(f"holds tensor {name!r} and cannot be read: {error}", path=str(shard)) from error
    return torch.frombuffer(raw, dtype=dtype).reshape(entry.shape)


def _entries(data: bytes, path: str) -> tuple[dict[str, Entry], int]:
    if len(data) < FOOTER or int.from_bytes(data[-8:], "little") != MAGIC:
        raise FormatError("is no table of a TensorFlow checkpoint, or is cut off", path=path)
    footer = Wire(data[-FOOTER:-8], path)
    at, numbers = 0, []
    for _ in range(4):
        number, at = footer.varint(at, len(footer.data))
        numbers.append(number)
    entries: dict[str, Entry] = {}
    num_shards = 0
    for _, handle in _pairs(_block(data, numbers[2], numbers[3], path), path):
        wire = Wire(handle, path)
        offset, end = wire.varint(0, len(handle))
        size, _ = wire.varint(end, len(handle))
        for key, value in _pairs(_block(data, offset, size, path), path):
            if not key:
                num_shards = _header(value, path)
                continue
            try:
                name = key.decode()
            except UnicodeDecodeError as error:
                raise FormatError(f"the name {key[:40]!r} is no text: damaged", path=path) from error
            entries[name] = _entry(value, path)
    if not 0 < num_shards <= MAX_SHARDS:
        raise FormatError(f"says it has {num_shards} shards: damaged", path=path)
    return entries, num_shards


def _block(data: bytes, offset: int, size: int, path: str) -> bytes:
    """The content of a block, which a byte of its compression follows."""
    if offset + size + 5 > len(data):
        raise FormatError("a block lies beyond its end: truncated", path=path, offset=offset)
    if data[offset + size] != 0:
        raise FormatError("a block is compressed, which checkpoints are not", path=path, offset=offset)
    return data[offset : offset + size]


def _pairs(block: bytes, path: str) -> Iterator[tuple[bytes, bytes]]:
    """Keys with values. Each key says how much of the one before it shares; the block ends in restart points."""
    num_restarts = int.from_bytes(block[-4:], "little") if len(block) >= 4 else 0
    end = len(block) - 4 * (num_restarts + 1)
    if end < 0:
        raise FormatError(f"a block has {num_restarts} restarts in {len(block)} bytes: damaged", path=path)
    wire, at, key = Wire(block, path), 0, b""
    while at < end:
        shared, at = wire.varint(at, end)
        own, at = wire.varint(at, end)
        length, at = wire.varint(at, end)
        if shared > len(key) or shared + own > MAX_KEY or at + own + length > end:
            raise FormatError("a key or value goes beyond its block: damaged", path=path)
        key = key[:shared] + block[at : at + own]
        at += own
        yield key, block[at : at + length]
        at += length


def _header(value: bytes, path: str) -> int:
    wire, num = Wire(value, path), 0
    for field in wire.fields():
        if field.number == 1 and field.kind == VARINT:
            num = field.value
        elif field.number == 2 and field.kind == VARINT and field.value:
            raise FormatError("is big-endian, which is not read", path=path)
    return num


def _entry(value: bytes, path: str) -> Entry:
    wire, numbers, is_sliced = Wire(value, path), {1: 0, 3: 0, 4: 0, 5: 0}, False
    shape: list[int] = []
    for field in wire.fields():
        if field.number in numbers and field.kind == VARINT:
            numbers[field.number] = wire.integer(field)
        elif field.number == 2:
            shape = _shape(wire, field)
        elif field.number == 7:
            is_sliced = True
    return Entry(numbers[1], tuple(shape), numbers[3], numbers[4], numbers[5], is_sliced)


def _shape(wire: Wire, field: Field) -> list[int]:
    shape = []
    for dim in wire.fields(field):
        if dim.number == 2:
            sizes = [wire.integer(part) for part in wire.fields(dim) if part.number == 1]
            shape.append(sizes[-1] if sizes else 0)
    return shape
