"""Normalisation of one token's features. Weights are float32 whatever the model's dtype: they are few and exactness is cheap.

Legend: T packed tokens, E model width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lockstep.kernels.norm import add_rms_norm, layer_norm, rms_norm


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · (offset + weight) (Zhang & Sennrich 2019); Gemma stores weight − 1, so offset is 1."""

    def __init__(self, size: int, eps: float, *, offset: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((size,), 1.0 - offset))
        self.eps = eps
        self.offset = offset

    def forward(self, x: Tensor) -> Tensor:
        """x [..., E] -> [..., E]."""
        return rms_norm(x, self.weight, self.eps, self.offset)

    def after_add(self, x_TE: Tensor, residual_TE: Tensor) -> tuple[Tensor, Tensor]:
        """(norm of residual + x, residual + x) in one pass."""
        return add_rms_norm(x_TE, residual_TE, self.weight, self.eps, self.offset)


class LayerNorm(nn.Module):
    """(x − mean) / sqrt(var + eps) · weight + bias (Ba et al. 2016)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x [..., E] -> [..., E]."""
        return layer_norm(x, self.weight, self.bias, self.eps)
