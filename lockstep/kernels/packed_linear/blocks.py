"""Quantised blocks, as files hold them, straight into the kernel's order: what `pack_planes` of their planes gives, without
the planes.

Legend: N outputs, K inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lockstep.core.errors import FormatError, InputError
from lockstep.core.planes import QuantPlanes
from lockstep.core.tensors import QuantisedTensor
from lockstep.kernels import native
from lockstep.kernels.packed_linear import cpu
from lockstep.kernels.packed_linear.packing import allocate_layout, check_columns, pack_planes
from lockstep.kernels.packed_linear.weight import PackedWeight

_IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_FP4 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
_WIDE_SCALE, _WIDE_MINIMUM, _BAD_SCALE, _BAD_MINIMUM = 1, 2, 4, 8


@dataclass(frozen=True)
class BlockFormat:
    """What the packed form of a block format is."""

    weights: int
    """Of a block."""
    block_bytes: int
    group: int
    format: str
    offset: int
    minimum: bool = False
    table: tuple[int, ...] | None = None


BLOCKS: dict[str, BlockFormat] = {
    "Q4_0": BlockFormat(32, 18, 32, "int4", 8),
    "Q4_1": BlockFormat(32, 20, 32, "int4", 0, minimum=True),
    "Q5_0": BlockFormat(32, 22, 32, "int8", 128),
    "Q5_1": BlockFormat(32, 24, 32, "int8", 128, minimum=True),
    "Q8_0": BlockFormat(32, 34, 32, "int8", 128),
    "Q2_K": BlockFormat(256, 84, 16, "int4", 8, minimum=True),
    "Q3_K": BlockFormat(256, 110, 16, "int4", 8),
    "Q4_K": BlockFormat(256, 144, 32, "int4", 0, minimum=True),
    "Q5_K": BlockFormat(256, 176, 32, "int8", 128, minimum=True),
    "Q6_K": BlockFormat(256, 210, 16, "int8", 128),
    "IQ4_NL": BlockFormat(32, 18, 32, "int4", 8, table=_IQ4),
    "IQ4_XS": BlockFormat(256, 136, 32, "int4", 8, table=_IQ4),
    "MXFP4": BlockFormat(32, 17, 32, "int4", 8, table=_FP4),
}
"""In the order of LsBlock of csrc/lockstep.h."""


def pack_blocks(parts: Sequence[QuantisedTensor]) -> PackedWeight:
    """Lay out matrices of one block format that read the same input, one below the other.

    Raises:
        InputError: no parts; parts of different formats or widths; scales or minima that are not finite.
        FormatError: rows whose size is not that of their blocks.
        ConfigError: K not a multiple of 32 and of the format's group.
    """
    if not parts:
        raise InputError("no matrices to pack; pass at least one", field="parts")
    first = parts[0]
    for part in parts:
        if part.kind != first.kind or part.shape[1] != first.shape[1]:
            raise InputError(
                f"{part.kind} of {part.shape[1]} inputs beside {first.kind} of {first.shape[1]}; expected one format and "
                "one width",
                field="parts",
            )
    known = BLOCKS.get(first.kind)
    if known is None or not native.usable():
        return pack_planes(joined([part.planes().for_kernels() for part in parts]))
    num_inputs = first.shape[1]
    check_columns(num_inputs, known.group)
    rows_N = torch.cat([_addresses(part, known) for part in parts])
    block = list(BLOCKS).index(first.kind)
    found = cpu.scan_blocks(block, rows_N, num_inputs)
    for bit, name in ((_BAD_SCALE, "scale"), (_BAD_MINIMUM, "minimum")):
        if found & bit:
            raise InputError(f"the {name} plane holds NaN or infinity; the file is damaged", field=name)
    layout: dict[str, Any] = {
        "format": known.format,
        "num_outputs": rows_N.shape[0],
        "num_inputs": num_inputs,
        "group": known.group,
        "scale_bytes": 4 if found & _WIDE_SCALE else 2,
        "minimum_bytes": 0 if not known.minimum else 4 if found & _WIDE_MINIMUM else 2,
        "offset": known.offset,
        "table": known.table,
    }
    packed = allocate_layout(layout, torch.device("cpu"), None)
    cpu.pack_blocks(block, rows_N, packed)
    return packed


def joined(planes: Sequence[QuantPlanes]) -> QuantPlanes:
    """Planes of one format, one matrix below the other."""
    first = planes[0]
    minimums = [part.minimum_NB for part in planes if part.minimum_NB is not None]
    return QuantPlanes(
        codes_NK=torch.cat([part.codes_NK for part in planes]),
        scale_NB=torch.cat([part.scale_NB for part in planes]),
        minimum_NB=torch.cat(minimums) if minimums else None,
        group=first.group,
        bits=first.bits,
        table=first.table,
    )


def _addresses(part: QuantisedTensor, known: BlockFormat) -> Tensor:
    """int64 [N]: where each row begins. Good as long as `part.data` lives."""
    data = part.data
    row_bytes = part.shape[1] // known.weights * known.block_bytes
    if part.shape[1] % known.weights or data.shape != (part.shape[0], row_bytes) or data.strides[1] != 1:
        raise FormatError(f"{data.shape} bytes are not a {part.kind} matrix of {part.shape[0]} x {part.shape[1]}")
    return data.ctypes.data + torch.arange(part.shape[0]) * data.strides[0]
