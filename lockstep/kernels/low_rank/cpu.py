"""Through the compiled kernel.

Legend: M rows, K inputs, N outputs, R rank.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from lockstep.kernels import native

if TYPE_CHECKING:
    from lockstep.kernels.low_rank import LowRankRun

_P, _I64 = ctypes.c_void_p, ctypes.c_int64


class Run(ctypes.Structure):
    """LsLowRankRun of csrc/low_rank.h."""

    _fields_ = [
        ("a", _P),
        ("b", _P),
        *[(name, _I64) for name in ("first_row", "last_row", "rank", "first_column", "num_columns")],
        ("scale", ctypes.c_float),
        ("reserved", ctypes.c_int32),
    ]


def add(y_MN: Tensor, x_MK: Tensor, runs: Sequence[LowRankRun]) -> None:
    """See `lockstep.kernels.low_rank.add_low_rank`."""
    x_MK = native.contiguous(x_MK)
    native.lib().ls_low_rank(x_MK.data_ptr(), y_MN.data_ptr(), run_array(runs), len(runs), x_MK.shape[1], y_MN.shape[1])


def run_array(runs: Sequence[LowRankRun]) -> ctypes.Array[Run]:
    """As the kernel reads them; the pairs' tensors must outlive it."""
    array = (Run * len(runs))()
    for into, run in zip(array, runs, strict=True):
        pair = run.pair
        into.a, into.b = pair.a_KR.data_ptr(), pair.b_RN.data_ptr()
        into.first_row, into.last_row, into.first_column = run.first_row, run.last_row, pair.first_column
        into.rank, into.num_columns = pair.b_RN.shape
        into.scale = pair.scale
    return array
