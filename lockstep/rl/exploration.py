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


class UniformsAhead:
    """`kernels.uniform` of few rows, drawn for many positions at once: a call for one row costs as much as for hundreds.

    Args:
        seed: of the uniforms.
        num: uniforms of a row.
    """

    NUM_AHEAD = 256
    MAX_ROWS = 8

    def __init__(self, seed: int, num: int) -> None:
        self.seed, self.num = seed, num
        self._streams_N: Tensor | None = None
        self._first_N = np.zeros(0, np.int64)
        self._first = 0
        self._block_KNC = np.zeros((0, 0, num), np.float32)

    def __call__(self, streams_N: Tensor, positions_N: Tensor) -> np.ndarray:
        """[N, num] float32. `streams_N` must keep its values while it is the same tensor."""
        num_rows = streams_N.shape[0]
        if num_rows > self.MAX_ROWS:
            return kernels.uniform(self.seed, streams_N, positions_N, self.num).numpy()
        if streams_N is not self._streams_N:
            return self._draw(streams_N, positions_N)
        if num_rows == 1:
            ahead = int(positions_N.item()) - self._first
            return self._block_KNC[ahead] if 0 <= ahead < self.NUM_AHEAD else self._draw(streams_N, positions_N)
        ahead_N = positions_N.numpy() - self._first_N
        if ahead_N.min() < 0 or ahead_N.max() >= self.NUM_AHEAD:
            return self._draw(streams_N, positions_N)
        return self._block_KNC[ahead_N, np.arange(num_rows)]

    def _draw(self, streams_N: Tensor, positions_N: Tensor) -> np.ndarray:
        num_ahead = self.NUM_AHEAD
        self._streams_N, self._first_N = streams_N, positions_N.numpy().copy()
        self._first = int(self._first_N[0])
        positions = torch.from_numpy((np.arange(num_ahead)[:, None] + self._first_N).reshape(-1))
        block = kernels.uniform(self.seed, streams_N.repeat(num_ahead), positions, self.num)
        self._block_KNC = block.numpy().reshape(num_ahead, -1, self.num)
        return self._block_KNC[0]


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
        self.start, self.end = start, end
        self._uniforms = UniformsAhead(seed + EXPLORATION_SEED + 1, 1 + num_choices)
        self.ramp_steps = max(fraction * total_steps, 1.0)

    def epsilon(self, num_steps: int) -> float:
        """ε after that many environment steps."""
        return linear(self.start, self.end, num_steps / self.ramp_steps)

    def prepare(self, num_steps: int) -> None:
        return

    def choose(self, step: PolicyStep, streams_N: Tensor, positions_N: Tensor, num_steps: int) -> Tensor | None:
        uniform = self._uniforms(streams_N, positions_N)
        epsilon = self.epsilon(num_steps)
        if len(uniform) == 1 and not uniform[0, 0] < epsilon:
            return None
        explore_N = uniform[:, 0] < epsilon
        if not np.count_nonzero(explore_N):
            return None
        choice_N = _uniform_choice(torch.from_numpy(uniform[:, 1:]), _mask(step))
        return torch.where(torch.from_numpy(explore_N), choice_N, step.action)


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
