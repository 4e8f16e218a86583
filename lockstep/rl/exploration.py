"""How a replay algorithm departs from its policy while it collects. All noise is a function of (seed, stream, position).

Legend: N rows, A action dimensions or choices.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
import torch
from torch import Tensor

from lockstep import kernels
from lockstep.core.errors import ConfigError
from lockstep.core.spaces import BoxSpace, DiscreteSpace, Space
from lockstep.layers.linear import NoisyMLP
from lockstep.models.control.policy import Policy, PolicyStep
from lockstep.models.control.preprocess import ACTION_MASK
from lockstep.rl.schedules import linear

EXPLORATION_SEED = 0xE8910


class Exploration(ABC):
    """Seam between the collector and a way to explore.

    `deterministic` says whether the policy's mode (rather than a sample) is what the exploration departs from.
    `prepare` runs before each decision, `choose` after it: an action in the head's coordinates [N] or [N, A], or None to
    keep the policy's own. `num_steps` counts the environment steps collected so far.
    """

    deterministic = True

    @abstractmethod
    def prepare(self, num_steps: int) -> None:
        """Before the decision."""

    @abstractmethod
    def choose(self, step: PolicyStep, streams_N: Tensor, positions_N: Tensor, num_steps: int) -> Tensor | None:
        """After the decision."""


class PolicySamples(Exploration):
    """The policy's own distribution explores."""

    deterministic = False

    def prepare(self, num_steps: int) -> None:
        return

    def choose(self, step: PolicyStep, streams_N: Tensor, positions_N: Tensor, num_steps: int) -> Tensor | None:
        return None


class UniformUntil(Exploration):
    """Uniform over the action space for the first `num_random` environment steps, then as `rest`; as in common
    libraries' `learning_starts`."""

    def __init__(self, space: Space, num_random: int, rest: Exploration, *, seed: int) -> None:
        self.space, self.num_random, self.rest, self.seed = space, num_random, rest, seed + EXPLORATION_SEED
        self.deterministic = rest.deterministic

    def prepare(self, num_steps: int) -> None:
        self.rest.prepare(num_steps)

    def choose(self, step: PolicyStep, streams_N: Tensor, positions_N: Tensor, num_steps: int) -> Tensor | None:
        if num_steps >= self.num_random:
            return self.rest.choose(step, streams_N, positions_N, num_steps)
        match self.space:
            case DiscreteSpace():
                uniform = kernels.uniform(self.seed, streams_N, positions_N, self.space.n)
                return _uniform_choice(uniform, _mask(step))
            case BoxSpace():
                size = int(np.prod(self.space.shape))
                return kernels.uniform(self.seed, streams_N, positions_N, size) * 2.0 - 1.0
        raise ConfigError(f"replay algorithms act in Discrete or Box spaces; got {self.space}; use PPO")


class EpsilonGreedy(Exploration):
    """A uniform choice among the allowed ones with probability ε, which falls linearly from `start` to `end` over the
    first `fraction` of `total_steps`."""

    def __init__(
        self, num_choices: int, *, start: float, end: float, fraction: float, total_steps: int, seed: int
    ) -> None:
        self.num_choices, self.start, self.end, self.seed = num_choices, start, end, seed + EXPLORATION_SEED + 1
        self.ramp_steps = max(fraction * total_steps, 1.0)

    def epsilon(self, num_steps: int) -> float:
        """ε after that many environment steps."""
        return linear(self.start, self.end, num_steps / self.ramp_steps)

    def prepare(self, num_steps: int) -> None:
        return

    def choose(self, step: PolicyStep, streams_N: Tensor, positions_N: Tensor, num_steps: int) -> Tensor | None:
        uniform = kernels.uniform(self.seed, streams_N, positions_N, 1 + self.num_choices)
        explore_N = uniform.numpy()[:, 0] < self.epsilon(num_steps)
        if not explore_N.any():
            return None
        return torch.where(torch.from_numpy(explore_N), _uniform_choice(uniform[:, 1:], _mask(step)), step.action)


class GaussianNoise(Exploration):
    """Adds normal noise of standard deviation `sigma` to an action in [-1, 1] and clips it back."""

    def __init__(self, size: int, sigma: float, *, seed: int) -> None:
        self.size, self.sigma, self.seed = size, sigma, seed + EXPLORATION_SEED + 2

    def prepare(self, num_steps: int) -> None:
        return

    def choose(self, step: PolicyStep, streams_N: Tensor, positions_N: Tensor, num_steps: int) -> Tensor | None:
        noise = kernels.normal(self.seed, streams_N, positions_N, self.size)
        return (step.action + self.sigma * noise).clamp_(-1.0, 1.0)


class ParameterNoise(Exploration):
    """Fresh noise in the weights of a noisy network for every decision (Fortunato et al. 2018)."""

    def __init__(self, policy: Policy, *, seed: int) -> None:
        assert isinstance(policy.actor, NoisyMLP)
        self.network, self.seed = policy.actor, seed + EXPLORATION_SEED + 3

    def prepare(self, num_steps: int) -> None:
        set_parameter_noise(self.network, self.seed, stream=0, position=num_steps)

    def choose(self, step: PolicyStep, streams_N: Tensor, positions_N: Tensor, num_steps: int) -> Tensor | None:
        return None


def set_parameter_noise(network: NoisyMLP, seed: int, *, stream: int, position: int) -> None:
    """Give a noisy network the noise keyed by (seed, stream, position)."""
    noise = kernels.normal(seed, torch.tensor([stream]), torch.tensor([position]), network.num_noise)
    network.set_noise(noise[0])


def _mask(step: PolicyStep) -> Tensor | None:
    return step.features[ACTION_MASK] if isinstance(step.features, dict) and ACTION_MASK in step.features else None


def _uniform_choice(uniform_NA: Tensor, mask_NA: Tensor | None) -> Tensor:
    """The place of the largest of independent uniforms is uniform over the places allowed."""
    return (uniform_NA if mask_NA is None else torch.where(mask_NA, uniform_NA, -1.0)).argmax(1)
