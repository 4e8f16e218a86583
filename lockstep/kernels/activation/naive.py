"""Reference activations in plain torch.

Legend: T tokens, F feed-forward width.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "gelu": functional.gelu,
    "relu": functional.relu,
}


def activate(x: Tensor, kind: str) -> Tensor:
    """The activation of every element."""
    return FUNCTIONS[kind](x)


def gated(gate_up: Tensor, kind: str) -> Tensor:
    """act(gate) · up."""
    gate, up = gate_up.chunk(2, -1)
    return FUNCTIONS[kind](gate) * up
