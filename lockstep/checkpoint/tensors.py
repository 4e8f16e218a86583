"""Arrays on disk in the safetensors layout, streamed so that a replay buffer is never held twice.

File: 8-byte little-endian header length, JSON header padded with spaces to a multiple of 8, then the raw little-endian
bytes of every array in header order without holes. The library's own writer takes the bytes of all arrays at once and
does not tell their checksum; here each array's memory is handed to the file as it lies, and the checksum is taken on
the way. Any safetensors reader can open the result.
"""

from __future__ import annotations

import json
import os
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from lockstep.core.errors import CheckpointError

Array = torch.Tensor | np.ndarray

CHUNK_BYTES = 1 << 22

_TORCH_NAMES: dict[torch.dtype, str] = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.uint16: "U16",
    torch.int32: "I32",
    torch.uint32: "U32",
    torch.int64: "I64",
    torch.uint64: "U64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
}
_TORCH_DTYPES = {name: dtype for dtype, name in _TORCH_NAMES.items()}
_NUMPY_NAMES: dict[np.dtype, str] = {
    np.dtype("bool"): "BOOL",
    np.dtype("uint8"): "U8",
    np.dtype("int8"): "I8",
    np.dtype("int16"): "I16",
    np.dtype("uint16"): "U16",
    np.dtype("int32"): "I32",
    np.dtype("uint32"): "U32",
    np.dtype("int64"): "I64",
    np.dtype("uint64"): "U64",
    np.dtype("float16"): "F16",
    np.dtype("float32"): "F32",
    np.dtype("float64"): "F64",
    np.dtype("complex64"): "C64",
}
_NUMPY_DTYPES = {name: dtype for dtype, name in _NUMPY_NAMES.items()}


def dtype_name(array: Array) -> str | None:
    """The file format's name of the array's dtype, None if the format has none."""
    if isinstance(array, torch.Tensor):
        return _TORCH_NAMES.get(array.dtype)
    return _NUMPY_NAMES.get(array.dtype) if array.dtype.isnative else None


def write_tensors(path: Path, arrays: dict[str, Array]) -> tuple[int, int]:
    """Write `arrays` to `path` and flush them to the device.

    Arrays may have any layout and device; contiguous CPU ones are written from where they lie. Every dtype must have a
    `dtype_name`.

    Returns:
        (size in bytes, crc32 of the whole file).
    """
    assert sys.byteorder == "little", "the format is little-endian"
    # Widest elements first keeps every array aligned to its element size in a memory map.
    order = sorted(arrays, key=lambda name: -_element_bytes(arrays[name]))
    header: dict[str, dict[str, object]] = {}
    offset = 0
    for name in order:
        array = arrays[name]
        size = _num_bytes(array)
        header[name] = {"dtype": dtype_name(array), "shape": list(array.shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    crc = 0
    size = 0
    with path.open("wb") as file:
        for block in (len(text).to_bytes(8, "little"), text):
            file.write(block)
            crc = zlib.crc32(block, crc)
            size += len(block)
        for name in order:
            for block_view in _chunks(_as_bytes(arrays[name])):
                file.write(block_view)
                crc = zlib.crc32(block_view, crc)
                size += len(block_view)
        file.flush()
        os.fsync(file.fileno())
    return size, crc


def read_tensors(path: Path, kinds: dict[str, str], *, size: int, crc32: int) -> dict[str, Array]:
    """Read the file written by `write_tensors`, checking size and checksum.

    Args:
        path: the file.
        kinds: for every array its kind, "torch" or "numpy".
        size: expected bytes.
        crc32: expected checksum of the whole file.

    Raises:
        CheckpointError: the file is missing, truncated or damaged.
    """
    try:
        with path.open("rb") as file:
            got = os.fstat(file.fileno()).st_size
            if got != size:
                raise CheckpointError(f"{path}: {got} bytes, expected {size}: the file is truncated or was replaced")
            arrays, crc = _read_body(file, path, kinds)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    if crc != crc32:
        raise CheckpointError(f"{path}: checksum is {crc:08x}, expected {crc32:08x}: the content is damaged")
    return arrays


def _read_body(file: BinaryIO, path: Path, kinds: dict[str, str]) -> tuple[dict[str, Array], int]:
    size = os.fstat(file.fileno()).st_size
    prefix = file.read(8)
    header_bytes = int.from_bytes(prefix, "little")
    if header_bytes > size - 8:
        raise CheckpointError(f"{path}: header of {header_bytes} bytes in a file of {size}: the content is damaged")
    text = file.read(header_bytes)
    crc = zlib.crc32(text, zlib.crc32(prefix))
    arrays: dict[str, Array] = {}
    position = 0
    try:
        header = json.loads(text)
        if set(header) != set(kinds):
            raise CheckpointError(f"{path}: holds other arrays than state.json names: the content is damaged")
        for name, entry in header.items():
            start, end = entry["data_offsets"]
            shape = [int(n) for n in entry["shape"]]
            # Checked before memory is asked for: a damaged header must not lead to an absurd allocation.
            if start != position or not start <= end <= size - 8 - header_bytes or min(shape, default=0) < 0:
                raise CheckpointError(f"{path}: array {name!r} has offsets {start}..{end}: the content is damaged")
            raw = np.empty(end - start, np.uint8)
            crc = _fill(file, raw, crc)
            arrays[name] = _from_bytes(raw, entry["dtype"], shape, kinds[name])
            position = end
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, OverflowError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: malformed header ({error!r}): the content is damaged") from error
    if position != size - 8 - header_bytes:
        raise CheckpointError(f"{path}: {size - 8 - header_bytes - position} bytes belong to no array: damaged")
    return arrays, crc


def _fill(file: BinaryIO, raw: np.ndarray, crc: int) -> int:
    for chunk in _chunks(raw.data):
        filled = 0
        while filled < len(chunk):
            num_read = file.readinto(chunk[filled:])  # type: ignore[attr-defined]
            if not num_read:
                raise ValueError("end of file inside an array")
            filled += num_read
        crc = zlib.crc32(chunk, crc)
    return crc


def _chunks(view: memoryview) -> Iterator[memoryview]:
    for start in range(0, len(view), CHUNK_BYTES):
        yield view[start : start + CHUNK_BYTES]


def _element_bytes(array: Array) -> int:
    return array.element_size() if isinstance(array, torch.Tensor) else array.itemsize


def _num_bytes(array: Array) -> int:
    count = array.numel() if isinstance(array, torch.Tensor) else array.size
    return count * _element_bytes(array)


def _as_bytes(array: Array) -> memoryview:
    if isinstance(array, torch.Tensor):
        # resolve_conj/neg: a lazily conjugated tensor's memory is not its value.
        flat = array.detach().to("cpu").resolve_conj().resolve_neg().contiguous().reshape(-1)
        return flat.view(torch.uint8).numpy().data
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _from_bytes(raw: np.ndarray, dtype: str, shape: list[int], kind: str) -> Array:
    if kind == "torch":
        if raw.size == 0:  # the strides of empty memory cannot be reinterpreted
            return torch.empty(shape, dtype=_TORCH_DTYPES[dtype])
        return torch.from_numpy(raw).view(_TORCH_DTYPES[dtype]).reshape(shape)
    return raw.view(_NUMPY_DTYPES[dtype]).reshape(shape)
