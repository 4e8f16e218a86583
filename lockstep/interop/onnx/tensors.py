"""Tensors of ONNX files: every storage form, sizes checked before anything is allocated."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lockstep.core.errors import FormatError
from lockstep.core.extras import require
from lockstep.models.graph.ops.cast import DTYPES, STRING

MAX_BYTES = 2**31
"""Largest tensor that a file may declare without carrying its bytes."""

DTYPE_WORDS = {number: str(dtype).removeprefix("torch.") for number, dtype in DTYPES.items()} | {STRING: "str"}
BITS = {21: 4, 22: 4, 23: 4, 24: 8, 25: 2, 26: 2}


def tensor_of(proto: Any, folder: Path, *, path: str) -> torch.Tensor | np.ndarray:
    """A TensorProto as torch tensor, of strings as an array of objects.

    Args:
        folder: where files of external data lie.
        path: for messages.

    Raises:
        FormatError: negative or too large sizes, too few bytes, an unknown type, external data that is missing.
    """
    helper = require("onnx.numpy_helper", extra="onnx")
    name, dims = proto.name or "without a name", list(proto.dims)
    if any(n < 0 for n in dims):
        raise FormatError(f"tensor {name!r} has the shape {dims}", path=path)
    count = math.prod(dims)
    if proto.data_location == 1:
        return _external(proto, folder, count, path)
    if count > MAX_BYTES:
        raise FormatError(f"tensor {name!r} of shape {dims} is too large for a file of this kind", path=path)
    _check_length(proto, count, name, path)
    try:
        array = helper.to_array(proto)
    except (ValueError, TypeError, KeyError, RuntimeError, AttributeError, OverflowError) as error:
        raise FormatError(f"tensor {name!r} of shape {dims}: {error}", path=path) from error
    return from_array(array)


def from_array(array: np.ndarray) -> torch.Tensor | np.ndarray:
    """A NumPy array of any of ONNX's element types as tensor (strings: as array of str objects)."""
    if array.dtype.kind in "OSU":
        return array.astype(object)
    name = array.dtype.name
    if name in ("bfloat16", "float16") and name == "bfloat16":
        return torch.from_numpy(np.array(array).view(np.int16)).view(torch.bfloat16)
    if name.startswith("float8_e8m0"):
        return torch.from_numpy(np.array(array).view(np.uint8)).view(torch.float8_e8m0fnu)
    if name.startswith("float8"):
        return torch.from_numpy(np.array(array).view(np.uint8)).view(torch.__dict__[name])
    if name in ("int4", "int2"):
        return torch.from_numpy(array.astype(np.int8))
    if name in ("uint4", "uint2"):
        return torch.from_numpy(array.astype(np.uint8))
    if name.startswith("float4"):
        return torch.from_numpy(array.astype(np.float32))
    return torch.from_numpy(np.array(array, order="C"))


def to_array(tensor: torch.Tensor) -> np.ndarray:
    """Bytes of a tensor in C order, for writing back."""
    flat = tensor.detach().cpu().contiguous()
    return flat.reshape(-1).view(torch.uint8).numpy() if flat.numel() else np.zeros(0, np.uint8)


def _check_length(proto: Any, count: int, name: str, path: str) -> None:
    if proto.data_type == STRING:
        have, need = len(proto.string_data), count
    elif proto.data_type in DTYPES or proto.data_type in BITS:
        width = BITS.get(proto.data_type, 0) or DTYPES[proto.data_type].itemsize * 8
        if not proto.HasField("raw_data"):
            fields = (proto.float_data, proto.int32_data, proto.int64_data, proto.double_data, proto.uint64_data)
            have = max(len(field) for field in fields)
            need = -(-count // (8 // width)) if width < 8 else count * (2 if proto.data_type in (14, 15) else 1)
        else:
            have, need = len(proto.raw_data), -(-count * width // 8)
    else:
        raise FormatError(f"tensor {name!r} has the unknown element type {proto.data_type}", path=path)
    if have != need:
        raise FormatError(
            f"tensor {name!r} of shape {list(proto.dims)} has {have} of {need} elements or bytes", path=path
        )


def _external(proto: Any, folder: Path, count: int, path: str) -> torch.Tensor:
    where = {entry.key: entry.value for entry in proto.external_data}
    location = where.get("location", "")
    if not location or Path(location).is_absolute() or ".." in Path(location).parts:
        raise FormatError(
            f"tensor {proto.name!r} names the external file {location!r}; expected one beside it", path=path
        )
    file = folder / location
    if proto.data_type not in DTYPES:
        raise FormatError(f"tensor {proto.name!r} has an element type that no external file holds", path=path)
    dtype = DTYPES[proto.data_type]
    need = count * dtype.itemsize
    try:
        offset, length = int(where.get("offset", 0)), int(where.get("length", need))
        size = file.stat().st_size
    except (OSError, ValueError) as error:
        raise FormatError(
            f"tensor {proto.name!r}: external data {location!r} cannot be read: {error}", path=path
        ) from error
    if offset < 0 or length != need or offset + need > size:
        raise FormatError(
            f"tensor {proto.name!r} needs {need} bytes of {location!r}; it has {size} bytes in all and the entry says {length}",
            path=path,
            offset=max(offset, 0),
        )
    if not count:
        return torch.empty(tuple(proto.dims), dtype=dtype)
    with file.open("rb") as handle:
        handle.seek(offset)
        data = bytearray(handle.read(need))
    return torch.frombuffer(data, dtype=torch.uint8).view(dtype).reshape(tuple(proto.dims))
