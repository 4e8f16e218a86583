"""Reference minibatch gradients: the public ops and autograd.

Legend: R rows of a rollout, B rows of a minibatch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lockstep.kernels.actor_critic.rows import RolloutRows
from lockstep.kernels.categorical import categorical_evaluate
from lockstep.kernels.gaussian import gaussian_evaluate
from lockstep.kernels.mlp import mlp
from lockstep.kernels.normalise import normalise
from lockstep.kernels.plan.spec import Head, Net
from lockstep.kernels.ppo import ppo_surrogate


def parameters_of(actor: Net, critic: Net, head: Head) -> list[Tensor]:
    """Every tensor that gets a gradient: actor weights and biases, the critic's, log_std."""
    found = [*actor.weights, *actor.biases, *critic.weights, *critic.biases, head.log_std]
    return [t for t in found if t is not None]


def gradients(
    actor: Net,
    critic: Net,
    head: Head,
    rows: RolloutRows,
    index_B: Tensor,
    scalars: tuple[float, float, float, float],
    normalise_advantage: bool,
) -> Tensor:
    """See `ActorCriticGradients`; `scalars` are clip, value clip (negative: none), value and entropy coefficients."""
    params = parameters_of(actor, critic, head)
    features, action = rows.features[index_B], rows.action[index_B]
    logprob, advantage, value = rows.logprob[index_B], rows.advantage[index_B], rows.value[index_B]
    with torch.enable_grad():
        outputs = _apply(actor, features)
        if head.kind == "gaussian":
            assert head.log_std is not None
            evaluated = gaussian_evaluate(outputs, head.log_std, action)
        else:
            evaluated = categorical_evaluate(outputs, action, head.nvec)
        loss, stats = ppo_surrogate(
            *evaluated,
            _apply(critic, features).squeeze(-1),
            logprob,
            normalise(advantage) if normalise_advantage else advantage,
            advantage + value,
            value,
            scalars[0],
            None if scalars[1] < 0 else scalars[1],
            *scalars[2:],
        )
        for p, grad in zip(params, torch.autograd.grad(loss, params), strict=True):
            p.grad = grad
    return stats


def _apply(net: Net, x: Tensor) -> Tensor:
    return mlp(x, net.weights, net.biases, net.activation, net.output_activation, net.dtype)
