"""The product through the compiled kernels.

Legend: M rows, N outputs, K inputs, X experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lockstep.kernels import native
from lockstep.kernels.packed_linear.weight import PackedWeight


def packed_linear(x_MK: Tensor, packed: PackedWeight, bias_N: Tensor | None) -> Tensor:
    """See `lockstep.kernels.packed_linear`."""
    num_rows = x_MK.shape[0]
    x_MK = native.contiguous(x_MK)
    bias_N = None if bias_N is None else native.contiguous(bias_N)
    y_MN = x_MK.new_empty((num_rows, packed.num_outputs))
    native.lib().ls_packed_linear(
        packed.spec.data_ptr(),
        packed.data.data_ptr(),
        x_MK.data_ptr(),
        None if bias_N is None else bias_N.data_ptr(),
        y_MN.data_ptr(),
        num_rows,
    )
    return y_MN


def grouped_linear(
    x_MK: Tensor, packed: PackedWeight | Sequence[PackedWeight], starts_X1: Tensor, bias_XN: Tensor | None
) -> Tensor:
    """See `lockstep.kernels.grouped_linear`."""
    if isinstance(packed, PackedWeight):
        first, base = packed, packed.data.data_ptr()
        places: list[int | None] = [base + index * packed.expert_bytes for index in range(packed.num_experts or 0)]
    else:
        first = packed[0]
        places = [expert.data.data_ptr() for expert in packed]
    x_MK, starts_X1 = native.contiguous(x_MK), native.contiguous(starts_X1)
    bias_XN = None if bias_XN is None else native.contiguous(bias_XN)
    y_MN = x_MK.new_empty((x_MK.shape[0], first.num_outputs))
    native.lib().ls_grouped_linear(
        first.spec.data_ptr(),
        native.address_array(places),
        starts_X1.data_ptr(),
        len(places),
        x_MK.data_ptr(),
        None if bias_XN is None else bias_XN.data_ptr(),
        y_MN.data_ptr(),
    )
    return y_MN


def pack_float(weight_NK: Tensor, packed: PackedWeight) -> None:
    """Writes a float32 or bfloat16 matrix into `packed`, which is fp32 or bf16."""
    native.lib().ls_pack_float(
        packed.spec.data_ptr(), weight_NK.data_ptr(), weight_NK.dtype == torch.bfloat16, packed.data.data_ptr()
    )


def scan_blocks(block: int, rows_N: Tensor, num_inputs: int) -> int:
    """LsBlocksFound of csrc/lockstep.h; rows_N int64 addresses of rows of blocks."""
    found: int = native.lib().ls_scan_blocks(block, rows_N.data_ptr(), rows_N.shape[0], num_inputs)
    return found


def pack_blocks(block: int, rows_N: Tensor, packed: PackedWeight) -> None:
    """Writes rows of blocks into `packed`."""
    native.lib().ls_pack_blocks(block, packed.spec.data_ptr(), rows_N.data_ptr(), packed.data.data_ptr())


def unpack_some(packed: PackedWeight, rows_T: Tensor) -> Tensor:
    """See `packing.unpack_some`."""
    out_TK = torch.empty(rows_T.shape[0], packed.num_inputs)
    native.lib().ls_unpack_rows(
        packed.spec.data_ptr(), packed.data.data_ptr(), rows_T.data_ptr(), rows_T.shape[0], out_TK.data_ptr()
    )
    return out_TK
