"""Reference product with a packed matrix in plain torch, in the kernel's order of reduction.

Legend: M rows, N outputs, K inputs, B groups of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lockstep.kernels import native
from lockstep.kernels.mlp.naive import round_to_bf16
from lockstep.kernels.packed_linear.packing import planes_of, unpack
from lockstep.kernels.packed_linear.weight import ROW_BLOCK, PackedWeight

SMALLEST_ROW = 1e-36
"""A block of a row whose largest magnitude is below counts as zeros: 127 / 1e-37 is beyond float32."""


def packed_linear(x_MK: Tensor, packed: PackedWeight, bias_N: Tensor | None) -> Tensor:
    """See `lockstep.kernels.packed_linear`."""
    start = x_MK.new_zeros(x_MK.shape[0], packed.num_outputs)
    if bias_N is not None:
        start = start + bias_N
    if native.state.mode == "traceable":
        return x_MK @ unpack(packed).T + start
    if packed.quantised:
        return _quantised(x_MK, packed, start)
    weight = unpack(packed)
    if packed.format == "bf16":
        x_MK = round_to_bf16(x_MK)
    for k in range(packed.num_inputs):
        start = fma(x_MK[:, k : k + 1], weight[:, k], start)
    return start


def grouped_linear(x_MK: Tensor, experts: list[PackedWeight], starts: list[int], bias_XN: Tensor | None) -> Tensor:
    """See `lockstep.kernels.grouped_linear`."""
    parts = [
        packed_linear(x_MK[starts[x] : starts[x + 1]], expert, None if bias_XN is None else bias_XN[x])
        for x, expert in enumerate(experts)
    ]
    return torch.cat(parts)


def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """a b + c rounded once, but for the rare case in which rounding to float64 first decides a tie."""
    return (a.to(torch.float64) * b.to(torch.float64) + c.to(torch.float64)).to(torch.float32)


def quantise_rows(x_MK: Tensor) -> tuple[Tensor, Tensor]:
    """(integers in -127..127 as float32 [M, K/32, 32], scale [M, K/32]): value = integer * scale.

    A block that holds a NaN or an infinity becomes zeros with the scale NaN, so that whatever reads it is NaN.
    """
    blocks = x_MK.reshape(x_MK.shape[0], x_MK.shape[1] // ROW_BLOCK, ROW_BLOCK)
    largest = blocks.abs().amax(-1)
    finite = torch.isfinite(blocks).all(-1)
    used = finite & (largest >= SMALLEST_ROW)
    inverse = torch.where(used, 127.0 / torch.where(used, largest, 1.0), 0.0)
    integers = torch.round(torch.where(used.unsqueeze(-1), blocks, 0.0) * inverse.unsqueeze(-1))
    scale = torch.where(used, largest / 127.0, 0.0)
    return integers, torch.where(finite, scale, torch.nan)


def _quantised(x_MK: Tensor, packed: PackedWeight, start: Tensor) -> Tensor:
    planes = planes_of(packed)
    width = min(packed.group, ROW_BLOCK)
    integers, row_scale = quantise_rows(x_MK)
    integers = integers.view(x_MK.shape)
    codes = planes.codes_NK.to(torch.float32)
    acc = start
    for k in range(0, packed.num_inputs, width):
        scale = row_scale[:, k // ROW_BLOCK].unsqueeze(1)
        part = integers[:, k : k + width]
        # Below 2^24 in any order of summation, hence exact.
        dot = part @ codes[:, k : k + width].T
        acc = fma(dot, planes.scale_NB[:, k // packed.group] * scale, acc)
        if planes.minimum_NB is not None:
            acc = fma(planes.minimum_NB[:, k // packed.group], scale * part.sum(1, keepdim=True), acc)
    return acc
