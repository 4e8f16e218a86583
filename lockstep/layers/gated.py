"""The feed-forward half of a decoder layer.

Legend: T packed tokens, E model width, F feed-forward width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

from lockstep.core.adapters import AdapterRun
from lockstep.kernels.activation import activate, gated
from lockstep.layers.projection import Precision, Projection

GatedKind = Literal["silu", "gelu", "gelu_tanh"]
PlainKind = Literal["silu", "gelu", "gelu_tanh", "relu"]


class GatedMLP(nn.Module):
    """down(act(gate(x)) · up(x)) (Shazeer 2020), gate and up in one matrix."""

    def __init__(self, width: int, hidden: int, kind: GatedKind, precision: Precision, *, bias: bool = False) -> None:
        super().__init__()
        self.gate_up = Projection(width, (hidden, hidden), precision, bias=bias)
        self.down = Projection(hidden, (width,), precision, bias=bias)
        self.kind = kind

    def forward(self, x_TE: Tensor, adapters: Sequence[AdapterRun] = ()) -> Tensor:
        """x [T, E] -> [T, E]."""
        return self.down(gated(self.gate_up(x_TE, adapters), self.kind), adapters)


class PlainMLP(nn.Module):
    """down(act(up(x))), with biases."""

    def __init__(self, width: int, hidden: int, kind: PlainKind, precision: Precision) -> None:
        super().__init__()
        self.up = Projection(width, (hidden,), precision, bias=True)
        self.down = Projection(hidden, (width,), precision, bias=True)
        self.kind = kind

    def forward(self, x_TE: Tensor, adapters: Sequence[AdapterRun] = ()) -> Tensor:
        """x [T, E] -> [T, E]."""
        return self.down(activate(self.up(x_TE, adapters), self.kind), adapters)
