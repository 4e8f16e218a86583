"""Reference PPO loss in plain torch. Legend: B samples."""

from __future__ import annotations

import torch
from torch import Tensor


def surrogate(
    logprob_B: Tensor,
    entropy_B: Tensor,
    value_B: Tensor,
    old_logprob_B: Tensor,
    advantage_B: Tensor,
    return_B: Tensor,
    old_value_B: Tensor,
    clip: float,
    value_clip: float | None,
    value_coef: float,
    entropy_coef: float,
    mask_B: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `lockstep.kernels.ppo_surrogate`."""
    mask = torch.ones_like(logprob_B, dtype=torch.bool) if mask_B is None else mask_B
    count = mask.sum().clamp(min=1)

    def mean(x_B: Tensor) -> Tensor:
        return torch.where(mask, x_B, torch.zeros_like(x_B)).sum() / count

    log_ratio = torch.where(mask, logprob_B - old_logprob_B, torch.zeros_like(logprob_B))
    ratio = log_ratio.exp()
    policy_loss = -mean(torch.minimum(ratio * advantage_B, ratio.clamp(1 - clip, 1 + clip) * advantage_B))
    square = (value_B - return_B) ** 2
    if value_clip is not None:
        held = old_value_B + (value_B - old_value_B).clamp(-value_clip, value_clip)
        square = torch.maximum(square, (held - return_B) ** 2)
    value_loss = 0.5 * mean(square)
    entropy = mean(entropy_B)
    loss = policy_loss + value_coef * value_loss - entropy_coef * entropy
    with torch.no_grad():
        deviation = (ratio - 1).abs()
        stats = torch.stack(
            [
                policy_loss,
                value_loss,
                entropy,
                mean((ratio - 1) - log_ratio),
                mean((deviation > clip).to(ratio.dtype)),
                torch.where(mask, deviation, torch.zeros_like(deviation)).max(),
            ]
        )
    return loss, stats.detach()
