"""Critics of replay algorithms: training state that a deployed policy does not carry.

Legend: M rows, E critics, A action dimensions, Z outputs of each critic (values of discrete actions, quantiles, or 1).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lockstep.kernels import mlp
from lockstep.layers.linear import MLP
from lockstep.models.control.networks import Encoder
from lockstep.models.control.preprocess import Features
from lockstep.models.control.spec import NetworkConfig


class Critics(nn.Module):
    """E independent networks over (features, action) or features alone, evaluated in one call. Images pass through an
    encoder of their own, which the E networks share.

    Args:
        features: what the policy's preprocessing yields.
        network: widths, activation, encoder, initialisation.
        num_actions: A, 0 for critics of the observation alone.
        num_critics: E.
        num_outputs: Z.
        seed: of the initial weights.

    >>> critics = Critics(Features(3, {}, {}, 0), NetworkConfig(), num_actions=2, num_critics=2, num_outputs=1, seed=0)
    >>> critics(torch.zeros(5, 3), torch.zeros(5, 2)).shape
    torch.Size([2, 5, 1])
    """

    def __init__(
        self,
        features: Features,
        network: NetworkConfig,
        *,
        num_actions: int,
        num_critics: int,
        num_outputs: int,
        seed: int,
    ) -> None:
        super().__init__()
        self.encoder = Encoder(features, network.encoder, network.encoder_size, network.compute_dtype)
        widths = (self.encoder.out_size + num_actions, *network.hidden_sizes, num_outputs)
        self.mlp = MLP(widths, network.activation, ensemble=num_critics, compute_dtype=network.compute_dtype)
        generator = torch.Generator().manual_seed(seed)
        self.encoder.init(generator)
        if network.init == "uniform":
            self.mlp.init_uniform(generator)
        else:
            self.mlp.init_orthogonal(generator, gain=2**0.5, out_gain=1.0)
        # Views that share the parameters' memory: gradients reach the action and stop at the weights.
        self._constant_weights = [weight.detach() for weight in self.mlp.weights]
        self._constant_biases = [bias.detach() for bias in self.mlp.biases]

    def forward(self, features: Any, action: Tensor | None = None) -> Tensor:
        """[E, M, Z], differentiable in weights and action."""
        return self.mlp(_join(self.encoder(features), action))

    def with_constant_weights(self, features: Any, action: Tensor | None = None) -> Tensor:
        """[E, M, Z], differentiable in the action only, at half the cost of a full backward pass."""
        with torch.no_grad():
            latent = self.encoder(features)
        return mlp(
            _join(latent, action),
            self._constant_weights,
            self._constant_biases,
            self.mlp.activation,
            dtype=self.mlp.compute_dtype,
        )


def _join(latent_MK: Tensor, action_MA: Tensor | None) -> Tensor:
    return latent_MK if action_MA is None else torch.cat((latent_MK, action_MA), dim=1)
