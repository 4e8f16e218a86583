"""Normalisation through the compiled kernel. Legend: B rows."""

from __future__ import annotations

import torch
from torch import Tensor

from lockstep.kernels import native


def normalise(x_B: Tensor, mask_B: Tensor | None) -> Tensor:
    """See `lockstep.kernels.normalise`."""
    x, mask = native.contiguous(x_B), None if mask_B is None else native.contiguous(mask_B)
    out = torch.empty(x.shape, dtype=torch.float32)
    native.lib().ls_normalise(x.data_ptr(), None if mask is None else mask.data_ptr(), out.data_ptr(), x.numel())
    return out
