"""Caffe's pooling: the output size rounds up, and the last window must start inside the image when there is padding.

Legend: M images, C channels, H and W size, P and Q pooled size.
"""

from __future__ import annotations

from torch import Tensor, nn

from lockstep.interop.caffe.reader import LayerSpec
from lockstep.interop.windows import pool_windows


class Pooling(nn.Module):
    """Maximum or average over windows.

    An average divides by the window's part inside the padded image, padding counted.
    """

    def __init__(
        self, method: str, kernel: tuple[int, int], stride: tuple[int, int], pad: tuple[int, int], *, rounds_up: bool
    ) -> None:
        super().__init__()
        self.kind = "max" if method == "MAX" else "avg"
        self.kernel = kernel
        self.stride = stride
        self.pad = pad
        self.rounds_up = rounds_up

    def _num_windows(self, size: int, dim: int) -> int:
        room = size + 2 * self.pad[dim] - self.kernel[dim]
        steps = -(-room // self.stride[dim]) if self.rounds_up else room // self.stride[dim]
        num = steps + 1
        if any(self.pad) and (num - 1) * self.stride[dim] >= size + self.pad[dim]:
            num -= 1
        return num

    def forward(self, x_MCHW: Tensor) -> Tensor:
        """x [M, C, H, W] -> [M, C, P, Q]."""
        edges = []
        for dim, size in enumerate(x_MCHW.shape[-2:]):
            reach = (self._num_windows(size, dim) - 1) * self.stride[dim] + self.kernel[dim]
            edges.append((self.pad[dim], max(reach - size - self.pad[dim], 0)))
        counted = [(a, min(b, self.pad[dim])) for dim, (a, b) in enumerate(edges)]
        return pool_windows(x_MCHW, self.kind, self.kernel, self.stride, edges, counted)


class GlobalPooling(nn.Module):
    """One window over the whole image."""

    def __init__(self, method: str) -> None:
        super().__init__()
        self.method = method

    def forward(self, x_MCHW: Tensor) -> Tensor:
        """x [M, C, H, W] -> [M, C, 1, 1]."""
        dims = (-2, -1)
        return x_MCHW.amax(dims, keepdim=True) if self.method == "MAX" else x_MCHW.mean(dims, keepdim=True)


def spatial(layer: LayerSpec, param: str, name: str, default: int, old: str | None = None) -> tuple[int, int]:
    """A height and width: `name_h` with `name_w`, or `name` (`old` where it is called otherwise) given once or twice."""
    message = layer.param(param)
    plain = old or name
    sides = (f"{name}_h", f"{name}_w")
    if any(side in message for side in sides):
        if plain in message or not all(side in message for side in sides):
            raise layer.fail(f"give {plain}, or both {sides[0]} and {sides[1]}")
        return message.integer(sides[0], default), message.integer(sides[1], default)
    values = message.integers(plain) or [default]
    if len(values) > 2:
        raise layer.fail(f"{plain} has {len(values)} values; layers over two spatial dimensions are read here")
    return values[0], values[-1]


def build_pooling(layer: LayerSpec, shape: tuple[int, ...]) -> nn.Module:
    """The layer for an image of `shape` [M, C, H, W]."""
    param = layer.param("pooling_param")
    if len(shape) != 4:
        raise layer.fail(f"input of shape {shape}; four dimensions were expected")
    if len(layer.tops) > 1:
        raise layer.fail("has a second output (the mask of positions), which is not supported")
    method = param.enum("pool", ("MAX", "AVE", "STOCHASTIC"), "MAX")
    if method == "STOCHASTIC":
        raise layer.fail("stochastic pooling is not supported; MAX and AVE are")
    pad = spatial(layer, "pooling_param", "pad", 0)
    stride = spatial(layer, "pooling_param", "stride", 1)
    if param.flag("global_pooling", False):
        if any(pad) or stride != (1, 1) or any(name in param for name in ("kernel_size", "kernel_h", "kernel_w")):
            raise layer.fail("global_pooling takes neither a kernel nor padding nor a stride")
        return GlobalPooling(method)
    kernel = spatial(layer, "pooling_param", "kernel", 0, "kernel_size")
    if min(kernel) < 1 or min(stride) < 1 or min(pad) < 0 or pad[0] >= kernel[0] or pad[1] >= kernel[1]:
        raise layer.fail(
            f"kernel {kernel}, stride {stride}, pad {pad}: kernel and stride are at least 1, pad below kernel"
        )
    rounds_up = param.enum("round_mode", ("CEIL", "FLOOR"), "CEIL") == "CEIL"
    pooling = Pooling(method, kernel, stride, pad, rounds_up=rounds_up)
    for dim in (0, 1):
        if shape[2 + dim] + 2 * pad[dim] < kernel[dim]:
            raise layer.fail(f"kernel {kernel} is larger than the padded image {shape[2:]}")
        if (pooling._num_windows(shape[2 + dim], dim) - 1) * stride[dim] >= shape[2 + dim] + pad[dim]:
            raise layer.fail(f"with stride {stride} above kernel {kernel} a window of image {shape[2:]} holds no pixel")
    return pooling
