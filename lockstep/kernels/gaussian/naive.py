"""Reference diagonal-normal heads in plain torch.

Legend: M rows, A action dimensions.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

HALF_LOG_TWO_PI = 0.5 * math.log(2.0 * math.pi)
ALMOST_ONE = 0.99999994  # the largest float32 below 1


def _sum_columns(terms_MA: Tensor) -> Tensor:
    total = terms_MA[:, 0]
    for a in range(1, terms_MA.shape[1]):
        total = total + terms_MA[:, a]
    return total


def _logprob(mean_MA: Tensor, log_std: Tensor, actions_MA: Tensor) -> Tensor:
    z = (actions_MA - mean_MA) * torch.exp(-log_std)
    return _sum_columns(-0.5 * z * z - log_std - HALF_LOG_TWO_PI)


def evaluate(mean_MA: Tensor, log_std: Tensor, actions_MA: Tensor) -> tuple[Tensor, Tensor]:
    """(logprob_M, entropy_M)."""
    entropy = _sum_columns((log_std + (0.5 + HALF_LOG_TWO_PI)).expand_as(mean_MA))
    return _logprob(mean_MA, log_std, actions_MA), entropy


def sample(mean_MA: Tensor, log_std: Tensor, normal_MA: Tensor | None) -> tuple[Tensor, Tensor]:
    """(actions_MA, logprob_M)."""
    actions = mean_MA.clone() if normal_MA is None else mean_MA + log_std.exp() * normal_MA
    return actions, _logprob(mean_MA, log_std, actions)


class _InsideOne(torch.autograd.Function):
    """Keeps tanh's output inside (-1, 1) in float32 without touching its gradient."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clamp(-ALMOST_ONE, ALMOST_ONE)

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> Tensor:
        return grads[0]


def squashed_sample(mean_MA: Tensor, log_std_MA: Tensor, normal_MA: Tensor | None) -> tuple[Tensor, Tensor]:
    """(actions_MA, logprob_M) of tanh(mean + std * normal)."""
    normal = torch.zeros_like(mean_MA) if normal_MA is None else normal_MA
    u = mean_MA + log_std_MA.exp() * normal
    correction = 2.0 * (math.log(2.0) - u - torch.nn.functional.softplus(-2.0 * u))
    logprob = _sum_columns(-0.5 * normal * normal - log_std_MA - HALF_LOG_TWO_PI - correction)
    squashed = torch.tanh(u)
    if u.requires_grad:
        return _InsideOne.apply(squashed), logprob  # type: ignore[no-untyped-call]
    return squashed.clamp(-ALMOST_ONE, ALMOST_ONE), logprob
