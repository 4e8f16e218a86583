"""Row gathering through the compiled kernel. Legend: B rows of a batch."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

from torch import Tensor

from lockstep.kernels import native


def gather_rows(sources: Sequence[Tensor], index_B: Tensor, outs: Sequence[Tensor]) -> None:
    """outs[s][b] = sources[s][index[b]]."""
    num = len(sources)
    row_bytes = [s[0].numel() * s.element_size() for s in sources]
    index = native.contiguous(index_B)
    native.lib().ls_gather_rows(
        native.address_array([s.data_ptr() for s in sources]),
        native.address_array([o.data_ptr() for o in outs]),
        (ctypes.c_int64 * num)(*row_bytes),
        num,
        index.data_ptr(),
        len(index),
    )
