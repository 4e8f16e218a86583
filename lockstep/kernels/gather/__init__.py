"""Copies rows of several arrays at once: a replay batch in one call. Legend: R stored rows, B rows of a batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lockstep.core.errors import InputError
from lockstep.kernels import native
from lockstep.kernels.gather import cpu, naive

IMPLEMENTATIONS = {"naive": naive.gather_rows, "cpu": cpu.gather_rows}


def gather_rows(sources: Sequence[Tensor], index_B: Tensor, outs: Sequence[Tensor] | None = None) -> list[Tensor]:
    """outs[s][b] = sources[s][index[b]] for every source.

    Args:
        sources: [R, ...] each, of any dtypes.
        index_B: int64.
        outs: contiguous [B, ...] to fill; None: new tensors.

    Raises:
        InputError: for an index out of range or outs that do not fit.
    """
    if index_B.dtype is not torch.int64 or index_B.dim() != 1:
        raise InputError(f"index is {index_B.dtype} {tuple(index_B.shape)}; expected int64 [B]", field="index")
    num_rows = min(len(s) for s in sources)
    num = len(index_B)
    if num and not (int(index_B.min()) >= 0 and int(index_B.max()) < num_rows):
        raise InputError(f"index must lie in 0..{num_rows - 1}; got {index_B.tolist()}", field="index")
    if outs is None:
        outs = [torch.empty((num, *s.shape[1:]), dtype=s.dtype) for s in sources]
    for source, out in zip(sources, outs, strict=True):
        if out.shape != (num, *source.shape[1:]) or out.dtype is not source.dtype or not out.is_contiguous():
            raise InputError(
                f"out is {out.dtype} {tuple(out.shape)}; expected contiguous {source.dtype} {(num, *source.shape[1:])}",
                field="outs",
            )
    fast = num and all(s.is_cpu and s.is_contiguous() for s in sources) and native.usable()
    IMPLEMENTATIONS["cpu" if fast else "naive"](sources, index_B, outs)
    return list(outs)
