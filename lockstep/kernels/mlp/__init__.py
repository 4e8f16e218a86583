"""Dense chains: y = act(x W + b), several layers and several ensemble members in one call.

Legend: M rows, K in, N out, E ensemble members.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lockstep.core.errors import ConfigError, unknown_name
from lockstep.kernels import native
from lockstep.kernels.mlp import cpu, naive, opaque

IMPLEMENTATIONS = {"naive": naive.mlp, "cpu": cpu.mlp, "opaque": opaque.mlp}
ACTIVATIONS = tuple(naive.ACTIVATIONS)
DTYPES = ("fp32", "bf16")


def mlp(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None,
    activation: str,
    output_activation: str = "none",
    dtype: str = "fp32",
) -> Tensor:
    """Apply a chain of dense layers.

    Args:
        x: [..., K], or for an ensemble [M, K] shared by all members or [E, M, K].
        weights: per layer [K, N], or [E, K, N].
        biases: per layer [N] or [E, N] or None; None for no biases at all.
        activation: after every layer but the last: none, tanh, relu, elu, silu, gelu (tanh form), sigmoid.
        output_activation: after the last layer.
        dtype: "fp32", or "bf16": operands of all products, also those of the gradient, are rounded to bfloat16 and
            summed in float32.

    Returns:
        [..., N] or [E, M, N], float32. A row's bits do not depend on the other rows. Differentiable once with respect
        to x, weights and biases.

    Raises:
        InputError: for shapes that do not fit.
        ConfigError: for an unknown activation or dtype.
    """
    if biases is None:
        biases = (None,) * len(weights)
    if activation not in ACTIVATIONS or output_activation not in ACTIVATIONS:
        bad = activation if activation not in ACTIVATIONS else output_activation
        raise ConfigError(unknown_name("activation", bad, ACTIVATIONS))
    if dtype not in DTYPES:
        raise ConfigError(unknown_name("compute dtype", dtype, DTYPES))
    return IMPLEMENTATIONS[native.choose(x)](x, weights, biases, activation, output_activation, dtype)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str = "none", dtype: str = "fp32") -> Tensor:
    """One dense layer, y = act(x W + b); see `mlp`. x [..., K], weight [K, N], bias [N] or None."""
    return mlp(x, (weight,), (bias,), "none", activation, dtype)
