"""Bodies that turn network input into a latent vector: image encoders, their combination with vectors, recurrence.

Legend: M rows, T time steps, C channels, H and W image size, D vector features, L latent features.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lockstep.core.errors import ConfigError
from lockstep.layers.conv import Conv2d
from lockstep.layers.linear import ComputeDtype, Linear
from lockstep.models.control.preprocess import VECTOR, Features

Shape = tuple[int, int, int]


class ConvNet(nn.Module):
    """Convolutions, each with a ReLU, and a dense layer. Input [M, C, H, W], output [M, L]; `shape` is (C, H, W)."""

    def __init__(self, convs: list[Conv2d], shape: Shape, scale: float, size: int, dtype: ComputeDtype) -> None:
        super().__init__()
        self.scale = scale
        self.convs = nn.ModuleList(convs)
        self.head = Linear(_flat(convs, *shape[1:]), size, "relu", dtype)
        self.out_size = size

    def init(self, generator: torch.Generator) -> None:
        for layer in [*self.convs, self.head]:
            layer.init_orthogonal(generator, 2**0.5)  # type: ignore[operator]

    def forward(self, x_MCHW: Tensor) -> Tensor:
        x = x_MCHW.to(torch.float32) * self.scale
        for conv in self.convs:
            x = conv(x)
        return self.head(x.flatten(1))


def nature_cnn(shape: Shape, scale: float, size: int, dtype: ComputeDtype) -> ConvNet:
    """Three convolutions (Mnih et al. 2015), for images of at least 36 x 36."""
    channels, height, width = shape
    if min(height, width) < 36:
        raise ConfigError(f"nature_cnn needs images of at least 36x36; got {height}x{width}; use small_cnn")
    convs = [
        Conv2d(channels, 32, kernel=8, stride=4, activation="relu", compute_dtype=dtype),
        Conv2d(32, 64, kernel=4, stride=2, activation="relu", compute_dtype=dtype),
        Conv2d(64, 64, kernel=3, stride=1, activation="relu", compute_dtype=dtype),
    ]
    return ConvNet(convs, shape, scale, size, dtype)


def small_cnn(shape: Shape, scale: float, size: int, dtype: ComputeDtype) -> ConvNet:
    """One 3x3 convolution, for grids such as MinAtar's 10x10 (Young & Tian 2019) and MiniGrid's 7x7."""
    convs = [Conv2d(shape[0], 16, kernel=3, activation="relu", compute_dtype=dtype)]
    return ConvNet(convs, shape, scale, size, dtype)


class ImpalaBlock(nn.Module):
    """Convolution, 3x3 max pool of stride 2, two residual blocks of two convolutions."""

    def __init__(self, in_channels: int, out_channels: int, dtype: ComputeDtype) -> None:
        super().__init__()
        self.first = Conv2d(in_channels, out_channels, kernel=3, padding=1, compute_dtype=dtype)
        self.residuals = nn.ModuleList(
            [Conv2d(out_channels, out_channels, kernel=3, padding=1, compute_dtype=dtype) for _ in range(4)]
        )

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool2d(self.first(x), kernel_size=3, stride=2, padding=1)
        for index in (0, 2):
            y = self.residuals[index](torch.relu(x))
            x = x + self.residuals[index + 1](torch.relu(y))
        return x


class ImpalaCNN(nn.Module):
    """The deep residual encoder of IMPALA (Espeholt et al. 2018, figure 3): 16, 32, 32 channels and a dense layer."""

    def __init__(self, shape: Shape, scale: float, size: int, dtype: ComputeDtype) -> None:
        super().__init__()
        self.scale = scale
        channels, height, width = shape
        widths = (channels, 16, 32, 32)
        self.blocks = nn.ModuleList([ImpalaBlock(a, b, dtype) for a, b in itertools.pairwise(widths)])
        for _ in range(3):
            height, width = (height + 1) // 2, (width + 1) // 2
        self.head = Linear(32 * height * width, size, "relu", dtype)
        self.out_size = size

    def init(self, generator: torch.Generator) -> None:
        for module in self.modules():
            if isinstance(module, Conv2d):
                module.init_orthogonal(generator, 1.0)
        self.head.init_orthogonal(generator, 2**0.5)

    def forward(self, x_MCHW: Tensor) -> Tensor:
        x = x_MCHW.to(torch.float32) * self.scale
        for block in self.blocks:
            x = block(x)
        return self.head(torch.relu(x).flatten(1))


ENCODERS: dict[str, Callable[[Shape, float, int, ComputeDtype], ConvNet | ImpalaCNN]] = {
    "nature_cnn": nature_cnn,
    "small_cnn": small_cnn,
    "impala_cnn": ImpalaCNN,
}


class Encoder(nn.Module):
    """Every image through its encoder, joined with the vector: dictionary or tensor in, [M, L] out."""

    def __init__(self, features: Features, kind: str, image_size: int, dtype: ComputeDtype) -> None:
        super().__init__()
        self.features = features
        self.images = nn.ModuleDict()
        for name, shape in features.images.items():
            chosen = kind if kind in ENCODERS else ("nature_cnn" if min(shape[1:]) >= 36 else "small_cnn")
            self.images[_key(name)] = ENCODERS[chosen](shape, features.image_scales[name], image_size, dtype)
        self.out_size = features.num_vector + image_size * len(self.images)

    def init(self, generator: torch.Generator) -> None:
        for encoder in self.images.values():
            encoder.init(generator)  # type: ignore[operator]

    def forward(self, x: Any) -> Tensor:
        if isinstance(x, Tensor):
            return x
        parts = [x[VECTOR]] if self.features.num_vector else []
        parts += [self.images[_key(name)](x[name]) for name in self.features.images]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _key(name: str) -> str:
    return "image" + ("_" + name.replace(".", "_") if name else "")


def _flat(convs: list[Conv2d], height: int, width: int) -> int:
    channels = 0
    for conv in convs:
        channels, height, width = conv.output_shape(height, width)
    return channels * height * width
