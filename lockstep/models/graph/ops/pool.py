"""Pools.

Legend: N rows, C channels, S spatial axes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lockstep.models.graph.call import Call
from lockstep.models.graph.ops.conv import spatial
from lockstep.models.graph.ops.windows import lifted, padded, padding
from lockstep.models.graph.values import Value, to_ints, to_tensor, to_tensors

Function = Callable[..., Any]

MAX: dict[int, Callable[..., Any]] = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}


class Windows:
    """Geometry of one pool call: kernel, strides, dilations, and the paddings that make every output's window whole."""

    def __init__(self, call: Call, x: Tensor) -> None:
        self.rank = rank = spatial(call, x)
        self.kernel = list(call.need("kernel_shape"))
        self.strides = list(call.get("strides", (1,) * rank))
        self.dilations = list(call.get("dilations", (1,) * rank))
        self.pads = padding(call, list(x.shape[2:]), self.kernel, self.strides, self.dilations)
        self.extended = list(self.pads)
        if call.get("ceil_mode", 0):
            for i in range(rank):
                reach = (self.kernel[i] - 1) * self.dilations[i] + 1
                size = int(x.shape[2 + i]) + self.pads[i] + self.pads[rank + i]
                out = -(-(size - reach) // self.strides[i]) + 1
                # A window that would begin in the far padding does not count.
                if (out - 1) * self.strides[i] >= int(x.shape[2 + i]) + self.pads[i]:
                    out -= 1
                self.extended[rank + i] += max((out - 1) * self.strides[i] + reach - size, 0)

    def unfolded(self, x: Tensor) -> Tensor:
        """[N, C, S...] (padded) -> [N, C, outputs..., taps]."""
        for i in range(self.rank):
            reach = (self.kernel[i] - 1) * self.dilations[i] + 1
            x = x.unfold(2 + i, reach, self.strides[i])
        for i in range(self.rank):
            if self.dilations[i] > 1:
                index = torch.arange(0, x.shape[2 + self.rank + i], self.dilations[i], device=x.device)
                x = x.index_select(2 + self.rank + i, index)
        return x.flatten(2 + self.rank)


def max_pool(call: Call, x: Value) -> Any:
    x = to_tensor(x)
    windows = Windows(call, x)
    dtype = lifted(x)
    wide = padded(x.to(dtype), windows.extended, -torch.inf)
    fn = MAX[windows.rank]
    if not call.wants(1):
        return fn(wide, windows.kernel, windows.strides, 0, windows.dilations).to(x.dtype)
    values, index = fn(wide, windows.kernel, windows.strides, 0, windows.dilations, return_indices=True)
    return values.to(x.dtype), _unpadded(index, x, wide, windows, call.get("storage_order", 0))


def _unpadded(index: Tensor, x: Tensor, wide: Tensor, windows: Windows, column_major: int) -> Tensor:
    """Places in the padded image -> flat places in the whole input."""
    sizes = list(x.shape[2:])
    axes: list[Tensor] = []
    for i in range(windows.rank - 1, -1, -1):
        axes.insert(0, index % wide.shape[2 + i] - windows.extended[i])
        index = index // wide.shape[2 + i]
    flat = torch.zeros_like(axes[0])
    for i in range(windows.rank - 1, -1, -1) if column_major else range(windows.rank):
        flat = flat * sizes[i] + axes[i]
    planes = torch.arange(x.shape[0] * x.shape[1], device=x.device)
    total = 1
    for n in sizes:
        total *= n
    return flat + (planes * total).reshape(x.shape[0], x.shape[1], *(1,) * windows.rank)


def average_pool(call: Call, x: Value) -> Tensor:
    x = to_tensor(x)
    windows = Windows(call, x)
    sums = windows.unfolded(padded(x, windows.extended, 0.0)).sum(-1)
    ones = torch.ones(1, 1, *x.shape[2:], dtype=x.dtype, device=x.device)
    inside = 1.0 if call.get("count_include_pad", 0) else 0.0
    rest = [e - p for e, p in zip(windows.extended, windows.pads, strict=True)]
    counted = padded(padded(ones, windows.pads, inside), rest, 0.0)
    return sums / windows.unfolded(counted).sum(-1)


def lp_pool(call: Call, x: Value) -> Tensor:
    x = to_tensor(x)
    windows, p = Windows(call, x), call.get("p", 2)
    taps = windows.unfolded(padded(x, windows.extended, 0.0))
    return taps.abs().pow(p).sum(-1).pow(1.0 / p)


def global_pool(fn: Callable[..., Tensor]) -> Function:
    """A reduction over all spatial axes."""

    def run(call: Call, x: Value) -> Tensor:
        x = to_tensor(x)
        return fn(x, tuple(range(2, x.ndim)), keepdim=True)

    return run


def global_lp_pool(call: Call, x: Value) -> Tensor:
    x, p = to_tensor(x), float(call.get("p", 2))
    return x.abs().pow(p).sum(tuple(range(2, x.ndim)), keepdim=True).pow(1.0 / p)


def max_unpool(call: Call, x: Value, index: Value, sizes: Value = None) -> Tensor:
    x, index = to_tensors((x, index))
    windows = Windows(call, x)
    inferred = [
        (int(n) - 1) * s + k - windows.pads[i] - windows.pads[windows.rank + i]
        for i, (n, s, k) in enumerate(zip(x.shape[2:], windows.strides, windows.kernel, strict=True))
    ]
    natural = [*x.shape[:2], *inferred]
    total = 1
    for n in natural:
        total *= n
    flat = torch.zeros(total, dtype=x.dtype).scatter(0, index.reshape(-1), x.reshape(-1)).reshape(natural)
    if sizes is None:
        return flat
    # The indices count in the inferred shape; a larger one gets zeros after it.
    wish = to_ints(sizes)
    order = [n for have, want in reversed(list(zip(natural, wish, strict=True))) for n in (0, want - have)]
    return F.pad(flat, order)


OPS: dict[str, Function] = {
    "AveragePool": average_pool,
    "GlobalAveragePool": global_pool(torch.mean),
    "GlobalLpPool": global_lp_pool,
    "GlobalMaxPool": global_pool(torch.amax),
    "LpPool": lp_pool,
    "MaxPool": max_pool,
    "MaxUnpool": max_unpool,
}
