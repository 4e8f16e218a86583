"""HDF5 files nobody vouches for. The library that reads them is C: it takes memory for the length that a damaged text states,
and walks a damaged heap for ever, so what it follows to texts is checked before it does.

Source: "HDF5 File Format Specification Version 3.0", III.E (global heap), IV.A.2.b, d and m (messages of dataspace, datatype
and attribute).
"""

from __future__ import annotations

import io
import re
import struct
from pathlib import Path
from typing import Any

from lockstep.core.errors import FormatError
from lockstep.core.extras import require

VARIABLE_LENGTH, ELEMENT, OBJECT = 9, 16, 16
"""A class of datatypes; the bytes of its elements, which are a length of four, a heap's address of eight and a number of four;
those in front of an object in a heap, and of a heap's first object."""


class HDF5:
    """An open file; `root` is its root group, of h5py.

    Raises:
        FormatError: it is no HDF5 file, or its heap is damaged.
        MissingExtraError: h5py is not installed.
    """

    def __init__(self, content: bytes, path: Path) -> None:
        h5py = require("h5py", extra="keras")
        self.content, self.path = content, path
        try:
            self.root: Any = h5py.File(io.BytesIO(content), "r")
        except Exception as error:  # the HDF5 library's errors have no common root
            raise FormatError(f"is no HDF5 file of Keras, or is damaged: {error}", path=str(path)) from error
        check_heaps(content, path)

    def attribute(self, owner: Any, name: str) -> Any:
        """Of a group; None where there is none.

        Raises:
            FormatError: a text of it is longer than the file. Other damage: errors of h5py.
        """
        if name not in owner.attrs:
            return None
        if owner.attrs.get_id(name).dtype.kind == "O":
            longest = longest_text(self.content, name)
            if longest > len(self.content):
                raise FormatError(f"its attribute {name} states a text of {longest} bytes", path=str(self.path))
        return owner.attrs[name]


def check_heaps(content: bytes, path: Path) -> None:
    """Refuse global heaps, which hold texts of variable length, whose objects do not fill them one behind the other.

    Raises:
        FormatError: naming the byte.
    """
    for found in re.finditer(b"GCOL\x01", content):
        size = int.from_bytes(content[found.start() + 8 : found.start() + 16], "little")
        at, end = found.start() + OBJECT, found.start() + size
        if end > len(content):
            raise FormatError(f"a heap of {size} bytes goes past the end", path=str(path), offset=found.start())
        while end - at >= OBJECT:
            index, _, length = struct.unpack_from("<H6sQ", content, at)
            # Object 0 is the free space up to the end, and states its size with its own header.
            step = length if index == 0 else OBJECT + -(-length // 8) * 8
            if step < OBJECT or at + step > end:
                raise FormatError(f"an object of {length} bytes in a heap of {size}", path=str(path), offset=at)
            at += step


def longest_text(content: bytes, name: str) -> int:
    """The largest length in bytes that attributes of this name state for texts of variable length, 0 where there is none.

    Args:
        content: an HDF5 file.
        name: of the attributes; each stands in its message.

    >>> longest_text(b"no attribute", "model_config")
    0
    """
    text = name.encode() + b"\0"
    longest = 0
    for found in re.finditer(re.escape(text), content):
        # Version -> bytes in front of the name; what follows it is padded to eight bytes in version 1.
        for version, before in {1: 8, 2: 8, 3: 9}.items():
            at, step = found.start() - before, 8 if version == 1 else 1
            if at < 0 or content[at] != version or len(content) < at + 8:
                continue
            sizes = struct.unpack_from("<3H", content, at + 2)
            ends = [found.start()]
            for size in sizes:
                ends.append(ends[-1] + -(-size // step) * step)
            kind, space, data = ends[1:]
            if sizes[0] == len(text) and len(content) > data and content[kind] & 0x0F == VARIABLE_LENGTH:
                unit = int.from_bytes(content[kind + 12 : kind + 16], "little")
                lengths = [
                    int.from_bytes(content[data + ELEMENT * i : data + ELEMENT * i + 4], "little")
                    for i in range(_num_elements(content, space, (len(content) - data) // ELEMENT))
                ]
                longest = max([longest, *(length * max(unit, 1) for length in lengths)])
    return longest


def _num_elements(content: bytes, space: int, most: int) -> int:
    """Of a dataspace message; at most so many."""
    dims = space + (8 if content[space] == 1 else 4)
    num = 1
    for axis in range(content[space + 1]):
        num *= int.from_bytes(content[dims + 8 * axis : dims + 8 * axis + 8], "little")
    return min(num, most)
