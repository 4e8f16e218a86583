"""Tensors of PaddlePaddle: `.pdparams` (a pickle of arrays) and `.pdiparams` (one tensor after another), without Paddle."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lockstep.core.errors import FormatError
from lockstep.interop.pickles import load_pickle
from lockstep.interop.wire import VARINT, Wire, read_file

MAX_BYTES = 1 << 34
NAMES_KEY = "StructuredToParameterName@@"
"""Entry of a `.pdparams` that maps attribute paths to the names that programs use."""

# VarType.Type by number, with torch's words.
DTYPES: dict[int, torch.dtype] = {
    0: torch.bool,
    1: torch.int16,
    2: torch.int32,
    3: torch.int64,
    4: torch.float16,
    5: torch.float32,
    6: torch.float64,
    20: torch.uint8,
    21: torch.int8,
    22: torch.bfloat16,
}


def read_pdparams(path: Path | str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """(tensors by attribute path, attribute path -> name in programs).

    Raises:
        FormatError: damaged, or its pickle names more than arrays.
    """
    path = Path(path)
    value = load_pickle(read_file(path, MAX_BYTES), str(path), hint="save weights alone: paddle.save(net.state_dict())")
    if not isinstance(value, Mapping):
        raise FormatError(f"holds a {type(value).__name__}; a dictionary of weights was expected", path=str(path))
    names = value.get(NAMES_KEY, {})
    tensors = {}
    for key, item in value.items():
        # Paddle 2.0 kept each tensor as (name, array).
        array = item[1] if isinstance(item, tuple) and len(item) == 2 else item
        if isinstance(array, np.ndarray) and array.dtype.kind in "biuf":
            tensors[str(key)] = torch.from_numpy(np.array(array, order="C"))
    if not tensors:
        raise FormatError("holds no arrays", path=str(path))
    named = {str(k): str(v) for k, v in names.items()} if isinstance(names, Mapping) else {}
    return tensors, named


def read_pdiparams(path: Path, names: Sequence[str], *, program: Path) -> dict[str, torch.Tensor]:
    """Tensors in the order of `names`, which the file does not hold; they are of `program`.

    Raises:
        FormatError: damaged, or another number of tensors.
    """
    data = memoryview(read_file(path, MAX_BYTES))
    tensors: dict[str, torch.Tensor] = {}
    at = 0
    for name in names:
        if at >= len(data):
            raise FormatError(
                f"ends before tensor {name!r} of {program}: truncated, or not of this program",
                path=str(path),
                offset=at,
            )
        tensors[name], at = _tensor(data, at, name, str(path))
    if at != len(data):
        raise FormatError(
            f"goes on after the {len(tensors)} tensors of {program}: not of this program", path=str(path), offset=at
        )
    return tensors


def _tensor(data: memoryview, at: int, name: str, path: str) -> tuple[torch.Tensor, int]:
    begin = at

    def fail(reason: str) -> FormatError:
        return FormatError(f"tensor {name!r}: {reason}", path=path, offset=begin)

    def take(form: str) -> Any:
        nonlocal at
        size = struct.calcsize(form)
        if at + size > len(data):
            raise fail("truncated")
        (value,) = struct.unpack_from(form, data, at)
        at += size
        return value

    version, levels = take("<I"), take("<Q")
    if version != 0 or levels > 8:
        raise fail(f"version {version} with {levels} levels of ragged offsets; version 0 was expected")
    for _ in range(levels):
        size = take("<Q")
        if size > len(data) - at:
            raise fail("truncated")
        at += size
    if take("<I") != 0:
        raise fail("of an unknown version")
    length = take("<i")
    if not 0 < length <= min(1 << 12, len(data) - at):
        raise fail(f"a description of {length} bytes")
    number, dims = _description(data[at : at + length], path)
    at += length
    if number not in DTYPES or any(n < 0 for n in dims):
        raise fail(f"element type {number} and shape {dims}")
    dtype, count = DTYPES[number], math.prod(dims)
    if count * dtype.itemsize > len(data) - at:
        raise fail(f"shape {dims} needs more bytes than are left: truncated")
    end = at + count * dtype.itemsize
    flat = torch.frombuffer(bytearray(data[at:end]), dtype=dtype) if count else torch.zeros(0, dtype=dtype)
    return flat.reshape(dims), end


def _description(data: memoryview, path: str) -> tuple[int, list[int]]:
    wire = Wire(data, path)
    number, dims = -1, []
    for field in wire.fields():
        if field.number == 1 and field.kind == VARINT:
            number = wire.integer(field)
        elif field.number == 2:
            dims += wire.integers(field)
    return number, dims
