"""Reference act: the public ops, composed.

Legend: M rows, D observation features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lockstep.kernels.categorical import categorical_sample
from lockstep.kernels.gaussian import gaussian_sample, squashed_gaussian_sample
from lockstep.kernels.mlp import mlp
from lockstep.kernels.noise import normal, uniform
from lockstep.kernels.plan.spec import Head, Net, Normaliser


def act(
    obs_MD: Tensor,
    actor: Net,
    head: Head,
    critic: Net | None,
    normaliser: Normaliser | None,
    seed: int,
    stream_M: Tensor,
    position_M: Tensor,
    deterministic: bool,
) -> dict[str, Tensor]:
    """The arrays of an `ActPlan`, by name."""
    features = obs_MD
    if normaliser is not None:
        scaled = (obs_MD - normaliser.mean) * normaliser.inv_std
        features = scaled.clamp(-normaliser.clip, normaliser.clip)
    out = {"features": features, "head_input": apply(actor, features)}
    if critic is not None:
        out["value"] = apply(critic, features).view(-1)
    x = out["head_input"]

    def noise(draw, num: int) -> Tensor | None:  # type: ignore[no-untyped-def]
        return None if deterministic else draw(seed, stream_M, position_M, num)

    match head.kind:
        case "categorical":
            nvec = head.nvec or (x.shape[1],)
            out["choices"], out["logprob"] = categorical_sample(x, noise(uniform, x.shape[1]), nvec)
        case "gaussian":
            assert head.log_std is not None
            out["actions"], out["logprob"] = gaussian_sample(x, head.log_std, noise(normal, x.shape[1]))
        case "squashed":
            mean, raw = x.chunk(2, dim=1)
            log_std = raw.clamp(head.log_std_min, head.log_std_max)
            out["actions"], out["logprob"] = squashed_gaussian_sample(
                mean, log_std.contiguous(), noise(normal, mean.shape[1])
            )
        case "tanh":
            out["actions"] = x
        case "argmax":
            out["choices"] = _epsilon_greedy(x, noise(uniform, 2), head.epsilon)
    return out


def apply(net: Net, x: Tensor) -> Tensor:
    """The network's output without a graph."""
    with torch.no_grad():
        return mlp(x, net.weights, net.biases, net.activation, net.output_activation, net.dtype)


def _epsilon_greedy(q_MA: Tensor, uniform_M2: Tensor | None, epsilon: float) -> Tensor:
    is_max = q_MA == q_MA.amax(1, keepdim=True)
    best = (is_max.to(torch.int64).cumsum(1) == 0).sum(1).clamp(max=q_MA.shape[1] - 1)
    if uniform_M2 is not None:
        random = (uniform_M2[:, 1] * q_MA.shape[1]).long().clamp(max=q_MA.shape[1] - 1)
        best = torch.where(uniform_M2[:, 0] < epsilon, random, best)
    return best.unsqueeze(1)
