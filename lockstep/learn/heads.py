"""Small modules beside a language model that turn hidden states into one number: values and rewards.

Legend: R rows, E model width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lockstep.layers.projection import Precision, Projection


class ScalarHead(nn.Module):
    """hidden [R, E] -> [R]: V of the prefix that ends at a row, or the reward of the text that ends there.

    One fp32 row product whatever the model's dtype, so that a row's number does not depend on the other rows. Starts at 0.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.projection = Projection(width, (1,), Precision.of("fp32", trainable=True))
        nn.init.zeros_(self.weight)

    @property
    def weight(self) -> nn.Parameter:
        """[1, E]."""
        weight = self.projection.weight
        assert weight is not None
        return weight

    def forward(self, hidden_RE: Tensor) -> Tensor:
        value_R1: Tensor = self.projection(hidden_RE)
        return value_R1.squeeze(1)

    @torch.no_grad()
    def fill_random(self, generator: torch.Generator, std: float) -> None:
        """Normal weights."""
        self.weight.normal_(0.0, std, generator=generator)
