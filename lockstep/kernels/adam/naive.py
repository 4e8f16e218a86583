"""Reference optimiser arithmetic in plain torch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    count: int,
    max_grad_norm: float | None,
) -> float:
    """One Adam step in place; returns the gradient norm before clipping."""
    total = sum(float((g.double() ** 2).sum()) for g in grads if g is not None)
    norm = math.sqrt(total)
    clip = 1.0 if max_grad_norm is None else min(1.0, max_grad_norm / (norm + 1e-6))
    beta1, beta2 = betas
    for p, raw, m, v in zip(params, grads, exp_avgs, exp_avg_sqs, strict=True):
        if raw is None:
            continue
        g = raw * clip
        m.add_((g - m) * (1.0 - beta1))
        v.mul_(beta2).add_(g * g * (1.0 - beta2))
        denominator = v.sqrt() / math.sqrt(1.0 - beta2**count) + eps
        p.mul_(1.0 - lr * weight_decay).sub_((m / denominator) * (lr / (1.0 - beta1**count)))
    return norm


def polyak(targets: Sequence[Tensor], sources: Sequence[Tensor], tau: float) -> None:
    """target += tau * (source - target), in place."""
    with torch.no_grad():
        for target, source in zip(targets, sources, strict=True):
            target.add_((source - target) * tau)
