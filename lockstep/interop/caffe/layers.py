"""Layers with weights. Each names its blobs in the order of Caffe's files and keeps their layout there.

Legend: M images or rows, T time steps, C input and N output channels or units, K input features, H and W size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lockstep.interop.caffe.fillers import fill
from lockstep.interop.caffe.ops import Shapes, axis_of
from lockstep.interop.caffe.pooling import spatial
from lockstep.interop.caffe.reader import Blobs, LayerSpec
from lockstep.interop.caffe.text import Message


class Source:
    """Where a layer's blobs come from: the file's, checked, or fillers when there is no file."""

    def __init__(self, layer: LayerSpec, blobs: Blobs | None, generator: torch.Generator) -> None:
        self.layer = layer
        self.blobs = blobs
        self.generator = generator
        self.taken = 0

    def take(self, shape: tuple[int, ...], filler: Message, default: float = 0.0) -> Tensor:
        """The next blob, of this shape; `default` is what an absent filler fills in.

        Raises:
            FormatError: the file has none, or one of another shape.
        """
        number, self.taken = self.taken, self.taken + 1
        if any(dim < 1 for dim in shape):
            raise self.layer.fail(f"blob {number} would have shape {shape}; sizes are at least 1")
        if self.blobs is None:
            return fill(filler, shape, self.generator, default)
        if number >= len(self.blobs):
            raise self.layer.fail(
                f"needs a blob {number} of shape {shape}; the weights have {len(self.blobs)} for this layer. "
                "Are they weights of this network?"
            )
        blob = self.blobs[number]
        if _without_ones(blob.shape) != _without_ones(shape):
            raise self.layer.fail(f"blob {number} should have shape {shape}; the weights have {blob.shape}")
        return torch.from_numpy(blob.astype("float32").reshape(shape).copy())

    def finish(self) -> None:
        """Refuse blobs that no part of the layer took."""
        if self.blobs is not None and self.taken < len(self.blobs):
            raise self.layer.fail(f"has {self.taken} blobs; the weights have {len(self.blobs)} for this layer")


def _without_ones(shape: Sequence[int]) -> tuple[int, ...]:
    # Files before 2015 write every blob with four dimensions, ones in front.
    first = next((index for index, dim in enumerate(shape) if dim != 1), len(shape))
    return tuple(shape[first:])


class Convolution(nn.Module):
    """2-d convolution, weight [N, C / groups, H, W]; `transposed` for Deconvolution, weight [C, N / groups, H, W]."""

    blobs = ("weight", "bias")

    def __init__(self, layer: LayerSpec, shapes: Shapes, source: Source) -> None:
        super().__init__()
        name = "convolution_param"
        param = layer.param(name)
        if len(shapes[0]) != 4 or param.integer("axis", 1) != 1:
            raise layer.fail(f"input of shape {shapes[0]}; images [M, C, H, W] were expected")
        self.transposed = layer.type == "Deconvolution"
        self.groups, num, channels = param.integer("group", 1), param.integer("num_output", 0), shapes[0][1]
        self.kernel = spatial(layer, name, "kernel", 0, "kernel_size")
        self.stride = spatial(layer, name, "stride", 1)
        self.pad = spatial(layer, name, "pad", 0)
        self.dilation = spatial(layer, name, "dilation", 1)
        if self.groups < 1 or channels % self.groups or num < 1 or num % self.groups:
            raise layer.fail(f"group={self.groups} must divide num_output={num} and {channels} channels")
        if min(*self.kernel, *self.stride, *self.dilation) < 1 or min(self.pad) < 0:
            raise layer.fail("kernel, stride and dilation must be at least 1, pad at least 0")
        first, second = (channels, num) if self.transposed else (num, channels)
        shape = (first, second // self.groups, *self.kernel)
        self.weight = nn.Parameter(source.take(shape, param.message("weight_filler")))
        has_bias = param.flag("bias_term", True)
        self.bias = nn.Parameter(source.take((num,), param.message("bias_filler"))) if has_bias else None

    def forward(self, x_MCHW: Tensor) -> Tensor:
        """x [M, C, H, W] -> [M, N, H', W']."""
        if self.transposed:
            return F.conv_transpose2d(
                x_MCHW, self.weight, self.bias, self.stride, self.pad, 0, self.groups, self.dilation
            )
        return F.conv2d(x_MCHW, self.weight, self.bias, self.stride, self.pad, self.dilation, self.groups)


class InnerProduct(nn.Module):
    """Linear map of everything from `axis` on, weight [N, K] ([K, N] where `transpose`)."""

    blobs = ("weight", "bias")

    def __init__(self, layer: LayerSpec, shapes: Shapes, source: Source) -> None:
        super().__init__()
        param = layer.param("inner_product_param")
        self.axis = axis_of(layer, param.integer("axis", 1), len(shapes[0]))
        self.transpose = param.flag("transpose", False)
        num, features = param.integer("num_output", 0), math.prod(shapes[0][self.axis :])
        shape = (features, num) if self.transpose else (num, features)
        self.weight = nn.Parameter(source.take(shape, param.message("weight_filler")))
        has_bias = param.flag("bias_term", True)
        self.bias = nn.Parameter(source.take((num,), param.message("bias_filler"))) if has_bias else None

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N]."""
        weight_NK = self.weight.T if self.transpose else self.weight
        return F.linear(x.flatten(self.axis), weight_NK, self.bias)


