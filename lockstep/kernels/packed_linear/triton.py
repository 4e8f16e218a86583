"""Products with packed matrices on a GPU: 16 rows and one panel of outputs are one program, which walks all inputs in order.
The number of rows chooses how many programs there are and nothing else.

Legend: M rows, N outputs, K inputs, B groups of a row, X experts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lockstep.kernels.packed_linear.naive import quantise_rows
from lockstep.kernels.packed_linear.weight import KIND_BF16, KIND_BYTES, KIND_TABLE, ROW_BLOCK, PackedWeight

_ROWS = 16  # the fewest that tensor cores take; more for many rows would be faster and another order inside a tile
_STEP = 32


@triton.jit
def _floats(
    x, w, bias, y, num_rows, num_outputs, num_inputs, HAS_BIAS: tl.constexpr, PAIRS: tl.constexpr, WIDEN: tl.constexpr,
    ROWS: tl.constexpr, STEP: tl.constexpr, PANEL: tl.constexpr
):  # fmt: skip
    panel = tl.program_id(0).to(tl.int64)
    rows = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    lane, step = tl.arange(0, PANEL), tl.arange(0, STEP)
    column, here = panel * PANEL + lane, rows < num_rows
    acc = tl.zeros([ROWS, PANEL], dtype=tl.float32)
    if HAS_BIAS:
        acc += tl.load(bias + column, mask=column < num_outputs, other=0.0)[None, :]
    if PAIRS:
        base = w + panel * ((num_inputs + 1) // 2) * 2 * PANEL
        for start in range(0, num_inputs, STEP):
            k = start + step
            inside = k < num_inputs
            place = x + rows[:, None] * num_inputs + k[None, :]
            part = tl.load(place, mask=here[:, None] & inside[None, :], other=0.0)
            place = base + (k // 2 * PANEL)[:, None] * 2 + lane[None, :] * 2 + (k % 2)[:, None]
            weight = tl.load(place, mask=inside[:, None], other=0.0)
            if WIDEN:
                acc = tl.dot(part.to(tl.float32), weight.to(tl.float32), acc, input_precision="ieee")
            else:
                acc = tl.dot(part, weight, acc)
    else:
        # Tensor cores have no float32 of full precision: one input after the other, the reference's chain.
        base = w + panel * num_inputs * PANEL
        for k in range(num_inputs):
            part = tl.load(x + rows * num_inputs + k, mask=here, other=0.0)
            weight = tl.load(base + k * PANEL + lane)
            acc = tl.fma(part[:, None] + tl.zeros_like(acc), weight[None, :] + tl.zeros_like(acc), acc)
    wanted = here[:, None] & (column < num_outputs)[None, :]
    tl.store(y + rows[:, None] * num_outputs + column[None, :], acc, mask=wanted)


@triton.jit
def _integers(
    x, row_scale, row_sum, w, numbers, table, bias, y, num_rows, num_outputs, num_inputs, group, unit_bytes, code_bytes,
    offset, HAS_BIAS: tl.constexpr, NIBBLES: tl.constexpr, HAS_TABLE: tl.constexpr, SCALE_BYTES: tl.constexpr,
    MINIMUM_BYTES: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, STEP: tl.constexpr, PANEL: tl.constexpr
):  # fmt: skip
    # numbers: the same bytes as float16 where SCALE_BYTES or MINIMUM_BYTES is 2; `table`: float32 view of them, then the
    # 16 values of a table; see `_views`.
    panel = tl.program_id(0).to(tl.int64)
    rows = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    lane, step = tl.arange(0, PANEL), tl.arange(0, STEP)
    column, here = panel * PANEL + lane, rows < num_rows
    acc = tl.zeros([ROWS, PANEL], dtype=tl.float32)
    if HAS_BIAS:
        acc += tl.load(bias + column, mask=column < num_outputs, other=0.0)[None, :]
    for start in range(0, num_inputs, WIDTH):
        k = start + step
        inside = step < WIDTH
        unit = (panel * (num_inputs // group) + start // group) * unit_bytes
        g = k % group
        part = tl.load(x + rows[:, None] * num_inputs + k[None, :], mask=here[:, None] & inside[None, :], other=0)
        if NIBBLES:
            place = (g // 8 * PANEL)[:, None] * 4 + lane[None, :] * 4 + (g % 4)[:, None]
            stored = tl.load(w + unit + place, mask=inside[:, None], other=0).to(tl.int32)
            stored = (stored >> ((g % 8) // 4 * 4)[:, None]) & 15
        else:
            place = (g // 4 * PANEL)[:, None] * 4 + lane[None, :] * 4 + (g % 4)[:, None]
            stored = tl.load(w + unit + place, mask=inside[:, None], other=0).to(tl.int32)
        if HAS_TABLE:
            code = tl.load(table + stored).to(tl.int8)
        else:
            code = (stored - offset).to(tl.int8)
        dot = tl.dot(part, tl.where(inside[:, None], code, 0).to(tl.int8), out_dtype=tl.int32).to(tl.float32)
        scale = tl.load(numbers + (unit + code_bytes) // SCALE_BYTES + lane).to(tl.float32)
        block = rows * (num_inputs // 32) + start // 32
        by = tl.load(row_scale + block, mask=here, other=0.0)
        acc = tl.fma(dot, scale[None, :] * by[:, None], acc)
        if MINIMUM_BYTES > 0:
            total = tl.load(row_sum + rows * (num_inputs // WIDTH) + start // WIDTH, mask=here, other=0.0)
            low = tl.load(numbers + (unit + code_bytes + PANEL * SCALE_BYTES) // MINIMUM_BYTES + lane).to(tl.float32)
            acc = tl.fma(tl.broadcast_to(low[None, :], (ROWS, PANEL)), (by * total)[:, None] + tl.zeros_like(acc), acc)
    wanted = here[:, None] & (column < num_outputs)[None, :]
    tl.store(y + rows[:, None] * num_outputs + column[None, :], acc, mask=wanted)


def packed_linear(x_MK: Tensor, packed: PackedWeight, bias_N: Tensor | None) -> Tensor:
    """See `lockstep.kernels.packed_linear`; floats are summed 32 inputs at a time, in rising order."""
    x, num_rows = x_MK.detach().contiguous(), x_MK.shape[0]
    y = x.new_empty(num_rows, packed.num_outputs)
    if num_rows == 0:
        return y
    bias = x if bias_N is None else bias_N.detach().contiguous()
    grid = (packed.num_panels, triton.cdiv(num_rows, _ROWS))
    sizes = (num_rows, packed.num_outputs, packed.num_inputs)
    shape = {"HAS_BIAS": bias_N is not None, "ROWS": _ROWS, "STEP": _STEP, "PANEL": packed.panel}
    if not packed.quantised:
        pairs = packed.kind == KIND_BF16
        weight = packed.data.view(torch.bfloat16 if pairs else torch.float32)
        # The interpreter has no product of bfloat16 numbers.
        rows = x.to(torch.bfloat16) if pairs else x
        _floats[grid](rows, weight, bias, y, *sizes, PAIRS=pairs, WIDEN=not x.is_cuda, **shape)
        return y
    if packed.minimum_bytes not in (0, packed.scale_bytes):
        # Scales and minima of two widths would need two views of the bytes; files that mix them are rare.
        packed = _same_width(packed)
    width = min(packed.group, ROW_BLOCK)
    codes, scale = quantise_rows(x)
    sums = codes.view(num_rows, -1, width).sum(-1)
    numbers = packed.data.view(torch.float16 if packed.scale_bytes == 2 else torch.float32)
    table = torch.tensor(packed.table or (0,) * 16, dtype=torch.int32, device=x.device)
    _integers[grid](
        *(
            codes.to(torch.int8).view(num_rows, -1),
            scale.contiguous(),
            sums,
            packed.data,
            numbers,
            table,
            bias,
            y,
            *sizes,
        ),
        *(packed.group, packed.unit_bytes, packed.code_bytes, packed.offset),
        NIBBLES=packed.kind != KIND_BYTES,
        HAS_TABLE=packed.kind == KIND_TABLE,
        SCALE_BYTES=packed.scale_bytes,
        MINIMUM_BYTES=packed.minimum_bytes,
        WIDTH=width,
        **shape,
    )
    return y


def grouped_linear(x_MK: Tensor, experts: list[PackedWeight], starts: list[int], bias_XN: Tensor | None) -> Tensor:
    """See `lockstep.kernels.grouped_linear`; a launch for each expert that has rows."""
    parts = [
        packed_linear(x_MK[first:last], expert, None if bias_XN is None else bias_XN[index])
        for index, (expert, first, last) in enumerate(zip(experts, starts[:-1], starts[1:], strict=True))
    ]
    return torch.cat(parts)


def _same_width(packed: PackedWeight) -> PackedWeight:
    """Scales and minima as 4 bytes each, the same numbers."""
    units = packed.data.view(packed.num_panels, packed.num_inputs // packed.group, packed.unit_bytes)
    end = packed.code_bytes + packed.panel * packed.scale_bytes
    wide = [
        units[..., a:b].contiguous().view(torch.float16 if size == 2 else torch.float32).to(torch.float32)
        for a, b, size in (
            (packed.code_bytes, end, packed.scale_bytes),
            (end, packed.unit_bytes, packed.minimum_bytes),
        )
    ]
    data = torch.cat([units[..., : packed.code_bytes], *(x.contiguous().view(torch.uint8) for x in wide)], dim=-1)
    return PackedWeight(
        format=packed.format,
        num_outputs=packed.num_outputs,
        num_inputs=packed.num_inputs,
        group=packed.group,
        scale_bytes=4,
        minimum_bytes=4,
        offset=packed.offset,
        table=packed.table,
        data=data.flatten(),
    )
