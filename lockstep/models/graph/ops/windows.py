"""Sizes and paddings of sliding windows, shared by convolutions and pools."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lockstep.models.graph.call import Call


def padding(call: Call, sizes: list[Any], kernel: list[int], strides: list[int], dilations: list[int]) -> list[int]:
    """[begin of each axis..., end of each axis...], the attribute's order."""
    rank = len(kernel)
    auto = call.get("auto_pad", "NOTSET")
    if auto in ("NOTSET", ""):
        return list(call.get("pads", (0,) * (2 * rank)))
    begin, end = [0] * rank, [0] * rank
    if auto == "VALID":
        return begin + end
    for i in range(rank):
        reach = (kernel[i] - 1) * dilations[i] + 1
        size = int(sizes[i])
        total = max((-(-size // strides[i]) - 1) * strides[i] + reach - size, 0)
        begin[i] = total // 2 if auto == "SAME_UPPER" else total - total // 2
        end[i] = total - begin[i]
    return begin + end


def padded(x: Tensor, pads: list[int], value: float) -> Tensor:
    """The last axes with a border; negative borders crop."""
    rank = len(pads) // 2
    order = [pads[side * rank + axis] for axis in range(rank - 1, -1, -1) for side in (0, 1)]
    return F.pad(x, order, value=value)


def symmetric(pads: list[int]) -> list[int] | None:
    """One number for each axis where both sides are equal."""
    rank = len(pads) // 2
    return pads[:rank] if pads[:rank] == pads[rank:] and min(pads, default=0) >= 0 else None


def lifted(x: Tensor) -> torch.dtype:
    """The type in which a window operation runs."""
    return x.dtype if x.dtype.is_floating_point else torch.float64
