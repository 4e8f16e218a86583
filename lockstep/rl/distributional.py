"""Maths of return distributions: the projection of C51 and quantile midpoints.

Legend: B rows, Z atoms or quantiles.
"""

from __future__ import annotations

import torch
from torch import Tensor


def project_categorical(probs_BZ: Tensor, reward_B: Tensor, discount_B: Tensor, support_Z: Tensor) -> Tensor:
    """Distribution of r + discount · z projected onto the support (Bellemare et al. 2017, algorithm 1), [B, Z].

    Each atom's mass is shared between its two neighbours on the support in proportion to closeness, that is, through the
    triangular kernel (1 − |b − j|)+ with b the shifted atom in units of the spacing.

    Args:
        probs_BZ: distribution at the next observation.
        discount_B: 0 where the episode terminated.
        support_Z: equally spaced, rising.
    """
    low, high, num = support_Z[0], support_Z[-1], len(support_Z)
    spacing = (high - low) / (num - 1)
    shifted_BZ = reward_B.unsqueeze(1) + discount_B.unsqueeze(1) * support_Z
    position_BZ = ((shifted_BZ.clamp(low, high) - low) / spacing).clamp(0, num - 1)
    lower_BZ = position_BZ.floor()
    upper_share_BZ = position_BZ - lower_BZ
    lower_index = lower_BZ.to(torch.int64)
    upper_index = (lower_index + 1).clamp(max=num - 1)
    out_BZ = torch.zeros_like(probs_BZ)
    out_BZ.scatter_add_(1, lower_index, probs_BZ * (1.0 - upper_share_BZ))
    out_BZ.scatter_add_(1, upper_index, probs_BZ * upper_share_BZ)
    return out_BZ


def quantile_midpoints(num: int) -> Tensor:
    """(2i + 1) / 2Z (Dabney et al. 2018, lemma 2).

    >>> quantile_midpoints(2).tolist()
    [0.25, 0.75]
    """
    return (torch.arange(num, dtype=torch.float32) + 0.5) / num


def truncate_quantiles(quantiles_EBZ: Tensor, num_dropped: int) -> Tensor:
    """Quantiles of all critics pooled and sorted, without the largest `num_dropped` (Kuznetsov et al. 2020, eq. 6):
    [B, E·Z − dropped]."""
    pooled = quantiles_EBZ.transpose(0, 1).flatten(1)
    ordered = pooled.sort(dim=1).values
    return ordered[:, : ordered.shape[1] - num_dropped]
