"""Convolution as an exact product: patches are copied, never summed, then one dense kernel reduces each of them in a
fixed order, so that an image's output does not depend on the batch it arrives in.

Legend: M images, C input channels, N output channels, H and W height and width, K = C * k * k patch length.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lockstep import kernels
from lockstep.layers.linear import Activation, ComputeDtype, orthogonal_


class Conv2d(nn.Module):
    """2-D convolution with a fused activation; weight [C*k*k, N].

    >>> Conv2d(3, 8, kernel=3, stride=1, padding=1)(torch.zeros(2, 3, 5, 5)).shape
    torch.Size([2, 8, 5, 5])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        kernel: int,
        stride: int = 1,
        padding: int = 0,
        activation: Activation = "none",
        compute_dtype: ComputeDtype = "fp32",
    ) -> None:
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel, self.stride, self.padding = kernel, stride, padding
        self.activation = activation
        self.compute_dtype = compute_dtype
        self.weight = nn.Parameter(torch.zeros(in_channels * kernel * kernel, out_channels))
        self.bias = nn.Parameter(torch.zeros(out_channels))

    def init_orthogonal(self, generator: torch.Generator, gain: float) -> Conv2d:
        orthogonal_(self.weight.data, gain, generator)
        self.bias.data.zero_()
        return self

    def init_uniform(self, generator: torch.Generator) -> Conv2d:
        bound = 1.0 / math.sqrt(self.weight.shape[0])
        self.weight.data.uniform_(-bound, bound, generator=generator)
        self.bias.data.uniform_(-bound, bound, generator=generator)
        return self

    def output_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(N, H', W') for an input of H x W."""
        size = self.kernel - 2 * self.padding
        return self.out_channels, (height - size) // self.stride + 1, (width - size) // self.stride + 1

    def forward(self, x_MCHW: Tensor) -> Tensor:
        """x [M, C, H, W] -> [M, N, H', W'] (a channels-last view)."""
        if self.padding:
            x_MCHW = nn.functional.pad(x_MCHW, (self.padding,) * 4)
        patches = x_MCHW.unfold(2, self.kernel, self.stride).unfold(3, self.kernel, self.stride)
        num, _, height, width = patches.shape[:4]
        rows = patches.permute(0, 2, 3, 1, 4, 5).reshape(num * height * width, -1)
        out = kernels.linear(rows, self.weight, self.bias, self.activation, dtype=self.compute_dtype)
        return out.view(num, height, width, self.out_channels).permute(0, 3, 1, 2)
