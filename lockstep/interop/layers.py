"""Layers of a policy in the form that tracers record well: the parameters are buffers that a traced call can see, and
without our kernels a convolution is one operator.

Legend: M rows or images, K input features, N output features, C channels, H and W size.
"""

from __future__ import annotations

from torch import Tensor, nn

from lockstep import kernels
from lockstep.kernels.mlp.naive import ACTIVATIONS, round_to_bf16
from lockstep.layers.conv import Conv2d
from lockstep.layers.linear import MLP, NoisyMLP


class Chain(nn.Module):
    """`MLP`, or the mean network of a `NoisyMLP`, with a tracer's view of its weights."""

    def __init__(self, source: MLP | NoisyMLP) -> None:
        super().__init__()
        self.num_layers = len(source.weights)
        self.activation = source.activation
        self.output_activation = source.output_activation if isinstance(source, MLP) else "none"
        self.compute_dtype = source.compute_dtype if isinstance(source, MLP) else "fp32"
        for index in range(self.num_layers):
            self.register_buffer(f"weight{index}", source.weights[index].detach())
            self.register_buffer(f"bias{index}", source.biases[index].detach())

    def forward(self, x_MK: Tensor) -> Tensor:
        """x [M, K] -> [M, N]."""
        weights = [self.get_buffer(f"weight{index}") for index in range(self.num_layers)]
        biases = [self.get_buffer(f"bias{index}") for index in range(self.num_layers)]
        return kernels.mlp(x_MK, weights, biases, self.activation, self.output_activation, self.compute_dtype)


class LibraryConv2d(nn.Module):
    """`Conv2d` as the runtime's own convolution, weight [N, C, k, k]."""

    def __init__(self, source: Conv2d) -> None:
        super().__init__()
        k = source.kernel
        weight = source.weight.detach().T.reshape(source.out_channels, source.in_channels, k, k).contiguous()
        self.rounds = source.compute_dtype == "bf16"
        self.register_buffer("weight", round_to_bf16(weight) if self.rounds else weight)
        self.register_buffer("bias", source.bias.detach())
        self.weight: Tensor
        self.bias: Tensor
        self.stride, self.padding, self.activation = source.stride, source.padding, source.activation

    def forward(self, x_MCHW: Tensor) -> Tensor:
        """x [M, C, H, W] -> [M, N, H', W']."""
        x = round_to_bf16(x_MCHW) if self.rounds else x_MCHW
        out = nn.functional.conv2d(x, self.weight, self.bias, stride=self.stride, padding=self.padding)
        return ACTIVATIONS[self.activation](out)


def make_traceable(module: nn.Module, *, portable: bool) -> None:
    """Replace layers inside `module` by their forms above, in place."""
    for name, child in list(module.named_children()):
        if isinstance(child, MLP | NoisyMLP):
            setattr(module, name, Chain(child))
        elif isinstance(child, Conv2d) and portable:
            setattr(module, name, LibraryConv2d(child))
        else:
            make_traceable(child, portable=portable)
    for name, parameter in list(module.named_parameters(recurse=False)):
        delattr(module, name)
        module.register_buffer(name, parameter.detach())
