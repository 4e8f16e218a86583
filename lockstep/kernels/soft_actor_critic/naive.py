"""Reference soft actor-critic gradients: the public ops and autograd.

Legend: B rows of a minibatch, D features, A actions, E critics.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lockstep.kernels.gaussian import squashed_gaussian_head
from lockstep.kernels.mlp import mlp
from lockstep.kernels.plan.spec import Net
from lockstep.kernels.q_learning.rows import TransitionRows


def parameters_of(net: Net) -> list[Tensor]:
    """Weights, then biases."""
    return [t for t in (*net.weights, *net.biases) if t is not None]


@dataclass(frozen=True, slots=True)
class Minibatch:
    """What the actor's step needs of the critics' step; action and logprob carry the actor's graph."""

    features_BD: Tensor
    action_BA: Tensor
    logprob_B: Tensor


def critic_gradients(
    actor: Net,
    critics: Net,
    target: Net,
    bounds: tuple[float, float],
    rows: TransitionRows,
    index_B: Tensor,
    normal_2BA: Tensor,
    alpha: float,
) -> tuple[Minibatch, tuple[Tensor, float, float]]:
    """See `SoftGradients.critics`."""
    features, next_features = rows.features[index_B], rows.next_features[index_B]
    with torch.no_grad():
        next_action, next_logprob_B = squashed_gaussian_head(_apply(actor, next_features), bounds, normal_2BA[1])
        next_EB = _apply(target, torch.cat((next_features, next_action), 1)).squeeze(2)
        next_value_B = next_EB.amin(0) + alpha * -next_logprob_B
        target_B = rows.reward[index_B] + rows.discount[index_B] * next_value_B
    params = parameters_of(critics)
    with torch.enable_grad():
        batch = Minibatch(features, *squashed_gaussian_head(_apply(actor, features), bounds, normal_2BA[0]))
        values_EB = _apply(critics, torch.cat((features, rows.action[index_B]), 1)).squeeze(2)
        with torch.no_grad():
            error_EB = values_EB - target_B
            gradient_EB = error_EB * (1.0 / len(index_B))
        for p, grad in zip(params, torch.autograd.grad(values_EB, params, gradient_EB), strict=True):
            p.grad = grad
    loss = 0.5 * float((error_EB.double() * gradient_EB.double()).sum())
    return batch, (-batch.logprob_B.detach(), loss, float(values_EB.detach().double().mean()))


def actor_gradients(actor: Net, critics: Net, batch: Minibatch, alpha: float) -> tuple[float, float]:
    """See `SoftGradients.actor`."""
    constant = Net(
        [w.detach() for w in critics.weights],
        [None if b is None else b.detach() for b in critics.biases],
        critics.activation,
        critics.output_activation,
        critics.dtype,
    )
    params = parameters_of(actor)
    with torch.enable_grad():
        q_B = _apply(constant, torch.cat((batch.features_BD, batch.action_BA), 1)).squeeze(2).min(0).values
        rate = -1.0 / len(q_B)
        entropy_B = -batch.logprob_B
        slopes = torch.full_like(q_B, alpha) * rate, torch.full_like(q_B, rate)
        for p, grad in zip(params, torch.autograd.grad((entropy_B, q_B), params, slopes), strict=True):
            p.grad = grad
    return float(entropy_B.detach().double().mean()), float(q_B.detach().double().mean())


def _apply(net: Net, x: Tensor) -> Tensor:
    return mlp(x, net.weights, net.biases, net.activation, net.output_activation, net.dtype)
