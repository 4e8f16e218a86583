"""Smaller policies from trained ones: weights set to zero, or whole hidden units taken out.

Legend: M rows, L latent features, H hidden units, K inputs, N outputs of a layer.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lockstep.core.errors import ConfigError
from lockstep.kernels.mlp.naive import ACTIVATIONS
from lockstep.layers.linear import MLP
from lockstep.models.control.policy import Policy


def check_ratio(ratio: float) -> None:
    """Is it a fraction to remove?

    Raises:
        ConfigError: no.
    """
    if not 0.0 < ratio < 1.0:
        raise ConfigError(f"ratio={ratio} is the fraction to remove and lies between 0 and 1, both excluded")


def prune_weights(policy: Policy, ratio: float) -> Policy:
    """A copy in which the fraction `ratio` of each matrix, its smallest entries, is zero (Han et al. 2015).

    Raises:
        ConfigError: the ratio is none.
    """
    check_ratio(ratio)
    pruned = Policy(policy.spec)
    pruned.load_state_dict(policy.state_dict())
    pruned.version = policy.version
    for parameter in pruned.parameters():
        num = int(ratio * parameter.numel())
        if parameter.ndim > 1 and num:
            smallest = parameter.data.abs().flatten().kthvalue(num).values
            parameter.data[parameter.data.abs() <= smallest] = 0.0
    return pruned.eval()


@torch.no_grad()
def prune_units(policy: Policy, ratio: float, obs: Any, state: dict[str, Tensor], starts_M: Tensor) -> Policy:
    """A smaller policy without the fraction `ratio` of the hidden units of each dense layer of actor and critic.

    A unit's importance is the deviation of its activation over the given rows times the norm of its outgoing weights:
    what the next layer would lose, since the mean that a removed unit had is added to the next layer's bias.

    Args:
        policy: its encoder, convolutions and recurrent core are left as they are.
        ratio: to remove; one unit at least stays.
        obs: M raw observations that the policy met, tensors.
        state: what the policy remembered before each of them.
        starts_M: where an episode began.

    Raises:
        ConfigError: the policy's layers are not dense layers of ours, or it has no hidden layer.
    """
    check_ratio(ratio)
    critic = policy.critic
    if not isinstance(policy.actor, MLP) or not (critic is None or isinstance(critic, MLP)):
        raise ConfigError(
            "units are pruned in dense layers of ours; this policy has noisy layers or an imported network; "
            "prune its weights, quantise or distil it"
        )
    if not policy.spec.network.hidden_sizes:
        raise ConfigError(
            "this policy has no hidden layer to take units from; prune its weights, quantise or distil it"
        )
    features, state = policy.encode(obs, state, starts_M)
    latent_ML = policy.encoder(features)
    if policy.core is not None:
        latent_ML = policy.core(latent_ML.unsqueeze(0), state, starts_M.unsqueeze(0))[0].squeeze(0)
    kept = tuple(max(1, round((1.0 - ratio) * size)) for size in policy.spec.network.hidden_sizes)
    smaller = Policy(replace(policy.spec, network=replace(policy.spec.network, hidden_sizes=kept)))
    tensors = dict(policy.state_dict())
    tensors |= _without(policy.actor, "actor", kept, latent_ML)
    if isinstance(critic, MLP):
        tensors |= _without(critic, "critic", kept, latent_ML)
    smaller.load_state_dict(tensors)
    smaller.version = policy.version
    return smaller.eval()


def _without(mlp: MLP, name: str, kept: tuple[int, ...], x_MK: Tensor) -> dict[str, Tensor]:
    """State of the chain with `kept` units in its hidden layers, by the policy's names."""
    weights = [weight.detach().clone() for weight in mlp.weights]
    biases = [bias.detach().clone() for bias in mlp.biases]
    for layer, num in enumerate(kept):
        x_MH = ACTIVATIONS[mlp.activation](x_MK @ weights[layer] + biases[layer])
        importance_H = x_MH.std(0) * weights[layer + 1].norm(dim=1)
        stays = importance_H.topk(num).indices.sort().values
        goes = torch.ones_like(importance_H, dtype=torch.bool)
        goes[stays] = False
        biases[layer + 1] += x_MH.mean(0)[goes] @ weights[layer + 1][goes]
        weights[layer], biases[layer] = weights[layer][:, stays], biases[layer][stays]
        weights[layer + 1] = weights[layer + 1][stays]
        x_MK = x_MH[:, stays]
    state = {f"{name}.weights.{i}": weight for i, weight in enumerate(weights)}
    return state | {f"{name}.biases.{i}": bias for i, bias in enumerate(biases)}
