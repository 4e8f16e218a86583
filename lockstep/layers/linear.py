"""Dense layers on the exact kernels. Weights are stored [in, out], the layout that the kernels read without packing.

Legend: M rows, K input features, N output features, E ensemble members.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from lockstep import kernels

Activation = Literal["none", "tanh", "relu", "elu", "silu", "gelu", "sigmoid"]
ComputeDtype = Literal["fp32", "bf16"]


class MLP(nn.Module):
    """A chain of dense layers, or an ensemble of such chains evaluated in one call.

    Args:
        sizes: widths, input first, e.g. `(4, 64, 64, 2)`.
        activation: after every layer but the last.
        output_activation: after the last layer.
        ensemble: E > 0 gives E independent chains, weights [E, K, N]; the output is [E, M, N].
        compute_dtype: operand precision of the products; sums are fp32 either way.

    >>> MLP((4, 8, 2), "tanh")(torch.zeros(3, 4)).shape
    torch.Size([3, 2])
    """

    def __init__(
        self,
        sizes: tuple[int, ...],
        activation: Activation,
        *,
        output_activation: Activation = "none",
        ensemble: int = 0,
        compute_dtype: ComputeDtype = "fp32",
    ) -> None:
        super().__init__()
        self.sizes = tuple(sizes)
        self.activation = activation
        self.output_activation = output_activation
        self.ensemble = ensemble
        self.compute_dtype = compute_dtype
        lead = (ensemble,) if ensemble else ()
        pairs = list(zip(self.sizes[:-1], self.sizes[1:], strict=True))
        self.weights = nn.ParameterList([nn.Parameter(torch.zeros(*lead, k, n)) for k, n in pairs])
        self.biases = nn.ParameterList([nn.Parameter(torch.zeros(*lead, n)) for _, n in pairs])
        self._weight_list = list(self.weights)
        self._bias_list = list(self.biases)

    def init_orthogonal(self, generator: torch.Generator, *, gain: float, out_gain: float) -> MLP:
        """Orthogonal weights (Saxe et al. 2014), zero biases: `gain` in hidden layers, `out_gain` in the last."""
        last = len(self.weights) - 1
        for index, weight in enumerate(self.weights):
            for member in weight.data.unbind(0) if self.ensemble else [weight.data]:
                orthogonal_(member, out_gain if index == last else gain, generator)
        for bias in self.biases:
            bias.data.zero_()
        return self

    def init_uniform(self, generator: torch.Generator) -> MLP:
        """Weights and biases uniform in ±1/sqrt(in), PyTorch's own default for dense layers."""
        for weight, bias in zip(self.weights, self.biases, strict=True):
            bound = 1.0 / math.sqrt(weight.shape[-2])
            weight.data.uniform_(-bound, bound, generator=generator)
            bias.data.uniform_(-bound, bound, generator=generator)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """x [M, K] or [E, M, K] -> [M, N] or [E, M, N]."""
        return kernels.mlp(
            x,
            self._weight_list,
            self._bias_list,
            self.activation,
            output_activation=self.output_activation,
            dtype=self.compute_dtype,
        )

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def]
        """Moving a module can replace its Parameters; the lists handed to the kernel follow."""
        module = super()._apply(fn, recurse)
        self._weight_list = list(self.weights)
        self._bias_list = list(self.biases)
        return module


def orthogonal_(weight_KN: Tensor, gain: float, generator: torch.Generator) -> None:
    """Fill with a (semi-)orthogonal matrix scaled by `gain`, in place."""
    rows, cols = weight_KN.shape
    normal = torch.randn(max(rows, cols), min(rows, cols), generator=generator)
    q, r = torch.linalg.qr(normal)
    q = q * torch.sign(torch.diagonal(r))
    weight_KN.copy_((q if rows >= cols else q.T) * gain)


