"""Named tensors in shared memory, for a process on the same machine: a segment laid out as a safetensors file is.

    writer: with SharedTensors(tensors) as shared: tell the reader shared.name, wait for its answer
    reader: read_shared(name) -> tensors of its own

The writer owns the segment: it is gone when the writer leaves the context, and a reader holds nothing of it.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Mapping
from multiprocessing import resource_tracker
from multiprocessing.shared_memory import SharedMemory
from typing import Any

import torch
from torch import Tensor

from lockstep.core.errors import FormatError, InputError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_LENGTH = 8  # bytes of the header's length, little-endian


class SharedTensors:
    """A segment with copies of `tensors`; use as a context manager.

    Raises:
        InputError: nothing to share, or a dtype that the format has not.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        if not tensors:
            raise InputError("there are no tensors to share", field="tensors")
        header, end = {}, 0
        for name, tensor in tensors.items():
            if tensor.dtype not in _CODES:
                raise InputError(f"{name} is {tensor.dtype}; expected one of {', '.join(DTYPES)}", field=name)
            start, end = end, end + tensor.nbytes
            header[name] = {"dtype": _CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self._memory = SharedMemory(create=True, size=_LENGTH + len(text) + end)
        self.name = self._memory.name
        """What the reader is told."""
        buffer = self._memory.buf
        assert buffer is not None
        buffer[:_LENGTH] = len(text).to_bytes(_LENGTH, "little")
        buffer[_LENGTH : _LENGTH + len(text)] = text
        first = _LENGTH + len(text)
        for name, tensor in tensors.items():
            start, end = header[name]["data_offsets"]  # type: ignore[assignment]
            if start < end:
                into = torch.frombuffer(buffer, dtype=torch.uint8, count=end - start, offset=first + start)
                into.copy_(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8))
                del into  # a segment with views cannot be closed

    def __enter__(self) -> SharedTensors:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """The segment is gone."""
        self._memory.close()
        self._memory.unlink()


def read_shared(name: str) -> dict[str, Tensor]:
    """Copies of the tensors in another process' segment.

    Raises:
        InputError: there is no such segment.
        FormatError: it is not laid out as a safetensors file.
    """
    memory = _attach(name)
    try:
        return _read(memory, name)
    finally:
        memory.close()


def _attach(name: str) -> SharedMemory:
    if re.fullmatch(r"[\w.-]+", name) is None:
        raise InputError(f"{name[:80]!r} is no name of a shared memory segment", field="shared_memory")
    try:
        if sys.version_info >= (3, 13):
            return SharedMemory(name, track=False)
        memory = SharedMemory(name)
    except (OSError, ValueError) as error:
        raise InputError(f"there is no shared memory segment {name!r} ({error})", field="shared_memory") from error
    # Before Python 3.13 whoever opens a segment would remove it at its own end.
    resource_tracker.unregister(f"/{memory.name}", "shared_memory")
    return memory


def _read(memory: SharedMemory, name: str) -> dict[str, Tensor]:
    size, buffer = memory.size, memory.buf
    assert buffer is not None
    length = int.from_bytes(bytes(buffer[:_LENGTH]), "little") if size >= _LENGTH else -1
    first = _LENGTH + length
    if not 0 <= length <= size - _LENGTH:
        raise FormatError(f"has a header of {length} bytes in a segment of {size}", path=name)
    try:
        header = json.loads(bytes(buffer[_LENGTH:first]))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"has a header that is not JSON: {error}", path=name) from error
    if not isinstance(header, dict):
        raise FormatError("has a header that is no object", path=name)
    found: dict[str, Tensor] = {}
    for tensor, entry in header.items():
        if tensor != "__metadata__":
            dtype, shape, start, end = _entry(entry, tensor, size - first, name)
            empty = torch.empty(shape, dtype=dtype)
            if start < end:
                view = torch.frombuffer(buffer, dtype=torch.uint8, count=end - start, offset=first + start)
                empty.view(-1).view(torch.uint8).copy_(view)
                del view
            found[tensor] = empty
    return found


def _entry(entry: Any, tensor: str, size: int, name: str) -> tuple[torch.dtype, list[int], int, int]:
    """Dtype, shape and bytes of one tensor, checked against each other."""
    try:
        dtype, shape, (start, end) = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
        fits = all(isinstance(n, int) and n >= 0 for n in (*shape, start, end)) and start <= end <= size
        if not fits or math.prod(shape) * dtype.itemsize != end - start:
            raise ValueError(f"shape {shape} of {entry['dtype']} at bytes {start}..{end} of {size}")
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(f"tensor {tensor[:80]!r} is told wrongly: {error}", path=name) from error
    return dtype, shape, start, end
