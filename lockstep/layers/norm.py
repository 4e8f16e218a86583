"""Running normalisation of observations, part of the policy that uses it.

Legend: M rows, D features.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RunningNorm(nn.Module):
    """y = clip((x - mean) / sqrt(var + eps), -clip, clip) with statistics gathered from data.

    The statistics are buffers: they are saved, served and exported with the policy. `update` merges a batch by the
    parallel formula of Chan et al. 1979 in float64. Until the first update the module only clips.

    >>> norm = RunningNorm(1)
    >>> norm.update(torch.tensor([[1.0], [3.0]]))
    >>> norm(torch.tensor([[2.0]])).item()
    0.0
    """

    def __init__(self, size: int, *, clip: float = 10.0, eps: float = 1e-8) -> None:
        super().__init__()
        self.clip = clip
        self.eps = eps
        self.register_buffer("mean64", torch.zeros(size, dtype=torch.float64))
        self.register_buffer("var64", torch.ones(size, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("inv_std", torch.ones(size))
        self.mean64: Tensor
        self.var64: Tensor
        self.count: Tensor
        self.mean: Tensor
        self.inv_std: Tensor

    def forward(self, x_MD: Tensor) -> Tensor:
        """x [M, D] float32 -> [M, D]."""
        return ((x_MD - self.mean) * self.inv_std).clamp(-self.clip, self.clip)

    @torch.no_grad()
    def update(self, x_MD: Tensor, columns: Tensor | None = None) -> None:
        """Merge the rows of `x_MD` into the statistics; `columns` [D] bool limits the change to some features."""
        x = x_MD.to(torch.float64)
        num = x.shape[0]
        if num == 0:
            return
        batch_mean = x.mean(0)
        batch_var = ((x - batch_mean) ** 2).mean(0)
        total = self.count + num
        delta = batch_mean - self.mean64
        mean = self.mean64 + delta * (num / total)
        m2 = self.var64 * self.count + batch_var * num + delta**2 * (self.count * num / total)
        var = m2 / total
        if columns is not None:
            mean = torch.where(columns, mean, self.mean64)
            var = torch.where(columns, var, self.var64)
        self.mean64.copy_(mean)
        self.var64.copy_(var)
        self.count.copy_(total)
        self.mean.copy_(mean)
        inv_std = 1.0 / torch.sqrt(var + self.eps)
        if columns is not None:
            inv_std = torch.where(columns, inv_std, torch.ones_like(inv_std))
        self.inv_std.copy_(inv_std)
