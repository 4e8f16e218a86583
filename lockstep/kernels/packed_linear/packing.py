"""Matrices into the kernel's order and back, in plain torch; the layout is told in `weight.py`.

Legend: N outputs, K inputs, X experts, B groups of a row, P panels, G group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lockstep.core.errors import ConfigError, InputError, unknown_name
from lockstep.core.planes import QuantPlanes
from lockstep.kernels import native
from lockstep.kernels.packed_linear import cpu
from lockstep.kernels.packed_linear.weight import FORMATS, GROUPS, ROW_BLOCK, PackedWeight

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HUGE_PAGE = 2 << 20
HUGE_FROM = 1 << 19  # below half a page of 2 MB the rounding up costs more memory than the page brings
HALF_MIN, HALF_MAX = 1e-6, 65504.0  # scales within are kept as fp16: below, too few bits are left


def pack(weight_NK: Tensor, format: str, group: int = 32, *, into: PackedWeight | None = None) -> PackedWeight:
    """Lay out a matrix for `packed_linear`, quantising it for "int8" and "int4".

    Args:
        weight_NK: float32, bfloat16 or float16; N outputs, K inputs.
        format: "fp32", "bf16" (rounded to nearest even), "int8" or "int4" (symmetric: code * scale, the scale of a group
            chosen so that its value of largest magnitude is -128 or -8, rounded to fp16 where that keeps enough bits).
        group: 32, 64 or 128 inputs share a scale; ignored by fp32 and bf16.
        into: an earlier result of the same format and shape, whose memory is written again.

    Returns:
        The packed matrix; 4, 2, 1 + 2/group or 0.5 + 2/group bytes a weight.

    Raises:
        ConfigError: unknown format; group that is not one of the three or does not divide K; K not a multiple of 32
            for a quantised format; `into` of another layout.
        InputError: wrong shape or dtype; a NaN or infinity where the format has none.
    """
    _check_matrix(weight_NK)
    if format not in FORMATS:
        raise ConfigError(unknown_name("weight format", format, FORMATS))
    if format in ("fp32", "bf16"):
        return _pack_float(weight_NK.detach(), format, into)
    if group not in GROUPS[1:]:
        raise ConfigError(f"group={group} for {format}; use 32, 64 or 128")
    return pack_planes(quantise(weight_NK.detach(), 8 if format == "int8" else 4, group), into=into)


def quantise(weight_NK: Tensor, bits: int, group: int) -> QuantPlanes:
    """Symmetric codes of `bits` bits with one scale for `group` inputs; see `pack`.

    Raises:
        ConfigError: K is not a multiple of 32 and of the group.
        InputError: the matrix holds a NaN or an infinity.
    """
    num_outputs, num_inputs = weight_NK.shape
    check_columns(num_inputs, group)
    blocks = weight_NK.to(torch.float32).view(num_outputs, num_inputs // group, group)
    largest = torch.where(blocks.amax(-1) >= -blocks.amin(-1), blocks.amax(-1), blocks.amin(-1))
    if not bool(torch.isfinite(largest).all()):
        raise InputError(f"the weight holds NaN or infinity, which {bits}-bit codes cannot hold", field="weight")
    top = 1 << (bits - 1)
    scale = largest / -top
    if _fits_half(scale):
        scale = scale.to(torch.float16).to(torch.float32)
    inverse = torch.where(scale == 0.0, 0.0, 1.0 / scale)
    codes = torch.round(blocks * inverse.unsqueeze(-1)).clamp_(-top, top - 1).to(torch.int8)
    return QuantPlanes(codes_NK=codes.view(num_outputs, num_inputs), scale_NB=scale, group=group, bits=bits)


def pack_planes(planes: QuantPlanes, *, into: PackedWeight | None = None) -> PackedWeight:
    """Lay out codes, scales and minima of a quantised file. 4-bit codes stay 4 bits, others take a byte; scales and
    minima take 2 bytes where all of them are fp16 numbers, else 4.

    Raises:
        ConfigError: group or bits unknown; K not a multiple of 32 and of the group.
        InputError: planes whose shapes do not fit; codes out of range or not in the table; scales that are not finite.
    """
    codes = planes.codes_NK
    _check_planes(planes)
    num_outputs, num_inputs = codes.shape
    table, offset = planes.table, 128
    if planes.bits == 4:
        offset = 8
        if table is not None and all(b - a == 1 for a, b in pairwise(table)):
            offset, table = -table[0], None
        codes = _nibbles(codes, table, offset)
    else:
        table = None
    minimum = planes.minimum_NB
    layout: dict[str, Any] = {
        "format": "int4" if planes.bits == 4 else "int8",
        "num_outputs": num_outputs,
        "num_inputs": num_inputs,
        "group": planes.group,
        "scale_bytes": 2 if _is_half(planes.scale_NB) else 4,
        "minimum_bytes": 0 if minimum is None else 2 if _is_half(minimum) else 4,
        "offset": offset,
        "table": table,
    }
    packed = allocate_layout(layout, codes.device, into)
    units = packed.data.view(packed.num_panels, num_inputs // planes.group, packed.unit_bytes)
    stored = codes if planes.bits == 4 else (codes.to(torch.int16) + 128).to(torch.uint8)
    stored = _rows_to_panels(stored, 32)
    if planes.bits == 4:
        # [P, 32, B, G/8, high, 4] -> [P, B, G/8, 32, 4]
        parts = stored.view(packed.num_panels, 32, num_inputs // planes.group, planes.group // 8, 2, 4)
        stored = (parts[..., 0, :] | (parts[..., 1, :] << 4)).permute(0, 2, 3, 1, 4)
    else:
        stored = stored.view(packed.num_panels, 32, num_inputs // planes.group, planes.group // 4, 4)
        stored = stored.permute(0, 2, 3, 1, 4)
    units[..., : packed.code_bytes] = stored.reshape(*units.shape[:2], packed.code_bytes)
    end = packed.code_bytes + 32 * packed.scale_bytes
    units[..., packed.code_bytes : end] = _numbers_to_bytes(planes.scale_NB, packed.scale_bytes)
    if minimum is not None:
        units[..., end:] = _numbers_to_bytes(minimum, packed.minimum_bytes)
    return packed


def unpack(packed: PackedWeight) -> Tensor:
    """The matrix that `packed_linear` multiplies by: float32 [N, K], or [X, N, K] of a stack."""
    if packed.num_experts is not None:
        return torch.stack([unpack(packed.expert(x)) for x in range(packed.num_experts)])
    if packed.quantised:
        return planes_of(packed).dequantise()
    if packed.format == "fp32":
        values = packed.data.view(torch.float32).view(packed.num_panels, packed.num_inputs, 64).transpose(1, 2)
        return values.reshape(-1, packed.num_inputs)[: packed.num_outputs].contiguous()
    pairs = packed.data.view(torch.bfloat16).view(packed.num_panels, -1, 64, 2).transpose(1, 2).to(torch.float32)
    width = pairs.shape[2] * 2
    return pairs.reshape(-1, width)[: packed.num_outputs, : packed.num_inputs].contiguous()


def unpack_rows(packed: PackedWeight, first: int, last: int) -> Tensor:
    """Outputs first..last of `unpack`; `first` is a multiple of the panel."""
    panel_bytes = packed.expert_bytes // packed.num_panels
    from_panel, to_panel = first // packed.panel, -(-last // packed.panel)
    part = replace(
        packed, num_outputs=last - first, data=packed.data[from_panel * panel_bytes : to_panel * panel_bytes]
    )
    return unpack(part)


def unpack_some(packed: PackedWeight, rows_T: Tensor) -> Tensor:
    """Rows of `unpack` by number, in any order: float32 [T, K].

    Args:
        rows_T: int64.

    Raises:
        InputError: a number that is no row.
    """
    if rows_T.numel() and not 0 <= int(rows_T.min()) <= int(rows_T.max()) < packed.num_outputs:
        raise InputError(
            f"rows {int(rows_T.min())}..{int(rows_T.max())}; expected 0..{packed.num_outputs - 1}", field="rows"
        )
    if packed.data.is_cpu and native.usable():
        return cpu.unpack_some(packed, native.contiguous(rows_T))
    panels = packed.data.view(packed.num_panels, -1).index_select(0, rows_T // packed.panel)
    part = replace(packed, num_outputs=panels.shape[0] * packed.panel, data=panels.flatten())
    return unpack(part)[torch.arange(rows_T.shape[0], device=rows_T.device) * packed.panel + rows_T % packed.panel]


def planes_of(packed: PackedWeight) -> QuantPlanes:
    """Codes, scales and minima of a single quantised matrix."""
    num_groups = packed.num_inputs // packed.group
    units = packed.data.view(packed.num_panels, num_groups, packed.unit_bytes)
    stored = units[..., : packed.code_bytes]
    if packed.format == "int4":
        stored = stored.view(packed.num_panels, num_groups, packed.group // 8, 32, 4)
        stored = torch.stack([stored & 15, stored >> 4], dim=-2).permute(0, 3, 1, 2, 4, 5)
    else:
        stored = stored.view(packed.num_panels, num_groups, packed.group // 4, 32, 4).permute(0, 3, 1, 2, 4)
    stored = stored.reshape(-1, packed.num_inputs)[: packed.num_outputs]
    if packed.table is not None:
        codes = torch.tensor(packed.table, dtype=torch.int8, device=stored.device)[stored.to(torch.int64)]
    else:
        codes = (stored.to(torch.int16) - packed.offset).to(torch.int8)
    end = packed.code_bytes + 32 * packed.scale_bytes
    scale = _bytes_to_numbers(units[..., packed.code_bytes : end], packed.scale_bytes)[: packed.num_outputs]
    minimum = None
    if packed.minimum_bytes:
        minimum = _bytes_to_numbers(units[..., end:], packed.minimum_bytes)[: packed.num_outputs]
    bits = 4 if packed.format == "int4" else 8
    table = packed.table
    if bits == 4 and table is None and packed.offset != 8:
        table = tuple(range(-packed.offset, 16 - packed.offset))
    return QuantPlanes(codes_NK=codes, scale_NB=scale, minimum_NB=minimum, group=packed.group, bits=bits, table=table)


def stack(experts: Sequence[PackedWeight]) -> PackedWeight:
    """Several matrices of one layout as one, for `grouped_linear`.

    Raises:
        InputError: nothing to stack, or layouts that differ (format, shape, group, width of scales).
    """
    if not experts:
        raise InputError("no matrices to stack; pass at least one", field="experts")
    first = experts[0]
    for index, other in enumerate(experts):
        if other.num_experts is not None or not first.same_layout(other):
            raise InputError(
                f"expert {index} is {_describe(other)}, expert 0 is {_describe(first)}; a stack has one layout",
                field="experts",
            )
    data = allocate(first.expert_bytes * len(experts), first.data.device)
    torch.cat([expert.data for expert in experts], out=data)
    return first.like(data, len(experts))


def allocate(num_bytes: int, device: torch.device) -> Tensor:
    """uint8 [num_bytes]; from half a megabyte on at the start of a 2 MB page, which the system is asked to map whole:
    reading weights through pages of 4 KB leaves a quarter of the memory's speed unused."""
    if device.type != "cpu" or num_bytes < HUGE_FROM or not native.usable():
        return torch.empty(num_bytes, dtype=torch.uint8, device=device)
    whole = -(-num_bytes // HUGE_PAGE) * HUGE_PAGE
    memory = torch.empty(whole + HUGE_PAGE, dtype=torch.uint8)
    start = -memory.data_ptr() % HUGE_PAGE
    native.lib().ls_advise_huge_pages(memory.data_ptr() + start, whole)
    return memory[start : start + num_bytes]


def allocate_layout(layout: dict[str, Any], device: torch.device, into: PackedWeight | None) -> PackedWeight:
    """A matrix of this layout with memory to be written: that of `into`, or new."""
    blank = PackedWeight(**layout, data=torch.empty(0, dtype=torch.uint8))
    if into is None:
        return blank.like(allocate(blank.expert_bytes, device), None)
    if not blank.same_layout(into) or into.num_experts is not None or into.data.device != device:
        raise ConfigError(f"into is {_describe(into)}; the matrix packs as {_describe(blank)}")
    return into


def _pack_float(weight_NK: Tensor, format: str, into: PackedWeight | None) -> PackedWeight:
    num_outputs, num_inputs = weight_NK.shape
    layout = {"format": format, "num_outputs": num_outputs, "num_inputs": num_inputs}
    packed = allocate_layout(layout, weight_NK.device, into)
    if native.choose(weight_NK.new_empty(0, dtype=torch.float32)) == "cpu" and weight_NK.dtype != torch.float16:
        cpu.pack_float(native.contiguous(weight_NK), packed)
        return packed
    if format == "fp32":
        values = _rows_to_panels(weight_NK.to(torch.float32), 64)
        packed.data.view(torch.float32).view(packed.num_panels, num_inputs, 64).copy_(values.transpose(1, 2))
        return packed
    values = _rows_to_panels(functional.pad(weight_NK.to(torch.bfloat16), (0, num_inputs % 2)), 64)
    values = values.view(packed.num_panels, 64, -1, 2).transpose(1, 2)
    packed.data.view(torch.bfloat16).view(values.shape).copy_(values)
    return packed


def _rows_to_panels(rows: Tensor, panel: int) -> Tensor:
    """[N, K] -> [P, panel, K], zeros for outputs that are not there."""
    missing = -rows.shape[0] % panel
    if missing:
        rows = torch.cat([rows, rows.new_zeros(missing, rows.shape[1])])
    return rows.view(-1, panel, rows.shape[1])


def _numbers_to_bytes(numbers_NB: Tensor, width: int) -> Tensor:
    """[N, B] -> [P, B, 32 * width] bytes."""
    numbers = numbers_NB.to(torch.float16 if width == 2 else torch.float32)
    return _rows_to_panels(numbers, 32).transpose(1, 2).contiguous().view(torch.uint8)


def _bytes_to_numbers(stored: Tensor, width: int) -> Tensor:
    """[P, B, 32 * width] bytes -> float32 [P * 32, B]."""
    numbers = stored.contiguous().view(torch.float16 if width == 2 else torch.float32).to(torch.float32)
    return numbers.transpose(1, 2).reshape(-1, stored.shape[1])


def _nibbles(codes_NK: Tensor, table: tuple[int, ...] | None, offset: int) -> Tensor:
    place = torch.full((256,), 255, dtype=torch.uint8)
    for index in range(16):
        place[(index - offset if table is None else table[index]) & 0xFF] = index
    stored = place.to(codes_NK.device)[codes_NK.view(torch.uint8).to(torch.int64)]
    if stored.numel() and int(stored.max()) > 15:
        known = f"{-offset}..{15 - offset}" if table is None else str(table)
        raise InputError(f"4-bit planes hold codes outside {known}; give bits=8 or the format's table", field="codes")
    return stored


def _is_half(values: Tensor) -> bool:
    return bool(torch.equal(values.to(torch.float16).to(torch.float32), values))


def _fits_half(scale: Tensor) -> bool:
    size = scale.abs()
    return bool(((size == 0.0) | ((size >= HALF_MIN) & (size <= HALF_MAX))).all())


def _check_matrix(weight_NK: Tensor) -> None:
    if weight_NK.dim() != 2 or weight_NK.dtype not in FLOAT_DTYPES or 0 in weight_NK.shape:
        raise InputError(
            f"weight is {weight_NK.dtype} {list(weight_NK.shape)}; expected [outputs, inputs] of float32, bfloat16 or "
            "float16, neither of them 0",
            field="weight",
        )


def check_columns(num_inputs: int, group: int) -> None:
    """Raises ConfigError where a quantised matrix cannot have so many inputs."""
    if num_inputs % ROW_BLOCK or num_inputs % group:
        raise ConfigError(
            f"a quantised matrix of {num_inputs} inputs with group={group}: inputs must be a multiple of {ROW_BLOCK} and "
            "of the group; use a smaller group or keep this matrix in bf16"
        )


def _check_planes(planes: QuantPlanes) -> None:
    codes = planes.codes_NK
    if codes.dim() != 2 or codes.dtype != torch.int8 or 0 in codes.shape:
        raise InputError(f"codes are {codes.dtype} {list(codes.shape)}; expected int8 [outputs, inputs]", field="codes")
    if planes.group not in GROUPS or planes.bits not in (4, 8):
        raise ConfigError(f"planes of group={planes.group}, bits={planes.bits}; known: groups {GROUPS}, bits 4 and 8")
    if planes.table is not None and (len(planes.table) != 16 or not all(-128 <= v <= 127 for v in planes.table)):
        raise InputError(f"the table is {planes.table}; expected 16 numbers within -128..127", field="table")
    check_columns(codes.shape[1], planes.group)
    expected = (codes.shape[0], codes.shape[1] // planes.group)
    for name, numbers in (("scale", planes.scale_NB), ("minimum", planes.minimum_NB)):
        if numbers is None:
            continue
        if tuple(numbers.shape) != expected or numbers.dtype != torch.float32:
            raise InputError(
                f"{name} is {numbers.dtype} {list(numbers.shape)}; expected float32 {list(expected)}", field=name
            )
        if not bool(torch.isfinite(numbers).all()):
            raise InputError(f"the {name} plane holds NaN or infinity; the file is damaged", field=name)


def _describe(packed: PackedWeight) -> str:
    group = f" group {packed.group}" if packed.quantised else ""
    stacked = "" if packed.num_experts is None else f"{packed.num_experts} x "
    return (
        f"{stacked}{packed.format}{group} [{packed.num_outputs}, {packed.num_inputs}], scales of "
        f"{packed.scale_bytes} bytes, minima of {packed.minimum_bytes}"
    )
