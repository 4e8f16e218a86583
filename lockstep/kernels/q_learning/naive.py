"""Reference Q-learning gradients: the public ops and autograd.

Legend: B rows of a minibatch, A actions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lockstep.kernels.mlp import mlp
from lockstep.kernels.plan.spec import Net
from lockstep.kernels.q_learning.rows import TransitionRows


def parameters_of(net: Net) -> list[Tensor]:
    """Weights, then biases."""
    return [t for t in (*net.weights, *net.biases) if t is not None]


def gradients(
    online: Net, target: Net, rows: TransitionRows, index_B: Tensor, weight_B: Tensor | None, is_double: bool
) -> tuple[Tensor, float, float]:
    """See `QGradients`."""
    next_features, action_B1 = rows.next_features[index_B], rows.action[index_B].unsqueeze(1)
    with torch.no_grad():
        next_BA = _apply(target, next_features)
        best_B1 = (_apply(online, next_features) if is_double else next_BA).argmax(1, keepdim=True)
        target_B = rows.reward[index_B] + rows.discount[index_B] * next_BA.gather(1, best_B1).squeeze(1)
    params = parameters_of(online)
    with torch.enable_grad():
        values_BA = _apply(online, rows.features[index_B])
        with torch.no_grad():
            error_B = values_BA.gather(1, action_B1).squeeze(1) - target_B
            slope_B = error_B.clamp(-1.0, 1.0) * (1.0 / len(index_B))
            if weight_B is not None:
                slope_B = slope_B * weight_B
            gradient_BA = torch.zeros_like(values_BA).scatter_(1, action_B1, slope_B.unsqueeze(1))
        for p, grad in zip(params, torch.autograd.grad(values_BA, params, gradient_BA), strict=True):
            p.grad = grad
    error_B = error_B.abs()
    return error_B, float(error_B.double().mean()), float(target_B.double().mean())


def _apply(net: Net, x: Tensor) -> Tensor:
    return mlp(x, net.weights, net.biases, net.activation, net.output_activation, net.dtype)
