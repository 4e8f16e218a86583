"""The learner's step with PyTorch's own products, for the price of ours: everything else is the same code."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from lockstep.layers.projection import Projection
from lockstep.models.language import LanguageModel


class TorchProjection(nn.Module):
    """A `Projection` whose product is PyTorch's."""

    def __init__(self, projection: Projection) -> None:
        super().__init__()
        self.weight, self.bias = projection.weight, projection.bias

    def forward(self, x_MK: Tensor, adapters: object = ()) -> Tensor:
        assert self.weight is not None
        return functional.linear(x_MK, self.weight, self.bias)


def with_torch_products(model: LanguageModel) -> LanguageModel:
    """The same model, each of its matrices in a `TorchProjection`; only for training, which goes op by op."""
    for path, module in list(model.named_modules()):
        if isinstance(module, Projection):
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, TorchProjection(module))
    assert torch.is_grad_enabled()
    return model
