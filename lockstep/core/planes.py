"""Quantised matrices in one form, whatever file they came from.

Legend: N rows (outputs), K columns (inputs), B groups of a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class QuantPlanes:
    """value[n, k] = scale[n, k // group] * code[n, k] + minimum[n, k // group].

    >>> codes = torch.full((1, 32), 3, dtype=torch.int8)
    >>> planes = QuantPlanes(codes_NK=codes, scale_NB=torch.tensor([[0.5]]), group=32, bits=4)
    >>> planes.dequantise()[0, :2].tolist()
    [1.5, 1.5]
    """

    codes_NK: Tensor
    """int8, the integers themselves: offsets and tables of the file format are applied."""
    scale_NB: Tensor
    """float32."""
    minimum_NB: Tensor | None = None
    """float32; None where the format has none."""
    group: int
    """16, 32, 64 or 128 columns share a scale."""
    bits: int
    """4: a row's codes take at most 16 values, those of `table`, or -8..7. 8: any int8."""
    table: tuple[int, ...] | None = None
    """The 16 values of a 4-bit format whose codes are not evenly spaced, rising or not; the place is the stored nibble."""

    def dequantise(self) -> Tensor:
        """float32 [N, K]: one multiplication, one addition, each rounded once."""
        scale = self.scale_NB.repeat_interleave(self.group, dim=1)
        values = self.codes_NK.to(torch.float32) * scale
        if self.minimum_NB is None:
            return values
        return values + self.minimum_NB.repeat_interleave(self.group, dim=1)
