"""Activations of feed-forward layers, alone and gated (Shazeer 2020).

Legend: T tokens, F feed-forward width.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lockstep.core.errors import ConfigError, InputError, unknown_name
from lockstep.kernels import native
from lockstep.kernels.activation import cpu, naive
from lockstep.kernels.gpu import Later

IMPLEMENTATIONS: dict[str, Any] = {
    "naive": naive,
    "cpu": cpu,
    "opaque": naive,
    "triton": Later("lockstep.kernels.activation.triton"),
}
KINDS = tuple(naive.FUNCTIONS)
"""silu, gelu_tanh (the tanh form), gelu (by the error function), relu. Their order is that of csrc/activation.cpp."""


def activate(x: Tensor, kind: str) -> Tensor:
    """The activation `kind` of every element of x, differentiable.

    Raises:
        ConfigError: unknown kind.
    """
    if kind not in KINDS:
        raise ConfigError(unknown_name("activation", kind, KINDS))
    return IMPLEMENTATIONS[native.choose(x, has_triton=True)].activate(x, kind)


def gated(gate_up_T2F: Tensor, kind: str) -> Tensor:
    """act(gate) · up, where a row holds the gate and then the factor.

    Args:
        gate_up_T2F: [..., 2F].

    Returns:
        [..., F], differentiable.

    Raises:
        ConfigError: unknown kind.
        InputError: an odd width.
    """
    if kind not in KINDS:
        raise ConfigError(unknown_name("activation", kind, KINDS))
    if gate_up_T2F.shape[-1] % 2:
        raise InputError(f"gate_up is {tuple(gate_up_T2F.shape)}; expected an even last size", field="gate_up")
    return IMPLEMENTATIONS[native.choose(gate_up_T2F, has_triton=True)].gated(gate_up_T2F, kind)
