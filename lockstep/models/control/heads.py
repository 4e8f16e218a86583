"""Action distributions on top of a network, each with the same few methods.

Legend: M rows, P distribution parameters, A action dimensions, Z atoms or quantiles.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from lockstep import kernels

MASKED_LOGIT = -1e8
LOG_STD_MIN, LOG_STD_MAX = -20.0, 2.0


def masked(params: Tensor, mask: Tensor | None) -> Tensor:
    """Where `mask` is false the choice gets a logit (or value) that no float32 softmax or argmax can see."""
    return params if mask is None else torch.where(mask, params, torch.full_like(params, MASKED_LOGIT))


class Categorical(nn.Module):
    """One choice among `n`, logits [M, n]. Action int64 [M]."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.n = n
        self.num_params = n
        self.num_noise = n
        self.noise: Literal["uniform", "normal", "none"] = "uniform"

    def sample(self, params: Tensor, noise: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return kernels.categorical_sample(masked(params, mask), noise)

    def mode(self, params: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return kernels.categorical_mode(masked(params, mask))

    def evaluate(self, params: Tensor, action: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(logprob [M], entropy [M]), differentiable."""
        return kernels.categorical_evaluate(masked(params, mask), action)


class MultiCategorical(nn.Module):
    """Independent choices, logits [M, sum(nvec)]. Action int64 [M, len(nvec)]."""

    def __init__(self, nvec: tuple[int, ...]) -> None:
        super().__init__()
        self.nvec = nvec
        self.num_params = sum(nvec)
        self.num_noise = sum(nvec)
        self.noise: Literal["uniform", "normal", "none"] = "uniform"

    def sample(self, params: Tensor, noise: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return kernels.categorical_sample(masked(params, mask), noise, self.nvec)

    def mode(self, params: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return kernels.categorical_mode(masked(params, mask), self.nvec)

    def evaluate(self, params: Tensor, action: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(logprob [M], entropy [M]) of all choices together, differentiable."""
        return kernels.categorical_evaluate(masked(params, mask), action, self.nvec)


class Gaussian(nn.Module):
    """Diagonal normal with a state-independent log standard deviation, params are the mean [M, A]."""

    def __init__(self, size: int, *, log_std_init: float = 0.0) -> None:
        super().__init__()
        self.num_params = size
        self.num_noise = size
        self.noise: Literal["uniform", "normal", "none"] = "normal"
        self.log_std = nn.Parameter(torch.full((size,), log_std_init))

    def sample(self, params: Tensor, noise: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return kernels.gaussian_sample(params, self.log_std, noise)

    def mode(self, params: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return params, kernels.gaussian_evaluate(params, self.log_std, params)[0]

    def evaluate(self, params: Tensor, action: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return kernels.gaussian_evaluate(params, self.log_std, action)


class SquashedGaussian(nn.Module):
    """tanh of a diagonal normal (Haarnoja et al. 2018), params are mean and log-std [M, 2A], actions in (-1, 1)."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.num_params = 2 * size
        self.num_noise = size
        self.noise: Literal["uniform", "normal", "none"] = "normal"

    def split(self, params: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_std = params.split(self.size, dim=-1)
        return mean.contiguous(), log_std.clamp(LOG_STD_MIN, LOG_STD_MAX)

    def sample(self, params: Tensor, noise: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Reparameterised: differentiable in the parameters."""
        return kernels.squashed_gaussian_head(params, (LOG_STD_MIN, LOG_STD_MAX), noise)

    def mode(self, params: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        mean, log_std = self.split(params)
        return kernels.squashed_gaussian_sample(mean, log_std.contiguous(), torch.zeros_like(mean))

    def evaluate(self, params: Tensor, action: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Log-probability of given actions in (-1, 1); the entropy has no closed form, −logprob stands for it."""
        mean, log_std = self.split(params)
        clipped = action.clamp(-1 + 1e-6, 1 - 1e-6)
        raw = torch.atanh(clipped)
        logprob, _ = kernels.gaussian_evaluate(mean, log_std.contiguous(), raw)
        correction = (2.0 * (math.log(2.0) - raw - nn.functional.softplus(-2.0 * raw))).sum(-1)
        return logprob - correction, correction - logprob


class Deterministic(nn.Module):
    """tanh of the network's output, actions in (-1, 1). The network's last layer applies the tanh."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.num_params = size
        self.num_noise = 0
        self.noise: Literal["uniform", "normal", "none"] = "none"

    def sample(self, params: Tensor, noise: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.mode(params)

    def mode(self, params: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return params, torch.zeros(params.shape[0])

    def evaluate(self, params: Tensor, action: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return torch.zeros(params.shape[0]), torch.zeros(params.shape[0])


class QValues(nn.Module):
    """Greedy choice over action values.

    `num_atoms` Z = 1: params are the values [M, n], or value and advantages [M, 1 + n] when `dueling` (Wang et al. 2016:
    Q = V + A - mean A). Z > 1: per action the logits of a categorical return distribution on `support` (C51, Bellemare et
    al. 2017) or, without support, its quantiles (QR-DQN, Dabney et al. 2018); [M, n * Z] or [M, (1 + n) * Z].
    """

    def __init__(
        self, n: int, *, dueling: bool = False, num_atoms: int = 1, support: tuple[float, float] | None = None
    ) -> None:
        super().__init__()
        self.n, self.dueling, self.num_atoms = n, dueling, num_atoms
        self.num_params = (n + int(dueling)) * num_atoms
        self.num_noise = 0
        self.noise: Literal["uniform", "normal", "none"] = "none"
        self.has_support = support is not None
        low, high = support or (0.0, 0.0)
        self.register_buffer("support_Z", torch.linspace(low, high, num_atoms), persistent=False)
        self.support_Z: Tensor

    @property
    def is_plain(self) -> bool:
        """True if the parameters are the action values themselves."""
        return not self.dueling and self.num_atoms == 1

    def atoms(self, params: Tensor) -> Tensor:
        """Per action the values [M, n], logits or quantiles [M, n, Z], with the dueling sum applied."""
        out = params.view(params.shape[0], -1, self.num_atoms)
        if self.dueling:
            value, advantage = out[:, :1], out[:, 1:]
            out = value + advantage - advantage.mean(dim=1, keepdim=True)
        return out.squeeze(2) if self.num_atoms == 1 else out

    def values(self, params: Tensor) -> Tensor:
        """Expected return of each action [M, n]."""
        atoms = self.atoms(params)
        if self.num_atoms == 1:
            return atoms
        if self.has_support:
            return (torch.softmax(atoms, dim=2) * self.support_Z).sum(2)
        return atoms.mean(2)

    def sample(self, params: Tensor, noise: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.mode(params, mask)

    def mode(self, params: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return masked(self.values(params), mask).argmax(1), torch.zeros(params.shape[0])

    def evaluate(self, params: Tensor, action: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return torch.zeros(params.shape[0]), torch.zeros(params.shape[0])


Head = Categorical | MultiCategorical | Gaussian | SquashedGaussian | Deterministic | QValues
