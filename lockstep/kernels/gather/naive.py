"""Reference row gathering in plain torch. Legend: B rows of a batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def gather_rows(sources: Sequence[Tensor], index_B: Tensor, outs: Sequence[Tensor]) -> None:
    """outs[s][b] = sources[s][index[b]]."""
    for source, out in zip(sources, outs, strict=True):
        torch.index_select(source, 0, index_B, out=out)
