"""CNTK's convolution and pooling.

With automatic padding a dimension of n entries gives ceil(n / stride) windows, centred: the first window's middle lies at
(n - (windows - 1) stride - 1) // 2.

Legend: B rows, C channels, D spatial dimensions (row-major).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lockstep.core.errors import InputError
from lockstep.interop.cntk.ops import OPS, Apply
from lockstep.interop.cntk.reader import Attributes, Function, Shape
from lockstep.interop.cntk.values import Value
from lockstep.interop.windows import pool_windows

_CONVOLUTIONS: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED: dict[int, Callable[..., Tensor]] = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def _spread(node: Function, values: Any, num: int, what: str) -> tuple[int, ...]:
    """One entry for each dimension, in the tensor's order; a single entry serves all."""
    entries = [int(value) for value in values]
    if len(entries) == 1:
        entries *= num
    if len(entries) < num:
        raise node.fail(f"{what} {entries} for {num} dimensions")
    return tuple(entries[:num][::-1])


class _Geometry:
    """Stride, dilation and padding of the spatial dimensions."""

    def __init__(self, node: Function, attributes: Attributes, window: Shape, num: int) -> None:
        self.kernel = _spread(node, window, num, "window")
        self.stride = _spread(node, attributes.get("strides", None) or Shape([1]), num, "strides")
        self.dilation = _spread(node, attributes.get("dilation", None) or Shape([1]), num, "dilation")
        self.auto = _spread(node, attributes.get("autoPadding", None) or [False], num, "autoPadding")
        self.lower = _spread(node, attributes.get("lowerPad", None) or Shape([0]), num, "lowerPad")
        self.upper = _spread(node, attributes.get("upperPad", None) or Shape([0]), num, "upperPad")
        if (
            min(*self.kernel, *self.stride, *self.dilation) < 1
            or max(*self.kernel, *self.stride, *self.dilation) > 1 << 16
        ):
            raise node.fail(f"window {self.kernel}, strides {self.stride}, dilation {self.dilation}")
        if min(*self.lower, *self.upper) < 0 or max(*self.lower, *self.upper) > 1 << 16:
            raise node.fail(f"padding {self.lower}, {self.upper}")

    def edges(self, sizes: Sequence[int], *, rounds_up: bool = False) -> list[tuple[int, int]]:
        """Padding before and after each dimension; what lies behind the last window may stay."""
        found = []
        for dim, size in enumerate(sizes):
            reach = (self.kernel[dim] - 1) * self.dilation[dim] + 1
            if self.auto[dim]:
                num = -(-size // self.stride[dim])
                extra = size - ((num - 1) * self.stride[dim] + 1)
                lower = (reach - 1) // 2 - extra // 2
                found.append((lower, (num - 1) * self.stride[dim] + reach - size - lower))
                continue
            lower, upper = self.lower[dim], self.upper[dim]
            room = size + lower + upper - reach
            if room < 0:
                raise InputError(f"window {self.kernel} is larger than the padded input {tuple(sizes)}", field="window")
            if rounds_up:
                upper = max(upper, -(-room // self.stride[dim]) * self.stride[dim] + reach - size - lower)
            found.append((lower, upper))
        return found


def _convolution(node: Function, attributes: Attributes) -> Apply:
    window = attributes.get("kernelShape", Shape())
    transposed, groups = attributes.get("transpose", False), attributes.get("groups", 1)
    target = [dim for dim in attributes.get("outputShape", Shape()) if dim > 0]
    if attributes.get("sequential", False):
        raise node.fail("a convolution along the sequence is not supported")
    if not all(attributes.get("sharing", None) or [True]):
        raise node.fail("weights that are not shared between positions are not supported")
    num = len(window) - 1
    if num not in _CONVOLUTIONS or groups < 1:
        raise node.fail(
            f"kernel {tuple(window)}, groups={groups}: one to three spatial dimensions and channels are supported"
        )
    geometry = _Geometry(node, attributes, window, num)

    def apply(inputs: Sequence[Value], training: bool) -> Value:
        weight, value = inputs[0].dense().tensor, inputs[1].dense()
        x = value.tensor
        if len(value.static) != num + 1 or weight.ndim != num + 2:
            raise InputError(f"{node.uid}: operand {value.static} and kernel {tuple(weight.shape)}", field="operand")
        rows = x.reshape(-1, *value.static)
        if transposed:
            out = _transposed(rows, weight, geometry, target, groups)
        else:
            widths = [width for pair in reversed(geometry.edges(value.static[1:])) for width in pair]
            out = _CONVOLUTIONS[num](F.pad(rows, widths), weight, None, geometry.stride, 0, geometry.dilation, groups)
        return replace(value, tensor=out.reshape(*x.shape[: value.num_dynamic], *out.shape[1:]))

    return apply


def _transposed(rows: Tensor, weight: Tensor, geometry: _Geometry, target: list[int], groups: int) -> Tensor:
    num = len(geometry.kernel)
    full = _TRANSPOSED[num](rows, weight, None, geometry.stride, 0, 0, groups, geometry.dilation)
    sizes = target[:num][::-1]
    for dim in range(num):
        size, reach = rows.shape[2 + dim], (geometry.kernel[dim] - 1) * geometry.dilation[dim] + 1
        cells = (size - 1) * geometry.stride[dim] + 1
        if geometry.auto[dim]:
            wanted = sizes[dim] if sizes else cells
            lower = (reach - 1) // 2 - (wanted - cells) // 2
        else:
            lower = geometry.lower[dim]
            wanted = sizes[dim] if sizes else cells + reach - 1 - lower - geometry.upper[dim]
        missing = max(lower + wanted - full.shape[2 + dim], 0)
        before = max(-lower, 0)
        full = F.pad(full, [0, 0] * (num - 1 - dim) + [before, missing])
        full = full.narrow(2 + dim, max(lower, 0), wanted)
    return full


def _pooling(node: Function, attributes: Attributes) -> Apply:
    window = attributes.get("poolingWindowShape", Shape())
    kind = {0: "max", 1: "avg"}.get(attributes.get("poolingType", 0))
    rounds_up, counts = attributes.get("ceilOutDim", False), attributes.get("includePad", False)
    if kind is None:
        raise node.fail("poolingType is neither maximum nor average")

    def apply(inputs: Sequence[Value], training: bool) -> Value:
        value = inputs[0].dense()
        num = len(value.static) - 1
        sizes = value.static[1:]
        if not 1 <= num <= 3:
            raise InputError(
                f"{node.uid}: operand {value.static}; one to three dimensions behind channels are supported"
            )
        # A window over everything is written without dimensions.
        whole = not window or any(dim < 1 for dim in window)
        geometry = _Geometry(node, attributes, Shape(sizes[::-1]) if whole else window, num)
        edges = [(0, 0)] * num if whole else geometry.edges(sizes, rounds_up=rounds_up)
        stride = geometry.kernel if whole else geometry.stride
        rows = value.tensor.reshape(-1, *value.static)
        out = pool_windows(rows, kind, geometry.kernel, stride, edges, edges if counts else None)
        return replace(value, tensor=out.reshape(*value.tensor.shape[: value.num_dynamic], *out.shape[1:]))

    # Read here, so that a bad setting is an error when the model is loaded.
    for name in ("strides", "autoPadding", "lowerPad", "upperPad", "dilation"):
        attributes.get(name, None)
    return apply


CONVOLUTIONS = {**OPS, 17: ("Pooling", 1, _pooling), 33: ("Convolution", 2, _convolution)}
"""`OPS` with the operators of this file."""


def shift(tensor: Tensor, initial: Tensor, steps: int, dim: int) -> Tensor:
    """Values `steps` earlier along `dim`, `initial` where there is none (negative: later)."""
    num = abs(steps)
    size = tensor.shape[dim]
    head = initial.unsqueeze(dim) if initial.ndim == tensor.ndim - 1 else initial
    shape = list(tensor.shape)
    shape[dim] = min(num, size)
    fill = head.expand(shape)
    if num >= size:
        return fill
    parts = [fill, tensor.narrow(dim, 0, size - num)] if steps > 0 else [tensor.narrow(dim, num, size - num), fill]
    return torch.cat(parts, dim)