class Embed(nn.Module):
    """Row of a table for each index, weight [K, N]."""

    blobs = ("weight", "bias")

    def __init__(self, layer: LayerSpec, shapes: Shapes, source: Source) -> None:
        super().__init__()
        param = layer.param("embed_param")
        num, rows = param.integer("num_output", 0), param.integer("input_dim", 0)
        self.weight = nn.Parameter(source.take((rows, num), param.message("weight_filler")))
        has_bias = param.flag("bias_term", True)
        self.bias = nn.Parameter(source.take((num,), param.message("bias_filler"))) if has_bias else None

    def forward(self, index: Tensor) -> Tensor:
        """index [...] -> [..., N]."""
        out = F.embedding(index.long(), self.weight)
        return out if self.bias is None else out + self.bias


class BatchNorm(nn.Module):
    """Normalisation by channel. The file's mean and variance are sums; the third blob is what they are divided by.

    In evaluation, or with `use_global_stats: true`, the stored statistics are used; while training the batch's, which then
    enter the stored ones (`moving_average_fraction`, variance with the factor m / (m - 1)).
    """

    blobs = ("mean_sum", "variance_sum", "factor")

    def __init__(self, layer: LayerSpec, shapes: Shapes, source: Source) -> None:
        super().__init__()
        param = layer.param("batch_norm_param")
        channels = shapes[0][1] if len(shapes[0]) > 1 else 1
        self.eps, self.fraction = param.real("eps", 1e-5), param.real("moving_average_fraction", 0.999)
        self.always_global = param.flag("use_global_stats", False)
        self.never_global = "use_global_stats" in param and not self.always_global
        empty = param.message("")
        for name, shape in zip(self.blobs, ((channels,), (channels,), (1,)), strict=True):
            self.register_buffer(name, source.take(shape, empty))
        self.mean_sum: Tensor
        self.variance_sum: Tensor
        self.factor: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """x [M, C, ...] -> the same shape."""
        shape = (1, -1) + (1,) * (x.ndim - 2) if x.ndim > 1 else (-1,)
        if self.always_global or not (self.training or self.never_global):
            scale = torch.where(self.factor == 0, 0.0, 1 / self.factor)
            mean, variance = self.mean_sum * scale, self.variance_sum * scale
        else:
            dims = [dim for dim in range(x.ndim) if dim != 1] if x.ndim > 1 else [0]
            mean, variance = x.mean(dims), x.var(dims, correction=0)
            if x.device.type != "meta":
                self._update(mean.detach(), variance.detach(), x.numel() // mean.numel())
        return (x - mean.view(shape)) / (variance.view(shape) + self.eps).sqrt()

    def _update(self, mean: Tensor, variance: Tensor, count: int) -> None:
        with torch.no_grad():
            self.factor.mul_(self.fraction).add_(1)
            self.mean_sum.mul_(self.fraction).add_(mean)
            self.variance_sum.mul_(self.fraction).add_(variance, alpha=count / (count - 1) if count > 1 else 1.0)


class Affine(nn.Module):
    """Scale and Bias: multiply by one factor and add one term, of an own blob over `num_axes` axes or of a second input."""

    def __init__(self, layer: LayerSpec, shapes: Shapes, source: Source) -> None:
        super().__init__()
        scales = layer.type == "Scale"
        param = layer.param("scale_param" if scales else "bias_param")
        self.start = axis_of(layer, param.integer("axis", 1), len(shapes[0]))
        self.scales = scales
        self.takes_second = len(shapes) > 1
        num_axes = param.integer("num_axes", 1)
        own = shapes[0][self.start :] if num_axes == -1 else shapes[0][self.start : self.start + num_axes]
        own = shapes[1] if self.takes_second else own
        if tuple(shapes[0][self.start : self.start + len(own)]) != tuple(own) or num_axes < -1:
            raise layer.fail(f"a factor of shape {own} at axis {self.start} of an input {shapes[0]}")
        self.num_after = len(shapes[0]) - self.start - len(own)
        has_term = scales and param.flag("bias_term", False)
        names = ([] if self.takes_second else ["factor"]) + (["bias"] if has_term else [])
        fillers = {"factor": param.message("filler"), "bias": param.message("bias_filler")}
        default = 1.0 if scales and "filler" not in param else 0.0
        self.blobs = tuple(names)
        self.factor: nn.Parameter
        self.bias: nn.Parameter
        for name in names:
            self.register_parameter(name, nn.Parameter(source.take(tuple(own), fillers[name], default)))
            default = 0.0

    def forward(self, x: Tensor, second: Tensor | None = None) -> Tensor:
        """x of any shape -> the same shape."""
        factor = second if self.takes_second and second is not None else self.factor
        out = x * self._spread(factor) if self.scales else x + self._spread(factor)
        return out + self._spread(self.bias) if "bias" in self.blobs else out

    def _spread(self, value: Tensor) -> Tensor:
        return value.reshape(*value.shape, *(1,) * self.num_after)


class PReLU(nn.Module):
    """max(0, x) + slope min(0, x), a slope for each channel or one."""

    blobs = ("slope",)

    def __init__(self, layer: LayerSpec, shapes: Shapes, source: Source) -> None:
        super().__init__()
        param = layer.param("prelu_param")
        default = 0.0 if "filler" in param else 0.25
        shape = (1,) if param.flag("channel_shared", False) else (shapes[0][1] if len(shapes[0]) > 1 else 0,)
        self.slope = nn.Parameter(source.take(shape, param.message("filler"), default))

    def forward(self, x: Tensor) -> Tensor:
        """x [M, C, ...] -> the same shape."""
        return F.prelu(x, self.slope)


class Constant(nn.Module):
    """`Parameter`: a blob of its own as output."""

    blobs = ("value",)

    def __init__(self, layer: LayerSpec, shapes: Shapes, source: Source) -> None:
        super().__init__()
        shape = tuple(layer.param("parameter_param").message("shape").integers("dim"))
        self.value = nn.Parameter(source.take(shape, layer.param("parameter_param").message("")))

    def forward(self) -> Tensor:
        """The blob."""
        return self.value
