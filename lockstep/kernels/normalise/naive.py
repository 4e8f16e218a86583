"""Reference normalisation in plain torch. Legend: B rows."""

from __future__ import annotations

import torch
from torch import Tensor


def normalise(x_B: Tensor, mask_B: Tensor | None) -> Tensor:
    """See `lockstep.kernels.normalise`."""
    values = (x_B if mask_B is None else x_B[mask_B]).to(torch.float64)
    if values.numel() < 2:
        return x_B.clone()
    std, mean = torch.std_mean(values)
    return (x_B - mean.to(x_B.dtype)) / (std + 1e-8).to(x_B.dtype)