class Linear(nn.Module):
    """One dense layer, y = act(x W + b), weight [in, out].

    >>> Linear(4, 2)(torch.ones(1, 4)).shape
    torch.Size([1, 2])
    """

    def __init__(
        self, in_size: int, out_size: int, activation: Activation = "none", compute_dtype: ComputeDtype = "fp32"
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(in_size, out_size))
        self.bias = nn.Parameter(torch.zeros(out_size))
        self.activation = activation
        self.compute_dtype = compute_dtype

    def init_orthogonal(self, generator: torch.Generator, gain: float) -> Linear:
        orthogonal_(self.weight.data, gain, generator)
        self.bias.data.zero_()
        return self

    def init_uniform(self, generator: torch.Generator) -> Linear:
        bound = 1.0 / math.sqrt(self.weight.shape[0])
        self.weight.data.uniform_(-bound, bound, generator=generator)
        self.bias.data.uniform_(-bound, bound, generator=generator)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """x [M, K] -> [M, N]."""
        return kernels.linear(x, self.weight, self.bias, self.activation, dtype=self.compute_dtype)


class NoisyMLP(nn.Module):
    """A chain of factorised-Gaussian noisy layers (Fortunato et al. 2018, section 3.1, b).

    The noise is set from outside by `set_noise`, so that it can be counter-based; with zero noise the chain is the mean
    network, which is what a deployed policy runs.
    """

    def __init__(self, sizes: tuple[int, ...], activation: Activation, *, sigma0: float = 0.5) -> None:
        super().__init__()
        self.sizes = tuple(sizes)
        self.activation = activation
        self.sigma0 = sigma0
        pairs = list(zip(self.sizes[:-1], self.sizes[1:], strict=True))
        self.weights = nn.ParameterList([nn.Parameter(torch.zeros(k, n)) for k, n in pairs])
        self.biases = nn.ParameterList([nn.Parameter(torch.zeros(n)) for _, n in pairs])
        self.weight_sigmas = nn.ParameterList([nn.Parameter(torch.zeros(k, n)) for k, n in pairs])
        self.bias_sigmas = nn.ParameterList([nn.Parameter(torch.zeros(n)) for _, n in pairs])
        self.num_noise = sum(k + n for k, n in pairs)
        self._noise: list[tuple[Tensor, Tensor]] | None = None

    def init_uniform(self, generator: torch.Generator) -> NoisyMLP:
        """Means uniform in ±1/sqrt(in), sigmas sigma0/sqrt(in), as the paper has them."""
        for index, (k, _) in enumerate(zip(self.sizes[:-1], self.sizes[1:], strict=True)):
            bound = 1.0 / math.sqrt(k)
            self.weights[index].data.uniform_(-bound, bound, generator=generator)
            self.biases[index].data.uniform_(-bound, bound, generator=generator)
            self.weight_sigmas[index].data.fill_(self.sigma0 * bound)
            self.bias_sigmas[index].data.fill_(self.sigma0 * bound)
        return self

    def set_noise(self, normal: Tensor | None) -> None:
        """Use `num_noise` standard normals [num_noise], or none (the mean network)."""
        if normal is None:
            self._noise = None
            return
        scaled = normal.sign() * normal.abs().sqrt()
        self._noise, start = [], 0
        for k, n in zip(self.sizes[:-1], self.sizes[1:], strict=True):
            self._noise.append((scaled[start : start + k], scaled[start + k : start + k + n]))
            start += k + n

    def forward(self, x_MK: Tensor) -> Tensor:
        """x [M, K] -> [M, N]."""
        weights, biases = list(self.weights), list(self.biases)
        if self._noise is not None:
            for index, (noise_in, noise_out) in enumerate(self._noise):
                weights[index] = weights[index] + self.weight_sigmas[index] * torch.outer(noise_in, noise_out)
                biases[index] = biases[index] + self.bias_sigmas[index] * noise_out
        return kernels.mlp(x_MK, weights, biases, self.activation)
