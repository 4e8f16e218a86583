"""What maximum-entropy algorithms share: the temperature, and the policy on a batch with its entropy.

Legend: B batch rows, A action dimensions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lockstep import kernels
from lockstep.core.errors import ConfigError
from lockstep.core.spaces import BoxSpace, DiscreteSpace, Space
from lockstep.models.control.policy import Policy

NOISE_SEED = 0x5AC


class Temperature(nn.Module):
    """α = exp(log α), the weight of the entropy: learned so that the entropy stays near a target, or fixed.

    Args:
        fixed: α (None: learned).
        start: first α of a learned one.
        target_entropy: nats; None: minus the action dimensions (Haarnoja et al. 2018b), or 0.89 ln A for A discrete
            actions (a uniform policy has ln A).

    >>> Temperature(None, 1.0, None, DiscreteSpace(2)).value().item()
    1.0
    """

    def __init__(self, fixed: float | None, start: float, target_entropy: float | None, space: Space) -> None:
        super().__init__()
        self.learned = fixed is None
        value = start if fixed is None else fixed
        if value < 0.0 or (self.learned and value == 0.0):
            raise ConfigError(f"temperature={value}; expected a positive number")
        self.log_alpha = nn.Parameter(torch.tensor([math.log(value) if value > 0 else -math.inf]))
        self.target_entropy = _default_target(space) if target_entropy is None else target_entropy

    def value(self) -> Tensor:
        """α [1], a constant to the other losses."""
        return self.log_alpha.detach().exp()

    def set_gradient(self, entropy_B: Tensor) -> None:
        """The gradient of `temperature_loss`: how far the entropy [B] is above its target, on average."""
        self.log_alpha.grad = entropy_B.detach().mean().sub_(self.target_entropy).view(1)


def _default_target(space: Space) -> float:
    if isinstance(space, DiscreteSpace):
        return 0.89 * math.log(space.n)
    return -float(np.prod(space.shape)) if isinstance(space, BoxSpace) else 0.0


@dataclass(slots=True)
class Choice:
    """The policy on a batch: its entropy [B] (−logprob of the sample where there is no closed form) and a sampled action
    [B, A], or the probabilities of discrete actions [B, A].

    >>> Choice(torch.zeros(2), torch.zeros(2, 1)).entropy_B.shape
    torch.Size([2])
    """

    entropy_B: Tensor
    action_BA: Tensor


class SampleNoise:
    """The normals behind sampled actions, a function of (seed, stream, key)."""

    def __init__(self, policy: Policy, seed: int) -> None:
        self.seed, self.width = seed + NOISE_SEED, policy.head.num_noise

    def draw(self, num_rows: int, key: int, stream: int) -> Tensor:
        """[num_rows, A]."""
        noise = kernels.normal(self.seed, torch.tensor([stream]), torch.tensor([key]), num_rows * self.width)
        return noise.view(num_rows, self.width)

    def pair(self, num_rows: int, key: int) -> Tensor:
        """Streams 0 and 1, [2, num_rows, A]."""
        keys = torch.full((2,), key)
        return kernels.normal(self.seed, _PAIR, keys, num_rows * self.width).view(2, num_rows, self.width)


_PAIR = torch.arange(2)


class SampledActions:
    """Reparameterised samples of a squashed Gaussian policy, keyed by (seed, stream, key)."""

    def __init__(self, policy: Policy, seed: int) -> None:
        self.policy, self.noise = policy, SampleNoise(policy, seed)

    def choose(self, features: Any, key: int, *, stream: int = 0) -> Choice:
        """One action for each row, differentiable in the policy."""
        params = self.policy.actor(self.policy.encoder(features))
        action, logprob = self.policy.head.sample(params, self.noise.draw(len(params), key, stream))
        return Choice(-logprob, action)
